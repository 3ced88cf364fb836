"""``jaxcomp export``: what it writes, what it says, and errors in one line."""

from __future__ import annotations

import os
from importlib.util import find_spec

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.export.running import opened
from tests.command_line import runner

MODULE = """
import jax
def network(p, x):
    return jax.nn.relu(x @ p["up"]) @ p["down"]
def tokens(p, ids):
    return p["table"][ids]
number = 3
"""
RNG = np.random.default_rng(0)
LITERT = find_spec("litert_converter") is not None and find_spec("ai_edge_quantizer") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network's file and its function."""
    at = tmp_path_factory.mktemp("export")
    params = {name: jnp.asarray(RNG.normal(size=(32, 32)), jnp.float32) for name in ("up", "down")}
    jc.save(at / "net.safetensors", jc.pack(jc.quantize(jc.Int(8), per=jc.Channels(-1)).apply((), params)))
    jc.save(at / "table.safetensors", {"table": params["up"]})
    (at / "networks_to_export.py").write_text(MODULE)
    np.save(at / "x.npy", RNG.normal(size=(64, 32)).astype(np.float32))
    return at


@pytest.fixture
def run(folder, monkeypatch, capsys):
    return runner(folder, monkeypatch, capsys)


PROGRAM = "--fn networks_to_export:network --shape batch,32"
TARGETS = [
    ("onnx", ".onnx"),
    ("stablehlo", ".stablehlo"),
    pytest.param("litert", ".tflite", marks=pytest.mark.skipif(not LITERT, reason="needs LiteRT's packages")),
]


@pytest.mark.parametrize(("to", "suffix"), TARGETS)
def test_a_program_is_written_and_run(to, suffix, run, folder) -> None:
    code, out, err = run(f"export net.safetensors --to {to} {PROGRAM}")
    assert (code, err) == (0, "")
    size = os.path.getsize(folder / f"net{suffix}")
    assert out.startswith(f"net{suffix}: {size:,} bytes, of ")
    assert "cosine 1.000000" in out
    assert opened(folder / f"net{suffix}", to)(np.ones((1, 32), np.float32))[0].shape == (1, 32)


@pytest.mark.parametrize(("to", "suffix"), TARGETS)
def test_samples_round_activations(to, suffix, run, folder, tmp_path) -> None:
    fixed = PROGRAM.replace("batch", "4")  # the checks of types in tests take no sizes that are expressions
    code, out, err = run(f"export net.safetensors --to {to} {fixed} --samples x.npy --out {tmp_path}/q{suffix}")
    assert (code, err) == (0, "")
    assert "cosine 0.999" in out or "cosine 1.000" in out
    x = np.load(folder / "x.npy")[:4]
    assert opened(tmp_path / f"q{suffix}", to)(x)[0].shape == (4, 32)


def test_integers_go_in(run, tmp_path) -> None:
    words = f"--fn networks_to_export:tokens --shape batch,4:int32 --out {tmp_path}/t"
    code, out, err = run(f"export table.safetensors --to stablehlo {words}")
    assert (code, err) == (0, "")
    assert "largest difference 0 " in out


def test_a_function_says_what_products_do_with_the_axes_of_weights(run, folder) -> None:
    code, _, err = run(f"export net.safetensors --to gguf {PROGRAM} --out by_roles.gguf")
    assert (code, err) == (0, "")
    held = {k: np.asarray(jc.materialize(v)) for k, v in jc.export.from_gguf(folder / "by_roles.gguf").items()}
    up = np.asarray(jc.materialize(jc.load(folder / "net.safetensors")["up"]))
    assert any(np.allclose(x, up.T, rtol=1e-3) for x in held.values())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--to onnx", "holds a program; say --fn MODULE:FUNCTION"),
        ("--to stablehlo --fn networks_to_export --shape 1,32", "--fn must be MODULE:FUNCTION"),
        ("--to stablehlo --fn no_such_module:f --shape 1,32", "cannot be imported"),
        ("--to stablehlo --fn networks_to_export:number --shape 1,32", "has no function 'number'"),
        ("--to stablehlo --fn networks_to_export:network --shape 1;32", "--shape wants numbers and names"),
        (
            "--to stablehlo --fn networks_to_export:network --shape 1,33",
            "of the shapes [(1, 33)]: TypeError: dot_general",
        ),
        (f"--to stablehlo {PROGRAM} --samples net.safetensors", "'net.safetensors' is no .npy file of numbers"),
        (f"--to stablehlo {PROGRAM} --samples gone.npy", "No such file or directory: 'gone.npy'"),
        ("--to stablehlo --fn networks_to_export:network --shape 100,32 --samples x.npy", "--samples hold arrays"),
        (f"--to gguf {PROGRAM} --samples x.npy", "gguf holds weights alone"),
        ("--to gguf --shape 1,32", "give --fn and --shape both"),
        ("--to gguf", "or --fn and --shape to the command"),
    ],
)
def test_wrong_words_give_one_line(words, says, run) -> None:
    code, out, err = run(f"export net.safetensors {words}")
    assert (code, out) == (2, "")
    assert says in err
    assert err.startswith("error: ")
