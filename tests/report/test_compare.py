"""Two trees, leaf by leaf, against numpy's own norms and the bytes of real files."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.report import Point, changes, frontier
from jaxcomp.report.compare import _CHUNK
from tests.report import trees


@pytest.fixture(scope="module")
def pair():
    return trees.before(), trees.after()


def test_errors_zeros_and_shapes_are_those_of_the_values(pair):
    old, new = (dict(leaves_with_paths(t)[0]) for t in (pair[0], trees.host(pair[1])))
    for change in changes(*pair):
        a, b = old[change.path].astype(np.float64), new[change.path].astype(np.float64)
        wanted = np.linalg.norm(b - a) / np.linalg.norm(a) if a.any() else 0.0
        assert change.error == pytest.approx(wanted, rel=1e-5)
        assert change.largest == pytest.approx(np.abs(b - a).max(), rel=1e-5)
        assert change.after.zeros == (b == 0).mean()
        assert change.after.shape == b.shape
        assert change.same == (change.path == "conv/bias")
        assert change.alike == change.same
        assert not change.note


def test_bytes_are_those_of_the_file(pair, tmp_path):
    for tree, side in zip(pair, ("before", "after"), strict=True):
        size = jc.save(tmp_path / "w.safetensors", tree)
        assert jc.artifact.file_size(tree) == size == os.path.getsize(tmp_path / "w.safetensors")
        header = 8 + int.from_bytes((tmp_path / "w.safetensors").read_bytes()[:8], "little")
        assert sum(getattr(c, side).bytes for c in changes(*pair)) == size - header


def test_what_is_stored_otherwise_has_the_same_values(pair):
    assert all(c.alike for c in changes(pair[1], jc.pack(pair[1]))), "packing changes no bytes of a file, and no values"
    dense = jc.materialize(pair[1])
    found = {c.path: c for c in changes(pair[1], dense)}["dense/kernel"]
    assert found.same
    assert not found.alike
    assert found.note == "stored otherwise"
    assert found.error == 0


def test_what_was_added_removed_or_shrunk_is_said():
    old = {"gone": np.ones(3, np.float32), "cut": np.ones((4, 4), np.float32), "cast": np.ones(2, np.float32)}
    new = {"new": np.ones(2, np.float32), "cut": np.ones((4, 2), np.float32), "cast": np.ones(2, np.float16)}
    found = {c.path: c for c in changes(old, new)}
    assert list(found) == ["cast", "cut", "new", "gone"]
    assert [c.note for c in found.values()] == ["another type", "was 4x4", "only after", "only before"]
    assert found["cut"].error is None
    assert found["cast"].error == 0
    assert not any(c.same for c in found.values())


@pytest.mark.parametrize(
    ("before", "after", "error", "note"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0, ""),
        ([0.0, 0.0], [1.0, 0.0], np.inf, "was all zeros"),
        ([1.0, np.nan], [1.0, 1.0], np.nan, "not finite"),
        ([np.inf, 1.0], [np.inf, 1.0], np.nan, "not finite"),
        ([], [], 0.0, ""),
        ([3e38, 3e38], [-3e38, 3e38], 2**0.5, ""),
        ([0.0, 1.0], [-0.0, 1.0], 0.0, "-0 for 0"),
        ([1, 2], [1, 4], (4 / 5) ** 0.5, ""),
        ([1j, 1], [1j, -1], 2**0.5, ""),
        ([True, False], [True, True], 1.0, ""),
    ],
    ids=["zeros", "from_zeros", "nan", "infinite", "empty", "huge", "signs", "integers", "complex", "booleans"],
)
def test_hard_values(before, after, error, note):
    narrow = {"f": np.float32, "i": np.int32, "c": np.complex64, "b": np.bool_}
    a, b = (np.asarray(x, narrow[np.asarray(x).dtype.kind]) for x in (before, after))
    (found,) = changes({"w": a}, {"w": b})
    np.testing.assert_allclose(found.error, error, rtol=1e-6)
    assert found.note in (note, "") if found.same else found.note == note


def test_equal_nans_are_the_same_bits():
    w = {"w": np.array([np.nan, 1.0], np.float32)}
    (found,) = changes(w, {"w": w["w"].copy()})
    assert found.same


def test_long_arrays_are_summed_in_pieces():
    a = np.ones(_CHUNK + 3, np.float16)
    b = a.copy()
    b[-1] = 3
    (found,) = changes({"w": a}, {"w": b})
    assert found.error == pytest.approx(2 / np.sqrt(a.size), rel=1e-12)
    assert found.largest == 2


def test_leaves_that_are_no_arrays_are_compared_too():
    old = {"name": "net", "steps": 3, "key": jax.random.key(0), "none": None}
    assert all(c.alike for c in changes(old, dict(old)))
    found = {c.path: c.same for c in changes(old, {**old, "name": "other", "key": jax.random.key(1)})}
    assert found == {"key": False, "name": False, "steps": True}


def test_shapes_and_tracers_have_no_values():
    w = {"w": jax.ShapeDtypeStruct((2,), "float32")}
    with pytest.raises(TypeError, match=r"compare: 'w' has no values, it is Shape.*; compare arrays, outside"):
        changes(w, w)
    with pytest.raises(TypeError, match=r"compare: 'a/w' has no values, it is .*Tracer"):
        jax.jit(lambda x: changes({"a": {"w": x}}, {"a": {"w": x}}))(jnp.ones(2))


points = st.lists(st.builds(Point, st.just("p"), st.integers(1, 5), st.sampled_from([0.0, 0.5, 0.7, 1.0])), max_size=8)


@given(points, st.booleans())
def test_the_frontier_is_what_no_point_beats(tried, higher):
    sign = 1 if higher else -1

    def beats(a: Point, b: Point) -> bool:
        no_worse = a.bytes <= b.bytes and sign * a.score >= sign * b.score
        return no_worse and (a.bytes, a.score) != (b.bytes, b.score)

    found = frontier(tried, higher=higher)
    wanted = [p for p in tried if not any(beats(q, p) for q in tried)]
    assert sorted(found, key=repr) == sorted(wanted, key=repr)
    assert [p.bytes for p in found] == sorted(p.bytes for p in found)
