"""Saving: what is coded, what comes leaf by leaf, and what is left when the disk is full or the process is killed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

import jaxcomp as jc
from jaxcomp.artifact import FileError, file_size, open_tree, save
from tests.artifact.by_hand import Compact
from tests.artifact.test_any_tree import assert_same

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
CODINGS = [None, "zstd", "ans"]


@pytest.fixture(scope="module")
def trees() -> dict[str, Any]:
    """Trees of many leaves, none of which must be compiled."""
    names = ("masks", "integers", "codebooks", "factors", "network_with_ranges", "containers")
    held = {n: jc.load(GOLDEN / f"{n}.safetensors") for n in names}
    rng = np.random.default_rng(1)
    held["arrays"] = {str(i): rng.standard_normal((3, i)).astype(np.float32) for i in range(60)}
    held["few values"] = {"w": rng.integers(0, 4, (300, 100)).astype(np.int8), "z": np.zeros((70, 9)), "e": np.ones(0)}
    held["one"], held["none"] = np.arange(7.0), {}
    return held


@pytest.mark.parametrize("coding", CODINGS[1:])
def test_coded_files_hold_the_same_bits(coding, trees, tmp_path) -> None:
    for name, tree in trees.items() if coding == "zstd" else list(trees.items())[-3:]:
        size = save(tmp_path / "f", tree, coding=coding, metadata={"name": name})
        assert size == os.path.getsize(tmp_path / "f") == file_size(tree, coding=coding, metadata={"name": name})
        save(tmp_path / "plain", tree)
        assert_same(jc.load(tmp_path / "f"), jc.load(tmp_path / "plain"))


def test_a_coded_file_is_small_in_its_small_things(trees, tmp_path) -> None:
    plain, coded = (save(tmp_path / "f", trees["arrays"], coding=c) for c in (None, "zstd"))
    floats = sum(x.nbytes for x in trees["arrays"].values())
    assert coded - floats < 264 + 60 * 20 < 60 * 80 < plain - floats
    held = safetensors.numpy.load_file(tmp_path / "f")
    assert list(held) == ["jaxcomp"]


def test_the_same_tree_gives_the_same_file(trees, tmp_path) -> None:
    for coding in CODINGS:
        for name in ("a", "b"):
            save(tmp_path / name, trees["masks"], coding=coding)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_coding_is_an_error(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"save: coding must be None, 'zstd' or 'ans', got 'gzip'"):
        save(tmp_path / "f", {}, coding="gzip")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


# Leaf by leaf


def pairs_of(tree: Any, path: tuple[str | int, ...] = ()) -> Any:
    """The leaves of nested dicts."""
    for key, x in tree.items():
        if isinstance(x, dict):
            yield from pairs_of(x, (*path, key))
        else:
            yield (*path, key), x


@pytest.mark.parametrize("coding", CODINGS[:2])
def test_a_stream_gives_the_file_of_its_tree(coding, trees, tmp_path) -> None:
    for name in ("masks", "codebooks", "arrays", "few values"):
        save(tmp_path / "whole", trees[name], coding=coding)
        save(tmp_path / "stream", pairs_of(trees[name]), coding=coding)
        assert (tmp_path / "whole").read_bytes() == (tmp_path / "stream").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["stream", "whole"]


def test_an_open_file_is_a_stream(trees, tmp_path) -> None:
    save(tmp_path / "f", trees["masks"])
    with open_tree(tmp_path / "f") as opened:
        save(tmp_path / "g", iter(opened.items()), coding="ans")
    assert_same(jc.load(tmp_path / "g"), jc.load(tmp_path / "f"))


ONE = np.ones(1)
WRONG = {
    "twice": ([("a/b", ONE), (("a", "b"), ONE)], ValueError, "'a/b' comes twice"),
    "through a leaf": ([("a", ONE), ("a/b", ONE)], ValueError, "'a' is a leaf and holds others"),
    "over others": ([("a/b", ONE), ("a", ONE)], ValueError, "'a' comes twice"),
    "no pair": ([ONE], TypeError, "must give pairs of a path and a leaf, got ndarray"),
    "no path": ([((1.5,), ONE)], TypeError, r"\(1\.5,\) is no path"),
    "no keys": ([((), ONE)], TypeError, r"\(\) is no path"),
    "no leaf": ([("a/f", len)], TypeError, "'a/f' is builtin_function_or_method"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_stream_that_is_none_leaves_nothing(name, tmp_path) -> None:
    pairs, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        save(tmp_path / "f", iter(pairs))
    assert os.listdir(tmp_path) == []


STREAMED = """
import resource, sys
import numpy as np
from jaxcomp.artifact import load, open_tree, save
def leaves():
    for i in range(40):
        yield f"layer_{i}/kernel", np.random.default_rng(i).integers(0, 50, (4 << 20,), np.uint8).view(np.float32)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
coding = None if sys.argv[2] == "None" else sys.argv[2]
save(sys.argv[1], iter([("a", np.ones(1 << 20, np.float32))]), coding=coding)
load(sys.argv[1])
before = peak()
save(sys.argv[1], leaves(), coding=coding)
with open_tree(sys.argv[1]) as tree:
    for (path, leaf) in leaves():
        assert np.array_equal(tree[path].view(np.uint8), leaf.view(np.uint8))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("coding", CODINGS)
def test_a_tree_larger_than_memory_is_saved_and_read(coding, tmp_path) -> None:
    """160 MB by leaves of 4 MB."""
    command = [sys.executable, "-c", STREAMED, os.fspath(tmp_path / "f"), str(coding)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60


# Full disks and killed processes


@pytest.mark.parametrize("how", ["plain", "zstd", "stream"])
def test_a_full_disk_leaves_the_old_file(how, tmp_path) -> None:
    rng = np.random.default_rng(0)
    tree = {str(i): rng.integers(0, 99, 1 << 16, np.uint8) for i in range(16)}
    save(tmp_path / "f", {"old": np.ones(5)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
    try:
        with pytest.raises(FileError, match=r"cannot write .*File too large"):
            save(
                tmp_path / "f",
                iter(tree.items()) if how == "stream" else tree,
                coding="zstd" if how == "zstd" else None,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["f"]
    assert (jc.load(tmp_path / "f")["old"] == 1).all()


KILLED = """
import sys
import numpy as np
from jaxcomp.artifact import save
rng = np.random.default_rng(0)
tree = {str(i): rng.standard_normal(1 << 18) for i in range(16)}
print("ready", flush=True)
while True:
    save(sys.argv[1], tree)
    save(sys.argv[1], {"old": np.ones(5)})
"""


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.03, 0.06, 0.09, 0.12])
def test_a_killed_process_leaves_a_whole_file(wait, tmp_path) -> None:
    save(tmp_path / "f", {"old": np.ones(5)})
    command = [sys.executable, "-c", KILLED, os.fspath(tmp_path / "f")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
    assert len(jc.load(tmp_path / "f")) in (1, 16)
    assert os.listdir(tmp_path) == ["f"]


def test_a_full_disk_is_one_error(tmp_path) -> None:
    """/dev/full takes the place of the file."""
    with pytest.raises(FileError, match="cannot write"):
        save("/dev/full/x", {"w": ONE})


def test_readers_ignore_what_they_do_not_know_and_refuse_what_they_must(tmp_path) -> None:
    def changed(change: Any) -> None:
        save(tmp_path / "f", {"w": np.arange(4.0) + 1, "v": jax.numpy.ones(3)}, coding="zstd")
        file = Compact.of((tmp_path / "f").read_bytes())
        change(file.said)
        (tmp_path / "f").write_bytes(file.file())

    changed(lambda said: said.update(later={"x": 1}))
    assert (jc.load(tmp_path / "f")["w"] == np.arange(4) + 1).all()
    changed(lambda said: said.update(needs=["holes"]))
    with pytest.raises(FileError, match=r"needs \['holes'\], which this jaxcomp does not know; use a newer one"):
        jc.load(tmp_path / "f")
    changed(lambda said: said["tree"]["dict"].append(["n", {"newkind": 1}]))
    with pytest.raises(FileError, match="'n' is of kind 'newkind', which is not known here"):
        jc.load(tmp_path / "f")
    with open_tree(tmp_path / "f") as opened:
        assert (opened["w"] == np.arange(4) + 1).all()
    changed(lambda said: said["pieces"][0].extend([said["pieces"][0][1][0] * 8, {"codec": "newcodec"}]))
    with pytest.raises(FileError, match=r"'w', whose code in bytes 264 to 296 is coded as 'newcodec', which is not"):
        jc.load(tmp_path / "f")
