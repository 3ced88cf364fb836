"""LiteRT (TensorFlow Lite): a float model converted, then quantized as the tree and the rules say, and checked."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxcomp.activations.planning import Planned, Rules, assigned, checked_ranges
from jaxcomp.activations.specs import Act, ActSpec, Dynamic
from jaxcomp.artifact.disk import replacing, write_all
from jaxcomp.core.leaves import is_compressed, materialize, method_of
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.export.errors import ExportError
from jaxcomp.export.litert_model import OWNER, Model, Product, as_range, converted, needed, observed, quiet
from jaxcomp.export.stablehlo import closed, exported
from jaxcomp.quantization.leaves import Quantized
from jaxcomp.trace.program import shapes_of, trace
from jaxcomp.trace.ranges import Range

BETWEEN = (
    *("ADD", "AVERAGE_POOL_2D", "BROADCAST_TO", "CONCATENATION", "GATHER", "LOGISTIC", "MAX_POOL_2D", "MAXIMUM"),
    *("MEAN", "PACK", "PAD", "RELU", "RESHAPE", "SLICE", "SPLIT", "STRIDED_SLICE", "TANH", "TRANSPOSE", "UNPACK"),
)
"""What may stand between two products on integers and loses a step at most: quantized where all products are."""
SCHEMES = {"weights": "add_weight_only_config", "dynamic": "add_dynamic_config", "static": "add_static_config"}


@dataclass(frozen=True)
class Asked:
    """What one product of the model is to become.

    Attributes:
      planned: the site that it was, with its rule.
      product: it, in the float model.
      scheme: of SCHEMES, or None to leave it in float.
      bits: of its weight.
    """

    planned: Planned
    product: Product
    scheme: str | None
    bits: int

    @property
    def path(self) -> str:
        """The site's."""
        return self.planned.site.path


def to_litert(
    path: str | os.PathLike[str],
    fn: Callable[..., PyTree],
    params: Params,
    *args: PyTree,
    rules: Rules | None = None,
    ranges: Mapping[str, Range] | None = None,
    samples: Iterable[PyTree] = (),
) -> int:
    """Writes ``lambda *args: fn(params, *args)`` as a LiteRT model (.tflite), for ``ai_edge_litert`` and phones.

    LiteRT takes no integers from a program. So the float function is converted, and its quantizer makes of each product
    what the tree and the rules say of its site: a leaf of ``Int(8)`` or ``Int(4)`` is stored in its bits; without a
    rule it is multiplied in float, with ``Act(8, range=Dynamic())`` LiteRT rounds activations as they come, with
    ``Act(8)`` they have the given ranges, and products, and what stands between them, run on int8. The result is read
    again: a product that was left in float, or a weight that is another number than the leaf's, is an error.

    Args:
      path: the file, which is written whole or not at all.
      fn: a pure function ``fn(params, *args)``; batch norm is folded on the way.
      params: its parameters.
      args: further arguments, or their shapes, which the model keeps; its results are numbered in tree order.
      rules: of activations, as of :func:`~jaxcomp.quantize_function`: 8 bits, asymmetric, per tensor.
      ranges: of the sites' activations.
      samples: for ``Act(8)``, batches as ``calibrate_over`` takes them, of the shapes of ``args``, which say the ranges
        of results and of what stands between products.

    Returns:
      The bytes of the file.

    Raises:
      ExportError: LiteRT's packages are not installed, an operation that its converter lacks, or what its quantizer
        cannot do or did not do, by the site's path.
      FileError: the file cannot be written.

    Source: LiteRT's quantization specification. Deviations of the result from ``quantize_function``: sums, biases and
    results are rounded to int8 too where ``Act(8)`` asks.
    """
    leaves = dict(leaves_with_paths(params, is_leaf=is_compressed)[0])
    program = trace(fn, shapes_of(params), *args)
    planned = assigned(program, rules or {})
    model = exported(_flat(fn, materialize(params), args), *_shapes(args), platforms=("cpu",))
    data = converted(model.mlir_module_serialized, len(model.in_avals), len(model.out_avals))
    if rules or any(map(is_compressed, leaves.values())):
        data = _quantized(_renamed(data), planned, leaves, samples=samples, ranges=checked_ranges(planned, ranges))
    with replacing(path) as f:
        write_all(f, data)
    return len(data)


def _flat(fn: Callable[..., PyTree], params: Params, args: Sequence[PyTree]) -> Callable[..., list[jax.Array]]:
    """The float function of its arrays in tree order, as a signature has them."""
    treedef = jax.tree.structure(tuple(args))
    run = closed(fn, params, rules=None, ranges=None, integer=False)
    return lambda *arrays: jax.tree.leaves(run(*jax.tree.unflatten(treedef, arrays)))


def _shapes(args: Sequence[PyTree]) -> list[Leaf]:
    return jax.tree.leaves(jax.eval_shape(lambda *a: a, *args))


def _renamed(data: bytes) -> bytes:
    """Each tensor by its number: the quantizer tells them apart by their names, which paths made long and alike."""
    model = Model.of(data)
    inputs = {t.tensorIndex for signature in model.root.signatureDefs for t in signature.inputs}
    for i, tensor in enumerate(model.tensors):
        if i not in inputs:
            tensor.name = f"t{i}".encode()
    return model.packed()


def _quantized(
    data: bytes,
    planned: Sequence[Planned],
    leaves: Mapping[str, Leaf],
    *,
    samples: Iterable[PyTree],
    ranges: Mapping[str, Range],
) -> bytes:
    model = Model.of(data)
    asked = [_asked(p, product, leaves) for p, product in _matched(planned, model)]
    _check_lookups(planned, leaves)
    quantizer = needed("ai_edge_quantizer")
    made = quantizer.Quantizer(data)
    static = [a for a in asked if a.scheme == "static"]
    if static and len(static) == len(asked):
        for name in BETWEEN:
            made.add_static_config(".*", name, 8, 8)
    for a in asked:
        if a.scheme is not None:
            widths = (8, a.bits) if a.scheme == "static" else (a.bits,)
            getattr(made, SCHEMES[a.scheme])(f"^t{a.product.output};$", a.product.kind, *widths)
    seen = _ranges(model, static, samples=samples, data=data, ranges=ranges) if static else None
    try:
        with quiet():
            out = bytes(made.quantize(seen, enable_progress_report=False).quantized_model)
    except (ValueError, RuntimeError, KeyError) as e:
        raise ExportError(f"{OWNER}: LiteRT's quantizer refuses: {' '.join(str(e).split())[:500]}") from e
    _check(model, Model.of(out), asked)
    return out


def _matched(planned: Sequence[Planned], model: Model) -> list[tuple[Planned, Product]]:
    """Each site with the product that it became: both stand in the order in which they run."""
    sites, products = [p for p in planned if p.site.kind != "embed"], model.products
    pairs = list(zip(sites, products, strict=False))
    wrong = next((p for p, product in pairs if not _alike(p, product, model)), None)
    if wrong is None and len(sites) == len(products):
        return pairs
    at = f"; the first that is not alike is {wrong.site.path!r}" if wrong else ""
    raise ExportError(
        f"{OWNER}: the function has {len(sites)} products and LiteRT's converter made {len(products)} of them{at}, so"
        " it cannot be said which is which. Export it without rules and with materialized parameters, or to ONNX."
    )


def _alike(planned: Planned, product: Product, model: Model) -> bool:
    site = planned.site
    same = math.prod(site.out_shape) == math.prod(model.shape(product.output))
    if site.weight is not None:
        same &= math.prod(site.operands[site.weight].shape) == math.prod(model.shape(product.inputs[1]))
    return site.steps == 1 and same


def _asked(planned: Planned, product: Product, leaves: Mapping[str, Leaf]) -> Asked:
    site, act = planned.site, planned.act
    weight = None if site.weight is None else site.operands[site.weight]
    leaf = leaves.get(weight.leaf or "") if weight is not None else None
    bits = _bits(site.path, leaf)
    if act is None:
        return Asked(planned, product, None if bits is None else "weights", bits or 8)
    if bits is None and weight is not None:
        raise ExportError(
            f"{OWNER}: {site.path!r} has a rule for its activations and a weight in {method_of(leaf)}; LiteRT"
            " multiplies integers by integers: quantize the weight to Int(8), or give the site the rule None."
        )
    return Asked(planned, product, _scheme(site.path, act), bits or 8)


def _bits(path: str, leaf: Leaf) -> int | None:
    """Of the weight as LiteRT stores it; None where it is an array."""
    if not is_compressed(leaf):
        return None
    bits = leaf.grid.bits if isinstance(leaf, Quantized) and leaf.zero_point is None else 0
    if bits in (4, 8) and leaf.grid.label.startswith(f"int{bits}"):
        return int(bits)
    raise ExportError(
        f"{OWNER}: {path!r} is {method_of(leaf)}, which LiteRT has no form for; it takes Int(8) and Int(4) with"
        " symmetric scales, per channel or per tensor. Quantize it so, or give it as an array by jaxcomp.materialize."
    )


def _scheme(path: str, act: ActSpec) -> str:
    plain = isinstance(act, Act) and act.bits == 8
    if isinstance(act, Act) and plain and isinstance(act.range, Dynamic):
        return "dynamic"
    if isinstance(act, Act) and plain and not act.symmetric:
        return "static"
    raise ExportError(f"{OWNER}: {path!r} has the rule {act}; LiteRT takes Act(8) and Act(8, range=Dynamic()).")


def _check_lookups(planned: Sequence[Planned], leaves: Mapping[str, Leaf]) -> None:
    for p in planned:
        table = p.site.operands[0].leaf if p.site.kind == "embed" else None
        if table is not None and is_compressed(leaves.get(table)):
            raise ExportError(
                f"{OWNER}: {table!r} is looked up, which LiteRT does in float alone; give it as an array by"
                " jaxcomp.materialize."
            )


def _ranges(
    model: Model,
    static: Sequence[Asked],
    *,
    samples: Iterable[PyTree],
    data: bytes,
    ranges: Mapping[str, Range],
) -> dict[str, dict[str, np.ndarray]]:
    """Of every tensor: those of the sites as given, the others as the samples have them."""
    flat = [[np.asarray(x) for x in jax.tree.leaves(sample)] for sample in samples]
    if not flat:
        raise ExportError(
            f"{OWNER}: Act(8) in LiteRT rounds results and sums too, whose ranges calibrate does not see: give"
            " samples=, some batches of the shapes that the model takes."
        )
    seen = observed(data, flat)
    for a in static:
        for operand, name in a.planned.ranges.items():
            given = ranges[name]
            for number in model.moved_from(a.product.inputs[operand if a.planned.site.weight is None else 0]):
                seen[_name(model, number)] = as_range(min(float(given.low), 0.0), max(float(given.high), 0.0))
    return seen


def _name(model: Model, number: int) -> str:
    name = model.tensors[number].name
    return str(name.decode()) if isinstance(name, bytes) else str(name)


def _check(before: Model, after: Model, asked: Sequence[Asked]) -> None:
    """Raises where the quantizer left a product in float, or changed a weight."""
    types = {v: k for k, v in vars(needed("ai_edge_litert.schema_py_generated").TensorType).items()}
    for a, product in zip(asked, after.products, strict=True):
        found = [types[after.tensors[i].type] for i in (*product.inputs[:2], product.output)]
        made = after.maker(product.inputs[1]) if a.scheme == "weights" else None
        if made is not None:
            found[1] = types[after.tensors[made[1][0]].type]
        stored = f"INT{a.bits}" if a.planned.site.weight is not None else "INT8"
        wanted = {
            None: found,
            "weights": ["FLOAT32", stored, "FLOAT32"],
            "dynamic": ["FLOAT32", stored, "FLOAT32"],
            "static": ["INT8", stored, "INT8"],
        }[a.scheme]
        if found != wanted:
            raise ExportError(
                f"{OWNER}: LiteRT's quantizer made {a.path!r} a {product.kind} of {', '.join(found)}, where"
                f" {', '.join(wanted)} was asked for; give it and the leaf another width or none."
            )
        if a.scheme is not None and product.weight:
            number = product.inputs[1] if made is None else made[1][0]
            _check_weight(a.path, before, a.product.inputs[1], after=after, number=number)


def _check_weight(path: str, before: Model, old: int, *, after: Model, number: int) -> None:
    """Raises where codes times scales are not the numbers that went in."""
    tensor = after.tensors[number]
    wanted = np.frombuffer(bytes(before.values(old)), np.float32).reshape(before.shape(old))  # type: ignore[arg-type]
    codes = _codes(np.asarray(after.values(number)), wanted.size)
    scale = np.asarray(tensor.quantization.scale, np.float32)
    shape = [1] * wanted.ndim
    shape[tensor.quantization.quantizedDimension if scale.size > 1 else 0] = scale.size
    apart = np.abs(codes.reshape(wanted.shape) * scale.reshape(shape) - wanted) / scale.reshape(shape)
    if apart.max(initial=0) > 0.02:
        raise ExportError(
            f"{OWNER}: LiteRT's quantizer scales by the largest weight of a channel, and {path!r} has another scale, so"
            f" that weights would be {apart.max():.2f} of a step apart; quantize it with scale=AbsMax(), per channel of"
            " its outputs."
        )


def _codes(data: np.ndarray, size: int) -> np.ndarray:
    """The codes of a buffer of bytes or of nibbles, the low one first."""
    if data.size == size:
        return data.view(np.int8).astype(np.float32)
    both = np.stack([data << 4, data], -1).view(np.int8) >> 4
    return both.reshape(-1)[:size].astype(np.float32)
