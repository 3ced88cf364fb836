"""LiteRT's flatbuffers: made of a StableHLO program, read as products, and what runs in them measured."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from jaxcomp.core.types import Shape
from jaxcomp.export.errors import ExportError

OWNER = "to_litert"
PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL", "TRANSPOSE_CONV")
"""The operations that sites become."""
MOVES = ("PAD", "RESHAPE", "TRANSPOSE", "SQUEEZE", "EXPAND_DIMS")
"""What only moves values, so that its two ends share a range."""


Foreign = Any
"""An object of LiteRT's packages, which say no types."""


@dataclass(frozen=True)
class Product:
    """One product of a model.

    Attributes:
      kind: the operation's name.
      inputs, output: tensors by number; the second input is the weight.
      weight: whether the second input is a constant.
    """

    kind: str
    inputs: tuple[int, ...]
    output: int
    weight: bool


@dataclass(frozen=True)
class Model:
    """A model of one subgraph. ``ops`` are (name, inputs, outputs), tensors by number; -1 is an input that is left out.

    Attributes:
      root: the flatbuffer's object, which :meth:`packed` writes.
      tensors: its own, with their names, shapes and types.
    """

    root: Foreign
    tensors: Sequence[Foreign]
    ops: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @classmethod
    def of(cls, data: bytes) -> Model:
        """Reads a flatbuffer."""
        schema = needed("ai_edge_litert.schema_py_generated")
        root = schema.ModelT.InitFromPackedBuf(data, 0)
        graph, names = root.subgraphs[0], {v: k for k, v in vars(schema.BuiltinOperator).items()}
        codes = [names[max(c.builtinCode, c.deprecatedBuiltinCode)] for c in root.operatorCodes]
        ops = ((codes[o.opcodeIndex], _numbers(o.inputs), _numbers(o.outputs)) for o in graph.operators)
        return cls(root, graph.tensors, tuple(ops))

    def values(self, number: int) -> np.ndarray | None:
        """A constant's values as the file holds them, or None for a tensor that is computed."""
        data = self.root.buffers[self.tensors[number].buffer].data
        return None if data is None or not len(data) else np.asarray(data, np.uint8)

    @property
    def products(self) -> tuple[Product, ...]:
        """In the order in which they run."""
        return tuple(
            Product(kind, ins, outs[0], self._is_constant(ins[1])) for kind, ins, outs in self.ops if kind in PRODUCTS
        )

    @property
    def results(self) -> frozenset[int]:
        """The tensors that the model gives."""
        return frozenset(_numbers(self.root.subgraphs[0].outputs))

    def _is_constant(self, number: int) -> bool:
        made = self.maker(number)
        if made is not None and made[0] == "DEQUANTIZE":
            return self._is_constant(made[1][0])
        return self.values(number) is not None

    def maker(self, number: int) -> tuple[str, tuple[int, ...]] | None:
        """The operation whose result a tensor is, and its inputs."""
        return next(((kind, ins) for kind, ins, outs in self.ops if number in outs), None)

    def shape(self, number: int) -> Shape:
        """Of a tensor."""
        return tuple(int(n) for n in self.tensors[number].shape)

    def moved_from(self, number: int) -> tuple[int, ...]:
        """A tensor and those that it is a moved copy of."""
        made = self.maker(number)
        return (number,) if made is None or made[0] not in MOVES else (number, *self.moved_from(made[1][0]))

    def packed(self) -> bytes:
        """The flatbuffer again."""
        import flatbuffers

        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(self.root.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def _numbers(of: Iterable[int] | None) -> tuple[int, ...]:
    return () if of is None else tuple(int(n) for n in of)


INSTALL = (
    'pip install "jaxcomp[litert]", then pip install --no-deps litert-converter==0.5.0 (it pins an xdsl that no current'
    " tool can stand beside, and does not need it here)"
)


def needed(name: str) -> ModuleType:
    """A module of LiteRT's packages.

    Raises:
      ExportError: it is not installed; the message says how it is.
    """
    try:
        return import_module(name)
    except ImportError as e:
        raise ExportError(f"{OWNER}: LiteRT's packages are not installed ({e}); {INSTALL}.") from e


def converted(program: bytes, inputs: int, outputs: int) -> bytes:
    """A StableHLO program as a float model; its arguments are ``args_0``, its results ``output_0`` and so on.

    Raises:
      ExportError: what the converter cannot convert, in its words.
    """
    api = needed("litert_converter.converter_api_ext")
    ir, passes = needed("litert_converter.mlir.ir"), needed("litert_converter.mlir.passmanager")
    stablehlo = needed("litert_converter.mlir.dialects.stablehlo")
    context = ir.Context()
    api.prepare_mlir_context(context)
    with context:
        try:
            module = stablehlo.deserialize_portable_artifact(context, program)
            names = [f"args_{i}" for i in range(inputs)], [f"output_{i}" for i in range(outputs)]
            api.set_signature(module.operation, "serving_default", *names)
            api.run_convert_to_tfl_passes(module, passes.PassManager("builtin.module"), api.ConvertToTFLConfig())
            return bytes(api.export_flatbuffer_to_bytes(module.operation))
        except Exception as e:
            said = " ".join(str(e).split())[:600]
            raise ExportError(
                f"{OWNER}: LiteRT's converter does not take this program: {said} Write what it names with other"
                " operations, or export to ONNX or StableHLO."
            ) from e


@contextmanager
def quiet() -> Iterator[None]:
    """Without LiteRT's warning that an interpreter which keeps its tensors takes memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*experimental_preserve_all_tensors", UserWarning)
        yield


def interpreter(data: bytes, *, keep: bool = False) -> Foreign:
    """LiteRT's interpreter of a model, on one thread; with ``keep`` each tensor can be read after a run."""
    run = needed("ai_edge_litert.interpreter")
    resolver = run.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if keep else run.OpResolverType.AUTO
    with quiet():
        made = run.Interpreter(
            model_content=data,
            num_threads=1,
            experimental_preserve_all_tensors=keep,
            experimental_op_resolver_type=resolver,
        )
    made.allocate_tensors()
    return made


def observed(data: bytes, samples: Iterable[Sequence[np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """The smallest and the largest value of each float tensor that is computed, over the samples, by name."""
    run = interpreter(data, keep=True)
    ends: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    model = Model.of(data)
    wanted = {i for i, t in enumerate(model.tensors) if model.values(i) is None}
    details = [d for d in run.get_tensor_details() if d["dtype"] == np.float32 and d["index"] in wanted]
    for sample in samples:
        given(run, sample)
        run.invoke()
        for d in details:
            x = run.get_tensor(d["index"])
            if x.size:
                low, high = ends.get(d["name"], (np.float32(0), np.float32(0)))
                ends[d["name"]] = np.minimum(low, x.min()), np.maximum(high, x.max())
    return {name: as_range(low, high) for name, (low, high) in ends.items()}


def as_range(low: np.ndarray | float, high: np.ndarray | float) -> dict[str, np.ndarray]:
    """A range of a whole tensor, as the quantizer takes it."""
    return {"min": np.reshape(np.float32(low), (1, 1)), "max": np.reshape(np.float32(high), (1, 1))}


def given(run: Foreign, arrays: Sequence[np.ndarray]) -> None:
    """Hands the arguments over, by their order in the signature.

    Raises:
      ExportError: arrays of other shapes than the model has.
    """
    details = sorted(run.get_input_details(), key=lambda d: int(d["name"].rpartition("_")[2]))
    wanted, got = [tuple(map(int, d["shape"])) for d in details], [np.shape(x) for x in arrays]
    if wanted != got:
        raise ExportError(f"{OWNER}: samples have arrays of shapes {got}, and the model takes {wanted}; give such.")
    for d, x in zip(details, arrays, strict=True):
        run.set_tensor(d["index"], np.ascontiguousarray(x, d["dtype"]))


def results(run: Foreign) -> list[np.ndarray]:
    """The results of the last run, by their order in the signature."""
    signature: Mapping[str, Foreign] = run.get_signature_runner().get_output_details()
    found = sorted(signature.items(), key=lambda item: int(item[0].rpartition("_")[2]))
    return [run.get_tensor(d["index"]) for _, d in found]
