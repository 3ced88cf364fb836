"""Files compressed leaf by leaf are those of the whole tree, byte for byte, and a cut run goes on."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxcomp as jc
from jaxcomp.artifact import FileError
from jaxcomp.scale import Leaves, compress_file, open_orbax, open_safetensors
from jaxcomp.scale.sources import TreeLeaves
from jaxcomp.scale.thresholds import Threshold, threshold
from tests.marks import quick

SHAPES = {
    "a": {"kernel": (16, 8), "bias": (8,)},
    "b": {"kernel": (8, 24), "scale": (24,)},
    "c": {"d": {"kernel": (24, 4)}},
}


EVEN = {
    "a": {"kernel": (16, 8), "bias": (8,)},
    "b": {"kernel": (16, 8), "scale": (8,)},
    "c": {"d": {"kernel": (16, 8)}},
}
"""For the quick tests: each new shape is compiled for."""


def params(seed: int = 0, shapes=EVEN):
    """Coarse values, so that there are ties."""
    rng = np.random.default_rng(seed)
    draw = lambda s: np.round(rng.normal(size=s), 1).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


TRANSFORMS = {
    "global": lambda: jc.chain(jc.prune(0.5, scope=jc.Global()), jc.quantize(jc.Int(4))),
    "nothing": jc.core.identity,
    "local": lambda: jc.prune(0.37),
    "count": lambda: jc.prune(101, scope=jc.Global()),
    "erk": lambda: jc.prune(0.6, scope=jc.pruning.ERK()),
    "given": lambda: jc.prune(scope=jc.pruning.Given({".*d/kernel": 0.2, ".*": 0.7})),
    "pattern": lambda: jc.prune(structure=jc.NM(2, 4)),
    "filters": lambda: jc.prune(0.5, structure=jc.Filters(), scope=jc.Global()),
    "twice": lambda: jc.chain(jc.prune(0.5, scope=jc.Global()), jc.prune(0.5, scope=jc.Global())),
    "schedule": lambda: jc.prune(jc.cubic(0.8, end=10, initial=0.3), scope=jc.Global()),
    "lamp": lambda: jc.prune(0.5, score=jc.pruning.lamp(), scope=jc.Global()),
    "factors": lambda: jc.chain(jc.low_rank(3), jc.prune(0.5, scope=jc.Global()), jc.quantize(jc.Int(8))),
    "tables": lambda: jc.chain(jc.prune(0.5, where="a.*"), jc.share(4)),
    "table": lambda: jc.by_path(
        {
            "a/.*": jc.quantize(jc.Int(8)),
            ".*kernel": jc.chain(jc.prune(0.5, scope=jc.Global()), jc.quantize(jc.Int(4), per=jc.Groups(4))),
        }
    ),
    "nf4": lambda: jc.recipes.nf4(4),
    "straight": lambda: jc.prune(0.5, gradient=jc.pruning.StraightThrough(), scope=jc.Global()),
}


def whole(path, t, tree, **more) -> bytes:
    """The file of the whole tree."""
    tree = jax.tree.map(jnp.asarray, tree)
    jc.save(path, t.apply(t.init(tree), tree), **more)
    return path.read_bytes()


@pytest.mark.parametrize("name", quick(TRANSFORMS, "global"))
def test_the_file_is_that_of_the_whole_tree(name, tmp_path) -> None:
    t, tree = TRANSFORMS[name](), params(shapes=EVEN if name == "global" else SHAPES)
    wanted = whole(tmp_path / "whole", t, tree, metadata={"of": name})
    size = compress_file(tmp_path / "made", tree, t, metadata={"of": name}, work=tmp_path / "work")
    assert (tmp_path / "made").read_bytes() == wanted
    assert size == len(wanted)
    assert not (tmp_path / "work").exists()


class Failing(Leaves):
    """Leaves that end after so many readings."""

    def __init__(self, inner: Leaves, left: int) -> None:
        self.inner, self.left, self.count = inner, left, 0

    shapes = property(lambda self: self.inner.shapes)
    about = property(lambda self: self.inner.about)

    def read(self, path):
        self.count += 1
        if self.count > self.left:
            raise KeyboardInterrupt
        return self.inner[path]


@pytest.mark.slow
def test_a_cut_run_goes_on_and_does_nothing_twice(tmp_path) -> None:
    t, tree = TRANSFORMS["twice"](), params()
    wanted = whole(tmp_path / "whole", t, tree)
    reads, kernels, leaves = [], 3, 5
    for left in (4, 4 * kernels + 1, 3, 99):
        source = Failing(TreeLeaves(tree), left)
        if left == 99:
            compress_file(tmp_path / "made", source, t, work=tmp_path / "work")
        else:
            with pytest.raises(KeyboardInterrupt):
                compress_file(tmp_path / "made", source, t, work=tmp_path / "work")
            assert not (tmp_path / "made").exists()
        reads.append(source.count)
    assert reads == [5, 4 * kernels + 2, 4, leaves - 1 - 3]
    assert (tmp_path / "made").read_bytes() == wanted


def test_a_damaged_leaf_is_made_again_and_another_job_refused(tmp_path) -> None:
    t, tree, work = TRANSFORMS["global"](), params(), tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        compress_file(tmp_path / "made", Failing(TreeLeaves(tree), 10), t, work=work)
    part = work / "000001.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(FileError, match=r"holds another job: its transform were .*; remove the folder"):
        compress_file(tmp_path / "made", tree, jc.prune(0.5), work=work)
    with pytest.raises(FileError, match=r"holds another job: its leaves were"):
        compress_file(tmp_path / "made", params(1), t, work=work)
    said = (work / "job.json").read_text()
    for text in ("[", "[]", said.replace('"thresholds": [', '"thresholds": [3, ')):
        (work / "job.json").write_text(text)
        with pytest.raises(FileError, match=r"job.json' is damaged; remove the folder"):
            compress_file(tmp_path / "made", tree, t, work=work)
    (work / "job.json").write_text(said)
    compress_file(tmp_path / "made", tree, t, work=work)
    assert (tmp_path / "made").read_bytes() == whole(tmp_path / "whole", t, tree)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").touch()
    with pytest.raises(FileError, match=r"holds other files; give an empty folder"):
        compress_file(tmp_path / "made", tree, t, work=tmp_path / "x")


def sharded(folder, tree) -> None:
    """Two safetensors files and their index, names with dots."""
    flat = {jc.core.path_str(p).replace("/", "."): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    names = sorted(flat, reverse=True)
    parts = {"m-1.safetensors": names[::2], "m-2.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({n: np.ascontiguousarray(flat[n]) for n in inside}, folder / file)
    index = {"weight_map": {n: f for f, inside in parts.items() for n in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_of_safetensors_are_read_leaf_by_leaf(tmp_path) -> None:
    tree = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params())
    (tmp_path / "in").mkdir()
    sharded(tmp_path / "in", tree)
    t = TRANSFORMS["global"]()
    wanted = whole(tmp_path / "whole", t, tree)
    for where in (tmp_path / "in", tmp_path / "in" / "model.safetensors.index.json"):
        compress_file(tmp_path / "made", open_safetensors(where), t)
        assert (tmp_path / "made").read_bytes() == wanted
    (tmp_path / "in" / "m-1.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(FileError, match=r"m-1.safetensors' is truncated or not a safetensors file"):
        open_safetensors(tmp_path / "in")
    (tmp_path / "in" / "m-1.safetensors").unlink()
    with pytest.raises(FileError, match=r"cannot read .*m-1\.safetensors"):
        open_safetensors(tmp_path / "in")


W = np.arange(6, dtype=np.float32).reshape(2, 3)


def shard(folder, name, tree) -> None:
    save_file(tree, folder / f"{name}.safetensors")


def index(folder, text) -> None:
    (folder / "model.safetensors.index.json").write_text(text)


def header(folder, said) -> None:
    text = json.dumps(said).encode()
    (folder / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))


MISTAKES = {
    "empty": (lambda d: None, "holds no \\*.safetensors file"),
    "part": (lambda d: shard(d, "m-00001-of-00002", {"w": W}), "and no 'm-00002-of-00002.safetensors'; get that file"),
    "index": (lambda d: index(d, "{"), "has a damaged index, 'model.safetensors.index.json'"),
    "list": (lambda d: index(d, "[]"), "weight_map does not name a file for each tensor"),
    "no map": (lambda d: index(d, "{}"), "weight_map does not name a file for each tensor"),
    "numbers": (lambda d: index(d, '{"weight_map": {"a": 3}}'), "weight_map does not name a file for each tensor"),
    "gone": (lambda d: index(d, '{"weight_map": {"a": "b.safetensors"}}'), "cannot read .*b.safetensors"),
    "negative": (
        lambda d: header(d, {"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}),
        "the header's entry of 'w' is none",
    ),
    "no entry": (lambda d: header(d, {"w": 3}), "the header's entry of 'w' is none"),
    "no type": (
        lambda d: header(d, {"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}),
        "holds 'w' of type F99, which is not known",
    ),
    "ours": (
        lambda d: jc.save(d / "x.safetensors", {"a": W, "b": W}),
        "is a file of jc.save, which jc.load reads",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_no_checkpoint_is_one_error(name, tmp_path) -> None:
    make, text = MISTAKES[name]
    make(tmp_path)
    with pytest.raises(FileError, match=f"open_safetensors: .*{text}"):
        open_safetensors(tmp_path)


def test_paths_and_sources_that_cannot_be(tmp_path) -> None:
    shard(tmp_path, "x", {"leaf": W, "other.kernel": W})
    with pytest.raises(TypeError, match="rename gives None for 'leaf'; give a path"):
        open_safetensors(tmp_path, rename=lambda name: None)
    with pytest.raises(FileError, match=r"holds 'other.kernel', whose path 'w' 'leaf' of 'x.safetensors' has, too"):
        open_safetensors(tmp_path, rename=lambda name: "w")
    shard(tmp_path, "y", {"leaf.kernel": W})
    with pytest.raises(ValueError, match="compress_file: 'leaf' is a leaf, and 'leaf/kernel' is in it; rename one"):
        compress_file(tmp_path / "made", open_safetensors(tmp_path), jc.prune(0.5))
    with pytest.raises(TypeError, match=r"source is a path; give open_safetensors\('x'\)"):
        compress_file(tmp_path / "made", "x", jc.prune(0.5))
    with pytest.raises(FileError, match=r"open_orbax: cannot read .*nowhere"):
        open_orbax(tmp_path / "nowhere")


KILLED = """
import os, signal, sys
import numpy as np
import jaxcomp as jc
from jaxcomp.scale import compress_file, open_safetensors
from jaxcomp.scale.shards import Safetensors

read, left = Safetensors.read, int(sys.argv[2])
def fails(self, path):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, path)
Safetensors.read = fails
t = jc.chain(jc.prune(0.5, scope=jc.Global()), jc.quantize(jc.Int(4)))
compress_file(sys.argv[1] + "/made", open_safetensors(sys.argv[1] + "/in"), t, work=sys.argv[1] + "/work")
"""


@pytest.mark.slow
def test_killed_runs_go_on_and_leave_nothing_behind(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    sharded(tmp_path / "in", params())
    for left, code in ((3, -9), (8, -9), (2, -9), (99, 0)):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(left)]
        assert subprocess.run(command, check=False).returncode == code
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "made"]
    assert (tmp_path / "made").read_bytes() == whole(tmp_path / "whole", TRANSFORMS["global"](), params())


def test_a_full_disk_is_one_error_and_the_run_goes_on(tmp_path) -> None:
    t, tree = TRANSFORMS["nothing"](), params()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
        with pytest.raises(FileError, match=r"cannot write .*made': File too large"):
            compress_file(tmp_path / "made", tree, t, work=tmp_path / "work")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, kept)
    assert [p.name for p in tmp_path.iterdir()] == ["work"]
    compress_file(tmp_path / "made", tree, t, work=tmp_path / "work")
    assert (tmp_path / "made").read_bytes() == whole(tmp_path / "whole", t, tree)


@pytest.mark.slow
def test_an_orbax_checkpoint_is_read_leaf_by_leaf(tmp_path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    tree = params()
    with ocp.StandardCheckpointer() as c:
        c.save(tmp_path / "step" / "default", jax.tree.map(jnp.asarray, tree))
    t = TRANSFORMS["global"]()
    with pytest.raises(FileError, match="holds no checkpoint of a tree; 'default' in it does"):
        open_orbax(tmp_path / "step")
    leaves = open_orbax(tmp_path / "step" / "default")
    assert list(leaves) == ["a/bias", "a/kernel", "b/kernel", "b/scale", "c/d/kernel"]
    np.testing.assert_array_equal(leaves["b/kernel"], tree["b"]["kernel"])
    compress_file(tmp_path / "made", leaves, t)
    assert (tmp_path / "made").read_bytes() == whole(tmp_path / "whole", t, tree)
    (tmp_path / "step" / "default" / "_METADATA").write_text("{")
    with pytest.raises(FileError, match="Orbax finds no arrays in it"):
        open_orbax(tmp_path / "step" / "default")
    shutil.rmtree(tmp_path / "step")
    with pytest.raises(FileError, match=r"open_orbax: .*default' is damaged or cannot be read \(.*\); get it again"):
        leaves["b/kernel"]


@pytest.mark.parametrize(
    ("transform", "text"),
    [
        (lambda: jc.share(4, per=jc.Global()), "may need the whole tree at once"),
        (lambda: jc.Transform(lambda p: (), lambda s, p, *, step, **k: s, lambda s, p: p), "may need the whole tree"),
        (lambda: jc.prune(0.5, score=jc.pruning.sensitivity), "score 'sensitivity' needs statistics"),
        (lambda: jc.by_path({"nowhere": jc.quantize()}), "nowhere"),
        (lambda: jc.quantize(jc.Int(4), per=jc.Groups(7)), "a/kernel"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_read(transform, text, tmp_path) -> None:
    with pytest.raises(ValueError, match=text):
        compress_file(tmp_path / "made", Failing(TreeLeaves(params()), 0), transform())
    assert not any(tmp_path.iterdir())


def test_leaves_in_lists_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="'a/0' is in a list or a tuple"):
        compress_file(tmp_path / "made", {"a": [np.ones((2, 2), np.float32)]}, jc.prune(0.5))


@pytest.mark.parametrize("count", [0, 1, 5, 1000, 5000])
def test_a_threshold_ends_the_sorted_keys(count) -> None:
    rng = np.random.default_rng(count)
    keys = [rng.integers(0, 2**32, 2000, dtype=np.uint32) >> rng.integers(0, 31) for _ in range(3)]
    found = threshold(lambda: keys, lambda total: min(count, total))
    flat = np.sort(np.concatenate(keys))[:count]
    assert found == (Threshold(0, 0) if not count else Threshold(int(flat[-1]), int((flat == flat[-1]).sum())))
