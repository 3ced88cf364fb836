"""What LiteRT's quantizer made, read again: a product left in float or a weight that moved is an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxcomp.activations.planning import Planned
from jaxcomp.export.errors import ExportError
from jaxcomp.export.litert_model import OWNER, Model, Product, needed


@dataclass(frozen=True)
class Asked:
    """What one product of the model is to become.

    Attributes:
      planned: the site that it was, with its rule.
      product: it, in the float model.
      scheme: of SCHEMES, or None to leave it in float.
      bits: of its weight in the file.
      peaks: of its weight's codes the largest magnitude of each output channel; None where it has none.
    """

    planned: Planned
    product: Product
    scheme: str | None
    bits: int
    peaks: np.ndarray | None

    @property
    def path(self) -> str:
        """The site's."""
        return self.planned.site.path


def check(before: Model, after: Model, asked: Sequence[Asked]) -> None:
    """Raises where the quantizer left a product in float, or changed a weight."""
    types = {v: k for k, v in vars(needed("ai_edge_litert.schema_py_generated").TensorType).items()}
    for a, product in zip(asked, after.products, strict=True):
        found = [types[after.tensors[i].type] for i in (*product.inputs[:2], product.output)]
        made = after.maker(product.inputs[1]) if a.scheme == "weights" else None
        if made is not None:
            found[1] = types[after.tensors[made[1][0]].type]
        stored = f"INT{a.bits}" if a.planned.site.weight is not None else "INT8"
        wanted = {
            None: found,
            "weights": ["FLOAT32", stored, "FLOAT32"],
            "dynamic": ["FLOAT32", stored, "FLOAT32"],
            "static": ["INT8", stored, "INT8"],
        }[a.scheme]
        if found != wanted:
            raise ExportError(
                f"{OWNER}: LiteRT's quantizer made {a.path!r} a {product.kind} of {', '.join(found)}, where"
                f" {', '.join(wanted)} was asked for; give it and the leaf another width or none."
            )
        if a.scheme is not None and product.weight:
            number = product.inputs[1] if made is None else made[1][0]
            _check_weight(a.path, before, a.product.inputs[1], after=after, number=number)


def _check_weight(path: str, before: Model, old: int, *, after: Model, number: int) -> None:
    """Raises where codes times scales are not the numbers that went in."""
    tensor = after.tensors[number]
    wanted = np.frombuffer(bytes(before.values(old)), np.float32).reshape(before.shape(old))  # type: ignore[arg-type]
    codes = _codes(np.asarray(after.values(number)), wanted.size)
    scale = np.asarray(tensor.quantization.scale, np.float32)
    shape = [1] * wanted.ndim
    shape[tensor.quantization.quantizedDimension if scale.size > 1 else 0] = scale.size
    apart = np.abs(codes.reshape(wanted.shape) * scale.reshape(shape) - wanted) / scale.reshape(shape)
    if apart.max(initial=0) > 0.02:
        raise ExportError(
            f"{OWNER}: LiteRT has one scale for each output channel and codes that are symmetric, and {path!r} does not"
            f" lie on them: weights would be {apart.max():.2f} of a step apart. Quantize it per channel of its outputs,"
            " with narrow=True."
        )


def _codes(data: np.ndarray, size: int) -> np.ndarray:
    """The codes of a buffer of bytes or of nibbles, the low one first."""
    if data.size == size:
        return data.view(np.int8).astype(np.float32)
    both = np.stack([data << 4, data], -1).view(np.int8) >> 4
    return both.reshape(-1)[:size].astype(np.float32)
