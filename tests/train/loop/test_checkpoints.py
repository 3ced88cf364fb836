"""Checkpoints: what is damaged anywhere is named and the one before used; a full disk leaves the old ones."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.artifact.disk import FileError
from train.errors import RunError, TrainingError
from train.loop.checkpoints import Checkpoints, Reached
from train.loop.history import Epoch
from train.loop.saves import Saves
from train.loop.step import Metrics, TrainState

LINE = Epoch("row", 0, 4, 0.1 + 0.2, 1 / 3, 0.5, 2.0, 100.0)
PARAMS = {"a": {"kernel": np.linspace(-1, 1, 24, dtype=np.float32).reshape(6, 4), "bias": np.zeros(4, np.float32)}}


def state_of(factor: float) -> TrainState:
    """A training's state as numpy makes it: placed on the device, nothing compiled."""
    params = jax.tree.map(lambda x: x * np.float32(factor), PARAMS)
    moments = optax.ScaleByAdamState(np.int32(7), params, params)
    masks = {"a/kernel": params["a"]["kernel"] > 0}
    stats = {"mean": np.float32([0.1, np.nextafter(np.float32(1), np.float32(2))])}
    return jax.device_put(TrainState(np.int32(7), params, stats, (moments, optax.EmptyState()), masks))


def same(a: TrainState, b: TrainState) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.dtype == y.dtype for x, y in pairs)


@pytest.fixture
def two(tmp_path) -> Path:
    """A folder with the checkpoints of steps 3 and 5."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", pytest.fail)
    for step in (1, 3, 5):
        checkpoints.save(state_of(step), Reached(step / 2, [LINE], [(0.1, 0.2, 0.3)] * step), step=step)
    return tmp_path / "checkpoints"


def test_the_newest_comes_back_to_the_bit_and_two_are_kept(two) -> None:
    assert [p.name for p in sorted(two.iterdir())] == ["000000003.safetensors", "000000005.safetensors"]
    state, reached = Checkpoints(two, pytest.fail).restore(state_of(0))
    assert same(state, state_of(5))
    assert jax.tree.structure(state) == jax.tree.structure(state_of(5))
    assert reached == Reached(2.5, [LINE], [(0.1, 0.2, 0.3)] * 5)


def test_where_there_is_none_the_training_begins(tmp_path) -> None:
    like = state_of(1)
    assert Checkpoints(tmp_path / "none", pytest.fail).restore(like) == (like, Reached())


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "cut by one": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "longer": lambda data: data + b"\0",
    **{f"bit {at}": lambda data, at=at: flipped(data, at % len(data)) for at in (0, 9, 70, 300, -1, -30, -200)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_used(two, damage) -> None:
    newest, said = two / "000000005.safetensors", []
    data = DAMAGES[damage](newest.read_bytes())
    newest.write_bytes(data)
    state, reached = Checkpoints(two, said.append).restore(state_of(0))
    assert same(state, state_of(3))
    assert reached.seconds == 1.5
    (line,) = said
    assert "\n" not in line
    assert str(newest) in line
    assert line.endswith("it is now 000000005.safetensors.damaged, and 000000003.safetensors, the one before, is used.")
    assert (two / "000000005.safetensors.damaged").read_bytes() == data
    again = Checkpoints(two, pytest.fail)  # what was set aside is not counted
    again.save(state_of(4), Reached(), step=4)
    assert [p.stem for p in again.files()] == ["000000003", "000000004"]


@pytest.mark.slow
def test_no_bit_of_a_checkpoint_can_be_flipped_unseen(two) -> None:
    newest = two / "000000005.safetensors"
    data = newest.read_bytes()
    for at in range(0, len(data), 7):
        newest.write_bytes(flipped(data, at))
        said: list[str] = []
        state, _ = Checkpoints(two, said.append).restore(state_of(0))
        assert len(said) == 1, at
        assert same(state, state_of(3)), at


def test_all_damaged_and_it_begins_anew(two) -> None:
    said: list[str] = []
    for file in two.iterdir():
        file.write_bytes(b"")
    like = state_of(0)
    assert Checkpoints(two, said.append).restore(like) == (like, Reached())
    assert len(said) == 2
    assert said[1].endswith("000000003.safetensors.damaged, and there is none before it.")


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda s: s._replace(params={}), ".params['a']['bias']"),
        (lambda s: s._replace(batch_stats={"mean": jax.device_put(np.zeros(3, np.float32))}), ".batch_stats['mean']"),
        (lambda s: s._replace(step=jax.device_put(np.uint32(0))), ".step"),
    ],
)
def test_one_of_another_network_is_named(two, change, path) -> None:
    said: list[str] = []
    like = change(state_of(0))
    assert Checkpoints(two, said.append).restore(like)[0] is like
    assert f"is of another network or version, which differs in {path!r}" in said[0]


def test_another_file_of_this_package_is_no_checkpoint(two) -> None:
    said: list[str] = []
    jc.save(two / "000000009.safetensors", {"x": np.zeros(3)})
    assert same(Checkpoints(two, said.append).restore(state_of(0))[0], state_of(5))
    assert "000000009.safetensors' is of another version ('state')" in said[0]


def test_a_damaged_one_of_an_older_version_is_one_line(tmp_path) -> None:
    said: list[str] = []
    (tmp_path / "checkpoints" / "4" / "state").mkdir(parents=True)
    like = state_of(0)
    assert Checkpoints(tmp_path / "checkpoints", said.append).restore(like) == (like, Reached())
    assert len(said) == 1
    assert "checkpoints/4', a checkpoint of an older version, is damaged (" in said[0]
    assert "\n" not in said[0]


class Full:
    """A disk that takes so many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        from jaxcomp.artifact import disk

        class Limited(disk.FileIO):
            def write(self, data, /):
                nonlocal room
                if not room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                written = super().write(memoryview(data).cast("B")[:room])
                room -= written
                return written

        monkeypatch.setattr(disk, "FileIO", Limited)


@pytest.mark.parametrize("room", [0, 100, 1200])
def test_a_full_disk_is_one_line_and_the_old_ones_stay(two, monkeypatch, room) -> None:
    before = {p: p.read_bytes() for p in two.iterdir()}
    Full(monkeypatch, room)
    saves = Saves(Checkpoints(two, pytest.fail), Reached(), "joint", every=0.0, step=5)
    with pytest.raises(RunError) as e:
        saves.save_if_due(state_of(6))
    assert str(e.value) == (
        f"joint: save: cannot write {str(two / '000000005.safetensors')!r}: No space left on device; mend that, make"
        " room say, and the same command goes on from step 5."
    )
    assert {p: p.read_bytes() for p in two.iterdir()} == before


def test_a_folder_that_cannot_be_made(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match=r"save: cannot make '.*file/checkpoints': Not a directory"):
        Checkpoints(tmp_path / "file" / "checkpoints", pytest.fail).save(state_of(1), Reached(), step=1)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path) -> None:
    saves = Saves(Checkpoints(tmp_path, pytest.fail), Reached(), "joint", every=1e9, step=5)
    for loss in (1.0, float("nan")):
        saves.count(Metrics(*jax.device_put([jnp.float32(loss)] * 3)))
    with pytest.raises(TrainingError, match=r"joint: loss is nan at step 6 .epoch 0.*checkpoint, of step 5, is from"):
        saves.save(state_of(1))
    assert not list(tmp_path.iterdir())
