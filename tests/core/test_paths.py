"""Rules of paths: what is a matrix, ordered tables, a key a leaf."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.activations import Act, quantize_function
from jaxcomp.core.paths import first_matches, key_of_leaf, matches, matrices
from jaxcomp.core.slots import weight_mask
from jaxcomp.pruning.specs import Given

W = jnp.ones((3, 4))


@pytest.mark.parametrize(
    ("path", "leaf", "wanted"),
    [
        ("Dense_0/kernel", W, True),
        ("lora_a", W, True),
        ("lora_b", W, True),
        ("block/w_b", W, True),
        ("a", W, True),
        ("b", jnp.ones(4), False),
        ("b", jnp.ones((3, 4), jnp.int32), False),
        ("layers/bias", W, False),
        ("layers/out_bias", W, False),
        ("norm/scale", W, False),
        ("bn_gamma", W, False),
        ("kernel", jnp.ones(3), False),
        ("b/kernel", W, True),
    ],
)
def test_matrices_are_what_is_not_named_as_a_vector(path, leaf, wanted) -> None:
    assert matrices(path, leaf) is wanted


def test_b_of_two_axes_is_asked_about() -> None:
    message = r"matrices: 'layers/b' of shape \(3, 4\) may be a matrix, or the biases of stacked.*where=.*roles="
    with pytest.raises(ValueError, match=message):
        matrices("layers/b", W)
    params = {"layers": {"w": jnp.ones((2, 3, 4)), "b": W}}
    with pytest.raises(ValueError, match=message):
        weight_mask(params)
    assert weight_mask(params, "layers/w") == {"layers": {"w": True, "b": False}}


def test_a_path_is_a_rule_of_itself_whatever_its_characters() -> None:
    assert matches("a+b/kernel", "a+b/kernel", None)
    assert matches("experts[0].w", "experts[0].w", None)
    assert not matches("kernel", "a/kernel", None)
    with pytest.raises(ValueError, match=r"rule '\(' is not a regular expression"):
        matches("(", "kernel", None)


def test_the_first_rule_wins_and_sees_the_leaf() -> None:
    named = [("a", jnp.ones(3)), ("b", W), ("c", W), ("d", jnp.ones(2))]
    found = first_matches(["a", lambda path, x: x.ndim == 2, ".*d"], named, owner="f")
    assert found == [0, 1, 1, 2]
    assert first_matches(["b"], named, owner="f") == [None, 0, None, None]
    assert first_matches([], named, owner="f") == [None] * 4


LEFT = r"matches nothing that an earlier rule did not take; the"


@pytest.mark.parametrize(
    ("owner", "call"),
    [
        ("by_path", lambda p: jc.by_path({".*": jc.prune(0.5), "none": jc.prune(0.5)}).init(p)),
        (
            "by_path",
            lambda p: jc.federated.by_path({".*": jc.federated.sign(), "none": jc.federated.sign()}).init(p),
        ),
        ("prune: Given", lambda p: jc.prune(scope=Given({".*": 0.5, "none": 0.1})).init(p)),
        ("regrow", lambda p: jc.pruning.regrow({".*": 0.5, "none": 0.1}, key=jax.random.key(0)).init(p)),
        (
            "quantize_function",
            lambda p: quantize_function(lambda p, x: x @ p["kernel"], {".*": None, "none": Act(8)})(p, None, W.T),
        ),
    ],
)
def test_every_table_refuses_a_rule_that_nothing_is_left_for(owner, call) -> None:
    with pytest.raises(ValueError, match=rf"^{owner}: rule 'none' {LEFT} (paths|sites) are 'kernel'\.$"):
        call({"kernel": W})


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)], ids=["typed", "raw"])
def test_a_leafs_key_is_its_paths_checksum_folded_in(key) -> None:
    for path in ("kernel", "Dense_0/kernel", "ä/κ", ""):
        want = jax.random.fold_in(key, zlib.crc32(path.encode()))
        got = key_of_leaf(key, path)
        np.testing.assert_array_equal(jax.random.bits(got, (4,)), jax.random.bits(want, (4,)))
