"""Fetch and prepare Fashion-MNIST and CIFAR-10 with TensorFlow Datasets, without TensorFlow.

TFDS's own builders extract and parse through TensorFlow. The two here keep its metadata, versions, URLs and
checksums, parse the raw files with numpy and write ``array_record`` shards, so that the result is an ordinary
prepared set that ``tfds.data_source(name, data_dir=...)`` reads too.

A source file is taken, in this order, from ``<data_dir>/manual/``, from the folder where Debian's package puts
it, and from the data set's own URL.
"""

from __future__ import annotations

import gzip
import http.client
import io
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.image_classification import cifar, mnist

from train.errors import DataError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` installs the four files."""

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_ROWS = 10_000
"""Images in each of CIFAR-10's six binary files."""

_TRAIN = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
_TEST = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
_PROBE_SECONDS = 20
_UNREADABLE = (OSError, EOFError, ValueError, KeyError, zlib.error, tarfile.TarError)

Examples = Iterator[tuple[int, dict[str, object]]]


def prepare(name: str, data_dir: Path) -> dict[str, np.ndarray]:
    """Arrays ``{train,test}_{images,labels}`` of ``name``, decoded from its TFDS set, prepared first if absent.

    TFDS writes into a temporary folder and renames it at the end, so a killed run leaves nothing that a later one
    would trust.

    Raises:
      DataError: no prepared copy, and the source files are neither at hand nor downloadable, or are damaged.
    """
    builders: dict[str, type[FashionMnist | Cifar10]] = {"fashion_mnist": FashionMnist, "cifar10": Cifar10}
    builder_class = builders[name]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        builder = builder_class(data_dir=data_dir, file_format="array_record")
        if not builder.data_path.exists():
            builder.find_sources(data_dir)
        try:
            builder.download_and_prepare(
                download_dir=data_dir / "downloads",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False, force_checksums_validation=True),
            )
        except FileExistsError:  # another process was first
            builder = builder_class(data_dir=data_dir, file_format="array_record")
    except DataError:
        raise
    except Exception as e:
        raise DataError(f"{name}: preparing it in {data_dir} failed: {type(e).__name__}: {e}") from e
    try:
        return _decode(builder, "train") | _decode(builder, "test")
    except Exception as e:
        raise DataError(
            f"{name}: the prepared copy in {builder.data_path} cannot be read ({type(e).__name__}: {e}); "
            "remove that folder and run the same command again."
        ) from e


def _decode(builder: tfds.core.DatasetBuilder, split: str) -> dict[str, np.ndarray]:
    """The split as arrays. Asking for runs of encoded images is twice as fast as asking for decoded ones one by one."""
    source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    images = np.empty((len(source), *builder.info.features["image"].shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), 1000):
        run = range(start, min(start + 1000, len(source)))
        for i, example in zip(run, source.__getitems__(run), strict=True):
            images[i] = np.asarray(Image.open(io.BytesIO(example["image"]))).reshape(images.shape[1:])
            labels[i] = example["label"]
    return {f"{split}_images": images, f"{split}_labels": labels}


class _WithoutTensorFlow:
    """Finds a builder's source files before TFDS starts; a mixin."""

    name: str
    _files: ClassVar[Mapping[str, str]]  # file name -> its URL
    _system_dir: ClassVar[Path | None] = None
    _found: dict[str, Path]

    def find_sources(self, data_dir: Path) -> None:
        """Look for the source files on disk; if one is missing, check that its server answers.

        The check is one request: TFDS itself would retry for minutes and then fail with a long traceback.
        """
        folders = [data_dir / "manual", *([self._system_dir] if self._system_dir else [])]
        whole = [d for d in folders if all((d / f).is_file() for f in self._files)]
        self._found = {f: whole[0] / f for f in self._files} if whole else {}
        if whole:
            return
        for url in self._files.values():
            try:
                urllib.request.urlopen(url, timeout=_PROBE_SECONDS).close()
            except (OSError, http.client.HTTPException) as e:
                raise DataError(_how_to_place(self.name, self._files, folders, e)) from None

    def _sources(self, downloads: tfds.download.DownloadManager) -> dict[str, Path]:
        return self._found or {f: Path(p) for f, p in downloads.download(dict(self._files)).items()}


with tfds.core.registered.skip_registration():

    class FashionMnist(_WithoutTensorFlow, mnist.FashionMNIST):
        """TFDS's Fashion-MNIST, read from the four IDX files. Source: arXiv:1708.07747."""

        name = "fashion_mnist"
        url_infos = mnist.FashionMNIST.url_infos
        _files: ClassVar = {f: mnist.FashionMNIST.URL + f for f in _TRAIN + _TEST}
        _system_dir: ClassVar = DEBIAN_FASHION_MNIST

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
            files = self._sources(dl_manager)
            splits = {"train": _TRAIN, "test": _TEST}
            return {name: self._examples(*read_mnist(files[i], files[l])) for name, (i, l) in splits.items()}

        def _examples(self, images: np.ndarray, labels: np.ndarray) -> Examples:
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield i, {"image": Image.fromarray(image), "label": int(label)}

    class Cifar10(_WithoutTensorFlow, cifar.Cifar10):
        """TFDS's CIFAR-10, read from the binary tarball. Source: Krizhevsky 2009."""

        name = "cifar10"
        url_infos = cifar.Cifar10.url_infos
        _files: ClassVar = {CIFAR_URL.rsplit("/", 1)[-1]: CIFAR_URL}

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
            (path,) = self._sources(dl_manager).values()
            members, self.info.features["label"].names = read_cifar(path)
            train = np.concatenate([members[f"data_batch_{i}.bin"] for i in range(1, 6)])
            return {"train": self._examples("train", train), "test": self._examples("test", members["test_batch.bin"])}

        def _examples(self, split: str, rows: np.ndarray) -> Examples:
            images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            for i, (image, label) in enumerate(zip(images, rows[:, 0], strict=True)):
                picture = Image.fromarray(np.ascontiguousarray(image))
                yield i, {"id": f"{split}_{i:05d}", "image": picture, "label": int(label)}


def read_mnist(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """The uint8 images [n, 28, 28] and labels [n] of two IDX files that belong together.

    Raises:
      DataError: a file is damaged, or the two do not fit.
    """
    x, y = read_idx(images), read_idx(labels)
    if x.shape[1:] != (28, 28) or y.shape != x.shape[:1]:
        raise DataError(
            f"{images} holds an array of {x.shape} and {labels} one of {y.shape}, wanted (n, 28, 28) and (n,); "
            "replace both by the original files."
        )
    return x, y


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in a gzipped IDX file.

    The format: two zero bytes, 8 for uint8, the number of dimensions, each length as a big-endian int32, the values.

    Raises:
      DataError: the file cannot be read or is not such a file.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
        if raw[:3] != b"\0\0\x08":
            raise ValueError(f"it starts with {raw[:4].hex()}, not with the mark of an IDX file of bytes")
        shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except _UNREADABLE as e:
        raise DataError(_damaged(path, e)) from e


def read_cifar(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Rows of CIFAR-10's six binary files, uint8 [10000, 3073] by file name, and the names of the ten classes.

    A row is a label and an image's 3072 bytes: red, green and blue planes of 32 x 32.

    Raises:
      DataError: the tarball is truncated, misses a file, or a file is not made of such rows.
    """
    wanted = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt"]
    try:
        with tarfile.open(path, "r:gz") as tar:
            found = {Path(m.name).name: f.read() for m in tar if m.isfile() and (f := tar.extractfile(m))}
        raw = {name: found[name] for name in wanted}
        names = raw.pop("batches.meta.txt").decode().split()
        rows = {name: np.frombuffer(b, np.uint8).reshape(CIFAR_ROWS, 3073) for name, b in raw.items()}
        if len(names) != 10 or any(r[:, 0].max() > 9 for r in rows.values()):
            raise ValueError("its labels are not ten classes")
    except _UNREADABLE as e:
        raise DataError(_damaged(path, e)) from e
    return rows, names


def _damaged(path: Path, e: Exception) -> str:
    return f"{path} is damaged or not the original file ({type(e).__name__}: {e}); remove it and fetch it again."


def _how_to_place(name: str, files: Mapping[str, str], folders: list[Path], e: Exception) -> str:
    fetch = "\n".join(f"  {url}" for url in files.values())
    reason = e.reason if isinstance(e, urllib.error.URLError) else e
    others = f" (also looked in {', '.join(map(str, folders[1:]))})" if folders[1:] else ""
    return (
        f"{name}: there is no prepared copy, no source file in {folders[0]}{others}, "
        f"and the download failed: {reason}\n"
        f"Where there is a network, fetch\n{fetch}\n"
        f"and put {', '.join(files)} in the folder\n  {folders[0]}\nthen run the same command again."
    )
