"""What is worth compressing how much: it measures, allocates under budgets, and decides."""

from jaxcomp.search.allocation import Infeasible, allocate, frontier
from jaxcomp.search.ask_tell import Choice, Interval, Search, State, cross_entropy
from jaxcomp.search.budgets import Quality, Smaller
from jaxcomp.search.compressing import compress
from jaxcomp.search.eigenvalues import eigenvalues
from jaxcomp.search.estimates import Curvature, Estimate
from jaxcomp.search.evolution import evolution
from jaxcomp.search.hessian import traces
from jaxcomp.search.measures import Measure, change_of, decibels, kl, noise
from jaxcomp.search.menus import Terms, choosing, menu
from jaxcomp.search.omega import omega
from jaxcomp.search.options import Option, Table, Unit
from jaxcomp.search.plans import Plan
from jaxcomp.search.policy import policy_gradient
from jaxcomp.search.products import GaussNewton
from jaxcomp.search.recovery import Recovery
from jaxcomp.search.results import Compressed
from jaxcomp.search.sensitivity import Sensitivity, sensitivity
from jaxcomp.search.supernet import Narrowed, Supernet, narrow, recalibrated, sandwich, slimmable
from jaxcomp.search.units import units_of

__all__ = [
    "Choice",
    "Compressed",
    "Curvature",
    "Estimate",
    "GaussNewton",
    "Infeasible",
    "Interval",
    "Measure",
    "Narrowed",
    "Option",
    "Plan",
    "Quality",
    "Recovery",
    "Search",
    "Sensitivity",
    "Smaller",
    "State",
    "Supernet",
    "Table",
    "Terms",
    "Unit",
    "allocate",
    "change_of",
    "choosing",
    "compress",
    "cross_entropy",
    "decibels",
    "eigenvalues",
    "evolution",
    "frontier",
    "kl",
    "menu",
    "narrow",
    "noise",
    "omega",
    "policy_gradient",
    "recalibrated",
    "sandwich",
    "sensitivity",
    "slimmable",
    "traces",
    "units_of",
]
