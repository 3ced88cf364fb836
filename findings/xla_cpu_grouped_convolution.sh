#!/usr/bin/env bash
# XLA on CPU, float32: a depthwise 3x3 convolution takes ten to forty times what nine shifted images times their elements
# of the kernel take, summed in jax.numpy; and the gradient in the kernel of a convolution with two channels a group takes
# more than thirty times what nine batched products of matrices take, and more than thirty times what the gradient of the
# dense convolution of the same images takes, which multiplies 96 times as much.
# Expected: no slower than what a user writes by hand, as on a GPU. The first half is known as jax-ml/jax issue 23713.
# Seen: jax and jaxlib 0.12.0.1, Python 3.12, x86-64.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SIZE, CHANNELS = 28, 192
NUMBERS = ("NHWC", "HWIO", "NHWC")


def convolution(x, kernel):
    groups = x.shape[-1] // kernel.shape[2]
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NUMBERS, feature_group_count=groups)


def shifts(x):
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [padded[:, i : i + SIZE, j : j + SIZE] for i in range(3) for j in range(3)]


def by_hand(x, kernel):
    return sum(image * element for image, element in zip(shifts(x), kernel.reshape(9, -1)))


def in_the_kernel(x, kernel, g):
    return jax.vjp(lambda k: convolution(x, k), kernel)[1](g)[0]


def in_the_kernel_by_hand(x, kernel, g):
    groups = x.shape[-1] // kernel.shape[2]
    g = g.reshape(-1, groups, kernel.shape[2])
    parts = [jnp.einsum("pgc,pgm->cgm", image.reshape(g.shape), g) for image in shifts(x)]
    return jnp.stack(parts).reshape(kernel.shape)


def seconds(name, fn, *args):
    run = jax.jit(fn)
    result = np.asarray(run(*args))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run(*args).block_until_ready()
        times.append(time.perf_counter() - start)
    print(f"{name}: {min(times) * 1e3:.2f} ms")
    return min(times), result


def kernel_of(channels):
    return jax.random.normal(jax.random.key(1), (3, 3, channels, CHANNELS))


x = jax.random.normal(jax.random.key(0), (1, SIZE, SIZE, CHANNELS))
own, a = seconds("depthwise", convolution, x, kernel_of(1))
hand, b = seconds("the same, shifted images", by_hand, x, kernel_of(1))
np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
of_groups, a = seconds("gradient in a kernel of two channels a group", in_the_kernel, x, kernel_of(2), x)
products, b = seconds("the same, batched products", in_the_kernel_by_hand, x, kernel_of(2), x)
np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2)
dense, _ = seconds("gradient in a kernel without groups", in_the_kernel, x, kernel_of(CHANNELS), x)
assert own > 5 * hand, "a depthwise convolution is fast now"
assert of_groups > 30 * max(products, dense), "the gradient of a grouped kernel is fast now"
PY
