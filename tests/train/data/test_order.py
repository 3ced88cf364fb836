import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.order import epoch_batches, hold_out


@given(st.lists(st.integers(0, 4), max_size=60), st.floats(0, 1), st.integers(0, 2**32))
def test_hold_out_takes_its_share_of_every_class(labels, share, seed):
    labels = np.array(labels, np.int32)
    rest, held = hold_out(labels, share, seed=seed)
    assert sorted([*rest, *held]) == list(range(len(labels)))
    for c in range(5):
        assert (labels[held] == c).sum() == round(share * (labels == c).sum())


def test_hold_out_refuses_a_share_above_one():
    with pytest.raises(ValueError, match=r"share must be in 0\.\.1, got 2"):
        hold_out(np.zeros(3, np.int32), 2, seed=0)


@given(st.integers(0, 2**64), st.integers(0, 10**6), st.integers(1, 300), st.data())
def test_an_epoch_visits_each_example_at_most_once(seed, epoch, n, draw):
    batch = draw.draw(st.integers(1, n))
    indices = epoch_batches(seed, epoch, n, batch)
    assert indices.shape == (n // batch, batch)
    assert indices.dtype == np.int32
    assert len(np.unique(indices)) == indices.size
    assert set(indices.ravel()) <= set(range(n))
    assert np.array_equal(indices, epoch_batches(seed, epoch, n, batch))


def test_epochs_and_seeds_differ_and_the_order_is_fixed_for_ever():
    first = epoch_batches(0, 0, 100, 50)
    for other in (epoch_batches(0, 1, 100, 50), epoch_batches(1, 0, 100, 50)):
        assert (other != first).mean() > 0.9
    # A resumed run may use another numpy than the one it began with: these must never change.
    assert epoch_batches(0, 0, 10, 5).tolist() == [[0, 8, 9, 3, 7], [5, 1, 2, 6, 4]]
    assert epoch_batches(3, 7, 6, 3).tolist() == [[3, 0, 2], [5, 4, 1]]


def test_the_shuffle_is_uniform():
    place = np.array([np.argmax(epoch_batches(0, e, 8, 8)[0] == 0) for e in range(800)])
    counts = np.bincount(place, minlength=8)
    assert ((counts - 100) ** 2 / 100).sum() < 24.3  # chi-squared with 7 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 0, 5, 6), r"batch must be in 1\.\.5"), ((0, 0, 5, 0), "batch must be"), ((0, -1, 5, 1), "seed and epoch")],
)
def test_epoch_batches_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        epoch_batches(*arguments)
