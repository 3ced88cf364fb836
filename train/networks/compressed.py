"""Networks that are no flax module and are trained and judged as one: quantized activations, removed channels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import jaxcomp as jc
from jaxcomp.activations import LSQ, Rules
from jaxcomp.core.paths import Where
from jaxcomp.core.types import Params, PyTree
from jaxcomp.quantization.scales import MSE, AbsMax
from jaxcomp.structure import Plan
from jaxcomp.trace.calibrate import Stats, merge_all
from jaxcomp.trace.ranges import Range, min_max, mse
from train.data.images import normalize
from train.data.sets import Dataset
from train.networks.linen import EPSILON

Variables = Mapping[str, Params]
"""``params`` and ``batch_stats``, as flax names them."""
Mutable = bool | list[str]
"""Which collections a network gives back besides its logits."""


class Network(Protocol):
    """What is trained and judged: anything with flax's ``apply``."""

    def apply(self, variables: Variables, images: jax.Array, /, *, train: bool, mutable: Mutable = False) -> PyTree:
        """Logits, and with ``mutable`` the new collections too."""


@dataclass(frozen=True)
class OnGrids:
    """A network whose products take activations on integer grids, with fixed ranges; weights as the tree has them.

    Args:
      network: of float activations.
      rules, integer: as of ``quantize_function``.
      ranges: of its activations, by site.
    """

    network: Network
    rules: Rules
    ranges: Mapping[str, Range]
    integer: bool = False

    def apply(self, variables: Variables, images: jax.Array, /, *, train: bool, mutable: Mutable = False) -> PyTree:
        """The network's results; in integer mode ``variables`` hold the compressed leaves as they are."""
        fn = partial(self.network.apply, train=train, mutable=mutable)
        run = jc.quantize_function(fn, self.rules, integer=self.integer)
        return run(variables, self.ranges, images)


@dataclass(frozen=True)
class LearnedGrids:
    """A network whose parameters are ``{"weights": its own, "ranges": of its activations by site}``: both are trained.

    A range without a ``low`` begins at 0.

    Args:
      network: of float activations.
      rules, integer: as of ``quantize_function``.
    """

    network: Network
    rules: Rules
    integer: bool = False

    def apply(self, variables: Variables, images: jax.Array, /, *, train: bool, mutable: Mutable = False) -> PyTree:
        """The network's results; in integer mode ``variables`` hold the compressed leaves as they are."""
        own, ranges = self.apart(variables)
        fn = partial(self.network.apply, train=train, mutable=mutable)
        run = jc.quantize_function(fn, self.rules, integer=self.integer)
        return run(own, ranges, images)

    @staticmethod
    def apart(variables: Variables) -> tuple[Variables, dict[str, Range]]:
        """The network's own variables, and the ranges of its activations."""
        weights, given = variables["params"]["weights"], variables["params"]["ranges"]
        ranges = {name: Range(r.get("low", jnp.zeros_like(r["high"])), r["high"]) for name, r in given.items()}
        return {**variables, "params": weights}, ranges


@dataclass(frozen=True)
class Shrunken:
    """A network over the smaller tree of a plan, for one that cannot be built at the new widths."""

    network: Network
    plan: Plan

    def apply(self, variables: Variables, images: jax.Array, /, *, train: bool, mutable: Mutable = False) -> PyTree:
        """The network's results."""
        return jc.shrink(partial(self.network.apply, train=train, mutable=mutable), self.plan)(variables, images)


@dataclass(frozen=True)
class Widened:
    """A network whose variables are held in half precision where it takes float32."""

    network: Network

    def apply(self, variables: Variables, images: jax.Array, /, *, train: bool, mutable: Mutable = False) -> PyTree:
        """The network's results."""
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float16 else x, variables)
        return self.network.apply(wide, images, train=train, mutable=mutable)


def narrow_norms(variables: Variables) -> Variables:
    """What batch norms do at inference in two vectors each, of float16: their statistics are those of no change.

    The statistics are alike then, so that a file holds one of each length.
    """
    params, stats = dict(variables["params"]), dict(variables["batch_stats"])
    for name, found in stats.items():
        if "var" not in found:
            inner = narrow_norms({"params": params[name], "batch_stats": found})
            params[name], stats[name] = inner["params"], inner["batch_stats"]
            continue
        scale = params[name]["scale"] / jnp.sqrt(found["var"] + EPSILON)
        vectors = {"scale": scale, "bias": params[name]["bias"] - found["mean"] * scale}
        params[name] = {k: v.astype(jnp.float16) for k, v in vectors.items()}
        stats[name] = {"mean": jnp.zeros_like(found["mean"]), "var": jnp.full_like(found["var"], 1 - EPSILON)}
    return {"params": params, "batch_stats": stats}


def inference(network: Network) -> Callable[[Variables, jax.Array], jax.Array]:
    """``fn(variables, images)``: the network's logits, as the analyses take it."""
    return partial(network.apply, train=False)


def axis_roles(network: Network, variables: Variables, data: Dataset) -> jc.core.Roles:
    """What the network does with each axis of its parameters, by their paths below ``params``."""
    image = jnp.zeros((1, *data.train.images.shape[1:]), jnp.float32)

    def logits(params: Params, image: jax.Array) -> PyTree:
        return inference(network)({**variables, "params": params}, image)

    return jc.roles(logits)(variables["params"], image)


def observed(network: Network, variables: Variables, data: Dataset, *, examples: int = 1000) -> dict[str, Stats]:
    """The statistics of each activation over the first examples of the training split."""
    observe = jax.jit(jc.calibrate(inference(network)))
    return merge_all(*(observe(variables, batch) for batch in calibration(data, examples=examples, size=250)))


def calibration(data: Dataset, *, examples: int, size: int = 128) -> Iterator[jax.Array]:
    """The first examples of the training split, in batches, as the network takes them."""
    size = min(size, examples, len(data.train))
    for start in range(0, min(examples, len(data.train)) - size + 1, size):
        yield normalize(jnp.asarray(data.train.images[start : start + size]), data.mean, data.std)


def calibrated(network: Network, variables: Variables, data: Dataset) -> dict[str, Range]:
    """From the smallest to the largest value of each activation over the first examples of the training split."""
    return jc.activations.ranges_of(observed(network, variables, data))


def learned_grids(
    network: Network, variables: Variables, data: Dataset, *, bits: int
) -> tuple[LearnedGrids, Variables]:
    """LSQ of weights and activations: the network, and its variables before the first step.

    The first and the last layer have 8 bits. Activations are on unsigned grids from 0, but for those that were seen
    below it, which are symmetric. Ranges and scales begin where the squared error is least.

    Source: Esser et al. 2020, arXiv:1902.08153. Deviations: a scale a channel for weights; the beginning, which is
    nearer the end for a short training.
    """
    image = jnp.zeros((1, *data.train.images.shape[1:]), jnp.float32)
    paths = [site.path for site in jc.sites(inference(network))(variables, image)]
    ends = {paths[0], paths[-1]}
    rules: dict[Where, jc.Act | None] = {}
    ranges = {}
    for name, stats in observed(network, variables, data).items():
        width, signed = 8 if name in ends else bits, float(stats.low) < 0
        rules[re.escape(name)] = jc.Act(width, symmetric=signed, range=LSQ())
        found = min_max(stats) if width == 8 else mse(width, symmetric=signed)(stats)
        ranges[name] = found._asdict() if signed else {"high": found.high}
    inner = {path.removeprefix("params/") for path in ends}
    roles = axis_roles(network, variables, data)
    weights = jc.quantization.learned(
        variables["params"], jc.Int(bits), roles=roles, scale=MSE(), where=lambda p, _: p in roles and p not in inner
    )
    weights = jc.quantization.learned(weights, jc.Int(8), roles=roles, scale=AbsMax(), where=lambda p, _: p in inner)
    return LearnedGrids(network, rules), {**variables, "params": {"weights": weights, "ranges": ranges}}


def ranges_as_dicts(ranges: Mapping[str, Range]) -> dict[str, dict[str, np.ndarray]]:
    """Ranges as a file holds them."""
    return {name: {"low": np.asarray(r.low), "high": np.asarray(r.high)} for name, r in ranges.items()}


def ranges_of_dicts(saved: Mapping[str, Mapping[str, ArrayLike]]) -> dict[str, Range]:
    """The inverse of :func:`ranges_as_dicts`."""
    return {name: Range(jnp.asarray(r["low"]), jnp.asarray(r["high"])) for name, r in saved.items()}


def macs_of(network: Network, variables: Variables, data: Dataset) -> int:
    """Multiply-adds of one image; leaves of ``variables`` may be shapes."""
    image = jnp.zeros((1, *data.train.images.shape[1:]), jnp.float32)
    return sum(site.macs for site in jc.sites(inference(network))(variables, image))
