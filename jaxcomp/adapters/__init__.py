"""Adapters: a frozen, perhaps quantized base, and small factors beside it that learn (LoRA, QLoRA, LoftQ, PiSSA)."""

from jaxcomp.adapters.adapt import adapt
from jaxcomp.adapters.leaves import Adapted
from jaxcomp.adapters.parts import combine, merge, partition, trainable
from jaxcomp.adapters.specs import Principal, Residual, Zeros

__all__ = ["Adapted", "Principal", "Residual", "Zeros", "adapt", "combine", "merge", "partition", "trainable"]
