"""Post-training compression: parameters to parameters, given what enters the layers, without labels."""

from jaxcomp.ptq.reconstruction import (
    Block,
    BlockError,
    Blocks,
    FewRows,
    Layers,
    Reconstructed,
    Refitted,
    Scopes,
    Single,
    SiteError,
    Training,
    cut,
    lasso,
    reconstruct,
    refit,
    removal_error,
    sampled_loss,
)
from jaxcomp.ptq.second_order import gptq, sparsegpt
from jaxcomp.ptq.sequential import sequentially

__all__ = [
    "Block",
    "BlockError",
    "Blocks",
    "FewRows",
    "Layers",
    "Reconstructed",
    "Refitted",
    "Scopes",
    "Single",
    "SiteError",
    "Training",
    "cut",
    "gptq",
    "lasso",
    "reconstruct",
    "refit",
    "removal_error",
    "sampled_loss",
    "sequentially",
    "sparsegpt",
]
