"""Structured pruning: channel groups read off the program, plans over them, and networks that really shrink.

>>> import jax, jax.numpy as jnp
>>> def mlp(p, x):
...     return jax.nn.relu(x @ p["up"]) @ p["down"]
>>> params = {"up": jnp.array([[3.0, 0.1, 2.0, 0.2]]), "down": jnp.ones((4, 1))}
>>> x = jnp.ones((2, 1))
>>> groups = channel_groups(mlp)(params, x)
>>> half = plan(groups, params, sparsity=0.5)
>>> half.widths
{'down': (2, 1), 'up': (1, 2)}
>>> small = half.take(params)
>>> float(shrink(mlp, half)(small, x)[0, 0]), check_shrink(mlp, half, params, x)
(5.0, 0.0)
"""

from jaxcomp.structure.branches import Branch, drop_branches, residual_branches, without_branches
from jaxcomp.structure.choosing import plan
from jaxcomp.structure.groups import Group, Groups, Slice, channel_groups
from jaxcomp.structure.iterative import Pruned, composed, fraction_per_round, prune_in_rounds
from jaxcomp.structure.plans import Plan, mask
from jaxcomp.structure.regularize import group_lasso, group_penalty, growing_strengths, unit_norms
from jaxcomp.structure.scores import batch_norm_scale, fpgm, group_fisher, l1, l2, unit_score
from jaxcomp.structure.shrinking import check_shrink, shrink
from jaxcomp.structure.timing import measured_seconds

__all__ = [
    "Branch",
    "Group",
    "Groups",
    "Plan",
    "Pruned",
    "Slice",
    "batch_norm_scale",
    "channel_groups",
    "check_shrink",
    "composed",
    "drop_branches",
    "fpgm",
    "fraction_per_round",
    "group_fisher",
    "group_lasso",
    "group_penalty",
    "growing_strengths",
    "l1",
    "l2",
    "mask",
    "measured_seconds",
    "plan",
    "prune_in_rounds",
    "residual_branches",
    "shrink",
    "unit_norms",
    "unit_score",
    "without_branches",
]
