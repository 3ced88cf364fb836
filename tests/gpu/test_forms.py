"""What you train is what you ship on a GPU: every form on integers, in fake mode and on the host, by default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.activations import Dynamic, ranges_of
from jaxcomp.core.layouts import Tokens

pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Form:
    """A product, and the shapes of its weight and activation."""

    fn: Callable[[Any, jax.Array], jax.Array]
    weight: tuple[int, ...]
    x: tuple[int, ...]


def conv(stride: int = 1, hole: int = 1, spacing: int = 1, groups: int = 1) -> Callable[[Any, jax.Array], jax.Array]:
    """A padded convolution over NHWC, or over NWC where the weight has one spatial axis."""

    def run(p: Any, x: jax.Array) -> jax.Array:
        axes = x.ndim - 2
        spec = ("NHWC", "HWIO", "NHWC") if axes == 2 else ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(
            x,
            p["w"].astype(x.dtype),
            (stride,) * axes,
            [(1, 2)] * axes,
            (hole,) * axes,
            (spacing,) * axes,
            spec,
            groups,
        )

    return run


def dot(p: Any, x: jax.Array) -> jax.Array:
    """Rows by a kernel as Flax has it."""
    return x @ p["w"].astype(x.dtype)


FORMS = {
    "dot": Form(dot, (200, 72), (3, 7, 200)),
    "dot of one row": Form(dot, (200, 72), (1, 200)),
    "dot, outputs first": Form(lambda p, x: x @ p["w"].T.astype(x.dtype), (72, 200), (5, 200)),
    "dot, one tile of everything": Form(dot, (1024, 512), (256, 1024)),
    "convolution": Form(conv(), (3, 3, 8, 16), (2, 9, 10, 8)),
    "convolution, strided": Form(conv(stride=2), (3, 3, 8, 16), (2, 9, 10, 8)),
    "convolution, dilated": Form(conv(spacing=2), (3, 3, 8, 16), (2, 9, 10, 8)),
    "convolution, grouped": Form(conv(groups=2), (3, 3, 8, 16), (2, 9, 10, 16)),
    "convolution, strided, dilated, grouped": Form(conv(stride=2, spacing=2, groups=2), (3, 3, 8, 16), (2, 9, 10, 16)),
    "convolution, transposed": Form(conv(hole=2), (3, 3, 8, 16), (2, 5, 6, 8)),
    "convolution, depthwise": Form(conv(groups=16), (3, 3, 1, 16), (2, 9, 10, 16)),
    "convolution, one spatial axis": Form(conv(), (5, 8, 16), (2, 33, 8)),
    "convolution, odd channels": Form(conv(), (3, 3, 3, 5), (1, 8, 8, 3)),
    "convolution, 1x1, a large one": Form(conv(), (1, 1, 256, 128), (8, 16, 16, 256)),
}
ACTS = {
    "symmetric": jc.Act(8, symmetric=True),
    "asymmetric": jc.Act(8),
    "dynamic": jc.Act(8, symmetric=True, range=Dynamic()),
    "dynamic asymmetric": jc.Act(8, range=Dynamic()),
    "4 bits": jc.Act(4),
}
ROW_ACTS = {
    "per token": jc.Act(8, symmetric=True, range=Dynamic(), per=Tokens()),
    "per token, asymmetric": jc.Act(8, range=Dynamic(), per=Tokens()),
    "per group": jc.Act(8, symmetric=True, range=Dynamic(), per=jc.Groups(40)),
    "per group, asymmetric": jc.Act(8, range=Dynamic(), per=jc.Groups(40)),
}
WEIGHTS: dict[str, Callable[[Any], jc.Transform]] = {
    "int8": lambda roles: jc.quantize(jc.Int(8), roles=roles),
    "int8 asymmetric": lambda roles: jc.quantize(jc.Int(8, symmetric=False), roles=roles),
    "int4": lambda roles: jc.quantize(jc.Int(4), roles=roles),
    "int4 groups": lambda roles: jc.quantize(jc.Int(4), per=jc.Groups(40), roles=roles),
    "int4 groups asymmetric": lambda roles: jc.quantize(jc.Int(4, symmetric=False), per=jc.Groups(40), roles=roles),
    "int2": lambda roles: jc.quantize(jc.Int(2, narrow=True), roles=roles),
    "masked int8": lambda roles: jc.chain(jc.prune(0.5, roles=roles), jc.quantize(jc.Int(8), roles=roles)),
    "masked int4 asymmetric": lambda roles: jc.chain(
        jc.prune(0.5, roles=roles), jc.quantize(jc.Int(4, symmetric=False), roles=roles)
    ),
}
# A convolution's weights have no zero point and no groups within a window.
PAIRS = [(form, weight) for form in ("dot", "dot of one row") for weight in WEIGHTS]
PAIRS += [("convolution", weight) for weight in WEIGHTS if "asymmetric" not in weight and "groups" not in weight]


def drawn(form: Form, dtype: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A weight and an activation that is not centered; the same bits for every device."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=form.weight) / np.sqrt(np.prod(form.weight[:-1]))
    return {"w": w.astype(np.float32)}, np.asarray(jnp.asarray(rng.normal(size=form.x) + 0.5, dtype))


def outputs(form: Form, act: jc.Act, weight: str, dtype: str) -> dict[str, np.ndarray]:
    """In integer and in fake mode here, and on integers on the host, from one tree and one set of ranges."""
    params, x = drawn(form, dtype)
    host = jax.devices("cpu")[0]
    with jax.default_device(host):
        transform = WEIGHTS[weight](jc.roles(form.fn)(params, x))
        params, x = jax.tree.map(jnp.asarray, (params, x))
        tree = transform.apply(transform.init(params), params)
        trees = {False: tree, True: jc.pack(tree)}
        ranges = ranges_of(jc.calibrate(form.fn)(params, x)) if act.needs_range else None

    def run(device: jax.Device, *, integer: bool) -> np.ndarray:
        q = jc.quantize_function(form.fn, {"w": act}, integer=integer, strict=integer)
        args = jax.device_put((trees[integer], ranges, x), device)
        return np.asarray(jax.device_get(jax.jit(q)(*args))).astype(np.float64)

    here = jax.devices()[0]
    return {"integer": run(here, integer=True), "fake": run(here, integer=False), "host": run(host, integer=True)}


def check(form: Form, act: jc.Act, weight: str, dtype: str = "float32") -> None:
    """Fake equals integer within rounding; the host's result within what one code on a boundary may change."""
    out = outputs(form, act, weight, dtype)
    largest = np.abs(out["host"]).max()
    eps = {"float32": 2.0**-23, "bfloat16": 2.0**-8}[dtype]
    # Sums of codes are exact; scales, zero points and the result are rounded, some of them where terms cancel.
    np.testing.assert_allclose(out["fake"], out["integer"], rtol=0, atol=max(32 * 2.0**-23, 2 * eps) * largest)
    np.testing.assert_allclose(out["integer"], out["host"], rtol=0, atol=0.02 * largest)
    # And that only rarely: the bulk agrees to rounding.
    assert np.median(np.abs(out["integer"] - out["host"])) <= max(4e-6, 2 * eps) * largest


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_fake_and_on_integers(form, act) -> None:
    check(FORMS[form], ACTS[act], "int8")


@pytest.mark.parametrize("act", ROW_ACTS)
def test_scales_of_tokens_and_groups(act) -> None:
    check(FORMS["dot"], ROW_ACTS[act], "int4 groups")


@pytest.mark.parametrize("act", ["symmetric", "asymmetric"])
@pytest.mark.parametrize(("form", "weight"), PAIRS)
def test_every_weight_is_the_same_fake_and_on_integers(form, weight, act) -> None:
    check(FORMS[form], ACTS[act], weight)


@pytest.mark.parametrize("act", ["symmetric", "asymmetric", "dynamic"])
@pytest.mark.parametrize("form", ["dot", "dot of one row", "convolution", "convolution, depthwise"])
def test_bfloat16_is_the_same_fake_and_on_integers(form, act) -> None:
    check(FORMS[form], ACTS[act], "int8", "bfloat16")


@pytest.mark.parametrize("act", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_every_form_are_those_of_the_fake_mode(form, act) -> None:
    """Products of gradients are float ones at default precision in both modes: the same to its rounding."""
    made = FORMS[form]
    params, x = drawn(made, "float32")
    params, x = jax.tree.map(jnp.asarray, (params, x))
    compress = WEIGHTS["int8"](jc.roles(made.fn)(params, x))
    ranges = ranges_of(jc.calibrate(made.fn)(params, x))

    def gradient(*, integer: bool) -> Any:
        q = jc.quantize_function(made.fn, {"w": ACTS[act]}, integer=integer, strict=integer)
        loss = lambda p, x: jnp.sin(q(compress.apply(compress.init(p), p), ranges, x)).sum()  # noqa: E731
        return jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x))

    for real, fake in zip(*(jax.tree.leaves(gradient(integer=i)) for i in (True, False)), strict=True):
        np.testing.assert_allclose(real, fake, rtol=0, atol=2e-3 * np.abs(fake).max())
