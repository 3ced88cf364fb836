"""What is known of a program when it is lowered, and decides which forms may stand in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir


def is_kept(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether the program is to be kept, as jax.export does: then it may hold only what jax promises to run later."""
    return bool(getattr(ctx.module_context.lowering_parameters, "for_export", False))


def is_parted(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether the compiler parts the program over devices, beyond what is mapped by hand."""
    axes = ctx.module_context.axis_context
    mesh = getattr(axes, "mesh", None)
    if mesh is None:
        return bool(getattr(axes, "num_devices", 1) != 1)
    return bool(mesh.size > 1 and set(mesh.axis_names) != set(getattr(axes, "manual_axes", ())))


def lower_by(primitive: Primitive, own: Callable[..., Any], cpu: Callable[..., Any]) -> None:
    """Lowers a primitive as a function of JAX's own operations, and on a CPU as another where that may stand.

    Args:
      primitive: it.
      own: of the primitive's operands, and its parameters by name.
      cpu: of the same.
    """
    several = primitive.multiple_results

    def on_cpu(ctx: mlir.LoweringRuleContext, *values: object, **params: Any) -> Any:
        run = own if is_kept(ctx) or is_parted(ctx) else cpu
        return mlir.lower_fun(partial(run, **params), multiple_results=several)(ctx, *values)

    mlir.register_lowering(primitive, mlir.lower_fun(own, multiple_results=several))
    mlir.register_lowering(primitive, on_cpu, platform="cpu")


def call_in_one_piece(name: str, cpu: Callable[..., list[jax.Array]]) -> Primitive:
    """A primitive that calls its parameter ``jaxpr``, a closed one, on its operands; a CPU may have a form of its own.

    Readers of programs look into it, and where it is differentiated, mapped or run at once, the jaxpr is.

    Args:
      name: the primitive's, one of ``jaxcomp.trace.primitives.PIECES``.
      cpu: gives the same results of the same operands and parameters.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda *avals, **params: params["jaxpr"].out_avals)
    primitive.def_impl(run_call)
    ad.primitive_jvps[primitive] = _derived
    batching.primitive_batchers[primitive] = _batched
    lower_by(primitive, run_call, cpu)
    return primitive


def run_call(*operands: jax.Array, jaxpr: ClosedJaxpr, **params: Any) -> list[jax.Array]:
    """What such a primitive gives, in JAX's own operations."""
    return jaxpr_as_fun(jaxpr)(*operands)


def _derived(primals: Sequence[jax.Array], tangents: Sequence[Any], **params: Any) -> Any:
    return jax.jvp(partial(run_call, **params), tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


def _batched(
    operands: Sequence[jax.Array], axes: Sequence[int | None], **params: Any
) -> tuple[list[jax.Array], list[int]]:
    results = jax.vmap(partial(run_call, **params), tuple(axes))(*operands)
    return results, [0] * len(results)
