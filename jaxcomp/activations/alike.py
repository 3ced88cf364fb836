"""Products that are alike, traced once: a network of a hundred equal layers has the traces of one.

Two are alike where their equations run the same primitive with the same parameters on the same types, in the same form.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.activations.codes import Codes, Value, array_of
from jaxcomp.activations.factors import Factor
from jaxcomp.activations.float_products import Form, Pair, float_product
from jaxcomp.core.barriers import made_once
from jaxcomp.trace.flow import Op


@dataclass(frozen=True, eq=False)
class Alike:
    """How a product is run, equal where nothing that its trace depends on differs.

    Attributes:
      op: the equation.
      form: of the product.
      once: whether XLA on CPU shall make the codes once for all that read them.
    """

    op: Op
    form: Form
    once: bool

    @cached_property
    def _key(self) -> Hashable:
        eqn = self.op.eqn
        types = tuple(v.aval for v in (*eqn.invars, *eqn.outvars))
        return type(self.op), eqn.primitive, tuple(sorted(eqn.params.items())), types, eqn.ctx, self.form, self.once

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alike) and self._key == other._key


def product(op: Op, form: Form, *, once: bool) -> partial[jax.Array]:
    """``product(x, y, factors, rest)``, as :func:`~jaxcomp.activations.float_products.float_product` gives it.

    Args:
      op: the equation.
      form: of the product.
      once: whether XLA on CPU shall make the codes once for all that read them.
    """
    plain = op.eqn.replace(source_info=_nowhere())  # the name of the site stands around the call
    return partial(_product, how=Alike(replace(op, eqn=plain), form, once))


@partial(jax.jit, static_argnames="how")
def _product(x: Value, y: Value, factors: Pair, rest: tuple[Value, ...], *, how: Alike) -> jax.Array:
    if how.once:  # or it rounds anew for each that reads the codes
        first, second = (_once(f) for f in factors)
        factors = first, second

    def run(x: Value, y: Value, factors: Pair, rest: tuple[Value, ...]) -> jax.Array:
        return float_product(how.op, how.form)(array_of(x), array_of(y), factors, rest)

    if isinstance(x, Codes) or isinstance(y, Codes):
        # Or a scan over layers keeps the dense weights of all of them for the backward pass, beside their codes.
        run = jax.checkpoint(run, prevent_cse=False)
    return run(x, y, factors, rest)


def _once(f: Factor) -> Factor:
    return replace(f, codes=made_once(f.codes))


@cache
def _nowhere() -> Any:
    """The place of an equation that stands in no scope."""
    return jax.make_jaxpr(jnp.negative)(0.0).eqns[0].source_info
