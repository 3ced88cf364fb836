"""Blocks of a network, compressed so that each gives what the float network's block gives, without labels."""

from jaxcomp.ptq.reconstruction.blockwise import BlockError
from jaxcomp.ptq.reconstruction.learning import Training
from jaxcomp.ptq.reconstruction.reconstruct import Reconstructed, reconstruct, sampled_loss
from jaxcomp.ptq.reconstruction.refit import Refitted, SiteError, refit
from jaxcomp.ptq.reconstruction.selection import lasso, removal_error
from jaxcomp.trace.cut_specs import Layers, Scopes, Single
from jaxcomp.trace.cuts import Block, Blocks, cut

__all__ = [
    "Block",
    "BlockError",
    "Blocks",
    "Layers",
    "Reconstructed",
    "Refitted",
    "Scopes",
    "Single",
    "SiteError",
    "Training",
    "cut",
    "lasso",
    "reconstruct",
    "refit",
    "removal_error",
    "sampled_loss",
]
