import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.structure import channel_groups, plan, shrink
from tests.marks import quick
from train import data
from train.networks import linen
from train.networks import nnx as nnx_models
from train.networks.linen import MLP, BasicBlock, ConvNet, ResNet18, ViT, build, narrowed
from train.networks.widths import resnet18_widths

SMALL = {
    "resnet18": ResNet18(width=4),
    "convnet": ConvNet(widths=(8, 12, 16)),
    "mlp": MLP(widths=(16, 12)),
    "vit": ViT(patch=4, dim=16, depth=2, heads=2, mlp_dim=24),
}

SHRUNKEN = (5, ((3, 5), (4, 5), (2, 7), (6, 7), (3, 9), (8, 9), (1, 6), (5, 6)))


def images(n=4, size=8, channels=3):
    return np.random.default_rng(0).normal(size=(n, size, size, channels)).astype(np.float32)


def shapes(model, size=32, channels=3):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, channels)))


def randomized(model, x):
    """Variables for ``model``, all drawn at random: a scale or a mean of zero would hide a wrong use of it."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if path.endswith(("/var", "/scale")):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        scale = 1 / np.sqrt(leaf.size // leaf.shape[-1]) if path.endswith("kernel") else 0.2
        return rng.normal(scale=scale, size=leaf.shape).astype(leaf.dtype)

    named, treedef = leaves_with_paths(shapes(model, x.shape[1], x.shape[3]))
    return jax.tree.unflatten(treedef, [draw(p, leaf) for p, leaf in named])


@functools.partial(jax.jit, static_argnums=(0, 3))
def forward(model, variables, x, train=False):
    """Logits and the new batch statistics."""
    return model.apply(variables, x, train, mutable=["batch_stats"])


def infer(model, variables, x):
    return forward(model, variables, x)[0]


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def resnet18_count(stem, blocks, channels=3, classes=10):
    total, given = channels * stem * 9 + 2 * stem, stem
    for i, (inner, outer) in enumerate(blocks):
        total += given * inner * 9 + 2 * inner + inner * outer * 9 + 2 * outer
        total += given * outer + 2 * outer if i in (2, 4, 6) else 0
        given = outer
    return total + given * classes + classes


def test_resnet18_has_the_published_number_of_parameters():
    assert count(shapes(ResNet18())["params"]) == 11_173_962 == resnet18_count(*resnet18_widths(64))


@pytest.mark.parametrize("widths", [SHRUNKEN, resnet18_widths(16)])
def test_resnet18_of_given_widths(widths):
    assert count(shapes(ResNet18(widths=widths))["params"]) == resnet18_count(*widths)
    assert resnet18_widths(16)[1][-1] == (128, 128)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((4, ((4, 4),) * 7), "eight pairs"),
        ((4, ((4, 4),) * 7 + ((0, 4),)), "all >= 1"),
        ((5, ((4, 4),) * 8), "block_0 adds its 5 input channels to its output, got outer=4"),
        ((4, ((4, 4),) * 3 + ((4, 6),) * 5), "block_3 adds its 4 input channels to its output, got outer=6"),
    ],
)
def test_resnet18_refuses_widths_that_do_not_fit(widths, message):
    with pytest.raises(ValueError, match=message):
        shapes(ResNet18(widths=widths))
    with pytest.raises(ValueError, match=message):
        nnx_models.ResNet18(widths=widths, rngs=nnx.Rngs(0))


def np_conv(x, kernel, stride):
    size = kernel.shape[0]
    pad = size // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("nhwcij,ijco->nhwo", windows, kernel)


def np_norm(x, p, s):
    return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]


def np_resnet18(variables, x):
    p, s = jax.tree.map(lambda a: np.asarray(a, np.float64), (variables["params"], variables["batch_stats"]))
    x = np.maximum(np_norm(np_conv(x, p["stem"]["kernel"], 1), p["stem_norm"], s["stem_norm"]), 0)
    for i in range(8):
        q, t, stride = p[f"block_{i}"], s[f"block_{i}"], 2 if i in (2, 4, 6) else 1
        y = np.maximum(np_norm(np_conv(x, q["conv_1"]["kernel"], stride), q["norm_1"], t["norm_1"]), 0)
        y = np_norm(np_conv(y, q["conv_2"]["kernel"], 1), q["norm_2"], t["norm_2"])
        if stride == 2:
            x = np_norm(np_conv(x, q["projection"]["kernel"], 2), q["projection_norm"], t["projection_norm"])
        x = np.maximum(x + y, 0)
    return x.mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]


@pytest.mark.parametrize("widths", [None, SHRUNKEN])
def test_resnet18_against_numpy(widths):
    model, x = ResNet18(width=4, widths=widths), images(2, 13)
    variables = randomized(model, x)
    wanted = np_resnet18(variables, x)
    np.testing.assert_allclose(infer(model, variables, x), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_convnet_against_numpy():
    model, x = ConvNet(widths=(4, 6, 5)), images(3, 9, 1)
    variables = randomized(model, x)
    p, s = jax.tree.map(np.asarray, (variables["params"], variables["batch_stats"]))
    y = x
    for i in range(3):
        y = np_conv(y, p[f"conv_{i}"]["kernel"], 1 if i == 0 else 2)
        y = np.maximum(np_norm(y, p[f"norm_{i}"], s[f"norm_{i}"]), 0)
    assert y.shape == (3, 3, 3, 5)
    wanted = y.mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]
    np.testing.assert_allclose(infer(model, variables, x), wanted, rtol=1e-4, atol=1e-5)


def test_mlp_against_numpy():
    model, x = SMALL["mlp"], images()
    variables = randomized(model, x)
    y = x.reshape(4, -1)
    for layer in ("dense_0", "dense_1", "head"):
        y = y @ variables["params"][layer]["kernel"] + variables["params"][layer]["bias"]
        y = np.maximum(y, 0) if layer != "head" else y
    np.testing.assert_allclose(infer(model, variables, x), y, rtol=1e-4, atol=1e-5)


def np_layer_norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def np_vit_block(x, p):
    y, a = np_layer_norm(x, p["norm_1"]), p["attention"]
    q, k, v = (np.einsum("ntd,dhe->nhte", y, a[n]["kernel"]) + a[n]["bias"][:, None] for n in ("query", "key", "value"))
    weights = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]))
    y = weights / weights.sum(-1, keepdims=True) @ v
    x = x + np.einsum("nhte,hed->ntd", y, a["out"]["kernel"]) + a["out"]["bias"]
    y = np_layer_norm(x, p["norm_2"]) @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"]
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return x + y @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"]


def test_vit_against_numpy():
    model, x = SMALL["vit"], images(3, 12)
    variables = randomized(model, x)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    patches = x.reshape(3, 3, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(3, 9, 48)
    y = patches @ p["embedding"]["kernel"].reshape(48, 16) + p["embedding"]["bias"] + p["position"]
    for i in range(2):
        y = np_vit_block(y, p[f"block_{i}"])
    wanted = np_layer_norm(y, p["norm"]).mean(1) @ p["head"]["kernel"] + p["head"]["bias"]
    np.testing.assert_allclose(infer(model, variables, x), wanted, rtol=1e-4, atol=1e-4)


def test_vit_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="ViT: an image of 10 x 10 is not a whole number of patches of 4"):
        shapes(SMALL["vit"], 10)
    with pytest.raises(ValueError, match="dim must be a multiple of heads, got dim=10 and heads=4"):
        shapes(ViT(dim=10))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16])
def test_parameters_statistics_and_logits_are_float32(name, dtype):
    model, x = SMALL[name].clone(dtype=dtype), images()
    with jax.numpy_dtype_promotion("standard"):  # flax's norms and softmax widen bfloat16 by promotion
        variables = shapes(model, 8)
        logits, updated = jax.eval_shape(functools.partial(forward, model, train=True), variables, x)
    assert logits.dtype == jnp.float32
    assert logits.shape == (4, 10)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, updated))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", quick(SMALL, "convnet"))
def test_bfloat16_really_computes_in_bfloat16_and_stays_near(name):
    model, x = SMALL[name], images()
    variables = randomized(model, x)
    with jax.numpy_dtype_promotion("standard"):
        exact, half = infer(model, variables, x), infer(model.clone(dtype=jnp.bfloat16), variables, x)
    error = float(jnp.abs(half - exact).max() / jnp.abs(exact).max())
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("name", quick(SMALL, "mlp", "vit"))
def test_gradients_reach_every_parameter_under_strict_promotion(name):
    model, x = SMALL[name], images()
    variables = randomized(model, x)

    @jax.jit
    def grads(params):
        def loss(params):
            logits, _ = forward(model, {**variables, "params": params}, x, True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(4)).mean()

        return jax.grad(loss)(params)

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        named, _ = leaves_with_paths(grads(variables["params"]))
    for path, g in named:
        assert jnp.isfinite(g).all(), path
        # A constant added to every key leaves the softmax as it is.
        assert g.any() or path.endswith("key/bias"), path


def test_batch_statistics_move_a_tenth_of_the_way_in_training_only():
    model, x = SMALL["resnet18"], images()
    variables = randomized(model, x)
    old = variables["batch_stats"]["stem_norm"]
    _, updated = forward(model, variables, x, True)
    stem = np_conv(x, np.asarray(variables["params"]["stem"]["kernel"]), 1)
    got = updated["batch_stats"]["stem_norm"]
    np.testing.assert_allclose(got["mean"], 0.9 * old["mean"] + 0.1 * stem.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(got["var"], 0.9 * old["var"] + 0.1 * stem.var((0, 1, 2)), rtol=1e-4)
    _, same = forward(model, variables, x)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, same["batch_stats"], variables["batch_stats"])))


@pytest.mark.parametrize("name", SMALL)
def test_in_evaluation_images_do_not_see_each_other(name):
    model, x = SMALL[name], images()
    variables, other = randomized(model, x), np.concatenate([x[:2], 1 - x[2:]])
    np.testing.assert_array_equal(infer(model, variables, x)[:2], infer(model, variables, other)[:2])


def test_a_block_starts_as_its_shortcut():
    x = images(2, 6, 5)
    block = BasicBlock(inner=3, outer=5)
    out, _ = jax.jit(block.init_with_output, static_argnums=2)(jax.random.key(0), x, False)
    np.testing.assert_array_equal(out, np.maximum(x, 0))


def test_build_names_what_there_is():
    assert build("vit", depth=3).depth == 3
    assert {type(build(name)) for name in linen.MODELS} == {ResNet18, ConvNet, MLP, ViT}
    with pytest.raises(ValueError, match="no model is called 'resnet50'; there are resnet18, convnet, mlp, vit"):
        build("resnet50")
    with pytest.raises(ValueError, match="mlp has no field 'depth'; it has widths, num_classes, dtype"):
        build("mlp", depth=3)


@pytest.mark.slow
def test_convnet_learns_digits_as_its_docstring_says():
    digits, model = data.load("digits"), ConvNet()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    assert count(variables["params"]) == 279_578
    steps = 20 * (len(digits.train) // 64)
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 10, steps), weight_decay=1e-2)

    @jax.jit
    def step(variables, opt_state, key, x, y):
        x = normalize(data.augment(key, x, digits.augmentation))
        targets = optax.smooth_labels(jax.nn.one_hot(y, 10), 0.1)

        def loss(params):
            logits, updated = model.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy(logits, targets).mean(), updated

        grads, updated = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **updated}, opt_state

    def normalize(x):
        return data.normalize(x, digits.mean, digits.std)

    opt_state, number = tx.init(variables["params"]), 0
    for epoch in range(20):
        for indices in data.epoch_batches(0, epoch, len(digits.train), 64):
            key = jax.random.fold_in(jax.random.key(1), number)
            batch = digits.train.images[indices], digits.train.labels[indices]
            with jax.numpy_dtype_promotion("standard"):  # optax's schedules promote their step
                variables, opt_state = step(variables, opt_state, key, *batch)
            number += 1
    logits = jax.jit(model.apply)(variables, normalize(jnp.asarray(digits.test.images)))
    assert (logits.argmax(-1) == digits.test.labels).mean() >= 0.985


PLANNED = {"resnet18": ResNet18(width=4), "convnet": SMALL["convnet"], "mlp": SMALL["mlp"]}


@pytest.mark.parametrize("name", quick(PLANNED, "convnet", "mlp"))
def test_the_same_class_at_a_plans_widths_loads_the_small_tree(name):
    model = PLANNED[name]
    x = images(2, 12)
    variables = randomized(model, x)
    half = plan(channel_groups(model.apply)(variables, x), variables, sparsity=0.5)
    small, again = half.take(variables), type(model)(widths=half.widths)
    assert jax.tree.map(jnp.shape, shapes(again, 12)) == jax.tree.map(jnp.shape, small)
    want = jax.jit(shrink(model.apply, half))(small, x)
    np.testing.assert_allclose(jax.jit(again.apply)(small, x), want, atol=1e-4)
    assert narrowed(model, half.widths) == model.clone(widths=dict(half.widths))


def test_widths_of_another_network_are_refused():
    with pytest.raises(
        ValueError, match=r"widths: of 'block_0/conv_1/kernel' there must be one, found 0 in stem/kernel"
    ):
        shapes(ResNet18(widths={"stem/kernel": (3, 3, 3, 4)}))
