"""The sites that were asked to run on integers and do not: a warning, or an error."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import jax

from jaxcomp.activations.planning import OWNER, Planned
from jaxcomp.activations.reasons import UNQUANTIZED, Why
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.types import Params
from jaxcomp.kernels.leaves import Laid
from jaxcomp.kernels.sparse_leaves import PreparedSparse
from jaxcomp.quantization.learned import Learned
from jaxcomp.quantization.leaves import Quantized
from jaxcomp.trace.sites import Site


class Done(NamedTuple):
    """What was done at a site, why no more was done, and by which form."""

    done: str
    why: Why | None
    form: str = ""


Seen = dict[str, Done]
"""What was done at each site, by its path."""

ON_CODES = frozenset({"integer", "float8"})


class NotOnIntegers(UserWarning):
    """Sites that ``integer=True`` asked for run in float; the message names each, the reason and the mend."""


def put(seen: Seen, path: str, done: str, why: Why | None, form: str = "") -> None:
    """Notes what was done at a site."""
    seen[path] = Done(done, why, form)


def unmet(planned: tuple[Planned, ...], seen: Seen, params: Params) -> dict[str, tuple[Site, Why]]:
    """The sites that were asked for and do not run on codes, by path, and why.

    A site is asked for where a rule quantizes its activations, and its weight is quantized or it has none.
    """
    quantized = {path for path, leaf in leaves_with_paths(params, is_leaf=is_compressed)[0] if _is_quantized(leaf)}
    found = {}
    for p in planned:
        done, why, _ = seen.get(p.site.path, Done("exact", p.why))
        if p.asked and _could_be(p.site, quantized) and done not in ON_CODES:
            found[p.site.path] = p.site, why or UNQUANTIZED
    return found


def _is_quantized(leaf: object) -> bool:
    """Whether it holds codes of a grid, or will: under a mask, or in factors, too."""
    coded = Quantized | Laid | Learned
    found = (x for x in jax.tree.leaves(leaf, is_leaf=lambda x: isinstance(x, coded)) if isinstance(x, coded))
    return any(not isinstance(x, PreparedSparse) or x.grid is not None for x in found)


def _could_be(site: Site, quantized: set[str]) -> bool:
    """Whether one would expect the site on integers; a lookup is no product, and products of integers are exact."""
    if site.kind == "embed":
        return False
    if site.weight is None:
        return all("float" in operand.dtype for operand in site.operands)
    paths = {
        path for operand in site.operands for path in (operand.params if operand.leaf is None else (operand.leaf,))
    }
    return not quantized.isdisjoint(paths)


def demand(sites: dict[str, tuple[Site, Why]], told: set[tuple[str, Why]], *, strict: bool) -> None:
    """Raises where there are such sites, or warns of those that ``told`` has not; it learns them.

    Raises:
      ValueError: ``strict``, and there are some.
    """
    lines = {(path, why): _line(site, why) for path, (site, why) in sites.items()}
    if strict and lines:
        raise ValueError(
            "\n  ".join([f"{OWNER}: these sites were asked to run on integers, and cannot:", *lines.values()])
        )
    new = [line for key, line in lines.items() if key not in told]
    told.update(lines)
    if new:
        head = f"{OWNER}: these sites were asked to run on integers, and run in float (strict=True makes it an error):"
        warnings.warn("\n  ".join([head, *new]), NotOnIntegers, stacklevel=3)


def _line(site: Site, why: Why) -> str:
    """A site, what its product does with the weight's axes, the reason, and the mend."""
    roles = () if site.weight is None else site.operands[site.weight].leaf_roles
    axes = f" ({', '.join(roles)})" if roles else ""
    return f"{site.path!r}{axes}: {why.reason}; {why.mend}."
