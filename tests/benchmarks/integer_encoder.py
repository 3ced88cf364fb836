"""A sentence encoder of MiniLM-L6's sizes on integers on a CPU over float32: packed, and prepared for its length.

``python -m tests.benchmarks integer_encoder``, under ``taskset -c 0`` for one core. Weights and tokens are random, or
with ``JAXCOMP_MINILM=<folder of its model>`` MiniLM-L6's own and those of sentences. Activations have 8 bits and a
range a token, found as they come, or where it is static one for all, found before. Beside them onnxruntime's file in
float32, and the one that its own ``quantize_dynamic`` makes of it: 8 bits, the weights a feature, activations a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, ranges_of
from jaxcomp.core.layouts import Tokens
from jaxcomp.export import to_onnx
from tests.benchmarks.export_onnx import session
from tests.benchmarks.gpu_cases import Call, Compiled, Setting, run_cases
from tests.benchmarks.timing import Report
from tests.export.models import CONFIG, MINILM, encoder, minilm, minilm_folder, minilm_tokenizer, small_encoder

FLOAT, AGAIN, OTHER = "float32", "float32 again (control)", "onnxruntime"
RULE = Act(8, range=Dynamic(), per=Tokens())
SHAPES = ((1, 128), (8, 128), (1, 32))
"""Sentences, tokens."""
SENTENCES = (
    "The river had risen overnight and the lower fields were under water.",
    "She plays the violin in the city orchestra every other Sunday.",
    "Compression makes neural networks small, and sometimes fast.",
    "How do I reset the password of my account?",
    "Two cups of flour, one egg and a pinch of salt.",
    "Shares fell sharply on Monday after the announcement.",
    "A child is feeding ducks at the edge of a pond.",
    "The theorem holds for every finite group of odd order.",
)


def run(*, toy: bool = False) -> Iterator[Report]:
    """A report for each number of sentences and tokens."""
    setting = Setting.lasting(3600, toy=toy)
    sizes = setting.pick(MINILM, CONFIG)
    own = minilm_folder() is not None and not toy
    params = jax.tree.map(jnp.asarray, minilm()[0] if own else small_encoder(0, sizes))
    for shape in setting.pick(SHAPES, ((2, 40),)):
        ids = jax.random.randint(jax.random.key(1), shape, 0, sizes["vocabulary"])
        args = minilm_tokenizer()(SENTENCES[: shape[0]], shape[1]) if own else (ids, jnp.ones_like(ids))
        network = Network(partial(encoder, heads=sizes["heads"]), params, args, r"layers/.*kernel")
        yield on_integers(setting, network, f"an encoder on integers, {shape[0]} x {shape[1]} tokens, speed")


class Network(NamedTuple):
    """A function, its parameters and arguments, and the path of the weights that are quantized."""

    fn: Callable[..., Any]
    params: Any
    args: tuple[jax.Array, ...]
    weights: str


def on_integers(setting: Setting, network: Network, title: str) -> Report:
    """A network of floats beside itself on integers, and in onnxruntime."""
    fn, params, args, weights = network
    roles = jc.roles(fn)(params, *args)

    def tree(bits: int, *, prepared: bool) -> Any:
        packed = jc.pack(jc.quantize(jc.Int(bits), where=weights, roles=roles).apply((), params))
        return jc.prepare(packed, fn, *args) if prepared else packed

    def quantized(bits: int, where: str | None, *, prepared: bool) -> Call:
        q = jc.quantize_function(fn, {} if where is None else {where: RULE}, integer=where is not None)
        return Compiled(lambda tree, *args: q(tree, None, *args), tree(bits, prepared=prepared), *args)

    def static() -> Call:
        q = jc.quantize_function(fn, {".*kernel": Act(8)}, integer=True)
        ranges = ranges_of(jax.jit(jc.calibrate(fn))(params, *args))
        return Compiled(lambda tree, *args: q(tree, ranges, *args), tree(8, prepared=True), *args)

    makers: dict[str, Callable[[], Call]] = {name: partial(Compiled, fn, params, *args) for name in (FLOAT, AGAIN)}
    for bits in (8, 4):
        makers[f"weights alone, {bits} bits, prepared"] = partial(quantized, bits, None, prepared=True)
    makers["8 bits, packed"] = partial(quantized, 8, ".*", prepared=False)
    for bits in (8, 4):
        makers[f"{bits} bits, prepared"] = partial(quantized, bits, ".*", prepared=True)
        makers[f"{bits} bits, prepared, attention in floats"] = partial(quantized, bits, ".*kernel", prepared=True)
    makers["8 bits, prepared, attention in floats, static ranges"] = static
    with TemporaryDirectory() as folder:
        path = Path(folder)
        makers[OTHER] = partial(_in_onnxruntime, path, fn, params, args, own=False)
        makers[f"{OTHER}, 8 bits"] = partial(_in_onnxruntime, path, fn, params, args, own=True)
        ran = run_cases(makers, setting, inner=1, rounds=setting.pick(9, 2))
        return ran.report(
            title, [ran.speed(name, FLOAT, compared=name != AGAIN) for name in makers if name != FLOAT], FLOAT
        )


def _in_onnxruntime(
    folder: Path, fn: Callable[..., Any], params: Any, args: tuple[jax.Array, ...], *, own: bool
) -> Call:
    """A file of ours on one thread, as it is or in the peer's own 8 bits."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    file = folder / "encoder.onnx"
    to_onnx(file, fn, params, *args)
    if own:
        file, floats = folder / "quantized.onnx", file
        quantize_dynamic(str(floats), str(file), weight_type=QuantType.QInt8, per_channel=True)
    ran = session(file)
    given = {i.name: np.asarray(v) for i, v in zip(ran.get_inputs(), args, strict=True)}
    return lambda: jnp.asarray(ran.run(None, given)[0])
