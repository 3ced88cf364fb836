"""How an array is decomposed, and what its rank must meet, said in frozen values."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

from jaxcomp.core.specs import Spec, is_integer


def _check_count(owner: str, name: str, value: object, least: int) -> None:
    if not is_integer(value) or value < least:
        raise ValueError(f"{owner}: {name} must be an integer of at least {least}, got {value!r}.")


def _check_axes(owner: str, name: str, value: object, least: int) -> None:
    if value is not None:
        _check_count(owner, name, value, least)


def _is_fraction(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < float(value) <= 1


@dataclass(frozen=True)
class SVD(Spec):
    """The nearest matrix of a rank, ``W ≈ u @ v``: the truncated singular value decomposition.

    Args:
      cols: how many of the last axes are the matrix's columns; all others are its rows. The default is what the axes'
        roles say: the last run of axes that a product sums over, or the last that it keeps. Of a Flax kernel these are
        the output features, of an Equinox or torch weight the inputs (and taps).
      stacked: how many axes in front hold layers that a scan has stacked, or experts; each slice is decomposed by
        itself. The default is what the roles say.

    Raises:
      ValueError: cols below 1, or stacked below 0.

    Source: Eckart and Young 1936, doi:10.1007/BF02288367; of networks, Denton et al. 2014, arXiv:1404.0736.
    """

    cols: int | None = None
    stacked: int | None = None

    def __post_init__(self) -> None:
        _check_axes("SVD", "cols", self.cols, 1)
        _check_axes("SVD", "stacked", self.stacked, 0)


@dataclass(frozen=True)
class RankOne(Spec):
    """The iterative rank-one decomposition of a matrix: find the residual's dominant term, take it away, refit all.

    Power iteration finds a term ``x yᵀ`` of the residual; after each term, ``refits`` sweeps of least squares adjust
    every term found so far. With exact terms this is the truncated SVD.

    Args:
      cols, stacked: as for :class:`SVD`.
      steps: power iterations for each term at most; they stop where nothing moves any more.
      refits: sweeps of alternating least squares after each term.

    Raises:
      ValueError: a count out of range.
    """

    cols: int | None = None
    stacked: int | None = None
    steps: int = 1000
    refits: int = 2

    def __post_init__(self) -> None:
        _check_axes("RankOne", "cols", self.cols, 1)
        _check_axes("RankOne", "stacked", self.stacked, 0)
        _check_count("RankOne", "steps", self.steps, 1)
        _check_count("RankOne", "refits", self.refits, 0)


@dataclass(frozen=True)
class Tucker2(Spec):
    """A kernel of shape ``(*spatial, I, O)`` with both feature axes reduced: ``W[s] ≈ u @ core[s] @ v``.

    Args:
      sweeps: of orthogonal iteration (HOOI) after the first guess (HOSVD).
      stacked: as for :class:`SVD`.

    Raises:
      ValueError: a count out of range.

    Source: Kim et al. 2015, arXiv:1511.06530; De Lathauwer et al. 2000, doi:10.1137/S0895479898346995.
    """

    sweeps: int = 5
    stacked: int | None = None

    def __post_init__(self) -> None:
        _check_count("Tucker2", "sweeps", self.sweeps, 0)
        _check_axes("Tucker2", "stacked", self.stacked, 0)


@dataclass(frozen=True)
class CP(Spec):
    """A kernel ``(*spatial, I, O)`` as a sum of outer products: ``W[s, i, o] ≈ Σ_r taps[s, r] u[i, r] v[r, o]``.

    The terms are found one by one as in :class:`RankOne`, which with ``refits`` is the iterative rank-one decomposition
    of a kernel; then all of them are fitted together.

    Args:
      separable: split the taps of a 2-D kernel too, ``taps[h, w, r] == rows[h, r] cols[w, r]``.
      steps: power iterations for each term.
      refits: sweeps of alternating least squares after each term.
      sweeps: of alternating least squares at the end.
      stacked: as for :class:`SVD`.

    Raises:
      ValueError: a count out of range.

    Source: Lebedev et al. 2014, arXiv:1412.6553; alternating least squares as in Kolda and Bader 2009,
    doi:10.1137/07070111X, section 3.4.
    """

    separable: bool = False
    steps: int = 20
    refits: int = 1
    sweeps: int = 20
    stacked: int | None = None

    def __post_init__(self) -> None:
        _check_count("CP", "steps", self.steps, 1)
        _check_count("CP", "refits", self.refits, 0)
        _check_count("CP", "sweeps", self.sweeps, 0)
        _check_axes("CP", "stacked", self.stacked, 0)


Method = SVD | RankOne | Tucker2 | CP


@dataclass(frozen=True)
class Energy(Spec):
    """The smallest rank of each leaf that keeps this fraction of its squared norm.

    A leaf that would not get smaller at that rank stays dense.

    Raises:
      ValueError: a fraction outside (0, 1].

    >>> Energy(1.5)
    Traceback (most recent call last):
    ...
    ValueError: Energy: the fraction must be a number in (0, 1], got 1.5.
    """

    fraction: float

    def __post_init__(self) -> None:
        if not _is_fraction(self.fraction):
            raise ValueError(f"Energy: the fraction must be a number in (0, 1], got {self.fraction!r}.")


@dataclass(frozen=True)
class Budget(Spec):
    """Ranks of all selected leaves together: each next rank goes where it lowers the error most for what it costs.

    The error of a leaf is the part of its squared norm that is lost. Exactly one field is given.

    Args:
      params: the fraction of the selected leaves' parameters that may remain.
      macs: the fraction of their multiply-accumulates that may remain.
      error: the mean over leaves of the part of the squared norm that may be lost.

    Raises:
      ValueError: not exactly one field, or a fraction outside (0, 1].
    """

    params: float | None = None
    macs: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.params, self.macs, self.error) if v is not None]
        if len(given) != 1 or not _is_fraction(given[0]):
            raise ValueError(
                f"Budget: wants exactly one of params, macs and error, as a number in (0, 1], got {self!r}."
            )
