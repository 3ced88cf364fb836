"""Data sets as uint8 arrays in memory, the order of batches as a pure function of (seed, epoch), augmentation in jit.

>>> data = load("digits")
>>> data.train.images.shape, data.validation.images.shape, data.test.images.shape
((1078, 8, 8, 1), (269, 8, 8, 1), (450, 8, 8, 1))
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped, UInt8

NAMES = ("digits", "fashion_mnist", "cifar10")

_Arrays = dict[str, np.ndarray]


class DataError(RuntimeError):
    """A data set cannot be had; the message says which, why, and what to do."""


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What :func:`augment` draws for each image: a shift of up to ``shift`` pixels, and a flip left to right or none.

    ``fill`` says what moves in at the border: a mirror image of the picture, or zeros (black, before normalization).
    """

    shift: int
    flip: bool
    fill: Literal["reflect", "zero"]

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ValueError(f"Augmentation: shift must be at least 0 pixels, got {self.shift}")
        if self.fill not in ("reflect", "zero"):
            raise ValueError(f"Augmentation: fill must be 'reflect' or 'zero', got {self.fill!r}")


AUGMENTATIONS = {
    "digits": Augmentation(shift=1, flip=False, fill="zero"),
    "fashion_mnist": Augmentation(shift=2, flip=True, fill="zero"),
    "cifar10": Augmentation(shift=4, flip=True, fill="reflect"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """One split: ``images`` uint8 [n, height, width, channels] and ``labels`` int32 [n], both read-only."""

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        self.images.flags.writeable = self.labels.flags.writeable = False

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory. ``mean`` and ``std`` are the train split's, one a channel, of values scaled to 0..1."""

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation


def default_data_dir() -> Path:
    """The folder of prepared data sets: ``$JAXCOMP_DATA``, else ``~/.cache/jaxcomp/data``."""
    return Path(os.environ.get("JAXCOMP_DATA") or "~/.cache/jaxcomp/data").expanduser()


def load(name: str, *, data_dir: str | Path | None = None, seed: int = 0) -> Dataset:
    """A data set by name: ``digits`` (bundled with scikit-learn), ``fashion_mnist`` or ``cifar10``.

    The test split is the data set's own; ``digits`` has none, so a fixed, stratified quarter is set aside. The
    validation split is held out of train, the same number from each class, chosen by ``seed``: a fifth of
    ``digits`` without its test split, a twelfth of ``fashion_mnist``, a tenth of ``cifar10`` (5000 images each).

    The first load of ``fashion_mnist`` or ``cifar10`` prepares it through TFDS (see :mod:`train.prepare`) and keeps
    the decoded arrays in ``<data_dir>/<name>.npz``. A damaged file of those is rebuilt, never used.

    Raises:
      ValueError: no data set has this name.
      DataError: the data is neither prepared, nor at hand, nor downloadable.
    """
    if name not in NAMES:
        raise ValueError(f"load: no data set is called {name!r}; there are {', '.join(NAMES)}")
    arrays = _digits() if name == "digits" else _cached(name, Path(data_dir) if data_dir else default_data_dir())
    share = {"digits": 1 / 5, "fashion_mnist": 1 / 12, "cifar10": 1 / 10}[name]
    rest, held = hold_out(arrays["train_labels"], share, seed=seed)
    train = Split(arrays["train_images"][rest], arrays["train_labels"][rest])
    mean, std = channel_statistics(train.images)
    return Dataset(
        name=name,
        train=train,
        validation=Split(arrays["train_images"][held], arrays["train_labels"][held]),
        test=Split(arrays["test_images"], arrays["test_labels"]),
        num_classes=10,
        mean=mean,
        std=std,
        augmentation=AUGMENTATIONS[name],
    )


def _digits() -> _Arrays:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    train, test = hold_out(labels, 1 / 4, seed=0)
    return {
        "train_images": images[train],
        "train_labels": labels[train],
        "test_images": images[test],
        "test_labels": labels[test],
    }


def _cached(name: str, data_dir: Path) -> _Arrays:
    path = data_dir / f"{name}.npz"
    try:
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in ("train_images", "train_labels", "test_images", "test_labels")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # absent or damaged; numpy's format has a checksum of each array
    from train.prepare import prepare  # TFDS takes a second to import: only where it is needed

    decoded = prepare(name, data_dir)
    _write_npz(path, decoded)
    return decoded


def _write_npz(path: Path, arrays: _Arrays) -> None:
    """Write ``arrays`` so that ``path`` is either whole or as it was."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            np.savez(f, **arrays)  # type: ignore[arg-type]
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise DataError(f"the decoded arrays cannot be written to {path}: {e}") from e
    finally:
        part.unlink(missing_ok=True)


def hold_out(labels: np.ndarray, share: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices ``(rest, held)``: of each class, ``round(share * its size)`` examples drawn by ``seed`` are held.

    >>> rest, held = hold_out(np.array([0, 0, 0, 0, 1, 1, 1, 1]), 0.25, seed=0)
    >>> len(rest), len(held)
    (6, 2)

    Raises:
      ValueError: ``share`` is outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"hold_out: share must be in 0..1, got {share}")
    held = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        (members,) = np.nonzero(labels == c)
        order = _permutation(len(members), seed, int(c))
        held[members[order[: round(share * len(members))]]] = True
    return np.nonzero(~held)[0], np.nonzero(held)[0]


def _permutation(n: int, *entropy: int) -> np.ndarray:
    """A permutation of 0..n-1 drawn from the integers ``entropy``, each at least 0.

    It sorts the raw words of a counter-based generator: numpy keeps that stream fixed for ever, but not the
    output of ``Generator.permutation`` (NEP 19).
    """
    words = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(n)
    return np.argsort(words, kind="stable")


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 [n, h, w, c], in units where 255 is 1.

    The sums are of integers, so they are exact and do not depend on the order.
    """
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), 4096):  # in parts: bincount widens to int64
        for c in range(images.shape[-1]):
            counts[c] += np.bincount(images[start : start + 4096, ..., c].ravel(), minlength=256)
    values, n = np.arange(256), counts[0].sum()
    mean = counts @ values / n
    std = np.sqrt(counts @ values**2 / n - mean**2)
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def epoch_batches(seed: int, epoch: int, n: int, batch: int) -> Int[np.ndarray, "batches batch"]:
    """Indices of the batches of one epoch: ``range(n)`` shuffled and cut into rows of ``batch``, the rest dropped.

    A pure function of its arguments: a run that resumes in any step of any epoch sees the batches that it would
    have seen. Over the epochs, what is dropped differs.

    >>> epoch_batches(0, 1, 10, 4).shape
    (2, 4)

    Raises:
      ValueError: ``seed`` or ``epoch`` is negative, or a batch is larger than the split.
    """
    if seed < 0 or epoch < 0:
        raise ValueError(f"epoch_batches: seed and epoch must be at least 0, got {seed} and {epoch}")
    if not 1 <= batch <= n:
        raise ValueError(f"epoch_batches: batch must be in 1..{n}, the size of the split, got {batch}")
    order = _permutation(n, seed, epoch).astype(np.int32)
    return order[: n // batch * batch].reshape(-1, batch)


def augment(key: PRNGKeyArray, images: Shaped[Array, "n h w c"], how: Augmentation) -> Shaped[Array, "n h w c"]:
    """Each image shifted and flipped at random, by its own draw; any dtype, and fastest on uint8. Use it in jit.

    It equals padding by ``how.shift`` pixels, cropping at a random place and flipping half of the crops, but
    is one gather: a padded copy is never made.

    Raises:
      ValueError: a mirror image of the border is wanted and the shift is not smaller than the image.
    """
    n, h, w, _ = images.shape
    if how.fill == "reflect" and how.shift >= min(h, w):
        raise ValueError(f"augment: shift {how.shift} needs images larger than that to reflect, got {h} x {w}")
    shift_key, flip_key = jax.random.split(key)
    dy, dx = jax.random.randint(shift_key, (2, n, 1), -how.shift, how.shift + 1)
    rows = jnp.arange(h)[None, :] + dy
    cols = jnp.arange(w)[None, :] + dx
    if how.flip:
        cols = jnp.where(jax.random.bernoulli(flip_key, 0.5, (n, 1)), cols[:, ::-1], cols)
    source_rows, source_cols = _inside(rows, h), _inside(cols, w)
    out = images[jnp.arange(n)[:, None, None], source_rows[:, :, None], source_cols[:, None, :]]
    if how.fill == "reflect":
        return out
    seen = (rows == source_rows)[:, :, None] & (cols == source_cols)[:, None, :]
    return jnp.where(seen[..., None], out, jnp.zeros((), images.dtype))


def _inside(i: Array, size: int) -> Array:
    """Indices folded into 0..size-1 by reflection at the first and the last pixel."""
    return jnp.clip((size - 1) - jnp.abs(size - 1 - jnp.abs(i)), 0, size - 1)


def normalize(
    images: UInt8[Array, "*n h w c"], mean: tuple[float, ...], std: tuple[float, ...], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*n h w c"]:
    """``(images / 255 - mean) / std`` by channel, computed in float32 and returned as ``dtype``.

    Raises:
      ValueError: ``mean`` or ``std`` is not one number a channel, or a ``std`` is not positive.
    """
    channels = images.shape[-1]
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ValueError(f"normalize: wanted {channels} means and positive stds, got mean={mean}, std={std}")
    shape = (1,) * (images.ndim - 1) + (channels,)
    center = jnp.asarray(mean, jnp.float32).reshape(shape)
    scale = jnp.asarray(std, jnp.float32).reshape(shape)
    return ((images.astype(jnp.float32) / 255 - center) / scale).astype(dtype)
