"""Trees over two real processes are saved as one process saves them, and errors end in both."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.artifact import load, save
from tests.processes import free_port, ran

pytestmark = pytest.mark.slow


def params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(16, 24)).astype(np.float32) for name in ("first", "second", "third")}


def compressed(given):
    """Leaves of three kinds, an array with zeros, numbers, and keys."""
    t = jc.by_path(
        {
            "first": jc.quantize(jc.Int(4)),
            "second": jc.chain(jc.prune(0.5), jc.quantize(jc.Int(8))),
            "third": jc.chain(jc.prune(0.8), jc.share(4)),
        }
    )
    leaves = jax.jit(lambda p: t.apply(t.init(p), p))(given)
    return {"leaves": leaves, "zeros": jax.numpy.where(given["first"] > 1, given["first"], 0), "epoch": 3}


PROCESS = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxcomp.artifact import FileError, file_size, save
from tests.artifact.test_processes import compressed, params
address, own, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, own, initialization_timeout=60)
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
put = lambda x, *spec: jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec(*spec)), lambda i: x[i])
tree = compressed({name: put(x, "data", "model") for name, x in params().items()})
tree["whole"] = put(params()["first"][:1])
tree["key"] = jax.random.key(7)
tree["keys"] = jax.jit(lambda: jax.random.split(jax.random.key(1), 4),
                       out_shardings=NamedSharding(mesh, PartitionSpec("data")))()
sizes = [save(f"{folder}/tree", tree), save(f"{folder}/coded", tree, coding="zstd")]
print("sizes", *sizes)
for wrong in (lambda: save(f"{folder}/none/tree", tree), lambda: file_size({"a": {"kernel": tree["zeros"]}}),
              lambda: save(f"{folder}/stream", iter([("a/kernel", tree["zeros"])])),
              lambda: save(f"{folder}/other", {"kernel": tree["zeros"], "odd": object()})):
    try:
        wrong()
    except (FileError, ValueError, TypeError) as e:
        print("error", type(e).__name__, e)
"""


def test_two_processes_save_what_one_saves(tmp_path) -> None:
    pytest.importorskip("zstandard")
    command, two = ["-c", PROCESS, f"127.0.0.1:{free_port()}"], "--xla_force_host_platform_device_count=2"
    ended = ran([[*command, str(own), str(tmp_path)] for own in (0, 1)], extra=lambda _: {"XLA_FLAGS": two})
    assert [p.code for p in ended] == [0, 0], ended

    alone = compressed({name: jax.numpy.asarray(x) for name, x in params().items()})
    alone |= {"whole": params()["first"][:1], "key": jax.random.key(7), "keys": jax.random.split(jax.random.key(1), 4)}
    alone["whole"] = jax.numpy.asarray(alone["whole"])
    sizes = [save(tmp_path / "alone", alone), save(tmp_path / "alone_coded", alone, coding="zstd")]
    assert (tmp_path / "tree").read_bytes() == (tmp_path / "alone").read_bytes()
    assert (tmp_path / "coded").read_bytes() == (tmp_path / "alone_coded").read_bytes()
    assert jax.tree.structure(load(tmp_path / "tree")) == jax.tree.structure(load(tmp_path / "alone"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "alone_coded", "coded", "tree"]
    for own, process in enumerate(ended):
        lines = [line for line in process.out.splitlines() if line.startswith(("sizes", "error"))]
        assert lines[0] == f"sizes {sizes[0]} {sizes[1]}"
        where = f"{tmp_path}/none/tree"
        assert lines[1] == (
            f"error FileError save: the first process cannot write {where!r}; its error says why."
            if own
            else f"error FileError save: cannot write {where!r}: No such file or directory."
        )
        mend = (
            "of shape (16, 24) lies on the devices of 2 processes, and this one has a part of it; give save the tree"
            " itself, in every process, or jax.experimental.multihost_utils.process_allgather(leaf, tiled=True)."
        )
        assert lines[2:4] == [f"error ValueError save: 'a/kernel' {mend}"] * 2
        assert lines[4].startswith("error TypeError save: 'odd' is object")
