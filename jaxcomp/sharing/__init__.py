"""Weight sharing: leaves whose elements are entries of a small table that k-means finds."""

from jaxcomp.sharing.leaves import Codebook, VectorCodebook, trained_tables, with_tables
from jaxcomp.sharing.transform import share
from jaxcomp.sharing.vectors import share_vectors

__all__ = [
    "Codebook",
    "VectorCodebook",
    "share",
    "share_vectors",
    "trained_tables",
    "with_tables",
]
