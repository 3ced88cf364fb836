"""The abstraction: transforms of parameters, how they compose, what they make of a leaf, and rules of paths."""

from jaxcomp.core.gates import Due, every, gate, never, once, when
from jaxcomp.core.layouts import Buckets, Channels, Groups, Layout, Tensor, Tiles, Tokens
from jaxcomp.core.leaves import CompressedLeaf, dense, is_compressed, materialize, nbytes, pack, zeros_counted
from jaxcomp.core.optimizers import MaskState, WrapState, dense_value_and_grad, reset_regrown, wrap_optax
from jaxcomp.core.packed import Packed, compressed_leaf
from jaxcomp.core.paths import Where, everything, leaves_with_paths, matrices, path_str
from jaxcomp.core.records import named, recorded
from jaxcomp.core.roles import AxisRoles, Roles
from jaxcomp.core.shardings import out_shardings
from jaxcomp.core.slots import Slot, replace_slots, slots, weight_mask
from jaxcomp.core.specs import Global, Local, Spec
from jaxcomp.core.transform import Transform, by_path, chain, identity, stateless
from jaxcomp.core.types import Params, State
from jaxcomp.core.wrappers import Masked, Switch

__all__ = [
    "AxisRoles",
    "Buckets",
    "Channels",
    "CompressedLeaf",
    "Due",
    "Global",
    "Groups",
    "Layout",
    "Local",
    "MaskState",
    "Masked",
    "Packed",
    "Params",
    "Roles",
    "Slot",
    "Spec",
    "State",
    "Switch",
    "Tensor",
    "Tiles",
    "Tokens",
    "Transform",
    "Where",
    "WrapState",
    "by_path",
    "chain",
    "compressed_leaf",
    "dense",
    "dense_value_and_grad",
    "every",
    "everything",
    "gate",
    "identity",
    "is_compressed",
    "leaves_with_paths",
    "materialize",
    "matrices",
    "named",
    "nbytes",
    "never",
    "once",
    "out_shardings",
    "pack",
    "path_str",
    "recorded",
    "replace_slots",
    "reset_regrown",
    "slots",
    "stateless",
    "weight_mask",
    "when",
    "wrap_optax",
    "zeros_counted",
]
