import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from tests.marks import quick
from train import data
from train.data import Augmentation, augment, channel_statistics, epoch_batches, hold_out, load, normalize


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def rows(split):
    """The examples as a sorted list of bytes, to compare sets whatever their order."""
    return sorted(bytes([label]) + image.tobytes() for image, label in zip(split.images, split.labels, strict=True))


def test_digits_are_scikit_learns_in_three_parts(digits):
    bunch = load_digits()
    everything = rows(digits.train) + rows(digits.validation) + rows(digits.test)
    scaled = [round(v * 255 / 16) for v in range(17)]
    wanted = [bytes([t, *(scaled[int(v)] for v in x)]) for x, t in zip(bunch.data, bunch.target, strict=True)]
    assert sorted(everything) == sorted(wanted)
    assert digits.train.images.dtype == np.uint8
    assert digits.train.labels.dtype == np.int32
    assert digits.train.images.max() == 255


def test_digits_splits_are_stratified(digits):
    whole = np.bincount(load_digits().target)
    for split, share in ((digits.train, 0.6), (digits.validation, 0.15), (digits.test, 0.25)):
        assert np.abs(np.bincount(split.labels) - share * whole).max() <= 1


def test_the_seed_chooses_validation_and_never_test(digits):
    again, other = load("digits"), load("digits", seed=1)
    assert np.array_equal(again.train.images, digits.train.images)
    assert np.array_equal(other.test.images, digits.test.images)
    assert rows(other.validation) != rows(digits.validation)


def test_a_split_is_read_only(digits):
    with pytest.raises(ValueError, match="read-only"):
        digits.train.images[0] = 0


def test_statistics_are_those_of_train(digits):
    x = digits.train.images / 255
    np.testing.assert_allclose(digits.mean, x.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(digits.std, x.std((0, 1, 2)), rtol=1e-12)


def test_statistics_of_three_channels_in_more_than_one_part():
    x = np.random.default_rng(0).integers(0, 256, (5000, 3, 2, 3), np.uint8) // np.array([1, 2, 3], np.uint8)
    mean, std = channel_statistics(x)
    np.testing.assert_allclose(mean, (x / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (x / 255).std((0, 1, 2)), rtol=1e-12)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'mnist'; there are digits, fashion_mnist, cifar10"):
        load("mnist")


def test_data_folder_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXCOMP_DATA", str(tmp_path))
    assert data.default_data_dir() == tmp_path
    monkeypatch.delenv("JAXCOMP_DATA")
    assert data.default_data_dir().parts[-3:] == (".cache", "jaxcomp", "data")


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


def draws_by_search(before, after, how):
    """For each image, the only ``(dy, dx, flipped)`` that numpy's pad, crop and flip need to make ``after``."""
    n, h, w, _ = before.shape
    s = how.shift
    mode = {"reflect": "reflect", "zero": "constant"}[how.fill]
    padded = np.pad(before, ((0, 0), (s, s), (s, s), (0, 0)), mode=mode)
    found = []
    for i in range(n):
        hits = []
        for dy in range(-s, s + 1):
            for dx in range(-s, s + 1):
                crop = padded[i, s + dy : s + dy + h, s + dx : s + dx + w]
                hits += [(dy, dx, f) for f, y in ((0, crop), (1, crop[:, ::-1])) if np.array_equal(y, after[i])]
        assert len(hits) == 1, f"image {i}: {hits}"
        found += hits
    return found


@pytest.mark.parametrize("dtype", quick([np.uint8, np.float32], np.uint8))
@pytest.mark.parametrize("how", [*data.AUGMENTATIONS.values(), Augmentation(3, False, "reflect")], ids=str)
def test_augment_is_pad_crop_flip(how, dtype):
    # Wider than two shifts and one pixel: else a mirrored border can make a flip and a shift look the same.
    x = np.random.default_rng(0).integers(1, 256, (400, 12, 10, 2)).astype(dtype)
    y = jax.jit(augment, static_argnums=2)(jax.random.key(0), x, how)
    assert y.dtype == dtype
    draws = np.array(draws_by_search(x, np.asarray(y), how))
    side = 2 * how.shift + 1
    seen = {tuple(d) for d in draws[:, :2]}
    assert len(seen) > 0.9 * side**2 * (1 - np.exp(-400 / side**2))
    assert abs(draws[:, 2].mean() - (0.5 if how.flip else 0)) < 0.1


def test_augment_follows_its_key_only():
    x = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)
    how, jitted = Augmentation(2, True, "zero"), jax.jit(augment, static_argnums=2)
    eager = augment(jax.random.key(1), jnp.asarray(x), how)
    assert np.array_equal(eager, jitted(jax.random.key(1), x, how))
    assert not np.array_equal(eager, jitted(jax.random.key(2), x, how))


def test_augment_of_nothing_is_the_identity():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 5, 2)), jnp.float32)
    same = jax.jit(augment, static_argnums=2)(jax.random.key(0), x, Augmentation(0, False, "reflect"))
    assert np.array_equal(same, x)


def test_augment_refuses_to_reflect_more_than_the_image():
    with pytest.raises(ValueError, match="shift 4 needs images larger than that to reflect, got 4 x 8"):
        augment(jax.random.key(0), jnp.zeros((1, 4, 8, 1)), Augmentation(4, False, "reflect"))
    with pytest.raises(ValueError, match="shift must be at least 0"):
        Augmentation(-1, False, "zero")
    with pytest.raises(ValueError, match="fill must be 'reflect' or 'zero', got 'edge'"):
        Augmentation(1, False, "edge")


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-8)])
def test_normalize_against_float64(dtype, bound):
    x = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.25, 0.3)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        y = jax.jit(normalize, static_argnums=(1, 2, 3))(x, mean, std, dtype)
    assert y.dtype == dtype
    wanted = (x / 255 - mean) / np.array(std)
    assert (np.abs(np.asarray(y, np.float64) - wanted) <= bound * np.maximum(np.abs(wanted), 1)).all()


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5, 0.5)), ((0.5, 0.5), (0.5, 0.0)), ((0.5,), (1.0,))])
def test_normalize_refuses(mean, std):
    with pytest.raises(ValueError, match="wanted 2 means and positive stds"):
        normalize(jnp.zeros((1, 2, 2, 2), jnp.uint8), mean, std)
