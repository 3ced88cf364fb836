"""What a loaded tree takes in memory while it runs: its file, about, and not the dense network."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.artifact import open_tree, save

LAYERS, WIDTH = 24, 2048
RUN = """
import re, sys
from pathlib import Path
import jax, numpy as np, jaxcomp as jc
from tests.artifact.test_peak import fn
run = jax.jit(lambda tree, x: jc.quantize_function(fn, {})(tree, None, x))
def now(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
x = np.ones((1, int(sys.argv[3])), np.float32)
small = jc.load(sys.argv[2])
run(small, x[:, :128]).block_until_ready()
Path("/proc/self/clear_refs").write_text("5")  # the peak is now's
before = now("VmRSS")
tree = jc.load(sys.argv[1])
loaded = now("VmHWM") - before
if "dense" in sys.argv:
    tree = jc.materialize(tree)
y = run(tree, x).block_until_ready()
assert np.isfinite(y).all()
print(loaded, now("VmHWM") - before)
"""


def fn(p, x):
    """Dense layers."""
    for layer in p.values():
        x = jnp.tanh(x @ layer["kernel"])
    return x


def layers(count: int, width: int):
    """Leaves of int4 by groups of 128, made of random bytes."""
    rng = np.random.default_rng(0)
    shape, grid = (width, width), jc.Int(4)
    for i in range(count):
        codes = jc.core.Packed(rng.integers(0, 256, width * width // 2, np.uint8), 4, -8, shape)
        scale = np.full((width // 128, width), 1e-3, np.float32)
        yield f"layer_{i:02}/kernel", jc.quantization.Quantized(codes, scale, None, grid, np.dtype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize(("coding", "prepared"), [(None, True), ("ans", True), (None, False)])
def test_a_loaded_tree_runs_in_the_memory_of_its_file(coding, prepared, tmp_path) -> None:
    """One that was prepared for its function before it was saved (docs/serving.md), and one that was not."""
    if not prepared and jax.__version_info__ < (0, 11):
        pytest.skip("its XLA puts the products of a chain in no order")
    sizes = []
    for name, count, width in (("small", LAYERS, 128), ("f", LAYERS, WIDTH)):
        save(tmp_path / name, layers(count, width))
        ready = jc.load(tmp_path / name)
        if prepared:
            ready = jc.prepare(ready, fn, np.ones((1, width), np.float32))
        sizes.append(save(tmp_path / name, ready, coding=coding))
    files, found = [os.fspath(tmp_path / name) for name in ("f", "small")], {}
    for way in ("packed", "dense"):
        command = [sys.executable, "-c", RUN, *files, str(WIDTH), way]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[way] = [int(n) / sizes[1] for n in done.stdout.split()]
    print(f"{sizes[1] / 1e6:.0f} MB; peaks of loading and of running, in files: {found}")
    assert found["packed"][0] < 1.3
    assert found["packed"][1] < (3.5 if prepared else 2.5)  # of which the compiler takes one, or two
    assert found["dense"][1] > LAYERS * WIDTH * WIDTH * 4 / sizes[1] > 7


def test_leaves_by_hand_are_leaves(tmp_path) -> None:
    save(tmp_path / "f", layers(1, 128))
    with open_tree(tmp_path / "f") as tree:
        leaf = tree["layer_00/kernel"]
    assert isinstance(leaf, jc.quantization.Quantized)
    assert leaf.shape == leaf.materialize().shape == (128, 128)
