"""Bars: shown to those who look, after a while, and gone at the end; nothing at all elsewhere."""

from __future__ import annotations

import io
import sys
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jaxcomp as jc
from jaxcomp.core import progress as module
from jaxcomp.core.progress import each, progress, watched
from jaxcomp.trace import calibrate_over, merge_all


class Screen(io.StringIO):
    """A terminal that keeps what it was sent, and says when the first of it came."""

    def __init__(self) -> None:
        super().__init__()
        self.lit = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        done = super().write(text)
        if text.strip():
            self.lit.set()
        return done


@pytest.fixture
def screen(monkeypatch):
    """What bars see as the standard error output: a terminal, on which they appear at once."""
    shown = Screen()
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    # Not sys.stderr itself: pytest puts its own there before the test's body runs.
    monkeypatch.setattr(module, "sys", SimpleNamespace(stderr=shown, modules=sys.modules))
    console = Console(file=shown, width=100)
    monkeypatch.setattr(module, "_console", lambda: console)
    monkeypatch.setattr(module, "DELAY", 0.0)
    assert watched()
    return shown


def test_a_bar_is_shown_and_removed(screen):
    out = sys.stdout
    with progress("sorting [all]", total=4) as advance:
        assert screen.lit.wait()
        assert sys.stdout is out, "nothing process-wide changes"
        advance(2)
    text = screen.getvalue()
    assert "sorting [all]" in text, "what is in brackets is no markup"
    assert text.endswith("\x1b[1A\x1b[2K"), "the line is taken away"
    assert "\x1b[?25h" in text, "the cursor is back"


def test_work_of_unknown_length_and_bars_in_bars(screen):
    with progress("outer"):
        assert screen.lit.wait()
        screen.lit.clear()
        with progress("inner", total=1):
            while "inner" not in screen.getvalue():
                screen.lit.wait()
                screen.lit.clear()
    assert screen.getvalue().endswith("\x1b[2K")


def test_short_work_is_not_shown(screen, monkeypatch):
    monkeypatch.setattr(module, "DELAY", 3600.0)
    with progress("blink", total=1) as advance:
        advance(1)
    assert screen.getvalue() == ""


def test_no_thread_is_left_and_errors_pass(screen):
    before = threading.active_count()

    def work() -> None:
        with progress("failing", total=2):
            assert screen.lit.wait()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        work()
    assert screen.getvalue().endswith("\x1b[2K")
    assert threading.active_count() <= before + 1  # a cancelled timer may still be leaving


@pytest.mark.parametrize("kind", ["pipe", "dumb", "none"])
def test_quiet_where_nobody_looks(screen, monkeypatch, kind):
    if kind == "pipe":
        monkeypatch.setattr(screen, "isatty", lambda: False)
    elif kind == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    else:
        monkeypatch.setattr(module.sys, "stderr", None)
    assert not watched()
    with progress("quiet", total=1) as advance:
        advance(1)
    assert each(lambda path, x: path + x, {"a": "b"}, "quiet") == {"a": "ab"}
    assert screen.getvalue() == ""


def test_each_waits_for_arrays_and_takes_tracers(screen):
    double = lambda path, x: x * 2  # noqa: E731
    assert each(double, {"a": jnp.ones(())}, "doubling")["a"] == 2
    assert jax.jit(lambda x: each(double, {"a": x}, "doubling")["a"])(jnp.ones(())) == 2


@pytest.fixture
def told(screen, monkeypatch):
    """The names and totals of the bars there were."""
    names: list[tuple[str, float | None]] = []
    real = module._Bar
    monkeypatch.setattr(module, "_Bar", lambda name, total: (names.append((name, total)), real(name, total))[1])
    return names


WEIGHTS = {"kernel": np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)}


def test_files_say_how_far_they_are(told, tmp_path):
    jc.save(tmp_path / "w.safetensors", WEIGHTS)
    jc.load(tmp_path / "w.safetensors")
    assert told == [("save: packing", None), ("save: writing", 8 * 4 * 4), ("load", None)]


@pytest.mark.slow
def test_methods_say_how_far_they_are(told):
    params = jax.tree.map(jnp.asarray, WEIGHTS)
    jc.share(4).init(params)
    jc.factorization.choose_ranks(params, jc.factorization.Energy(0.5))
    jc.sharing.share_vectors(2, size=2, key=jax.random.key(0)).init(params)
    assert told == [("share: k-means", 1), ("low_rank: ranks", 1), ("share_vectors: k-means", 1)]


def test_calibration_over_batches_is_that_of_each_merged():
    fn = lambda p, x, y: (x + y) @ p["a"]  # noqa: E731
    params, rng = {"a": jnp.eye(2)}, np.random.default_rng(0)
    batches = [tuple(jnp.asarray(rng.normal(size=(3, 2)), jnp.float32) for _ in range(2)) for _ in range(3)]
    found = calibrate_over(fn)(params, iter(batches))
    wanted = merge_all(*[jc.calibrate(fn)(params, *batch) for batch in batches])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, wanted))
    with pytest.raises(ValueError, match=r"calibrate_over: there is no batch; give an iterable"):
        calibrate_over(fn)(params, [])
