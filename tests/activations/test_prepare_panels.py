"""Which weights of dots ``prepare`` lays out in panels, and which row by row."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import pytest

import jaxcomp as jc
from jaxcomp.kernels import Prepared, PreparedPanels, llvm_panels
from tests.activations.test_prepare_kernels import line, normal, tree_of

pytestmark = pytest.mark.skipif(bool(llvm_panels.refusal_of_codes()), reason=str(llvm_panels.refusal_of_codes()))
PREPARE = sys.modules["jaxcomp.kernels.prepare"]


def leaf_of(tree, x):
    return jc.prepare(tree, line, x)["w"]


def test_few_rows_are_for_packed_bytes() -> None:
    tree, x = tree_of(line)
    assert isinstance(leaf_of(tree, x[:15]), Prepared)
    assert isinstance(leaf_of(tree, x[:16]), PreparedPanels)


@pytest.mark.parametrize(
    ("grid", "per"),
    [
        (jc.Int(8, symmetric=False), jc.Channels()),
        (jc.Int(4), jc.Groups(25)),
        (jc.quantization.NF4(), jc.Channels()),
    ],
    ids=["zero points", "groups", "a table"],
)
def test_what_panels_do_not_hold_is_packed(grid, per) -> None:
    tree, x = tree_of(line, grid, per=per)
    assert isinstance(leaf_of(tree, x), Prepared)


def test_a_weight_for_each_matrix_is_packed() -> None:
    def experts(p, x):
        return jnp.einsum("ebd,edf->ebf", x, p["w"])

    params, x = {"w": normal(3, 50, 37)}, normal(3, 70, 50)
    tree = jc.quantize(jc.Int(4), roles=jc.roles(experts)(params, x)).apply((), params)
    assert isinstance(jc.prepare(tree, experts, x)["w"], Prepared)


def test_without_avx2_it_is_packed(monkeypatch) -> None:
    tree, x = tree_of(line)
    monkeypatch.setattr(llvm_panels, "features", lambda: frozenset({"sse4.2"}))
    assert isinstance(leaf_of(tree, x), Prepared)


def test_a_tree_that_lies_on_another_kind_of_device_is_packed(monkeypatch) -> None:
    tree, x = tree_of(line)
    assert PREPARE.platforms_of(tree["w"]) == {"cpu"}
    assert isinstance(jax.eval_shape(lambda: leaf_of(tree, x)), PreparedPanels)
    monkeypatch.setattr(PREPARE, "platforms_of", lambda leaf: {"cuda"})
    assert isinstance(leaf_of(tree, x), Prepared)
