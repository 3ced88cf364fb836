"""Every public transform and function on meshes of eight devices, with Explicit and with Auto axes.

``python -m tests.meshes`` prints the table; with names, the cases of these names. Each line of its
other output, ``python -m tests.meshes --json NAME...``, is a case, a way to run it, and what came out.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

if __name__ == "__main__":  # before JAX starts
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcomp as jc
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths
from tests.laws import bits_of, started
from tests.mesh_functions import FUNCTIONS, OUTSIDE_JIT, batch, specs, weights
from tests.test_laws import TRANSFORMS

TYPES = {"Explicit": AxisType.Explicit, "Auto": AxisType.Auto}
# Sums of floats over a sharded axis, in another order: products of factors, means of magnitudes, and codes of what
# these gave or of weights after a step of training, which may lie a step of the grid away.
ROUNDED = {"low_rank": 1e-5, "rank_one": 1e-5, "tucker": 1e-4, "cp": 1e-5, "pruned_signs": 1e-5}
ROUNDED |= {"low_rank_pruned_quantized": 0.05, "wrap_optax": 0.03, "quantize_function, backward": 1e-3}


class Way(NamedTuple):
    """How a case is run: the axes' type, how parameters are split, and whether inside jit."""

    axes: str
    split: str
    jit: bool

    def __str__(self) -> str:
        return f"{self.axes}, {self.split}, {'jit' if self.jit else 'eager'}"


WAYS = [
    Way("Explicit", "rows", True),
    Way("Explicit", "columns", True),
    Way("Explicit", "replicated", True),
    Way("Explicit", "rows", False),
    Way("Explicit", "columns", False),
    Way("Auto", "rows", True),
    Way("Auto", "columns", True),
]


QUICK = [Way("Explicit", "rows", True)]


def small_params() -> Any:
    """A kernel, a bias and a convolution, each axis that is split a multiple of 8."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {"dense": {"kernel": normal(16, 24), "bias": normal(24)}, "conv": [normal(3, 3, 8, 16)]}


def small_specs(split: str) -> Any:
    """How :func:`small_params` is split over the axis "d"."""
    last = {"rows": -2, "columns": -1}.get(split)

    def of(x: jax.Array) -> P:
        if last is None or (x.ndim == 1 and split == "rows"):
            return P(*[None] * x.ndim)
        return P(*("d" if i == x.ndim + last else None for i in range(x.ndim)))

    return jax.tree.map(of, small_params())


def put(tree: Any, mesh: Any, layout: Any) -> Any:
    """The tree on a mesh."""
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, layout)


def of_transform(t: jc.Transform) -> Callable[[Any], dict[str, Any]]:
    """All that a transform does: three updates, the leaves, the arrays, and a loss's gradient."""

    def run(params: Any) -> dict[str, Any]:
        state = started(t, params)
        seen = t.apply(state, params)

        def loss(p: Any) -> jax.Array:
            return sum(jnp.sum(x**2) for x in jax.tree.leaves(jc.materialize(t.apply(state, p))))

        return {"state": state, "seen": seen, "dense": jc.materialize(seen), "grads": jax.grad(loss)(params)}

    return run


def difference(many: Any, one: Any) -> float:
    """The largest relative difference of two trees of arrays; 0 where all bits are equal."""
    worst = 0.0
    assert jax.tree.structure(many) == jax.tree.structure(one), "other containers than on one device"
    for (path, x), (_, y) in zip(leaves_with_paths(many)[0], leaves_with_paths(one)[0], strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), f"{path}: {x.shape}, {x.dtype} for {y.shape}, {y.dtype}"
        if (bits_of(x) == bits_of(y)).all():
            continue
        a, b = np.asarray(x).astype(np.float64), np.asarray(y).astype(np.float64)
        gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, np.abs(a - b))
        worst = max(worst, float(np.max(gap) / max(np.abs(b[np.isfinite(b)]).max(initial=0), 1e-30)))
    return worst


def check_layout(result: dict[str, Any], params: Any) -> None:
    """Arrays of a parameter's shape, at its path, are laid out as it is."""
    for path, leaf in leaves_with_paths(params)[0]:
        for part in ("seen", "dense", "grads"):
            found = dict(leaves_with_paths(result[part], is_leaf=is_compressed)[0])[path]
            for x in jax.tree.leaves(found):
                if x.shape == leaf.shape:
                    assert x.sharding.is_equivalent_to(leaf.sharding, x.ndim), (
                        f"{part} {path}: {x.sharding.spec} for {leaf.sharding.spec}"
                    )


def transform_case(name: str, ways: list[Way]) -> Iterator[tuple[Way, str]]:
    """What comes out of a transform on each way."""
    run = of_transform(TRANSFORMS[name])
    one = {jit: (jax.jit(run) if jit else run)(small_params()) for jit in {way.jit for way in ways}}
    for way in ways:
        mesh = jax.make_mesh((8,), ("d",), axis_types=(TYPES[way.axes],))
        params = put(small_params(), mesh, small_specs(way.split))
        with jax.set_mesh(mesh):
            many = (jax.jit(run) if way.jit else run)(params)
            if way.axes == "Explicit":
                check_layout(many, params)
            packed = jc.materialize(jc.pack(many["seen"])) if not way.jit else many["dense"]
        kept = difference(packed, many["dense"])
        assert kept == 0, f"pack changes bits by {kept:.1e}"
        gap = difference(many["dense"], one[way.jit]["dense"])
        assert gap <= ROUNDED.get(name, 0), f"differs from one device by {gap:.1e}"
        slope = difference(many["grads"], one[way.jit]["grads"])
        assert slope <= max(ROUNDED.get(name, 0), 1e-5), f"the gradient differs from one device's by {slope:.1e}"
        yield way, "bits" if gap == 0 else f"{gap:.0e}"


def function_case(name: str, ways: list[Way]) -> Iterator[tuple[Way, str]]:
    """What comes out of a function on each way; its batch is split too."""
    run = FUNCTIONS[name]
    one = run(weights(), batch()) if name in OUTSIDE_JIT else jax.jit(run)(weights(), batch())
    for way in ways:
        outside = name in OUTSIDE_JIT
        if outside and way.jit and way._replace(jit=False) in ways:
            continue
        mesh = jax.make_mesh((2, 4), ("b", "d"), axis_types=(TYPES[way.axes],) * 2)
        params = put(weights(), mesh, specs(way.split))
        x = put(batch(), mesh, P("b", None))
        with jax.set_mesh(mesh):
            many = (run if outside or not way.jit else jax.jit(run))(params, x)
        gap = difference(many, one)
        assert gap <= ROUNDED.get(name, 1e-4), f"differs from one device by {gap:.1e}"
        yield way, "bits" if gap == 0 else f"{gap:.0e}"


def cases(names: list[str], ways: list[Way]) -> Iterator[tuple[str, Way, str]]:
    """What comes out of each case, or the error that it ends in."""
    for name in names:
        done: list[Way] = []
        left = ways
        while left:
            run = function_case if name in FUNCTIONS else transform_case
            try:
                for way, found in run(name, left):
                    done.append(way)
                    yield name, way, found
                break
            except Exception as e:
                failed = next(way for way in left if way not in done)
                done.append(failed)
                yield name, failed, f"{type(e).__name__}: {e}"
            left = [way for way in ways if way not in done]
        jax.clear_caches()  # the programs of all cases have more pages than Linux gives a process


def table(found: list[tuple[str, Way, str]]) -> str:
    """The cases of one outcome in one line each."""
    outcomes: dict[str, list[str]] = defaultdict(list)
    for name, _, what in found:
        outcomes[name].append("the same bits" if what == "bits" else "within rounding" if what[0].isdigit() else what)
    lines = ["| on eight devices, against one | transforms | functions |", "|---|---|---|"]
    by_outcome: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for name, whats in outcomes.items():
        worst = max(whats, key=lambda w: ("the same bits", "within rounding", w).index(w))
        by_outcome[worst][name in FUNCTIONS].append(name)
    for outcome, both in sorted(by_outcome.items()):
        cells = (f"{len(names)}: {', '.join(names)}" if names else "0" for names in both)
        lines.append(f"| {outcome} | {' | '.join(cells)} |")
    ran = Counter(way.axes for _, way, _ in found)
    return "\n".join([*lines, "", ", ".join(f"{n} runs on {axes} axes" for axes, n in ran.items())])


def main(args: list[str]) -> None:
    """Runs the cases that are named, or all."""
    assert jax.device_count() == 8
    names = [a for a in args if not a.startswith("--")] or [*FUNCTIONS, *TRANSFORMS]
    ways = QUICK if "--quick" in args else WAYS
    found = []
    for name, way, what in cases(names, ways):
        found.append((name, way, what))
        if "--json" in args:
            print(json.dumps([name, str(way), what]), flush=True)
    if "--json" not in args:
        print(table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
