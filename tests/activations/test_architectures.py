"""Every kind of network: gradients through both quantizers, integers equal to fake, coverage complete or explained.

Integers are equal to fake in what they give and in their gradients.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.activations import Act, NotOnIntegers, coverage, quantize_function
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.trace.calibrate import calibrate
from jaxcomp.trace.ranges import Range, min_max
from jaxcomp.trace.sites import Site, sites
from tests.structure.models import CASES, Case
from tests.trace.models import CASES as MORE

QUICK = {("gpt, tied, fused, rotary", 8), ("nnx", 4)}  # fmt: skip
NAMES = [*CASES, "linen_conv", "linen_scan_remat", "einsum", "recurrent"]
TABLE = [
    pytest.param(name, bits, marks=() if (name, bits) in QUICK else pytest.mark.slow, id=f"{name}, W{bits}A8")
    for name in NAMES
    for bits in (8, 4)
]
RULES = {r".*": Act(8)}
# What integers cannot do here, and why; everything else must run on them.
EXPLAINED = {"weight-standardized": {"a", "d"}, "einsum": {"w", "v+w"}}
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(autouse=True)
def jax_defaults():
    """Networks as users write them, under JAX's own rules of promotion."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def built(name: str) -> tuple[Case, tuple[Site, ...], dict[str, Range]]:
    """A network, its sites, and the ranges that it has on its own input; 1 where that input leads nowhere."""
    if name in MORE:
        fn, params, x = MORE[name]()
        case = Case(fn, params, (x,), [])
    else:
        case = CASES[name]()
    stats = jax.jit(calibrate(case.fn), compiler_options=FAST)(case.params, *case.args)
    found = {path: min_max(s) for path, s in stats.items()}
    ranges = {path: jax.tree.map(lambda end: jnp.where(jnp.isfinite(end), end, 1.0), r) for path, r in found.items()}
    return case, sites(case.fn)(case.params, *case.args), ranges


def weights(every: tuple[Site, ...], bits: int) -> jc.Transform:
    """Each weight on a grid with a scale for every index that its site does not sum over."""
    table: dict[Any, jc.Transform] = {}
    for s in every:
        if s.kind == "embed" or s.weight is None:
            continue
        operand = s.operands[s.weight]
        for path in [operand.leaf] if operand.leaf else operand.params:
            roles = operand.leaf_roles if operand.leaf else ("contracted", "output")
            kept = tuple(i for i, role in enumerate(roles) if role in ("output", "batch", "stacked"))
            grid = jc.quantize(jc.Int(bits), per=jc.Channels(kept), where=jc.core.everything)
            table.setdefault(functools.partial(_is, path), grid)
    unique = {where.args[0]: (where, t) for where, t in reversed(table.items())}
    return jc.by_path(dict(unique.values()))


def _is(path: str, found: str, leaf: Any) -> bool:
    return found == path and jc.core.everything(found, leaf)


def floats(tree: Any) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.concatenate([jnp.ravel(x) for x in leaves])


@pytest.mark.parametrize(("name", "bits"), TABLE)
def test_trains_and_runs_on_integers(name, bits):
    case, every, ranges = built(name)
    compress = weights(every, bits)
    state = compress.init(case.params)

    def out(tree, integer):
        return floats(quantize_function(case.fn, RULES, integer=integer)(tree, ranges, *case.args))

    def loss(params, integer):
        y = out(compress.apply(state, params), integer)
        return jnp.sum(jnp.sin(3 * y) + y), y

    @functools.partial(jax.jit, compiler_options=FAST)
    def all_of(params, packed):
        gradient = jax.value_and_grad(loss, has_aux=True, allow_int=True)
        (_, fake), grads = gradient(params, False)
        (_, trained), real_grads = gradient(params, True)
        return grads, real_grads, fake, trained, out(packed, True)

    tree = compress.apply(state, case.params)
    with pytest.warns(NotOnIntegers) if name in EXPLAINED else nullcontext():
        grads, real_grads, fake, trained, real = all_of(case.params, jc.pack(tree))
    assert np.isfinite(fake).all()
    np.testing.assert_allclose(real, fake, rtol=0, atol=1e-5 * float(jnp.abs(fake).max()))
    np.testing.assert_allclose(trained, fake, rtol=0, atol=1e-5 * float(jnp.abs(fake).max()))

    named = dict(leaves_with_paths(grads)[0])
    largest = float(np.abs(floats(grads)).max())
    for path, gradient in leaves_with_paths(real_grads)[0]:
        if np.issubdtype(gradient.dtype, np.floating):  # a key's bias has a gradient of 0, and rounding
            tolerance = 1e-3 * float(np.abs(named[path]).max()) + 1e-6 * largest
            np.testing.assert_allclose(gradient, named[path], rtol=0, atol=tolerance, err_msg=path)
    quantized = [p for p, leaf in leaves_with_paths(tree, is_leaf=is_quantized)[0] if is_quantized(leaf)]
    assert quantized
    assert all(np.isfinite(named[path]).all() for path in quantized)
    still = [path for path in quantized if not np.any(named[path] != 0)]
    if still:
        exact = dict(leaves_with_paths(exact_gradients(case))[0])
        assert all(np.abs(exact[path]).max() < 1e-6 for path in still), still

    rows = coverage(case.fn, RULES, integer=True)(tree, *case.args).rows
    assert {row.path for row in rows} == {s.path for s in every}
    rest = {row.path for row in rows if row.kind != "embed" and row.done != "integer"}
    assert rest == EXPLAINED.get(name, set())
    assert all(row.why for row in rows if row.path in rest)


def exact_gradients(case: Case) -> Any:
    """Of the float network: a branch not taken and a softmax over one position teach nothing there either."""

    def loss(params):
        y = floats(case.fn(params, *case.args))
        return jnp.sum(jnp.sin(3 * y) + y)

    return jax.jit(jax.grad(loss, allow_int=True), compiler_options=FAST)(case.params)


def is_quantized(x: Any) -> bool:
    return isinstance(x, jc.quantization.Quantized)
