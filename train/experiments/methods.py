"""The rows of the table: what each method makes of the trained baseline, and what is then fine-tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from jaxcomp.activations import Rules
from jaxcomp.artifact.coding import Coding
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.types import Leaf, PyTree
from jaxcomp.quantization import APoT
from jaxcomp.quantization.grids import Grid
from jaxcomp.structure import Plan, plan
from train.data.sets import Dataset
from train.errors import RunError
from train.networks.compressed import (
    Network,
    OnGrids,
    Shrunken,
    Variables,
    Widened,
    axis_roles,
    calibrated,
    calibration,
    inference,
    learned_grids,
    narrow_norms,
    ranges_as_dicts,
    ranges_of_dicts,
)
from train.networks.linen import narrowed


@dataclass(frozen=True)
class Start:
    """Where a method starts: the network, its data, the baseline's variables, and how many steps of fine-tuning.

    What takes long before the first step is kept in ``folder``, if there is one, and goes on there after a kill.
    """

    model: nn.Module
    data: Dataset
    variables: Variables
    steps: int
    folder: Path | None = None


@dataclass(frozen=True)
class Recipe:
    """What is fine-tuned, and how the file that comes of it is run.

    Args:
      transform: of the parameters, in every step.
      network: whose loss is trained.
      variables: of that network, before the first step.
      beside: what the file holds besides the variables.
      opened: from a file's content to the network that is judged; the trained one by default.
      integer: the judged network takes compressed leaves as they are and runs on them.
      rewound: fine-tune at the baseline's learning rate, as a network that lost much wants.
      shipped: from the trained variables, compressed, to those in the file.
      coding: of the file.
    """

    transform: jc.Transform
    network: Network
    variables: Variables
    beside: Mapping[str, PyTree] = field(default_factory=dict)
    opened: Callable[[Mapping[str, PyTree]], Network] | None = None
    integer: bool = False
    rewound: bool = False
    shipped: Callable[[Variables], Variables] = lambda variables: variables
    coding: Coding | None = None


@dataclass(frozen=True)
class Method:
    """A row.

    Args:
      title: as the table shows it.
      bits: of a weight as stored.
      make: from the baseline to what is fine-tuned; :func:`weights` makes one of a transform.
    """

    title: str
    bits: int
    make: Callable[[Start], Recipe]


def weights(make: Callable[[int], jc.Transform]) -> Callable[[Start], Recipe]:
    """The baseline's network under a transform of its parameters, made for a number of fine-tuning steps."""
    return lambda start: Recipe(make(start.steps), start.model, start.variables)


def not_the_head(path: str, leaf: Leaf) -> bool:
    """Matrices but the last layer's, whose filters are the classes."""
    return jc.core.matrices(path, leaf) and not path.startswith("head/")


def _quantize(start: Start, grid: Grid) -> jc.Transform:
    """The weights of the products on a grid, a scale for each index that they do not sum over."""
    return jc.quantize(grid, roles=axis_roles(start.model, start.variables, start.data))


def _on_grid(grid: Grid) -> Callable[[Start], Recipe]:
    """The baseline's network with its weights on a grid."""
    return lambda start: Recipe(_quantize(start, grid), start.model, start.variables)


def _joint(start: Start) -> Recipe:
    """Sparsity grows to 80% over the first half while all weights are at 4 bits; then the masks rest."""
    schedule = jc.cubic(0.8, end=max(1, start.steps // 2))
    masks = jc.gate(jc.prune(schedule, scope=jc.Global()), _in_the_first_half(start.steps))
    return Recipe(jc.chain(masks, _quantize(start, jc.Int(4))), start.model, start.variables)


def _weights_and_activations(start: Start) -> Recipe:
    """8 bits for weights and for what enters each product: trained in float on those grids, judged on integers."""
    rules: Rules = {".*": jc.Act(8)}
    fake = OnGrids(start.model, rules, calibrated(start.model, start.variables, start.data))

    def opened(file: Mapping[str, PyTree]) -> Network:
        return OnGrids(start.model, rules, ranges_of_dicts(file["ranges"]), integer=True)

    beside = {"ranges": ranges_as_dicts(fake.ranges)}
    return Recipe(_quantize(start, jc.Int(8)), fake, start.variables, beside, opened, integer=True)


def _learned(bits: int) -> Callable[[Start], Recipe]:
    """LSQ of weights and activations, the first and the last layer at 8 bits: trained in float, judged on integers."""

    def make(start: Start) -> Recipe:
        fake, variables = learned_grids(start.model, start.variables, start.data, bits=bits)
        return Recipe(jc.core.identity(), fake, variables, opened=lambda _: replace(fake, integer=True), integer=True)

    return make


def _fewer_channels(start: Start) -> Recipe:
    """Half of every group of channels is removed, then the small network is trained and judged.

    It is the same class at smaller widths, read off the arrays' shapes; where the class has no such field, the
    program itself is shrunk, and the file says which units stayed. The learning rate goes back to the baseline's
    (Renda et al. 2020, arXiv:2003.02389).
    """
    image = jnp.zeros((1, *start.data.train.images.shape[1:]), jnp.float32)
    groups = jc.channel_groups(inference(start.model))(start.variables, image)
    half = plan(groups, start.variables, sparsity=0.5)
    small = half.take(start.variables)

    def opened(file: Mapping[str, PyTree]) -> Network:
        same = narrowed(start.model, {path: np.shape(leaf) for path, leaf in leaves_with_paths(file["params"])[0]})
        return same or Shrunken(start.model, Plan(groups, tuple(np.asarray(k) for k in file["kept"])))

    beside = {} if narrowed(start.model, half.widths) else {"kept": list(half.kept)}
    return Recipe(jc.core.identity(), opened({**small, **beside}), small, beside, opened, rewound=True)


def _sparse(steps: int) -> jc.Transform:
    """Sparsity grows to 90% over the first half; then the masks rest."""
    return jc.gate(jc.prune(jc.cubic(0.9, end=max(1, steps // 2)), scope=jc.Global()), _in_the_first_half(steps))


def _deep_compression(sparsity: float) -> Callable[[Start], Recipe]:
    """Pruned over the first half; then what is left has 16 values a leaf; and the file is coded to its entropy.

    Source: Han et al. 2015, arXiv:1510.00149. Deviations: one global threshold that grows while training (Zhu & Gupta
    2017, arXiv:1710.01878), at the baseline's learning rate; ANS instead of Huffman codes, over a bitmap instead of
    distances; batch norms, which its networks do not have, as two vectors of float16.
    """

    def make(start: Start) -> Recipe:
        half = max(1, start.steps // 2)
        masks = jc.gate(jc.prune(jc.cubic(sparsity, end=half), scope=jc.Global()), _in_the_first_half(start.steps))
        values = jc.gate(jc.share(16), jc.every(_hundredth(start.steps), start=half))
        return _coded(start, jc.chain(masks, values))

    return make


def _coded(start: Start, transform: jc.Transform) -> Recipe:
    """Trained as the baseline was, its norms shipped as two vectors of float16, and the file coded to its entropy."""
    return Recipe(
        transform,
        start.model,
        start.variables,
        opened=lambda _: Widened(start.model),
        rewound=True,
        shipped=narrow_norms,
        coding="ans",
    )


def _in_the_first_half(steps: int) -> jc.core.Due:
    """Every hundredth of the steps, to the first one in their second half."""
    period = _hundredth(steps)
    return jc.every(period, stop=steps // 2 + period)


def _hundredth(steps: int) -> int:
    return max(1, steps // 100)


def _shared(clusters: int) -> Callable[[int], jc.Transform]:
    """A table a leaf; k-means goes on as often as masks are made anew."""
    return lambda steps: jc.gate(jc.share(clusters), jc.every(_hundredth(steps)))


def _smaller(ratio: int) -> Callable[[Start], Recipe]:
    """Widths and sparsities of all leaves allocated for a file so many times smaller, and then fine-tuned.

    Losses are divergences of the logits on 512 images of the training split, without labels. Masks follow the weights
    over the first half of the steps.
    """

    def make(start: Start) -> Recipe:
        from jaxcomp.search import Terms, compress, kl

        params, beside = start.variables["params"], {k: v for k, v in start.variables.items() if k != "params"}
        vectors = {path: x for path, x in leaves_with_paths(params)[0] if not jc.core.matrices(path, x)}
        narrow = narrow_norms({"params": params, "batch_stats": start.variables.get("batch_stats", {})})
        small = [x for path, x in leaves_with_paths(narrow)[0] if not jc.core.matrices(path, x)]
        size = partial(jc.artifact.file_size, coding="ans")
        more = size(vectors) - size(dict(enumerate(small)))  # what norms take in the plan, and not in the file
        room = 0.96 * jc.artifact.file_size(dict(start.variables)) / ratio  # trained codes have another entropy
        if room + more <= 0:
            raise RunError(f"compress{ratio}: norms and biases alone take more; choose a smaller ratio.")
        done = compress(
            lambda params, x: inference(start.model)({**beside, "params": params}, x),
            params,
            calibration(start.data, examples=512),
            budget={"bytes": room + more},
            measure=kl,
            terms=Terms(coding="ans"),
            second_order=False,
            rounds=0,
            folder=start.folder,
        )
        return _coded(start, jc.gate(done.plan.transform, _in_the_first_half(start.steps)))

    return make


RATIOS = (2, 4, 8, 16, 32, 64)
"""How many times smaller a file may be asked for."""

METHODS: dict[str, Method] = {
    "l1": Method("l1 pruning 20%", 32, weights(lambda _: jc.once(jc.prune(0.2)))),
    "sensitivity": Method(
        "sensitivity pruning 20%", 32, weights(lambda _: jc.once(jc.prune(0.2, score=jc.pruning.sensitivity)))
    ),
    "filters": Method(
        "filter l1 pruning 20%",
        32,
        weights(lambda _: jc.once(jc.prune(0.2, structure=jc.Filters(), where=not_the_head))),
    ),
    "structured": Method("half the channels removed", 32, _fewer_channels),
    "int8": Method("uniform 8-bit", 8, _on_grid(jc.Int(8))),
    "log8": Method("logarithmic 8-bit", 8, _on_grid(jc.Log(8))),
    "w8a8": Method("8-bit with activations", 8, _weights_and_activations),
    "int4": Method("uniform 4-bit", 4, _on_grid(jc.Int(4))),
    "joint": Method("prune 80% + 4-bit, one run", 4, _joint),
    # By name only.
    "float": Method("float32, fine-tuned alike", 32, weights(lambda _: jc.core.identity())),
    "log4": Method("logarithmic 4-bit", 4, _on_grid(jc.Log(4))),
    "log3": Method("logarithmic 3-bit", 3, _on_grid(jc.Log(3))),
    "apot4": Method("additive powers of two, 4-bit", 4, _on_grid(APoT(4))),
    "apot3": Method("additive powers of two, 3-bit", 3, _on_grid(APoT(3))),
    "share16": Method("16 shared values a leaf", 4, weights(_shared(16))),
    "share4": Method("4 shared values a leaf", 2, weights(_shared(4))),
    "sparse90": Method("prune 90%", 32, weights(_sparse)),
    "deep92": Method("Deep Compression, 92%", 4, _deep_compression(0.92)),
    "deep95": Method("Deep Compression, 95%", 4, _deep_compression(0.95)),
    **{f"compress{n}": Method(f"allocated, {n} times smaller", max(1, 32 // n), _smaller(n)) for n in RATIOS},
    "w4a4": Method("learned 4-bit, activations too", 4, _learned(4)),
    "w3a3": Method("learned 3-bit, activations too", 3, _learned(3)),
    "w2a2": Method("learned 2-bit, activations too", 2, _learned(2)),
}
"""All rows by name."""
MAIN_JOB = ("l1", "sensitivity", "filters", "structured", "int8", "log8", "w8a8", "int4", "joint")
"""The rows of a run that names none."""

TAUGHT = "+distill"
"""The end of a row's name whose fine-tuning also learns from the float baseline."""


def method_named(name: str) -> Method:
    """The row of a name, which may end in ``+distill``.

    Raises:
      RunError: there is none.
    """
    found = METHODS.get(name.removesuffix(TAUGHT))
    if found is None:
        known = ", ".join(METHODS)
        raise RunError(f"no method is called {name!r}; there are {known}, each also with {TAUGHT} behind its name.")
    return replace(found, title=f"{found.title}, distilled") if name.endswith(TAUGHT) else found
