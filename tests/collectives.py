"""What masks, quantizers, k-means and packing send between eight devices, by the compiled programs, and what they give.

``python -m tests.collectives`` prints it; with ``--json`` and names, a line for each case and way of splitting.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

if __name__ == "__main__":  # before JAX starts
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcomp as jc
from jaxcomp.core import Channels
from jaxcomp.quantization import MSE, NF4
from jaxcomp.sharing.kmeans.inits import linear, quantile
from tests.laws import bits_of

SHAPES = {"kernel": (64, 128), "tied": (128, 64)}
WIDE = {"kernel": (512, 256), "tied": (256, 512)}
"""Leaves whose values k-means counts; those of fewer it sorts, in one place."""
MESHES = {"8": ((8,), ("d",)), "4x2": ((4, 2), ("d", "t")), "2x2x2": ((2, 2, 2), ("d", "f", "t"))}
SPLITS: dict[str, tuple[str, P]] = {
    "8, rows": ("8", P("d", None)),
    "8, columns": ("8", P(None, "d")),
    "4x2, both": ("4x2", P("d", "t")),
    "2x2x2, both": ("2x2x2", P(("d", "f"), "t")),
    "2x2x2, columns": ("2x2x2", P(None, ("f", "t"))),
}
CASES: dict[str, jc.Transform] = {
    "global mask": jc.prune(0.5, scope=jc.Global()),
    "local mask": jc.prune(0.7),
    "2:4": jc.prune(structure=jc.NM(2, 4)),
    "int8": jc.quantize(jc.Int(8)),
    "int4": jc.quantize(jc.Int(4)),
    "int4, groups": jc.quantize(jc.Int(4), per=jc.Groups(32)),
    "int4, least squares": jc.quantize(jc.Int(4), scale=MSE()),
    "nf4": jc.quantize(NF4()),
    "mask and int4": jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4))),
    "share": jc.share(16, init=linear),
    "share, all leaves": jc.share(40, per=jc.Global(), init=quantile),
    "share, kept codes": jc.chain(
        jc.prune(0.5), jc.share(8, per=jc.Global(), init=linear, preserve_zeros=True, recluster=False)
    ),
    "share, columns": jc.share(4, per=Channels(1), init=linear),
}
COUNTED = ("share", "share, all leaves", "share, kept codes")
_OPS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_FOUND = re.compile(rf"= (\(.*?\)|\S+) ({_OPS})(?:-start)?\(")


def shapes_of(name: str) -> dict[str, tuple[int, int]]:
    """Of a case's leaves."""
    return WIDE if name in COUNTED else SHAPES


def least_of(name: str) -> int:
    """The bytes of each of a case's leaves."""
    return int(np.prod(shapes_of(name)["kernel"])) * 4


def params(name: str) -> dict[str, jax.Array]:
    """A leaf of all kinds of values, and one of few, so that a threshold falls among many that are equal."""
    rng, shapes = np.random.default_rng(0), shapes_of(name)
    few = rng.integers(-3, 4, shapes["tied"]) / 4
    return {"kernel": jnp.asarray(rng.normal(size=shapes["kernel"]), jnp.float32), "tied": jnp.float32(few)}


def sent(text: str) -> dict[str, int]:
    """The bytes of the largest array that each kind of collective of a compiled program gives."""
    found: dict[str, int] = {}
    for shapes, op in _FOUND.findall(text):
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            bits = int(re.sub(r"\D", "", kind) or 8)  # pred has a byte
            size = int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64)) * bits // 8
            found[op] = max(found.get(op, 0), size)
    return found


def made(t: jc.Transform, *, pack: bool) -> Callable[[Any], Any]:
    """The leaves that a transform makes after an update, packed or not."""

    def run(p: Any) -> Any:
        state = t.update(t.init(p), jax.tree.map(lambda x: x * 1.5, p), step=jnp.int32(1))
        leaves = t.apply(state, p)
        return jc.pack(leaves) if pack else leaves

    return run


def cases(names: list[str], axes: AxisType) -> Iterator[tuple[str, str, bool, dict[str, int], bool]]:
    """Of each case and split: whether packed, what is sent, and whether the bits are those of one device."""
    for name in names:
        for pack in (False, True):
            run = made(CASES[name], pack=pack)
            one = jax.jit(run)(params(name))
            for split, (mesh_name, spec) in SPLITS.items():
                mesh = jax.make_mesh(*MESHES[mesh_name], axis_types=(axes,) * len(MESHES[mesh_name][0]))
                whole = jax.tree.map(lambda x, m=mesh, s=spec: jax.device_put(x, NamedSharding(m, s)), params(name))
                with jax.set_mesh(mesh):
                    compiled = jax.jit(run).lower(whole).compile()
                    many = compiled(whole)
                pairs = zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True)
                equal = all((bits_of(a) == bits_of(b)).all() for a, b in pairs)
                yield name, split, pack, sent(compiled.as_text()), bool(equal)


def order() -> str:
    """What low_rank does to three leaves on a mesh, as it is scheduled: g for a leaf gathered, s for an SVD."""
    mesh = jax.make_mesh(*MESHES["4x2"], axis_types=(AxisType.Auto,) * 2)
    like = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, P("d", "t")))
    text = jax.jit(jc.low_rank(4).init).lower({n: {"kernel": like} for n in "abc"}).compile().as_text()
    assert "is_scheduled=true" in text
    found = re.findall(r"= f32\[64,128\]\S* (all-gather)\(|(gesdd)", text)
    return "".join("g" if gathered else "s" for gathered, _ in found)


def main(args: list[str]) -> None:
    """Runs the cases that are named, or all."""
    if "--order" in args:
        print(json.dumps([order()]))
        return
    names = [a for a in args if not a.startswith("--")] or list(CASES)
    for found in cases(names, AxisType.Auto if "--auto" in args else AxisType.Explicit):
        print(json.dumps(found) if "--json" in args else found, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
