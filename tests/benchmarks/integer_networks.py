"""Convolutional networks on integers on a CPU over float32: as they are packed, and prepared.

``python -m tests.benchmarks integer_networks``, under ``taskset -c 0`` for one core. All run in JAX but onnxruntime's
files beside them, in float32 and in 8 bits. Activations have 8 bits and static ranges, asymmetric unless said, or stay
floats where weights alone have codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from jaxcomp.activations import Act, ranges_of
from jaxcomp.export import to_onnx
from tests.benchmarks.export_onnx import session
from tests.benchmarks.gpu_cases import Call, Compiled, Setting, run_cases
from tests.benchmarks.grouped import ONNX, MobileNetV2
from tests.benchmarks.sparse import in_onnxruntime
from tests.benchmarks.timing import Report
from train.networks import ResNet18

BETWEEN = {"ReLU6": nn.relu6, "hard-swish": nn.hard_swish, "SiLU": nn.silu}
OWN, AGAIN = "float32", "float32 again (control)"


def run(*, toy: bool = False) -> Iterator[Report]:
    """ResNet-18 of three sizes, and MobileNetV2, also with the functions of later networks in place of ReLU6."""
    setting = Setting.lasting(3600, toy=toy)
    for width, images in setting.pick(((64, 1), (64, 8), (32, 1), (16, 8)), ((2, 2),)):
        yield compared(setting, f"ResNet-18 width {width}", ResNet18(width=width), (images, 32, 32, 3))
    size = setting.pick(224, 32)
    for name, activation in setting.pick(list(BETWEEN.items()), [("ReLU6", nn.relu6)]):
        yield compared(setting, f"MobileNetV2, {name}", MobileNetV2(activation=activation), (1, size, size, 3))


def compared(setting: Setting, name: str, model: nn.Module, shape: tuple[int, ...]) -> Report:
    """One network, batch norm folded."""
    x = jax.random.normal(jax.random.key(1), shape)
    variables = jax.jit(model.init)(jax.random.key(0), x[:1])
    folded = jc.fold_batch_norm(lambda p, x: model.apply(p, x))(variables, x[:1])
    fn, params = folded.fn, folded.params
    ranges = ranges_of(jax.jit(jc.calibrate(fn))(params, x))
    roles = jc.roles(fn)(params, x)

    def tree(bits: int) -> Any:
        return jc.pack(jc.quantize(jc.Int(bits), where=r".*kernel", roles=roles).apply((), params))

    def floats(p: Any, x: jax.Array) -> jax.Array:
        return jc.quantize_function(fn, {})(p, None, x)

    def on_integers(tree: Any, *, symmetric: bool = False) -> Call:
        q = jc.quantize_function(fn, {".*": Act(8, symmetric=symmetric)}, integer=True)
        return Compiled(lambda tree, x: q(tree, ranges, x), tree, x)

    makers: dict[str, Callable[[], Call]] = {name: partial(Compiled, floats, params, x) for name in (OWN, AGAIN)}
    makers |= {
        "weights alone, 8 bits, packed": partial(Compiled, floats, tree(8), x),
        "weights alone, 8 bits, prepared": partial(Compiled, floats, jc.prepare(tree(8), fn, x), x),
        "8 bits, packed": lambda: on_integers(tree(8)),
    }
    for bits in (8, 4):
        makers[f"{bits} bits, prepared"] = partial(lambda bits: on_integers(jc.prepare(tree(bits), fn, x)), bits)
    makers["8 bits, prepared, symmetric"] = lambda: on_integers(jc.prepare(tree(8), fn, x), symmetric=True)
    with TemporaryDirectory() as folder:
        path = Path(folder)
        makers[ONNX] = partial(in_onnxruntime, path, fn, params, x)
        makers[f"{ONNX}, 8 bits"] = lambda: _in_onnxruntime(path, fn, tree(8), ranges, x)
        ran = run_cases(makers, setting, inner=1, rounds=setting.pick(9, 2))
        title = f"{name} on integers, {shape[0]} x {shape[1]}x{shape[2]}x{shape[3]}, speed"
        return ran.report(title, [ran.speed(name, OWN) for name in makers if name != OWN], OWN)


def _in_onnxruntime(folder: Path, fn: Callable[..., Any], tree: Any, ranges: Any, x: jax.Array) -> Call:
    """A file of ours that runs on integers, on one thread."""
    file, given = folder / "integers.onnx", {"input": np.asarray(x)}
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    to_onnx(file, fn, tree, like, rules={".*": Act(8)}, ranges=ranges, samples=[x])
    ran = session(file)
    return lambda: jnp.asarray(ran.run(None, given)[0])
