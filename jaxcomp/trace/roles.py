"""``roles``: what the products of a program do with each axis of each parameter."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from jaxcomp.core.paths import some_paths
from jaxcomp.core.roles import INDEXED, MIXED, SINGLE, STACKED, AxisRoles, Roles
from jaxcomp.core.types import Params, PyTree
from jaxcomp.trace.program import trace
from jaxcomp.trace.sites import Site, sites_of
from jaxcomp.trace.walk import Fn


def roles(fn: Fn) -> Callable[..., Roles]:
    """The roles of the axes of every parameter that a product of ``fn(params, *args)`` multiplies or looks up.

    Made once, it is what the ``roles=`` of ``quantize``, ``prune``, ``share`` and ``low_rank`` wants: scales, groups,
    filters, N:M patterns and ranks then lie where the program sums, whatever the layout, the names and the layers'
    stacking. Nothing is computed: leaves may be ``jax.ShapeDtypeStruct``.

    A table that is looked up and multiplied too, as a tied embedding is, has the roles of the product. An axis that one
    product sums over and another keeps is "mixed", and an error where it matters.

    Args:
      fn: a pure function whose first argument is the parameter tree.

    Raises:
      ValueError: no product of a parameter is found.

    >>> import jax.numpy as jnp
    >>> p = {"up": jnp.ones((4, 8)), "down": jnp.ones((3, 8))}
    >>> roles(lambda p, x: (x @ p["up"]) @ p["down"].T)(p, jnp.ones((2, 4)))
    Roles(
      up: contracted, output
      down: output, contracted
    )
    """

    @wraps(fn)
    def found(params: Params, *args: PyTree, **kwargs: PyTree) -> Roles:
        every = sites_of(trace(fn, params, *args, **kwargs))
        merged: dict[str, tuple[str, ...]] = {}
        for products in (True, False):  # a lookup says something only of leaves that no product multiplies
            before = set(merged)
            for path, names in _said(every, products):
                if products or path not in before:
                    merged[path] = _joined(merged[path], names) if path in merged else names
        if not merged:
            raise ValueError(
                f"roles: no product of a parameter was found; the sites are"
                f" {some_paths(s.path for s in every) or 'none'}."
            )
        return Roles({path: AxisRoles(names) for path, names in merged.items()})

    return found


def _said(every: tuple[Site, ...], products: bool) -> list[tuple[str, tuple[str, ...]]]:
    """What each site says of the leaves that it multiplies, or that it looks up."""
    return [
        (operand.leaf, operand.leaf_roles)
        for site in every
        if (site.kind != "embed") == products
        for operand in site.operands
        if operand.leaf is not None
    ]


def _joined(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    """The roles that two sites give one leaf."""
    return tuple(_both(x, y) for x, y in zip(a, b, strict=True))


def _both(x: str, y: str) -> str:
    if x == y or y in (SINGLE, STACKED):
        return x
    if x in (SINGLE, STACKED):
        return y
    return MIXED if INDEXED not in (x, y) else (y if x == INDEXED else x)
