"""Functional compression for JAX: pruning masks and quantizers as pure transforms of parameter pytrees.

>>> import jax.numpy as jnp
>>> import jaxcomp as jc
>>> params = {"kernel": jnp.arange(8.0).reshape(4, 2), "bias": jnp.zeros(2)}
>>> compress = jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4)))
>>> state = compress.init(params)
>>> int((jc.materialize(compress.apply(state, params))["kernel"] == 0).sum())
4
"""

from importlib import import_module
from typing import TYPE_CHECKING

from jaxcomp import (
    activations,
    adapters,
    artifact,
    core,
    factorization,
    kernels,
    pruning,
    quantization,
    sharing,
    structure,
    trace,
)
from jaxcomp.activations import Act, coverage, quantize_function
from jaxcomp.artifact import load, save
from jaxcomp.core import (
    Channels,
    Global,
    Groups,
    Tensor,
    Transform,
    by_path,
    chain,
    every,
    gate,
    materialize,
    nbytes,
    once,
    pack,
    wrap_optax,
)
from jaxcomp.factorization import factorize, low_rank
from jaxcomp.kernels import prepare
from jaxcomp.pruning import NM, Filters, cubic, prune
from jaxcomp.quantization import Float, Int, Log, quantize
from jaxcomp.sharing import share
from jaxcomp.structure import channel_groups, plan, shrink
from jaxcomp.trace import calibrate, cost, fold_batch_norm, roles, sites

if TYPE_CHECKING:
    from jaxcomp.report import summary

__version__ = "0.1.0"

__all__ = [
    "NM",
    "Act",
    "Channels",
    "Filters",
    "Float",
    "Global",
    "Groups",
    "Int",
    "Log",
    "Tensor",
    "Transform",
    "by_path",
    "calibrate",
    "chain",
    "channel_groups",
    "cost",
    "coverage",
    "cubic",
    "every",
    "factorize",
    "fold_batch_norm",
    "gate",
    "load",
    "low_rank",
    "materialize",
    "nbytes",
    "once",
    "pack",
    "plan",
    "prepare",
    "prune",
    "quantize",
    "quantize_function",
    "roles",
    "save",
    "share",
    "shrink",
    "sites",
    "summary",
    "wrap_optax",
]

_LATER = (
    "distill",
    "export",
    "federated",
    "ptq",
    "recipes",
    "report",
    "scale",
    "search",
)  # rooms that nothing here stands on: imported when they are first named


def __getattr__(name: str) -> object:
    if name in _LATER:
        return import_module(f"jaxcomp.{name}")
    if name == "summary":
        return import_module("jaxcomp.report").summary
    raise AttributeError(f"module 'jaxcomp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, *__all__})
