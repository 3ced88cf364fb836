"""ONNX files in onnxruntime, one thread, batch 1: ResNet-18 in float, W8A8, half the channels and both; dense layers.

Command: ``python -m tests.benchmarks export_onnx``. The networks have random weights, which take as long as trained
ones. With ``JAXCOMP_RESNET=runs/.../baseline.safetensors``, a ResNet-18 that ``python -m train fashion_mnist`` trained,
it also says how often W8A8 in onnxruntime agrees with the JAX function on integers on the test split, and its accuracy.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from jaxcomp.activations.planning import ranges_of
from jaxcomp.export import to_onnx
from tests.benchmarks.timing import Report, Row, measure
from train.networks import ResNet18

RULES = {r".*": jc.Act(8)}
WIDTHS = (64, 32, 16)
FLOAT, AGAIN, INT8, HALF, BOTH = "float", "float again (control)", "W8A8", "half the channels", "half, W8A8"
NARROW = "4-bit weights, groups of 32"
TARGETS = {INT8: ">= 3", BOTH: ">= 8"}
ONE = (1, 28, 28, 1)


class Net(NamedTuple):
    """A function in inference mode, its folded variables, and what makes its activations' grids."""

    fn: Callable[..., Any]
    variables: Any
    samples: np.ndarray

    def exported(self, path: Path) -> Path:
        """The float function, of any batch."""
        to_onnx(path, self.fn, self.variables, batch())
        return path

    def ranges(self) -> Any:
        """Of its activations."""
        return ranges_of(jax.jit(jc.calibrate(self.fn))(self.variables, self.samples))

    def quantized(self) -> Any:
        """Its variables with weights in 8 bits."""
        quantize = jc.quantize(jc.Int(8), where=r".*kernel", roles=jc.roles(self.fn)(self.variables, self.samples))
        return jc.pack(quantize.apply((), self.variables))

    def exported_in_8_bits(self, path: Path) -> Path:
        """The same with weights and activations on 8 bits."""
        to_onnx(
            path,
            self.fn,
            self.quantized(),
            batch(),
            rules=RULES,
            ranges=self.ranges(),
            samples=[self.samples],
        )
        return path


def batch() -> jax.ShapeDtypeStruct:
    """Images, any number of them."""
    return jax.ShapeDtypeStruct((jax.export.symbolic_shape("n")[0], *ONE[1:]), jnp.float32)


def net(fn: Callable[..., Any], variables: Any, samples: np.ndarray) -> Net:
    """Batch norm folded."""
    folded = jc.fold_batch_norm(fn)(variables, samples[:1])
    return Net(folded.fn, folded.params, samples)


def random_net(width: int) -> tuple[Any, Any]:
    """A ResNet-18 whose every layer matters."""
    model = ResNet18(width=width)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros(ONE, np.float32))
    return model.apply, jax.tree.map(lambda x: jnp.where(x.any(), x, jnp.ones_like(x)) if x.ndim == 1 else x, variables)


def session(path: Path) -> Any:
    """Of one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def speed(width: int, folder: Path) -> Report:
    """What each form gains."""
    apply, variables = random_net(width)
    samples = np.random.default_rng(0).normal(size=(64, *ONE[1:])).astype(np.float32)
    half = jc.plan(jc.channel_groups(apply)(variables, samples[:1]), variables, sparsity=0.5)
    full, small = net(apply, variables, samples), net(jc.shrink(apply, half), half.take(variables), samples)
    files = {
        FLOAT: full.exported(folder / "float.onnx"),
        INT8: full.exported_in_8_bits(folder / "int8.onnx"),
        HALF: small.exported(folder / "half.onnx"),
        BOTH: small.exported_in_8_bits(folder / "both.onnx"),
    }
    title = f"ResNet-18 width {width}, 28x28x1, batch 1, onnxruntime, one thread: speed"
    return compared(title, files, samples[:1], TARGETS)


def compared(title: str, files: Mapping[str, Path], x: np.ndarray, targets: Mapping[str, str]) -> Report:
    """What each file gains over the first, which is the float one."""
    sessions = {name: session(path) for name, path in {**files, AGAIN: files[FLOAT]}.items()}
    calls = {name: (lambda ran=ran: ran.run(None, {"input": x})) for name, ran in sessions.items()}
    timings = measure(calls, rounds=30, inner=20, warm=True)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    rows = [
        timings.speed_row(
            name,
            FLOAT,
            factor=1.0,
            detail=f"{timings.median(name) * 1e3:.3f} ms, {sizes.get(name, sizes[FLOAT]):,} bytes",
            target=targets.get(name, ""),
        )
        for name in (AGAIN, *(name for name in files if name != FLOAT))
    ]
    return Report(title, f"float ({timings.median(FLOAT) * 1e3:.3f} ms)", rows, timings.notes())


def dense(folder: Path, *, layers: int = 4, width: int = 2048) -> Report:
    """What weights alone gain, in codes of 8 bits and of 4 in groups of 32."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        for i in range(layers):
            x = jax.nn.gelu(x @ p[f"w{i}"])
        return x

    rng = np.random.default_rng(0)
    params = {f"w{i}": rng.normal(size=(width, width)).astype(np.float32) / width**0.5 for i in range(layers)}
    x = rng.normal(size=(1, width)).astype(np.float32)
    quantized = {
        "8-bit weights": jc.quantize(jc.Int(8), per=jc.Channels(1)),
        NARROW: jc.quantize(jc.Int(4), per=jc.Groups(32, 0)),
    }
    trees = {FLOAT: params} | {name: jc.pack(t.apply((), params)) for name, t in quantized.items()}
    files = {name: folder / f"dense_{i}.onnx" for i, name in enumerate(trees)}
    for name, tree in trees.items():
        to_onnx(files[name], fn, tree, x)
    title = f"{layers} dense layers of {width}^2, batch 1, onnxruntime, one thread: speed"
    return compared(title, files, x, {NARROW: ">= 3"})


def accuracy(file: Path, folder: Path) -> Report:
    """What W8A8 does on Fashion-MNIST."""
    from train.data.sets import load

    data, variables = load("fashion_mnist"), jc.load(file)
    mean, std = np.float32(data.mean), np.float32(data.std)
    images = (data.test.images.astype(np.float32) / 255 - mean) / std
    samples = (data.train.images[:512].astype(np.float32) / 255 - mean) / std
    trained = net(ResNet18(width=variables["params"]["stem"]["kernel"].shape[-1]).apply, variables, samples)
    integer = jax.jit(jc.quantize_function(trained.fn, RULES, integer=True, strict=True))
    weights, ranges = trained.quantized(), trained.ranges()
    float_, small = session(trained.exported(folder / "f")), session(trained.exported_in_8_bits(folder / "q"))
    found: dict[str, list[np.ndarray]] = {FLOAT: [], INT8: [], "integers in JAX": []}
    for part in np.split(images, 20):
        found[FLOAT].append(float_.run(None, {"input": part})[0])
        found[INT8].append(small.run(None, {"input": part})[0])
        found["integers in JAX"].append(np.asarray(integer(weights, ranges, part)))
    said = {name: np.concatenate(logits).argmax(-1) for name, logits in found.items()}
    right = {name: (classes == data.test.labels).mean() for name, classes in said.items()}

    def row(name: str, value: float, detail: str, target: str = "") -> Row:
        return Row(name, value, value, value, detail, target)

    agreed = float((said[INT8] == said["integers in JAX"]).mean())
    rows = [row(f"accuracy, {name}", float(r), f"{r:.2%} of {len(images):,} images") for name, r in right.items()]
    rows.append(row("W8A8 agrees with the integers in JAX", agreed, f"{agreed:.2%}", ">= 0.995"))
    lost = float(right[FLOAT] - right[INT8])
    rows.append(row("accuracy lost by W8A8", lost, f"{lost * 100:.2f} pp", "<= 0.002"))
    return Report("ResNet-18 on Fashion-MNIST, W8A8 in onnxruntime", "1", rows, [])


def run() -> Iterator[Report]:
    """The reports."""
    with tempfile.TemporaryDirectory() as folder:
        for width in WIDTHS:
            yield speed(width, Path(folder))
        yield dense(Path(folder))
        if file := os.environ.get("JAXCOMP_RESNET"):
            yield accuracy(Path(file), Path(folder))
