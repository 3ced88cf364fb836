"""Recipes leave open what their parts leave open."""

from __future__ import annotations

import inspect
from functools import partial

import jax.numpy as jnp
import pytest

import jaxcomp as jc
from jaxcomp import recipes
from tests.marks import quick


def slots(f) -> set[str]:
    return {name for name, p in inspect.signature(f).parameters.items() if p.kind == p.KEYWORD_ONLY}


def test_fault_15_formats_pass_every_slot_of_quantize() -> None:
    """A format says the grid and what shares a scale; the rest is open."""
    assert set(recipes.Slots.__annotations__) == slots(jc.quantize) - {"per"}


def test_fault_15_deep_compression_takes_what_both_of_its_parts_take() -> None:
    """But ``gradient``, which means masks in one and tables in the other; a slot of one part is said by a chain."""
    assert slots(recipes.deep_compression) == (slots(jc.prune) & slots(jc.share)) - {"gradient"}


RECIPES = {
    "deep_compression": partial(recipes.deep_compression, 0.5, 2),
    "mx": recipes.mx,
    "nvfp4": recipes.nvfp4,
    "nf4": recipes.nf4,
}


@pytest.mark.parametrize("name", quick(RECIPES, "mx"))
def test_fault_15_recipes_take_where(name) -> None:
    params = {"a": jnp.arange(1.0, 129).reshape(64, 2), "b": jnp.arange(1.0, 129).reshape(64, 2)}
    t = RECIPES[name](where="a")
    seen = t.apply(t.init(params), params)
    assert seen["b"] is params["b"]
    assert seen["a"] is not params["a"]
