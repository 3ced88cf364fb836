"""wrap_optax in the loops of others: optax's extra arguments, narrow types, steps made of micro-steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.core.transform import identity
from tests.laws import assert_same_bits
from tests.marks import quick

PARAMS = {"kernel": jax.random.normal(jax.random.key(0), (16, 8)), "bias": jnp.zeros(8)}
X, Y = jax.random.normal(jax.random.key(1), (64, 16)), jax.random.normal(jax.random.key(2), (64, 8))


def loss(p) -> jax.Array:
    return jnp.mean((X @ p["kernel"] + p["bias"][None] - Y) ** 2)


def needs_loss() -> optax.GradientTransformationExtraArgs:
    """An argument that optax has no name for."""
    scale = lambda g, state, params=None, *, loss, **_: (jax.tree.map(lambda x: -x * 0.01 / (1 + loss), g), state)  # noqa: E731
    return optax.GradientTransformationExtraArgs(lambda params: (), scale)


EXTRA = {
    "polyak_sgd": (optax.polyak_sgd, "value"),
    "reduce_on_plateau": (lambda: optax.chain(optax.sgd(0.05), optax.contrib.reduce_on_plateau(patience=1)), "value"),
    "momo": (optax.contrib.momo, "value"),
    "lbfgs": (optax.lbfgs, "value grad value_fn"),
    "sophia": (lambda: optax.contrib.sophia(1e-3), "obj_fn"),
    "loss": (needs_loss, "loss"),
    "adam": (lambda: optax.adam(1e-2), "value"),
}


@jax.numpy_dtype_promotion("standard")  # optax's own code mixes types and ranks
@jax.numpy_rank_promotion("allow")
@pytest.mark.parametrize("name", quick(EXTRA, "polyak_sgd", "momo", "loss", "reduce_on_plateau"))
def test_fault_7_wrap_optax_hands_on_the_extra_arguments_of_optax(name) -> None:
    """Around ``identity`` it is the optimizer, bit for bit."""
    make, names = EXTRA[name]
    with_extra = names.split()

    def run(tx) -> list:
        # Compiled but where XLA would fuse adam's product into the sum: that is another rounding.
        wanted = {"value": loss(PARAMS), "loss": loss(PARAMS), "grad": 0, "value_fn": loss, "obj_fn": loss}

        def step(p, s):
            value, g = jax.value_and_grad(loss)(p)
            now = {**wanted, "value": value, "loss": value, "grad": g}
            updates, s = tx.update(g, s, p, **{n: now[n] for n in with_extra})
            return optax.apply_updates(p, updates), s

        step = jax.jit(step) if name == "lbfgs" else step
        p, s, seen = PARAMS, tx.init(PARAMS), []
        for _ in range(4):
            p, s = step(p, s)
            seen.append(p)
        return seen

    plain = optax.with_extra_args_support(make())
    assert_same_bits(run(jc.wrap_optax(make(), identity())), run(plain))


@jax.numpy_dtype_promotion("standard")
@pytest.mark.slow
def test_fault_7_a_line_search_sees_the_compressed_loss() -> None:
    """The loss that it stores is that of compressed weights, and it falls."""
    t = jc.prune(0.5, gradient=jc.pruning.StraightThrough())
    tx = jc.wrap_optax(optax.lbfgs(), t)

    @jax.jit
    def step(p, s):
        value, g = jax.value_and_grad(loss)(p)
        updates, s = tx.update(g, s, p, value=value, grad=g, value_fn=loss)
        return optax.apply_updates(p, updates), s, value

    p, s, values = PARAMS, tx.init(PARAMS), []
    for _ in range(6):
        p, s, value = step(p, s)
        values.append(float(value))
    assert values[-1] < 0.3 * values[0]
    assert int((p["kernel"] == 0).sum()) == 64


TRANSFORMS = {
    "prune": jc.prune(0.5),
    "pruned and quantized": jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4))),
    "three bits": jc.quantize(jc.Int(3)),
    "gated": jc.gate(jc.prune(jc.cubic(0.8, end=6)), jc.every(2)),
}


LOOPS = {
    "bfloat16": ("bfloat16", True),
    "bfloat16, eager": ("bfloat16", False),
    "float16": ("float16", True),
    "float32": ("float32", True),
}


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("name", quick(TRANSFORMS, "pruned and quantized", "three bits"))
@pytest.mark.parametrize("loop", quick(LOOPS, "bfloat16"))
def test_fault_7_the_loop_holds_what_is_saved(name, loop) -> None:
    dtype, jitted = LOOPS[loop]
    t = TRANSFORMS[name]
    tx = jc.wrap_optax(optax.sgd(3e-2, momentum=0.9), t)

    def step(p, s, i):
        g = jax.tree.map(lambda w: jnp.sin(7 * w + i.astype(w.dtype)), p)
        updates, s = tx.update(g, s, p)
        return optax.apply_updates(p, updates), s

    p = {"kernel": jax.random.normal(jax.random.key(0), (32, 16)).astype(dtype)}
    s = tx.init(p)
    step = jax.jit(step) if jitted else step
    for i in range(4):
        p, s = step(p, s, jnp.int32(i))
        saved = jc.materialize(jc.pack(t.apply(s.transform, s.latent)))["kernel"]
        assert p["kernel"].dtype == dtype
        np.testing.assert_array_equal(p["kernel"], saved)


@jax.numpy_dtype_promotion("standard")
def test_fault_7_float32_is_an_ulp_off_for_a_step_at_most() -> None:
    """From 0.3 to 0.1 + 1 ulp leads no float32 update; one more step at the same place does."""
    target = jnp.array([[0.1, np.nextafter(np.float32(0.1), np.float32(1)), -0.7, 3.0, 0.0]])
    t = identity()._replace(apply=lambda state, p: {"w": jnp.where(p["w"] > -1e9, target, p["w"])})
    tx = jc.wrap_optax(optax.sgd(0.0), t)
    p = {"w": jnp.array([[0.3, 0.3, 0.9, -0.1, 1e-8]])}
    s, off = tx.init(p), []
    for _ in range(2):
        updates, s = tx.update(jax.tree.map(jnp.zeros_like, p), s, p)
        before, p = p["w"], optax.apply_updates(p, updates)
        off.append(np.abs(np.asarray(p["w"], np.float64) - np.asarray(target, np.float64)))
        assert (off[-1] <= np.spacing(np.maximum(np.abs(before), np.abs(target)))).all()
    assert not off[1].any()


@jax.numpy_dtype_promotion("standard")
def test_fault_7_gradients_may_be_wider_than_the_parameters() -> None:
    """So apply_if_finite, which makes zeros of the gradients' type, may stand outside of narrow parameters too."""
    tx = optax.apply_if_finite(jc.wrap_optax(optax.sgd(0.1), jc.prune(0.5)), 3)
    p = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
    s = tx.init(p)
    for spoilt in (False, True):
        g = {"kernel": jnp.full((4, 4), np.nan if spoilt else 1.0, jnp.float32)}
        updates, s = tx.update(g, s, p)
        p = optax.apply_updates(p, updates)
    assert p["kernel"].dtype == jnp.bfloat16
    assert int((p["kernel"] == 0).sum()) == 8


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_fault_7_multi_steps_on_either_side(where) -> None:
    """Outside, masks move once for k micro-steps, by the mean gradient and by steps; inside at every micro-step."""
    k, seen = 3, []
    score = jc.pruning.Score("kept", lambda w, grads: seen.append(1) or jnp.abs(grads), needs=("grads",))
    t = jc.gate(jc.prune(0.5, score=score), jc.every(2))
    sgd = optax.sgd(0.1)
    if where == "inside":
        tx = jc.wrap_optax(optax.MultiSteps(sgd, k).gradient_transformation(), t)
    else:
        tx = optax.MultiSteps(jc.wrap_optax(sgd, t), k).gradient_transformation()
    micro = [{"kernel": jax.random.normal(jax.random.key(i), (4, 4))} for i in range(9)]
    p = {"kernel": jnp.ones((4, 4))}
    state, masks, moved = tx.init(p), [], []
    for i, g in enumerate(micro):
        updates, state = tx.update(g, state, p)
        new = optax.apply_updates(p, updates)
        moved += [i] if (new["kernel"] != p["kernel"]).any() else []
        p, inner = new, state.inner_opt_state if where == "outside" else state
        masks.append(np.asarray(inner.transform.inner["kernel"]))
        assert int(inner.step) == ((i + 1) // k if where == "outside" else i + 1)

    def kept(g):
        return np.asarray(jc.prune(0.5, score=jc.pruning.importance).update(None, p, step=0, importance=g)["kernel"])

    mean = [jax.tree.map(lambda *x: sum(x) / k, *micro[i : i + k]) for i in (0, 3, 6)]
    if where == "outside":
        assert moved == [2, 5, 8]
        np.testing.assert_array_equal(masks[2], kept(jax.tree.map(jnp.abs, mean[0])))  # step 0 is due, step 1 is not
        np.testing.assert_array_equal(masks[5], masks[2])
        np.testing.assert_array_equal(masks[8], kept(jax.tree.map(jnp.abs, mean[2])))
    else:
        for i in (0, 2, 4, 6, 8):
            np.testing.assert_array_equal(masks[i], kept(jax.tree.map(jnp.abs, micro[i])))


def test_fault_7_a_step_counter_stops_at_its_end() -> None:
    tx = jc.wrap_optax(optax.sgd(0.1), jc.prune(0.5))
    p = {"kernel": jnp.ones((2, 2))}
    state = tx.init(p)._replace(step=jnp.int32(2**31 - 1))
    assert int(tx.update(p, state, p)[1].step) == 2**31 - 1
