"""What new users stumble over, each with the message that says the mend."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from functools import wraps

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxcomp as jc
from jaxcomp.core.plain import _READERS
from jaxcomp.core.records import CONSTANTS, MAKERS, TAGS, text_of
from jaxcomp.core.transform import stateless
from tests import laws
from tests.marks import quick
from tests.test_laws import TRANSFORMS

KERNEL = np.arange(1, 33, dtype=np.float32).reshape(8, 4) / 32
PARAMS = {"Dense_0": {"kernel": jnp.asarray(KERNEL), "bias": jnp.zeros(4)}}
X = np.ones((2, 8), np.float32)
LEAVES = {"prune": jc.prune(0.5), "quantize": jc.quantize(jc.Int(4)), "low_rank": jc.low_rank(2), "share": jc.share(4)}


def leaf_of(name: str) -> jc.core.CompressedLeaf:
    t = LEAVES[name]
    return t.apply(t.init(PARAMS), PARAMS)["Dense_0"]["kernel"]


# Forgetting materialize: a leaf acts as the array that it stands for


@pytest.mark.parametrize("packed", [False, True], ids=["made", "packed"])
@pytest.mark.parametrize("name", quick(LEAVES, "prune", "quantize"))
def test_a_leaf_acts_as_its_array(name, packed) -> None:
    leaf = jc.pack(leaf_of(name)) if packed else leaf_of(name)
    dense = np.asarray(leaf.materialize())
    for x in (X, jnp.asarray(X)):
        assert isinstance(x @ leaf, jax.Array)
        np.testing.assert_array_equal(x @ leaf, jnp.asarray(X) @ leaf.materialize())
    np.testing.assert_array_equal(leaf[...], dense)
    np.testing.assert_array_equal(leaf[1], dense[1])
    np.testing.assert_array_equal(2 * leaf - 1, 2 * dense - 1)
    np.testing.assert_array_equal(leaf > 0.5, dense > 0.5)
    np.testing.assert_array_equal(jnp.asarray(leaf), dense)
    array = np.asarray(leaf)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, dense)
    assert len(list(leaf)) == 8, "iteration ends"


def test_a_leaf_acts_as_its_array_in_jit_and_under_grad() -> None:
    t = jc.quantize(jc.Int(4))

    def loss(params):
        return jnp.sum(jnp.asarray(X) @ t.apply((), params)["Dense_0"]["kernel"])

    def materialized(params):
        return jnp.sum(jnp.asarray(X) @ jc.materialize(t.apply((), params))["Dense_0"]["kernel"])

    laws.assert_same_bits(jax.jit(jax.grad(loss))(PARAMS), jax.jit(jax.grad(materialized))(PARAMS))


def test_linen_and_nnx_take_leaves_that_are_not_materialized() -> None:
    leaf = leaf_of("quantize")
    dense = jnp.asarray(X) @ leaf.materialize()
    out = nn.Dense(4).apply({"params": {"kernel": leaf, "bias": PARAMS["Dense_0"]["bias"]}}, jnp.asarray(X))
    np.testing.assert_array_equal(out, dense)
    graphdef, state = nnx.split(nnx.Linear(8, 4, use_bias=False, rngs=nnx.Rngs(0)))
    seen = jc.quantize(jc.Int(4)).apply((), state)
    merged = nnx.merge(graphdef, seen)(jnp.asarray(X))
    np.testing.assert_array_equal(merged, nnx.merge(graphdef, jc.materialize(seen))(jnp.asarray(X)))


def test_what_a_leaf_has_not_names_the_mend() -> None:
    with pytest.raises(AttributeError, match=r"Masked has no attribute 'reshape': .* materialize first"):
        leaf_of("prune").reshape(-1)
    with pytest.raises(AttributeError, match="'Masked' object has no attribute 'kernel'"):
        _ = leaf_of("prune").kernel
    assert not hasattr(leaf_of("prune"), "sum")


@pytest.mark.parametrize("name", quick(LEAVES, "prune", "quantize"))
def test_an_optimizer_of_a_compressed_tree(name) -> None:
    seen = {"Dense_0": {"kernel": leaf_of(name)}}
    with pytest.raises(TypeError, match=r"wrap_optax: 'Dense_0/kernel' is a compressed leaf, .*; materialize the tree"):
        jc.wrap_optax(optax.adam(0.1), jc.core.identity()).init(seen)
    with pytest.raises(
        ValueError, match=type(seen["Dense_0"]["kernel"]).__name__
    ):  # optax's own, which names the class
        optax.apply_updates(seen, {"Dense_0": {"kernel": np.ones((8, 4), np.float32)}})


def test_leaves_pickle_and_copy_still() -> None:
    leaf = pickle.loads(pickle.dumps(leaf_of("prune")))
    laws.assert_same_bits(leaf.materialize(), leaf_of("prune").materialize())
    grid = pickle.loads(pickle.dumps(jc.Log(4)))
    assert grid == jc.Log(4)
    assert grid.compander is jc.Log(4).compander


# Wrong arguments, accepted once and failing later


def optimizer() -> optax.GradientTransformation:
    return optax.sgd(0.1)


WRONG = {
    "a list in chain": (
        lambda: jc.chain([jc.prune(0.5), jc.quantize(jc.Int(4))]),
        r"chain: wants transforms, got a list of them; write chain\(a, b\)",
    ),
    "a constructor": (lambda: jc.chain(jc.prune, jc.Int(4)), r"prune is no transform but makes one; .* prune\(0.5\)"),
    "a grid in chain": (
        lambda: jc.chain(jc.prune(0.5), jc.Int(4)),
        r"chain: Int\(4\) is no transform but goes into one; write quantize\(Int\(4\)\)",
    ),
    "a grid in by_path": (
        lambda: jc.by_path({".*": jc.Log(4)}),
        r"by_path: rule '.\*': Log\(4\) is no transform but goes into one; write quantize\(Log\(4\)\)",
    ),
    "no table": (
        lambda: jc.by_path([(".*", jc.prune(0.5))]),
        r"by_path: wants a table .* as in \{'.\*': prune\(0.5\)\}",
    ),
    "an optimizer in chain": (lambda: jc.chain(optimizer()), r"but an optimizer; write wrap_optax\(optimizer, trans"),
    "something else": (lambda: jc.once(3), r"once: 3 is no transform; give one such as prune\(0.5\)"),
    "wrap_optax swapped": (
        lambda: jc.wrap_optax(jc.prune(0.5), optimizer()),
        r"wrap_optax: the optimizer comes first; write wrap_optax\(optimizer, transform\)",
    ),
    "wrap_optax of two": (lambda: jc.wrap_optax(optimizer(), optimizer()), "wrap_optax: .* is no transform"),
    "gate by a number": (
        lambda: jc.gate(jc.prune(0.5), 100),
        r"gate: due must be a function of the step, got 100; write gate\(transform, every\(100\)\)",
    ),
    "when by a number": (lambda: jc.core.when(jc.prune(0.5), 10), r"write when\(transform, every\(10\)\)"),
    "gate of a grid": (lambda: jc.gate(jc.Int(4), jc.every(2)), r"gate: Int\(4\) is no transform"),
    "accumulate": (lambda: jc.pruning.accumulate(jc.prune), "accumulate: prune is no transform but makes one"),
    "from_zero": (lambda: jc.pruning.unmasking.from_zero(jc.prune), "from_zero: prune is no transform but makes one"),
    "no rule": (lambda: jc.prune(0.5, where=3).init(PARAMS), r"a rule is a regular expression or a predicate .* got 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_say_the_mend(name) -> None:
    make, message = WRONG[name]
    with pytest.raises(TypeError, match=message):
        make()


SWAPPED = quick(
    ["prune", "int4", "joint", "by_path", "gate_open", "once", "share", "low_rank", "rigl", "stochastic"],
    "prune",
    "int4",
    "joint",
    "by_path",
    "gate_open",
)


@pytest.mark.parametrize("name", SWAPPED)
def test_state_and_parameters_swapped(name) -> None:
    t = TRANSFORMS[name]
    params = {"dense": {"kernel": jnp.asarray(KERNEL), "bias": jnp.zeros(4)}, "out": {"kernel": jnp.asarray(KERNEL)}}
    state = t.init(params)
    with pytest.raises(TypeError, match=r"apply: state and parameters are swapped; write apply\(state, params\)"):
        t.apply(params, state)


def test_state_and_parameters_swapped_in_update_and_in_jit() -> None:
    t = jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4)))
    state = t.init(PARAMS)
    with pytest.raises(TypeError, match=r"update: state and parameters are swapped; write update\(state, params\)"):
        t.update(PARAMS, state, step=0)
    with pytest.raises(TypeError, match="apply: state and parameters are swapped"):
        jax.jit(t.apply)(PARAMS, state)


def test_an_error_of_the_transform_itself_stays() -> None:
    t = jc.prune(0.5)
    with pytest.raises(ValueError, match="prune: the state has nothing for 'Dense_0/kernel'"):
        t.apply({"other": jnp.ones((8, 4), bool)}, PARAMS)


def test_update_wants_the_step() -> None:
    t = jc.prune(0.5)
    with pytest.raises(TypeError, match=r"update: wants update\(state, params, step=i\), got no step"):
        t.update(t.init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match=r"update: wants update\(state, params, step=i\), got 1 more by place"):
        t.update(t.init(PARAMS), PARAMS, 3)


def test_compressing_what_was_loaded(tmp_path) -> None:
    t = jc.quantize(jc.Int(4))
    seen = t.apply((), PARAMS)
    jc.save(tmp_path / "a.safetensors", seen)
    for tree in (jc.load(tmp_path / "a.safetensors"), jc.pack(seen)):
        with pytest.raises(ValueError, match=r"prune: 'Dense_0/kernel' is packed, .* materialize the tree first"):
            jc.prune(0.5).init(tree)
    with pytest.raises(ValueError, match=r"put prune before quantize. If .* before the chain, materialize it first"):
        jc.prune(0.5).init(seen)


def test_percent() -> None:
    for percent in (80.0, np.float32(80)):
        with pytest.raises(ValueError, match=r"prune: sparsity must be a number in .*; for 80 percent write 0.8"):
            jc.prune(percent)
    with pytest.raises(ValueError, match=r"cubic: .* for 80 percent write 0.8"):
        jc.cubic(80, end=10)
    with pytest.warns(UserWarning, match=r"sparsity=80 is an int and so a count.*for 80 percent write 0.8"):
        jc.prune(80).init({"kernel": jnp.asarray(np.arange(120, dtype=np.float32).reshape(12, 10))})
    with pytest.raises(
        ValueError, match=r"prune: 'Dense_0/kernel': 32 units, fewer than the 80 .* for 80 percent write 0.8"
    ):
        jc.prune(80).init(PARAMS)


# Rules that match a part of a path


def test_a_rule_that_matches_a_part_suggests_the_whole() -> None:
    mend = r"a rule matches the whole path, so write '\.\*kernel'"
    with pytest.raises(ValueError, match=rf"prune: rule 'kernel' matches nothing; the paths are .*; {mend}"):
        jc.prune(0.5, where="kernel").init(PARAMS)
    with pytest.raises(ValueError, match=rf"by_path: rule 'kernel' matches nothing .*; {mend}"):
        jc.by_path({"kernel": jc.prune(0.5)}).init(PARAMS)
    with pytest.raises(ValueError, match=r"so write 'Dense_0\.\*'"):
        jc.prune(0.5, where="Dense_0").init(PARAMS)
    with pytest.raises(ValueError, match=r"so write '\.\*ens.*'"):
        jc.prune(0.5, where="ens").init(PARAMS)
    with pytest.raises(ValueError, match=r"the paths are 'Dense_0/bias', 'Dense_0/kernel'\.$"):
        jc.prune(0.5, where="conv").init(PARAMS)


# What a transform is made of


def test_a_transform_says_what_it_is_made_of() -> None:
    t = jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4)))
    assert repr(t) == "chain(prune(0.5), quantize(Int(4)))"
    t = jc.by_path({".*head.*": jc.core.identity(), ".*": jc.gate(jc.prune(jc.cubic(0.8, end=9)), jc.every(2))})
    assert repr(t) == "by_path({'.*head.*': identity(), '.*': gate(prune(cubic(0.8, end=9)), every(2))})"
    assert repr(jc.quantize(jc.Log(4), per=jc.Groups(32))) == "quantize(Log(4), per=Groups(32))"
    assert repr(jc.recipes.mx()) == "recipes.mx()"
    assert repr(jc.prune(0.5, score=jc.pruning.taylor)) == "prune(0.5, score=scores.taylor)"
    masks = {"kernel": jnp.ones((8, 4), bool)}
    assert repr(jc.pruning.masked_by(masks)) == "masked_by({'kernel': bool[8, 4]})"


def test_a_transform_of_ones_own_functions_has_a_repr_without_addresses() -> None:
    def apply(params):
        return params

    assert repr(stateless(apply)).startswith("stateless(test_a_transform")
    t = jc.Transform(lambda p: (), lambda s, p, *, step: s, lambda s, p: p)
    assert repr(t).startswith("Transform(init=")
    assert "0x" not in repr(t)
    with pytest.raises(TypeError, match=r"to_plain: Transform\(.*was made of functions; .*recorded decorates"):
        t.to_plain()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_plain_data_and_pickles(name) -> None:
    t = TRANSFORMS[name]
    if name in ("prune_constant_schedule", "companded"):  # functions of others
        with pytest.raises(TypeError, match=r"to_plain: (prune.sparsity|quantize.grid.*compress) is .*recorded"):
            t.to_plain()
        with pytest.raises((AttributeError, pickle.PicklingError)):
            pickle.dumps(t)
        return
    text = json.dumps(t.to_plain(), sort_keys=True)
    again = jc.Transform.from_plain(json.loads(text))
    assert repr(again) == repr(t)
    assert json.dumps(again.to_plain(), sort_keys=True) == text
    assert repr(pickle.loads(pickle.dumps(t))) == repr(t)


SAME = ["joint", "by_path", "gate_open", "share", "static_int4", "prune_movement", "stochastic"]


@pytest.mark.parametrize("name", quick(SAME, "joint"))
def test_what_was_read_does_the_same(name) -> None:
    t = TRANSFORMS[name]
    params = {"dense": {"kernel": jnp.asarray(KERNEL), "bias": jnp.zeros(4)}, "out": {"kernel": jnp.asarray(KERNEL)}}
    wanted = jc.materialize(t.apply(laws.started(t, params), params))
    for other in (jc.Transform.from_plain(json.loads(json.dumps(t.to_plain()))), pickle.loads(pickle.dumps(t))):
        laws.assert_same_bits(jc.materialize(other.apply(laws.started(other, params), params)), wanted)


def of_arrays() -> list[jc.Transform]:
    roles = jc.roles(lambda p, x: x @ p["kernel"])({"kernel": jnp.asarray(KERNEL)}, jnp.asarray(X))
    mask = np.arange(32).reshape(8, 4) % 3 == 0
    return [
        jc.pruning.masked_by({"kernel": jnp.asarray(mask)}),
        jc.quantize(jc.Int(4), roles=roles),
        jc.quantize(jc.Int(4), scale=jc.quantization.Fixed({"kernel": jnp.full((1, 4), 0.1)})),
        jc.prune(np.float32(0.3), structure=jc.Filters(-1, order=float("inf"))),
        jc.prune(scope=jc.pruning.Given({jc.core.matrices: jc.cubic(0.5, end=3)})),
        jc.low_rank(2, moments={"kernel": jnp.ones(8)}),
    ]


def test_arrays_roles_and_numbers_are_plain_data() -> None:
    for t in of_arrays():
        again = jc.Transform.from_plain(json.loads(json.dumps(t.to_plain())))
        assert json.dumps(again.to_plain()) == json.dumps(t.to_plain())
        assert json.dumps(pickle.loads(pickle.dumps(t)).to_plain()) == json.dumps(t.to_plain())


@pytest.mark.slow
def test_what_was_read_of_arrays_does_the_same() -> None:
    params = {"kernel": jnp.asarray(KERNEL)}
    for t in of_arrays():
        wanted = t.apply(laws.started(t, params), params)
        for other in (jc.Transform.from_plain(t.to_plain()), pickle.loads(pickle.dumps(t))):
            laws.assert_same_bits(other.apply(laws.started(other, params), params), wanted)


def test_ones_own_schedule_and_transform_are_plain_data_when_recorded() -> None:
    linear = jc.core.recorded(optax.linear_schedule)

    @jc.core.recorded
    def halves(times: int) -> jc.Transform:
        return jc.chain(*[jc.prune(0.5)] * times)

    t = jc.chain(jc.prune(linear(0.0, 0.5, 9)), halves(2))
    assert repr(t) == "chain(prune(linear_schedule(0.0, 0.5, 9)), halves(2))"
    assert repr(jc.Transform.from_plain(t.to_plain())) == repr(t)


def test_a_wrapped_schedule_is_not_taken_for_the_one_inside() -> None:
    schedule = jc.cubic(0.8, end=9)
    twice = wraps(schedule)(lambda step: schedule(step) / 2)
    with pytest.raises(TypeError, match=r"to_plain: prune.sparsity is polynomial_schedule"):
        jc.prune(twice).to_plain()


def test_a_transform_handed_through_keeps_its_own_record() -> None:
    @jc.core.recorded
    def maybe(t: jc.Transform, on: bool) -> jc.Transform:
        return jc.gate(t, jc.every(2)) if on else t

    t = jc.prune(0.5)
    assert repr(maybe(t, False)) == repr(t) == "prune(0.5)"
    assert repr(maybe(t, True)) == "maybe(prune(0.5), True)"


WRONG_DATA = {
    "a name": ({"prun": {"sparsity": 0.5}}, "no constructor or spec is called 'prun' here; did you mean 'prune'"),
    "an argument": ({"prune": {"sparsty": 0.5}}, "from_plain: prune has no parameter 'sparsty', only sparsity, score"),
    "no argument": ({"gate": {"due": {"every": {"period": 2}}}}, "from_plain: gate missing a required argument"),
    "no transform": ({"Int": {"bits": 4}}, r"from_plain: Int\(4\) is no transform but goes into one"),
    "two entries": ({"prune": {}, "quantize": {}}, "a dict has one entry"),
    "no names": ({"prune": [0.5]}, "prune wants its arguments by name"),
    "a value": ({"prune": {"sparsity": 2.0}}, "prune: sparsity must be"),
    "a room": ({"recipes.my": {}}, "no constructor or spec is called 'recipes.my'"),
    "a key": ({"prune": {"sparsity": {"key": 3}}}, "is not what to_plain writes as 'key'"),
    "a constant": ({"prune": {"sparsity": 0.5, "score": {"named": "scores.no"}}}, "nothing is named 'scores.no' here"),
    "nothing": (None, "from_plain: None is no transform"),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_wrong_data_say_what_is_wrong(name) -> None:
    data, message = WRONG_DATA[name]
    with pytest.raises((TypeError, ValueError), match=message):
        jc.Transform.from_plain(data)


def test_names_do_not_clash() -> None:
    assert set(_READERS) == TAGS
    assert not TAGS & set(MAKERS)
    with pytest.raises(ValueError, match=r"recorded: 'prune' is taken, by jaxcomp.pruning.transform"):

        @jc.core.recorded
        def prune() -> jc.Transform:
            return jc.core.identity()

    assert all(text_of(value) == name for name, value in CONSTANTS.items())


def test_every_public_constructor_of_a_transform_is_recorded() -> None:
    rooms = [jc, jc.core, jc.pruning, jc.quantization, jc.sharing, jc.factorization, jc.recipes]
    makers = {
        thing.__name__: thing
        for room in rooms
        for thing in vars(room).values()
        if callable(thing) and getattr(thing, "__annotations__", {}).get("return") in ("Transform", jc.Transform)
    }
    assert {"prune", "chain", "by_path", "gate", "mx", "share", "low_rank", "regrow"} <= set(makers)
    assert not [name for name, make in makers.items() if make not in MAKERS.values()]


@pytest.mark.slow
def test_a_recipe_is_found_in_a_new_process() -> None:
    code = "import jaxcomp as jc; print(jc.Transform.from_plain({'recipes.nf4': {'group': 32}}), jc.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == f"recipes.nf4(32) {jc.__version__}\n", done.stderr
