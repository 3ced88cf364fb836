"""What a weight that comes back starts from: zero, with an optimizer that has forgotten it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.paths import path_str, some_paths


class MaskState(NamedTuple):
    """State of a transform whose newly active weights start afresh.

    Fields:
      masks: booleans by the path of the parameter, of its shape; True is active.
    """

    masks: dict[str, jax.Array]


def reset_regrown(old_state: Any, new_state: Any, params: Any, opt_state: Any) -> tuple[Any, Any]:
    """Zeroes the weights that ``update`` has just made active, and all that an optimizer remembers of them.

    Call it after every ``update`` of a transform that holds :func:`~jaxcomp.regrow.regrow`; where no weight is grown it
    changes nothing. In the functional design a masked weight keeps the value it had, so this is what makes a regrown
    one start at zero.

    The arrays of the optimizer's state that belong to a parameter are found by their place and shape: their path ends
    with the parameter's, and their shape is the parameter's. So momentum and both moments are found in sgd, adam, lion,
    muon and all others, inside ``chain``, ``masked``, ``partition`` and ``inject_hyperparams`` too. What is not of the
    parameter's shape is left: counters, hyperparameters, the row and column statistics of a factored adafactor (they
    mix a weight with its neighbours). Step counters are one for all weights, so adam's bias correction does not start
    again.

    Args:
      old_state, new_state: the transform's states before and after ``update``; chains, gates and rules of any depth.
      params: the latent parameters, after the optimizer's step.
      opt_state: any optax state over them.

    Returns:
      ``(params, opt_state)``; what no regrown weight belongs to is the same object.

    Raises:
      ValueError: the states are of different transforms, or a mask belongs to no leaf of the parameters.

    >>> import optax
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> opt_state = optax.sgd(0.1, momentum=0.9).init(params)
    >>> old = MaskState({"w": jnp.array([True, False])})
    >>> new = MaskState({"w": jnp.array([False, True])})
    >>> reset_regrown(old, new, params, opt_state)[0]
    {'w': Array([1., 0.], dtype=float32)}
    """
    grown = _grown(_masks(old_state), _masks(new_state))
    if not grown:
        return params, opt_state
    places = {key_path: path_str(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(params)}
    lost = sorted(set(grown) - set(places.values()))
    if lost:
        raise ValueError(
            f"reset_regrown: {lost[0]!r} is masked but is no leaf of the parameters, which are"
            f" {some_paths(places.values())}; an earlier transform made it. Put regrow first in the chain."
        )
    by_place = {key_path: grown.get(path) for key_path, path in places.items()}
    return _zeroed(params, by_place), _zeroed(opt_state, by_place)


def _masks(state: Any) -> dict[str, jax.Array]:
    """The masks of every :class:`MaskState` inside a state, by path."""
    inside = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, MaskState))
    return {path: m for s in inside if isinstance(s, MaskState) for path, m in s.masks.items()}


def _grown(old: Mapping[str, jax.Array], new: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    if old.keys() != new.keys():
        odd = sorted(old.keys() ^ new.keys())
        raise ValueError(
            f"reset_regrown: only one of the two states masks {odd[0]!r}; pass the states of one transform, before and"
            " after its update."
        )
    return {path: new[path] & ~old[path] for path in new}


def _zeroed(tree: Any, grown: Mapping[tuple[Any, ...], jax.Array | None]) -> Any:
    """The tree with zeros at the regrown entries of each leaf that belongs to a parameter."""

    def leaf(key_path: tuple[Any, ...], x: Any) -> Any:
        # From the whole path on, so that of two parameters that fit, the one with the longer path wins.
        ends = (key_path[i:] for i in range(len(key_path) + 1))
        mask = next((grown[end] for end in ends if end in grown), None)
        if mask is None or getattr(x, "shape", None) != mask.shape:
            return x
        return jnp.where(mask, jnp.zeros((), x.dtype), x)

    return jax.tree_util.tree_map_with_path(leaf, tree)
