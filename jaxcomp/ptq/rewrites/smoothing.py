"""Scales moved from activations into weights: SmoothQuant's, AWQ's, and cross-layer equalization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.paths import Where, matches, some_paths
from jaxcomp.core.roles import BATCH, CONTRACTED
from jaxcomp.core.slots import replace_slots
from jaxcomp.core.types import Params, PyTree
from jaxcomp.ptq.rewrites.diagonals import Choice, Diagonal, Side, Vector, arrays_of, diagonals_of
from jaxcomp.ptq.rewrites.inputs import entry_of, name_of, with_factors
from jaxcomp.ptq.rewrites.results import Left, Rewritten, checked, difference
from jaxcomp.trace.program import Program, trace
from jaxcomp.trace.sites import sites_of
from jaxcomp.trace.walk import Fn

Arrays = Mapping[str, jax.Array]
_LEAST = 1e-5
"""Channels that are smaller, of the largest, are taken to be this large."""


def smooth(fn: Fn, *, alpha: float = 0.5, where: Where = r".*", insert: bool = False) -> Callable[..., Rewritten]:
    """Moves the scales of outlying channels from activations into the weights that multiply them.

    Channel j of what enters a product is divided by ``s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)``, and the weight's
    row j multiplied by it. The division is put into whatever makes the channel: a norm's scale and bias, the columns
    of a linear layer before it, through relu, the products of gates, attention's mixing. Products that share an input
    share ``s``. Where nothing can take the division (a gelu, or a residual sum, stands in between) the product is
    listed in ``left``, or served with ``insert``, which multiplies its input as it enters.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      alpha: how much is moved, from 0 (none of the activation's) to 1 (all).
      where: which weights, by path or as a predicate of ``(path, array)``; a channel is served for all that share it
        where one of them is selected.
      insert: put a factor in front of the products that have no other place; see :class:`Rewritten`.

    Returns:
      A function of ``(params, peaks, *args)`` giving :class:`Rewritten`; ``peaks`` is what
      :func:`~jaxcomp.ptq.rewrites.inputs.input_peaks` saw, and ``args`` are some to check the result on.

    Raises:
      ValueError: an ``alpha`` outside of 0..1.

    Raises (the function returned):
      TypeError: a leaf is compressed already.
      ValueError: ``peaks`` have no entry for a selected weight, or one that is not finite.

    >>> from jaxcomp.ptq.rewrites.inputs import input_peaks
    >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> params = {"up": jnp.array([[8.0, 1.0]]), "down": jnp.array([[1.0], [1.0]])}
    >>> x = jnp.array([[2.0]])
    >>> done = smooth(fn, where="down")(params, input_peaks(fn)(params, x), x)
    >>> done.params["up"].tolist(), done.params["down"].ravel().tolist()
    ([[2.0, 0.7071067690849304]], [4.0, 1.4142135381698608])

    Source: Xiao et al. 2023, arXiv:2211.10438, equation 4. The paper names the layers that take the division; here
    they are found in the program.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"smooth: alpha must be in 0..1, got {alpha}.")

    @wraps(fn)
    def smoothed(params: Params, peaks: Arrays, *args: PyTree, **kwargs: PyTree) -> Rewritten:
        def choice(diagonal: Diagonal, leaves: Arrays) -> Vector | None:
            sides = [s for s in diagonal.inputs if matches(where, s.path, leaves[s.path])]
            if not sides:
                return None
            tops = [s.gathered(given("smooth", peaks, s.path), diagonal.size) for s in sides]
            read = [s.gathered(rows(leaves[s.path], s), diagonal.size) for s in diagonal.inputs]
            return _ratio(np.max(tops, axis=0), np.max(read, axis=0), alpha)

        return rewritten("smooth", fn, choice, (params, args, kwargs), where=where, insert=insert)

    return smoothed


def given(owner: str, known: Arrays, path: str) -> jax.Array:
    """What is known of the channels that a leaf sums over.

    Raises:
      TypeError: what is no array.
      ValueError: nothing, or what is not finite.
    """
    if path not in known:
        raise ValueError(
            f"{owner}: the statistics have no entry for {path!r}, only {some_paths(known) or 'none'}; make them of "
            "this function, by input_peaks or input_moments, with the same where=."
        )
    values = known[path]
    if not hasattr(values, "shape"):
        raise TypeError(
            f"{owner}: the statistics of {path!r} are {type(values).__name__}, wanted an array; make them by"
            " input_peaks(fn)(params, *args)."
        )
    if not np.isfinite(np.asarray(values)).all():
        raise ValueError(f"{owner}: the statistics of {path!r} are not finite; look for the batch that made them so.")
    return values


def rows(leaf: jax.Array, side: Side) -> jax.Array:
    """The largest magnitude of each of a side's channels."""
    return jnp.abs(leaf).max(tuple(i for i in range(leaf.ndim) if i not in side.axes))


def _ratio(x: Vector, w: Vector, alpha: float) -> Vector:
    """``x^alpha / w^(1 - alpha)``, and 1 where a channel is never active or never read."""
    used = (x > 0) & (w > 0)
    x, w = (np.maximum(np.where(used, v, 1), _LEAST * v.max(initial=0)) for v in (x, w))
    return np.where(used, x**alpha / w ** (1 - alpha), 1).astype(np.float32)


def rewritten(
    owner: str,
    fn: Fn,
    choice: Choice,
    call: tuple[Params, tuple[PyTree, ...], Mapping[str, PyTree]],
    *,
    where: Where,
    insert: bool,
    rounds: int = 1,
) -> Rewritten:
    """The parameters with the factors that ``choice`` has for each diagonal."""
    params, args, kwargs = call
    before = arrays_of(params, owner)
    program = trace(fn, params, *args, **kwargs)
    found = diagonals_of(program)
    after, moved, inputs = dict(before), dict[str, None](), dict[str, jax.Array]()
    for _ in range(rounds):
        steps = [_step(choice, diagonal, after, moved) for diagonal in found]
        if max(steps, default=0.0) < _SETTLED:
            break
    placed = {side.path for diagonal in found for side in diagonal.inputs}
    homeless, left = _homeless(program, before, where, placed)
    for diagonal in homeless if insert else ():
        s = choice(diagonal, after)
        if s is not None:
            after |= diagonal.applied(after, s)
            moved |= dict.fromkeys(side.path for side in diagonal.sides)
            inputs |= {name_of(side.path): jnp.asarray((1 / s)[side.channel]) for side in diagonal.sides}
    new, new_fn = replace_slots(params, {path: after[path] for path in moved}), fn
    if insert:
        new, new_fn = {"params": new, "inputs": inputs}, with_factors(fn)
        left = tuple(x for x in left if name_of(x.path) not in inputs)
    worst = difference((fn, params), (new_fn, new), (args, kwargs))
    return Rewritten(new, new_fn, tuple(moved), left, checked(owner, worst, tuple(moved)))


_SETTLED = 1e-3
"""Factors that all differ from one by less than this are not worth another round."""


def _step(choice: Choice, diagonal: Diagonal, leaves: dict[str, jax.Array], moved: dict[str, None]) -> float:
    """Applies a diagonal's factors to ``leaves``; gives by how much the largest or smallest differs from one."""
    s = choice(diagonal, leaves)
    if s is None:
        return 0.0
    leaves |= diagonal.applied(leaves, s)
    moved |= dict.fromkeys(side.path for side in diagonal.sides)
    return float(np.abs(np.log(s)).max(initial=0))


_NO_PLACE = (
    "nothing before it can take a factor of its channels: what makes them is read elsewhere too, or passes through "
    "what a factor does not pass; insert=True multiplies its input"
)


def _homeless(
    program: Program, leaves: Arrays, where: Where, placed: set[str]
) -> tuple[tuple[Diagonal, ...], tuple[Left, ...]]:
    """Diagonals of inputs alone, for products that no diagonal of the program serves; and the same as a list."""
    ops = {op.location: op for op in program.flow.ops}
    shared: dict[object, list[Side]] = {}
    left = []
    for site in sites_of(program):
        path = site.leaf
        if path is None or site.kind == "embed" or path in placed or not matches(where, path, leaves[path]):
            continue
        entry, op = entry_of(site, ops[site.location]), ops[site.location]
        if entry is None or site.path != path:
            left.append(Left(site.path, "its channels cannot be told apart in what enters it, or it is used twice"))
            continue
        left.append(Left(path, _NO_PLACE))
        weight = site.operands[site.weight or 0]
        own = [i for i, role in enumerate(weight.leaf_roles) if role in (BATCH, CONTRACTED)]
        axes = (*range(len(site.layer_steps)), *own)
        sizes = [weight.leaf_shape[i] for i in axes]
        channel = np.arange(int(np.prod(sizes))).reshape(sizes)
        key = (site.location[:-1], op.eqn.invars[entry.operand], entry.axes, tuple(sizes))
        shared.setdefault(key, []).append(Side(path, tuple(axes), channel, inverse=False, input=True, kernel=True))
    return tuple(Diagonal(sides[0].channel.size, tuple(sides)) for sides in shared.values()), tuple(left)
