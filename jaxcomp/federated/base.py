"""Compressors of updates: the abstraction, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.leaves import is_compressed, materialize
from jaxcomp.core.paths import is_float_array, key_of_leaf, leaves_with_paths, some_paths
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.slots import Slot, check_finite
from jaxcomp.core.types import Key, Leaf, PyTree, State
from jaxcomp.federated.messages import MessageLeaf, array_bits, combined_leaf

Update = PyTree
"""A tree of floating arrays: gradients, or what a sender changed."""
Message = PyTree
"""The update's tree, with a message leaf (or still an array) where each array was."""


class EncodeFn(Protocol):
    """``encode(state, update, *, key, shared)``: the message and the next state."""

    def __call__(
        self, state: State, update: Update, *, key: Key | None = None, shared: Key | None = None
    ) -> tuple[Message, State]:
        """``key`` is this sender's own randomness of the round, ``shared`` the round's, the same to all senders."""
        ...


def decode(message: Message) -> Update:
    """The update that a message (one sender's, or a combined one) stands for.

    Args:
      message: from ``encode``, or from :func:`combine`.

    >>> from jaxcomp.federated import topk
    >>> decode(topk(count=1).encode((), {"w": jnp.array([1.0, 4.0])})[0])["w"].tolist()
    [0.0, 4.0]
    """
    return materialize(message)


def bits(message: Message) -> int:
    """How many bits the message takes on the wire: those of its arrays, whole bytes each, and nothing else is sent.

    Works on shapes alone: ``bits(jax.eval_shape(...))`` is known before anything runs.

    >>> bits({"w": jnp.zeros((3, 4))})
    384
    """
    return sum(array_bits(x) for x in jax.tree.leaves(message))


@on_any_mesh
def combine(messages: Sequence[Message], weights: jax.typing.ArrayLike | Sequence[float] | None = None) -> Message:
    """One message that decodes to the mean of what the given ones decode to, made without decoding where that can be.

    Lists of places and values are joined, values at shared places averaged, integer codes on a common scale summed as
    integers, rotated arrays averaged before the one rotation back, factors put side by side; with ``sign(vote=True)``
    the majority's sign is taken. What has no smaller form (signs with different scales) becomes a dense array.

    Args:
      messages: of one compressor, from senders whose updates have one tree.
      weights: a number for each, such as its count of examples; they are divided by their sum. None is the plain mean.

    Raises:
      ValueError: no messages, messages of different trees, compressors or random places, or weights that do not fit.

    >>> from jaxcomp.federated import topk
    >>> t = topk(count=1)
    >>> sent = [t.encode((), {"w": jnp.array(x)})[0] for x in ([0.0, 4.0, 0.0, 0.0], [2.0, 1.0, 0.0, 0.0])]
    >>> decode(combine(sent))["w"]
    Array([1., 2., 0., 0.], dtype=float32)
    """
    messages = list(messages)
    if not messages:
        raise ValueError("combine: there are no messages.")
    for i, m in enumerate(messages[1:], start=1):
        _check_alike(messages[0], m, i)
    share = None if weights is None else _shares(weights, len(messages))
    return combine_stacked(jax.tree.map(lambda *x: jnp.stack(x), *messages), share)


@on_any_mesh
def combine_stacked(stacked: Message, weights: jax.Array | None = None) -> Message:
    """:func:`combine` of messages that ``vmap`` or ``all_gather`` has stacked: every array has an axis more in front.

    Args:
      stacked: the messages.
      weights: float32 with sum 1, one a message, or None.

    Raises:
      ValueError: an array of integers, which has no mean. The message names the path.

    >>> from jaxcomp.federated import topk
    >>> updates = {"w": jnp.array([[0.0, 4.0], [2.0, 1.0]])}  # of two senders
    >>> stacked = jax.vmap(lambda u: topk(count=1).encode((), u)[0])(updates)
    >>> decode(combine_stacked(stacked))["w"].tolist()
    [1.0, 2.0]
    """
    named, treedef = leaves_with_paths(stacked, is_leaf=is_compressed)
    if any(x.shape[:1] == (0,) for x in jax.tree.leaves(stacked)):
        raise ValueError("combine: no messages are stacked (an axis of length 0), and of none there is no mean.")
    for path, x in named:
        if not isinstance(x, MessageLeaf) and not is_float_array(x):
            raise ValueError(f"combine: {path!r} is of type {x.dtype}, which has no mean; leave it out of the update.")
    return treedef.unflatten([combined_leaf(x, weights) for _, x in named])


def kept_unless(fine: jax.Array | np.bool_, new: State, old: State) -> State:
    """What a compressor remembers after a step: the new where the step was fine, else the old, in the new's types."""
    return jax.tree.map(lambda n, o: jnp.where(fine, n, o.astype(n.dtype)), new, old)


class _Functions(NamedTuple):
    init: Callable[[Update], State]
    encode: EncodeFn
    contracts: bool
    decode: Callable[[Message], Update]
    combine: Callable[..., Message]
    bits: Callable[[Message], int]


class Compressor(_Functions):
    """A compression of updates (gradients, or differences of parameters), as pure functions.

    Fields:
      init: ``init(update) -> state`` of one sender, from the update's shapes; ``()`` where nothing is remembered.
      encode: ``encode(state, update, *, key=None, shared=None) -> (message, state)``. Safe inside jit and vmap. ``key``
        is this sender's own randomness of the round, ``shared`` is the round's, the same to all senders.
      contracts: whether the decoded message is never farther from the update than 0 is (in the l2 norm, on average),
        which :func:`error_feedback` needs.
      decode: ``decode(message) -> update``.
      combine: ``combine(messages, weights=None) -> message``, which decodes to their mean.
      bits: ``bits(message) -> int``, the exact size of a message on the wire.

    >>> from jaxcomp.federated import error_feedback, topk
    >>> t = error_feedback(topk(count=1))
    >>> update = {"w": jnp.array([1.0, 4.0, 0.0, 0.0])}
    >>> message, state = t.encode(t.init(update), update)
    >>> t.decode(message)["w"], state.memory["w"], t.bits(message)
    (Array([0., 4., 0., 0.], dtype=float32), Array([1., 0., 0., 0.], dtype=float32), 40)
    """

    __slots__ = ()

    def __new__(  # noqa: D102
        cls,
        init: Callable[[Update], State],
        encode: EncodeFn,
        contracts: bool = True,
        decode: Callable[[Message], Update] = decode,
        combine: Callable[..., Message] = combine,
        bits: Callable[[Message], int] = bits,
    ) -> Compressor:
        return super().__new__(cls, on_any_mesh(init), on_any_mesh(encode), contracts, decode, combine, bits)


class LeafwiseFn(Protocol):
    """``(path, array, leaf state, key, shared) -> (message leaf, leaf state)``; the keys are this leaf's own.

    A key that the compressor does not need may be None.
    """

    def __call__(self, path: str, x: jax.Array, state: State, key: Key, shared: Key, /) -> tuple[Leaf, State]:  # noqa: D102
        ...


def leafwise(
    owner: str,
    encode_leaf: LeafwiseFn,
    *,
    check: Callable[[str, jax.Array], object] = lambda path, x: None,
    init_leaf: Callable[[str, jax.Array], State] = lambda path, x: None,
    needs: tuple[str, ...] = (),
    contracts: bool = True,
) -> Compressor:
    """A compressor that encodes each array by itself.

    Args:
      owner: its name, for messages.
      encode_leaf: the array mathematics.
      check: raises where an array does not fit, by shape.
      init_leaf: the state of one array; a state of None is not kept.
      needs: which of "key" and "shared" it draws from.
      contracts: see :class:`Compressor`.
    """

    def init(update: Update) -> State:
        states = {}
        for path, x in checked(update, owner):
            check(path, x)
            states[path] = init_leaf(path, x)
        return {path: s for path, s in states.items() if s is not None} or ()

    def encode(
        state: State, update: Update, *, key: Key | None = None, shared: Key | None = None
    ) -> tuple[Message, State]:
        for name in needs:
            needed_key(owner, name, key if name == "key" else shared)
        named = checked(update, owner)
        memory = dict(state) if state else {}
        if memory and not memory.keys() <= {path for path, _ in named}:
            raise ValueError(f"{owner}: the state is of another update, with {some_paths(memory)}; call init(update).")
        leaves, after = [], {}
        for path, x in named:
            check(path, x)
            own, common = (cast(Key, None if k is None else key_of_leaf(k, path)) for k in (key, shared))
            leaf, after[path] = encode_leaf(path, x, memory.get(path), own, common)
            leaves.append(leaf)
        return jax.tree.unflatten(jax.tree.structure(update), leaves), {
            path: s for path, s in after.items() if s is not None
        } or ()

    return Compressor(init, encode, contracts)


def checked(update: Update, owner: str) -> list[tuple[str, Leaf]]:
    """The update's arrays by path.

    Raises:
      ValueError: there are none, or one is compressed, not floating, empty, or (where its values are known) not finite.
    """
    named, _ = leaves_with_paths(update, is_leaf=is_compressed)
    if not named:
        raise ValueError(f"{owner}: the update has no arrays.")
    for path, x in named:
        if is_compressed(x):
            raise ValueError(f"{owner}: {path!r} is a {type(x).__name__}; encode materialize(update).")
        if not is_float_array(x):
            found = f"of type {x.dtype}" if hasattr(x, "dtype") else f"{type(x).__name__}"
            raise ValueError(f"{owner}: {path!r} is {found}, not a floating array; leave it out of the update.")
        if 0 in x.shape:
            raise ValueError(f"{owner}: {path!r} is empty (shape {tuple(x.shape)}); leave it out of the update.")
    check_finite({path: Slot(path, path, x, None) for path, x in named}, owner)
    return named


def needed_key(owner: str, name: str, key: Key | None) -> Key:
    """The key itself.

    Raises:
      ValueError: it is None.
    """
    if key is None:
        of = {"key": "this sender's own key of the round", "shared": "the round's key, the same to all senders"}
        raise ValueError(f"{owner}: encode wants {name}=, {of[name]}; got None.")
    return key


def _check_alike(first: Message, other: Message, index: int) -> None:
    trees: list[object] = [jax.tree.structure(m) for m in (first, other)]
    if trees[0] == trees[1]:
        shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(m)] for m in (first, other)]
        if shapes[0] == shapes[1]:
            return
    kinds = [{path: _kind(x) for path, x in leaves_with_paths(m, is_leaf=is_compressed)[0]} for m in (first, other)]
    for path in {**kinds[0], **kinds[1]}:
        if kinds[0].get(path) != kinds[1].get(path):
            raise ValueError(
                f"combine: message {index} has {kinds[1].get(path, 'nothing')} at {path!r}, message 0 has"
                f" {kinds[0].get(path, 'nothing')}; combine messages of one compressor and one tree."
            )
    raise ValueError(f"combine: message {index} has other containers than message 0; combine messages of one tree.")


def _kind(x: Leaf) -> str:
    """A message leaf in words, with all that its decoding depends on but the values."""
    inside = ", ".join(str((tuple(a.shape), str(a.dtype))) for a in jax.tree.leaves(x))
    static = jax.tree.structure(x) if is_compressed(x) else ""
    return f"{type(x).__name__} of shape {tuple(x.shape)} holding {inside} {static}".rstrip()


def _shares(weights: jax.typing.ArrayLike | Sequence[float], count: int) -> jax.Array:
    w = jnp.asarray(weights).astype(jnp.float32)
    if w.shape != (count,):
        raise ValueError(f"combine: wants a weight for each of {count} messages, got shape {w.shape}.")
    if not isinstance(w, jax.core.Tracer) and not (bool(jnp.all(w >= 0)) and 0 < float(jnp.sum(w)) < np.inf):
        raise ValueError(f"combine: weights must be 0 or more with a positive sum, got {weights!r}.")
    return w / jnp.sum(w)
