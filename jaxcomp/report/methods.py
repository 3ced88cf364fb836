"""What a leaf is, in a few words."""

from __future__ import annotations

import re

from jaxcomp.core.leaves import Masked, is_compressed
from jaxcomp.core.types import Leaf


def method_of(leaf: Leaf) -> str:
    """What a leaf is: its type; of a compressed one its grid, its rank, or its class, from the outside in.

    >>> import jax.numpy as jnp, jaxcomp as jc
    >>> chain = jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4)))
    >>> w = {"kernel": jnp.eye(4)}
    >>> method_of(w["kernel"]), method_of(chain.apply(chain.init(w), w)["kernel"])
    ('float32', 'masked Int(4)')
    """
    if not is_compressed(leaf):
        return str(leaf.dtype)
    if isinstance(leaf, Masked):
        return f"masked {method_of(leaf.values)}"
    if hasattr(leaf, "grid"):
        text = repr(leaf.grid).replace(", symmetric=True", "").replace(", narrow=False", "")
        return re.sub(r"\bbits=", "", text)
    if hasattr(leaf, "rows"):
        return method_of(leaf.rows)
    if hasattr(leaf, "rank"):
        inner = sorted({method_of(x) for x in leaf.factors})
        return f"{type(leaf).__name__} of rank {leaf.rank}, {' and '.join(inner)}"
    if hasattr(leaf, "entries"):
        return f"{type(leaf).__name__} of {leaf.entries} entries"
    return type(leaf).__name__
