"""Signals: at once where there is nothing to save, at the next step where there is, twice from the keyboard at once."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time

import pytest

from tests.train.signals import as_in_a_terminal  # noqa: F401 - a fixture
from train.errors import Stopped
from train.loop.stopping import Stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_outside_of_steps_a_signal_ends_the_command(number) -> None:
    with Stop().signals() as stop, pytest.raises(Stopped, match=f"stopped by {number.name}") as e, stop.at_steps():
        signal.raise_signal(number)  # the first step is not done: it may be a minute of compiling
    assert e.value.signal == number


def steps(stop: Stop, count: int, *, at: int, signals: tuple[int, ...], done: list[int]) -> None:
    """A training of so many steps, whose signals come during one of them."""
    with stop.at_steps():
        for step in range(count):
            if step == at:
                for number in signals:
                    signal.raise_signal(number)
            done.append(step)
            if stop.now():
                raise stop.stopped(f" after step {step}, which is saved")
        signal.raise_signal(signal.SIGINT)
        done.append(count)  # the last checkpoint


def test_within_steps_it_waits_for_the_end_of_the_step() -> None:
    done: list[int] = []
    twice = signal.SIGTERM, signal.SIGTERM  # to the group, and to the process
    with Stop().signals() as stop, pytest.raises(Stopped, match=r"SIGTERM after step 2, which is saved\."):
        steps(stop, 9, at=2, signals=twice, done=done)
    assert done == [0, 1, 2]


def test_after_the_last_step_it_is_raised_at_the_end() -> None:
    done: list[int] = []
    with Stop().signals() as stop, pytest.raises(Stopped, match=r"stopped by SIGINT\."):
        steps(stop, 2, at=9, signals=(), done=done)
    assert done == [0, 1, 2]


def test_the_keyboard_twice_does_not_wait() -> None:
    done: list[int] = []
    with Stop().signals() as stop, pytest.raises(Stopped, match=r"stopped by SIGINT\."):
        steps(stop, 9, at=1, signals=(signal.SIGINT, signal.SIGINT), done=done)
    assert done == [0]


def collect_and_wait(callback) -> None:
    """A signal within a callback of the garbage collection, and a second in which it may be raised after all."""
    gc.callbacks.append(callback)
    try:
        gc.collect()
        time.sleep(1)
    finally:
        gc.callbacks.remove(callback)


def test_what_is_raised_where_python_drops_it_is_raised_again(capsys) -> None:
    left = [signal.SIGTERM]

    def callback(*_: object) -> None:
        while left:
            signal.raise_signal(left.pop())

    hook = sys.unraisablehook
    with Stop().signals(), pytest.raises(Stopped, match=r"stopped by SIGTERM\."):
        collect_and_wait(callback)
    assert sys.unraisablehook is hook
    assert capsys.readouterr().err == ""


def test_what_listened_before_does_so_afterwards_and_what_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        keyboard = signal.getsignal(signal.SIGINT)
        with Stop().signals() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked is None
            assert signal.getsignal(signal.SIGINT) != keyboard
        assert signal.getsignal(signal.SIGINT) == keyboard
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_there_are_no_signals() -> None:
    raised = []

    def use() -> None:
        try:
            with Stop().signals() as stop, stop.at_steps():
                assert not stop.now()
        except BaseException as e:
            raised.append(e)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert not raised
