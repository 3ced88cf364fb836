#!/usr/bin/env bash
# jax.export with a symbolic dimension and lax.bitcast_convert_type between widths, as codes in bytes become words of 32
# bits and back: the program is exported, serialized and read again without a word, and cannot be called with any size.
# Expected: the numbers that jit gives, or an error from export, as for what else has no form with such dimensions.
# Seen: jax and jaxlib 0.12.0.1 (0.10.2 too), Python 3.12: "Error refining shapes"; between types of one width it runs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5" "flatbuffers==25.12.19"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

(rows,) = export.symbolic_shape("rows")


def seen(name, fn, shape, dtype):
    run = jax.jit(fn)
    program = export.export(run)(jax.ShapeDtypeStruct((rows, *shape), dtype))
    program = export.deserialize(program.serialize())
    x = jnp.arange(3 * int(np.prod(shape))).astype(dtype).reshape(3, *shape)
    wanted = np.asarray(run(x))
    try:
        same = bool((np.asarray(program.call(x)) == wanted).all())
        print(f"{name}: jit gives {wanted.shape}, the exported program the same: {same}")
        return "runs" if same else "differs"
    except ValueError as error:
        print(f"{name}: jit gives {wanted.shape}, the exported program: {str(error).splitlines()[0]}")
        return str(error).split(".")[0]


wider = seen("bytes to words", lambda x: lax.bitcast_convert_type(x, jnp.uint32), (2, 4), jnp.uint8)
narrower = seen("words to bytes", lambda x: lax.bitcast_convert_type(x, jnp.uint8), (2,), jnp.uint32)
equal = seen("float32 to int32", lambda x: lax.bitcast_convert_type(x, jnp.int32), (2,), jnp.float32)
assert (wider, narrower, equal) == ("Error refining shapes", "Error refining shapes", "runs")
PY
