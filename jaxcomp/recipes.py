"""Papers and formats, each in a line or two of transforms."""

from __future__ import annotations

from typing import TypedDict, Unpack

from jaxcomp.core.layouts import Groups
from jaxcomp.core.paths import Where
from jaxcomp.core.records import recorded_as
from jaxcomp.core.roles import Roles
from jaxcomp.core.transform import Transform, chain
from jaxcomp.pruning.schedules import Schedule
from jaxcomp.pruning.transform import prune
from jaxcomp.quantization.grids import Int
from jaxcomp.quantization.level_grids import E2M1, E4M3, Float
from jaxcomp.quantization.microscaling import E8M0, Blocked
from jaxcomp.quantization.scales import Rounding, ScaleRule
from jaxcomp.quantization.tables import NF4
from jaxcomp.quantization.transform import quantize
from jaxcomp.sharing.transform import share


class Slots(TypedDict, total=False):
    """The slots of :func:`~jaxcomp.quantization.transform.quantize` that a format leaves open."""

    roles: Roles | None
    scale: ScaleRule | None
    rounding: Rounding
    clip_gradient: bool
    where: Where | None


@recorded_as("recipes.deep_compression")
def deep_compression(
    sparsity: float | Schedule, clusters: int, *, where: Where | None = None, roles: Roles | None = None
) -> Transform:
    """Prunes, then shares what is left, both while training.

    Args:
      sparsity: see :func:`~jaxcomp.pruning.transform.prune`.
      clusters: see :func:`~jaxcomp.sharing.transform.share`.
      where: which leaves; the default is those of two axes or more that the roles name, and without roles ``matrices``.
      roles: what the program does with each axis, ``jaxcomp.roles(fn)(params, *args)``.

    >>> import jax.numpy as jnp
    >>> import jaxcomp as jc
    >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(4, 2)}
    >>> t = deep_compression(0.5, 2)
    >>> sorted(set(jc.materialize(t.apply(t.init(params), params))["kernel"].ravel().tolist()))
    [0.0, 5.5, 7.5]

    Source: Han et al. 2015, arXiv:1510.00149; its entropy coding belongs to the file.
    """
    return chain(prune(sparsity, roles=roles, where=where), share(clusters, roles=roles, where=where))


@recorded_as("recipes.mx")
def mx(element: Int | Float = E2M1, block: int = 32, **slots: Unpack[Slots]) -> Transform:
    """A microscaling format: blocks along the axis that products sum over, each with a power of two as scale, a byte.

    ``mx(E4M3)`` and ``mx(E5M2)`` are MXFP8, ``mx(E3M2)`` and ``mx(E2M3)`` MXFP6, ``mx(E2M1)`` MXFP4, and
    ``mx(Int(8, narrow=True))`` MXINT8.

    Blocks of floats equal torchao's with ``ScaleCalculationMode.FLOOR``, the specification's rule; its RCEIL, CEIL and
    EVEN modes take up to twice that scale and saturate less, and its scales go below ``2**-100`` (see ``E8M0``).

    Args:
      element: the grid of the elements.
      block: how many of them share a scale.
      slots: the other slots of :func:`~jaxcomp.quantization.transform.quantize`.

    Raises:
      TypeError, ValueError: what ``Blocked``, ``Groups`` and ``quantize`` raise.

    >>> import jax.numpy as jnp
    >>> from jaxcomp import nbytes, pack
    >>> nbytes(pack(mx().apply((), {"kernel": jnp.ones((64, 8))})))  # half a byte each, a byte a block, one float32
    276

    Source: OCP microscaling formats (MX) specification 1.0, sections 5 and 6.3.
    """
    return quantize(Blocked(element, E8M0()), per=Groups(block), **slots)


@recorded_as("recipes.nvfp4")
def nvfp4(**slots: Unpack[Slots]) -> Transform:
    """E2M1 elements in blocks of 16, E4M3 block scales, one float32 scale for the leaf.

    Blocks equal torchao's with the ``per_tensor_scale`` of the leaf's largest magnitude, but its block scales stop at
    ``2**-6``, E4M3's least normal number, and ours at ``2**-9``, the least subnormal one: small blocks stay finer.

    Args:
      slots: the other slots of :func:`~jaxcomp.quantization.transform.quantize`.

    >>> import jax.numpy as jnp
    >>> import jaxcomp as jc
    >>> jc.nbytes(jc.pack(nvfp4().apply((), {"kernel": jnp.ones((64, 2))})))  # codes, a byte a block, a float32
    76

    Source: NVIDIA 2025, arXiv:2509.25149, section 2.
    """
    return quantize(Blocked(E2M1, E4M3), per=Groups(16), **slots)


@recorded_as("recipes.nf4")
def nf4(group: int = 64, **slots: Unpack[Slots]) -> Transform:
    """NormalFloat in groups along the axis that products sum over, a scale of the weights' type each.

    Args:
      group: how many neighbours share a scale.
      slots: the other slots of :func:`~jaxcomp.quantization.transform.quantize`.

    >>> import jax.numpy as jnp
    >>> import jaxcomp as jc
    >>> jc.nbytes(jc.pack(nf4(32).apply((), {"kernel": jnp.ones((64, 2))})))  # codes, a float32 a group
    80

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3; its scales on a grid are
    ``quantize(Blocked(NF4(), E4M3), per=Groups(64))``.
    """
    return quantize(NF4(), per=Groups(group), **slots)
