"""What is worth compressing how much: it measures, allocates under budgets, and decides."""

from jaxcomp.search.eigenvalues import eigenvalues
from jaxcomp.search.estimates import Curvature, Estimate
from jaxcomp.search.hessian import traces
from jaxcomp.search.options import Option, Table, Unit
from jaxcomp.search.products import GaussNewton

__all__ = ["Curvature", "Estimate", "GaussNewton", "Option", "Table", "Unit", "eigenvalues", "traces"]
