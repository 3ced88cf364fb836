"""Names of types that signatures share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

PyTree = Any
"""Any pytree; Python has no type for nested containers of registered kinds."""
Params = PyTree
"""A tree of parameters: arrays, some of them perhaps compressed leaves."""
State = PyTree
"""What a transform remembers between steps; its own business."""
Stats = Mapping[str, PyTree]
"""Statistics by name (``grads=``), each a tree like the parameters."""
Leaf = Any
"""One leaf of a tree: an array, a shape of one, a compressed leaf, or what else a tree may hold."""
Step = int | jax.Array
"""A step of training: an integer scalar, in jit a traced one."""
Key = jax.Array
"""A random key, typed or raw."""
Shape = tuple[int, ...]
Axes = tuple[int, ...]
Json = Any
"""What JSON holds: nested lists and dicts of strings, numbers, booleans and None."""
DType = Any
"""Whatever ``jnp.dtype`` takes; numpy's own alias is not one that mypy follows through ml_dtypes."""
