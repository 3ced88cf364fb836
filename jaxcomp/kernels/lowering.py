"""What is known of a program when it is lowered, and decides which forms may stand in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from jax.extend.core import Primitive
from jax.interpreters import mlir


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
