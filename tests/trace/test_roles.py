"""What a program does with each axis of its parameters, read off real modules in every style."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxcomp.core.roles import AxisRoles, roles_of
from jaxcomp.trace import roles
from jaxcomp.trace.program import is_array_like
from tests.trace.models import KEY, Scanned, variables_of

S = jax.ShapeDtypeStruct
IN, OUT, WINDOW, ROWS, BATCH, LAYER = "contracted", "output", "spatial", "indexed", "batch", "stacked"


def shape(*sizes):
    return S(sizes, jnp.float32)


def linen(module, x):
    return {k.removeprefix("params/"): v.names for k, v in roles(module.apply)(shapes(module, x), x).items()}


def shapes(module, x):
    return jax.eval_shape(module.init, KEY, x)


def equinox(make, *sizes):
    """The names of an Equinox module's roles on one example, and on a batch under vmap."""
    model = eqx.filter_eval_shape(make, key=KEY)
    one = roles(lambda m, x: m(x))(model, shape(*sizes))
    many = roles(lambda m, x: jax.vmap(m)(x))(model, shape(5, *sizes))
    assert dict(one) == dict(many)
    return {path: r.names for path, r in one.items()}


@pytest.mark.parametrize(
    ("module", "x", "expected"),
    [
        (nn.Dense(3), shape(2, 5), (IN, OUT)),
        (nn.Conv(8, (3, 3)), shape(2, 8, 8, 4), (WINDOW, WINDOW, IN, OUT)),
        (nn.Conv(8, (3,)), shape(2, 8, 4), (WINDOW, IN, OUT)),
        (nn.Conv(8, (3, 3), feature_group_count=2), shape(2, 8, 8, 4), (WINDOW, WINDOW, IN, OUT)),
        (nn.Conv(4, (3, 3), feature_group_count=4), shape(2, 8, 8, 4), (WINDOW, WINDOW, IN, OUT)),
        (nn.ConvTranspose(8, (2, 2), strides=(2, 2)), shape(2, 8, 8, 4), (WINDOW, WINDOW, IN, OUT)),
        (nn.DenseGeneral((2, 3)), shape(2, 5), (IN, OUT, OUT)),
        (nn.DenseGeneral(7, axis=(-2, -1)), shape(2, 4, 5), (IN, IN, OUT)),
        (nn.DenseGeneral(7, axis=-1, batch_dims=(0,)), shape(4, 6, 5), (BATCH, IN, OUT)),
    ],
)
def test_linen_kernels(module, x, expected) -> None:
    assert linen(module, x) == {"kernel": expected}


def test_linen_attention_has_its_heads_among_the_outputs_then_among_the_inputs() -> None:
    found = linen(nn.MultiHeadDotProductAttention(2), shape(2, 3, 8))
    assert found == {**{f"{n}/kernel": (IN, OUT, OUT) for n in ("query", "key", "value")}, "out/kernel": (IN, IN, OUT)}


def test_nnx_modules() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv, self.head = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.Linear(4, 5, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.conv(x)).mean((1, 2)))

    graph, state = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    found = roles(lambda s, x: nnx.merge(graph, s)(x))(state, shape(2, 6, 6, 3))
    assert [r.names for r in found.values()] == [(WINDOW, WINDOW, IN, OUT), (IN, OUT)]


def test_equinox_weights_have_their_outputs_first() -> None:
    assert equinox(lambda key: eqx.nn.Linear(4, 6, key=key), 4) == {"weight": (OUT, IN)}
    assert equinox(lambda key: eqx.nn.Conv2d(3, 5, 3, key=key), 3, 8, 8) == {"weight": (OUT, IN, WINDOW, WINDOW)}
    grouped = equinox(lambda key: eqx.nn.Conv2d(4, 8, 3, groups=4, key=key), 4, 8, 8)
    assert grouped == {"weight": (OUT, IN, WINDOW, WINDOW)}
    model = eqx.filter_eval_shape(eqx.nn.MultiheadAttention, 2, 8, key=KEY)
    found = roles(lambda m, x: m(x, x, x))(model, shape(5, 8))
    assert {path: r.names for path, r in found.items()} == {
        f"{name}_proj/weight": (OUT, IN) for name in ("query", "key", "value", "output")
    }


def test_torch_layout_and_a_product_from_the_left() -> None:
    p = {"w": shape(6, 4), "m": shape(6, 7)}
    found = roles(lambda p, x: (x @ p["w"].T) @ p["m"])(p, shape(2, 4))
    assert found["w"].names == (OUT, IN)
    assert roles(lambda p, x: p["m"].T @ (p["w"] @ x))(p, shape(4, 2))["m"].names == (IN, OUT)


def test_layers_of_a_scan_are_stacked() -> None:
    tokens = S((2, 3), jnp.int32)
    found = linen(Scanned(), tokens)
    dense = [v for k, v in found.items() if "Dense" in k]
    assert dense == [(LAYER, IN, OUT)] * 2
    assert [v for k, v in found.items() if "query" in k] == [(LAYER, IN, OUT, OUT)]
    assert [v for k, v in found.items() if "out/kernel" in k] == [(LAYER, IN, IN, OUT)]
    assert found["Embed_0/embedding"] == (ROWS, OUT)


def test_layers_that_a_loop_indexes_are_stacked_too() -> None:
    def fn(p, x):
        return jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i]), x)

    assert roles(fn)({"w": shape(3, 4, 4)}, shape(2, 4))["w"] == AxisRoles((LAYER, IN, OUT))


def test_a_tied_embedding_has_the_roles_of_its_logits() -> None:
    tokens = S((2, 3), jnp.int32)

    def tied(p, ids):
        return jnp.tanh(p["embedding"][ids]) @ p["embedding"].T

    def table(p, ids):
        return p["embedding"][ids]

    p = {"embedding": shape(11, 8)}
    assert roles(tied)(p, tokens)["embedding"].names == (OUT, IN)
    assert roles(table)(p, tokens)["embedding"].names == (ROWS, OUT)


def test_a_weight_used_both_ways_is_mixed_and_an_error_where_it_matters() -> None:
    def there_and_back(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    p = {"w": jnp.ones((4, 8))}
    found = roles(there_and_back)(p, jnp.ones((2, 4)))
    assert found["w"].names == ("mixed", "mixed")
    assert (found["w"].channels, found["w"].inputs) == ((), ())
    with pytest.raises(ValueError, match=r"products sum over and keep, both \(mixed, mixed\); name the axes yourself"):
        roles_of("w", 2, found)


def test_weights_under_vmap_have_a_batch_axis_each_expert_its_own() -> None:
    def experts(p, x):
        return jax.vmap(lambda w, x: x @ w)(p["w"], x)

    assert roles(experts)({"w": shape(3, 4, 5)}, shape(3, 2, 4))["w"].names == (BATCH, IN, OUT)
    shared = roles(lambda p, x: jax.vmap(lambda x: x @ p["w"])(x))({"w": shape(4, 5)}, shape(3, 2, 4))
    assert shared["w"].names == (IN, OUT)


def test_an_einsum_names_each_letter() -> None:
    found = roles(lambda p, x: jnp.einsum("bshd,hdm->bsm", x, p["out"]))({"out": shape(2, 4, 8)}, shape(3, 5, 2, 4))
    assert found["out"].names == (IN, IN, OUT)


def test_masked_and_rounded_weights_keep_their_roles() -> None:
    def fn(p, x):
        return x @ (jnp.round(p["w"] * 4.0) / 4.0 * (p["w"] > 0))

    assert roles(fn)({"w": shape(4, 5)}, shape(2, 4))["w"].names == (IN, OUT)


def test_a_split_axis_with_two_roles_is_mixed() -> None:
    def heads(p, x):  # (8, 6) as (2, 4, 6): the first half is a batch, the second is summed
        return jnp.einsum("bhd,hdo->bho", x, p["w"].reshape(2, 4, 6))

    assert roles(heads)({"w": shape(8, 6)}, shape(3, 2, 4))["w"].names == ("mixed", OUT)


def test_a_program_without_products_is_refused_with_its_sites() -> None:
    with pytest.raises(ValueError, match="no product of a parameter was found; the sites are none"):
        roles(lambda p, x: x + p["b"])({"b": shape(3)}, shape(2, 3))


def test_roles_of_arrays_are_those_of_shapes() -> None:
    x = jnp.ones((2, 5))
    variables = variables_of(nn.Dense(3), x)
    assert all(is_array_like(leaf) for leaf in jax.tree.leaves(variables))
    assert dict(roles(nn.Dense(3).apply)(variables, x)) == dict(roles(nn.Dense(3).apply)(shapes(nn.Dense(3), x), x))
