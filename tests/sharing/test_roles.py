"""Tables lie where the program keeps its axes, whatever the layout; each leaf draws from a key of its own."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.core.layouts import Buckets, Channels, Groups
from jaxcomp.core.roles import AxisRoles, Roles
from jaxcomp.sharing import Codebook, share_vectors
from jaxcomp.sharing.kmeans import inits
from jaxcomp.trace import roles
from tests.laws import assert_same_bits
from tests.marks import quick


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def linear(p, x):
    return jax.vmap(p)(x)


class Layers(nn.Module):
    """Three Dense layers that a scan has stacked."""

    @nn.compact
    def __call__(self, x):
        dense = nn.scan(_Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return dense()(x, None)[0]


class _Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(x.shape[-1], use_bias=False)(x), None


def stacked(seed: int = 0):
    x = normal(2, 8)
    return lambda p, x: Layers().apply({"params": p}, x), Layers().init(jax.random.key(seed), x)["params"], x


# name: (fn, params, arguments, the axes that keep their own tables, the axis that vectors and groups lie along)
PROGRAMS = {
    "equinox": lambda: (linear, eqx.nn.Linear(8, 6, key=jax.random.key(0)), (normal(2, 8),), (0,), 1),
    "torch convolution": lambda: (
        lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "SAME"),
        {"w": normal(5, 8, 3, 2)},
        (normal(1, 8, 4, 4),),
        (0,),
        1,
    ),
    "stacked": lambda: (*stacked()[:2], (normal(2, 8),), (0, 2), 1),
    "heads": lambda: (
        lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]),
        {"w": normal(8, 2, 3)},
        (normal(2, 8),),
        (1, 2),
        0,
    ),
    "out of heads": lambda: (
        lambda p, x: jnp.einsum("bhk,hkd->bd", x, p["w"]),
        {"w": normal(2, 8, 5)},
        (normal(2, 2, 8),),
        (2,),
        1,
    ),
    "tied": lambda: (lambda p, i: p["w"][i] @ p["w"].T, {"w": normal(9, 8)}, (jnp.array([3, 1]),), (0,), 1),
    "experts": lambda: (
        lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["w"]),
        {"w": normal(2, 8, 3)},
        (normal(2, 4, 8),),
        (0, 2),
        1,
    ),
}


def only(tree, kind):
    (found,) = [x for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind)) if isinstance(x, kind)]
    return found


def selected(params) -> np.ndarray:
    (w,) = [x for x in jax.tree.leaves(params) if x.ndim >= 2]
    return np.asarray(w)


def nearest_of_even_entries(w: np.ndarray, entries: int) -> np.ndarray:
    """A vector's values replaced by the nearest of evenly spaced entries between its ends."""
    table = np.linspace(w.min(), w.max(), entries)
    return table[np.abs(w[:, None] - table).argmin(1)]


@pytest.fixture(autouse=True)
def jax_defaults():
    """Programs as users write them."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", quick(PROGRAMS, "torch convolution", "stacked"))
def test_each_index_that_no_product_sums_over_has_its_table(name) -> None:
    fn, params, args, own, _ = PROGRAMS[name]()
    t = jc.share(2, per=Channels(), roles=roles(fn)(params, *args), init=inits.linear, iterations=0)
    leaf = only(t.apply(t.init(params), params), Codebook)
    w = selected(params)
    rest = tuple(a for a in range(w.ndim) if a not in own)
    rows = w.transpose(*own, *rest).reshape(np.prod([w.shape[a] for a in own]), -1)
    wanted = np.stack([nearest_of_even_entries(row, 2) for row in rows])
    found = np.asarray(leaf.materialize()).transpose(*own, *rest).reshape(rows.shape)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(leaf.table, np.stack([rows.min(1), rows.max(1)]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", quick(PROGRAMS, "tied", "out of heads"))
def test_groups_lie_along_what_products_sum_over(name) -> None:
    fn, params, args, _, axis = PROGRAMS[name]()
    t = jc.share(2, per=Groups(4), roles=roles(fn)(params, *args), init=inits.linear, iterations=0)
    leaf = only(t.apply(t.init(params), params), Codebook)
    groups = np.moveaxis(selected(params), axis, -1).reshape(-1, 4)
    wanted = np.stack([nearest_of_even_entries(group, 2) for group in groups])
    found = np.moveaxis(np.asarray(leaf.materialize()), axis, -1).reshape(-1, 4)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", quick(PROGRAMS, "equinox", "stacked"))
def test_vectors_lie_along_what_products_sum_over(name) -> None:
    fn, params, args, _, axis = PROGRAMS[name]()
    t = share_vectors(3, size=4, key=jax.random.key(0), roles=roles(fn)(params, *args))
    leaf = only(t.apply(t.init(params), params), jc.sharing.VectorCodebook)
    own = np.moveaxis(selected(params), axis, -1).reshape(-1, 4)
    table = np.asarray(leaf.table)
    wanted = table[((own[:, None] - table) ** 2).sum(-1).argmin(1)]
    found = np.moveaxis(np.asarray(leaf.materialize()), axis, -1).reshape(-1, 4)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
def test_what_path_and_rank_settle_needs_no_roles() -> None:
    t = jc.share(2, per=Channels())
    params = {"dense": {"kernel": normal(6, 4)}, "torch": {"weight": normal(5, 8)}, "conv": {"kernel": normal(3, 6, 7)}}
    tables = {path: table.shape for path, table in t.init(params).tables.items()}
    assert tables == {"dense/kernel": (2, 4), "torch/weight": (2, 5), "conv/kernel": (2, 7)}
    vectors = share_vectors(2, size=2, key=jax.random.key(0))
    seen = vectors.apply(vectors.init(params), params)
    assert [seen[k]["weight" if k == "torch" else "kernel"].axis for k in ("dense", "torch", "conv")] == [0, 1, 1]


def test_roles_select_the_matrices_of_products() -> None:
    params = {"scale": normal(8, 6), "position": normal(2, 6), "bias": normal(6)}
    fn = lambda p, x: x @ p["scale"] + p["position"] + p["bias"]  # noqa: E731
    found = roles(fn)(params, normal(2, 8))
    for t in (jc.share(2, roles=found), share_vectors(2, size=2, key=jax.random.key(0), roles=found)):
        seen = t.apply(t.init(params), params)
        assert jc.core.is_compressed(seen["scale"])  # by its product, though it is named as a vector
        assert seen["position"] is params["position"]
        assert seen["bias"] is params["bias"]


REFUSED = {
    r"share: 'w' is in no product of the program": (jc.share(2, per=Channels(), roles=Roles({}), where="w"), (4, 6)),
    r"share: 'w' has an axis that products sum over and keep, both \(mixed, output\)": (
        jc.share(2, per=Channels(), roles=Roles({"w": AxisRoles(("mixed", "output"))})),
        (4, 6),
    ),
    r"share: 'w' has shape \(4, 6\), and no product sums over an axis of it": (
        jc.share(2, per=Groups(2), roles=Roles({"w": AxisRoles(("output", "output"))})),
        (4, 6),
    ),
    r"share_vectors: 'w' has shape \(4, 6\), and no product sums over an axis of it \(indexed, output\)": (
        share_vectors(2, size=2, key=jax.random.key(0), roles=Roles({"w": AxisRoles(("indexed", "output"))})),
        (4, 6),
    ),
    r"share_vectors: 'w' has 2 axes, and the roles given are of 3": (
        share_vectors(2, size=2, key=jax.random.key(0), roles=Roles({"w": AxisRoles(("batch",) * 3)})),
        (4, 6),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_roles_that_do_not_fit_are_refused(message) -> None:
    t, shape = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        t.init({"w": normal(*shape)})


@pytest.mark.parametrize("per", quick([jc.core.Tensor(), Channels(0), Buckets(10)], Channels(0)), ids=repr)
@pytest.mark.parametrize("init", [inits.random, inits.plus_plus], ids=lambda i: i.name)
def test_another_leaf_changes_no_drawn_table(per, init) -> None:
    t = jc.share(3, per=per, init=init, iterations=0, key=jax.random.key(3))
    alone = t.init({"m": normal(6, 5)})
    beside = t.init({"a": normal(4, 4, seed=1), "m": normal(6, 5), "z": normal(4, 4, seed=2)})
    assert_same_bits(beside.tables["m"], alone.tables["m"])
    same = t.init({"a": normal(6, 5), "m": normal(6, 5)})
    assert not np.array_equal(same.tables["a"], same.tables["m"])


def test_another_leaf_changes_no_drawn_vectors() -> None:
    t = share_vectors(3, size=2, key=jax.random.key(3), iterations=0)
    beside = t.init({"a": normal(4, 4, seed=1), "m": normal(6, 5), "z": normal(4, 4, seed=2)})
    assert_same_bits(beside["m"], t.init({"m": normal(6, 5)})["m"])
    same = t.init({"a": normal(6, 5), "m": normal(6, 5)})
    assert not np.array_equal(same["a"], same["m"])
