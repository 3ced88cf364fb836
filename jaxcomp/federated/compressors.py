"""The compressors: what is left out, rounded or factored; each array by itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.gates import all_finite
from jaxcomp.core.packed import Packed
from jaxcomp.core.paths import Where, key_of_leaf, matches, matrices
from jaxcomp.core.reductions import max_or_nan, nan_in
from jaxcomp.core.specs import check_bits, check_key, is_integer, is_number, share_of
from jaxcomp.core.types import Key, Leaf
from jaxcomp.federated.arrays import (
    drawn,
    half_step_of,
    largest,
    orthonormal,
    pack_wide,
    rotated,
    rotation_block,
    seed_of,
    stochastic_codes,
)
from jaxcomp.federated.base import Compressor, Message, State, Update, checked, leafwise, needed_key
from jaxcomp.federated.coded_messages import Rotated, Signs, Uniform
from jaxcomp.federated.messages import Drawn, Factors, Sparse


def dense() -> Compressor:
    """Sends the update as it is.

    >>> update = {"w": jnp.array([3.0, -1.0, 2.0, -2.0])}
    >>> dense().decode(dense().encode((), update)[0])["w"].tolist()
    [3.0, -1.0, 2.0, -2.0]
    """
    return leafwise("dense", lambda path, x, state, key, shared: (x, None))


def topk(fraction: float | None = None, *, count: int | None = None) -> Compressor:
    """Sends the elements of largest magnitude of each array, and their places.

    ``max(1, round(fraction * size))`` of them, or exactly ``count``. The places take ``ceil(log2(size))`` bits each, or
    a bit for every element of the array where that is less. ``‖x - decode‖² <= (1 - count/size) ‖x‖²``.

    Args:
      fraction: of each array's elements.
      count: so many of each array, in its place.

    Raises:
      ValueError: not one of the two given, a fraction outside (0, 1], a count below 1, or (at ``init`` and ``encode``)
        above an array's size.

    >>> update = {"w": jnp.array([3.0, -1.0, 2.0, -2.0])}
    >>> topk(count=2).decode(topk(count=2).encode((), update)[0])["w"].tolist()
    [3.0, 0.0, 2.0, 0.0]

    Source: Aji and Heafield 2017, arXiv:1704.05021; Stich et al. 2018, arXiv:1809.07599.
    """
    number = _count_rule("topk", fraction, count)

    def encode_leaf(path: str, x: jax.Array, state: State, key: Key, shared: Key) -> tuple[Sparse, None]:
        return Sparse.of(x, largest(x.reshape(-1), number(path, x))), None

    return leafwise("topk", encode_leaf, check=number)


def randomk(fraction: float | None = None, *, count: int | None = None, unbiased: bool = True) -> Compressor:
    """Sends the elements at places drawn from the shared key: the places are drawn again at the other end, not sent.

    Unbiased, the values count ``size / count`` fold: ``E[decode] == x``. Otherwise they count once, which contracts:
    ``E‖x - decode‖² == (1 - count/size) ‖x‖²``. Needs ``shared=``.

    Args:
      fraction, count: as in :func:`topk`.
      unbiased: whether the values count ``size / count`` fold.

    Raises:
      ValueError: as :func:`topk` does.

    >>> update = {"w": jnp.array([3.0, -1.0, 2.0, -2.0])}
    >>> t = randomk(count=2)
    >>> sent = t.decode(t.encode((), update, shared=jax.random.key(0))[0])["w"]
    >>> int((sent != 0).sum()), bool(((sent == 0) | (sent == 2 * update["w"])).all())
    (2, True)

    Source: Konečný et al. 2016, arXiv:1610.05492 (random mask, sent as a seed); Stich et al. 2018, arXiv:1809.07599.
    """
    number = _count_rule("randomk", fraction, count)

    def encode_leaf(path: str, x: jax.Array, state: State, key: Key, shared: Key) -> tuple[Drawn, None]:
        k, seed = number(path, x), seed_of(shared)
        values = x.reshape(-1)[drawn(seed, x.size, k)]
        return Drawn(values, seed, x.size / k if unbiased else 1.0, tuple(x.shape), jnp.dtype(x.dtype)), None

    return leafwise("randomk", encode_leaf, check=number, needs=("shared",), contracts=not unbiased)


def sign(*, vote: bool = False, unbiased: bool = False) -> Compressor:
    """Sends a bit an element and one scale an array: ``decode == scale * sign(x)``, with 0 counted as positive.

    The scale is ``mean|x|``, the nearest such array: ``‖x - decode‖² == ‖x‖² - ‖x‖₁²/size``.

    Args:
      vote: combine by majority: each element takes the sign that most senders have, 0 at a tie, times the mean scale.
      unbiased: the scale ``‖x‖² / ‖x‖₁``, for which ``<decode, x> == ‖x‖²``; inside :func:`rotate` the decoded update
        is then unbiased (DRIVE) up to how near the Hadamard rotation is to a uniform one, but it no longer contracts.

    >>> update = {"w": jnp.array([3.0, -1.0, 2.0, -2.0])}
    >>> sign().decode(sign().encode((), update)[0])["w"].tolist()
    [2.0, -2.0, 2.0, -2.0]

    Source: Bernstein et al. 2018, arXiv:1802.04434, arXiv:1810.05291 (majority vote); Karimireddy et al. 2019,
    arXiv:1901.09847 (scaled by the mean); Vargaftik et al. 2021, arXiv:2105.08339 (DRIVE).
    """

    def encode_leaf(path: str, x: jax.Array, state: State, key: Key, shared: Key) -> tuple[Signs, None]:
        wide = x.astype(compute_dtype(x.dtype))
        total = jnp.sum(jnp.abs(wide))
        scale = total * (1 / x.size)
        if unbiased:
            top = jnp.max(jnp.abs(wide))
            some = top > 0
            parts = jnp.abs(wide) / jnp.where(some, top, jnp.ones_like(top))  # whose squares are in range
            scale = top * jnp.sum(parts * parts) / jnp.where(some, jnp.sum(parts), jnp.ones_like(top))
        return Signs(Packed.of(x >= 0, 1, 0), scale, vote, tuple(x.shape), jnp.dtype(x.dtype)), None

    return leafwise("sign", encode_leaf, contracts=not unbiased)


def uniform(bits: int, *, limit: float | None = None, axis_name: str | None = None) -> Compressor:
    """Sends integers of ``bits`` bits, stochastically rounded, on ``2**bits`` levels between ``-limit`` and ``limit``.

    ``E[decode] == x`` within the range. The error's second moment is at most ``size * (limit / (2**bits - 1))**2``, so
    a range set by an outlier hurts: :func:`rotate` removes outliers. Needs ``key=``.

    Args:
      bits: 1..8.
      limit: a range that all senders know, so that codes can be summed as integers; what lies outside is clipped. By
        default each array's own ``max|x|``, which is sent with it.
      axis_name: inside ``vmap``, ``pmap`` or ``shard_map``: the range is the largest ``max|x|`` over that axis (a
        scalar all-reduce an array), and codes can be summed.

    Raises:
      ValueError: bits outside 1..8, a limit that is not positive, or both limit and axis_name.

    >>> update = {"w": jnp.array([3.0, -1.0, 2.0, -2.0])}
    >>> message, _ = uniform(2).encode((), update, key=jax.random.key(0))
    >>> sorted(set(uniform(2).decode(message)["w"].tolist()) - {-3.0, -1.0, 1.0, 3.0})
    []

    Source: Suresh et al. 2017, arXiv:1611.00429 (stochastic k-level quantization); Alistarh et al. 2017 (QSGD),
    arXiv:1610.02132. Deviation: levels are symmetric about 0 and the range is the largest magnitude, as one scalar.
    """
    check_bits("uniform", bits, least=1)
    if limit is not None and not (is_number(limit) and 0 < limit < math.inf):
        raise ValueError(f"uniform: limit must be positive, got {limit!r}.")
    if limit is not None and axis_name is not None:
        raise ValueError("uniform: the range is common by limit= or by axis_name=; give one of them.")
    common = limit is not None or axis_name is not None

    def encode_leaf(path: str, x: jax.Array, state: State, key: Key, shared: Key) -> tuple[Uniform, None]:
        wide = x.astype(compute_dtype(x.dtype)).reshape(-1)
        top = max_or_nan(jnp.abs(wide)) if limit is None else jnp.asarray(limit, wide.dtype) + nan_in(wide)
        if axis_name is not None:
            top = jax.lax.pmax(top, axis_name)
        half_step = half_step_of(top, bits)
        codes = pack_wide(stochastic_codes(wide, half_step, bits, key), bits)
        return Uniform(codes, half_step, bits, 1, common, tuple(x.shape), jnp.dtype(x.dtype)), None

    return leafwise("uniform", encode_leaf, needs=("key",), contracts=bits >= 3)


def rotate(compressor: Compressor, *, block: int | None = None) -> Compressor:
    """Encodes ``H D x``, each array flat, with random signs D and the Hadamard transform H; decoding turns back.

    After the rotation all elements are alike, so that one range or one scale suits them all. The rotation is drawn from
    the shared key (32 bits of it are sent with each array), so that messages can be combined before it is undone.
    Needs ``shared=``.

    Args:
      compressor: what encodes the rotated arrays, such as ``uniform(2)`` or ``sign()``.
      block: length of the transform, a power of two; the array is padded to a multiple of it. By default the whole
        array is one block, padded to a power of two, which sends up to twice as many elements.

    Raises:
      ValueError: a block that is not a power of two.

    >>> update = {"w": jnp.array([3.0, -1.0, 2.0, -2.0])}
    >>> t = rotate(sign())
    >>> message, _ = t.encode(t.init(update), update, shared=jax.random.key(0))
    >>> t.bits(message)  # a bit an element, a scale, 32 bits of the key
    72

    Source: Suresh et al. 2017, arXiv:1611.00429, section 3; Vargaftik et al. 2021, arXiv:2105.08339.
    """
    if block is not None and (not is_integer(block) or block < 1 or block & (block - 1)):
        raise ValueError(f"rotate: block must be a power of two, got {block!r}.")

    def init(update: Update) -> State:
        named = checked(update, "rotate")
        return compressor.init({p: jnp.zeros(_padded(x.size, block), compute_dtype(x.dtype)) for p, x in named})

    def encode(
        state: State, update: Update, *, key: Key | None = None, shared: Key | None = None
    ) -> tuple[Message, State]:
        common = needed_key("rotate", "shared", shared)
        named = checked(update, "rotate")
        seeds = {path: seed_of(key_of_leaf(common, path)) for path, _ in named}
        lengths = {path: rotation_block(x.size, block) for path, x in named}
        flat = {path: x.astype(compute_dtype(x.dtype)).reshape(-1) for path, x in named}
        turned = {path: rotated(x, seeds[path], lengths[path]) for path, x in flat.items()}
        message, state = compressor.encode(state, turned, key=key, shared=shared)
        leaves = [Rotated(message[p], seeds[p], lengths[p], tuple(x.shape), jnp.dtype(x.dtype)) for p, x in named]
        return jax.tree.unflatten(jax.tree.structure(update), leaves), state

    return Compressor(init, encode, compressor.contracts)


def powersgd(rank: int, *, key: jax.Array, where: Where = matrices, axis_name: str | None = None) -> Compressor:
    """Sends two thin factors of each selected array: one step of power iteration that starts where the last one ended.

    ``P = orthonormal(M Q)``, ``Q = Mᵀ P``, ``decode == P Qᵀ``, a projection of M: ``‖M - P Qᵀ‖ <= ‖M‖``. M is the array
    with all axes but the last made one. What is not selected is sent as it is.

    Args:
      rank: columns of the factors.
      key: of the first Q; the same to all senders where axis_name is given.
      where: which arrays.
      axis_name: inside ``vmap``, ``pmap`` or ``shard_map``: ``M Q`` and ``Mᵀ P`` are averaged over that axis, as two
        all-reduces of the factors' size, and each sender's message is that of the mean. Without it each sender has
        factors of its own, which are combined side by side.

    Raises:
      ValueError: a rank below 1, no key, or (at ``init``) a selected array of fewer than two axes or of a smaller rank.

    >>> update = {"kernel": jnp.outer(jnp.arange(1.0, 5.0), jnp.array([1.0, 2.0]))}  # of rank one
    >>> t = powersgd(1, key=jax.random.key(0))
    >>> message, _ = t.encode(t.init(update), update)
    >>> bool(jnp.allclose(t.decode(message)["kernel"], update["kernel"], atol=1e-4))
    True

    Source: Vogels et al. 2019, arXiv:1905.13727, algorithm 1. Deviation: QR in place of Gram-Schmidt.
    """
    if not is_integer(rank) or rank < 1:
        raise ValueError(f"powersgd: rank must be a positive integer, got {rank!r}.")
    check_key("powersgd", key)

    def check(path: str, x: jax.Array) -> None:
        if matches(where, path, x):
            _check_rank(path, tuple(x.shape), rank)

    def init_leaf(path: str, x: jax.Array) -> jax.Array | None:
        if not matches(where, path, x):
            return None
        return jax.random.normal(key_of_leaf(key, path), (x.shape[-1], rank), compute_dtype(x.dtype))

    def mean(m: jax.Array) -> jax.Array:
        return m if axis_name is None else jax.lax.pmean(m, axis_name)

    def encode_leaf(
        path: str, x: jax.Array, q: jax.Array | None, key: Key, shared: Key
    ) -> tuple[Leaf, jax.Array | None]:
        if not matches(where, path, x):
            return mean(x), None
        if q is None:
            raise ValueError(f"powersgd: the state has no factor for {path!r}; call init(update).")
        m = x.astype(q.dtype).reshape(-1, x.shape[-1])
        highest = jax.lax.Precision.HIGHEST
        p = orthonormal(mean(jnp.matmul(m, q, precision=highest)))
        new = mean(jnp.matmul(m.T, p, precision=highest))
        start = jnp.where(all_finite(new), new, q)  # after a step that is skipped the next one starts as it would have
        return Factors(p.astype(x.dtype), new.astype(x.dtype), tuple(x.shape), jnp.dtype(x.dtype)), start

    return leafwise("powersgd", encode_leaf, check=check, init_leaf=init_leaf)


def _count_rule(owner: str, fraction: float | None, count: int | None) -> Callable[[str, jax.Array], int]:
    """How many elements of an array are sent."""
    if (fraction is None) == (count is None):
        raise ValueError(f"{owner}: give a fraction or count=, one of them; got {fraction!r} and {count!r}.")
    if fraction is not None and not (is_number(fraction) and 0 < fraction <= 1):
        raise ValueError(f"{owner}: fraction must be a number in (0, 1], got {fraction!r}.")
    if count is not None and (not is_integer(count) or count < 1):
        raise ValueError(f"{owner}: count must be a positive integer, got {count!r}.")

    def number(path: str, x: jax.Array) -> int:
        size = math.prod(x.shape)
        if count is None:
            return max(1, share_of(float(fraction or 1), size))
        if count > size:
            raise ValueError(
                f"{owner}: {path!r} of shape {tuple(x.shape)} has {size} elements, fewer than count={count}; give a"
                " fraction, or a smaller count by a rule."
            )
        return int(count)

    return number


def _check_rank(path: str, shape: tuple[int, ...], rank: int) -> None:
    if len(shape) < 2:
        raise ValueError(f"powersgd: {path!r} of shape {shape} is no matrix; leave it out by where=.")
    most = min(math.prod(shape[:-1]), shape[-1])
    if rank > most:
        raise ValueError(
            f"powersgd: {path!r} of shape {shape} has at most rank {most}, got rank {rank}; leave it out by where=, or"
            " give it a smaller rank by a rule."
        )


def _padded(size: int, block: int | None) -> int:
    length = rotation_block(size, block)
    return -(-size // length) * length
