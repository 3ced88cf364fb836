"""What tests/meshes.py runs beside the transforms: the public functions that take or make arrays."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import jaxcomp as jc
from jaxcomp import adapters, distill, federated, recipes, search, structure, trace
from jaxcomp.activations import Backward, Dynamic, Static, factored
from jaxcomp.core.meshes import axes_of, is_explicit

Case = Callable[[Any, jax.Array], Any]
INT8 = jc.quantize(jc.Int(8), per=jc.Channels(-1))
JOINT = jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4), per=jc.Channels(-1)))
ON_EACH = {r".*": jc.Act(8, range=Dynamic())}
GIVEN = {r".*": jc.Act(8, range=Static())}


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """A product that says where its result lies, as Explicit axes want it."""
    if not is_explicit(x) or not is_explicit(w):
        return x @ w
    return jnp.einsum("...i,io->...o", x, w, out_sharding=P(*axes_of(x)[:-1], axes_of(w)[-1]))


def model(p: Any, x: jax.Array) -> jax.Array:
    """A dense layer with a norm, stacked layers under a scan, and a dense layer."""
    h = jax.nn.relu(dot(x, p["up"]["kernel"]) + p["up"]["bias"])
    h = (dot(h, p["mid"]["kernel"]) - p["norm"]["mean"]) * p["norm"]["scale"] + p["norm"]["bias"]

    def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(dot(h, w)) + h, None

    h, _ = jax.lax.scan(layer, h, p["layers"])
    return dot(h, p["down"]["kernel"])


def weights() -> Any:
    """The model's parameters."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)

    vectors = {name: normal(32) for name in ("mean", "scale", "bias")}
    return {
        "up": {"kernel": normal(16, 32), "bias": normal(32)},
        "mid": {"kernel": normal(32, 32)},
        "norm": vectors,
        "layers": normal(3, 32, 32),
        "down": {"kernel": normal(32, 16)},
    }


def batch() -> jax.Array:
    """Eight examples."""
    return jnp.asarray(np.random.default_rng(1).normal(size=(8, 16)), jnp.float32)


def specs(split: str) -> Any:
    """How the parameters are split over the mesh axes "b" and "d"."""
    ends = {"rows": ("d", None), "columns": (None, "d"), "replicated": (None, None)}[split]
    return jax.tree.map(lambda x: P(*[None] * (x.ndim - 2), *ends[-min(x.ndim, 2) :]), weights())


def _leaves(t: jc.Transform, p: Any) -> Any:
    return t.apply(t.init(p), p)


def calibrated_ranges(p: Any, x: jax.Array) -> Any:
    ways = (trace.min_max, trace.averaged, trace.percentile(99.0), trace.mse(8), trace.entropy(8))
    return {path: [way(stats) for way in ways] for path, stats in jc.calibrate(model)(p, x).items()}


def static(p: Any, x: jax.Array) -> Any:
    ranges = {path: trace.min_max(stats) for path, stats in jc.calibrate(model)(p, x).items()}
    leaves = _leaves(INT8, p)
    return [jc.quantize_function(model, GIVEN, integer=i)(leaves, ranges, x) for i in (False, True)]


def packed(p: Any, x: jax.Array) -> Any:
    leaves = jc.pack(_leaves(JOINT, p))
    return jc.quantize_function(model, ON_EACH, integer=True)(leaves, None, x), jc.materialize(leaves)


def gradient_of(integer: bool) -> Case:
    quantized = jc.quantize_function(model, ON_EACH, integer=integer)
    return lambda p, x: jax.grad(lambda q: jnp.sum(quantized(_leaves(INT8, q), None, x)))(p)


def rounded_gradient(p: Any, x: jax.Array) -> Any:
    quantized = jc.quantize_function(model, ON_EACH, backward=Backward(8, stochastic=False))
    return jax.grad(lambda q: jnp.sum(quantized(q, None, None, x)))(p)


def covered(p: Any, x: jax.Array) -> Any:
    rows = jc.coverage(model, ON_EACH, integer=True)(_leaves(INT8, p), x).rows
    return np.array([row.done == "integer" for row in rows])


def read(p: Any, x: jax.Array) -> Any:
    found = jc.sites(model)(p, x)
    roles = jc.roles(model)(p, x)
    return np.array([jc.cost(model)(p, x).macs, len(found), sum(s.macs for s in found), len(roles)])


def folded(p: Any, x: jax.Array) -> Any:
    f = jc.fold_batch_norm(model)(p, x)
    assert f.folds
    return f.params, f.fn(f.params, x)


def halved(p: Any, x: jax.Array) -> Any:
    def half(op: Any) -> Any:
        return trace.Claim(lambda *v: [y / 2 for y in op.bind(*v)]) if op.name == "dot_general" else None

    return trace.rewrite(model, half)(p, x)


def shrunken(p: Any, x: jax.Array) -> Any:
    cut = jc.plan(jc.channel_groups(model)(p, x), p, sparsity=0.5)
    small, run = cut.take(p), jc.shrink(model, cut)
    grads = jax.grad(lambda q: jnp.sum(run(q, x)))(small)
    return small, run(small, x), structure.mask(cut)(p), grads


def regularized(p: Any, x: jax.Array) -> Any:
    groups = jc.channel_groups(model)(p, x)
    strengths = structure.growing_strengths(groups, p)
    penalties = structure.group_penalty(groups, p, strengths), structure.group_lasso(groups, p)
    return strengths, penalties, jax.grad(lambda q: structure.group_lasso(groups, q))(p)


def saved(p: Any, x: jax.Array) -> Any:
    leaves = _leaves(JOINT, p)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tree.safetensors"
        size = jc.save(file, leaves)
        loaded = jc.load(file)
    counts = np.array([size, jc.nbytes(jc.pack(leaves)), *jc.core.zeros_counted(leaves)])
    return jax.tree.map(np.asarray, jc.materialize(loaded)), counts


def distilled(p: Any, x: jax.Array) -> Any:
    teacher, w = jnp.sin(x), p["up"]["kernel"]
    maps = x.reshape(8, 2, 8)
    losses = {
        "soft": lambda s: distill.soft_targets(s, teacher, 2.0),
        "hint": lambda s: distill.hint(s, dot(teacher, w), w),
        "similarity": lambda s: distill.similarity(s, dot(teacher, w)),
    }
    found = {name: jax.value_and_grad(loss)(x) for name, loss in losses.items()}
    attention = jax.value_and_grad(lambda s: distill.attention_transfer(s, jnp.sin(maps)))(maps)
    return found, attention


def related(p: Any, x: jax.Array) -> Any:
    losses = (distill.distances, distill.angles)
    return [jax.value_and_grad(loss)(x, jnp.sin(x)) for loss in losses]


def looked_into(p: Any, x: jax.Array) -> Any:
    return distill.capture(model)(p, x)


def adapted(p: Any, x: jax.Array) -> Any:
    tree = adapters.adapt(p, 2, key=jax.random.key(0), base=INT8, alpha=4, roles=jc.roles(model)(p, x))
    trained, frozen = adapters.partition(tree)
    trained = jax.tree.map(lambda a: a + 0.5, trained)

    def loss(trained: Any) -> jax.Array:
        return jnp.sum(jc.activations.factored(model)(adapters.combine(trained, frozen), x) ** 2)

    return jc.materialize(adapters.combine(trained, frozen)), jax.grad(loss)(trained)


def wrapped(p: Any, x: jax.Array) -> Any:
    tx = jc.wrap_optax(optax.sgd(0.01), jc.chain(jc.prune(0.5), INT8))
    state = tx.init(p)
    for _ in range(2):
        grads = jax.grad(lambda q: jnp.sum(model(q, x) ** 2))(p)
        updates, state = tx.update(grads, state, p)
        p = optax.apply_updates(p, updates)
    return p


def learned(p: Any, x: jax.Array) -> Any:
    leaves = jc.quantization.learned(p, jc.Int(4), per=jc.Channels(-1))
    grads = jax.grad(lambda q: jnp.sum(model(jc.materialize(q), x) ** 2))(leaves)
    return jc.materialize(leaves), jc.materialize(jc.pack(leaves)), grads


def thin(p: Any, x: jax.Array) -> Any:
    return factored(model)(jc.factorize(p, 4, where=".*kernel"), x)


def sent(compressor: federated.Compressor) -> Case:
    def run(p: Any, x: jax.Array) -> Any:
        state, messages = compressor.init(p), []
        for i in range(2):
            update = jax.tree.map(lambda a, i=i: a * (i + 1), p)
            message, state = compressor.encode(state, update, key=jax.random.key(i), shared=jax.random.key(9))
            messages.append(message)
        return compressor.decode(messages[0]), compressor.decode(compressor.combine(messages)), state

    return run


def score_inputs(p: Any, x: jax.Array) -> Any:
    return trace.input_moments(model)(p, x), trace.input_norms(model)(p, x)


def wanda(p: Any, x: jax.Array) -> Any:
    norms = trace.input_norms(model)(p, x)
    t = jc.prune(0.5, score=jc.pruning.wanda, where="(up|mid|down)/kernel")
    state = t.update(t.init(p), p, step=0, input_norms={k: v for k, v in norms.items() if k != "layers"})
    return jc.materialize(t.apply(state, p))


def captured(p: Any, x: jax.Array) -> Any:
    """Keys and masks that are made where Explicit axes are in use."""
    key, masks = jax.random.key(3), {"up/kernel": p["up"]["kernel"] > 0}
    t = jc.chain(
        jc.pruning.masked_by(masks),
        jc.prune(0.5, score=jc.pruning.random_score(key)),
        jc.quantize(jc.Int(4), per=jc.Channels(-1), rounding=jc.quantization.Stochastic(key)),
    )
    return jc.materialize(_leaves(t, p))


def curved(estimate: Callable[..., search.Curvature], **how: Any) -> Case:
    """The curvature of the model's loss, estimated with the same effort whatever comes out."""

    def run(p: Any, x: jax.Array) -> Any:
        found = estimate(
            lambda p, x: jnp.mean(model(p, x) ** 2), p, [x, -2 * x], key=jax.random.key(0), rtol=0.0, **how
        )
        return {one.name: jnp.asarray([one.value, one.error], jnp.float32) for one in found}

    return run


FUNCTIONS: dict[str, Case] = {
    "sites, roles, cost": read,
    "calibrate": lambda p, x: jc.calibrate(model)(p, x),
    "ranges": calibrated_ranges,
    "input_moments, input_norms": score_inputs,
    "wanda": wanda,
    "quantize_function, static": static,
    "quantize_function, packed": packed,
    "quantize_function, fake gradient": gradient_of(False),
    "quantize_function, integer gradient": gradient_of(True),
    "quantize_function, backward": rounded_gradient,
    "coverage": covered,
    "factored": thin,
    "fold_batch_norm": folded,
    "rewrite": halved,
    "channel_groups, plan, shrink": shrunken,
    "regularize": regularized,
    "save, load": saved,
    "distill": distilled,
    "distill, relations": related,
    "capture": looked_into,
    "adapters": adapted,
    "wrap_optax": wrapped,
    "learned": learned,
    "closures": captured,
    "deep_compression": lambda p, x: jc.materialize(
        _leaves(jc.by_path({"(up|mid|down)/kernel": recipes.deep_compression(0.5, 4)}), p)
    ),
    "traces": curved(search.traces, most=16),
    "eigenvalues": curved(search.eigenvalues, most=4),
    "federated.dense": sent(federated.dense()),
    "federated.topk, error_feedback": sent(federated.error_feedback(federated.topk(0.25))),
    "federated.randomk": sent(federated.randomk(0.25)),
    "federated.sign": sent(federated.sign()),
    "federated.rotate, uniform": sent(federated.rotate(federated.uniform(4))),
    "federated.powersgd": sent(federated.powersgd(2, key=jax.random.key(1))),
}
OUTSIDE_JIT = {"save, load", "channel_groups, plan, shrink", "sites, roles, cost", "coverage", "traces", "eigenvalues"}
"""What reads values, or gives none that jit could give back."""
