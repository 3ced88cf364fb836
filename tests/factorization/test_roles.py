"""Rows, columns and stacked layers are those that the program multiplies; factored functions run what comes of it."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.activations import coverage, factored
from jaxcomp.core.roles import AxisRoles, Roles
from jaxcomp.factorization import CP, SVD, Budget, Energy, LowRank, RankOne, Tucker, Tucker2, choose_ranks
from jaxcomp.trace import cost, roles

RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.fixture(autouse=True)
def jax_defaults():
    """Programs as users write them."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


class _Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(x.shape[-1], use_bias=False)(x), None


class Layers(nn.Module):
    """Three Dense layers that a scan has stacked."""

    @nn.compact
    def __call__(self, x):
        dense = nn.scan(_Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return dense()(x, None)[0]


def linen_stack():
    params = Layers().init(jax.random.key(0), normal(2, 12))["params"]
    return lambda p, x: Layers().apply({"params": p}, x), params, normal(2, 12)


def conv(order: str):
    return lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", order, "NHWC"))


# name: (fn, params, the argument, the shape of the matrices: stacked layers, rows, columns)
PROGRAMS = {
    "equinox": lambda: (
        lambda p, x: jax.vmap(p)(x),
        eqx.nn.Linear(12, 10, use_bias=False, key=jax.random.key(0)),
        normal(4, 12),
        (1, 10, 12),
    ),
    "torch convolution": lambda: (
        lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "SAME"),
        {"w": normal(10, 12, 3, 2)},
        normal(1, 12, 5, 5),
        (1, 10, 72),
    ),
    "linen convolution": lambda: (conv("HWIO"), {"w": normal(3, 2, 8, 10)}, normal(1, 5, 5, 8), (1, 48, 10)),
    "stacked": lambda: (*linen_stack(), (3, 12, 12)),
    "heads": lambda: (
        lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]),
        {"w": normal(12, 3, 5)},
        normal(2, 12),
        (1, 12, 15),
    ),
    "out of heads": lambda: (
        lambda p, x: jnp.einsum("bhk,hkd->bd", x, p["w"]),
        {"w": normal(3, 5, 12)},
        normal(2, 3, 5),
        (1, 15, 12),
    ),
    "stacked heads": lambda: (
        lambda p, x: lax.scan(lambda x, w: (jnp.einsum("bd,dhk->bhk", x, w).reshape(x.shape), None), x, p["w"])[0],
        {"w": normal(2, 12, 3, 4)},
        normal(2, 12),
        (2, 12, 12),
    ),
    "tied": lambda: (
        lambda p, i: p["w"][i] @ p["w"].T,
        {"w": normal(20, 12)},
        jnp.array([3, 1]),
        (1, 20, 12),
    ),
    "experts": lambda: (
        lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["w"]),
        {"w": normal(2, 12, 9)},
        normal(2, 4, 12),
        (2, 12, 9),
    ),
}


def only(tree) -> LowRank:
    (found,) = [x for x in jax.tree.leaves(tree, is_leaf=jc.core.is_compressed) if jc.core.is_compressed(x)]
    return found


def truncated(w: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_layer_is_its_own_truncated_svd(name) -> None:
    fn, params, x, matrices = PROGRAMS[name]()
    t = jc.low_rank(2, roles=roles(fn)(params, x))
    leaf = only(t.apply(t.init(params), params))
    (w,) = jax.tree.leaves(params)
    assert isinstance(leaf, LowRank)
    assert leaf.shape == w.shape
    wanted = truncated(np.asarray(w).reshape(matrices), 2)
    np.testing.assert_allclose(np.asarray(leaf.materialize()).reshape(matrices), wanted, atol=1e-4)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_factored_function_runs_them_thin_and_does_with_each_axis_what_the_leaf_says(name) -> None:
    fn, params, x, _ = PROGRAMS[name]()
    tree = jc.factorize(params, 2, roles=roles(fn)(params, x))
    wanted, found = fn(jc.materialize(tree), x), factored(fn)(tree, x)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * float(jnp.abs(wanted).max()))
    assert cost(factored(fn))(tree, x).macs < cost(fn)(params, x).macs
    assert {row.done for row in coverage(fn, {})(tree, x).rows} == {"factored"}
    leaf, said = only(tree), roles(factored(fn))(tree, x)
    assert len(said) == 2
    for path, of_program in said.items():
        own = leaf.field_roles(path.rsplit("/", 1)[-1])
        if name == "tied" and "mixed" in of_program.names:
            continue  # the factor v is multiplied from both sides: once for the lookup, once for the product
        # A window is summed over as input features are, and experts stand in front as stacked layers do.
        same = {"spatial": "contracted", "batch": "stacked"}
        assert tuple(same.get(n, n) for n in of_program.names) == own.names, path


@pytest.mark.parametrize("method", [RankOne(), SVD(cols=1), SVD(stacked=1)], ids=repr)
def test_every_method_of_matrices_takes_what_it_is_not_told(method) -> None:
    fn, params, x, _ = PROGRAMS["stacked"]()
    t = jc.low_rank(3, method=method, roles=roles(fn)(params, x))
    (w,) = jax.tree.leaves(params)
    found = only(t.apply(t.init(params), params)).materialize()
    np.testing.assert_allclose(found, truncated(np.asarray(w), 3), atol=1e-3)


def test_ranks_by_energy_are_those_of_the_matrices_that_the_program_multiplies() -> None:
    thin = np.einsum("dr,rhk->dhk", RNG.normal(size=(12, 2)), RNG.normal(size=(2, 3, 5)))
    fn, _, x, _ = PROGRAMS["heads"]()
    params = {"w": jnp.asarray(thin, jnp.float32)}
    found = roles(fn)(params, x)
    assert choose_ranks(params, Energy(0.9999), roles=found) == {"w": 2}
    tree = jc.factorize(params, Budget(params=0.5), roles=found)
    assert tree["w"].v.shape[1:] == (3, 5)


def test_kernels_in_flax_order_suit_tucker_and_stacked_ones_too() -> None:
    params, x = {"w": normal(2, 3, 3, 6, 6)}, normal(1, 5, 5, 6)
    fn = lambda p, x: lax.scan(lambda x, w: (conv("HWIO")({"w": w}, x), None), x, p["w"])[0]  # noqa: E731
    found = roles(fn)(params, x)
    for method, rank in ((Tucker2(), (3, 3)), (CP(steps=4, sweeps=2), 3)):
        t = jc.low_rank(rank, method=method, roles=found)
        leaf = only(t.apply(t.init(params), params))
        assert (leaf.stacked, leaf.shape) == (1, (2, 3, 3, 6, 6))
    assert isinstance(only(jc.factorize(params, (6, 6), method=Tucker2(), roles=found)), Tucker)
    np.testing.assert_allclose(
        jc.materialize(jc.factorize(params, (6, 6), method=Tucker2(), roles=found))["w"], params["w"], atol=1e-4
    )


def test_roles_select_the_matrices_of_products() -> None:
    params = {"scale": normal(8, 6), "position": normal(2, 6), "bias": normal(6)}
    fn = lambda p, x: x @ p["scale"] + p["position"] + p["bias"]  # noqa: E731
    tree = jc.factorize(params, 2, roles=roles(fn)(params, normal(2, 8)))
    assert isinstance(tree["scale"], LowRank)
    assert tree["position"] is params["position"]


def test_what_path_and_rank_settle_needs_no_roles() -> None:
    params = {"torch": {"weight": normal(5, 8)}, "conv": {"kernel": normal(3, 3, 4, 7), "weight": normal(7, 4, 3, 3)}}
    tree = jc.factorize(params, 2)
    assert [tree["torch"]["weight"].outputs_first, tree["conv"]["kernel"].outputs_first] == [True, False]
    assert tree["conv"]["kernel"].u.shape == (3, 3, 4, 2)
    assert tree["conv"]["weight"].v.shape == (2, 4, 3, 3)


TORCH = Roles({"w": AxisRoles(("output", "contracted", "spatial", "spatial"))})
APART = Roles({"w": AxisRoles(("contracted", "output", "contracted"))})
INSIDE = Roles({"w": AxisRoles(("contracted", "batch", "output"))})
REFUSED = {
    r"'w' has 3 axes, and neither its path nor its rank settles .* name them, as in method=SVD\(cols=1, stacked=0\)": (
        {},
        (4, 5, 6),
    ),
    r"'w' has 4 axes, and neither .* method=Tucker2\(stacked=0\)": ({"method": Tucker2()}, (3, 3, 4, 5)),
    r"'w' has 4 axes, and neither .* method=RankOne\(cols=1, stacked=0\)": ({"method": RankOne(cols=2)}, (3, 3, 4, 5)),
    r"'w' has the axes output, contracted, spatial, spatial, and Tucker2 wants a kernel \(\*spatial, I, O\); use SVD": (
        {"method": Tucker2(), "roles": TORCH},
        (5, 4, 3, 3),
    ),
    r"and CP wants a kernel": ({"method": CP(), "roles": TORCH}, (5, 4, 3, 3)),
    r"'w' has the axes contracted, output, contracted, which are not the rows and columns": (
        {"roles": APART},
        (4, 5, 6),
    ),
    r"'w' has the axes contracted, batch, output, which are not the rows": ({"roles": INSIDE}, (4, 5, 6)),
    r"'w' is in no product of the program": ({"roles": Roles({}), "where": "w"}, (4, 5)),
    r"'w' has 2 axes, and the roles given are of 3": ({"roles": APART}, (4, 5)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_axes_that_are_not_known_or_do_not_fit_are_refused(message) -> None:
    options, shape = REFUSED[message]
    with pytest.raises(ValueError, match=f"low_rank: .*{message}"):
        jc.low_rank(1, **options).init({"w": normal(*shape)})


def test_moments_want_the_inputs_as_rows() -> None:
    with pytest.raises(ValueError, match=r"'fc/weight' has shape .* whose rows are outputs, and moments weigh inputs"):
        jc.factorize({"fc": {"weight": normal(4, 4)}}, 1, moments={"fc/weight": jnp.ones(4)})


def test_numbers_that_are_given_need_no_roles() -> None:
    w = normal(2, 4, 3, 5)
    for cols, stacked, matrices in ((1, 0, (1, 24, 5)), (2, 1, (2, 4, 15)), (3, 0, (1, 2, 60)), (1, 2, (8, 3, 5))):
        leaf = jc.factorize({"w": w}, 1, method=SVD(cols, stacked))["w"]
        wanted = truncated(np.asarray(w).reshape(matrices), 1)
        np.testing.assert_allclose(np.asarray(leaf.materialize()).reshape(matrices), wanted, atol=1e-4)


def test_roles_of_another_kind() -> None:
    with pytest.raises(TypeError, match=r"low_rank: roles must be what jaxcomp.roles\(fn\)"):
        jc.low_rank(2, roles={"w": ("contracted", "output")})
