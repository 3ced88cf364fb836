"""Factorization: leaves as products of smaller factors, and how their ranks are chosen."""

from jaxcomp.factorization.leaves import Depthwise, LowRank, Separable, Tucker
from jaxcomp.factorization.specs import CP, SVD, Budget, Energy, RankOne, Tucker2
from jaxcomp.factorization.transform import choose_ranks, factorize, low_rank

__all__ = [
    "CP",
    "SVD",
    "Budget",
    "Depthwise",
    "Energy",
    "LowRank",
    "RankOne",
    "Separable",
    "Tucker",
    "Tucker2",
    "choose_ranks",
    "factorize",
    "low_rank",
]
