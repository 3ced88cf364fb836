"""Prepared trees, caches and packed tables in programs for any batch, that ``jax.export`` keeps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import jaxcomp as jc

PROGRAMS = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax import export
import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic
from jaxcomp.kernels import kv_cache

(batch,) = export.symbolic_shape("batch")
draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
numbers = ("NHWC", "HWIO", "NHWC")


def dots(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


def convolutions(p, x):
    y = jax.lax.conv_general_dilated(x, p["a"], (1, 1), "SAME", dimension_numbers=numbers)
    return jax.lax.conv_general_dilated(jax.nn.relu(y), p["b"], (2, 2), "SAME", dimension_numbers=numbers)


def tables(p, tokens):
    x = jnp.broadcast_to(p["a"][tokens][:, None], (tokens.shape[0], 3, 32))
    return jnp.einsum("bed,edf->bef", x, p["b"])


def check(fn, given):
    leaves, tree = jax.tree.flatten(given)
    run = jax.jit(lambda *leaves: fn(jax.tree.unflatten(tree, leaves)))
    free = [jax.ShapeDtypeStruct((batch, *v.shape[1:]), v.dtype) for v in leaves]
    kept = export.deserialize(export.export(run, platforms=("cpu", "cuda"))(*free).serialize())
    for count in (1, 3):
        some = [v[:count] for v in leaves]
        got, wanted = kept.call(*some), run(*some)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * float(jnp.abs(wanted).max()))


def trees(fn, shapes, x, grid, per, like=None, **prepared):
    p = {name: draw(i, *shape) for i, (name, shape) in enumerate(zip("ab", shapes))}
    q = jc.quantize(grid, per=per, roles=jc.roles(fn)(p, x))
    ready = jc.prepare(jc.pack(q.apply((), p)), fn, x if like is None else like, **prepared)
    for rules, integer in (({".*": Act(8, range=Dynamic(), per=jc.core.layouts.Tokens())}, True), ({}, False)):
        check(lambda x, r=rules, i=integer: jc.quantize_function(fn, r, integer=i)(ready, None, x), x)


x = draw(9, 3, 64)
if sys.argv[1] == "dots":
    one, groups = jc.Channels(), jc.Groups(32)
    for grid, per in ((jc.Int(8), one), (jc.Int(4), groups), (jc.Int(4, symmetric=False), one)):
        trees(dots, ((64, 128), (128, 64)), x, grid, per)
    trees(dots, ((64, 128), (128, 64)), x, jc.Int(8), jc.Channels(), sparse=0.001)
if sys.argv[1] == "panels":
    for bits in (4, 8):
        trees(dots, ((64, 128), (128, 64)), x, jc.Int(bits), jc.Channels(), like=draw(8, 70, 64))
if sys.argv[1] == "convolutions":
    for more in ({}, {"sparse": 0.001}):
        trees(convolutions, ((3, 3, 4, 8), (3, 3, 8, 8)), draw(8, 3, 5, 6, 4), jc.Int(4), jc.Channels(), **more)
if sys.argv[1] == "tables":
    trees(tables, ((64, 32), (3, 32, 16)), jnp.arange(3), jc.Int(4), jc.Channels())
if sys.argv[1] == "cache":
    cache = kv_cache((3, 64, 4, 32), keys=jc.Int(8), values=jc.Int(4))

    def step(given):
        cache, q, k, start = given
        return cache.append(k, k, start).attend(q, start)

    check(step, (cache, draw(0, 3, 1, 8, 32), draw(1, 3, 1, 4, 32), jnp.array([0, 3, 5])))
"""


@pytest.mark.parametrize("what", ["dots", "panels", "convolutions", "tables", "cache"])
def test_any_batch(what, tmp_path) -> None:
    pytest.importorskip("llvmlite")
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(jc.__file__).parents[1]),
    }  # the checks of types here take no expressions
    command = [sys.executable, "-c", PROGRAMS, what]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
