"""Blocks of a network, compressed so that each gives what the float network's block gives, without labels."""

from jaxcomp.ptq.reconstruction.blockwise import BlockError
from jaxcomp.ptq.reconstruction.cuts import Block, Blocks, Layers, Scopes, Single, cut
from jaxcomp.ptq.reconstruction.learning import Training
from jaxcomp.ptq.reconstruction.reconstruct import Reconstructed, reconstruct, sampled_loss

__all__ = [
    "Block",
    "BlockError",
    "Blocks",
    "Layers",
    "Reconstructed",
    "Scopes",
    "Single",
    "Training",
    "cut",
    "reconstruct",
    "sampled_loss",
]
