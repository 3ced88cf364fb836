"""Bias correction: what compression moved the mean of each product by is put into the bias after it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.leaves import is_compressed, materialize
from jaxcomp.core.paths import Where, leaves_with_paths, matches
from jaxcomp.core.roles import OUTPUT
from jaxcomp.core.slots import replace_slots
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.ptq.rewrites.results import Left
from jaxcomp.trace.evaluator import evaluate
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim, Emitted, Monoid, zeros
from jaxcomp.trace.primitives import BARRED, RELAID, SAME
from jaxcomp.trace.program import Program, shapes_of, trace
from jaxcomp.trace.provenance import MOVES
from jaxcomp.trace.sites import Site, sites_of
from jaxcomp.trace.tags import Origin
from jaxcomp.trace.walk import Fn, Location, aval_of

_Data = tuple[tuple[PyTree, ...], Mapping[str, PyTree]]


class Corrected(NamedTuple):
    """Parameters with other biases.

    Attributes:
      params: the compressed tree given, with corrected biases.
      moved: by how much the mean of each product was off, in front of its correction, by the bias's path: the largest
        magnitude.
      left: products that were compressed and have no bias, and why.
    """

    params: Params
    moved: Mapping[str, float]
    left: tuple[Left, ...]


@dataclass(frozen=True)
class _Biased:
    """A product, the leaf of its bias, and the axes of its result that are channels."""

    site: Site
    op: Op
    bias: str
    channels: tuple[int, ...]


def correct_bias(fn: Fn, *, where: Where = r".*") -> Callable[..., Corrected]:
    """Puts into each bias what rounding or pruning moved the mean of its product by.

    ``b += E[x W] - E[x' W']``, where ``x'`` is what enters in the compressed network, all earlier biases corrected:
    products are taken in the program's order, within one run. The means are over all rows of the calibration data, so
    pad it as little as may be.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      where: which products, by path or as a predicate of ``(path, site)``.

    Returns:
      A function of ``(params, compressed, *args)``: the parameters before, the same tree with compressed leaves, and
      calibration data. It gives :class:`Corrected`.

    Raises:
      ValueError: no leaf of the second tree is compressed.

    >>> import jaxcomp as jc
    >>> fn = lambda p, x: x @ p["w"] + p["b"][None]
    >>> params, x = {"w": jnp.array([[0.4], [1.0]]), "b": jnp.zeros(1)}, jnp.ones((3, 2))
    >>> rounded = jc.quantize(jc.Int(2, narrow=True), per=jc.Tensor(), where="w").apply((), params)
    >>> float(fn(jc.materialize(rounded), x)[0, 0]), float(correct_bias(fn)(params, rounded, x).params["b"][0])
    (1.0, 0.3999999761581421)

    Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2, with the means of calibration data in place of those that
    batch norm implies.
    """

    @wraps(fn)
    def corrected(params: Params, compressed: Params, *args: PyTree, **kwargs: PyTree) -> Corrected:
        program = trace(fn, shapes_of(compressed), *args, **kwargs)
        named = dict(leaves_with_paths(compressed, is_leaf=is_compressed)[0])
        if not any(map(is_compressed, named.values())):
            raise ValueError(
                "correct_bias: no leaf of the second tree is compressed; give the parameters before and the compressed"
                " ones in this order: correct_bias(fn)(params, compressed, *args)."
            )
        biased, left = _biased(program, named, where)

        def run(one: Params, other: Params, data: _Data) -> dict[str, jax.Array]:
            wanted = _evaluated(program, one, data, {b.op.location: Claim(_mean(b)) for b in biased})
            claims = {b.op.location: Claim(_shifted(b), wanted[b.bias]) for b in biased}
            return _evaluated(program, other, data, claims)

        shifts = run(params, compressed, (args, kwargs)) if biased else {}
        new = {path: _added(named[path], shift) for path, shift in shifts.items()}
        moved = {path: float(jnp.abs(shift).max()) for path, shift in shifts.items()}
        return Corrected(replace_slots(compressed, new), moved, left)

    return corrected


_LAST = Monoid(zeros, lambda a, b: b)


def _evaluated(
    program: Program,
    params: Params,
    data: _Data,
    claims: Mapping[Location, Claim],
) -> dict[str, jax.Array]:
    values = program.flatten(materialize(params), *data[0], **data[1])
    return evaluate(program, claims, values, collect=_LAST).aux


def _added(bias: jax.Array, shift: jax.Array) -> jax.Array:
    return (jnp.asarray(bias) + shift.reshape(bias.shape).astype(bias.dtype)).astype(bias.dtype)


def _run(b: _Biased, values: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (y,) = b.op.bind(*values)
    others = tuple(i for i in range(y.ndim) if i not in b.channels)
    return y, jnp.mean(y.astype(compute_dtype(y.dtype)), axis=others)


def _mean(b: _Biased) -> Callable[..., Emitted]:
    def run(*values: jax.Array) -> Emitted:
        y, mean = _run(b, values)
        return Emitted([y], {b.bias: mean})

    return run


def _shifted(b: _Biased) -> Callable[..., Emitted]:
    def run(wanted: jax.Array, *values: jax.Array) -> Emitted:
        y, mean = _run(b, values)
        shift = wanted - mean
        shape = [n if i in b.channels else 1 for i, n in enumerate(y.shape)]
        return Emitted([y + shift.reshape(shape).astype(y.dtype)], {b.bias: shift})

    return run


def _biased(program: Program, leaves: Mapping[str, Leaf], where: Where) -> tuple[list[_Biased], tuple[Left, ...]]:
    """The products of compressed weights that have a bias of their own; and those that have none."""
    ops = {op.location: op for op in program.flow.ops}
    biases = Biases(program, {path for path, leaf in leaves.items() if is_compressed(leaf)})
    found: list[_Biased] = []
    left = []
    for site in sites_of(program):
        if site.leaf is None or not is_compressed(leaves[site.leaf]) or not matches(where, site.path, site):
            continue
        op = ops[site.location]
        bias = biases.of(site, op)
        if bias is None or not BARRED.isdisjoint(site.inside):
            left.append(Left(site.path, "no bias of its own is added to what it gives"))
        else:
            found.append(_Biased(site, op, bias, result_channels(site, op)))
    return found, tuple(left)


class Biases:
    """Which leaves are the biases of products.

    Args:
      program: of the function.
      held: paths of leaves that are no biases that one may move: those that are compressed, say.
    """

    def __init__(self, program: Program, held: Collection[str]) -> None:
        self._held = held
        self._users: dict[core.Var, list[Op]] = {}
        self._uses = Counter[str]()
        around = {op.location[:i] for op in program.flow.ops for i in range(1, len(op.location))}
        for op in program.flow.ops:
            for v in op.eqn.invars:
                if not isinstance(v, core.Literal):
                    self._users.setdefault(v, []).append(op)
            if op.location not in around and op.name not in RELAID | SAME:
                self._uses.update(path for tag in op.tags for path in tag.params)

    def of(self, site: Site, op: Op) -> str | None:
        """The array that is added to what a product gives, and used nowhere else: an element a channel, in its order.

        Args:
          site, op: the product.
        """
        added = self._added_to(op) if site.kind in ("dot", "conv") else None
        if added is None or self._uses[added[0].path] != 1 or added[0].path in self._held:
            return None
        origin, result = added
        layers, channels = len(site.layer_steps), result_channels(site, op)
        if origin.shape[:layers] != site.layer_steps or origin.stacked != tuple(range(layers)):
            return None
        met = [there for own, there in zip(origin.axes, result.axes, strict=True) if own]  # where it is not broadcast
        orders = [[a for axes in each for a in axes] for each in (origin.axes, met)]
        one_each = math.prod(origin.shape[layers:]) == math.prod(site.out_shape[i] for i in channels)
        return origin.path if one_each and {*orders[1]} <= {*channels} and orders == [*map(sorted, orders)] else None

    def _added_to(self, op: Op) -> tuple[Origin, Origin] | None:
        """The leaf added to a product's result, laid out or cast at most, and how the result's axes lie then."""
        v = op.eqn.outvars[0]
        shape = aval_of(v).shape
        result: Origin | None = Origin("", shape, "", tuple((i,) for i in range(len(shape))))
        while result is not None and len(after := self._users.get(v, [])) == 1:
            (user,) = after
            if user.name in RELAID or user.name in SAME:
                result = MOVES[user.name](user.eqn, result) if user.name in RELAID else result
                v = user.eqn.outvars[0]
                continue
            if user.name != "add":
                return None
            index = next(i for i, u in enumerate(user.eqn.invars) if u is v)
            tag = user.tags[1 - index]
            return (tag.origin, result) if tag.origin is not None and tag.origin.exact and not tag.args else None
        return None


def result_channels(site: Site, op: Op) -> tuple[int, ...]:
    """The axes of a product's result that are its weight's own."""
    if site.kind != "dot":
        return (op.eqn.params["dimension_numbers"].out_spec[1],) if site.kind == "conv" else ()
    free = [[r for r in operand.roles if r == OUTPUT] for operand in site.operands]
    batch = len(op.eqn.params["dimension_numbers"][1][0])
    first = batch + (len(free[0]) if site.weight == 1 else 0)
    return tuple(range(first, first + len(free[site.weight or 0])))
