#!/usr/bin/env bash
# jax 0.12.0.1 (0.10.2 too): platform_dependent with a Pallas branch cannot be lowered for several platforms at once.
# Expected: "each branch is lowered for its platforms", as with one platform, where branches of others are left out. Seen:
# every branch that some platform takes is lowered for all of them, so jax.export for ["cpu", "tpu"] raises ValueError
# "Only interpret mode is supported on CPU backend." A primitive with a lowering for each platform does what is expected.
# So the form of a product is chosen by a primitive's rules, not by platform_dependent.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
from jax import export
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import mlir


def double(x_ref, out_ref):
    out_ref[...] = x_ref[...] * 2


plain = lambda x: x * 2
kernel = lambda x: pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)
chosen = jax.jit(lambda x: jax.lax.platform_dependent(x, cpu=plain, tpu=kernel))
by_rule = Primitive("double")
by_rule.def_abstract_eval(lambda x: x)
for platform, f in {"cpu": plain, "tpu": kernel}.items():
    mlir.register_lowering(by_rule, mlir.lower_fun(f, multiple_results=False), platform=platform)


def lowered(f, platforms):
    try:
        return export.export(f, platforms=platforms)(jnp.ones((8, 128))).mlir_module().count("@tpu_custom_call")
    except ValueError as e:
        return str(e)


ours = lowered(jax.jit(by_rule.bind), ["cpu", "tpu"])
alone, both = [lowered(chosen, [name]) for name in ("cpu", "tpu")], lowered(chosen, ["cpu", "tpu"])
print("jax 0.12.0.1, kernels in a program for cpu, for tpu, for both:", *alone, both, "; by a primitive's rules:", ours)
assert alone == [0, 1] and ours == 1
assert both == "Only interpret mode is supported on CPU backend."
PY
