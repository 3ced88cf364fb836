"""One evaluator for every reading of a program: run a jaxpr again, with some equations done otherwise.

How to write a handler. A handler is a function from an equation in its place, an :class:`~jaxcomp.trace.flow.Op`,
to ``None`` ("not mine") or to a :class:`Claim`. It sees no values: it decides from the primitive's name, shapes,
parameters, the operands' tags and the loops around. The claim's ``run`` later gets the operands' values and returns
the list of results. ``op.bind(*values, **params)`` runs the original equation, on other values or with other
parameters. So "halve what every matrix product yields" is::

    def halve_dots(op):
        if op.name != "dot_general":
            return None
        return Claim(lambda *values: [y / 2 for y in op.bind(*values)])

    halved = rewrite(fn, halve_dots)          # halved(params, *args), for jit, grad, vmap, …

Three more things a handler may need:

* A value *into* an equation: ``Claim(run, side=tree)`` calls ``run(side, *values)``. Inside scans over stacked
  layers, each leaf of ``side`` has leading axes ``op.layer_steps``, and each step sees its own slice; every other
  loop sees the same value at every step.
* A value *out of* an equation: return ``Emitted(results, {"name": tree})`` in place of the results.
  ``evaluate(..., collect=Monoid(zero, merge))`` gathers them in ``Result.aux``: a layer scan stacks them (leading axes
  ``op.layer_steps``); other loops, the branches of a cond, and equal names are merged, ``zero`` standing for what did
  not run.
* Values that are no arrays (a quantized weight): pass them at the leaf's place, to ``evaluate`` with a program traced
  for arrays. A claimed equation gets them as they are; an equation that no one claims, and a loop's carry, get
  ``to_array(value)``. They must be registered pytrees; a scan slices their leaves when all have its length in front.
  ``None`` stands for a value that is absent; what an unclaimed equation would compute from it is absent too.

A claim that stands on an equation with a jaxpr inside (scan, jit, …) replaces all of it, and claims inside are
not consulted. Equations with a jaxpr inside are opened only where a claim lies inside, or where their operands have
other shapes than were traced (a shrunken network); otherwise they are re-bound whole, so that a custom gradient rule
stays. An opened ``custom_jvp`` or ``custom_vjp`` is differentiated as what is inside it: a handler that must not lose
the rule declines where ``op.inside`` names one. An opened remat is a remat, an opened scan a scan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps

import jax

from jaxcomp.core.paths import some_paths
from jaxcomp.core.types import Params, PyTree
from jaxcomp.trace.control_flow import reopen
from jaxcomp.trace.interpreter import Claim, Evaluator, Handler, Monoid, Result, Watch
from jaxcomp.trace.primitives import SEALED
from jaxcomp.trace.program import Program, trace
from jaxcomp.trace.walk import Fn, Location, Value


def claims_of(program: Program, handler: Handler) -> dict[Location, Claim]:
    """The claims that ``handler`` makes on the equations of ``program``; of those in a shard_map it is not asked."""
    within = [op for op in program.flow.ops if SEALED.isdisjoint(op.inside)]
    return {op.location: claim for op in within if (claim := handler(op)) is not None}


def rewrite(fn: Fn, handler: Handler) -> Fn:
    """``fn`` with the equations that ``handler`` claims done otherwise.

    Args:
      fn: a pure function ``fn(params, *args, **kwargs)``.
      handler: see this module's head.

    >>> import jax, jax.numpy as jnp
    >>> from jaxcomp.trace.interpreter import Claim
    >>> def no_relu(op):
    ...     return Claim(lambda x: [x]) if op.name == "custom_jvp_call" else None
    >>> f = lambda p, x: jax.nn.relu(p["w"] * x)
    >>> float(rewrite(f, no_relu)({"w": jnp.float32(-2)}, jnp.float32(3)))
    -6.0
    """

    @wraps(fn)
    def rewritten(params: Params, *args: PyTree, **kwargs: PyTree) -> PyTree:
        program = trace(fn, params, *args, **kwargs)
        return evaluate(program, claims_of(program, handler), program.flatten(params, *args, **kwargs)).out

    return rewritten


def evaluate(
    program: Program,
    claims: Mapping[Location, Claim],
    values: Sequence[Value],
    *,
    collect: Monoid | None = None,
    to_array: Callable[[Value], jax.Array] | None = None,
    inline: bool = False,
    watch: Mapping[Location, Watch] | None = None,
) -> Result:
    """Runs ``program`` on ``values`` with some equations done otherwise.

    Args:
      program: from ``trace``.
      claims: by location; see ``claims_of``.
      values: one for each input of the jaxpr, ``program.flatten(params, *args)``.
      collect: how emissions are merged; without it an emission inside a loop that is no layer scan, inside a
        cond, or of a name that was emitted already, is an error.
      to_array: turns a value that is no array into one, for equations that no one claims.
      inline: open every jit, also where nothing inside changes, so that what it holds stands beside its neighbours.
      watch: by location, what is emitted beside an equation that is done as ever, be it claimed, opened or neither.

    Raises:
      ValueError: a claim stands at no equation, emissions cannot be merged, or a claim gives a wrong number of results.
      TypeError: an unclaimed equation meets a value that is no array, and ``to_array`` is not given.
    """
    run = Evaluator(program, claims, reopen, collect=collect, to_array=to_array, inline=inline, watch=watch or {})
    results, aux = run.jaxpr(program.jaxpr, (), values, {at: c.side for at, c in claims.items() if c.side is not None})
    unused = [at for at in (*claims, *run.watch) if at not in run.met]
    if unused:
        raise ValueError(
            f"evaluate: claims at {some_paths(map(str, unused))} stand at no equation that was reached; "
            "make them from the flow of this very program, and none inside another claim's equation."
        )
    return Result(program.unflatten([run.array(r) for r in results]), aux)
