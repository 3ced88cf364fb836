"""Papers, each in a line or two of transforms."""

from __future__ import annotations

from jaxcomp.core.transform import Transform, chain
from jaxcomp.pruning.schedules import Schedule
from jaxcomp.pruning.transform import prune
from jaxcomp.sharing.transform import share


def deep_compression(sparsity: float | Schedule, clusters: int) -> Transform:
    """Prunes, then shares what is left, both while training.

    Source: Han et al. 2015, arXiv:1510.00149; its entropy coding belongs to the file.
    """
    return chain(prune(sparsity), share(clusters))
