"""A batch in parts gives what the whole one gives; what a batch is does not depend on who holds it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from tests.processes import free_port, ran
from train.data.images import Augmentation
from train.data.order import epoch_batches
from train.data.sets import Dataset, Split, load
from train.loop.mesh import data_mesh
from train.loop.step import TrainState, init_variables, make_train_step
from train.networks.linen import build


@pytest.fixture(autouse=True)
def _as_users_run_it() -> Iterator[None]:
    """flax's and optax's own code mixes types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def small() -> Dataset:
    """Noise in three classes."""
    draw = np.random.default_rng(0)
    split = Split(draw.integers(0, 256, (480, 4, 4, 1), np.uint8), draw.integers(0, 3, 480, np.int32))
    return Dataset("small", split, split, split, 3, (0.5,), (0.3,), Augmentation(shift=1, flip=True, fill="zero"))


def steps_of(model, data, *, parts: int, steps: int, transform: jc.Transform):
    """The state after some steps, and the metrics of each."""
    mesh = data_mesh()
    optimizer = optax.sgd(0.1, momentum=0.9)
    options = {"label_smoothing": 0.1, "augmented": True, "seed": 3, "mesh": mesh, "accumulate": parts}
    step = make_train_step(model, optimizer, transform, data=data, **options)
    params, stats = init_variables(model, data, 0)
    state = TrainState(jnp.int32(0), params, stats, optimizer.init(params), transform.init(params))
    state = jax.device_put(state, mesh.copied)
    images, labels = jax.device_put((data.train.images, data.train.labels), mesh.copied)
    metrics = []
    for indices in epoch_batches(0, 0, len(data.train), 48)[:steps]:
        state, m = step(state, images, labels, mesh.place(indices))
        metrics.append(m)
    return state, np.asarray(jax.device_get(metrics))


def furthest(a, b) -> float:
    """The largest difference of two trees, by the largest value of each leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30) for x, y in pairs if x.dtype == np.float32)


@pytest.mark.parametrize(
    ("parts", "widths", "transform"),
    [
        (4, (), jc.core.identity()),
        pytest.param(4, (32,), jc.prune(0.5), marks=pytest.mark.slow),
        pytest.param(48, (32,), jc.prune(0.5), marks=pytest.mark.slow),
    ],
)
def test_parts_of_a_batch_are_the_batch(parts, widths, transform) -> None:
    data, model = small(), build("mlp", num_classes=3, widths=widths)
    whole, seen = steps_of(model, data, parts=1, steps=10, transform=transform)
    state, metrics = steps_of(model, data, parts=parts, steps=10, transform=transform)
    np.testing.assert_allclose(metrics, seen, rtol=2e-6)
    assert furthest(state, whole) < 2e-6
    assert int(state.step) == 10
    for a, b in zip(jax.tree.leaves(state.compression), jax.tree.leaves(whole.compression), strict=True):
        np.testing.assert_array_equal(a, b)  # masks


@pytest.mark.slow
def test_parts_of_a_batch_under_batch_norm() -> None:
    """Each part is normalized by its own statistics; where none came before, their means are the batch's."""
    data, model = load("digits"), build("convnet", num_classes=10, widths=(8, 16))
    identity = jc.core.identity()
    whole, _ = steps_of(model, data, parts=1, steps=1, transform=identity)
    state, metrics = steps_of(model, data, parts=2, steps=1, transform=identity)
    first = state.batch_stats[sorted(state.batch_stats)[0]], whole.batch_stats[sorted(whole.batch_stats)[0]]
    np.testing.assert_allclose(first[0]["mean"], first[1]["mean"], rtol=1e-4, atol=1e-6)
    assert np.isfinite(metrics).all()
    _, later = steps_of(model, data, parts=2, steps=20, transform=identity)
    assert later[-1, 0] < 0.8 * later[0, 0]


@pytest.mark.parametrize("devices", [1, 3])
def test_a_batch_is_cut_by_its_place_alone(devices) -> None:
    """What :meth:`Mesh.place` asks of a process for its devices, put together, is the batch."""
    from train.loop.mesh import Mesh

    (batch,) = epoch_batches(1, 2, 12, 12)
    asked = []

    def take(shape, sharding, own) -> None:
        n = shape[0] // devices
        asked.extend(own((slice(i * n, (i + 1) * n),)) for i in range(devices))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "make_array_from_callback", take)
        Mesh(SimpleNamespace(), SimpleNamespace(), devices).place(batch)
    np.testing.assert_array_equal(np.concatenate(asked), batch)


PROCESS = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from train.data.images import Augmentation
from train.data.order import epoch_batches
from train.loop.mesh import Mesh
address, count, own = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
jax.distributed.initialize(address, count, own, initialization_timeout=60)
mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec("data"))
for epoch in range(2):
    for indices in epoch_batches(5, epoch, 40, 8):
        placed = Mesh(split, NamedSharding(mesh, PartitionSpec()), len(jax.devices())).place(indices)
        for shard in placed.addressable_shards:
            print("at", epoch, shard.index[0].start or 0, *np.asarray(shard.data))
"""


@pytest.mark.slow
def test_two_processes_see_the_batches_of_one() -> None:
    command, two = ["-c", PROCESS, f"127.0.0.1:{free_port()}", "2"], "--xla_force_host_platform_device_count=2"
    ended = ran([[*command, str(i)] for i in range(2)], extra=lambda _: {"XLA_FLAGS": two})
    assert [p.code for p in ended] == [0, 0], ended
    lines = [[int(x) for x in line.split()[1:]] for p in ended for line in p.out.splitlines() if line.startswith("at ")]
    for epoch in range(2):
        wanted = epoch_batches(5, epoch, 40, 8)
        for device in range(4):
            seen = [line[2:] for line in lines if line[:2] == [epoch, 2 * device]]
            np.testing.assert_array_equal(seen, wanted[:, 2 * device : 2 * device + 2])
