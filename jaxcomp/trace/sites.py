"""``sites``: every product of a program, with the parameter behind it, what its axes do, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import NamedTuple

import jax.numpy as jnp

from jaxcomp.core.types import Params, PyTree
from jaxcomp.core.words import shape_words
from jaxcomp.trace.flow import Op
from jaxcomp.trace.primitives import UNREAD
from jaxcomp.trace.products import Product, leaf_roles, product_of
from jaxcomp.trace.program import Program, trace
from jaxcomp.trace.tags import Tag
from jaxcomp.trace.walk import Fn, Location, aval_of


@dataclass(frozen=True)
class Operand:
    """One operand of a site.

    Attributes:
      shape, dtype: as the equation sees it.
      roles: what the site does with each axis, see ``products.Product``.
      leaf: path of the one parameter leaf that it is a view of (or elementwise arithmetic on), else None.
      leaf_shape, leaf_dtype: of that leaf, whole and before casts.
      leaf_roles: what the site does with each of the leaf's own axes; "stacked" where it takes one slice.
      params: the leaves that it is computed from, where it depends on no argument.
      exact: it is that leaf moved or cast, and all of it (or of the stacked slice).
    """

    shape: tuple[int, ...]
    dtype: str
    roles: tuple[str, ...]
    leaf: str | None
    leaf_shape: tuple[int, ...]
    leaf_dtype: str
    leaf_roles: tuple[str, ...]
    params: tuple[str, ...]
    exact: bool

    @property
    def is_weight(self) -> bool:
        """It comes from parameters."""
        return self.leaf is not None or bool(self.params)

    @property
    def bytes(self) -> int:
        """Bytes of one step's operand, in the leaf's type where there is a leaf."""
        return math.prod(self.shape) * jnp.dtype(self.leaf_dtype or self.dtype).itemsize

    def leaf_axes(self, role: str) -> tuple[int, ...]:
        """The leaf's own axes that have ``role``."""
        return tuple(i for i, r in enumerate(self.leaf_roles) if r == role)


@dataclass(frozen=True)
class Site:
    """A dot, a ragged dot, a convolution or an embedding lookup in its place.

    Attributes:
      path: unique; the weight's leaf path (with "#1", "#2", … at its second and later uses), the longest common path
        of several leaves, or, between activations, the enclosing scope with the kind and a count: "attn/dot_0".
      kind: "dot", "ragged" (a mixture of experts: rows, each by the matrix of its group), "conv" or "embed".
      location: of the equation, the key of a claim.
      operands: both factors; of a lookup, the table alone.
      weight: which operand is the weight (the second if both are); None between activations.
      out_shape, out_dtype: of one step's result.
      macs: multiply-accumulates of one run of the function, all scan steps together.
      steps: how often a run of the function comes here, on all devices of a ``shard_map`` together; a ``while`` of
        unknown length counts once.
      layer_steps: lengths of the scans over stacked parameters around it.
      groups: feature groups of a convolution.
      scope: the enclosing names.
      inside: the primitives around it.
    """

    path: str
    kind: str
    location: Location
    operands: tuple[Operand, ...]
    weight: int | None
    out_shape: tuple[int, ...]
    out_dtype: str
    macs: int
    steps: int
    layer_steps: tuple[int, ...]
    groups: int
    scope: str
    inside: tuple[str, ...]

    def __repr__(self) -> str:
        """One line: where, what, its weight's axes, its work."""
        weight = None if self.weight is None else self.operands[self.weight]
        parts = [f"{self.kind} {self.path}"]
        if weight is not None:
            parts.append(f"weight {shape_words(weight.shape)} ({', '.join(weight.leaf_roles or ())})")
        parts.append(f"out {shape_words(self.out_shape)} {self.out_dtype}")
        times = f", {self.steps} times" if self.steps != 1 else ""
        return f"<{', '.join(parts)}, {self.macs:,} MACs{times}>"

    @property
    def leaf(self) -> str | None:
        """Path of the weight's leaf, the same at each use of a shared leaf."""
        return None if self.weight is None else self.operands[self.weight].leaf

    @property
    def activations(self) -> tuple[int, ...]:
        """Which operands depend on arguments."""
        return tuple(i for i, operand in enumerate(self.operands) if not operand.is_weight)

    @property
    def param_bytes(self) -> int:
        """Bytes of the weight that is stored for this site, all layers together."""
        return 0 if self.weight is None else self.operands[self.weight].bytes * math.prod(self.layer_steps)

    @property
    def in_bytes(self) -> int:
        """Bytes of activations read, all steps together."""
        return self.steps * sum(self.operands[i].bytes for i in self.activations)

    @property
    def out_bytes(self) -> int:
        """Bytes written, all steps together."""
        return self.steps * math.prod(self.out_shape) * jnp.dtype(self.out_dtype).itemsize


class Sites(tuple[Site, ...]):
    """A tuple of sites that prints one a line."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "\n".join(map(repr, self)) or "no sites"


def sites(fn: Fn) -> Callable[..., Sites]:
    """The sites of ``fn(params, *args)``, in the order of the program; an einsum shows as its dots.

    Nothing is computed: leaves may be ``jax.ShapeDtypeStruct``.

    >>> import jax
    >>> p = {"w1": jax.ShapeDtypeStruct((8, 16), "float32"), "w2": jax.ShapeDtypeStruct((4, 16), "float32")}
    >>> x = jax.ShapeDtypeStruct((2, 8), "float32")
    >>> for s in sites(lambda p, x: (x @ p["w1"]) @ p["w2"].T)(p, x):
    ...     print(s.path, s.kind, s.operands[s.weight].leaf_roles, s.macs)
    w1 dot ('contracted', 'output') 256
    w2 dot ('output', 'contracted') 128
    """

    @wraps(fn)
    def found(params: Params, *args: PyTree, **kwargs: PyTree) -> Sites:
        return Sites(sites_of(trace(fn, params, *args, **kwargs)))

    return found


def sites_of(program: Program) -> tuple[Site, ...]:
    """The sites of a traced program."""
    taken: dict[str, int] = {}
    result = []
    for op in program.flow.ops:
        product = product_of(op.eqn)
        if product is not None and _belongs(op, product):
            result.append(_site(op, product, taken))
    return tuple(result)


def runs_on(program: Program, backend: str) -> Callable[[Site], bool]:
    """Whether a site is run on a backend: of what ``lax.platform_dependent`` chooses from, one branch is.

    >>> import jax
    >>> def f(p, x):
    ...     return jax.lax.platform_dependent(x, p["w"], cpu=lambda x, w: x @ w, default=lambda x, w: x @ (w + 1))
    >>> program = trace(f, {"w": jax.numpy.ones((4, 4))}, jax.numpy.ones((2, 4)))
    >>> [list(map(runs_on(program, backend), sites_of(program))) for backend in ("cpu", "tpu")]
    [[True, False], [False, True]]
    """
    chosen, own = {}, {"gpu": {"gpu", "cuda", "rocm"}}.get(backend, {backend})
    for op in program.flow.ops:
        platforms = op.eqn.params.get("branches_platforms") if op.name == "cond" else None
        if platforms is not None:
            named = [i for i, each in enumerate(platforms) if not own.isdisjoint(each or ())]
            chosen[op.location] = named[0] if named else len(platforms) - 1

    def here(site: Site) -> bool:
        at = site.location
        return all(at[:i] not in chosen or part == f"branch{chosen[at[:i]]}" for i, part in enumerate(at))

    return here


class Unread(NamedTuple):
    """An equation that is no site and may multiply: its ``path`` (a leaf's, or its scope), its primitive, and why."""

    path: str
    primitive: str
    why: str


def unread(program: Program) -> tuple[Unread, ...]:
    """What multiplies or looks up parameters, or may, and is no site: no rule reads it, or nothing can look into it."""
    found = []
    for op in program.flow.ops:
        if op.opaque:
            found.append(Unread(op.scope, op.name, UNREAD.get(op.name, "nothing can look into it")))
        elif op.name == "gather" and product_of(op.eqn) is None and op.tags[0].is_weight:
            found.append(Unread(common_path(tuple(sorted(op.tags[0].params))), op.name, "it takes no whole rows"))
    return tuple(found)


def _belongs(op: Op, product: Product) -> bool:
    """Whether the equation is a site: any product, and lookups in parameters."""
    return product.kind != "embed" or op.tags[0].is_weight or op.tags[0].origin is not None


def _site(op: Op, product: Product, taken: dict[str, int]) -> Site:
    operands = tuple(_operand(op, i, roles) for i, roles in enumerate(product.roles))
    weights = [i for i, operand in enumerate(operands) if operand.is_weight]
    weight = weights[-1] if weights else None
    out = aval_of(op.eqn.outvars[0])
    return Site(
        path=_unique(op, product, None if weight is None else operands[weight], taken),
        kind=product.kind,
        location=op.location,
        operands=operands,
        weight=weight,
        out_shape=tuple(out.shape),
        out_dtype=str(out.dtype),
        macs=product.macs * op.steps,
        steps=op.steps,
        layer_steps=op.layer_steps,
        groups=product.groups,
        scope=op.scope,
        inside=op.inside,
    )


def _operand(op: Op, index: int, roles: tuple[str, ...]) -> Operand:
    tag: Tag = op.tags[index]
    aval = aval_of(op.eqn.invars[index])
    origin = tag.origin
    return Operand(
        shape=tuple(aval.shape),
        dtype=str(aval.dtype),
        roles=roles,
        leaf=origin.path if origin else None,
        leaf_shape=origin.shape if origin else (),
        leaf_dtype=origin.dtype if origin else "",
        leaf_roles=leaf_roles(origin, roles) if origin else (),
        params=tuple(sorted(tag.params)),
        exact=origin is not None and origin.exact and origin.whole,
    )


def _unique(op: Op, product: Product, weight: Operand | None, taken: dict[str, int]) -> str:
    """A path that no earlier site has; counts uses of a leaf, and products of activations in their scope."""
    if weight is None:
        base = f"{op.scope}/{product.kind}" if op.scope else product.kind
        count = taken[base] = taken.get(base, -1) + 1
        return f"{base}_{count}"
    base = weight.leaf or common_path(weight.params)
    count = taken[base] = taken.get(base, -1) + 1
    return f"{base}#{count}" if count else base


def common_path(paths: tuple[str, ...]) -> str:
    """The path that all these begin with, or all of them."""
    if len(paths) == 1:
        return paths[0]
    shared = []
    for names in zip(*(path.split("/") for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return "/".join(shared) or "+".join(paths)
