"""Distillation: a student that learns from a teacher, by its results and by what goes on inside both."""

from jaxcomp.distill.losses import attention_transfer, hint, similarity, soft_targets

__all__ = ["attention_transfer", "hint", "similarity", "soft_targets"]
