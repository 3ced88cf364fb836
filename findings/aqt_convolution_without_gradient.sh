#!/usr/bin/env bash
# aqtp 0.9.0 (jax 0.12.0.1): a quantized convolution has a gradient of 0, in both operands; a quantized dot does not.
# Expected: straight-through gradients, as of its dot_general. Seen: the forward pass is right to a percent, jax.grad gives
# exact zeros, without a word, so that kernels of convolutions do not train.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "aqtp==0.9.0" "jax==0.12.0.1" "jaxlib==0.12.0.1" "flax==0.12.12" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$work/venv/bin/python" -W ignore - <<'PY'
import jax
import jax.numpy as jnp
from aqt.jax.v2 import aqt_conv_general, config

x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
kernel = jax.random.normal(jax.random.key(1), (3, 3, 4, 8))
numbers = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
quantized = aqt_conv_general.make_conv_general_dilated(aqt_conv_general.conv_general_dilated_make(2, 8, 8))


def total(conv):
    return lambda x, kernel: jnp.sum(conv(x, kernel, (1, 1), "SAME", dimension_numbers=numbers) ** 2)


ours, exact = total(quantized)(x, kernel), total(jax.lax.conv_general_dilated)(x, kernel)
largest = [float(jnp.abs(jax.grad(total(quantized), i)(x, kernel)).max()) for i in (0, 1)]
wanted = [float(jnp.abs(jax.grad(total(jax.lax.conv_general_dilated), i)(x, kernel)).max()) for i in (0, 1)]
dot = config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None)
a, b = x.reshape(-1, 16), kernel.reshape(16, -1)
of_dot = float(jnp.abs(jax.grad(lambda b: jnp.sum(dot(a, b, (((1,), (0,)), ((), ()))) ** 2))(b)).max())
print(f"aqtp 0.9.0 convolution: value {float(ours):.0f} of {float(exact):.0f}; largest gradients {largest}, float's {wanted}")
print(f"its dot_general: largest gradient {of_dot:.0f}")
assert abs(float(ours / exact) - 1) < 0.01 and largest == [0, 0] and min(wanted) > 100 and of_dot > 100
PY
