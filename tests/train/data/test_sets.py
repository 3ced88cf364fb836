import numpy as np
import pytest
from sklearn.datasets import load_digits

from train.data import sets
from train.data.sets import load


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


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'mnist'; there are digits, fashion_mnist, cifar10"):
        load("mnist")


def test_data_folder_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXCOMP_DATA", str(tmp_path))
    assert sets.default_data_dir() == tmp_path
    monkeypatch.delenv("JAXCOMP_DATA")
    assert sets.default_data_dir().parts[-3:] == (".cache", "jaxcomp", "data")
