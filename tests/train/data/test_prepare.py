"""Preparation of Fashion-MNIST and CIFAR-10, from real files where present and small ones of their format."""

import functools
import gzip
import hashlib
import http.server
import io
import os
import tarfile
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
import tensorflow_datasets as tfds

from train.data import prepare
from train.data.sets import load
from train.errors import DataError

TAR = "cifar-10-binary.tar.gz"
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ROWS = 20

needs_debian = pytest.mark.skipif(
    not prepare.DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)


def cifar_rows(rows=ROWS):
    labels = np.arange(rows * 6).reshape(6, rows, 1) % 10
    pixels = np.random.default_rng(0).integers(0, 256, (6, rows, 3072))
    return np.concatenate([labels, pixels], axis=2).astype(np.uint8)


def cifar_tarball(path, batches):
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    files = {name: rows.tobytes() for name, rows in zip(names, batches, strict=False)}
    files["batches.meta.txt"] = ("\n".join(NAMES) + "\n\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def examples(*splits):
    return sorted((int(y), x.tobytes()) for s in splits for x, y in zip(s.images, s.labels, strict=True))


def examples_of_rows(rows):
    return sorted((int(r[0]), r[1:].reshape(3, 32, 32).transpose(1, 2, 0).tobytes()) for r in rows)


@pytest.fixture
def small_cifar(monkeypatch):
    monkeypatch.setattr(prepare, "CIFAR_ROWS", ROWS)


@pytest.fixture
def offline(monkeypatch):
    def refuse(url, timeout):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.usefixtures("small_cifar", "offline")
class TestCifarByHand:
    def test_is_what_the_tarball_holds(self, tmp_path):
        rows = cifar_rows()
        cifar_tarball(tmp_path / "manual" / TAR, rows)
        data = load("cifar10", data_dir=tmp_path)
        assert examples(data.train, data.validation) == examples_of_rows(rows[:5].reshape(-1, 3073))
        assert examples(data.test) == examples_of_rows(rows[5])
        assert np.bincount(data.validation.labels).tolist() == [1] * 10
        assert data.train.images.shape == (90, 32, 32, 3)
        np.testing.assert_allclose(data.mean, (data.train.images / 255).mean((0, 1, 2)), rtol=1e-12)

    def test_prepared_set_is_tfdss_own(self, tmp_path):
        cifar_tarball(tmp_path / "manual" / TAR, cifar_rows())
        data = load("cifar10", data_dir=tmp_path)
        source = tfds.data_source("cifar10", data_dir=tmp_path, split="test", download=False)
        assert source.dataset_info.features["label"].names == NAMES
        assert sorted((int(e["label"]), e["image"].tobytes()) for e in source) == examples(data.test)

    def test_later_loads_read_the_arrays_only(self, tmp_path, monkeypatch):
        cifar_tarball(tmp_path / "manual" / TAR, cifar_rows())
        first = load("cifar10", data_dir=tmp_path)
        monkeypatch.setattr(prepare, "prepare", None)
        second = load("cifar10", data_dir=tmp_path)
        assert np.array_equal(first.train.images, second.train.images)
        assert np.array_equal(first.train.labels, second.train.labels)

    @pytest.mark.parametrize("damage", ["truncated", "one byte", "foreign"])
    def test_damaged_arrays_are_rebuilt(self, tmp_path, damage):
        cifar_tarball(tmp_path / "manual" / TAR, cifar_rows())
        first = load("cifar10", data_dir=tmp_path)
        path = tmp_path / "cifar10.npz"
        raw = bytearray(path.read_bytes())
        raw[5000] ^= 1
        path.write_bytes({"truncated": raw[:-2000], "one byte": raw, "foreign": b"hello"}[damage])
        second = load("cifar10", data_dir=tmp_path)
        assert np.array_equal(first.train.images, second.train.images)
        assert np.array_equal(first.test.labels, second.test.labels)

    def test_damaged_tarball_is_named_and_leaves_nothing(self, tmp_path):
        path = cifar_tarball(tmp_path / "manual" / TAR, cifar_rows())
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=rf"{TAR} is damaged or not the original .*remove it and fetch it again"):
            load("cifar10", data_dir=tmp_path)
        path.write_bytes(whole)
        assert len(load("cifar10", data_dir=tmp_path).test) == ROWS

    @pytest.mark.parametrize("batches", [cifar_rows()[:5], cifar_rows(ROWS - 1), cifar_rows() + 10])
    def test_a_tarball_of_something_else(self, tmp_path, batches):
        cifar_tarball(tmp_path / "manual" / TAR, batches)
        with pytest.raises(DataError, match="damaged or not the original file"):
            load("cifar10", data_dir=tmp_path)

    def test_interrupted_preparation_is_not_trusted(self, tmp_path, monkeypatch):
        cifar_tarball(tmp_path / "manual" / TAR, cifar_rows())
        real, calls = prepare.Image.fromarray, []

        def stop(image):
            calls.append(image)
            if len(calls) == 50:
                raise KeyboardInterrupt
            return real(image)

        monkeypatch.setattr(prepare.Image, "fromarray", stop)
        with pytest.raises(KeyboardInterrupt):
            load("cifar10", data_dir=tmp_path)
        assert not (tmp_path / "cifar10.npz").exists()
        monkeypatch.undo()
        monkeypatch.setattr(prepare, "CIFAR_ROWS", ROWS)
        data = load("cifar10", data_dir=tmp_path)
        assert len(data.train) + len(data.validation) == 5 * ROWS

    def test_interrupted_writing_of_the_arrays_leaves_no_file(self, tmp_path, monkeypatch):
        cifar_tarball(tmp_path / "manual" / TAR, cifar_rows())

        def full(file, **arrays):
            file.write(b"half of it")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(np, "savez", full)
        with pytest.raises(DataError, match=r"cannot be written to .*cifar10.npz: .*No space left"):
            load("cifar10", data_dir=tmp_path)
        assert [p.name for p in tmp_path.iterdir() if p.is_file()] == []

    def test_unreadable_prepared_copy(self, tmp_path):
        cifar_tarball(tmp_path / "manual" / TAR, cifar_rows())
        load("cifar10", data_dir=tmp_path)
        (tmp_path / "cifar10.npz").unlink()
        for shard in (tmp_path / "cifar10").rglob("*array_record*"):
            shard.write_bytes(b"x" * 100)
        with pytest.raises(DataError, match=r"prepared copy in .* cannot be read .*remove that folder"):
            load("cifar10", data_dir=tmp_path)


@pytest.mark.usefixtures("offline")
def test_offline_error_says_what_to_put_where(tmp_path):
    with pytest.raises(DataError) as e:
        load("cifar10", data_dir=tmp_path)
    message = str(e.value)
    for part in (str(tmp_path / "manual"), TAR, f"https://www.cs.toronto.edu/~kriz/{TAR}", "failed: no network"):
        assert part in message
    assert e.value.__suppress_context__
    assert e.value.__cause__ is None


@pytest.mark.usefixtures("offline")
def test_offline_fashion_mnist_names_its_four_files(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.FashionMnist, "_system_dir", tmp_path / "none")
    with pytest.raises(DataError, match=r"(?s)also looked in .*none.*t10k-labels-idx1-ubyte.gz in the folder"):
        load("fashion_mnist", data_dir=tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cifar10: preparing it in .*file.* failed: (NotADirectory|FileExists)Error"):
        load("cifar10", data_dir=tmp_path / "file")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A tarball behind a server on this machine, known to the builder by that URL and its checksum."""
    path = cifar_tarball(tmp_path / "www" / TAR, cifar_rows())
    handler = functools.partial(Quiet, directory=path.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/{TAR}"
        raw = path.read_bytes()
        info = tfds.download.checksums.UrlInfo(len(raw), hashlib.sha256(raw).hexdigest(), TAR)
        monkeypatch.setattr(prepare.Cifar10, "_files", {TAR: url})
        monkeypatch.setattr(prepare.Cifar10, "url_infos", {url: info})
        yield path
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("small_cifar")
def test_download(served, tmp_path):
    data = load("cifar10", data_dir=tmp_path / "data")
    assert examples(data.test) == examples_of_rows(cifar_rows()[5])


@pytest.mark.usefixtures("small_cifar")
def test_download_of_another_file_is_refused(served, tmp_path):
    cifar_tarball(served, cifar_rows() // 2)
    with pytest.raises(DataError, match=r"cifar10: preparing it .*(?i:checksum)"):
        load("cifar10", data_dir=tmp_path / "data")


def test_missing_on_the_server(served, tmp_path):
    os.unlink(served)
    with pytest.raises(DataError, match=r"the download failed: .*not found"):
        load("cifar10", data_dir=tmp_path / "data")


def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(head + array.tobytes(), 1))


@needs_debian
@pytest.mark.usefixtures("offline")
def test_fashion_mnist_on_the_first_of_debians_images(tmp_path):
    folder = tmp_path / "manual"
    folder.mkdir()
    kept = {}
    for source in prepare.DEBIAN_FASHION_MNIST.glob("*.gz"):
        kept[source.name] = prepare.read_idx(source)[:240]
        write_idx(folder / source.name, kept[source.name])
    data = load("fashion_mnist", data_dir=tmp_path)
    wanted = zip(kept["train-images-idx3-ubyte.gz"], kept["train-labels-idx1-ubyte.gz"], strict=True)
    assert examples(data.train, data.validation) == sorted((int(y), x.tobytes()) for x, y in wanted)
    assert data.test.images.shape == (240, 28, 28, 1)


@needs_debian
@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_fashion_mnist_from_debian(tmp_path):
    data = load("fashion_mnist", data_dir=tmp_path)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [55_000, 5_000, 10_000]
    assert np.bincount(data.train.labels).tolist() == [5_500] * 10
    # The published mean and deviation of all 60,000 are 0.2860 and 0.3530.
    assert data.mean[0] == pytest.approx(0.2860, abs=1e-3)
    assert data.std[0] == pytest.approx(0.3530, abs=1e-3)


def test_idx_files_are_checked(tmp_path):
    images, labels = tmp_path / "images.gz", tmp_path / "labels.gz"
    write_idx(images, np.zeros((5, 28, 28), np.uint8))
    write_idx(labels, np.zeros(4, np.uint8))
    with pytest.raises(DataError, match=r"holds an array of \(5, 28, 28\) and .* one of \(4,\)"):
        prepare.read_mnist(images, labels)
    labels.write_bytes(gzip.compress(b"\x89PNG and so on"))
    with pytest.raises(DataError, match="starts with 89504e47, not with the mark of an IDX file"):
        prepare.read_idx(labels)
    images.write_bytes(images.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"images.gz is damaged .*remove it"):
        prepare.read_idx(images)
    with pytest.raises(DataError, match=r"gone.gz is damaged .*FileNotFoundError"):
        prepare.read_idx(tmp_path / "gone.gz")
