"""Post-training compression: parameters to parameters, given what enters the layers, without labels."""

from jaxcomp.ptq.second_order import gptq, sparsegpt
from jaxcomp.ptq.sequential import sequentially

__all__ = ["gptq", "sequentially", "sparsegpt"]
