"""Fault 12: every primitive that jax.numpy, jax.nn, jax.lax and flax's layers bind, and which of them have no rule."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend import core

from jaxcomp.structure import channel_groups
from jaxcomp.structure.labelling import RULES
from jaxcomp.trace import nested, walk
from jaxcomp.trace.control_flow import rebuilt
from tests.trace import vocabulary
from tests.trace.vocabulary import CALLS, LINEN, MODULES, NNX, NO_LINEN, NO_NNX, NOT_TRACED, equations, functions

WITHOUT_RULE = {
    "custom_linear_solve": "a solver: every index of a solution depends on all of the system, and its inner programs "
    "are tied to the full size",
    "scaled_dot": "a product of blocks of 32 that share a scale: no channel can go without its block's others",
    "scaled_matmul_wrapper": "as scaled_dot, on GPUs that have it",
}
"""Primitives that public functions bind and for which ``channel_groups`` has no rule: what they touch stays, and is
named in ``groups.unknown``."""

NOT_OPENED = {
    "custom_linear_solve": "it is differentiated as a solution, not as the steps to it",
    "reduce": "its program combines two elements",
    "reduce_window": "its program combines two elements",
    "scatter": "its program combines two elements",
    "scatter-add": "its program combines two elements",
    "scatter-max": "its program combines two elements",
    "scatter-min": "its program combines two elements",
    "scatter-mul": "its program combines two elements",
    "scatter-sub": "its program combines two elements",
}
"""Primitives with programs inside that the interpreter runs whole."""


@pytest.fixture(autouse=True)
def jax_defaults():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@cache
def programs(where: str) -> dict[str, core.ClosedJaxpr]:
    """The programs of a module's public functions, or of a library's layers."""
    makers: dict[str, Callable[[str], core.ClosedJaxpr]]
    makers = {"linen": vocabulary.linen_program, "nnx": vocabulary.nnx_program}
    if where in makers:
        return {name: makers[where](name) for name in {"linen": LINEN, "nnx": NNX}[where]}
    found = {name: vocabulary.traced(name) for name in functions(where) if name not in NOT_TRACED}
    return {name: program for name, program in found.items() if program is not None}


PLACES = (*MODULES, "linen", "nnx")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", MODULES)
def test_fault_12_every_public_function_is_called_or_it_is_said_why_not(module):
    missing = [name for name in functions(module) if name not in NOT_TRACED and name not in programs(module)]
    assert not missing, f"{', '.join(missing)}: give CALLS its arguments, or NOT_TRACED the reason."


def test_fault_12_every_layer_of_flax_is_called():
    for library, base, known in ((nn, nn.Module, {*LINEN, *NO_LINEN}), (nnx, nnx.Module, {*NNX, *NO_NNX})):
        layers = {name for name, f in vars(library).items() if isinstance(f, type) and issubclass(f, base)}
        assert layers <= known, f"{library.__name__}: {', '.join(sorted(layers - known))} is in no table."


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", PLACES)
def test_fault_12_primitives_without_a_rule_are_those_of_the_list(where):
    found: dict[str, str] = {}
    for name, program in programs(where).items():
        for eqn in equations(program.jaxpr):
            if eqn.primitive.name not in RULES and eqn.primitive.name not in WITHOUT_RULE:
                found.setdefault(eqn.primitive.name, name)
    assert not found, f"no rule, and no reason in WITHOUT_RULE: {found}"


@pytest.mark.filterwarnings("ignore")
def test_fault_12_the_list_of_primitives_without_a_rule_is_no_longer_than_it_must_be():
    bound = {e.primitive.name for where in PLACES for p in programs(where).values() for e in equations(p.jaxpr)}
    assert WITHOUT_RULE.keys() <= bound - RULES.keys()
    assert len(WITHOUT_RULE) <= 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", PLACES)
def test_fault_12_programs_that_the_interpreter_does_not_open_are_those_of_the_list(where):
    for name, program in programs(where).items():
        for eqn in equations(program.jaxpr):
            if nested.inner_jaxprs(eqn) and not nested.is_open(eqn):
                assert eqn.primitive.name in NOT_OPENED, f"{name} binds {eqn.primitive.name}"


def interpreted(jaxpr, part, values):
    """Runs a program by the walk, every equation that holds programs built again."""

    def equation(eqn, location, operands):
        return rebuilt(eqn, operands, interpreted) if nested.is_open(eqn) else nested.bind(eqn, operands)

    return walk.run(jaxpr, values, equation, constant=lambda value: value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", PLACES)
def test_fault_12_every_program_can_be_built_again(where):
    for name, program in programs(where).items():
        again = jax.make_jaxpr(lambda *xs, program=program: interpreted(program, "", xs))(*program.in_avals)
        wanted = [(getattr(a, "shape", None), getattr(a, "dtype", None)) for a in program.out_avals]
        assert [(getattr(a, "shape", None), getattr(a, "dtype", None)) for a in again.out_avals] == wanted, name


def test_the_tables_name_what_there_is():
    have = {f"{module}.{name}" for module, found in MODULES.items() for name in vars(found)}
    newer = {"lax.polynomial", "numpy.top_k", "lax.empty", "lax.stack", "lax.unstack"}
    assert {name for name in CALLS if name not in have} <= newer
    assert not CALLS.keys() & NOT_TRACED.keys()


def test_a_print_in_a_model_freezes_nothing():
    def fn(p, x):
        h = jnp.tanh(x @ p["up"])
        jax.debug.print("largest {}", h.max())
        jax.debug.callback(lambda h: None, h)
        return h @ p["down"]

    groups = channel_groups(fn)({"up": jnp.ones((3, 6)), "down": jnp.ones((6, 2))}, jnp.ones((4, 3)))
    assert [g.units for g in groups] == []  # the maximum runs over them
    assert not groups.unknown
