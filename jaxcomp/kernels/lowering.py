"""What is known of a program when it is lowered, and decides which forms may stand in it."""

from __future__ import annotations

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
