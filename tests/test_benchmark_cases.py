"""The GPU's benchmark keeps what it has: a case that fails, or that there is no time for, is a row with the reason."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from tests.benchmarks.gpu import sections
from tests.benchmarks.gpu_cases import Compiled, Setting, run_cases


def broken() -> Compiled:
    """A case that cannot be built."""
    raise NotImplementedError("UNIMPLEMENTED: no such\n  convolution")


def test_a_case_that_fails_is_a_row_and_the_others_are_measured() -> None:
    ones = jnp.ones(8)
    makers = {
        "base": lambda: Compiled(lambda x: x * 2, ones),
        "same": lambda: Compiled(lambda x: x + x, ones),
        "other": lambda: Compiled(lambda x: x * 9, ones),
        "broken": broken,
    }
    ran = run_cases(makers, Setting.lasting(60, toy=True))
    rows = [ran.speed(name, "base", target=">= 1", compared=True) for name in makers]
    rows += [ran.counted(name, "temporaries", lambda case: case.temporaries()) for name in ("same", "broken")]
    why = "NotImplementedError: UNIMPLEMENTED: no such convolution"
    assert [row.error for row in rows] == ["", "", "wrong: 350.0% off the result of base", why, "", why]
    assert rows[1].detail.endswith("0.0% off")
    written = json.loads(json.dumps(ran.report("title", rows, "base").json(), allow_nan=False))
    assert [row["ratio"] is None for row in written["rows"]] == [False, False, True, True, False, True]


def test_what_there_is_no_time_for_is_not_begun() -> None:
    ran = run_cases({"base": broken}, Setting.lasting(-1, toy=False))
    row = ran.speed("base", "base", target=">= 1")
    assert row.error.startswith("TimeoutError: not begun: the time of the whole benchmark was over")
    assert row.met is False
    assert ran.report("title", [row], "base").baseline == "base"


def test_a_section_that_is_not_there_is_named(monkeypatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    with pytest.raises(ValueError, match="gpu has no section 'dot'; there are precision, bandwidth, dots, "):
        sections("dot", toy=True)
    with pytest.raises(ValueError, match="gpu wants a GPU, and JAX sees CPUs alone; --toy runs all of it here"):
        sections("dots", toy=False)
