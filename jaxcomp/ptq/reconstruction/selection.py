"""Which units a least-squares fit spares best: scores for ``jaxcomp.structure.plan`` from what enters the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from jaxcomp.core.paths import leaves_with_paths, some_paths
from jaxcomp.core.types import Leaf, Params
from jaxcomp.structure.groups import Group, Groups
from jaxcomp.structure.scores import UnitScore, UnitScores, l2
from jaxcomp.trace.matrices import matrices_of
from jaxcomp.trace.rows import Moments

Matrix = NDArray[np.float64]


class Consumer(NamedTuple):
    """A kernel that sums over a group's units: ``W`` (n, m), ``Σ x xᵀ`` (n, n), and which unit owns each row, or -1."""

    w: Matrix
    second: Matrix
    unit_of: NDArray[np.int64]


def removal_error(moments: Mapping[str, Moments], *, damping: float = 1e-3) -> UnitScore:
    """What is lost by a unit's removal when the units that stay make up for it: the least is removed, and so on.

    A unit ``u`` that is removed from ``y = x W``, with ``H = Σ x xᵀ``, and all others fitted anew, costs
    ``tr(W_uᵀ ([H⁻¹]_uu)⁻¹ W_u)``; then ``W`` and ``H⁻¹`` are those of what is left. A unit's score is the error of all
    removals up to its own, so that the units with the highest scores are those that stay longest. Kernels that sum over
    the same units add. It is what :func:`~jaxcomp.ptq.reconstruction.refit.refit` then does.

    A group that no leaf with moments sums over is scored by ``l2()``.

    Args:
      moments: from ``jaxcomp.trace.row_moments`` of the float network.
      damping: added to the diagonal of ``H``, as a multiple of its mean.

    >>> from jaxcomp.structure import channel_groups
    >>> from jaxcomp.trace import row_moments
    >>> params = {"up": np.float32([[1, 0, 1], [0, 1, 0]]), "down": np.float32([[1], [2], [1]])}
    >>> f, x = lambda p, x: x @ p["up"] @ p["down"], np.float32([[1, 0], [0, 1], [1, 2]])
    >>> scores = removal_error(row_moments(f)(params, x))(channel_groups(f)(params, x), params)
    >>> (scores[0] < 0.1).tolist().count(True)  # the first and the third unit are alike: one may go
    1

    Source: OBC, Frantar & Alistarh 2022, arXiv:2208.11580, section 4, for groups of rows. Deviation:
    all columns of a kernel lose the same rows.
    """

    def score(consumers: list[Consumer], units: int) -> Matrix:
        work = [_Elimination(c, damping) for c in consumers]
        left, total, found = list(range(units)), 0.0, np.zeros(units)
        while left:
            costs = np.sum([w.costs(left) for w in work], axis=0)
            at = int(np.argmin(costs))
            total += max(float(costs[at]), 0.0)
            found[left[at]] = total
            for w in work:
                w.remove(left[at])
            del left[at]
        return found

    return _of_consumers(score, moments)


def lasso(moments: Mapping[str, Moments], *, penalties: int = 100, steps: int = 200) -> UnitScore:
    """The largest penalty at which a unit is still in use, of

        ``argmin_β  ½ Σ |y - Σ_u β_u x_u W_u|² + λ Σ |β_u|``

    over the units ``u`` that a kernel sums over. With ``G_uv = Σ_ij H_ij (W Wᵀ)_ij`` over rows ``i`` of ``u`` and ``j``
    of ``v`` this is ``½ βᵀGβ - βᵀG1 + λ|β|``, solved by accelerated proximal steps down a ladder of penalties. Kernels
    that sum over the same units add. Fit what is left by :func:`~jaxcomp.ptq.reconstruction.refit.refit`.

    A group that no leaf with moments sums over is scored by ``l2()``.

    Args:
      moments: from ``jaxcomp.trace.row_moments`` of the float network.
      penalties: how many are tried, from that which lets nothing in on, each a constant part of the one before.
      steps: at each penalty.

    >>> from jaxcomp.structure import channel_groups
    >>> from jaxcomp.trace import row_moments
    >>> params = {"up": np.float32([[1, 0, 1], [0, 1, 0]]), "down": np.float32([[1], [2], [1]])}
    >>> f, x = lambda p, x: x @ p["up"] @ p["down"], np.float32([[1, 0], [0, 1], [1, 2]])
    >>> scores = lasso(row_moments(f)(params, x))(channel_groups(f)(params, x), params)
    >>> int(scores[0].argmax())  # it gives most of the result
    1

    Source: He et al. 2017, arXiv:1707.06168, equation 2. Deviations: the path of all penalties, by moments, in place of
    one penalty that grows while samples of the activations are solved for; units that enter at the same penalty are
    told apart by their weight there.
    """

    def score(consumers: list[Consumer], units: int) -> Matrix:
        return _entries(np.sum([_gram(c, units) for c in consumers], axis=0), penalties, steps)

    return _of_consumers(score, moments)


def _entries(gram: Matrix, penalties: int, steps: int) -> Matrix:
    """The penalty at which each unit enters, told apart by its weight."""
    target = gram.sum(1)
    top, curvature = np.abs(target).max(), float(np.linalg.eigvalsh(gram)[-1])
    found = np.zeros(len(gram))
    if top <= 0 or curvature <= 0:
        return found
    beta = np.zeros(len(gram))
    ladder = top * np.geomspace(1, 1e-4, penalties)
    for penalty, above in zip(ladder[1:], ladder, strict=False):
        beta = _proximal(gram, target, (penalty, curvature, steps), beta)
        new = (found == 0) & (beta != 0)
        part = np.abs(beta[new]) / (1 + np.abs(beta[new]))  # between 0 and 1
        found[new] = penalty + (above - penalty) * part
    return found


def _proximal(gram: Matrix, target: Matrix, how: tuple[float, float, int], beta: Matrix) -> Matrix:
    """FISTA, Beck & Teboulle 2009, from ``beta`` on."""
    penalty, curvature, steps = how
    ahead, t = beta, 1.0
    for _ in range(steps):
        moved = ahead - (gram @ ahead - target) / curvature
        new = np.sign(moved) * np.maximum(np.abs(moved) - penalty / curvature, 0)
        t, before = (1 + np.sqrt(1 + 4 * t * t)) / 2, t
        ahead = new + (before - 1) / t * (new - beta)
        beta = new
    return beta


def _gram(c: Consumer, units: int) -> Matrix:
    """``G``: the products of what each two units give, summed over rows and outputs."""
    mine = c.unit_of >= 0
    elements = (c.second * (c.w @ c.w.T))[np.ix_(mine, mine)]
    owns = np.zeros((units, int(mine.sum())))
    owns[c.unit_of[mine], np.arange(owns.shape[1])] = 1
    return owns @ elements @ owns.T


class _Elimination:
    """A kernel and the inverse of its rows' moments while units are removed one after another."""

    def __init__(self, c: Consumer, damping: float) -> None:
        n = len(c.second)
        mean = float(np.mean(np.diag(c.second))) or 1.0
        self.inverse = np.asfortranarray(scipy.linalg.inv(c.second + damping * mean * np.eye(n)))
        self.w, self.unit_of = c.w.copy(), c.unit_of
        self.rows = [np.flatnonzero(c.unit_of == u) for u in range(int(c.unit_of.max()) + 1)]

    def costs(self, left: list[int]) -> Matrix:
        """What each of the units that are left costs."""
        rows = np.stack([self.rows[u] for u in left])
        blocks = self.inverse[rows[:, :, None], rows[:, None, :]]
        w = self.w[rows]
        return np.einsum("uim,uim->u", w, np.linalg.solve(blocks, w))

    def remove(self, unit: int) -> None:
        """Takes a unit out; what it gave is made up for by the others."""
        rows = self.rows[unit]
        lever = np.linalg.solve(self.inverse[np.ix_(rows, rows)], self.inverse[rows]).T
        self.w -= lever @ self.w[rows]
        # In place: a removal is a small change of a large matrix.
        self.inverse = scipy.linalg.blas.dgemm(-1.0, lever, self.inverse[rows], 1.0, self.inverse, overwrite_c=1)
        self.w[rows] = 0
        self.inverse[rows] = self.inverse[:, rows] = 0
        self.inverse[rows, rows] = 1


def _of_consumers(score: Callable[[list[Consumer], int], Matrix], moments: Mapping[str, Moments]) -> UnitScore:
    """A score of units by the kernels that sum over them, layer by layer of a stack."""
    plain = l2()

    def scores(groups: Groups, params: Params) -> UnitScores:
        leaves = dict(leaves_with_paths(params)[0])
        if moments and not leaves.keys() & moments.keys():
            raise ValueError(
                f"score: the moments are of {some_paths(moments)}, and the parameters are"
                f" {some_paths(leaves)}; gather them with these parameters by jaxcomp.trace.row_moments(fn)."
            )
        fallback: UnitScores | None = None
        found = []
        for i, group in enumerate(groups):
            layers = [_consumers(group, layer, leaves, moments) for layer in range(group.layers or 1)]
            if not layers[0]:
                fallback = fallback or plain(groups, params)
                found.append(fallback[i])
                continue
            each = np.stack([score(consumers, group.units) for consumers in layers])
            found.append(each if group.layers else each[0])
        return tuple(found)

    return scores


def _consumers(group: Group, layer: int, leaves: Mapping[str, Leaf], moments: Mapping[str, Moments]) -> list[Consumer]:
    """The kernels that sum over a group's units, of one layer."""
    found = []
    for s in group.slices:
        known = moments.get(s.path)
        if known is None or s.axis not in known.summed:
            continue
        w = np.asarray(leaves[s.path], np.float64)
        sizes = [w.shape[i] for i in known.summed]
        at = known.summed.index(s.axis)
        spread = np.asarray(s.unit_of).reshape([-1 if i == at else 1 for i in range(len(sizes))])
        unit_of = np.broadcast_to(spread, sizes).ravel()
        n = len(unit_of)
        second = np.asarray(known.second, np.float64)
        kernels = matrices_of(known, w.ndim).of(w).reshape(*second.shape[:-1], -1)
        if group.layers:
            kernels, second = kernels[layer], second[layer]
        rest = zip(kernels.reshape(-1, *kernels.shape[-2:]), second.reshape(-1, n, n), strict=True)
        found += [Consumer(k, h, unit_of) for k, h in rest]
    return found
