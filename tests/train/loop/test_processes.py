"""What processes say to each other and decide by it: all of them the same, whichever of them it came to."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from tests.train.signals import as_in_a_terminal  # noqa: F401 - a fixture
from train.data.order import epoch_batches
from train.data.sets import Split
from train.errors import RunError, Stopped, ToldError
from train.loop.evaluate import BATCH, accuracy
from train.loop.joining import lost
from train.loop.mesh import Mesh
from train.loop.processes import SAID, Processes, digest, line_of, said_by, share_of
from train.loop.stopping import LAG, Stop


class Exchange:
    """As many threads as there are processes, which gather as processes do: each waits for what all say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.count, self.local = count, threading.local()
        self.barrier, self.lines = threading.Barrier(count), [np.zeros(0)] * count
        monkeypatch.setattr(multihost_utils, "process_allgather", self.gather)

    def gather(self, line: np.ndarray) -> np.ndarray:
        self.lines[self.local.index] = line
        self.barrier.wait()
        found = np.stack(self.lines)
        self.barrier.wait()
        return found

    def run(self, act: Callable[[Processes], object], signals: dict[int, int] | None = None) -> list[object]:
        """What each process gives, or what it raises; to some a signal came."""

        def one(index: int) -> object:
            self.local.index = index
            stop = Stop(lambda number: number or 0)
            stop.asked = (signals or {}).get(index)
            try:
                return act(Processes(self.count, index, stop))
            except Exception as e:
                return e
            except Stopped as e:
                return e

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))


def test_only_the_first_does_it_and_all_know_what_it_gave(monkeypatch) -> None:
    did: list[int] = []

    def act(processes: Processes) -> object:
        return processes.first(lambda: [did.append(processes.index), 0.1 + 0.2, "Größe"])

    assert Exchange(monkeypatch, 3).run(act) == [[None, 0.1 + 0.2, "Größe"]] * 3
    assert did == [0]


@pytest.mark.parametrize("failing", [0, 2])
def test_what_ends_one_ends_all_by_its_words(monkeypatch, failing) -> None:
    def act(processes: Processes) -> object:
        def step() -> None:
            if processes.index == failing:
                raise OSError("no space left")

        return processes.together(step)

    ended = Exchange(monkeypatch, 3).run(act)
    assert all(type(e) is ToldError for e in ended)
    assert [str(e) for e in ended] == [
        "no space left" if i == failing else f"process {failing}: no space left" for i in range(3)
    ]


def test_a_signal_to_one_ends_all_at_the_same_place(monkeypatch) -> None:
    ended = Exchange(monkeypatch, 3).run(lambda p: p.together(lambda: 1), signals={1: signal.SIGTERM})
    assert [(type(e), e.signal) for e in ended] == [(Stopped, signal.SIGTERM)] * 3


def test_sums_and_bits(monkeypatch) -> None:
    exchange = Exchange(monkeypatch, 2)
    assert exchange.run(lambda p: p.total(3 + p.index)) == [7, 7]
    assert exchange.run(lambda p: p.alike("The data", {"a": np.float32([0.0]), "b": 1})) == [None, None]
    ended = exchange.run(lambda p: p.alike("The data", {"a": np.float32([-0.0 if p.index else 0.0]), "b": 1}))
    assert all(str(e).startswith("The data differ in process 1 from those in process 0; start") for e in ended)


def test_a_checksum_is_of_types_shapes_and_bits() -> None:
    x = np.arange(6, dtype=np.float32)
    others = [x.astype(np.float64), x.reshape(2, 3), x[::-1], np.concatenate([x, x]), x[:0], np.float32(0)]
    assert len({digest(y) for y in [x, *others]}) == 7
    assert digest([x, x[:2]]) != digest([x[:2], x])
    assert digest(jax.numpy.asarray(x)) == digest(x)


def test_what_is_said_comes_back_and_a_long_text_is_cut() -> None:
    for said in (None, {"test_accuracy": 1 / 3, "note": "µ"}, "x" * 1000):
        assert said_by(line_of(said, 15)) == (said, 15)
    text, number = said_by(line_of("é" * SAID, None))
    assert text == "é" * (SAID // 8) + "…"
    assert number is None
    with pytest.raises(RunError, match=r"bytes are to be told to other processes, and there is room for 4096"):
        line_of(["x" * SAID], None)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_batch_of_a_split_is_judged_once(count, monkeypatch) -> None:
    """The last one is padded, and what pads it is not counted, however many processes there are."""
    n = 4 * BATCH + 37
    split = Split(np.arange(n, dtype=np.int64).reshape(n, 1, 1, 1), np.zeros(n, np.int32))
    judged: list[int] = []

    def predict(params, stats, images) -> np.ndarray:
        assert images.shape == (BATCH, 1, 1, 1)
        judged.extend(images[:, 0, 0, 0])
        return np.where(images[:, 0, 0, 0] % 3 == 0, 0, 1)  # padding would be right

    found = Exchange(monkeypatch, count).run(lambda p: accuracy(predict, {}, {}, split, p))
    assert found == [len(range(0, n, 3)) / n] * count
    assert sorted(i for i in judged if i) == list(range(1, n))


def test_what_falls_to_each_is_all_of_it() -> None:
    for count in (1, 2, 5, 9):
        shares = [share_of(range(7), Processes(count, i)) for i in range(count)]
        assert sorted(x for share in shares for x in share) == list(range(7))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Array(SimpleNamespace):
    """An array that says which of its rows were read."""

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.read.extend(rows)
        return self.values[rows]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_process_reads_its_share_of_the_batches_of_one(count, monkeypatch) -> None:
    """Put together, the shares are the batch in the order of one process; none reads another's examples."""
    values, (batch, *_) = np.random.default_rng(0).integers(0, 256, (40, 2, 2, 1)), epoch_batches(3, 1, 40, 8)
    parts = []
    for index in range(count):
        own = slice(index * 8 // count, (index + 1) * 8 // count)

        def take(shape, sharding, ask, own=own) -> np.ndarray:
            assert shape[0] == 8
            return ask((own,))

        monkeypatch.setattr(jax, "make_array_from_callback", take)
        images = Array(values=values, shape=values.shape, read=[])
        feed = Mesh(SimpleNamespace(is_fully_addressable=False), SimpleNamespace(), count).feed(
            SimpleNamespace(images=images, labels=np.arange(40))
        )
        got, labels, indices = feed(batch)
        assert indices is None
        np.testing.assert_array_equal(images.read, batch[own])
        np.testing.assert_array_equal(labels, batch[own])
        parts.append(got)
    np.testing.assert_array_equal(np.concatenate(parts), values[batch])


def voting(signals: dict[int, tuple[int, int]], count: int, steps: int) -> list[object]:
    """Processes that vote at every step, some of which get ``(step, signal)``: at which step each stops, and why."""
    ballots, barrier = [[0] * count for _ in range(steps)], threading.Barrier(count)

    def one(index: int) -> object:
        left = iter(ballots)

        def vote(number: int | None) -> int:
            ballot = next(left)
            ballot[index] = number or 0
            barrier.wait()
            return max(ballot)

        stop = Stop(vote)
        for step in range(steps):
            if signals.get(index, (-1, 0))[0] == step:
                stop.asked = signals[index][1]
            if stop.now():
                return step, stop.agreed
        return None

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.mark.parametrize(
    ("signals", "wanted"),
    [
        ({}, [None] * 3),
        ({1: (3, signal.SIGTERM)}, [(3 + LAG, signal.SIGTERM)] * 3),
        ({0: (3, signal.SIGINT), 2: (4, signal.SIGTERM)}, [(3 + LAG, signal.SIGINT)] * 3),
        ({0: (3, signal.SIGINT), 2: (3, signal.SIGTERM)}, [(3 + LAG, signal.SIGTERM)] * 3),
        ({2: (9, signal.SIGTERM)}, [None] * 3),  # its vote is not counted here
    ],
)
def test_all_stop_at_the_same_step_for_the_same_reason(signals, wanted) -> None:
    assert voting(signals, 3, 10) == wanted


def test_within_a_training_it_votes_at_each_step_and_counts_two_later() -> None:
    given: list[int | None] = []

    def vote(number: int | None) -> int:
        given.append(number)
        return signal.SIGTERM if len(given) == 3 else 0  # another process was asked

    stop, seen = Stop(vote), []
    with pytest.raises(Stopped, match=r"stopped by SIGTERM\."), stop.at_steps():
        seen.extend(stop.now() for _ in range(6))
    assert seen == [False, False, False, False, True, True]
    assert given == [None] * 6


def test_the_last_votes_are_counted_when_the_training_ends() -> None:
    stop = Stop(lambda _: signal.SIGINT)
    with pytest.raises(Stopped, match=r"stopped by SIGINT\."), stop.at_steps():
        assert [stop.now(), stop.now()] == [False, False]


def test_a_signal_between_trainings_waits_for_the_others() -> None:
    stop = Stop(lambda number: number or 0)
    with stop.signals():
        signal.raise_signal(signal.SIGTERM)
        assert (stop.asked, stop.agreed) == (signal.SIGTERM, None)
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # the second one ends it, in C++ too


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer\nmore"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("axis 3 is out of bounds"), False),
        (KeyError("Gloo"), False),
    ],
)
def test_how_the_end_of_another_process_is_known(error, known) -> None:
    found = lost(error)
    assert (found is not None) == known
    assert found is None or "\n" not in found
