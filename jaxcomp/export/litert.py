"""LiteRT (TensorFlow Lite): a float model converted, then quantized as the tree and the rules say, and checked."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np

from jaxcomp.activations.planning import Planned, Rules, assigned, checked_ranges
from jaxcomp.activations.specs import Act, ActSpec, Dynamic
from jaxcomp.artifact.disk import replacing, write_all
from jaxcomp.core.leaves import is_compressed, materialize, method_of
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.export.errors import ExportError, want_rules
from jaxcomp.export.litert_check import Asked, check
from jaxcomp.export.litert_model import OWNER, Foreign, Model, Product, as_range, converted, needed, observed, quiet
from jaxcomp.export.stablehlo import closed, exported
from jaxcomp.quantization.leaves import Quantized
from jaxcomp.trace.program import shapes_of, trace
from jaxcomp.trace.ranges import Range

BETWEEN = (
    *("ADD", "AVERAGE_POOL_2D", "BROADCAST_TO", "CONCATENATION", "GATHER", "LOGISTIC", "MAX_POOL_2D", "MAXIMUM"),
    *("MEAN", "PACK", "PAD", "RELU", "RESHAPE", "SLICE", "SPLIT", "STRIDED_SLICE", "TANH", "TRANSPOSE", "UNPACK"),
)
"""What may stand between two products on integers and loses a step at most."""
CHANNELS = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0, "TRANSPOSE_CONV": 0}
"""The axis of a weight that its scales lie along."""
NARROW = ("CONV_2D", "FULLY_CONNECTED")
"""What takes weights of four bits; others keep such codes in bytes."""
SCHEMES = {"weights": "add_weight_only_config", "dynamic": "add_dynamic_config", "static": "add_static_config"}


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

    >>> fn = lambda p, x: x @ p["w"]
    >>> to_litert("net.tflite", fn, {"w": jnp.ones((8, 4))}, jnp.ones((1, 8)))  # doctest: +SKIP
    984

    Source: LiteRT's quantization specification. Deviations of the result from ``quantize_function``: sums, biases and
    results that go on are rounded to int8 too where ``Act(8)`` asks.
    """
    want_rules(OWNER, rules, ranges=ranges)
    leaves = dict(leaves_with_paths(params, is_leaf=is_compressed)[0])
    program = trace(fn, shapes_of(params), *args)
    planned = assigned(program, rules or {})
    model = exported(_flat(fn, materialize(params), args), *_shapes(args), platforms=("cpu",), owner=OWNER)
    data = converted(model.mlir_module_serialized, len(model.in_avals), len(model.out_avals))
    if rules or any(map(is_compressed, leaves.values())):
        data = _quantized(_renamed(data), planned, leaves, samples=samples, ranges=checked_ranges(planned, ranges))
    with replacing(path, owner=OWNER) as f:
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
    static = [a for a in asked if a.scheme == "static"]
    seen = _ranges(model, static, samples=samples, data=data, ranges=ranges) if static else {}
    seen |= {_name(model, a.product.inputs[1]): _weight_range(model, a) for a in asked if a.peaks is not None}
    asked = [_in_float(a, model) for a in asked]
    between = _between(model, {n for a in static for n in a.product.inputs[:2]})
    try:
        made = _recipe(data, asked, between)
        with quiet():
            out = bytes(made.quantize(seen, enable_progress_report=False).quantized_model)
    except (ValueError, RuntimeError, KeyError) as e:
        raise ExportError(f"{OWNER}: LiteRT's quantizer refuses: {' '.join(str(e).split())[:500]}") from e
    check(model, Model.of(out), asked)
    return out


def _in_float(asked: Asked, model: Model) -> Asked:
    """A product whose result is the model's gives floats, not 8 bits: it rounds its activations as they come."""
    last = asked.scheme == "static" and asked.peaks is not None and asked.product.output in model.results
    return replace(asked, scheme="dynamic") if last else asked


def _between(model: Model, entering: set[int]) -> dict[int, str]:
    """What is on integers between products: the results of operations that only products on integers read."""
    wanted, found = set(entering), {}
    for kind, ins, outs in reversed(model.ops):
        readers = [o for _, i, o in model.ops if outs[0] in i]
        inner = all(o[0] in found or outs[0] in entering for o in readers)
        if kind in BETWEEN and outs[0] in wanted and inner and outs[0] not in model.results:
            found[outs[0]] = kind
            wanted |= set(ins)
    return found


def _recipe(data: bytes, asked: Sequence[Asked], between: Mapping[int, str]) -> Foreign:
    """LiteRT's quantizer, told what becomes of each product and of what stands between them."""
    made = needed("ai_edge_quantizer").Quantizer(data)
    for number, kind in between.items():
        made.add_static_config(f"^t{number};$", kind, 8, 8)
    for a in asked:
        if a.scheme is not None:
            widths = (8, a.bits) if a.scheme == "static" else (a.bits,)
            getattr(made, SCHEMES[a.scheme])(f"^t{a.product.output};$", a.product.kind, *widths)
    return made


def _weight_range(model: Model, asked: Asked) -> dict[str, np.ndarray]:
    """With which the quantizer finds the codes that the leaf has: it divides the range by the largest code."""
    number = asked.product.inputs[1]
    shape, axis = model.shape(number), CHANNELS[asked.product.kind]
    values = np.frombuffer(bytes(model.values(number)), np.float32).reshape(shape)  # type: ignore[arg-type]
    others = tuple(i for i in range(len(shape)) if i != axis)
    largest = np.abs(values).max(others, keepdims=True)
    peaks = np.maximum(np.asarray(asked.peaks), 1).reshape(largest.shape)
    end = largest / peaks * (2 ** (asked.bits - 1) - 1)
    return {"min": -end.astype(np.float32), "max": end.astype(np.float32)}


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
    if act is None and bits is None:
        return Asked(planned, product, None, 8, None)
    if bits is None and weight is not None:
        raise ExportError(
            f"{OWNER}: {site.path!r} has a rule for its activations and a weight in {method_of(leaf)}; LiteRT"
            " multiplies integers by integers: quantize the weight to Int(8), or give the site the rule None."
        )
    stored = bits if bits is not None and product.kind in NARROW else 8
    peaks = None
    if weight is not None and leaf is not None and product.kind in CHANNELS:
        codes = np.abs(np.asarray(leaf.numbers(), np.float32))
        peaks = codes.max(tuple(i for i in range(codes.ndim) if i not in weight.leaf_axes("output")), initial=0)
    return Asked(planned, product, "weights" if act is None else _scheme(site.path, act), stored, peaks)


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
