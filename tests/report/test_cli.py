"""The command: what it prints, its exit codes, and errors in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import flax.serialization
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxcomp as jc
from jaxcomp import cli
from jaxcomp.core.wrappers import Masked
from jaxcomp.report.inputs import read
from tests.command_line import runner
from tests.export.formats import random_leaf
from tests.report import trees

ROOT = Path(jc.__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network before and after, and files of other programs."""
    at = tmp_path_factory.mktemp("files")
    jc.save(at / "before.safetensors", trees.before(), metadata={"accuracy": 0.99, "by": "me"})
    jc.save(at / "after.safetensors", trees.after(), metadata={"accuracy": 0.98})
    flat = {"kernel": trees.before()["dense"]["kernel"], "bias": np.zeros(3, np.float64)}
    safetensors.numpy.save_file(flat, at / "other.safetensors", {"by": "them"})
    np.savez(at / "arrays.npz", **flat)
    np.save(at / "kernel.npy", flat["kernel"])
    (at / "flax.msgpack").write_bytes(flax.serialization.msgpack_serialize({"dense": flat}))
    return at


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """The exit code, output and errors of a command."""
    return runner(folder, monkeypatch, capsys)


def test_inspect_shows_what_a_file_holds(run, folder):
    code, out, err = run("inspect after.safetensors")
    lines, size = out.splitlines(), os.path.getsize(folder / "after.safetensors")
    assert (code, err) == (0, "")
    assert lines[:2] == [f"after.safetensors: jaxcomp, {size:,} bytes.", "accuracy: 0.98"]
    assert [line.split()[0] for line in lines[2:8]] == [
        "leaf", "conv/bias", "conv/kernel", "dense/kernel", "head/kernel", "total",
    ]  # fmt: skip
    assert "Masked Quantized int4" in lines[5]
    assert " 50% " in lines[5]


def test_inspect_shows_bits_beside_their_entropy(run, tmp_path):
    rng = np.random.default_rng(0)
    w = {"w": jnp.asarray(rng.standard_normal((500, 400)), jnp.float32)}
    t = jc.chain(jc.prune(0.9), jc.quantize(jc.Int(4), per=jc.Tensor()))
    jc.save(tmp_path / "coded", t.apply(t.init(w), w), coding="ans")
    code, out, _ = run(f"inspect {tmp_path / 'coded'}")
    assert code == 0
    assert "entropy" in out
    (leaf,) = json.loads(run(f"inspect {tmp_path / 'coded'} --form json")[1])["leaves"]
    assert leaf["entropy"] < leaf["bits"] < 1.01 * leaf["entropy"]
    assert leaf["bytes"] < tmp_path.joinpath("coded").stat().st_size


def test_inspect_as_json(run, folder):
    code, out, _ = run("inspect before.safetensors --form json")
    data = json.loads(out)
    assert code == 0
    assert data["metadata"] == {"accuracy": 0.99, "by": "me"}
    assert data["bytes"] == os.path.getsize(folder / "before.safetensors")
    assert {leaf["path"]: leaf["bits"] for leaf in data["leaves"]}["dense/kernel"] == 32


def test_inspect_reads_the_files_of_other_runtimes(run, tmp_path):
    tree = {"m": {"kernel": random_leaf(jc.Int(4)), "bias": np.ones(6, np.float32)}}
    jc.export.to_gguf(tmp_path / "net.gguf", tree, metadata={"tokens": ["a"] * 99})
    jc.export.to_compressed_tensors(tmp_path / "net", tree)
    for file, kind in (("net.gguf", "GGUF"), ("net", "compressed-tensors")):
        code, out, err = run(f"inspect {tmp_path / file}")
        assert (code, err) == (0, "")
        assert f"{file}: {kind}, " in out
        (row,) = [line for line in out.splitlines() if line.startswith("m/weight")]
        assert "Quantized int4" in row
    assert "99 in all" in run(f"inspect {tmp_path / 'net.gguf'}")[1]
    held = json.loads(run(f"inspect {tmp_path / 'net'} --form json")[1])
    assert held["bytes"] == os.path.getsize(tmp_path / "net" / "model.safetensors")
    (tmp_path / "torn.gguf").write_bytes((tmp_path / "net.gguf").read_bytes()[:-100])
    assert "torn.gguf' is truncated or damaged" in run(f"inspect {tmp_path / 'torn.gguf'}")[2]
    (tmp_path / "net" / "config.json").write_text("[")
    assert "has a damaged config.json" in run(f"inspect {tmp_path / 'net'}")[2]


def test_inspect_counts_what_the_file_holds_of_a_masked_leaf(run, tmp_path):
    mask = np.random.default_rng(0).random((64, 64)) < 0.05
    values = jnp.asarray(mask * np.float32(3))
    jc.save(tmp_path / "masked.safetensors", {"w": Masked(values, jnp.asarray(mask))})
    (leaf,) = json.loads(run(f"inspect {tmp_path / 'masked.safetensors'} --form json")[1])["leaves"]
    assert leaf["bytes"] == 5 * mask.sum()  # a distance, and a float32, of each that is kept
    assert "jaxcomp.pack" not in run(f"inspect {tmp_path / 'masked.safetensors'}")[1]


def test_diff_shows_what_differs_and_says_so_by_its_code(run, folder):
    code, out, err = run("diff before.safetensors after.safetensors")
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["path", "conv/kernel", "dense/kernel", "head/kernel", "3"]
    sizes = [os.path.getsize(folder / f"{name}.safetensors") for name in ("before", "after")]
    assert lines[-1] == f"3 leaves differ; {sizes[0]:,} and {sizes[1]:,} bytes."
    assert run("diff after.safetensors after.safetensors") == (0, "No leaf differs.\n", "")


def test_diff_as_json(run):
    code, out, _ = run("diff before.safetensors after.safetensors --form json")
    data = json.loads(out)
    assert code == 1
    assert [x["path"] for x in data["layers"]] == ["conv/kernel", "dense/kernel", "head/kernel"]
    assert data["layers"][1]["after"]["zeros"] == 0.5
    assert json.loads(run("diff after.safetensors after.safetensors --form json")[1])["layers"] == []


def test_report_writes_a_page(run, folder, tmp_path):
    page = tmp_path / "page.md"
    code, out, err = run(f"report before.safetensors after.safetensors --others before.safetensors --out {page}")
    assert (code, err) == (0, "")
    assert out.startswith(f"{page}: ")
    text = page.read_text()
    assert text.startswith("# before.safetensors and after.safetensors")
    assert text.count(" | 0.99 | ") == 2, "the files' own scores"
    given = f"report before.safetensors arrays.npz --others kernel.npy --score loss --lower --scores 1 3 2 --out {page}"
    assert run(given)[0] == 0
    assert "| network | bytes | loss |" in page.read_text()
    assert [line.split("|")[1].strip() for line in page.read_text().splitlines() if line.endswith("| best |")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("inspect nothing.safetensors", "error: read: cannot read 'nothing.safetensors': No such file or directory."),
        ("inspect .", "error: read: cannot read '.': Is a directory."),
        ("diff before.safetensors torn.safetensors", "error: read: 'torn.safetensors' is truncated"),
        ("inspect text.txt", "error: read: 'text.txt' is of no format that is read here; give a file of jaxcomp.save"),
        ("inspect empty", "error: read: 'empty' is of no format that is read here"),
        ("inspect pickled.npy", "error: read: 'pickled.npy' is no whole npy file of an array"),
        ("inspect torn.npz", "error: read: 'torn.npz' is no whole npz file of arrays"),
        ("inspect torn.msgpack", "error: read: 'torn.msgpack' is no whole msgpack file of Flax"),
        ("report before.safetensors after.safetensors --out a.txt", "error: report: 'a.txt' must end in .html or .md"),
        ("report before.safetensors after.safetensors --out no/a.md", "error: save: cannot write 'no/a.md': No such"),
        (
            "report kernel.npy arrays.npz --others kernel.npy --score loss --out a.md",
            "error: report: --others are drawn by their score; give --scores, 3 numbers, or save the files",
        ),
        (
            "report kernel.npy arrays.npz --scores 1 2 3 --out a.md",
            "error: report: --scores wants a number for each of the 2 files, got 3.",
        ),
    ],
)
def test_errors_are_one_line(run, folder, line, says):
    whole = (folder / "before.safetensors").read_bytes()
    (folder / "torn.safetensors").write_bytes(whole[:-1])
    (folder / "text.txt").write_text("a text of some length")
    (folder / "empty").write_bytes(b"")
    (folder / "torn.npz").write_bytes((folder / "arrays.npz").read_bytes()[:200])
    (folder / "torn.msgpack").write_bytes((folder / "flax.msgpack").read_bytes()[:50])
    np.save(folder / "pickled.npy", np.array([None, {}], object), allow_pickle=True)
    code, out, err = run(line)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
    assert not (folder / "a.md").exists()


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("other.safetensors", ["bias", "kernel"]),
        ("arrays.npz", ["bias", "kernel"]),
        ("flax.msgpack", ["dense/bias", "dense/kernel"]),
        ("kernel.npy", ["kernel"]),
    ],
)
def test_files_of_other_programs_are_read(run, folder, name, paths):
    held = read(folder / name)
    leaves = dict(jc.core.paths.leaves_with_paths(held.tree)[0])
    assert sorted(leaves) == paths
    kernel = next(v for k, v in leaves.items() if k.endswith("kernel"))
    assert (kernel == trees.before()["dense"]["kernel"]).all()
    assert held.bytes == os.path.getsize(folder / name)
    code, out, err = run(f"inspect {name}")
    assert (code, err) == (0, "")
    assert all(path in out for path in paths)


def test_help_names_every_command_and_wrong_words_are_told(run):
    code, out, _ = run("--help")
    assert code == 0
    for name in cli.COMMANDS:
        assert name in out
        assert run(f"{name} --help")[0] == 0
    code, out, err = run("inspekt x")
    assert code == 2
    assert "inspect, diff, report" in out + err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(("shell", "mark"), [("bash", "complete "), ("zsh", "#compdef jaxcomp")])
def test_completion_knows_the_commands(run, shell, mark):
    code, out, _ = run(f"completion {shell}")
    assert code == 0
    assert mark in out
    assert all(name in out for name in cli.COMMANDS)


def test_the_keyboard_stops_it_quietly(run, monkeypatch):
    def stopped(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", stopped)
    assert run("inspect x") == (130, "", "stopped.\n")


def test_the_package_installs_the_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"jaxcomp": "jaxcomp.cli:command"}
    assert callable(cli.command)
    assert any(d.startswith("tyro") for d in project["dependencies"])
    assert any(d.startswith("rich") for d in project["dependencies"])


@pytest.mark.slow
def test_a_pipe_that_closes_early_is_no_error(folder):
    line = f"{sys.executable} -m jaxcomp.cli diff before.safetensors after.safetensors --form json | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"{line}; echo ${{PIPESTATUS[0]}}"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout in ("{1\n", "{141\n"), "it had ended before, or was told that nobody reads on"
    assert done.stderr == ""
