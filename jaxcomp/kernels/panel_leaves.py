"""A weight laid out in panels for products of integers: the kernel of a convolution, or of a dot of many rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcomp.core.leaves import CompressedLeaf, dense
from jaxcomp.core.packed import compressed_leaf, unpacked
from jaxcomp.core.types import DType, Shape
from jaxcomp.core.wrappers import Masked
from jaxcomp.kernels.leaves import Axes, Laid, laid_out, no_codes, raw_codes
from jaxcomp.kernels.panels import PanelWeight, panel_codes
from jaxcomp.quantization.grids import Numbers
from jaxcomp.quantization.leaves import Quantized
from jaxcomp.quantization.numerics.affine import spread


@compressed_leaf(meta=("grid", "taps", "channels", "features", "dense_dtype", "dense_shape", "axes", "site"))
class PreparedPanels(Laid):
    """Codes in panels of features.

    Fields:
      codes, scale, totals, grid, taps, channels, features: see :class:`~jaxcomp.kernels.panels.PanelWeight`.
      dense_dtype, dense_shape, axes, site: see :class:`~jaxcomp.kernels.leaves.Laid`.
    """

    codes: jax.Array
    scale: jax.Array
    totals: jax.Array
    grid: Numbers
    taps: int
    channels: int
    features: int
    dense_dtype: DType
    dense_shape: Shape
    axes: Axes
    site: str

    @property
    def method(self) -> str:  # noqa: D102
        return f"PreparedPanels {self.grid.label}"

    @property
    def code_bits(self) -> int:  # noqa: D102
        return self.grid.bits

    @property
    def weight(self) -> PanelWeight:
        """The codes as kernels take them."""
        return PanelWeight(
            self.codes, self.scale, self.totals, self.grid, self.taps, self.channels, self.features, self.dense_dtype
        )


def prepared_panels(leaf: CompressedLeaf, axes: Axes, site: str, channels: int) -> PreparedPanels | str:
    """A quantized kernel, masked or not, laid out for so many channels, all of a dot's length; or why it cannot be."""
    if why := no_codes(leaf):
        return why
    mask, inner = (leaf.mask, leaf.values) if isinstance(leaf, Masked) else (None, leaf)
    assert isinstance(inner, Quantized)
    if inner.grid.code_range is None:
        return f"{inner.grid!r} codes name levels, and convolutions multiply integers"
    if inner.zero_point is not None or inner.grid.code_range[0] == 0:
        return "a kernel with zero points is not multiplied as integers"
    inner = inner.pack()
    scale = dense(inner.scale)
    if any(scale.shape[i] != 1 for i in axes[2]):
        return "it has several scales along what is summed over"
    raw = raw_codes(inner, None if mask is None else unpacked(mask))
    numbers = laid_out((raw.astype(jnp.int16) - 2 ** (inner.grid.bits - 1)).astype(jnp.int8), axes)
    shape = tuple(1 if i in axes[2] else n for i, n in enumerate(inner.shape))
    features, length = numbers.shape[-2:]
    return PreparedPanels(
        codes=panel_codes(numbers, inner.grid.bits, channels),
        scale=laid_out(jnp.broadcast_to(spread(scale, shape), shape), axes),
        totals=numbers.sum(-1, dtype=jnp.int32),
        grid=inner.grid,
        taps=length // max(1, channels),
        channels=channels,
        features=features,
        dense_dtype=inner.dtype,
        dense_shape=inner.shape,
        axes=axes,
        site=site,
    )
