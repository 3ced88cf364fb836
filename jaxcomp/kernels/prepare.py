"""``prepare``: a compressed tree whose weights lie as the products of a function read them."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax

from jaxcomp.core.leaves import CompressedLeaf, is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.roles import BATCH, CONTRACTED, OUTPUT
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.kernels.leaves import Axes, Laid, prepared
from jaxcomp.kernels.llvm_calls import missing
from jaxcomp.kernels.llvm_panels import refusal_of_codes
from jaxcomp.kernels.panel_leaves import PreparedPanels, prepared_panels
from jaxcomp.kernels.sparse_leaves import prepared_sparse
from jaxcomp.trace.flow import Op
from jaxcomp.trace.primitives import BARRED
from jaxcomp.trace.products import dot_axes
from jaxcomp.trace.program import Program, shapes_of, trace
from jaxcomp.trace.sites import Site, sites_of


def prepare(
    tree: Params, fn: Callable[..., PyTree], *args: PyTree, sparse: float | None = None, **kwargs: PyTree
) -> Params:
    """The tree with each quantized leaf that a product of ``fn(tree, *args)`` multiplies laid out for it.

    What a product sums over lies last, codes in bytes in the order in which kernels read them, a scale for each feature
    and group. ``materialize`` gives the same bits as before, and ``quantize_function(fn, rules)`` runs the leaf as it
    lies: a product whose activations no rule rounds on the packed bytes, without the dense weight. Done once, for one
    function; what is no quantized leaf, or is multiplied by nothing, stays as it is. Kernels of convolutions are laid
    out where llvmlite is installed: those of one group, of integers with one scale a feature, or sparse ones. So are
    such weights of dots that 16 rows of these arguments or more meet, if they lie on a CPU with AVX2: in panels, which
    serve any number of rows.

    Args:
      tree: parameters with compressed leaves, packed or not; leaves that are prepared for this function stay.
      fn: the function that the tree is for, of arrays.
      args, kwargs: its other arguments, or their shapes: arrays, or ``jax.ShapeDtypeStruct``.
      sparse: compressed leaves of which at least this part is zero, 0.8 say, are kept as their other numbers and where
        they lie: products on a CPU then cost what is left. In other programs the weight is made whole for each product.

    Raises:
      ValueError: no leaf of the tree can be laid out; the message says why of each. Or one is prepared for another
        function; the message names the site. Or leaves are to be sparse, and llvmlite, which compiles their products,
        is not installed.

    >>> import jax, jax.numpy as jnp
    >>> import jaxcomp as jc
    >>> f = lambda p, x: x @ p["w"]
    >>> params = jc.quantize(jc.Int(4)).apply((), {"w": jnp.arange(32.0).reshape(8, 4)})
    >>> tree = prepare(params, f, jnp.ones((1, 8)))
    >>> tree["w"].codes.shape, bool((jc.materialize(tree)["w"] == jc.materialize(params)["w"]).all())
    ((4, 4), True)
    """
    if sparse is not None:
        if not 0 < sparse <= 1:
            raise ValueError(f"prepare: sparse must be a part of a leaf, in (0, 1], got {sparse!r}.")
        if why := missing():
            raise ValueError(f"prepare: sparse={sparse} is for products that are compiled here, and {why}.")
    program = trace(fn, shapes_of(tree), *args, **kwargs)
    wanted = wanted_axes(program)
    named, treedef = leaves_with_paths(tree, is_leaf=is_compressed)
    leaves, reasons = [], []
    for path, leaf in named:
        found = _laid(path, leaf, wanted.get(path, []), sparse)
        if isinstance(found, str):
            reasons.append(f"{path!r}: {found}")
        leaves.append(leaf if isinstance(found, str) else found)
    if not any(isinstance(leaf, Laid) for leaf in leaves):
        told = "; ".join(reasons[:_TOLD]) or "it has no compressed leaf"
        raise ValueError(f"prepare: no leaf of this tree can be laid out ({told}); quantize what its dots multiply.")
    return treedef.unflatten(leaves)


ROWS_OF_PANELS = 16
"""A weight that so many rows meet where it is prepared lies in panels, where it can."""
_TOLD = 5


def _laid(path: str, leaf: Leaf, wanted: list[tuple[Site, Axes]], sparse: float | None) -> Leaf | str:
    """A leaf laid out, or as it is where it is no compressed one; or why it cannot be."""
    if isinstance(leaf, Laid):
        check_layout("prepare", path, leaf, wanted)
        return leaf
    if not isinstance(leaf, CompressedLeaf):
        return leaf
    if not wanted:
        return "no dot and no convolution multiplies it as it is"
    site, axes = wanted[0]
    why = ""
    if sparse is not None:
        found = prepared_sparse(leaf, axes, site.path, sparse)
        if not isinstance(found, str):
            return found
        why = f"{found}; "
    if site.kind == "conv":
        packed: Laid | str = on_any_mesh(_kernel)(leaf, axes, site)
    else:
        packed = on_any_mesh(_in_panels)(leaf, axes, site)
        if isinstance(packed, str):
            packed = on_any_mesh(prepared)(leaf, axes, site.path)
    return f"{why}{packed}" if isinstance(packed, str) else packed


def _kernel(leaf: CompressedLeaf, axes: Axes, site: Site) -> PreparedPanels | str:
    """A leaf laid out for a convolution, or why it is not."""
    if why := missing():
        return f"it is the kernel of a convolution, whose code is compiled here, and {why}"
    if site.groups > 1:
        return "it is the kernel of a convolution in groups"
    assert site.weight is not None
    kernel = site.operands[site.weight]
    channels = math.prod(n for n, role in zip(kernel.shape, kernel.roles, strict=True) if role == CONTRACTED)
    return prepared_panels(leaf, axes, site.path, channels)


def _in_panels(leaf: CompressedLeaf, axes: Axes, site: Site) -> PreparedPanels | str:
    """A leaf laid out for a dot of some rows, or why it is not: a few read packed bytes faster."""
    assert site.weight is not None
    weight, rows = site.operands[site.weight], site.operands[1 - site.weight]
    counts = [n for n, role in zip(rows.shape, rows.roles, strict=True) if role == OUTPUT]
    if not all(isinstance(n, int) for n in counts) or math.prod(counts) < ROWS_OF_PANELS:
        return "few rows meet it"
    if BATCH in weight.roles:
        return "panels are for a weight that serves all rows"
    if platforms_of(leaf) != {"cpu"}:
        return "panels are for a CPU, and it lies elsewhere"
    if why := refusal_of_codes():
        return why
    return prepared_panels(leaf, axes, site.path, math.prod(leaf.shape[i] for i in axes[2]))


def platforms_of(leaf: Leaf) -> set[str]:
    """Those of the devices on which the arrays of a leaf lie; of none that lies anywhere, JAX's default."""
    there = [x for x in jax.tree.leaves(leaf) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)]
    return {device.platform for x in there for device in x.devices()} or {jax.default_backend()}


def check_layout(owner: str, path: str, leaf: Laid, wanted: list[tuple[Site, Axes]]) -> None:
    """Raises ValueError where a leaf was prepared for other products than those that a function has for it."""
    if wanted and all(axes != leaf.axes for _, axes in wanted):
        site, axes = wanted[0]
        raise ValueError(
            f"{owner}: {path!r} was prepared for the site {leaf.site!r}, which sums over its axes {leaf.axes[2]} and"
            f" keeps {leaf.axes[1]}, and the site {site.path!r} of this function sums over {axes[2]} and keeps"
            f" {axes[1]}; prepare the tree for this function."
        )


def wanted_axes(program: Program) -> dict[str, list[tuple[Site, Axes]]]:
    """By a leaf's path what multiplies it as it is, moved or cast at most, and how each wants its axes."""
    found: dict[str, list[tuple[Site, Axes]]] = {}
    ops = {op.location: op for op in program.flow.ops}
    for site in sites_of(program):
        axes = site_axes(site, ops[site.location])
        if axes is not None and site.leaf is not None and BARRED.isdisjoint(site.inside):
            found.setdefault(site.leaf, []).append((site, axes))
    return found


def site_axes(site: Site, op: Op) -> Axes | None:
    """How a dot or a convolution wants the axes of its weight's leaf; None where it is none of a leaf and activations.

    Of a kernel, which is the right operand, elements are summed over before channels.
    """
    if site.kind not in ("dot", "conv") or site.weight is None or len(site.activations) != 1:
        return None
    origin = op.tags[site.weight].origin
    if origin is None or not site.operands[site.weight].exact:
        return None
    parts = dot_axes(op.eqn, site.weight) if site.kind == "dot" else _kernel_axes(op, site.weight)
    if parts is None:
        return None
    lead, kept, last = (tuple(a for i in part for a in origin.axes[i]) for part in parts)
    lead = (*origin.stacked, *lead)
    named = [*lead, *kept, *last]
    single = tuple(a for a, n in enumerate(origin.shape) if a not in named)  # axes of one element, on no axis here
    if len(set(named)) != len(named) or any(origin.shape[a] != 1 for a in single):
        return None
    return lead, (*kept, *single), last


def _kernel_axes(op: Op, side: int) -> Axes | None:
    numbers, batches = op.eqn.params["dimension_numbers"], op.eqn.params["batch_group_count"]
    outputs, inputs, *elements = numbers.rhs_spec
    return None if side == 0 or batches != 1 else ((), (outputs,), (*elements, inputs))
