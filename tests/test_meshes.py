"""Fault 8: transforms and functions on meshes of eight devices, in one process that has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import jax
import jax.numpy as jnp
import pytest

from jaxcomp.core.placement import Laid, layout, on_any_mesh
from tests.mesh_functions import FUNCTIONS
from tests.test_laws import TRANSFORMS

QUICK = ("int4_group_asymmetric", "calibrate", "channel_groups, plan, shrink", "federated.sign")
"""One that groups, statistics, a program over smaller arrays, and a compressor."""


@cache
def ran(*args: str) -> list[tuple[str, str, str]]:
    """The cases, the ways that they were run, and what came out."""
    env = {k: v for k, v in os.environ.items() if k not in {"XLA_FLAGS", "JAX_PLATFORMS"}}
    command = [sys.executable, "-m", "tests.meshes", "--json", *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def check(name: str, found: list[tuple[str, str, str]]) -> None:
    """No way of running a case ended in an error."""
    mine = [(way, what) for case, way, what in found if case == name]
    assert mine, f"{name} was not run"
    failed = [f"{way}: {what}" for way, what in mine if what != "bits" and not what[0].isdigit()]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("name", QUICK)
def test_fault_8_explicit_axes(name: str) -> None:
    check(name, ran("--quick", *QUICK))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRANSFORMS, *FUNCTIONS])
def test_fault_8_all_on_explicit_and_auto_axes(name: str) -> None:
    check(name, ran())


def test_fault_8_a_result_lies_as_what_it_came_from() -> None:
    kernel, other = Laid(("a", "w"), (16, 8), ("x", "y")), Laid(("b", "w"), (16, 8), (None, None))
    assert layout(("0", "a", "w"), (16, 8), [other, kernel]) == ("x", "y")
    assert layout(("a", "w", "scale"), (1, 8), [kernel, other]) == (None, "y")
    assert layout(("a", "w", "u"), (16, 4), [kernel]) == ("x", None)
    assert layout(("loss",), (), [kernel]) == ()
    fields = [Laid(("w", "u"), (16, 4), ("x", None)), Laid(("w", "v"), (4, 8), (None, "y"))]
    assert layout(("w",), (16, 8), fields) == ("x", "y")
    twice = [Laid(("w", "u"), (16, 4), ("x", None)), Laid(("w", "v"), (4, 8), (None, "x"))]
    assert layout(("w",), (16, 8), twice) == ("x", None)  # a mesh axis splits one axis of an array


def test_fault_8_without_explicit_axes_nothing_changes() -> None:
    def f(p: dict[str, jax.Array]) -> jax.Array:
        return jnp.sort(p["w"].reshape(-1))

    p = {"w": jnp.ones((2, 3))}
    assert str(jax.make_jaxpr(f)(p)) == str(jax.make_jaxpr(on_any_mesh(f))(p))
