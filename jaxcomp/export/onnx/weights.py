"""Weights as operands of products: floats, or codes behind a DequantizeLinear, which runtimes fuse into the product."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jaxcomp.core.types import DType
from jaxcomp.export.coded import repeated_to
from jaxcomp.export.onnx.graph import Attribute, Graph
from jaxcomp.export.onnx.values import Coded


@dataclass(frozen=True)
class HostCodes:
    """``dense == (codes - zero) * scale`` on the host.

    Attributes:
      codes: integers.
      scale: of the codes' rank; each dimension divides the codes'.
      zero: integers of the scale's shape, or None for 0.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None

    @classmethod
    def of(cls, value: Coded) -> HostCodes:
        """What a weight in codes holds."""
        box = value.codes
        zero = None if box.zero is None else np.asarray(box.zero)
        return cls(np.asarray(box.codes), np.asarray(box.scale), zero)

    def laid(self, order: Sequence[int], groups: Sequence[int]) -> HostCodes:
        """Transposed, then axes joined: the first ``groups[0]`` of them to one, the next ``groups[1]``, ….

        Scales of joined axes stay shared where one block holds them; the axes before it get their own.
        """
        codes = np.transpose(self.codes, order)
        ends = np.cumsum([0, *groups])
        spans = [tuple(range(a, b)) for a, b in itertools.pairwise(ends)]

        def joined(v: np.ndarray) -> np.ndarray:
            v = np.transpose(v, order)
            shape = []
            for span in spans:
                cut = max((i for i in span if v.shape[i] != 1), default=span[0] if span else 0)
                for i in span:  # blocks stay blocks along the last axis that is cut
                    v = np.repeat(v, codes.shape[i] // v.shape[i], i) if i < cut else v
                shape.append(math.prod(v.shape[i] for i in span))
            return v.reshape(shape)

        shape = [math.prod(codes.shape[i] for i in span) for span in spans]
        return HostCodes(codes.reshape(shape), joined(self.scale), None if self.zero is None else joined(self.zero))

    @property
    def dtype(self) -> DType:
        """The narrowest type of ONNX that holds the codes, and the zero points."""
        ends = [self.codes] if self.zero is None else [self.codes, self.zero]
        low = min((int(v.min()) for v in ends if v.size), default=0)
        high = max((int(v.max()) for v in ends if v.size), default=0)
        if self.codes.dtype.kind not in "iu":
            return self.codes.dtype
        for dtype, (least, most) in _TYPES:
            if least <= low and high <= most:
                return dtype
        return np.dtype(np.int32)


_TYPES = (
    (np.dtype(ml_dtypes.int4), (-8, 7)),
    (np.dtype(ml_dtypes.uint4), (0, 15)),
    (np.dtype(np.int8), (-128, 127)),
    (np.dtype(np.uint8), (0, 255)),
)


def dequantized(graph: Graph, held: HostCodes, *, dtype: DType | None = None) -> str:
    """The name of the weight behind a DequantizeLinear: per tensor, per index of one axis, or in blocks of one.

    A zero point is always given, zeros too: without one onnxruntime leaves products in float.
    """
    codes, stored = held.codes, held.dtype if dtype is None else dtype
    scale = np.asarray(held.scale, np.float32)
    zero = np.zeros(scale.shape, np.int32) if held.zero is None else held.zero
    attributes: dict[str, Attribute] = {}
    wide = [i for i, n in enumerate(scale.shape) if n != 1]
    if not wide:
        scale, zero = scale.reshape(()), zero.reshape(())
    elif len(wide) == 1 and scale.shape[wide[0]] == codes.shape[wide[0]]:
        scale, zero, attributes = scale.reshape(-1), zero.reshape(-1), {"axis": wide[0]}
    else:
        axis = min(range(codes.ndim), key=lambda i: scale.shape[i] / codes.shape[i])
        blocks = tuple(scale.shape[i] if i == axis else n for i, n in enumerate(codes.shape))
        scale, zero = (repeated_to(v, blocks) for v in (scale, zero))
        attributes = {"axis": axis, "block_size": codes.shape[axis] // blocks[axis]}
    names = [graph.constant(codes.astype(stored)), graph.constant(scale), graph.constant(zero.astype(stored))]
    return graph.once("DequantizeLinear", names, **attributes)
