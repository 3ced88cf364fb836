"""Post-training compression: parameters to parameters, given what enters the layers, without labels."""

from jaxcomp.ptq.second_order import gptq, sparsegpt

__all__ = ["gptq", "sparsegpt"]
