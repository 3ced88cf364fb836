"""Widths found by searching a supernet, beside uniform ones of the same MACs, and networks trained alone.

Command: ``JAXCOMP_SUPERNET=STEPS python -m tests.benchmarks supernet``; 600 steps without it.

Five convolutions with batch norm on Fashion-MNIST at 14 x 14 pixels (means of four), three seeds. A quarter of the
steps trains the widest alone, then its channels are sorted and the sandwich rule goes on. Networks alone are trained
for as many steps in all, by the same optimizer. The search judges by half the validation split;
what is shown is accuracy on the test split.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomp as jc
from jaxcomp.search import Narrowed, Supernet, evolution, narrow, recalibrated, sandwich, slimmable
from jaxcomp.structure import Plan
from tests.benchmarks.timing import Report, Row
from train.data.images import normalize
from train.data.order import epoch_batches
from train.data.sets import Split, load
from train.networks.linen import ConvNet

SEEDS, BATCH, STEPS, WIDTHS = (0, 1, 2), 128, 600, (16, 32, 32, 64, 64)
LEVELS = (0.375, 0.5)
"""Budgets are the MACs of these uniform widths."""
VARIABLE = "JAXCOMP_SUPERNET"


class Case:
    """The data and the training of one seed."""

    def __init__(self, seed: int, steps: int) -> None:
        self.seed, self.steps = seed, steps
        self.data = load("fashion_mnist", seed=seed)
        self.model = ConvNet(WIDTHS)
        self.fn = partial(self.model.apply, train=False)

    def images(self, split: Split, at: Any) -> jax.Array:
        """As the network takes them."""
        x = split.images[at].astype(np.float32)
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
        return normalize(jnp.asarray(x), self.data.mean, self.data.std)

    def batches(self, first: int, last: int) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Of these steps: the same for all networks of a seed."""
        split = self.data.train
        a_epoch = len(split) // BATCH
        for step in range(first, last):
            at = epoch_batches(self.seed, step // a_epoch, len(split), BATCH)[step % a_epoch]
            yield self.images(split, at), jnp.asarray(split.labels[at])

    @cached_property
    def calibration(self) -> list[jax.Array]:
        """Batches that statistics are made of."""
        return [self.images(self.data.train, slice(i, i + 256)) for i in range(0, 1024, 256)]

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """The same for all."""
        return optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2, mask=jc.core.weight_mask)

    def accuracy(self, fn: Callable[..., Any], variables: Any, split: Split) -> float:
        """Of a split."""
        right = 0
        for s in range(0, len(split), 1000):
            x = self.images(split, slice(s, s + 1000))
            right += int((np.asarray(fn(variables, x)).argmax(-1) == split.labels[s : s + 1000]).sum())
        return right / len(split)


def loss(logits: jax.Array, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Of labels."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def trained(model: Any, x: jax.Array, labels: jax.Array, variables: Any) -> tuple[jax.Array, Any]:
    """The loss by labels, and the new statistics."""
    logits, new = model.apply({**variables}, x, True, mutable=["batch_stats"])
    return loss(logits, x, labels), new


def alone(case: Case, model: ConvNet, variables: Any, first: int, last: int, tx: Any, state: Any) -> tuple[Any, Any]:
    """A network trained by labels for these steps."""

    @jax.jit
    def step(variables: Any, state: Any, x: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        def told(params: Any) -> tuple[jax.Array, Any]:
            return trained(model, x, labels, {**variables, "params": params})

        grads, new = jax.grad(told, has_aux=True)(variables["params"])
        updates, state = tx.update(grads, state, variables["params"])
        return {**new, "params": optax.apply_updates(variables["params"], updates)}, state

    for x, labels in case.batches(first, last):
        variables, state = step(variables, state, x, labels)
    return variables, state


def supernet(case: Case) -> tuple[Supernet, Any]:
    """The widest first, then all widths."""
    warm = case.steps // 4
    variables = case.model.init(jax.random.key(case.seed), case.calibration[0])
    tx = case.optimizer(case.steps)
    variables, state = alone(case, case.model, variables, 0, warm, tx, tx.init(variables["params"]))
    net = slimmable(jc.channel_groups(case.fn)(variables, case.calibration[0][:1]), variables)

    def run(v: Any, x: jax.Array) -> jax.Array:
        return case.model.apply(v, x, True, mutable=["batch_stats"])[0]

    gradients, keys = sandwich(net, run, loss), jax.random.split(jax.random.key(case.seed), case.steps)

    @jax.jit
    def change(variables: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads["params"], state, variables["params"])
        return {**variables, "params": optax.apply_updates(variables["params"], updates)}, state

    for key, batch in zip(keys[warm:], case.batches(warm, case.steps), strict=True):
        _, grads = gradients(variables, key, *batch)
        variables, state = change(variables, state, grads)
    return net, variables


def judged(case: Case, net: Supernet, variables: Any) -> Callable[[Any, Split], float]:
    """Accuracy of masked variables on a split, statistics made anew; compiled once for all widths."""
    fn = jax.jit(case.fn)
    update = jax.jit(lambda v, x: case.model.apply(v, x, True, mutable=["batch_stats"])[1])
    return lambda masked, split: case.accuracy(fn, recalibrated(update, masked, case.calibration), split)


def from_scratch(case: Case, plan: Plan) -> float:
    """The network of a plan's widths, trained alone for as many steps."""
    model = ConvNet(plan.widths)
    variables, tx = model.init(jax.random.key(case.seed), case.calibration[0]), case.optimizer(case.steps)
    variables, _ = alone(case, model, variables, 0, case.steps, tx, tx.init(variables["params"]))
    return case.accuracy(jax.jit(partial(model.apply, train=False)), variables, case.data.test)


def searched(case: Case, net: Supernet, variables: Any, level: float) -> Iterator[tuple[str, float, Narrowed]]:
    """The rows of one budget."""
    judge = judged(case, net, variables)
    plan, whole = net.plan(net.uniform(level)), case.data.validation
    half = Split(whole.images[:2500].copy(), whole.labels[:2500].copy())
    found = narrow(
        net,
        variables,
        lambda masked: judge(masked, half),
        {"macs": plan.macs},
        key=jax.random.key(case.seed),
        method=lambda space, repair: evolution(space, population=16, repair=repair),
        generations=4,
    )
    print(found, flush=True)
    starts = {"supernet, uniform": net.uniform(level), "supernet, allocated": found.starts["allocated"]}
    for name, counts in {**starts, "supernet, searched": found.counts}.items():
        yield name, judge(net.masked(variables, counts), case.data.test), found
    yield "alone, uniform", from_scratch(case, plan), found
    yield "alone, searched widths", from_scratch(case, found.plan), found


def run() -> Iterator[Report]:
    """Each seed and budget; then the means over seeds."""
    steps = int(os.environ.get(VARIABLE) or STEPS)
    rows: dict[tuple[float, str], list[float]] = {}
    for seed in SEEDS:
        start = time.perf_counter()
        case = Case(seed, steps)
        net, variables = supernet(case)
        widest = judged(case, net, variables)(variables, case.data.test)
        notes = [f"{steps} steps; the widest {widest:.2%}, {net.plan(net.widest).macs:,} MACs; {net!r}"]
        found = []
        for level in LEVELS:
            for name, accuracy, about in searched(case, net, variables, level):
                rows.setdefault((level, name), []).append(accuracy)
                uniform = rows[level, "supernet, uniform"][-1]
                detail = f"{accuracy:.2%}, {accuracy - uniform:+.2%}, {about.plan.macs:,} MACs"
                found.append(Row(f"{level:g} of the width, {name}", accuracy, accuracy, accuracy, detail=detail))
                print(found[-1], flush=True)
        notes.append(f"{time.perf_counter() - start:.0f} s")
        yield Report(f"Widths of a supernet, seed {seed}", "accuracy", found, notes)
    yield Report("Widths of a supernet, means over seeds", "accuracy", [_mean(*item) for item in rows.items()], [])


def _mean(at: tuple[float, str], found: list[float]) -> Row:
    low, high = min(found), max(found)
    return Row(f"{at[0]:g} of the width, {at[1]}", float(np.mean(found)), low, high, detail=f"{low:.2%} to {high:.2%}")
