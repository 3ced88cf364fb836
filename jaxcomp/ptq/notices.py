"""What calibration did not see, said once, as a warning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import jax
import numpy as np

from jaxcomp.trace.rows import Moments


class FewRows(UserWarning):
    """Fewer rows were seen than a leaf has inputs, or none; the message says how many were needed."""


def of_rows(owner: str, moments: Mapping[str, Moments]) -> None:
    """Warns of leaves that fewer rows reached than they have inputs, and of layers or experts that none reached.

    Args:
      owner: who asks.
      moments: of the leaves that are solved, by path.
    """
    known = {path: seen for path, seen in moments.items() if not isinstance(seen.count, jax.core.Tracer)}
    few, none = {}, {}
    for path, seen in known.items():
        counts, wanted = np.asarray(seen.count), seen.second.shape[-1]
        reached = counts[counts > 0]
        if reached.size and reached.min() < wanted:
            few[path] = (int(reached.min()), wanted)
        if (counts == 0).any():
            none[path] = np.argwhere(counts == 0).tolist()
    if few:
        path = max(few, key=lambda p: few[p][1] - few[p][0])
        rows, wanted = few[path]
        also = f"; so it is with {len(few)} leaves" if len(few) > 1 else ""
        warnings.warn(
            f"{owner}: {path!r} has {wanted} inputs and was calibrated on {rows} rows, which leave {wanted - rows}"
            f" directions or more to the damping{also}; calibrate on {wanted} rows at least, better on ten times as"
            " many.",
            FewRows,
            stacklevel=2,
        )
    for path, places in none.items():
        named = ", ".join(str(p[0] if len(p) == 1 else tuple(p)) for p in places[:8]) + " ..." * (len(places) > 8)
        which = f"index {named} of" if places[0] else ""
        warnings.warn(
            f"{owner}: no row reached {which} {path!r}: rounded to nearest, or pruned by magnitude, there; calibrate on"
            " more rows, or leave it out by a rule.".replace("  ", " "),
            FewRows,
            stacklevel=2,
        )
