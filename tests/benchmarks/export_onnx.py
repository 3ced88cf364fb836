"""ONNX files in onnxruntime, one thread, batch 1: ResNet-18 in float, W8A8, half the channels and both; dense layers.

Command: ``python -m tests.benchmarks export_onnx``. The networks have random weights, which take as long as trained
ones. With ``JAXCOMP_RUN=runs/wide``, the folder of ``python -m train fashion_mnist --methods structured``, they are the
two that it trained, and it also says how often each file is right on the test split, and agrees with JAX's integers.
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
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.export import to_onnx
from tests.benchmarks.timing import Report, Row, measure
from train.data.sets import load
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

    def on_integers(self) -> Callable[..., Any]:
        """The same function with integer products: of the quantized variables, the ranges and images."""
        return jax.jit(jc.quantize_function(self.fn, RULES, integer=True, strict=True))

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


class Nets(NamedTuple):
    """A network, and one of half the channels."""

    full: Net
    half: Net


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


def random_nets(width: int) -> Nets:
    """With random weights, and without half of its channels."""
    apply, variables = random_net(width)
    samples = np.random.default_rng(0).normal(size=(64, *ONE[1:])).astype(np.float32)
    half = jc.plan(jc.channel_groups(apply)(variables, samples[:1]), variables, sparsity=0.5)
    return Nets(net(apply, variables, samples), net(jc.shrink(apply, half), half.take(variables), samples))


def trained_nets(run: Path, samples: np.ndarray) -> Nets:
    """What ``python -m train fashion_mnist --methods structured`` left in its folder."""
    files = [jc.load(run / f"{name}.safetensors") for name in ("baseline", "structured")]
    shapes = [{path: np.shape(leaf) for path, leaf in leaves_with_paths(v["params"])[0]} for v in files]
    widths: list[Any] = [{"width": files[0]["params"]["stem"]["kernel"].shape[-1]}, {"widths": shapes[1]}]
    return Nets(*(net(ResNet18(**w).apply, jc.materialize(v), samples) for w, v in zip(widths, files, strict=True)))


def speed(title: str, nets: Nets, folder: Path) -> Report:
    """What each form gains."""
    files = {
        FLOAT: nets.full.exported(folder / "float.onnx"),
        INT8: nets.full.exported_in_8_bits(folder / "int8.onnx"),
        HALF: nets.half.exported(folder / "half.onnx"),
        BOTH: nets.half.exported_in_8_bits(folder / "both.onnx"),
    }
    return compared(f"{title}, 28x28x1, batch 1, onnxruntime, one thread: speed", files, nets.full.samples[:1], TARGETS)


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


def trained(run: Path, folder: Path) -> Iterator[Report]:
    """What a trained network gains and loses on Fashion-MNIST."""
    data = load("fashion_mnist")
    mean, std = np.float32(data.mean), np.float32(data.std)
    images = (data.test.images.astype(np.float32) / 255 - mean) / std
    nets = trained_nets(run, (data.train.images[:512].astype(np.float32) / 255 - mean) / std)
    yield speed(f"ResNet-18 of {run.name}", nets, folder)
    yield accuracy(nets, images, data.test.labels, folder)


def accuracy(nets: Nets, images: np.ndarray, labels: np.ndarray, folder: Path) -> Report:
    """How often each file is right, and says what the JAX function of the same precision says."""
    parts = np.split(images, 20)
    files = {FLOAT: "float", INT8: "int8", HALF: "half", BOTH: "both"}
    ran = {name: session(folder / f"{file}.onnx") for name, file in files.items()}
    said = {name: [s.run(None, {"input": part})[0].argmax(-1) for part in parts] for name, s in ran.items()}
    for name, n in ((INT8, nets.full), (BOTH, nets.half)):
        integer, weights, ranges = n.on_integers(), n.quantized(), n.ranges()
        said[f"{name} in JAX"] = [np.asarray(integer(weights, ranges, part)).argmax(-1) for part in parts]
    classes = {name: np.concatenate(found) for name, found in said.items()}
    right = {name: float((found == labels).mean()) for name, found in classes.items()}

    def row(name: str, value: float, detail: str, target: str = "") -> Row:
        return Row(name, value, value, value, detail, target)

    rows = [row(f"accuracy, {name}", r, f"{r:.2%} of {len(images):,} images") for name, r in right.items()]
    for name, most in ((INT8, 0.002), (BOTH, 0.005)):
        agreed, lost = float((classes[name] == classes[f"{name} in JAX"]).mean()), right[FLOAT] - right[name]
        rows.append(row(f"{name} agrees with the integers in JAX", agreed, f"{agreed:.2%}", ">= 0.995"))
        rows.append(row(f"accuracy lost by {name}", lost, f"{lost * 100:.2f} pp", f"<= {most}"))
    return Report("ResNet-18 on Fashion-MNIST in onnxruntime", "1", rows, [])


def run() -> Iterator[Report]:
    """The reports."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if ran := os.environ.get("JAXCOMP_RUN"):
            yield from trained(Path(ran), folder)
            return
        for width in WIDTHS:
            yield speed(f"ResNet-18 width {width}", random_nets(width), folder)
        yield dense(folder)
