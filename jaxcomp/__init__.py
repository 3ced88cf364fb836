"""Functional compression for JAX: pruning masks and quantizers as pure transforms of parameter pytrees.

>>> import jax.numpy as jnp
>>> import jaxcomp as jc
>>> params = {"kernel": jnp.arange(8.0).reshape(4, 2), "bias": jnp.zeros(2)}
>>> compress = jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4)))
>>> state = compress.init(params)
>>> int((jc.materialize(compress.apply(state, params))["kernel"] == 0).sum())
4
"""

from jaxcomp.activations import Act, Dynamic, Static, coverage, quantize_function, ranges_of
from jaxcomp.artifact.files import load, save
from jaxcomp.grids import MX, NF4, NVFP4, APoT, Float, PoT
from jaxcomp.leaves import Masked, Packed, Quantized, Switch, materialize, nbytes, pack
from jaxcomp.masks.scores import Score, magnitude, sensitivity, taylor
from jaxcomp.paths import everything, matrices
from jaxcomp.prune import cubic, prune
from jaxcomp.quantize import quantize
from jaxcomp.specs import LOG, Companded, Compander, Element, Filters, Global, Int, Local, Log
from jaxcomp.structure import channel_groups, shrink
from jaxcomp.trace import calibrate, cost, fold_batch_norm, sites
from jaxcomp.transform import Transform, by_path, chain, every, gate, identity, once, wrap_optax

__all__ = [
    "LOG",
    "MX",
    "NF4",
    "NVFP4",
    "APoT",
    "Act",
    "Companded",
    "Compander",
    "Dynamic",
    "Element",
    "Filters",
    "Float",
    "Global",
    "Int",
    "Local",
    "Log",
    "Masked",
    "Packed",
    "PoT",
    "Quantized",
    "Score",
    "Static",
    "Switch",
    "Transform",
    "by_path",
    "calibrate",
    "chain",
    "channel_groups",
    "cost",
    "coverage",
    "cubic",
    "every",
    "everything",
    "fold_batch_norm",
    "gate",
    "identity",
    "load",
    "magnitude",
    "materialize",
    "matrices",
    "nbytes",
    "once",
    "pack",
    "prune",
    "quantize",
    "quantize_function",
    "ranges_of",
    "save",
    "sensitivity",
    "shrink",
    "sites",
    "taylor",
    "wrap_optax",
]
