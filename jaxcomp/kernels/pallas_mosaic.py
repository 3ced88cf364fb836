"""Few rows by a packed weight on a TPU, through Mosaic: bytes travel packed and are unpacked beside the product.

Pallas is imported by the kernels that need it: it takes as long as the rest of the package.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.core.types import DType
from jaxcomp.kernels.blocks import Blocks
from jaxcomp.kernels.packing import PackedWeight
from jaxcomp.kernels.runs import Reading, Ref, matrix_of_integers, once, reading, short_runs

LANES = 128
"""The last axis of what a TPU holds."""
LEAST = 8
"""Runs are this long at least."""


def refusal(w: PackedWeight) -> str | None:
    """Why the kernel cannot run this weight; None if it can."""
    return matrix_of_integers(w) or short_runs(w, LEAST)


def mosaic_product(
    x: jax.Array, w: PackedWeight, blocks: Blocks, *, dtype: DType | None = None, interpret: bool = False
) -> jax.Array:
    """``x @ dense(w).T`` with sums in float32: codes are exact in the activations' type, scales stay outside.

    Args:
      x: ``(rows, length)``, bfloat16 or float32; float32 is multiplied as it is, not as bfloat16.
      w: ``(features, length)``, of an integer grid.
      blocks: how much one step takes.
      dtype: of the result ``(rows, features)``; that of ``x`` if None.
      interpret: run the kernel's statements as XLA's operations, on any backend.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (rows, features), read = (x.shape[0], w.codes.shape[0]), reading(w)
    m, n = blocks.rows, min(blocks.features, -(-features // LANES) * LANES)
    taken = _blocks_a_step(read, w.padded // w.block, blocks.length)
    steps = -(-w.padded // (taken * w.block))
    x = jnp.pad(x, ((0, -rows % m), (0, steps * taken * w.block - w.length)))
    scales = [v.astype(jnp.float32).T for v in (w.scale, w.zero) if v is not None]
    out = pl.pallas_call(
        partial(_kernel, read=read, taken=taken),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], features), dtype or x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(x.shape[0] // m, pl.cdiv(features, n), steps),
            in_specs=[
                pl.BlockSpec((m, taken * w.block), lambda i, j, k: (i, k)),
                pl.BlockSpec((n, taken * read.size), lambda i, j, k: (j, k)),
                *(pl.BlockSpec((v.shape[0], n), lambda i, j, k: (0, j)) for v in scales),
            ],
            out_specs=pl.BlockSpec((m, n), lambda i, j, k: (i, j)),
            scratch_shapes=[pltpu.VMEM((m, n), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="weight_only",
    )(x, w.codes, *scales)
    return out[:rows]


def _blocks_a_step(read: Reading, count: int, wanted: int) -> int:
    """Packed blocks that a step takes: whole lanes of bytes, about ``wanted`` codes, or all there are."""
    least = LANES // math.gcd(LANES, read.size)
    taken = max(1, wanted // (read.block * least)) * least
    return count if taken >= count else taken


def _kernel(x_ref: Ref, codes_ref: Ref, scale_ref: Ref, *rest: Ref, read: Reading, taken: int) -> None:
    """One step along the contracted axis for one tile of the result."""
    from jax.experimental import pallas as pl

    *zeros, out_ref, total_ref = rest
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        total_ref[...] = jnp.zeros_like(total_ref)

    precision = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
    for at in range(taken):

        def bytes_at(offset: int, start: int = at * read.size) -> jax.Array:
            return codes_ref[:, pl.ds(start + offset, read.length)].astype(jnp.int32)

        load = once(bytes_at)
        for key, runs in read.by_scale():
            group = read.group_of(step * taken + at, key)
            part = jnp.zeros(total_ref.shape, jnp.float32)
            sums = jnp.zeros((total_ref.shape[0], 1), jnp.float32)
            for run in runs:
                left = x_ref[:, pl.ds(at * read.block + run.start, read.length)]
                numbers = read.numbers(run, load).astype(jnp.float32).astype(left.dtype)
                part += lax.dot_general(
                    left, numbers, (((1,), (1,)), ((), ())), precision, preferred_element_type=jnp.float32
                )
                sums += jnp.sum(left.astype(jnp.float32), axis=1, keepdims=True) if zeros else 0
            if zeros:
                part -= sums * zeros[0][pl.ds(group, 1), :]
            total_ref[...] += part * scale_ref[pl.ds(group, 1), :]

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        out_ref[...] = total_ref[...].astype(out_ref.dtype)
