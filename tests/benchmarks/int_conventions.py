"""Squared error of symmetric integer grids under the conventions of scale that are in use, ours among them.

``python tests/benchmarks/int_conventions.py`` prints the table of docs/quantization.md in seconds, on any machine the
same numbers to the digits shown.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import jaxcomp as jc

Array = NDArray[np.float64]
ROWS, CHANNELS = 512, 2048


def weights() -> dict[str, Array]:
    """A channel a column."""
    rng = np.random.default_rng(0)
    shape = ROWS, CHANNELS
    drawn = {"normal": rng.normal(size=shape), "Laplace": rng.laplace(size=shape), "uniform": rng.uniform(-1, 1, shape)}
    return {name: w.astype(np.float32).astype(np.float64) for name, w in drawn.items()}


def ours(w: Array, bits: int) -> Array:
    """``absmax / (2**(bits-1) - 1/2)``."""
    return np.asarray(
        jc.quantize(jc.Int(bits)).apply((), {"kernel": jnp.asarray(w, jnp.float32)})["kernel"].materialize()
    )


def to_even(w: Array, bits: int) -> Array:
    """The same scale, computed in float64 with halves to even."""
    half = 2 ** (bits - 1)
    scale = np.abs(w).max(0) / (half - 0.5)
    return np.clip(np.round(w / scale), -half, half - 1) * scale


def narrow(w: Array, bits: int) -> Array:
    """``absmax / (2**(bits-1) - 1)``: TensorRT, TFLite."""
    top = 2 ** (bits - 1) - 1
    scale = np.abs(w).max(0) / top
    return np.clip(np.round(w / scale), -top, top) * scale


def signed(w: Array, bits: int) -> Array:
    """The extreme of larger magnitude, with its sign, over ``-2**(bits-1)``: llama.cpp's Q4_0."""
    half = 2 ** (bits - 1)
    scale = np.take_along_axis(w, np.abs(w).argmax(0)[None], 0) / -half
    return np.clip(np.round(w / scale), -half, half - 1) * scale


CONVENTIONS: dict[str, Callable[[Array, int], Array]] = {
    "ours": ours,
    "halves to even": to_even,
    "absmax, narrow": narrow,
    "signed maximum": signed,
}


def table() -> dict[tuple[str, int], dict[str, float]]:
    """Of each distribution and width the squared error over the squared weights."""
    return {
        (name, bits): {how: float(np.sum((f(w, bits) - w) ** 2) / np.sum(w**2)) for how, f in CONVENTIONS.items()}
        for name, w in weights().items()
        for bits in range(2, 9)
    }


def main() -> None:
    """Prints the table."""
    print("| weights | bits |", " | ".join(CONVENTIONS), "|")
    print("|---|---|" + "---|" * len(CONVENTIONS))
    for (name, bits), errors in table().items():
        print(f"| {name} | {bits} |", " | ".join(f"{e:.4g}" for e in errors.values()), "|")


if __name__ == "__main__":
    main()
