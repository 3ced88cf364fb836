"""Few rows by a packed weight on a GPU, through Triton: each byte is read once and unpacked in registers.

Pallas is imported by the kernels that need it: it takes as long as the rest of the package.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.core.types import DType
from jaxcomp.kernels.blocks import Blocks
from jaxcomp.kernels.packing import PackedWeight
from jaxcomp.kernels.runs import Reading, Ref, matrix_of_integers, once, reading, short_runs

LEAST = 16
"""A tensor core's product takes so many neighbours of the contracted axis at least."""


def refusal(w: PackedWeight) -> str | None:
    """Why the kernel cannot run this weight; None if it can."""
    if why := matrix_of_integers(w):
        return why
    return short_runs(w, LEAST)


class _Of(NamedTuple):
    """What a program must know of the whole.

    Attributes:
      rows, features, length: of the product.
      blocks: packed blocks along the contracted axis.
      share: those that a program takes.
    """

    rows: int
    features: int
    length: int
    blocks: int
    share: int


def triton_product(
    x: jax.Array, w: PackedWeight, blocks: Blocks, *, dtype: DType | None = None, interpret: bool = False
) -> jax.Array:
    """``x @ dense(w).T`` with sums in float32: codes are exact in the activations' type, scales stay outside.

    Args:
      x: ``(rows, length)``, bfloat16, float16 or float32; float32 is multiplied as it is, not as TF32.
      w: ``(features, length)``, of an integer grid.
      blocks: how much one program takes.
      dtype: of the result ``(rows, features)``; that of ``x`` if None.
      interpret: run the kernel's statements as XLA's operations, on any backend.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    (m, n), dtype, read = blocks[:2], dtype or x.dtype, reading(w)
    count = w.padded // w.block
    share = -(-count // min(blocks.splits, count))
    splits = -(-count // share)
    of = _Of(x.shape[0], w.codes.shape[0], w.length, count, share)
    operands = [w.codes, w.scale, *([] if w.zero is None else [w.zero])]
    out = pl.pallas_call(
        partial(_kernel, read=read, of=of),
        out_shape=jax.ShapeDtypeStruct((splits, of.rows, of.features), dtype if splits == 1 else jnp.float32),
        grid=(pl.cdiv(of.rows, m), pl.cdiv(of.features, n), splits),
        in_specs=[
            pl.BlockSpec((m, w.padded), lambda i, j, s: (i, 0)),
            *(pl.BlockSpec((n, v.shape[1]), lambda i, j, s: (j, 0)) for v in operands),
        ],
        out_specs=pl.BlockSpec((None, m, n), lambda i, j, s: (s, i, j)),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="weight_only",
    )(x, *operands)
    return out[0] if splits == 1 else jnp.sum(out, axis=0).astype(dtype)


def _kernel(x_ref: Ref, codes_ref: Ref, scale_ref: Ref, *rest: Ref, read: Reading, of: _Of) -> None:
    """One tile of the result, over this program's share of the contracted axis."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    *zeros, out_ref = rest
    m, n = out_ref.shape
    rows = (pl.program_id(0) * m + jnp.arange(m) < of.rows)[:, None]
    features = (pl.program_id(1) * n + jnp.arange(n) < of.features)[:, None]
    precision = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None

    def column(ref: Ref, group: jax.Array | int) -> jax.Array:
        """The scales or zero points of a group: ``(features, 1)``."""
        return _masked(ref, group, 1, features).astype(jnp.float32)

    def add(at: jax.Array, total: jax.Array) -> jax.Array:
        """A packed block more."""
        load = once(lambda o: _masked(codes_ref, at * read.size + o, read.length, features).astype(jnp.int32))
        for key, runs in read.by_scale():
            group = read.group_of(at, key)
            part = jnp.zeros((m, n), jnp.float32)
            for run in runs:
                start = at * read.block + run.start
                inside = rows & (start + jnp.arange(read.length) < of.length)[None, :]
                left = _masked(x_ref, start, read.length, inside)
                numbers = read.numbers(run, load).astype(jnp.float32)
                numbers = numbers - column(zeros[0], group) if zeros else numbers
                part += lax.dot_general(
                    left, numbers.astype(left.dtype), _LAST, precision, preferred_element_type=jnp.float32
                )
            total += part if read.group is None else part * column(scale_ref, group).reshape(1, n)
        return total

    first = pl.program_id(2) * of.share
    total = lax.fori_loop(first, jnp.minimum(first + of.share, of.blocks), add, jnp.zeros((m, n), jnp.float32))
    total = total * column(scale_ref, 0).reshape(1, n) if read.group is None else total
    plgpu.store(out_ref, total.astype(out_ref.dtype), mask=rows & features.reshape(1, n))


_LAST = (((1,), (1,)), ((), ()))
"""Both operands have the contracted axis last."""


def _masked(ref: Ref, start: jax.Array | int, length: int, inside: jax.Array) -> jax.Array:
    """Columns of what lies in memory, 0 where ``inside`` says that it does not."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    wanted = ref.at[:, pl.ds(start, length)]
    return plgpu.load(wanted, mask=jnp.broadcast_to(inside, (ref.shape[0], length)), other=0)
