"""The laws of a transform as checks that raise AssertionError; test_laws runs them, test_laws_catch breaks them."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths

CUBE = jc.quantization.Compander("cube-root", jnp.cbrt, lambda v: v * v * v)


def like_grads(params: Any) -> Any:
    """A statistic for scores that need one: any tree like the parameters."""
    return jax.tree.map(lambda x: jnp.cos(3 * x.astype(jnp.float32)).astype(x.dtype), params)


def started(t: jc.Transform, params: Any) -> Any:
    """A state after a few updates."""
    state = t.init(params)
    for step in range(3):
        state = t.update(state, params, step=jnp.int32(step), grads=like_grads(params))
    return state


_STATES: dict[tuple[jc.Transform, int], tuple[Any, Any]] = {}


def state_of(t: jc.Transform, params: Any) -> Any:
    """:func:`started`, once for each transform and tree: most of a check's time would go into making it anew."""
    key = t, id(params)
    if key not in _STATES:
        _STATES[key] = params, started(t, params)  # the tree is held, so its id stays its own
    return _STATES[key][1]


def bits_of(x: Any) -> np.ndarray:
    """The bytes of an array: tells 0 from -0, and equals on NaN."""
    return np.frombuffer(np.asarray(x).tobytes(), np.uint8)


def assert_same_bits(a: Any, b: Any) -> None:
    """Trees of equal structure, shapes, types and bits."""
    chex.assert_trees_all_equal_structs(a, b)
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    for (path, x), (_, y) in zip(leaves_with_paths(a)[0], leaves_with_paths(b)[0], strict=True):
        assert (bits_of(x) == bits_of(y)).all(), f"{path} differs in its bits"


def check_ships_what_it_trains(t: jc.Transform, params: Any) -> None:
    """Law 1: packing and the file keep every bit, and so does packing inside jit."""
    seen = t.apply(state_of(t, params), params)
    dense = jc.materialize(seen)
    packed = jc.pack(seen)
    assert_same_bits(jc.materialize(packed), dense)
    with tempfile.TemporaryDirectory() as d:
        file = Path(d) / "tree.safetensors"
        size = jc.save(file, seen)
        assert size == file.stat().st_size
        loaded = jc.load(file, like=params, companders=[CUBE])
    assert_same_bits(jc.materialize(loaded), dense)


def check_codes_are_narrow(t: jc.Transform, params: Any) -> None:
    """Law 6: a packed leaf's codes take ``bits`` bits a weight, rounded up to whole bytes once a leaf."""
    packed = jc.pack(t.apply(state_of(t, params), params))
    for leaf in jax.tree.leaves(packed, is_leaf=lambda x: isinstance(x, jc.quantization.Quantized)):
        if isinstance(leaf, jc.quantization.Quantized):
            stored = leaf.codes.data if isinstance(leaf.codes, jc.core.Packed) else leaf.codes
            assert stored.nbytes == math.ceil(leaf.grid.bits * math.prod(leaf.shape) / 8)


def check_keeps_structure(t: jc.Transform, params: Any) -> None:
    """Law 2: the materialized tree has the input's structure, shapes, types; unselected leaves are the same objects."""
    seen = t.apply(state_of(t, params), params)
    plain = jc.materialize(params)
    chex.assert_trees_all_equal_structs(jc.materialize(seen), plain)
    chex.assert_trees_all_equal_shapes_and_dtypes(jc.materialize(seen), plain)
    after = dict(leaves_with_paths(seen, is_leaf=is_compressed)[0])
    for path, leaf in leaves_with_paths(params, is_leaf=is_compressed)[0]:
        if not is_compressed(after[path]):
            assert after[path] is leaf, f"{path} is not the same object"


def check_jit_equals_eager(t: jc.Transform, params: Any, *, rtol: float = 0.0) -> None:
    """Law 3: bitwise, or within ``rtol`` where a grid is made of transcendental functions."""
    state = state_of(t, params)
    jitted = jax.jit(lambda s, p: t.update(s, p, step=jnp.int32(5), grads=like_grads(p)))(state, params)
    eager = t.update(state, params, step=jnp.int32(5), grads=like_grads(params))
    assert_same_bits(jitted, eager)
    seen = jax.jit(lambda s, p: jc.materialize(t.apply(s, p)))(state, params)
    plain = jc.materialize(t.apply(state, params))
    if rtol:
        chex.assert_trees_all_close(seen, plain, rtol=rtol)
    else:
        assert_same_bits(seen, plain)


def check_compiles_once(t: jc.Transform, params: Any) -> None:
    """Law 3: a step function is traced once however far the schedule goes; the state keeps its shapes and types."""
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state: Any, p: Any, i: Any) -> Any:
        state = t.update(state, p, step=i, grads=like_grads(p))
        return state, jax.tree.map(lambda x: x * 1, jc.materialize(t.apply(state, p)))

    state = t.init(params)
    for i in range(4):
        state, _ = step(state, params, jnp.int32(i))


def check_init_has_shapes(t: jc.Transform, params: Any) -> None:
    """Law 3: ``eval_shape(init)`` works from shapes alone, and tells what init gives."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(t.init, shapes), t.init(params))


def check_deterministic(t: jc.Transform, params: Any) -> None:
    """Law 4: the same inputs give the same bits."""
    state = state_of(t, params)
    assert_same_bits(started(t, params), state)
    assert_same_bits(jc.materialize(t.apply(state, params)), jc.materialize(t.apply(state, params)))


def check_learns(t: jc.Transform, params: Any) -> None:
    """Law 5: a finite gradient that is not identically zero reaches every leaf."""
    state = state_of(t, params)

    def loss(p: Any) -> jax.Array:
        leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(jc.materialize(t.apply(state, p)))]
        return sum((jnp.sum(x**2 + x) for x in leaves), jnp.float32(0))

    grads = jax.grad(loss)(params)
    for path, g in leaves_with_paths(grads)[0]:
        assert np.isfinite(np.asarray(g, np.float32)).all(), f"{path} has a gradient that is not finite"
        assert np.asarray(g, np.float32).any(), f"{path} has no gradient"


def check_state_is_a_checkpoint(t: jc.Transform, params: Any) -> None:
    """The state is a pytree of arrays: what restores arrays restores it."""
    state = state_of(t, params)
    leaves, treedef = jax.tree.flatten(state)
    assert all(isinstance(x, jax.Array) for x in leaves), "the state holds what is not an array"
    copies = [jnp.asarray(np.asarray(x).copy()) for x in leaves]
    again = treedef.unflatten(copies)
    assert_same_bits(jc.materialize(t.apply(again, params)), jc.materialize(t.apply(state, params)))


def check_valid_at_step_zero(t: jc.Transform, params: Any) -> None:
    """``init`` gives a state that ``apply`` takes, and finite weights."""
    dense = jc.materialize(t.apply(t.init(params), params))
    chex.assert_trees_all_equal_shapes_and_dtypes(dense, jc.materialize(params))
    chex.assert_tree_all_finite(dense)


CHECKS = [
    check_ships_what_it_trains,
    check_codes_are_narrow,
    check_keeps_structure,
    check_jit_equals_eager,
    check_compiles_once,
    check_init_has_shapes,
    check_deterministic,
    check_learns,
    check_state_is_a_checkpoint,
    check_valid_at_step_zero,
]
