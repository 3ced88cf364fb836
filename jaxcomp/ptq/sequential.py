"""Leaves compressed one after the other in the program's order, each by what reaches it behind those before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from numpy.typing import NDArray

from jaxcomp.core.batches import all_batches
from jaxcomp.core.leaves import dense
from jaxcomp.core.paths import Where, some_paths
from jaxcomp.core.progress import progress
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.ptq.growing import Growing
from jaxcomp.ptq.parts import GAP, Asked, Case, Compiled, Part, Stage, begun, passes_of
from jaxcomp.ptq.targets import Exact, Gap, fitted, shifted
from jaxcomp.trace.cut_specs import Cuts, Single
from jaxcomp.trace.program import shapes_of
from jaxcomp.trace.rows import Moments, chosen_moments, total
from jaxcomp.trace.unrolling import stacks, written_out
from jaxcomp.trace.walk import Fn

OWNER = "sequentially"
Method = Callable[[dict[str, Leaf], dict[str, Moments]], Mapping[str, Leaf]]
"""From leaves and the moments of what they multiply, both by path, to what takes the leaves' place."""


def sequentially(
    fn: Fn,
    method: Method,
    where: Where = r".*",
    *,
    targets: Exact | None = None,
    cuts: Cuts = Single(),  # noqa: B008 - frozen
) -> Callable[[Params, Iterable[PyTree]], Params]:
    """Compresses leaf after leaf of ``fn(params, *args)``, each by the rows that the leaves before it now give it.

    So what earlier leaves have got wrong is in the statistics of the later ones. The result takes
    ``(params, batches)``; a batch is what ``fn`` takes behind the parameters: a tuple of arguments, or the only one.
    Leaves that multiply the same value (query, key and value of an attention) go together, and in a scan over stacked
    layers one layer goes after the other. It shows how far it is.

    The network is :func:`~jaxcomp.ptq.cut` into blocks, and a block runs once for each of its leaves and layers, on
    what the block before gave: so the work grows with the depth, not with its square, and what enters a block is kept
    for all batches. Blocks that are alike are compiled once for each shape of a batch. A scan that steps over stacked
    leaves as they are is written out, so that its layers are blocks; any other is in one block, which runs whole for
    each layer. A leaf that several blocks read, as a tied embedding, goes first, by runs of all.

    With ``targets`` the float network runs beside: before ``method`` gets a leaf ``W``, it is fitted to

        ``W + (Σ x' x'ᵀ + λI)⁻¹ Σ x' (y - y')ᵀ``

    where ``x'`` are its rows now, ``y'`` what the network with ``W`` gives and ``y`` what the float network gave; so a
    leaf makes up for what reaches it wrong, and its bias for what the mean is off by. What has been compressed before
    goes to ``method`` as it is. It costs two runs for each leaf and layer, and the results of all products of a block.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      method: makes of leaves and their moments, both by path, what takes the leaves' place.
      where: which leaves, by path or as a predicate of ``(path, site)``.
      targets: what leaves should give; None is what they give with the rows that reach them now.
      cuts: where a block begins.

    Raises:
      TypeError: ``method`` is no function, ``targets`` or ``cuts`` of another kind, or the batches are one array.
      ValueError: ``where`` matches no site, there is no batch, what ``method`` raises, or a leaf
        that it gives nothing for.

    >>> from jaxcomp import Int
    >>> from jaxcomp.ptq.second_order import gptq
    >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> w = lambda key, *shape: jax.random.normal(jax.random.key(key), shape)
    >>> params, batches = {"up": w(0, 4, 8), "down": w(1, 8, 2)}, [w(2, 32, 4), w(3, 32, 4)]
    >>> compress = sequentially(fn, lambda leaves, moments: gptq(leaves, moments, Int(4)), targets=Exact())
    >>> [type(leaf).__name__ for leaf in compress(params, batches).values()]
    ['Quantized', 'Quantized']

    Source: Frantar et al. 2022, arXiv:2210.17323, section 4, which goes block by block and takes a block's inputs from
    the compressed blocks before it; here each leaf's own are. Targets: GPTAQ, Li et al. 2025, arXiv:2504.02692, which
    asks for ``min |x W - x' W'|²``. Deviations: the whole correction is made before the solver, where GPTAQ spreads it
    over the columns; what a residual stream carries on counts; about the means where there is a bias.
    """
    if not callable(method):
        raise TypeError(
            f"{OWNER}: method makes new leaves of leaves and their moments, got {method!r}; write"
            " lambda leaves, moments: gptq(leaves, moments, grid)."
        )
    if targets is not None and not isinstance(targets, Exact):
        raise TypeError(f"{OWNER}: targets must be Exact() or None, got {targets!r}.")
    gather = chosen_moments(fn, where)

    def compressed(params: Params, batches: Iterable[PyTree]) -> Params:
        many = all_batches(OWNER, batches)
        shapes = shapes_of(params)
        wanted = jax.eval_shape(gather, None, shapes, *many[0])
        apart = {path: n for path, n in stacks(fn)(shapes, *many[0]).items() if n > 1}
        apart = apart if apart.keys() & wanted.keys() else {}
        tree = Growing(params, apart)
        asked = Asked(frozenset(name for path in wanted for name in tree.names(path)), tree)
        passes = passes_of(written_out(fn) if apart else fn, many, asked, cuts)
        walk = _Walk(tree, method, targets)
        with progress(f"{OWNER}: leaves", sum(len(part.stages) for parts in passes for part in parts)) as advance:
            for parts in passes:
                cases = begun(many, beside=targets is not None)
                for part in parts:
                    cases = walk.part(part, cases, advance)
        return tree.whole()

    return compressed


class _Walk:
    """The tree so far, and what is done to it."""

    def __init__(self, tree: Growing, method: Method, targets: Exact | None) -> None:
        self.tree, self.method, self.how, self.compiled = tree, method, targets, Compiled(targets)

    def part(self, part: Part, cases: Sequence[Case], advance: Callable[[float], None]) -> list[Case]:
        """Compresses the leaves of a part; where the batches stand behind it."""
        exact = self.tree.arrays(part.paths, exact=True)
        own = [c._replace(rest=b.rest(c.rest)) for b, c in zip(part.blocks, cases, strict=True)]
        for stage in part.stages:
            self.stage(part, stage, self.seen(part, stage, exact, own))
            advance(1)
        now, behind = self.tree.arrays(part.paths), []
        for block, case, here in zip(part.blocks, cases, own, strict=True):
            give = self.compiled.of(part, block).give
            beside = None if here.exact is None else give(exact, here.exact, here.rest)
            behind.append(jax.block_until_ready(Case(beside, give(now, here.now, here.rest), case.rest)))
        return behind

    def seen(self, part: Part, stage: Stage, exact: tuple[jax.Array, ...], cases: Sequence[Case]) -> dict[str, PyTree]:
        """Moments, and gaps, of the leaves of a stage over all batches."""
        flags, now = {name: name in stage.names for name in part.known}, self.tree.arrays(part.paths)

        def one(n: int, case: Case) -> dict[str, PyTree]:
            look = self.compiled.of(part, part.blocks[n]).look
            beside = None if case.exact is None else (exact, case.exact, case.rest)
            found = look(flags, beside, (now, case.now, case.rest))
            return {name: x for name, x in found.items() if name.removeprefix(GAP) in stage.names}

        return dict(total((one(n, case) for n, case in enumerate(cases)), OWNER))

    def stage(self, part: Part, stage: Stage, seen: Mapping[str, PyTree]) -> None:
        """Puts what the method makes of the leaves of a stage in their places."""
        layer, names = stage.layer, {n: part.paths[int(n)] for n in stage.names}
        paths = {n: self.tree.place(name)[0] for n, name in names.items()}
        moments = {n: _at(seen[n], layer) for n in names}
        targets = self.compiled.of(part, part.blocks[0]).targets
        gaps = {n: jax.tree.map(lambda x: x[layer], seen[GAP + n]) for n in names if n in targets}
        leaves = {paths[n]: self.tree.given(name, layer) for n, name in names.items()}
        before = {n: self.tree.now(names[n], layer) for n in gaps}
        for n, gap in gaps.items():
            leaves[paths[n]] = self.fitted(paths[n], before[n], moments[n], gap)
        new = self.method(leaves, {paths[n]: m for n, m in moments.items()})
        if lost := [path for path in leaves if path not in new]:
            raise ValueError(f"{OWNER}: method gave nothing for {some_paths(lost)}; give a leaf for each.")
        for n, path in paths.items():
            self.tree.take(names[n], layer, new[path])
            bias = targets[n][0].bias if n in gaps else None
            if bias is not None and gaps[n].first is not None:
                shift: NDArray[np.float64] = shifted(moments[n], gaps[n], before[n], dense(new[path]))
                self.tree.move(part.paths[int(bias)], shift, layer)

    def fitted(self, path: str, leaf: jax.Array, moments: Moments, gap: Gap) -> jax.Array:
        """A leaf that gives its targets."""
        assert self.how is not None
        if not np.isfinite(gap.cross).all():
            raise ValueError(
                f"{OWNER}: of some batch {path!r} takes or gives what is not finite, in the float network or in"
                " the compressed one; mend that batch, or leave the leaf that makes it so out by where=."
            )
        return fitted(leaf, moments, gap, self.how)


def _at(seen: Moments, layer: tuple[int, ...]) -> Moments:
    """The moments of one layer, whose axes are those that are left."""
    less = len(layer)
    axes = (tuple(a - less for a in axes) for axes in (seen.apart[less:], seen.summed, seen.window))
    return Moments(seen.second[layer], seen.first[layer], seen.count[layer], *axes) if less else seen
