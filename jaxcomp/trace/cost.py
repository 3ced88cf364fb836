"""``cost``: what a program's products multiply, move, and take at best on a named device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from html import escape

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.tables import columns, html_table
from jaxcomp.core.types import Params, PyTree
from jaxcomp.trace.program import trace
from jaxcomp.trace.sites import Operand, Site, Unread, runs_on, sites, sites_of, unread
from jaxcomp.trace.walk import Fn


@dataclass(frozen=True)
class Device:
    """What a device can do at most.

    Args:
      name: for tables.
      flops: peak operations a second (a multiply-accumulate is two) of its dense matrix units, by the number of bits
        of the wider operand; a width that is not listed runs as the next wider one.
      bandwidth: bytes a second of its main memory.

    Raises:
      ValueError: no widths, or a peak or bandwidth that is not positive.

    >>> Device("mine", flops={32: 1e12, 8: 4e12}, bandwidth=1e11).peak(4)
    4000000000000.0
    """

    name: str
    flops: dict[int, float]
    bandwidth: float

    def __post_init__(self) -> None:
        if not self.flops or min(self.flops.values()) <= 0 or self.bandwidth <= 0:
            raise ValueError(f"Device: flops (by bits) and bandwidth must be positive, got {self!r}.")

    def peak(self, bits: int) -> float:
        """Peak operations a second at ``bits``; the widest listed one where ``bits`` is wider than all."""
        fitting = [width for width in self.flops if width >= bits]
        return self.flops[min(fitting) if fitting else max(self.flops)]


H100 = Device("NVIDIA H100 SXM", {32: 494.7e12, 16: 989.4e12, 8: 1978.9e12}, 3.35e12)
"""Dense TF32, BF16 and INT8/FP8 of the SXM5 part. Source: NVIDIA H100 Tensor Core GPU Architecture white paper."""
A100 = Device("NVIDIA A100 80GB SXM", {32: 156e12, 16: 312e12, 8: 624e12, 4: 1248e12}, 2.039e12)
"""Dense TF32, BF16, INT8 and INT4. Source: NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM."""
TPU_V5E = Device("TPU v5e", {16: 197e12, 8: 393e12}, 819e9)
"""BF16 and INT8 of one chip. Source: Google Cloud documentation, "TPU v5e", system architecture."""
TPU_V4 = Device("TPU v4", {16: 275e12}, 1228e9)
"""BF16 (or INT8, as fast) of one chip. Source: Jouppi et al. 2023, arXiv:2304.01433."""


@dataclass(frozen=True)
class SiteCost:
    """The cost of one site at its widths.

    Attributes:
      site: the site.
      bits: width of each operand.
      macs: multiply-accumulates.
      bops: bit operations: ``macs`` times the product of both widths.
      bytes: read and written if every step reads its operands from memory once and writes its result.
    """

    site: Site
    bits: tuple[int, ...]
    macs: int
    bops: int
    bytes: float

    def seconds(self, device: Device) -> float:
        """Roofline time: the longer of computing and moving."""
        return max(2 * self.macs / device.peak(max(self.bits)), self.bytes / device.bandwidth)


@dataclass(frozen=True)
class Cost:
    """The cost of a function: its sites' costs, and their sums.

    Only products and lookups are counted; elementwise work is assumed to be fused into them.

    Attributes:
      sites: the sites' costs.
      unread: what is not counted and may multiply too, such as a Pallas call: where, which primitive, and why.
    """

    sites: tuple[SiteCost, ...]
    unread: tuple[Unread, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return sum(s.macs for s in self.sites)

    @property
    def flops(self) -> int:
        """Floating-point operations of the products: two a multiply-accumulate."""
        return 2 * self.macs

    @property
    def bops(self) -> int:
        """Bit operations."""
        return sum(s.bops for s in self.sites)

    @property
    def bytes(self) -> float:
        """Bytes moved by the sites."""
        return sum(s.bytes for s in self.sites)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is counted nowhere, and why."""
        return tuple(f"not counted: {u.path} ({u.primitive}): {u.why}" for u in self.unread)

    def __repr__(self) -> str:
        """A row a site, and their sums."""
        return "\n".join([columns(self._cells(), _SIDES), *self.notes])

    def _repr_html_(self) -> str:
        return html_table(self._cells(), _SIDES, sums=True) + "".join(f"<p>{escape(note)}</p>" for note in self.notes)

    def _cells(self) -> list[tuple[str, ...]]:
        rows = [(s.site.path, s.site.kind, "x".join(map(str, s.bits)), *_counts(s)) for s in self.sites]
        return [("site", "kind", "bits", "MACs", "bit operations", "bytes"), *rows, ("total", "", "", *_counts(self))]

    def seconds(self, device: Device) -> float:
        """Roofline time: the sum over sites of the longer of computing and moving.

        Source: Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785.
        """
        return sum(s.seconds(device) for s in self.sites)


_SIDES = "lllrrr"


def _counts(cost: SiteCost | Cost) -> tuple[str, ...]:
    return f"{cost.macs:,}", f"{cost.bops:,}", f"{round(cost.bytes):,}"


Bits = tuple[int | None, int | None]
"""Widths of (weight, activation); None keeps the type's own width."""


def cost(fn: Fn, *, bits: Bits | Callable[[Site], Bits] = (None, None)) -> Callable[..., Cost]:
    """The cost of ``fn(params, *args)`` at given widths of weights and activations.

    ``bops = Σ macs · b_w · b_a``, a product of two activations having ``b_a²``; results are written in their own type.
    Of what stands once for each backend (``jax.lax.platform_dependent``) that for JAX's default one counts.

    Args:
      fn: a pure function whose first argument is the parameter tree; leaves may be ``jax.ShapeDtypeStruct``.
      bits: ``(weight, activation)`` for every site, or a function of the site; None is the type's own width.

    Raises:
      ValueError: a width below one.

    >>> import jax
    >>> p, x = {"w": jax.ShapeDtypeStruct((8, 16), "float32")}, jax.ShapeDtypeStruct((2, 8), "float32")
    >>> c = cost(lambda p, x: x @ p["w"], bits=(4, 8))(p, x)
    >>> c.macs, c.bops, c.bytes
    (256, 8192, 208.0)

    Source: bit operations as in van Baalen et al. 2020, arXiv:2005.07093.
    """

    @wraps(fn)
    def costed(params: Params, *args: PyTree, **kwargs: PyTree) -> Cost:
        program = trace(fn, params, *args, **kwargs)
        here = filter(runs_on(program, jax.default_backend()), sites_of(program))
        costs = tuple(site_cost(s, bits(s) if callable(bits) else bits) for s in here)
        return Cost(costs, unread(program))

    return costed


def site_cost(site: Site, bits: Bits) -> SiteCost:
    """The cost of one site at its widths."""
    if any(b is not None and b < 1 for b in bits):
        raise ValueError(f"cost: widths of {site.path!r} must be positive or None, got {bits!r}.")
    widths = tuple((bits[0] if o.is_weight else bits[1]) or _own_bits(o) for o in site.operands)
    if site.kind == "embed":
        row = site.out_bytes // jnp.dtype(site.out_dtype).itemsize * widths[0] / 8
        return SiteCost(site, widths, 0, 0, row + site.out_bytes)
    read = sum(_elements(o) * width / 8 for o, width in zip(site.operands, widths, strict=True))
    return SiteCost(site, widths, site.macs, site.macs * widths[0] * widths[1], site.steps * read + site.out_bytes)


def _own_bits(operand: Operand) -> int:
    return 8 * jnp.dtype(operand.leaf_dtype or operand.dtype).itemsize


def _elements(operand: Operand) -> int:
    return operand.bytes * 8 // _own_bits(operand)


def reuse_of(fn: Fn) -> Callable[..., dict[str, float]]:
    """How often each parameter of a leaf is multiplied in one run of ``fn(params, *args)``, by path.

    The weight of a parameter in ``Budget(macs=…)``. A convolution's count is that of its output positions, so the first
    1x1 convolution of a strided kernel's factors, which runs on the input's, costs more than is counted here; ``cost``
    of the factored function counts all of it.

    >>> reuse_of(lambda p, x: x @ p["w"])({"w": jnp.ones((3, 4))}, jnp.ones((5, 3)))
    {'w': 5.0}
    """

    @wraps(fn)
    def counted(params: Params, *args: PyTree, **kwargs: PyTree) -> dict[str, float]:
        found: dict[str, float] = {}
        for site in sites(fn)(params, *args, **kwargs):
            if site.leaf is not None and site.weight is not None:
                size = float(np.prod(site.operands[site.weight].leaf_shape))
                found[site.leaf] = found.get(site.leaf, 0.0) + site.macs / size
        return found

    return counted
