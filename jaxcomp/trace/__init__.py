"""Functions to functions: read a program, and run it again under another interpretation.

>>> import jax, jax.numpy as jnp
>>> f = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
>>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
>>> [(s.path, s.macs) for s in sites(f)(params, jnp.ones((5, 3)))]
[('up', 60), ('down', 40)]
"""

from jaxcomp.trace.calibrate import Stats, activation_name, calibrate, calibrate_over, merge, merge_all
from jaxcomp.trace.cost import A100, H100, TPU_V4, TPU_V5E, Cost, Device, cost
from jaxcomp.trace.evaluator import rewrite
from jaxcomp.trace.fold import FoldedFunction, fold_batch_norm
from jaxcomp.trace.interpreter import Claim, Emitted, Monoid
from jaxcomp.trace.moments import input_moments, input_norms
from jaxcomp.trace.program import Program, trace
from jaxcomp.trace.ranges import Range, absmax, averaged, entropy, min_max, mse, percentile
from jaxcomp.trace.roles import roles
from jaxcomp.trace.rolling import Rolled, rolled
from jaxcomp.trace.rows import Moments, row_moments, row_moments_over
from jaxcomp.trace.sites import Operand, Site, sites
from jaxcomp.trace.unrolling import Slices, Unrolled, unrolled

__all__ = [
    "A100",
    "H100",
    "TPU_V4",
    "TPU_V5E",
    "Claim",
    "Cost",
    "Device",
    "Emitted",
    "FoldedFunction",
    "Moments",
    "Monoid",
    "Operand",
    "Program",
    "Range",
    "Rolled",
    "Site",
    "Slices",
    "Stats",
    "Unrolled",
    "absmax",
    "activation_name",
    "averaged",
    "calibrate",
    "calibrate_over",
    "cost",
    "entropy",
    "fold_batch_norm",
    "input_moments",
    "input_norms",
    "merge",
    "merge_all",
    "min_max",
    "mse",
    "percentile",
    "rewrite",
    "roles",
    "rolled",
    "row_moments",
    "row_moments_over",
    "sites",
    "trace",
    "unrolled",
]
