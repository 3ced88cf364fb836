"""Faults 9 and 12: reshapes on either side of the channels, arrays taken apart and put together, rows not read.

The oracle is the function itself: the same lines of Python on arrays out of which NumPy took the unit's indices give
what they give on arrays in which NumPy set these to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcomp.structure import channel_groups, check_shrink, mask, plan, shrink
from tests.marks import quick
from tests.structure.models import attend, normal, plain
from tests.structure.test_architectures import by_name, found

Arrays = dict[str, Any]


@pytest.fixture(autouse=True)
def jax_defaults():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


class Layout(NamedTuple):
    fn: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    x: Any
    groups: list[tuple[int, str]]  # as in tests.structure.models.Case


def channels_last(p: Arrays, x: Any) -> Any:
    """Dense -> (batch, 6, C), a mixing convolution along the 6, and a product over C."""
    h = jnp.tanh(x @ p["w"] + p["b"]).reshape(len(x), 6, -1)
    return (h + jnp.roll(h, 1, axis=1) * jnp.arange(6.0)[:, None]).max(1) @ p["v"]


def channels_first(p: Arrays, x: Any) -> Any:
    h = jnp.tanh(x @ p["w"] + p["b"]).reshape(len(x), -1, 6)
    return (h + jnp.roll(h, 1, axis=2) * jnp.arange(6.0)).max(2) @ p["v"]


def decoder(p: Arrays, x: Any) -> Any:
    """A generator: Dense -> (batch, 4, 4, C) -> convolution, in two reshapes with a merge between them."""
    h = jax.nn.relu(x @ p["w"]).reshape(len(x), 16, -1) * p["scale"]
    h = h.reshape(len(x), -1).reshape(len(x), 4, 4, -1)
    return lax.conv_general_dilated(h, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def decoder_nchw(p: Arrays, x: Any) -> Any:
    h = jax.nn.relu(x @ p["w"]).reshape(len(x), -1, 4, 4)
    return lax.conv_general_dilated(h, p["k"], (1, 1), "SAME", dimension_numbers=("NCHW", "HWIO", "NCHW"))


def merged_heads(p: Arrays, x: Any) -> Any:
    """Flat kernels, heads of 4 by a reshape, merged again before the output."""
    q, k, v = ((x @ p[n]).reshape(*x.shape[:2], -1, 4) for n in "qkv")
    return attend(q, k, v).reshape(*x.shape[:2], -1) @ p["o"]


def interleaved(x: Any) -> Any:
    """Rotary positions of pairs of neighbours: split by a reshape, stacked and merged again."""
    t, d = x.shape[1], x.shape[-1]
    angle = jnp.arange(t)[:, None] * jnp.exp2(-jnp.arange(d // 2))
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    pairs = x.reshape(*x.shape[:-1], d // 2, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)


def grouped_rotary(p: Arrays, x: Any) -> Any:
    """Interleaved rotary attention of flat kernels; two query heads share one of keys and values."""
    q, k, v = ((x @ p[n]).reshape(*x.shape[:2], -1, 4) for n in "qkv")
    k, v = (jnp.repeat(a, 2, axis=2) for a in (interleaved(k), v))
    return attend(interleaved(q), k, v).reshape(*x.shape[:2], -1) @ p["o"]


def grouped_rotary_by_axis(p: Arrays, x: Any) -> Any:
    """The same with an axis of groups: (batch, time, groups, 2, 4)."""
    b, t = x.shape[:2]
    q, k, v = interleaved((x @ p["q"]).reshape(b, t, -1, 4)), *((x @ p[n]).reshape(b, t, -1, 4) for n in "kv")
    q, k = q.reshape(b, t, -1, 2, 4), interleaved(k)
    scores = jax.nn.softmax(jnp.einsum("btgrd,bsgd->bgrts", q, k) / 2)
    return jnp.einsum("bgrts,bsgd->btgrd", scores, v).reshape(b, t, -1) @ p["o"]


def unpacked_qkv(p: Arrays, x: Any) -> Any:
    """``q, k, v = qkv``: an unstack on new JAX, slices on old."""
    b, t = x.shape[:2]
    q, k, v = (x @ p["qkv"]).reshape(b, t, 3, -1, 4).transpose(2, 0, 1, 3, 4)
    return attend(q, k, v).reshape(b, t, -1) @ p["o"]


def unpacked_stack(p: Arrays, x: Any) -> Any:
    for up, down in zip(p["up"], p["down"], strict=True):
        x = x + jnp.tanh(x @ up) @ down
    return x


def tiled(p: Arrays, x: Any) -> Any:
    """Features side by side twice, and a row of scales tiled to every example."""
    h = jnp.tanh(x @ p["w"]) * jnp.tile(p["s"][None], (len(x), 1))
    return jnp.tile(h, (1, 2)) @ jnp.concatenate([p["v"], 2 * p["v"]])


def stacked(p: Arrays, x: Any) -> Any:
    """Two branches stacked, gated by one another, and summed."""
    h = jnp.stack([x @ p["a"], jnp.tanh(x @ p["d"])], axis=1)
    return (h * jax.nn.sigmoid(h[:, ::-1])).sum(1) @ p["v"]


def special(p: Arrays, x: Any) -> Any:
    """Functions that are primitives of their own on new JAX: log2, sinc, polyval, interp, frexp."""
    h = x @ p["w"]
    h = jnp.sinc(h) + jnp.log2(1 + h * h) + jnp.polyval(jnp.array([0.5, -1.0, 2.0]), h)
    h = jnp.interp(h, jnp.linspace(-2.0, 4.0, 5), jnp.array([0.0, 1.0, -1.0, 2.0, 0.5])) + jnp.frexp(h)[0]
    return h @ p["v"]


def vit(p: Arrays, x: Any) -> Any:
    """Patches, a table of positions longer than they are, attention by ``q, k, v = qkv``, a mean."""
    b, n, c = len(x), x.shape[1] // 2, x.shape[-1]
    x = x.reshape(b, n, 2, n, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, n * n, 4 * c) @ p["patch"]
    x = x + p["positions"][: x.shape[1]]
    x = x + unpacked_qkv(p, x)
    return x.mean(1) @ p["head"]


ATTENTION = (3, "q:1*4 k:1*4 v:1*4 o:0*4")
GROUPED = (2, "q:1*8 k:1*4 v:1*4 o:0*8")
FLAT = {"q": (6, 12), "k": (6, 12), "v": (6, 12), "o": (12, 6)}
SHARED = {"q": (6, 16), "k": (6, 8), "v": (6, 8), "o": (16, 6)}
LAYOUTS = {
    "channels last": Layout(
        channels_last, {"w": (3, 24), "b": (24,), "v": (4, 2)}, normal(5, 3), [(4, "w:1*6 b:0*6 v:0")]
    ),
    "channels first": Layout(
        channels_first, {"w": (3, 24), "b": (24,), "v": (4, 2)}, normal(5, 3), [(4, "w:1*6 b:0*6 v:0")]
    ),
    "decoder": Layout(
        decoder, {"w": (3, 80), "scale": (5,), "k": (3, 3, 5, 2)}, normal(2, 3), [(5, "w:1*16 scale:0 k:2")]
    ),
    "decoder, NCHW": Layout(decoder_nchw, {"w": (3, 80), "k": (3, 3, 5, 2)}, normal(2, 3), [(5, "w:1*16 k:2")]),
    "merged heads": Layout(merged_heads, FLAT, normal(2, 5, 6), [ATTENTION]),
    "grouped rotary": Layout(grouped_rotary, SHARED, normal(2, 5, 6), [GROUPED]),
    "grouped rotary by axis": Layout(grouped_rotary_by_axis, SHARED, normal(2, 5, 6), [GROUPED]),
    "unpacked qkv": Layout(unpacked_qkv, {"qkv": (6, 36), "o": (12, 6)}, normal(2, 5, 6), [(3, "qkv:1*12 o:0*4")]),
    "unpacked stack": Layout(
        unpacked_stack, {"up": (2, 4, 6), "down": (2, 6, 4)}, normal(3, 4), [(6, "up:2 down:1")]
    ),
    "tiled": Layout(tiled, {"w": (3, 5), "s": (5,), "v": (5, 2)}, normal(4, 3), [(5, "w:1 s:0 v:0")]),
    "stacked": Layout(stacked, {"a": (3, 5), "d": (3, 5), "v": (5, 2)}, normal(4, 3), [(5, "a:1 d:1 v:0")]),
    "special functions": Layout(special, {"w": (3, 5), "v": (5, 2)}, normal(4, 3), [(5, "w:1 v:0")]),
    "vit": Layout(
        vit,
        {"patch": (12, 6), "positions": (16, 6), "qkv": (6, 36), "o": (12, 6), "head": (6, 2)},
        normal(2, 6, 6, 3),
        [(3, "qkv:1*12 o:0*4"), (6, "patch:1 positions:1 qkv:0 o:1 head:0")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_fault_9_12_groups_are_those_of_a_reader(name):
    case = LAYOUTS[name]
    groups = channel_groups(case.fn)(plain(case.shapes), case.x)
    wanted = sorted(((n, frozenset(slices.split())) for n, slices in case.groups), key=by_name)
    assert found(groups) == wanted
    assert not groups.unknown


CUT = ("channels last", "decoder", "grouped rotary", "unpacked qkv", "special functions")
SHRUNKEN = ("channels last", "grouped rotary", "unpacked stack", "tiled", "vit")


@pytest.mark.parametrize("name", quick(LAYOUTS, *CUT))
def test_fault_9_12_a_unit_cut_out_equals_a_unit_set_to_zero(name):
    """The sizes of the function's own lines come from its arrays, so it runs at either size."""
    case = LAYOUTS[name]
    params = plain(case.shapes)
    for group in channel_groups(case.fn)(params, case.x):
        cut, zeroed = dict(params), dict(params)
        for path, axis, indices in group.unit(1):
            where = (slice(None),) * axis + (list(indices),)
            cut[path] = jnp.asarray(np.delete(np.asarray(cut[path]), indices, axis))
            zeroed[path] = zeroed[path].at[where].set(0.0)
        np.testing.assert_allclose(case.fn(cut, case.x), case.fn(zeroed, case.x), atol=1e-5)


@pytest.mark.parametrize("name", quick(LAYOUTS, *SHRUNKEN))
def test_fault_9_12_shrunken_equals_masked(name):
    case = LAYOUTS[name]
    params = plain(case.shapes)
    half = plan(channel_groups(case.fn)(params, case.x), params, sparsity=0.5)
    assert check_shrink(case.fn, half, params, case.x) < 1e-4
    got = jax.jit(shrink(case.fn, half))(half.take(params), case.x)
    np.testing.assert_allclose(got, case.fn(mask(half)(params), case.x), atol=1e-4)
