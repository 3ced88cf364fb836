"""Menus: what each leaf may become, and what each of these takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxcomp.artifact.coding import Coding
from jaxcomp.artifact.files import file_size
from jaxcomp.core.layouts import Channels, Layout
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import (
    Where,
    describe,
    first_matches,
    is_float_array,
    leaves_with_paths,
    matches,
    meant,
    some_paths,
)
from jaxcomp.core.roles import Roles
from jaxcomp.core.transform import Transform, chain, identity
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.core.wrappers import Masked
from jaxcomp.factorization.leaves import FactorLeaf
from jaxcomp.pruning.transform import prune
from jaxcomp.quantization.grids import Int
from jaxcomp.quantization.leaves import Quantized
from jaxcomp.quantization.scales import MSE, ScaleRule
from jaxcomp.quantization.transform import quantize
from jaxcomp.search.options import Option, Table, Unit
from jaxcomp.trace.cost import Device, SiteCost, site_cost
from jaxcomp.trace.roles import roles
from jaxcomp.trace.sites import Site, sites
from jaxcomp.trace.walk import Fn

Made = Callable[[Roles], Transform]
"""A transform, made for what the program does with the axes of the leaves that it is for."""
Menu = Mapping[str, Made | Transform]
"""What a leaf may become, by label."""

AS_IT_IS = "as it is"
"""The label of the option that leaves a unit."""
REST = "everything else"
"""The unit of all that nothing is decided on; it has its bytes, the file's header among them."""


def menu(
    *,
    bits: Iterable[int] = (8, 6, 4, 3, 2),
    sparsities: Iterable[float] = (0.0, 0.5, 0.75, 0.9, 0.95),
    per: Layout = Channels(),  # noqa: B008 - frozen
) -> dict[str, Made | Transform]:
    """Widths crossed with sparsities, and the leaf as it is.

    Args:
      bits: of integers, a scale for each index that products do not sum over.
      sparsities: fractions of each leaf that are zero, those of the least magnitude.
      per: what shares a scale.

    Raises:
      ValueError: no widths or sparsities.

    >>> list(menu(bits=(8, 4), sparsities=(0, 0.5)))
    ['as it is', 'int8', 'int8 50%', 'int4', 'int4 50%']
    """
    bits, sparsities = tuple(bits), tuple(sparsities)
    if not bits or not sparsities:
        raise ValueError(f"menu: wants widths and sparsities, got bits={bits!r} and sparsities={sparsities!r}.")
    found: dict[str, Made | Transform] = {AS_IT_IS: identity()}
    for b in bits:
        for s in sparsities:
            found[f"int{b}" + (f" {100 * s:g}%" if s else "")] = _sparse_integers(b, s, per)
    return found


def rule_of(bits: int) -> ScaleRule | None:
    """How a menu finds the scales of integers: by least squares where they are few, else as ``quantize`` does."""
    return MSE() if 2 <= bits <= 4 else None


def _sparse_integers(bits: int, sparsity: float, per: Layout) -> Made:
    def made(roles: Roles) -> Transform:
        rounded = quantize(Int(bits, narrow=bits == 2), roles=roles, scale=rule_of(bits), per=per)
        return chain(prune(sparsity, roles=roles), rounded) if sparsity else rounded

    return made


@dataclass(frozen=True)
class Terms:
    """How costs are counted.

    Args:
      activations: the width of what enters products; None is its own type's.
      device: of the time of a roofline, if one is wanted.
      coding: of the file.
    """

    activations: int | None = None
    device: Device | None = None
    coding: Coding | None = None


@dataclass(frozen=True)
class Choosing:
    """Units before anything is made of them: which leaves, which options, which products.

    Attributes:
      params: the parameters.
      units: leaves by the unit's name, in the order of the program.
      options: transforms by the unit's name and label.
      sites: products by the leaf's path, those between activations under "".
      terms: how costs are counted.
    """

    params: Params
    units: Mapping[str, tuple[str, ...]]
    options: Mapping[str, Mapping[str, Transform]]
    sites: Mapping[str, tuple[Site, ...]]
    terms: Terms

    def made(self, name: str, label: str) -> dict[str, Leaf]:
        """The leaves of a unit under an option."""
        own, make = self.made_plain(name), self.options[name][label]
        done: dict[str, Leaf] = make.apply(make.init(own), own)
        return done

    def made_plain(self, name: str) -> dict[str, Leaf]:
        """The leaves of a unit as they are."""
        leaves = dict(leaves_with_paths(self.params, is_leaf=is_compressed)[0])
        return {path: leaves[path] for path in self.units[name]}

    def costs(self, made: Mapping[str, Leaf]) -> dict[str, float]:
        """What leaves take: bytes of the file, multiply-accumulates, bit operations, and seconds on the device."""
        size = file_size(dict(made), coding=self.terms.coding) - file_size({}, coding=self.terms.coding)
        found = {"bytes": float(max(size, 0)), "macs": 0.0, "bops": 0.0}
        if self.terms.device is not None:
            found["seconds"] = 0.0
        for path, leaf in made.items():
            for site in self.sites.get(path, ()):
                one = _cost(site, leaf, self.terms)
                found["macs"] += one.macs
                found["bops"] += one.bops
                if self.terms.device is not None:
                    found["seconds"] += one.seconds(self.terms.device)
        return found

    def priced(self, table: Table) -> Table:
        """A table with what each option takes, and with the unit of everything else, for budgets of the whole.

        Args:
          table: of leaves of these parameters, as from :func:`~jaxcomp.search.units.units_of`, losses measured or not.

        Raises:
          ValueError: a unit has a leaf that the parameters do not have.
        """
        leaves = dict(leaves_with_paths(self.params, is_leaf=is_compressed)[0])
        missing = [path for unit in table for path in unit.leaves if path not in leaves]
        if missing:
            raise ValueError(
                f"priced: the parameters have no {some_paths(missing)}, they have {some_paths(leaves)}; make the table"
                " of these parameters, as by units_of(params, options)."
            )

        def costing(unit: Unit, option: Option) -> Option:
            own = {path: leaves[path] for path in unit.leaves}
            return replace(option, costs=self.costs(option.make.apply(option.make.init(own), own)))

        own = replace(self, units={unit.name: unit.leaves for unit in table})
        return Table((*table.map_options(costing), own.rest()), table.what)

    def rest(self) -> Unit:
        """All that nothing is decided on."""
        taken = {path for paths in self.units.values() for path in paths}
        named = leaves_with_paths(self.params, is_leaf=is_compressed)[0]
        others = {path: leaf for path, leaf in named if path not in taken}
        size = file_size(others, coding=self.terms.coding)
        costs = {
            **self.costs({path: leaf for path, leaf in others.items() if path in self.sites}),
            "bytes": float(size),
        }
        return Unit(REST, (), (Option(AS_IT_IS, costs=costs, loss=0.0),))


def choosing(
    fn: Fn,
    params: Params,
    *args: PyTree,
    options: Menu | None = None,
    where: Where | None = None,
    keep: Where | None = None,
    tied: Mapping[str, Where] | None = None,
    terms: Terms | None = None,
) -> Choosing:
    """The units of a program: the leaves that its products multiply, each by itself, or tied ones together.

    Args:
      fn: ``fn(params, *args)``.
      params: the parameters.
      args: the other arguments, or their shapes.
      options: what a leaf may become; :func:`menu` by default.
      where: which leaves are decided on; by default all of two axes or more that a product multiplies.
      keep: of these, which stay as they are.
      tied: leaves that take the same option, by a name for them: an ordered table of rules.
      terms: how costs are counted.

    Raises:
      ValueError: no leaf is left to decide on, or a rule matches nothing.
    """
    by_leaf: dict[str, list[Site]] = {}
    for site in sites(fn)(params, *args):
        by_leaf.setdefault(site.leaf or "", []).append(site)
    known = roles(fn)(params, *args)
    named = dict(leaves_with_paths(params, is_leaf=is_compressed)[0])
    left = _left(named, by_leaf, where=where, keep=keep)
    units = _units(left, named, tied or {})
    wanted = menu() if options is None else options
    made = {
        name: {
            label: make if isinstance(make, Transform) else make(Roles({path: known[path] for path in paths}))
            for label, make in wanted.items()
        }
        for name, paths in units.items()
    }
    return Choosing(params, units, made, {path: tuple(own) for path, own in by_leaf.items()}, terms or Terms())


def _left(
    named: Mapping[str, Leaf], by_leaf: Mapping[str, Sequence[Site]], *, where: Where | None, keep: Where | None
) -> list[str]:
    """The paths that are decided on."""
    floating = [p for p in by_leaf if p in named and not is_compressed(named[p]) and is_float_array(named[p])]
    chosen = [p for p in floating if (named[p].ndim >= 2 if where is None else matches(where, p, named[p]))]
    kept = [p for p in chosen if keep is not None and matches(keep, p, named[p])]
    for rule, paths in ((where, chosen), (keep, kept)):
        if rule is not None and not paths:
            raise ValueError(
                f"compress: rule {describe(rule)} matches no floating array that a product multiplies; these are"
                f" {some_paths(floating)}{meant(rule, floating)}."
            )
    left = [p for p in chosen if p not in kept]
    if not left:
        raise ValueError(f"compress: no leaf is left to decide on; products multiply {some_paths(floating) or 'none'}.")
    return left


def _units(left: Sequence[str], named: Mapping[str, Leaf], tied: Mapping[str, Where]) -> dict[str, tuple[str, ...]]:
    """Tied leaves together, where the first of them stands."""
    names, found = list(tied), dict[str, list[str]]()
    first = first_matches(tied.values(), [(path, named[path]) for path in left], owner="compress")
    for path, group in zip(left, first, strict=True):
        found.setdefault(path if group is None else names[group], []).append(path)
    return {name: tuple(paths) for name, paths in found.items()}


def _cost(site: Site, leaf: Leaf, terms: Terms) -> SiteCost:
    """A site over another leaf: narrower codes, or factors of fewer multiplications."""
    width = _width(leaf)
    one = site_cost(site, (width, terms.activations))
    part = _multiplied(leaf) / max(leaf.size, 1)
    if part == 1 or site.weight is None:
        return one
    operand = site.operands[site.weight]
    size = math.prod(operand.shape) * (width or 8 * leaf.dtype.itemsize) / 8
    moved = one.bytes - (1 - part) * site.steps * size
    return replace(one, macs=round(one.macs * part), bops=round(one.bops * part), bytes=moved)


def _width(leaf: Leaf) -> int | None:
    """Bits of a weight in its product; None where it is multiplied in its own type."""
    inner = leaf.values if isinstance(leaf, Masked) else leaf
    if isinstance(inner, FactorLeaf):
        widths = [_width(factor) for factor in inner.factors]
        return None if None in widths else max(w for w in widths if w is not None)
    return inner.grid.bits if isinstance(inner, Quantized) else None


def _multiplied(leaf: Leaf) -> int:
    """How many parameters a product multiplies."""
    inner = leaf.values if isinstance(leaf, Masked) else leaf
    return sum(int(f.size) for f in inner.factors) if isinstance(inner, FactorLeaf) else int(inner.size)
