"""Compression of updates: gradients or differences of parameters on their way over a wire.

A :class:`Compressor` encodes an update as a *message*: the same tree with a compressed leaf for each array, whose
fields are the bytes that are sent. ``decode`` gives the update back, ``combine`` averages messages without decoding
them where the algebra allows, ``bits`` counts. Compressors compose: ``error_feedback(rotate(uniform(4)))``, and
:func:`by_path`.

>>> import jax, jax.numpy as jnp
>>> t = rotate(uniform(4))
>>> updates = [{"w": jax.random.normal(jax.random.key(i), (64, 64))} for i in range(3)]
>>> sent = [t.encode((), u, key=jax.random.key(i), shared=jax.random.key(9))[0] for i, u in enumerate(updates)]
>>> t.bits(sent[0]) / (64 * 64)  # bits an element, scale and seed included
4.015625
>>> mean = t.decode(t.combine(sent))
>>> bool(jnp.abs(mean["w"] - sum(u["w"] for u in updates) / 3).mean() < 0.2)
True
"""

from jaxcomp.federated.base import Compressor, bits, combine, combine_stacked, decode
from jaxcomp.federated.bridge import CompressState, compress_updates
from jaxcomp.federated.coded_messages import Rotated, Signs, Uniform, Votes
from jaxcomp.federated.composition import FeedbackState, by_path, error_feedback
from jaxcomp.federated.compressors import dense, powersgd, randomk, rotate, sign, topk, uniform
from jaxcomp.federated.messages import Drawn, Factors, Sparse
from jaxcomp.federated.wire import HEADER_BYTES, WireError, from_bytes, to_bytes

__all__ = [
    "HEADER_BYTES",
    "CompressState",
    "Compressor",
    "Drawn",
    "Factors",
    "FeedbackState",
    "Rotated",
    "Signs",
    "Sparse",
    "Uniform",
    "Votes",
    "WireError",
    "bits",
    "by_path",
    "combine",
    "combine_stacked",
    "compress_updates",
    "decode",
    "dense",
    "error_feedback",
    "from_bytes",
    "powersgd",
    "randomk",
    "rotate",
    "sign",
    "to_bytes",
    "topk",
    "uniform",
]
