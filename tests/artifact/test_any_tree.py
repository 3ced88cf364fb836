"""Fault 1: whatever a tree is named and made of, it comes back as it was, or is refused by name."""

from __future__ import annotations

import math
import os
import re
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.artifact import statics
from jaxcomp.artifact.disk import FileError
from jaxcomp.artifact.encoding import encode_tree
from jaxcomp.core.specs import Spec
from jaxcomp.quantization.grids import Int
from jaxcomp.trace.ranges import Range
from tests.artifact.memory import decoded
from tests.artifact.old_files import write_old
from tests.laws import assert_same_bits, bits_of

A, B, C, D = (jnp.arange(4.0) + 10 * i + 1 for i in range(4))


def compressed(*steps: jc.Transform) -> Any:
    """A leaf of 16 by 6."""
    params = {"k": jax.random.normal(jax.random.key(1), (16, 6))}
    t = jc.chain(*steps)
    return jc.pack(t.apply(t.init(params), params))["k"]


QUANTIZED = compressed(jc.quantize(jc.Int(4)))
MASKED = compressed(jc.prune(0.8), jc.quantize(jc.Int(4, symmetric=False)))
SPARSE = jnp.eye(40)


def again(tree: Any, tmp_path: Any, **options: Any) -> Any:
    """The tree, saved and loaded; other readers of safetensors open the file too."""
    jc.save(tmp_path / "f", tree)
    safetensors.numpy.load_file(tmp_path / "f")
    return jc.load(tmp_path / "f", **options)


def assert_same(a: Any, b: Any) -> None:
    """Equal in kind, order, type and bits."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        assert list(map(type, a)) == list(map(type, b))
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, float):
        assert np.float64(a).tobytes() == np.float64(b).tobytes()
    elif isinstance(a, np.ndarray | np.generic):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert (bits_of(a) == bits_of(b)).all()
    elif isinstance(a, jax.Array | jc.core.CompressedLeaf):
        assert_same_bits(a, b)
    else:
        assert a == b


NAMES = {
    "a slash in a key": {"net/w": A, "net": {"w": B}},
    "a dot in a key": {"a.b": A, "a": {"b": B}, "a.b/c": C},
    "the scale of a leaf": {"w": QUANTIZED, "w.scale": A},
    "a part that the leaf has not": {"w": QUANTIZED, "w.zero_point": A},
    "every part of a leaf": {"w.mask": A, "w": MASKED, "w.scale": B, "w.zero_point": C, "w.codes": D},
    "the mask of a sparse array": {"w": SPARSE, "w.mask": A},
    "the parts of factors": {"w": jc.factorization.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3))), "w.u": A, "w.v": B},
    "a table": {"w": jc.pack(jc.sharing.Codebook(jnp.ones((2, 1)), jnp.zeros(3, jnp.uint8), None)), "w.table": A},
    "safetensors' own": {"__metadata__": A},
    "nothing": {"": A, "/": B, "a": {"": C, "/": D}},
    "numbers and their digits": {1: A, "1": B},
    "places and their digits": {"a": [A, B], "a/0": C, "a/1": D},
    "what uniqueness adds": {"a/b": A, "a": {"b": B}, "a/b~2": C},
    "no text": {"\ud800": A, "\0": B, "ä": C, '"\\': D},
}


@pytest.mark.parametrize("name", NAMES)
def test_fault_1_no_leaf_takes_another_ones_place(name, tmp_path) -> None:
    assert_same(again(NAMES[name], tmp_path), NAMES[name])


PARTS = st.sampled_from(["", "a", "b", "a/b", "/", ".", "a.scale", "scale", "a.mask", "~2", "__metadata__", "0"])
TREES = st.recursive(
    st.integers(0, 10**6),
    lambda inner: (
        st.dictionaries(PARTS | st.integers(0, 2), inner, min_size=1, max_size=4)
        | st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=8,
)


@given(TREES, st.integers(0, 3))
def test_fault_1_any_names_in_any_nesting(tree, kind) -> None:
    """Each leaf holds a number of its own, so that a swap or a loss shows."""
    makers = (np.int64, lambda n: np.full((3, 2), n, np.float64), lambda n: np.eye(30, dtype=np.float32) * (n + 1), str)

    def made(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: made(v) for k, v in x.items()}
        return type(x)(map(made, x)) if isinstance(x, list | tuple) else makers[kind](x)

    assert_same(decoded(*encode_tree(made(tree))), made(tree))


ARRAYS = {
    "int64": np.array([2**40, -1]),
    "uint64": np.array([2**64 - 1], np.uint64),
    "float64": np.array([1 / 3, -0.0, np.inf]),
    "a scalar": np.float64(1 / 3),
    "a boolean": np.bool_(True),
    "no dimension": np.array(3),
    "empty": np.zeros((0, 3, 2)),
    "columns first": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "turned": np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
    "every second": np.arange(10.0)[::2],
    "backwards": np.arange(5)[::-1],
    "repeated": np.broadcast_to(np.arange(3.0), (4, 3)),
    "sparse": np.eye(50) * -0.5,
    "sparse columns": np.asfortranarray(np.triu(np.ones((40, 40)), 30)),
    "complex": np.array([1 + 2j, complex(0, -0.0)]),
    "bfloat16": np.array([1.5, -2], ml_dtypes.bfloat16),
    "64 dimensions": np.ones((1,) * 64),
    "many": np.arange(3 * 10**5 + 1, dtype=np.int16),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_fault_1_arrays_of_numpy_come_back_as_they_were(name, tmp_path) -> None:
    found = again({"x": ARRAYS[name]}, tmp_path)["x"]
    assert found.dtype == ARRAYS[name].dtype
    np.testing.assert_array_equal(found, ARRAYS[name])
    np.testing.assert_array_equal(np.signbit(found.real), np.signbit(ARRAYS[name].real))
    assert type(found) is type(ARRAYS[name])


def test_fault_1_numbers_of_the_other_byte_order_are_the_same_numbers(tmp_path) -> None:
    found = again({"x": np.arange(3, dtype=">f4")}, tmp_path)["x"]
    np.testing.assert_array_equal(found, np.arange(3, dtype=np.float32))


NARROW = ["int2", "uint2", "int4", "uint4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"]


@pytest.mark.parametrize("name", [*NARROW, "float8_e8m0fnu", "complex64"])
def test_fault_1_types_that_safetensors_has_no_name_for(name, tmp_path) -> None:
    dtype = jnp.dtype(name)
    values = np.array([1, 0, 1, 1, 0]).astype(dtype)
    if name.startswith(("int", "float4")):
        values = np.array([-1, -2, 1, 0, 1]).astype(dtype)
    tree = {"jax": jnp.asarray(values), "numpy": values.reshape(5, 1)}
    found = again(tree, tmp_path)
    assert_same(found["numpy"], tree["numpy"])
    assert isinstance(found["jax"], jax.Array)
    assert_same(np.asarray(found["jax"]), np.asarray(tree["jax"]))


def test_fault_1_codes_of_four_bits_take_four(tmp_path) -> None:
    assert jc.save(tmp_path / "f", {"x": jnp.ones(4096, jnp.int4)}) < 4096 / 2 + 400


def test_fault_1_wide_types_of_jax(tmp_path) -> None:
    with jax.enable_x64(True):
        tree = {"i": jnp.array([2**40]), "f": jnp.array([1 / 3])}
        assert_same(again(tree, tmp_path), tree)
    narrow = jc.load(tmp_path / "f")  # what jax has no type for now stays numpy's
    assert_same(narrow, {"i": np.array([2**40]), "f": np.array([1 / 3])})


def test_fault_1_random_keys_come_back_as_keys(tmp_path) -> None:
    tree = {"one": jax.random.key(3), "rbg": jax.random.split(jax.random.key(3, impl="rbg"), 3)}
    found = again(tree, tmp_path)
    for name, key in tree.items():
        assert found[name].dtype == key.dtype
        assert (jax.random.key_data(found[name]) == jax.random.key_data(key)).all()
    assert jax.random.uniform(found["one"]) == jax.random.uniform(tree["one"])


def test_fault_1_values_of_python(tmp_path) -> None:
    tree = {"x": (None, True, False, 3, -(2**80), -0.0, 1e-300, math.inf, -math.inf, "s", "", "\ud800", [], {}, ())}
    tree["nan"] = [math.nan]
    assert_same(again(tree, tmp_path), tree)


class Level(int):
    """A number that is more than a number."""


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (Level(3), "'a' is Level, which a file of weights cannot hold"),
        (1j, "'a' is complex, which a file of weights cannot hold"),
        ({1, 2}, "'a' is set, which a file of weights cannot hold"),
        (np.array(["x"]), "'a' is of type <U1, which files do not hold"),
        (np.longdouble(1), r"'a' is of type \w+, which files do not hold"),
        ({(1, 2): A}, r"'a' has the key \(1, 2\); keys must be strings or integers"),
        ({True: A}, "'a' has the key True; keys must be strings or integers"),
        ({np.int64(1): A}, "'a' has the key .*; keys must be strings or integers"),
    ],
    ids=["int", "complex", "set", "text", "longdouble", "tuple", "bool", "int64"],
)
def test_fault_1_what_would_change_on_the_way_is_refused(leaf, message, tmp_path) -> None:
    with pytest.raises(TypeError, match=message):
        jc.save(tmp_path / "f", {"a": leaf})
    assert os.listdir(tmp_path) == []


def test_fault_1_a_tree_that_is_too_deep_is_refused(tmp_path) -> None:
    tree = A
    for _ in range(150):
        tree = [tree]
    with pytest.raises(TypeError, match="nested more than 100 deep"):
        jc.save(tmp_path / "f", tree)


@pytest.mark.parametrize("metadata", [{"x": math.nan}, {"x": {1, 2}}, {1: 2}], ids=["nan", "set", "key"])
def test_fault_1_metadata_that_json_does_not_hold(metadata, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^save: the (keys of )?metadata"):
        jc.save(tmp_path / "f", {}, metadata=metadata)


# Containers


def test_fault_1_like_tells_leaves_apart_that_have_one_path(tmp_path) -> None:
    tree = {"net/w": A, "net": {"w": B}}
    found = again(tree, tmp_path, like=tree)
    assert_same([found["net/w"], found["net"]["w"]], [A, B])


def test_fault_1_other_containers_are_those_of_like(tmp_path) -> None:
    params = {"a/b": A, "a": {"b": B}}
    state = optax.adam(1e-3).init(params)
    state = jax.tree.map(lambda x: x + 3, state)
    found = again({"opt": state, "step": 7}, tmp_path, like={"opt": state, "step": 7})
    assert jax.tree.structure(found) == jax.tree.structure({"opt": state, "step": 7})
    assert_same(jax.tree.leaves(found["opt"]), jax.tree.leaves(state))
    plain = jc.load(tmp_path / "f")["opt"][0]
    assert set(plain["mu"]) == {"a/b", "a"}
    assert_same(again(OrderedDict(b=A, a=B), tmp_path), {"b": A, "a": B})


def test_fault_1_states_of_nnx_with_their_keys(tmp_path) -> None:
    _, state = nnx.split(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    found = again(state, tmp_path, like=state)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert (jax.random.key_data(found["rngs"]["key"][...]) == jax.random.key_data(state["rngs"]["key"][...])).all()
    held = {"a": nnx.Param(A)}
    assert_same(again(held, tmp_path), {"a": A})
    assert isinstance(jc.load(tmp_path / "f", like=held)["a"], nnx.Param)


# What runs a network beside its weights


def network(p: Any, x: jax.Array) -> jax.Array:
    """Two layers."""
    return jax.nn.relu(x @ p["up"]) @ p["down"]


PARAMS = {"up": jax.random.normal(jax.random.key(0), (4, 8)), "down": jax.random.normal(jax.random.key(1), (8, 3))}
X = jax.random.normal(jax.random.key(2), (5, 4))


def test_fault_1_ranges_come_back_as_quantize_function_takes_them(tmp_path) -> None:
    stats = jc.calibrate(network)(PARAMS, X)
    ranges = jc.activations.ranges_of(stats)
    tree = again({"params": PARAMS, "ranges": ranges, "stats": stats, "plain": Range(0.0, np.float32(1))}, tmp_path)
    assert isinstance(tree["ranges"]["up"], Range)
    assert tree["plain"] == Range(0.0, np.float32(1))
    q = jc.quantize_function(network, {".*": jc.Act(8)})
    assert (q(tree["params"], tree["ranges"], X) == q(PARAMS, ranges, X)).all()
    assert_same_bits(jc.activations.ranges_of(tree["stats"]), ranges)


def test_fault_1_a_plan_comes_back_as_shrink_takes_it(tmp_path) -> None:
    plan = jc.plan(jc.channel_groups(network, free_outputs="0/.*")(PARAMS, X), PARAMS, sparsity=0.5)
    tree = again({"params": plan.take(PARAMS), "plan": plan, "groups": plan.groups}, tmp_path)
    found = tree["plan"]
    assert repr(found) == repr(plan)
    assert (found.widths, found.macs, found.parameters) == (plan.widths, plan.macs, plan.parameters)
    assert found.groups.options == plan.groups.options
    assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(found.kept, plan.kept, strict=True))
    assert (jc.shrink(network, found)(tree["params"], X) == jc.shrink(network, plan)(plan.take(PARAMS), X)).all()
    assert_same_bits(found.take(PARAMS), plan.take(PARAMS))
    assert repr(tree["groups"]) == repr(plan.groups)


def test_fault_1_a_plan_with_a_function_in_it_is_refused(tmp_path) -> None:
    groups = jc.channel_groups(network, free_outputs=lambda path, leaf: True)(PARAMS, X)
    with pytest.raises(TypeError, match=r"'g\.options\.free_outputs' .* function, .*by a regular expression"):
        jc.save(tmp_path / "f", {"g": groups})


def test_fault_1_every_class_that_is_read_by_name_has_one_name() -> None:
    known = {**statics.BRANCHES, **statics.VALUES}
    assert all(cls.__name__ == name for name, cls in known.items())
    for cls in (Range, *statics.VALUES.values()):
        assert statics.BRANCHES.get(cls.__name__, statics.VALUES.get(cls.__name__)) is cls


def test_fault_1_a_class_named_like_another_is_refused(tmp_path) -> None:
    other = type("Int", (Int,), {"__module__": "elsewhere"})
    leaf = jc.quantize(other(4)).apply((), {"k": jnp.ones((4, 4))})
    with pytest.raises(TypeError, match=r"'k' is made of elsewhere\.Int, .* jaxcomp\.quantization\.grids\.Int, "):
        jc.save(tmp_path / "f", leaf)
    assert statics.known(Spec, "Int") is Int


# Files of before

OLD = [
    ({"dict": [["net/w", "array"], ["net", {"dict": [["w", "array"]]}]]}, {"net/w": np.ones(3, np.float32)}, "net/w"),
    (
        {
            "dict": [
                ["w", {"leaf": ["LowRank", {"row_axes": 1, "outputs_first": False}]}],
                ["w.u", "array"],
            ]
        },
        {"w.u": np.ones((3, 1), np.float32), "w.v": np.ones((1, 3), np.float32)},
        "w.u",
    ),
]


@pytest.mark.parametrize(("tree", "tensors", "name"), OLD, ids=["paths", "parts"])
def test_fault_1_a_leaf_that_an_older_jaxcomp_lost_is_said_to_be_lost(tree, tensors, name, tmp_path) -> None:
    write_old(tmp_path / "f", tree, tensors)
    message = f"two leaves of the tree have the name '{name}', of which an older jaxcomp wrote one only; save the tree"
    with pytest.raises(FileError, match=re.escape(message)):
        jc.load(tmp_path / "f")
