"""Images of small integers, windows over them, and their convolutions window by window."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from jaxcomp.kernels.windows import Window


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(-3, 4, shape).astype(np.float64)


@st.composite
def geometries(draw, fewest_groups: int, most_groups: int = 3):
    """Windows, the shape of images, and a number of features."""
    rank, small = draw(st.integers(1, 2)), st.integers(1, 3)
    each = [draw(st.tuples(small, small, st.integers(-1, 3), st.integers(-1, 3), small, small)) for _ in range(rank)]
    kernel, strides, low, high, dilation, base = zip(*each, strict=True)
    groups = draw(st.integers(fewest_groups, most_groups))
    w = Window(kernel, strides, tuple(zip(low, high, strict=True)), dilation, base, groups)
    return w, (draw(small), *(draw(st.integers(1, 6)) for _ in range(rank)), groups * draw(small)), groups * draw(small)


def by_numpy(x: np.ndarray, kernel: np.ndarray, w: Window) -> np.ndarray:
    """The sums, window by window, with a kernel ``(features, *elements, channels of a group)``."""
    rank, (count, *spatial, channels) = len(w.kernel), x.shape
    spread = np.zeros((count, *((n - 1) * b + 1 for n, b in zip(spatial, w.base, strict=True)), channels))
    spread[(slice(None), *(slice(None, None, b) for b in w.base))] = x
    for axis, pair in enumerate(w.padding, 1):
        cut = tuple(
            slice(max(0, -pair[0]), spread.shape[a] - max(0, -pair[1])) if a == axis else slice(None)
            for a in range(rank + 2)
        )
        spread = np.pad(
            spread[cut], [(max(0, pair[0]), max(0, pair[1])) if a == axis else (0, 0) for a in range(rank + 2)]
        )
    reach = [(k - 1) * d + 1 for k, d in zip(w.kernel, w.dilation, strict=True)]
    out = [max(0, (n - r) // s + 1) for n, r, s in zip(spread.shape[1:-1], reach, w.strides, strict=True)]
    features, own = kernel.shape[0], channels // w.groups
    y = np.zeros((count, *out, features))
    for at in np.ndindex(*out):
        part = spread[
            (
                slice(None),
                *(slice(i * s, i * s + r, d) for i, s, r, d in zip(at, w.strides, reach, w.dilation, strict=True)),
            )
        ]
        for f in range(features):
            group = f * w.groups // features
            y[(slice(None), *at, f)] = (
                (part[..., group * own : (group + 1) * own] * kernel[f]).reshape(count, -1).sum(1)
            )
    return y
