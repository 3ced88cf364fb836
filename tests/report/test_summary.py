"""``summary``: the figures are those of numpy, and of the file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc

RNG = np.random.default_rng(0)
PARAMS = {
    "a": {"kernel": jnp.asarray(RNG.normal(size=(64, 32)), jnp.float32), "bias": jnp.zeros(32)},
    "b": {"kernel": jnp.asarray(RNG.normal(size=(32, 8)), jnp.float32)},
    "table": jnp.asarray(RNG.normal(size=(10, 64)), jnp.bfloat16),
}
T = jc.by_path({"a/.*": jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4))), "b/.*": jc.quantize(jc.Int(8))})
TREE = T.apply(T.init(PARAMS), PARAMS)
IDS = jax.ShapeDtypeStruct((5,), "int32")


def net(p, ids):
    x = p["table"][ids].astype(jnp.float32)
    y = jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"][None])
    return (y @ y.T) @ (y @ p["b"]["kernel"])


def test_rows_are_what_the_tree_holds():
    s = jc.summary(jc.pack(TREE))
    rows = {r.path: r for r in s.rows}
    assert list(rows) == ["a/bias", "a/kernel", "b/kernel", "table"]
    kernel = rows["a/kernel"]
    # Four bits a code, one a mask entry, a float32 scale a column.
    assert (kernel.method, kernel.shape, kernel.bytes) == ("Masked Quantized int4", (64, 32), 64 * 32 * 5 // 8 + 32 * 4)
    assert kernel.bits == 8 * kernel.bytes / (64 * 32)
    dense = np.asarray(jc.materialize(TREE)["a"]["kernel"])
    assert kernel.zeros == (dense == 0).mean()
    assert rows["table"].bytes == 10 * 64 * 2
    assert sum(r.share for r in s.rows) == pytest.approx(1)
    assert rows["table"].share == rows["table"].bytes / s.bytes
    assert s.plain == sum(x.nbytes for x in jax.tree.leaves(PARAMS))
    assert s.bytes == s.held == jc.nbytes(jc.pack(TREE))
    assert s.size == sum(x.size for x in jax.tree.leaves(PARAMS))
    assert "jaxcomp.pack" not in str(s)
    assert s.macs is None
    assert " MACs" not in str(s)


def test_a_tree_in_training_says_that_it_is_large():
    s = jc.summary(TREE)
    assert s.bytes == jc.nbytes(jc.pack(TREE))
    assert s.held == jc.nbytes(TREE) > s.plain
    assert f"takes {s.held:,} bytes of memory, more than as plain arrays, packed {s.bytes:,}: call jaxcomp.pack" in str(
        s
    )


@pytest.mark.parametrize("packed", [True, False])
def test_a_function_says_macs_and_what_stayed_float(packed):
    s = jc.summary(jc.pack(TREE) if packed else TREE, net, IDS)
    rows = {r.path: r for r in s.rows}
    assert rows["a/kernel"].macs == 5 * 64 * 32
    assert rows["b/kernel"].macs == 5 * 32 * 8
    assert rows["a/bias"].why == "no product reads it"
    assert rows["table"].why == "no transform took it"
    assert rows["a/kernel"].why == ""
    assert s.between == 5 * 32 * 5 + 5 * 5 * 8
    assert "1,000 more MACs are between activations" in str(s)
    assert s.macs + s.between == jc.cost(net)(PARAMS, IDS).macs


def test_activations_by_rules():
    rules = {"a/kernel": jc.Act(8, symmetric=True)}
    s = jc.summary(TREE, net, IDS, rules=rules, integer=True)
    rows = {r.path: r for r in s.rows}
    assert (rows["a/kernel"].done, rows["a/kernel"].why) == ("integer", "")
    assert (rows["b/kernel"].done, rows["b/kernel"].why) == ("exact", "no rule matches it")


def test_shapes_and_tracers():
    shapes = jax.eval_shape(lambda p: jc.pack(T.apply(T.init(p), p)), PARAMS)
    s, said = jc.summary(shapes, net, IDS), []
    assert s.bytes == jc.summary(TREE).bytes
    assert s.zeros is None
    jax.jit(lambda p: said.append(jc.summary(T.apply(T.init(p), p)).bytes))(PARAMS)
    assert said == [s.bytes]


def test_html_is_escaped_and_whole():
    s = jc.summary({"<b>": jc.quantize(jc.Int(8)).apply((), {"w": jnp.ones((2, 2))})})
    page = s._repr_html_()
    assert "&lt;b&gt;/w" in page
    assert "<b>" not in page
    assert page.count("<tr>") == 3


def test_without_leaves():
    assert str(jc.summary({})).splitlines()[0].split()[0] == "leaf"
    assert jc.summary({"step": 3, "name": "x"}).rows == ()


def test_leaves_of_every_type():
    gone = jnp.ones(3)
    tree = {
        "int4": jnp.zeros(8, jnp.int4),
        "float8": jnp.ones(4, jnp.float8_e4m3fn),
        "bool": np.zeros(3, bool),
        "empty": jnp.zeros((0, 4)),
        "key": jax.random.key(1),
        "nan": jnp.array([np.nan, 0.0]),
        "gone": gone,
    }
    gone.delete()
    s = jc.summary(tree)
    zeros = {r.path: r.zeros for r in s.rows}
    want = {"int4": 1.0, "float8": 0.0, "bool": None, "empty": None, "key": None, "nan": 0.5, "gone": None}
    assert zeros == want
    assert "key<fry>" in str(s)


def test_nothing_of_a_function_that_multiplies_is_lost():
    with pytest.raises(ValueError, match="widths"):
        jc.summary(PARAMS, lambda p, x: (_ for _ in ()).throw(ValueError("widths")), IDS)
    s = jc.summary(PARAMS, lambda p, x: p["a"]["bias"] * 2, IDS)
    assert (s.macs, {r.why for r in s.rows}) == (0, {"no product reads it"})
