"""What is worth compressing how much: it measures, allocates under budgets, and decides."""

from jaxcomp.search.ask_tell import Choice, Interval, Search, State, cross_entropy
from jaxcomp.search.eigenvalues import eigenvalues
from jaxcomp.search.estimates import Curvature, Estimate
from jaxcomp.search.hessian import traces
from jaxcomp.search.measures import Measure, change_of, decibels, kl, noise
from jaxcomp.search.options import Option, Table, Unit
from jaxcomp.search.policy import policy_gradient
from jaxcomp.search.products import GaussNewton
from jaxcomp.search.sensitivity import Sensitivity, omega, sensitivity
from jaxcomp.search.units import units_of

__all__ = [
    "Choice",
    "Curvature",
    "Estimate",
    "GaussNewton",
    "Interval",
    "Measure",
    "Option",
    "Search",
    "Sensitivity",
    "State",
    "Table",
    "Unit",
    "change_of",
    "cross_entropy",
    "decibels",
    "eigenvalues",
    "kl",
    "noise",
    "omega",
    "policy_gradient",
    "sensitivity",
    "traces",
    "units_of",
]
