"""How compressors compose: by rules, and with a memory of what was not sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.gates import all_finite
from jaxcomp.core.paths import Where, first_matches, leaves_with_paths
from jaxcomp.core.types import Key
from jaxcomp.federated.base import Compressor, Message, State, Update, checked, kept_unless
from jaxcomp.federated.messages import poisoned


def by_path(table: Mapping[Where, Compressor]) -> Compressor:
    """Gives each array to the first rule of an ordered table that matches it; what none matches is sent as it is.

    Args:
      table: rule (regular expression over the whole path, or predicate of ``(path, array)``) to compressor, in order.

    Raises:
      ValueError: a rule that no array is left for.

    >>> from jaxcomp.federated import sign, topk
    >>> t = by_path({r".*/kernel": topk(0.25), r".*/bias": sign()})
    >>> update = {"dense": {"kernel": jnp.arange(8.0).reshape(2, 4), "bias": jnp.ones(4)}}
    >>> message, _ = t.encode(t.init(update), update)
    >>> type(message["dense"]["kernel"]).__name__, type(message["dense"]["bias"]).__name__
    ('Sparse', 'Signs')
    """
    rules, compressors = list(table), list(table.values())

    def split(update: Update) -> list[dict[str, jax.Array]]:
        named = checked(update, "by_path")
        parts: list[dict[str, jax.Array]] = [{} for _ in rules]
        for (path, x), first in zip(named, first_matches(rules, named, owner="by_path"), strict=True):
            if first is not None:
                parts[first][path] = x
        return parts

    def init(update: Update) -> State:
        return tuple(c.init(part) for c, part in zip(compressors, split(update), strict=True))

    def encode(
        state: State, update: Update, *, key: Key | None = None, shared: Key | None = None
    ) -> tuple[Message, State]:
        new: dict[str, Message] = {}
        after = []
        for c, s, part in zip(compressors, state, split(update), strict=True):
            message, s = c.encode(s, part, key=key, shared=shared)
            new |= message
            after.append(s)
        named, treedef = leaves_with_paths(update)
        return treedef.unflatten([new.get(path, x) for path, x in named]), tuple(after)

    return Compressor(init, encode, all(c.contracts for c in compressors))


class FeedbackState(NamedTuple):
    """What :func:`error_feedback` keeps: what has not been sent yet, in float32 at least; and the inner state."""

    memory: Update
    inner: State


def error_feedback(compressor: Compressor) -> Compressor:
    """Remembers what a message did not say, and adds it to the next update: ``m' = (m + u) - decode(encode(m + u))``.

    Over any number of rounds the decoded messages and the memory add up to the updates, so nothing is lost, only late.
    The memory is float32 at least, whatever the update's type, which is the message's. An update that is not finite,
    which inside jit no error refuses, makes a message of NaN and changes neither the memory nor the inner state.

    Args:
      compressor: one that contracts.

    Raises:
      ValueError: a compressor whose error may be larger than the update, which would grow from round to round; or, at
        encode, an update unlike the one that ``init`` was given.

    >>> import jax.numpy as jnp
    >>> from jaxcomp.federated import topk
    >>> t, update = error_feedback(topk(count=1)), {"w": jnp.array([4.0, 3.0])}
    >>> state = t.init(update)
    >>> for _ in range(2):
    ...     message, state = t.encode(state, update)
    >>> t.decode(message)["w"].tolist(), state.memory["w"].tolist()
    ([0.0, 6.0], [4.0, 0.0])

    Source: Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847, algorithm 2.
    """
    if not isinstance(compressor, Compressor):
        raise TypeError(f"error_feedback: wants a compressor such as topk(0.01), got {compressor!r}.")
    if not compressor.contracts:
        raise ValueError(
            "error_feedback: this compressor's error can be larger than the update, and would grow from round to round;"
            " use randomk(unbiased=False), sign(unbiased=False), or uniform with 3 bits or more."
        )

    def init(update: Update) -> FeedbackState:
        checked(update, "error_feedback")
        memory = jax.tree.map(lambda x: jnp.zeros(x.shape, compute_dtype(x.dtype)), update)
        return FeedbackState(memory, compressor.init(update))

    def encode(
        state: FeedbackState, update: Update, *, key: Key | None = None, shared: Key | None = None
    ) -> tuple[Message, FeedbackState]:
        _check_same_shapes(checked(update, "error_feedback"), state.memory)
        whole = jax.tree.map(lambda m, u: _wide(m) + _wide(u), state.memory, update)
        sent = jax.tree.map(lambda x, u: x.astype(u.dtype), whole, update)
        message, inner = compressor.encode(state.inner, sent, key=key, shared=shared)
        # The barrier keeps decode's product and this difference two roundings: jit gives what eager gives.
        said = jax.lax.optimization_barrier(compressor.decode(message))
        after = FeedbackState(jax.tree.map(lambda x, s: x - _wide(s), whole, said), inner)
        fine = jnp.asarray(all_finite(update))
        spoilt = poisoned(message, jnp.where(fine, jnp.float32(1), jnp.float32(jnp.nan)))
        return spoilt, kept_unless(fine, after, state)

    return Compressor(init, encode)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(compute_dtype(x.dtype))


def _check_same_shapes(named: list[tuple[str, jax.Array]], memory: Update) -> None:
    found = {path: tuple(x.shape) for path, x in named}
    wanted = {path: tuple(x.shape) for path, x in leaves_with_paths(memory)[0]}
    for path in {**found, **wanted}:
        if found.get(path) != wanted.get(path):
            raise ValueError(
                f"error_feedback: {path!r} has shape {found.get(path)} in the update and {wanted.get(path)} in the"
                " memory; the state is of another update, call init(update)."
            )
