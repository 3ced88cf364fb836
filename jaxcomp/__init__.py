"""Functional compression for JAX: pruning masks and quantizers as pure transforms of parameter pytrees.

>>> import jax.numpy as jnp
>>> import jaxcomp as jc
>>> params = {"kernel": jnp.arange(8.0).reshape(4, 2), "bias": jnp.zeros(2)}
>>> compress = jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4)))
>>> state = compress.init(params)
>>> int((jc.materialize(compress.apply(state, params))["kernel"] == 0).sum())
4
"""

from jaxcomp.activations import Act, Backward, Dynamic, Float8, Static, coverage, quantize_function, ranges_of
from jaxcomp.artifact.files import load, save
from jaxcomp.codebooks import Codebook
from jaxcomp.factors import LowRank
from jaxcomp.grids import MX, NF4, NVFP4, APoT, Float, PoT
from jaxcomp.learned import Learned, learned
from jaxcomp.leaves import Masked, Packed, Quantized, Switch, materialize, nbytes, pack
from jaxcomp.low_rank import factorize, low_rank
from jaxcomp.masks.scores import Score, fisher, magnitude, movement, random_score, sensitivity, taylor, wanda
from jaxcomp.paths import everything, matrices
from jaxcomp.prune import prune
from jaxcomp.quantize import quantize
from jaxcomp.regrow import regrow, rigl, sparse_evolution
from jaxcomp.schedules import cubic, polynomial
from jaxcomp.share import deep_compression, share
from jaxcomp.slots import weight_mask
from jaxcomp.specs import LOG, Companded, Compander, Int, Log
from jaxcomp.structure import channel_groups, shrink
from jaxcomp.structures import ERK, NM, Block, Element, Filters, Global, Local
from jaxcomp.trace import calibrate, cost, fold_batch_norm, sites
from jaxcomp.transform import Transform, by_path, chain, every, gate, identity, once, wrap_optax

__all__ = [
    "ERK",
    "LOG",
    "MX",
    "NF4",
    "NM",
    "NVFP4",
    "APoT",
    "Act",
    "Backward",
    "Block",
    "Codebook",
    "Companded",
    "Compander",
    "Dynamic",
    "Element",
    "Filters",
    "Float",
    "Float8",
    "Global",
    "Int",
    "Learned",
    "Local",
    "Log",
    "LowRank",
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
    "deep_compression",
    "every",
    "everything",
    "factorize",
    "fisher",
    "fold_batch_norm",
    "gate",
    "identity",
    "learned",
    "load",
    "low_rank",
    "magnitude",
    "materialize",
    "matrices",
    "movement",
    "nbytes",
    "once",
    "pack",
    "polynomial",
    "prune",
    "quantize",
    "quantize_function",
    "random_score",
    "ranges_of",
    "regrow",
    "rigl",
    "save",
    "sensitivity",
    "share",
    "shrink",
    "sites",
    "sparse_evolution",
    "taylor",
    "wanda",
    "weight_mask",
    "wrap_optax",
]
