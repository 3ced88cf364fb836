"""One table of primitives: what one reader follows, the other does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

from jaxcomp.structure import channel_groups
from jaxcomp.structure.labelling import RULES
from jaxcomp.trace import primitives, sites
from tests.trace.models import normal

W, X = normal(1, 4, 6), normal(2, 3, 4)

# How to call each elementwise primitive on a weight; the other operands are constants.
BINARY = {
    "add": jnp.add, "atan2": lax.atan2, "complex": lax.complex,
    "div": lax.div, "max": lax.max, "min": lax.min, "mul": lax.mul, "nextafter": lax.nextafter, "pow": lax.pow,
    "rem": lax.rem, "sub": lax.sub, "igamma": lax.igamma, "igammac": lax.igammac, "polygamma": lax.polygamma,
    "zeta": lax.zeta, "eq": lax.eq, "ne": lax.ne, "lt": lax.lt, "le": lax.le, "gt": lax.gt, "ge": lax.ge,
}  # fmt: skip


def _applied(name, w):
    """The primitive called ``name`` on a float weight, or None where it takes no float."""
    second = jnp.full(w.shape, 2.0)
    special = {
        "integer_pow": lambda: lax.integer_pow(w, 3),
        "clamp": lambda: lax.clamp(-1.0, w, 1.0),
        "select_n": lambda: lax.select(second > 0, w, second),
        "regularized_incomplete_beta": lambda: lax.betainc(second, second, w),
        "logistic": lambda: lax.logistic(w),
        "polynomial": lambda: lax.polynomial(w, [0.5, second, 2.0]),
    }
    if name in special:
        return special[name]()
    if name in BINARY:
        return BINARY[name](w, second)
    f = getattr(lax, name, None)
    return f(w) if f is not None and name in UNARY else None


NAMES = """abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf erf_inv erfc exp
exp2 expm1 floor is_finite lgamma log log1p neg round rsqrt sign sin sinh sqrt square tan tanh"""
UNARY = frozenset(NAMES.split())
NEWER = frozenset({"log2", "one_minus_square", "polynomial"}) if hasattr(lax, "polynomial") else frozenset()
UNARY |= NEWER - {"polynomial"}
FLOATS = sorted(UNARY | BINARY.keys() | {
    "integer_pow", "clamp", "select_n", "regularized_incomplete_beta", "logistic", *NEWER
})  # fmt: skip


def test_a_product_with_an_arcsinh_of_a_weight_has_its_leaf() -> None:
    for f in (jnp.sinh, jnp.arcsinh):
        (site,) = sites(lambda p, x, f=f: x @ f(p["w"]))({"w": W}, X)
        assert site.leaf == "w", f.__name__
        assert site.operands[site.weight].leaf_roles == ("contracted", "output")


@pytest.mark.parametrize("name", FLOATS)
def test_every_elementwise_function_of_a_weight_keeps_its_leaf_and_its_channels(name: str) -> None:
    def fn(p, x):
        w = _applied(name, p["w"])
        w = lax.real(w) if jnp.iscomplexobj(w) else w.astype(jnp.float32)
        return jnp.tanh(x @ w) @ p["v"]

    p = {"w": W, "v": normal(3, 6, 2)}
    assert name in {e.primitive.name for e in _equations(jax.make_jaxpr(fn)(p, X).jaxpr)}
    assert [site.leaf for site in sites(fn)(p, X)] == ["w", "v"]
    assert not channel_groups(fn)(p, X).unknown


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from _equations(inner)


def test_structure_has_a_rule_for_every_primitive_of_the_table() -> None:
    known = (
        primitives.ELEMENTWISE
        | primitives.COPIES
        | primitives.PASSES
        | primitives.CONTROL
        | primitives.CALLS
        | primitives.EXPANDS
    )
    assert known | primitives.RELAID | primitives.CUTS | primitives.JOINS <= RULES.keys()


def test_each_elementwise_primitive_is_said_once() -> None:
    parts = (
        primitives.ZERO_FIRST, primitives.ZERO_ALL, primitives.ZERO_ANY, primitives.NOT_ZERO, primitives.COPIES,
        primitives.PASSES, primitives.RELAID, primitives.CUTS, primitives.CONTROL, primitives.CALLS, primitives.EXPANDS,
        primitives.JOINS,
    )  # fmt: skip
    names = [name for part in parts for name in part]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", sorted(set(FLOATS) & (primitives.ZERO_FIRST | primitives.NOT_ZERO)))
def test_zeros_go_to_zeros_where_the_table_says_so(name: str) -> None:
    at_zero = np.asarray(_applied(name, jnp.zeros((2, 2))))
    if name in primitives.ZERO_FIRST:
        np.testing.assert_array_equal(at_zero, 0)
