"""Pure losses between what a student computes and what a teacher does, which no gradient reaches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomp.core.placement import on_any_mesh


@on_any_mesh
def soft_targets(student_logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """``T² KL(softmax(teacher / T) || softmax(student / T))``, averaged over examples.

    The factor keeps the gradient's size as T grows.

    Args:
      student_logits: ``(..., classes)``.
      teacher_logits: of the same shape.
      temperature: T, positive.

    Raises:
      ValueError: shapes that differ, or a temperature that is not positive.

    >>> z = jnp.array([[1.0, 2.0, 0.5]])
    >>> float(soft_targets(z, z, 4.0))
    0.0

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    _same_shape("soft_targets", student_logits, teacher_logits)
    if not temperature > 0:
        raise ValueError(f"soft_targets: temperature must be positive, got {temperature!r}.")
    _some("soft_targets", student_logits)
    student = jax.nn.log_softmax(_wide(student_logits) * (1.0 / temperature))
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(_wide(teacher_logits)) * (1.0 / temperature))
    return temperature**2 * jnp.mean(optax.losses.kl_divergence_with_log_targets(student, teacher))


@on_any_mesh
def hint(student: jax.Array, teacher: jax.Array, projection: jax.Array | None = None) -> jax.Array:
    """The mean squared difference of features, the student's projected first where widths differ.

    Args:
      student: features ``(..., width)``.
      teacher: features; of the student's shape, or of the projected one.
      projection: None, or a trained matrix ``(student width, teacher width)``.

    Raises:
      ValueError: shapes that differ.

    >>> float(hint(jnp.ones((2, 3)), jnp.zeros((2, 3))))
    1.0

    Source: Romero et al. 2014, arXiv:1412.6550, equation 3 (a 1x1 projection in place of a convolution).
    """
    _some("hint", student)
    wide = None if projection is None else jnp.promote_types(_wide(student).dtype, _wide(projection).dtype)
    projected = student if projection is None else jnp.matmul(student, projection, preferred_element_type=wide)
    _same_shape("hint", projected, teacher)
    return jnp.mean(optax.losses.squared_error(_wide(projected), jax.lax.stop_gradient(_wide(teacher))))


@on_any_mesh
def attention_transfer(student: jax.Array, teacher: jax.Array, power: int = 2) -> jax.Array:
    """The squared distance of normalized maps ``mean over channels of |feature|**power``, averaged over examples.

    Args:
      student: features ``(batch, *space, channels)``.
      teacher: features of the same batch and space; the number of channels may differ.
      power: the exponent.

    Raises:
      ValueError: batch or space that differ.

    >>> x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    >>> float(attention_transfer(x, 5 * x).round(6))
    0.0

    Source: Zagoruyko and Komodakis 2016, arXiv:1612.03928, equation 2.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"attention_transfer: the student's features are {student.shape} and the teacher's {teacher.shape}; all but"
            " the last dimension must be equal."
        )
    _some("attention_transfer", student)
    maps = [_attention(student, power), _attention(jax.lax.stop_gradient(teacher), power)]
    return jnp.mean(jnp.sum(optax.losses.squared_error(*maps), axis=-1))


@on_any_mesh
def similarity(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The mean squared difference of the normalized similarity of each pair of examples in a batch.

    Args:
      student: features ``(batch, ...)``.
      teacher: features of the same batch; other dimensions are free.

    Raises:
      ValueError: batches that differ.

    >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> float(similarity(x, x))
    0.0

    Source: Tung and Mori 2019, arXiv:1907.09682, equation 4.
    """
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"similarity: the batches are {student.shape[0]} and {teacher.shape[0]}, and must be equal.")
    _some("similarity", student)
    ours, theirs = _gram(student), _gram(jax.lax.stop_gradient(teacher))
    return jnp.mean(optax.losses.squared_error(ours, theirs))


@on_any_mesh
def attention_maps(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """``KL(teacher || student)`` of distributions over the last axis, averaged over heads, queries and examples.

    Args:
      student: probabilities that add up to 1 along the last axis, as attention's after the softmax.
      teacher: of the same shape.

    Raises:
      ValueError: shapes that differ.

    >>> p = jnp.array([[[0.5, 0.5], [1.0, 0.0]]])
    >>> float(attention_maps(p, p))
    0.0

    Source: Wang et al. 2020, arXiv:2002.10957, equation 4.
    """
    _same_shape("attention_maps", student, teacher)
    _some("attention_maps", student)
    ours, theirs = _wide(student), jax.lax.stop_gradient(_wide(teacher))
    least = jnp.finfo(ours.dtype).tiny  # where the student gives nothing its logarithm would be infinite
    ratio = jnp.log(jnp.maximum(theirs, least)) - jnp.log(jnp.maximum(ours, least))
    return jnp.mean(jnp.sum(theirs * ratio, axis=-1))


@on_any_mesh
def distances(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The Huber loss between the distances of each pair of examples, in units of their mean over the batch.

    Args:
      student: features ``(batch, ...)`` of two examples or more.
      teacher: features of the same batch; other dimensions are free.

    Raises:
      ValueError: batches that differ, or of one example.

    >>> x = jnp.array([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    >>> float(distances(x, 2 * x))
    0.0

    Source: Park et al. 2019, arXiv:1904.05068, equations 4 to 7. Deviation: the mean over pairs for the sum.
    """
    ours, theirs = _related("distances", 2, student, teacher)
    apart = jnp.asarray(1 - np.eye(len(ours)), ours.dtype)
    count = jnp.sum(apart)

    def scaled(g: jax.Array) -> jax.Array:
        d = _distances(g) * apart
        mean = jnp.sum(d) / count
        return d / jnp.where(mean > 0, mean, jnp.ones_like(mean))

    return jnp.sum(optax.losses.huber_loss(scaled(ours), scaled(theirs)) * apart) / count


@on_any_mesh
def angles(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The Huber loss between the cosines of the angles that each three examples form.

    Args:
      student: features ``(batch, ...)`` of three examples or more; memory grows with the batch's cube.
      teacher: features of the same batch; other dimensions are free.

    Raises:
      ValueError: batches that differ, or of fewer than three examples.

    >>> x = jnp.array([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    >>> round(float(angles(x, 2 * x + 1.0)), 6)
    0.0

    Source: Park et al. 2019, arXiv:1904.05068, equations 8 and 9. Deviation: the mean over triplets for the sum.
    """
    ours, theirs = _related("angles", 3, student, teacher)
    n = len(ours)
    same = np.eye(n, dtype=bool)
    # Angles at j, between i and k.
    apart = jnp.asarray(~(same[:, None, :] | same[:, :, None] | same[None, :, :]), ours.dtype)
    return jnp.sum(optax.losses.huber_loss(_cosines(ours), _cosines(theirs)) * apart) / jnp.sum(apart)


def _related(owner: str, least: int, student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The products of each pair of examples, from the batch's mean: distances and angles follow from them alone."""
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"{owner}: the batches are {student.shape[0]} and {teacher.shape[0]}, and must be equal.")
    _some(owner, student)
    if student.shape[0] < least:
        raise ValueError(f"{owner}: wants {least} examples or more, got a batch of {student.shape[0]}.")
    return _products(student), _products(jax.lax.stop_gradient(teacher))


def _products(x: jax.Array) -> jax.Array:
    flat = _wide(x).reshape(x.shape[0], -1)
    flat = flat - jnp.mean(flat, axis=0, keepdims=True)
    return jnp.matmul(flat, flat.T, precision=jax.lax.Precision.HIGHEST)


def _distances(g: jax.Array) -> jax.Array:
    """Distances from products; of two equal examples 0, with no gradient."""
    own = jnp.diagonal(g)
    square = own[:, None] + own[None, :] - 2 * g
    some = square > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, square, jnp.ones_like(square))), jnp.zeros_like(square))


def _cosines(g: jax.Array) -> jax.Array:
    """``[j, i, k]``: the cosine of the angle at j between i and k; 0 where two of them are equal."""
    own, d = jnp.diagonal(g), _distances(g)
    dot = g[None, :, :] - g[:, :, None] - g[:, None, :] + own[:, None, None]
    size = d[:, :, None] * d[:, None, :]
    some = size > 0
    return jnp.where(some, dot / jnp.where(some, size, jnp.ones_like(size)), jnp.zeros_like(dot))


def _wide(x: jax.Array) -> jax.Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _unit(x: jax.Array) -> jax.Array:
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square > 0, square, jnp.ones_like(square)))


def _attention(x: jax.Array, power: int) -> jax.Array:
    return _unit(jnp.mean(jnp.abs(_wide(x)) ** power, axis=-1).reshape(x.shape[0], -1))


def _gram(x: jax.Array) -> jax.Array:
    flat = _wide(x).reshape(x.shape[0], -1)
    return _unit(flat @ flat.T)


def _some(owner: str, x: jax.Array) -> None:
    """Of no example there is no mean: it would be NaN."""
    if 0 in x.shape:
        raise ValueError(f"{owner}: there is no example in shape {x.shape}; leave the empty batch out.")


def _same_shape(owner: str, student: jax.Array, teacher: jax.Array) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"{owner}: the student's shape is {student.shape} and the teacher's {teacher.shape}.")
