"""``shrink``: the same function over physically smaller arrays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxcomp.core.meshes import backward as under_its_axes
from jaxcomp.core.types import Params, PyTree
from jaxcomp.structure import resizing
from jaxcomp.structure.analysis import Analysis, analyze
from jaxcomp.structure.atoms import FREE, Atoms, Dim, Label
from jaxcomp.structure.labelling import Step, Walk, Walked
from jaxcomp.structure.plans import Plan, mask
from jaxcomp.structure.resizing import Keep
from jaxcomp.trace import layouts, walk
from jaxcomp.trace.control_flow import Runner, rebuilt
from jaxcomp.trace.nested import Closed, bind, call_body
from jaxcomp.trace.primitives import CUSTOM_RULE
from jaxcomp.trace.walk import Fn, Location, aval_of, shapes_of

Values = Sequence[jax.Array]
_Small = Callable[..., list[jax.Array]]
_Sized = tuple[jax.Array, tuple[Dim, ...]]
"""An array, and what its dimensions are: those that are whole may yet have to shrink."""


def shrink(fn: Fn, plan: Plan) -> Fn:
    """``fn`` over the smaller tree: ``shrink(fn, plan)(plan.take(params), *args) == fn(mask(plan)(params), *args)``.

    Traces ``fn`` at its full shapes for the arguments at hand, then evaluates the program with the smaller
    arrays. A JAX-traceable function: put it under ``jit`` (called bare, it traces anew each time), ``grad``, ``vmap``.
    Constants keep their full-size value, such as the divisor of a mean or attention's 1/sqrt(d). Outputs that
    are new values of parameters (batch statistics) come back smaller.

    Args:
      fn: the function at full size, ``fn(params, *args)``.
      plan: what stays.

    Raises (on call):
      ValueError: the tree is not what ``plan.take`` gives, or the plan splits what this call of ``fn`` ties
        together (it was made from another function or in another mode); names the path.

    >>> import numpy as np
    >>> from jaxcomp.structure import channel_groups, plan
    >>> f = lambda p, x: x @ p["up"] @ p["down"]
    >>> params, x = {"up": np.float32([[3, 0.1]]), "down": np.ones((2, 1), np.float32)}, np.ones((1, 1), np.float32)
    >>> half = plan(channel_groups(f)(params, x), params, sparsity=0.5)
    >>> float(shrink(f, half)(half.take(params), x)[0, 0])
    3.0
    """

    def small(params: Params, *args: PyTree, **kwargs: PyTree) -> PyTree:
        analysis = _again(fn, plan, plan.full(params), args, kwargs)
        program = analysis.program
        return program.unflatten(_results(plan, analysis, program.flatten(params, *args, **kwargs)))

    return small


def check_shrink(fn: Fn, plan: Plan, params: Params, *args: PyTree, **kwargs: PyTree) -> float:
    """The largest absolute difference between the shrunken network's outputs and the masked network's; NaN shows.

    Args:
      fn, plan: as in ``shrink``.
      params: the full-size tree of arrays.
      args, kwargs: the function's further arguments.

    Raises:
      ValueError: as ``shrink``.

    >>> import numpy as np
    >>> from jaxcomp.structure import channel_groups, plan
    >>> f = lambda p, x: x @ p["up"] @ p["down"]
    >>> params, x = {"up": np.float32([[3, 0.1]]), "down": np.ones((2, 1), np.float32)}, np.ones((1, 1), np.float32)
    >>> half = plan(channel_groups(f)(params, x), params, sparsity=0.5)
    >>> check_shrink(f, half, params, x)
    0.0
    """
    analysis = _again(fn, plan, params, args, kwargs)
    keep, program = keep_of(plan, analysis), analysis.program
    masked = jax.jit(core.jaxpr_as_fun(program.jaxpr))(*program.flatten(mask(plan)(params), *args, **kwargs))
    small = jax.jit(partial(_results, plan, analysis))(program.flatten(plan.take(params), *args, **kwargs))
    worst = 0.0
    for m, s, out in zip(masked, small, analysis.outs, strict=True):
        if jax.dtypes.issubdtype(s.dtype, jax.dtypes.extended):
            continue
        whole = (FREE,) * len(out.dims)
        m = plan.take_leaf(out.param, m) if out.param else keep.fit(m, whole, out.dims)
        m, s = np.asarray(m), np.asarray(s)
        wide = np.complex128 if np.iscomplexobj(m) else np.float64
        with np.errstate(invalid="ignore"):  # infinities that agree differ by nothing
            gap = np.where(m == s, 0.0, np.abs(m.astype(wide) - s.astype(wide)))
        worst = float(np.max(gap, initial=worst))
    return worst


def _results(plan: Plan, analysis: Analysis, values: Values) -> list[jax.Array]:
    """The program's results from the smaller arrays."""
    keep = keep_of(plan, analysis)
    outs = _Run(keep, analysis.atoms).jaxpr(analysis.program.jaxpr, analysis.walked, values)
    wanted = zip(outs, analysis.walked.outs, analysis.outs, strict=True)
    return [keep.fit(v, have, out.dims) for v, have, out in wanted]


def _again(fn: Fn, plan: Plan, params: Params, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]) -> Analysis:
    return analyze(fn, replace(plan.groups.options, strict=False), params, *args, **kwargs)


def keep_of(plan: Plan, analysis: Analysis) -> Keep:
    """Which atoms of this trace the plan keeps.

    Raises:
      ValueError: it keeps and removes parts of one unit, or removes what this trace freezes.
    """
    stays = np.full(len(analysis.atoms), True)
    masks = {}
    for (path, axis), m in plan.masks.items():
        dim = analysis.dims[path][axis]
        masks[path, axis] = m if m.ndim == 1 else m[0]
        if isinstance(dim, np.ndarray):
            root = analysis.atoms.find(dim)
            stays[root[~masks[path, axis]]] = False
            if m.ndim == 2 and np.isin(root, analysis.positional[analysis.positional > 0]).any():
                _conflict(path, axis, "keeps other units in each layer, which this call needs to agree")
    for path, dims in analysis.dims.items():
        for axis, dim in enumerate(dims):
            every = np.full(analysis.shapes[path][axis], True)
            found = stays[analysis.atoms.find(dim)] if isinstance(dim, np.ndarray) else every
            if not np.array_equal(found, masks.get((path, axis), every)):
                _conflict(path, axis, "separates what it ties together or freezes")
    if not stays[0]:
        _conflict(*next(iter(plan.masks)), "removes something that it freezes")
    return Keep(stays[analysis.atoms.find(np.arange(len(analysis.atoms)))])


def _conflict(path: str, axis: int, what: str) -> None:
    raise ValueError(
        f"shrink: at {path!r} axis {axis} the plan {what} in this call of fn; plan with "
        "channel_groups(fn) of this very function, in the same mode (train or inference)."
    )


class _Run:
    """Evaluates walked jaxprs on smaller arrays."""

    def __init__(self, keep: Keep, atoms: Atoms) -> None:
        self.keep = keep
        self.atoms = atoms

    def jaxpr(self, jaxpr: Closed, walked: Walked, values: Values) -> list[jax.Array]:
        """The results, as ``walked.outs`` has them."""
        steps = iter(walked.steps)

        def equation(eqn: core.JaxprEqn, location: Location, read: list[_Sized]) -> list[_Sized]:
            step = next(steps)
            operands = [self.keep.fit(v, have, use.dims) for (v, have), use in zip(read, step.uses, strict=True)]
            outs = self.equation(eqn, step, operands)
            return [(v, o.dims) for v, o in zip(outs, step.outs, strict=True)]

        given = list(zip(values, walked.ins, strict=True))
        results = walk.run(jaxpr, given, equation, constant=lambda c: (c, (FREE,) * np.ndim(c)))
        return [self.keep.fit(v, have, want) for (v, have), want in zip(results, walked.outs, strict=True)]

    def equation(self, eqn: core.JaxprEqn, step: Step, values: Values) -> list[jax.Array]:
        """One equation; those with jaxprs inside are rebuilt around smaller ones."""
        if not step.inner or not self.keep.touches(*step.uses, *step.outs):
            return layouts.placed(eqn, lambda *xs: (resizing.run(self.keep, eqn, step, xs), {}), *values)[0]

        def run(jaxpr: Closed, part: str, operands: Values) -> list[jax.Array]:
            return self.jaxpr(jaxpr, step.inner[part], operands)

        if eqn.primitive.name in CUSTOM_RULE:
            return self._custom(eqn, step, run)(*values)
        with jax.named_scope(str(eqn.source_info.name_stack)):
            return rebuilt(eqn, values, run)

    def _custom(self, eqn: core.JaxprEqn, step: Step, run: Runner[jax.Array]) -> _Small:
        """A custom_jvp or custom_vjp with its own derivative."""
        body = call_body(eqn)
        assert body is not None

        def inner(*operands: jax.Array) -> list[jax.Array]:
            return run(body, "call", [*operands])

        again = self._custom_jvp if eqn.primitive.name == "custom_jvp_call" else self._custom_vjp
        return again(eqn, step, inner)

    def _custom_jvp(self, eqn: core.JaxprEqn, step: Step, primal: _Small) -> _Small:
        """The call with its own derivative: the rule's program is shrunk too."""
        exact = [jnp.issubdtype(aval_of(v).dtype, jnp.inexact) for v in eqn.invars]
        full = shapes_of(eqn.invars)

        def pushed(primals: Values, tangents: Values) -> PyTree:
            given = iter(tangents)
            all_tangents = [
                next(given) if e else np.zeros(s.shape, jax.dtypes.float0) for e, s in zip(exact, full, strict=True)
            ]
            return jax.jvp(lambda *xs: bind(eqn, xs), list(primals), all_tangents)

        small = jax.custom_jvp(primal)

        @small.defjvp
        def rule(primals: Values, tangents: Values) -> tuple[list[jax.Array], list[jax.Array]]:
            moving = [i for i, e in enumerate(exact) if e]
            labels = [*step.uses, *(step.uses[i] for i in moving)]
            shapes = (full, [full[i] for i in moving])
            outs = self._derived(
                pushed, shapes, labels, (*step.outs, *step.outs), [*primals, *(tangents[i] for i in moving)]
            )
            if outs is None:
                return jax.jvp(lambda *xs: resizing.full_size(self.keep, eqn, step, xs), primals, tangents)
            return outs[: len(step.outs)], outs[len(step.outs) :]

        return small

    def _custom_vjp(self, eqn: core.JaxprEqn, step: Step, primal: _Small) -> _Small:
        """The call with its own derivative: the rule's program is shrunk too."""
        moving = [i for i, v in enumerate(eqn.invars) if jnp.issubdtype(aval_of(v).dtype, jnp.inexact)]
        full = shapes_of(eqn.invars)

        def pulled(operands: Values, cotangents: Values) -> tuple[jax.Array, ...]:
            def of_moving(*xs: jax.Array) -> list[jax.Array]:
                merged = list(operands)
                for i, x in zip(moving, xs, strict=True):
                    merged[i] = x
                return bind(eqn, merged)

            return jax.vjp(of_moving, *(operands[i] for i in moving))[1](list(cotangents))

        small = jax.custom_vjp(primal)

        def backward(operands: Values, cotangents: Values) -> tuple[jax.Array | None, ...]:
            shapes = (full, shapes_of(eqn.outvars))
            wanted = [step.uses[i] for i in moving]
            given = [replace(o, zero=(True,) * len(o.zero)) for o in step.outs]
            outs = self._derived(pulled, shapes, [*step.uses, *given], wanted, [*operands, *cotangents])
            if outs is None:
                of_all = jax.vjp(lambda *xs: resizing.full_size(self.keep, eqn, step, xs), *operands)[1]
                return tuple(of_all(list(cotangents)))
            gradients: list[jax.Array | None] = [None] * len(operands)
            for i, g in zip(moving, outs, strict=True):
                gradients[i] = g
            return tuple(gradients)

        small.defvjp(lambda *xs: (primal(*xs), xs), under_its_axes(backward))
        return small

    def _derived(
        self, f: Fn, shapes: PyTree, ins: Sequence[Label], outs: Sequence[Label], values: Values
    ) -> list[jax.Array] | None:
        """Runs another program over arrays of this one, shrunk; None if it ties together what the plan separates."""
        program = jax.make_jaxpr(f)(*shapes)
        walk = Walk(through_means=True, atoms=copy.deepcopy(self.atoms))
        known = len(walk.atoms)
        walked, results = walk.run(program, ins)
        dims = [tuple(map(walk.join, o.dims, r.dims)) for o, r in zip(outs, results, strict=True)]
        walk.settle()
        root = walk.atoms.find(np.arange(len(walk.atoms)))
        old = self.keep.stays
        stays = np.full(len(walk.atoms), True)
        stays[root[:known][~old]] = False
        if not stays[0] or not np.array_equal(stays[root[:known]], old):
            return None
        keep = Keep(stays[root])
        smaller = _Run(keep, walk.atoms).jaxpr(program, walked, values)
        return [keep.fit(v, r.dims, d) for v, r, d in zip(smaller, results, dims, strict=True)]
