"""Networks and transforms for the tests of files."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from jaxcomp.core import Tiles
from jaxcomp.quantization.level_grids import E2M1, E4M3


def params(inputs: int = 128, outputs: int = 24) -> dict:
    """A matrix and a vector, of wide and of small values, one block of zeros among them."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(inputs, outputs)) * np.exp2(rng.integers(-6, 2, (1, outputs)))
    kernel[:64, 3] = 0
    kernel[5, 0] = -kernel[:, 0].max()  # an extreme code
    return {"a": {"mlp": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(rng.normal(size=outputs))}}}


TRANSFORMS = {
    "int4 in groups": jc.quantize(jc.Int(4), per=jc.Groups(32)),
    "int4 asymmetric": jc.quantize(jc.Int(4, symmetric=False), per=jc.Groups(32)),
    "int3": jc.quantize(jc.Int(3), per=jc.Groups(64)),
    "int5 asymmetric": jc.quantize(jc.Int(5, symmetric=False), per=jc.Channels()),
    "int2 narrow": jc.quantize(jc.Int(2, narrow=True), per=jc.Channels()),
    "int8": jc.quantize(jc.Int(8), per=jc.Channels()),
    "int8 of one scale": jc.quantize(jc.Int(8), per=jc.Tensor()),
    "int8 asymmetric of one scale": jc.quantize(jc.Int(8, symmetric=False), per=jc.Tensor()),
    "int6 in tiles": jc.quantize(jc.Int(6), per=Tiles((32, 8))),
    "float8": jc.quantize(E4M3, per=jc.Channels()),
    "float8 of one scale": jc.quantize(E4M3, per=jc.Tensor()),
    "float8 in groups": jc.quantize(E4M3, per=jc.Groups(32)),
    "float8 in tiles": jc.quantize(E4M3, per=Tiles((32, 8))),
    "nvfp4": jc.recipes.nvfp4(),
    "mxfp4": jc.recipes.mx(E2M1),
    "mxfp8": jc.recipes.mx(E4M3),
    "int4 masked": jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4), per=jc.Groups(32))),
    "int4 asymmetric, masked": jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4, symmetric=False), per=jc.Groups(32))),
}
