import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.marks import quick
from train.data.images import Augmentation, augment, channel_statistics, normalize
from train.data.sets import AUGMENTATIONS


def test_statistics_of_three_channels_in_more_than_one_part():
    x = np.random.default_rng(0).integers(0, 256, (5000, 3, 2, 3), np.uint8) // np.array([1, 2, 3], np.uint8)
    mean, std = channel_statistics(x)
    np.testing.assert_allclose(mean, (x / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (x / 255).std((0, 1, 2)), rtol=1e-12)


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
@pytest.mark.parametrize("how", [*AUGMENTATIONS.values(), Augmentation(3, False, "reflect")], ids=str)
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
