"""The layouts of results are known from shapes, are those that a mesh gives, and cost no gathers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcomp as jc
from jaxcomp.core import leaves_with_paths, out_shardings
from tests.test_laws import IN_PARAMS, TRANSFORMS

MESH = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
SPECS = {"dense": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}, "conv": [P(None, None, "fsdp", "tensor")]}


def shapes(mesh=MESH):
    """A kernel, a bias and a convolution, split as in training."""
    sizes = {"dense": {"kernel": (16, 24), "bias": (24,)}, "conv": [(3, 3, 8, 16)]}

    def of(size, spec):
        return jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(of, sizes, SPECS, is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[0], int))


def by_path(tree):
    return dict(leaves_with_paths(tree)[0])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_states_and_leaves_lie_as_their_parameters(name) -> None:
    t, params = TRANSFORMS[name], shapes()
    state = jax.eval_shape(t.init, params)
    found = out_shardings(t.init, params), out_shardings(t.apply, state, params)
    wanted = state, jax.eval_shape(t.apply, state, params)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    own = by_path(params)
    for shardings, arrays in zip(found, wanted, strict=True):
        laid = by_path(shardings)
        for path, x in by_path(arrays).items():
            laid[path].shard_shape(x.shape)  # each axis is divided
            of = [p for p in own if p in path.replace(":", "/")]
            if of and x.shape == own[of[0]].shape:
                assert laid[path].spec == own[of[0]].sharding.spec, path
            if not x.ndim or not of:
                assert laid[path].is_fully_replicated, path


def test_scales_keep_the_axes_that_they_have() -> None:
    params = shapes()
    t = jc.quantize(jc.Int(4))
    leaf = out_shardings(t.apply, t.init(params), params)["dense"]["kernel"]
    assert (leaf.codes.spec, leaf.scale.spec) == (P("fsdp", "tensor"), P(None, "tensor"))
    made = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(t.apply, (), params),
        out_shardings(t.apply, (), params),
    )
    packed = out_shardings(jc.pack, made)["dense"]["kernel"]
    assert (packed.codes.data.spec, packed.scale.spec) == (P(("fsdp", "tensor")), P(None, "tensor"))


def test_optimizers_and_leaves_in_parameters() -> None:
    params = shapes()
    state = out_shardings(optax.adam(1e-3).init, params)
    assert jax.tree.map(lambda s: s.spec, state[0].mu) == SPECS
    assert state[0].count.is_fully_replicated
    make, t = IN_PARAMS["learned_int4_pruned"]
    learned = out_shardings(make, params)
    assert learned["dense"]["kernel"].scale.spec == P(None, "tensor")
    given = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(make, params), learned
    )
    masks = [s.spec for path, s in by_path(out_shardings(t.init, given)).items() if "dense/kernel" in path]
    assert masks == [P("fsdp", "tensor")]


def test_what_lies_nowhere_is_an_error() -> None:
    with pytest.raises(ValueError, match="no argument has a NamedSharding, of 1 from 'kernel' on; give"):
        out_shardings(jc.prune(0.5).init, {"kernel": np.ones((4, 4), np.float32)})
    other = shapes(AbstractMesh((8, 1, 1), ("data", "fsdp", "tensor")))
    mixed = {"conv": shapes()["conv"], "dense": other["dense"]}
    with pytest.raises(ValueError, match=r"'conv/0' lies on .* and 'dense/bias' on .*; lay them out on one mesh"):
        out_shardings(jc.prune(0.5).init, mixed)


def test_many_leaves_are_laid_out_by_few_looks() -> None:
    many = {f"layer_{i}": shapes()["dense"] for i in range(300)}
    found = out_shardings(optax.adam(1e-3).init, many)
    assert all(found[0].mu[name] == jax.tree.map(lambda s: NamedSharding(MESH, s), SPECS["dense"]) for name in many)


DEVICES = """
import json, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jaxcomp.core import out_shardings
from tests.collectives import sent
from tests.core.test_shardings import ON_DEVICES, SPECS, shapes
from tests.test_laws import TRANSFORMS
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
    params = jax.tree.map(lambda x: jax.device_put(jnp.ones(x.shape).at[..., 0].set(0.5), x.sharding), shapes(mesh))
    with jax.set_mesh(mesh):
        for name in ON_DEVICES:
            init = TRANSFORMS[name].init
            wanted = out_shardings(init, params)
            compiled = jax.jit(init, out_shardings=wanted).lower(params).compile()
            state = compiled(params)
            lies = jax.tree.map(lambda x, s: bool(x.sharding.is_equivalent_to(s, x.ndim)), state, wanted)
            print(json.dumps([name, kind.name, all(jax.tree.leaves(lies)), sent(compiled.as_text())]))
"""
ON_DEVICES = ("prune", "prune_n_m", "joint", "gate_closed", "regrow_random")


@pytest.mark.slow
def test_jit_takes_them_and_no_init_gathers() -> None:
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", DEVICES], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * len(ON_DEVICES)
    for name, axes, lies, ops in found:
        assert lies, (name, axes)
        assert ops.keys() <= {"all-reduce"}, (name, axes, ops)
        assert ops.get("all-reduce", 0) <= 64, (name, axes, ops)
