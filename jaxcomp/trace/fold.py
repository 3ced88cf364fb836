"""``fold_batch_norm``: affine chains after a dot or convolution, folded into its kernel and one bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.meshes import shape_of
from jaxcomp.core.types import Params, PyTree, Shape
from jaxcomp.trace import nested
from jaxcomp.trace.chains import Chain, Step, find_chains
from jaxcomp.trace.evaluator import evaluate
from jaxcomp.trace.interpreter import Aux, Claim, Emitted, Monoid, zeros
from jaxcomp.trace.program import Program, is_array_like, trace
from jaxcomp.trace.tags import Tag
from jaxcomp.trace.walk import Fn, Location, Value


class Fold(NamedTuple):
    """What became of one site: its ``path``, the leaf that now holds the ``bias``, and the leaves that are ``gone``."""

    path: str
    bias: str | None
    gone: tuple[str, ...]


class FoldedFunction(NamedTuple):
    """A folded function and its parameters.

    Attributes:
      params: the tree given, with kernels scaled, one leaf a site turned into its bias, and ``None`` where a leaf
        is no longer needed (so it has no leaf there, whatever the containers are).
      fn: ``fn(params, *args)``, the same function without the affine equations.
      folds: what became of each folded site.
    """

    params: Params
    fn: Fn
    folds: tuple[Fold, ...]


def fold_batch_norm(fn: Fn) -> Callable[..., FoldedFunction]:
    """Folds what scales and shifts the output channels of dots and convolutions into their kernels.

    ``(x * w) a + b == x * (w a) + b`` for a chain of additions, subtractions, products and quotients with per-channel
    coefficients ``a``, ``b`` made of parameters alone: batch norm in inference mode, a scale, a bias. Chains are found
    in the jaxpr, by what they compute. A site is left as it is where its result, before the chain, is used twice, its
    kernel is used elsewhere or is not a leaf as it stands, or no leaf of the chain is free to hold the bias.

    Args:
      fn: a pure function ``fn(params, *args)`` in inference mode.

    Returns:
      A function of ``(params, *args)`` that gives :class:`FoldedFunction`; the values of ``args`` do not matter, and
      its ``fn`` takes other shapes of them.

    Raises (the folded function):
      ValueError: the parameters given are not those that folding returned.

    >>> def fn(p, x):
    ...     return (x @ p["w"] - p["mean"][None]) / p["std"][None]
    >>> p = {"w": jnp.ones((2, 3)), "mean": jnp.ones(3), "std": jnp.full(3, 2.0)}
    >>> folded = fold_batch_norm(fn)(p, jnp.ones((1, 2)))
    >>> folded.folds, folded.params["w"][0, 0], folded.fn(folded.params, jnp.ones((1, 2)))
    ((Fold(path='w', bias='std', gone=('mean',)),), Array(0.5, dtype=float32), Array([[0.5, 0.5, 0.5]], dtype=float32))

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2. The coefficients are the chain's value and derivative at
    0, which lose nothing where ``b`` is much larger than ``a``.
    """

    @wraps(fn)
    def fold(params: Params, *args: PyTree, **kwargs: PyTree) -> FoldedFunction:
        program = _inlined(fn, params, *args, **kwargs)
        plan = _plan(program)
        leaves, tree = jax.tree.flatten(params)
        named = dict(zip(program.param_paths, (i for i, leaf in enumerate(leaves) if is_array_like(leaf)), strict=True))
        shapes = [shape_of(leaf) if is_array_like(leaf) else leaf for leaf in leaves]
        for f, coefficients in zip(plan, _coefficients(program, plan, params, args, kwargs), strict=True):
            kernel, scale, shift = named[f.chain.site.leaf or ""], *coefficients
            leaves[kernel] = (leaves[kernel] * _as_leaf(f.chain, scale)).astype(leaves[kernel].dtype)
            for path in f.fold.gone:
                leaves[named[path]] = None
            if f.fold.bias is not None:
                leaves[named[f.fold.bias]] = shift.astype(shapes[named[f.fold.bias]].dtype)
        folded_params = jax.tree.unflatten(tree, leaves)
        return FoldedFunction(folded_params, _folded(fn, jax.tree.unflatten(tree, shapes)), tuple(f.fold for f in plan))

    return fold


@dataclass(frozen=True)
class _Planned:
    chain: Chain
    fold: Fold


def _inlined(fn: Fn, params: Params, *args: PyTree, **kwargs: PyTree) -> Program:
    """The program with every jit opened, so that a layer and its norm stand side by side."""

    def opened(inner_params: Params, *inner_args: PyTree, **inner_kwargs: PyTree) -> PyTree:
        program = trace(fn, inner_params, *inner_args, **inner_kwargs)
        return evaluate(program, {}, program.flatten(inner_params, *inner_args, **inner_kwargs), inline=True).out

    return trace(opened, params, *args, **kwargs)


def _plan(program: Program) -> tuple[_Planned, ...]:
    """The chains that can be folded, and where their biases go."""
    uses = _uses(program)
    chains = [c for c in find_chains(program) if uses.get(c.site.leaf or "") == [c.site.location]]
    shapes = {p: tuple(a.shape) for p, a in zip(program.param_paths, program.jaxpr.in_avals, strict=False)}
    while True:
        planned = _assigned(chains, uses, shapes)
        if len(planned) == len(chains):
            return tuple(planned)
        chains = [p.chain for p in planned]


def _assigned(chains: Sequence[Chain], uses: dict[str, list[Location]], shapes: dict[str, Shape]) -> list[_Planned]:
    """Gives each chain a leaf for its bias; chains that need one and find none are left out."""
    folded = {step.op.location for chain in chains for step in chain.steps if not step.moves}
    taken: set[str] = set()
    planned = []
    for chain in chains:
        free = [p for step in chain.steps for p in _leaves(step) if set(uses.get(p, ())) <= folded and p not in taken]
        fitting = [path for path in free if shapes[path] == chain.shape]
        if not fitting and _shifts(chain):
            continue
        bias = fitting[-1] if _shifts(chain) else None
        taken |= set(free)
        gone = tuple(dict.fromkeys(path for path in free if path != bias))
        planned.append(_Planned(chain, Fold(chain.site.path, bias, gone)))
    return planned


def _leaves(step: Step) -> list[str]:
    return sorted(frozenset().union(*(tag.params for tag in step.op.tags)))


def _shifts(chain: Chain) -> bool:
    return any(step.op.name in {"add", "sub"} for step in chain.steps)


def _uses(program: Program) -> dict[str, list[Location]]:
    """Where each leaf, or what is made of leaves alone, meets a value that is not; ``()`` for the result."""
    uses: dict[str, list[Location]] = {}

    def used(tags: Sequence[Tag], at: Location) -> None:
        for path in {p for tag in tags for p in tag.params | ({tag.origin.path} if tag.origin else set())}:
            uses.setdefault(path, []).append(at)

    for op in program.flow.ops:
        if op.name == "scan":
            parts = nested.scan_parts(op.eqn)
            used(op.tags[parts.consts : parts.consts + parts.carry], op.location)
        elif op.name in {"while", "cond"} or (not nested.is_open(op.eqn) and any(tag.args for tag in op.tags)):
            used(op.tags, op.location)
    used(program.flow.out_tags, ())
    return uses


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _AtZero:
    """A chain's value and derivative where the product is 0."""

    value: jax.Array
    slope: jax.Array


def _coefficients(
    program: Program, plan: Sequence[_Planned], params: Params, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]
) -> list[tuple[jax.Array, jax.Array]]:
    """(scale, shift) of each chain, in the shape ``Chain.shape``."""
    claims: dict[Location, Claim] = {}
    for i, planned in enumerate(plan):
        chain = planned.chain
        claims[chain.op.location] = Claim(_zero(chain))
        for step in chain.steps:
            claims[step.op.location] = Claim(_stepped(step))
        claims[chain.steps[-1].op.location] = Claim(_ending(str(i), chain))
    last = Monoid(zeros, lambda a, b: b)

    def run(real_params: Params) -> Aux:
        others = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype) if is_array_like(a) else a, (args, kwargs))
        values = program.flatten(real_params, *others[0], **others[1])
        return evaluate(program, claims, values, collect=last).aux

    arrays, tree = jax.tree.flatten(params)
    traced = [leaf for leaf in arrays if is_array_like(leaf)]

    def filled(values: Sequence[jax.Array]) -> Params:
        rest = iter(values)
        return jax.tree.unflatten(tree, [next(rest) if is_array_like(leaf) else leaf for leaf in arrays])

    aux = jax.jit(lambda values: run(filled(values)))(traced)
    return [aux[str(i)] for i in range(len(plan))]


def _zero(chain: Chain) -> Callable[..., list[Value]]:
    shape, dtype = chain.site.out_shape, chain.site.out_dtype
    return lambda *values: [_AtZero(jnp.zeros(shape, dtype), jnp.ones(shape, dtype))]


def _stepped(step: Step) -> Callable[..., list[_AtZero]]:
    def run(*values: Value) -> list[_AtZero]:
        def at(value: jax.Array) -> jax.Array:
            return step.op.bind(*values[: step.index], value, *values[step.index + 1 :])[0]

        box = values[step.index]
        assert isinstance(box, _AtZero)
        return [_AtZero(*jax.jvp(at, (box.value,), (box.slope,)))]

    return run


def _ending(name: str, chain: Chain) -> Callable[..., Emitted]:
    stepped = _stepped(chain.steps[-1])

    def run(*values: Value) -> Emitted:
        (box,) = stepped(*values)
        return Emitted([box.value], {name: (_by_channel(box.slope, chain.axes), _by_channel(box.value, chain.axes))})

    return run


def _by_channel(full: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A value that changes along ``axes`` only, with these axes alone, in their order."""
    kept = full[tuple(slice(None) if i in axes else 0 for i in range(full.ndim))]
    order = sorted(axes)
    return kept.transpose([order.index(a) for a in axes])


def _as_leaf(chain: Chain, scale: jax.Array) -> jax.Array:
    """Per-channel factors, layers in front, laid out to multiply the weight's leaf."""
    assert chain.site.weight is not None
    origin = chain.op.tags[chain.site.weight].origin
    assert origin is not None
    names = [*origin.stacked, *(a for _, axis in chain.channels for a in origin.axes[axis])]
    sized = scale.reshape([origin.shape[a] for a in names])
    ordered = sized.transpose([names.index(a) for a in sorted(names)])
    return ordered.reshape([size if a in names else 1 for a, size in enumerate(origin.shape)])


def _folded(fn: Fn, shapes: Params) -> Fn:
    """``fn`` over folded parameters: products with their bias, chains skipped, vanished leaves absent."""

    @wraps(fn)
    def folded(params: Params, *args: PyTree, **kwargs: PyTree) -> PyTree:
        program = _inlined(fn, _shaped(params, shapes), *args, **kwargs)
        values = program.flatten(params, *args, **kwargs)
        place = {path: i for i, path in enumerate(program.param_paths)}
        claims: dict[Location, Claim] = {}
        for planned in _plan(program):
            if planned.fold.bias is not None:
                index = place[planned.fold.bias]
                claims[planned.chain.op.location] = Claim(_biased(planned.chain), values[index])
                values[index] = None
            computing = [step for step in planned.chain.steps if not step.moves]
            claims |= {step.op.location: Claim(_skipped(step)) for step in computing}
        return evaluate(program, claims, values).out

    return folded


def _shaped(params: Params, shapes: Params) -> Params:
    """The folded parameters with a shape in the place of every leaf, those that are gone included."""
    likes = jax.tree.leaves(shapes)
    tree: jax.tree_util.PyTreeDef = jax.tree.structure(shapes)
    try:
        given = tree.flatten_up_to(params)
    except ValueError as e:
        raise ValueError(f"fold_batch_norm: the folded function takes the folded parameters; {e}.") from e
    now = [shape_of(leaf) if is_array_like(leaf) else like for leaf, like in zip(given, likes, strict=True)]
    return jax.tree.unflatten(tree, now)


def _biased(chain: Chain) -> Callable[..., list[Value]]:
    shape = [size if i in {y for y, _ in chain.channels} else 1 for i, size in enumerate(chain.site.out_shape)]
    return lambda bias, *values: [y + bias.reshape(shape).astype(y.dtype) for y in chain.op.bind(*values)]


def _skipped(step: Step) -> Callable[..., list[Value]]:
    return lambda *values: [values[step.index]]
