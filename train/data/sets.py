"""Data sets as uint8 arrays in memory, in three splits.

>>> data = load("digits")
>>> data.train.images.shape, data.validation.images.shape, data.test.images.shape
((1078, 8, 8, 1), (269, 8, 8, 1), (450, 8, 8, 1))
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
from pathlib import Path

import numpy as np

from train.data.images import Augmentation, channel_statistics
from train.data.order import hold_out
from train.errors import DataError

NAMES = ("digits", "fashion_mnist", "cifar10")

_Arrays = dict[str, np.ndarray]

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

    The first load of ``fashion_mnist`` or ``cifar10`` prepares it through TFDS (see :mod:`train.data.prepare`) and
    keeps the decoded arrays in ``<data_dir>/<name>.npz``. A damaged file of those is rebuilt, never used.

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
    from train.data.prepare import prepare  # TFDS takes a second to import: only where it is needed

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
