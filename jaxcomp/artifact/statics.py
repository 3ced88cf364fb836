"""What is no array, as JSON: numbers, specs, types, and values of jaxcomp's own classes, each found by its name.

Reading makes objects of the classes that are known here, or derive from a leaf or a spec, and runs nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcomp.artifact.older import RETIRED
from jaxcomp.artifact.tensors import DTYPES, Tensor
from jaxcomp.core.specs import Spec, known
from jaxcomp.core.types import Json
from jaxcomp.quantization.companding import Compander
from jaxcomp.structure.analysis import Options
from jaxcomp.structure.groups import Frozen, Group, Groups, Slice, Term
from jaxcomp.structure.labelling import Unknown
from jaxcomp.structure.plans import Plan
from jaxcomp.trace.calibrate import Stats
from jaxcomp.trace.exact import Count, Sum
from jaxcomp.trace.ranges import Range

BRANCHES = {c.__name__: c for c in (Range, Stats, Count, Sum)}
"""Classes whose fields are trees."""
VALUES = {c.__name__: c for c in (Plan, Groups)}
"""Classes that stand in a tree where an array could."""
_PARTS = {**VALUES, **{c.__name__: c for c in (Frozen, Group, Slice, Term, Options, Unknown)}}
_WIDE = 1 << 63


def number(x: float | int) -> Json:
    """A number of Python: JSON's own where that says it exactly, else in words."""
    if isinstance(x, float) and not math.isfinite(x):
        return {"float": repr(x)}
    return {"int": hex(x)} if isinstance(x, int) and not -_WIDE <= x < _WIDE else x


def number_again(value: Json) -> float | int:
    """The inverse of :func:`number`, for what it says in words."""
    return int(value["int"], 16) if "int" in value else float(value["float"])


def class_name(cls: type, base: type, path: str) -> str:
    """What a file calls a class.

    Raises:
      TypeError: reading would find another class of that name, or none. The message names the path.
    """
    try:
        found = known(base, cls.__name__)
    except ValueError as e:
        raise TypeError(f"save: {path!r} {e}.") from None
    if found is not cls:
        raise TypeError(
            f"save: {path!r} is made of {cls.__module__}.{cls.__qualname__}, and reading the file would find"
            f" {found.__module__}.{found.__qualname__}, which has the same name; rename the class."
        )
    return cls.__name__


def encode_static(value: object, path: str, add: Callable[[np.ndarray], Tensor]) -> Json:
    """A field that is no tree.

    Args:
      value: JSON's own scalars, tuples, mappings, types, specs, companders, numpy arrays, parts of plans.
      path: of the field, for messages.
      add: gives a numpy array its place in the file.

    Raises:
      TypeError: it is something else.
    """
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int or type(value) is float:
        return number(value)
    if type(value) is tuple:
        return [encode_static(v, path, add) for v in value]
    if isinstance(value, np.ndarray):
        return {"array": add(value)}
    if isinstance(value, Mapping):
        return {"dict": [[k, encode_static(v, path, add)] for k, v in value.items()]}
    if isinstance(value, Compander):
        return {"compander": value.name}
    if isinstance(value, Spec) and is_dataclass(value):
        changed = [f for f in fields(value) if f.default is MISSING or getattr(value, f.name) != f.default]
        given = {f.name: encode_static(getattr(value, f.name), path, add) for f in changed}
        return {"spec": [class_name(type(value), Spec, path), given]}
    if _PARTS.get(type(value).__name__) is type(value):
        return {"record": [type(value).__name__, encode_fields(value, path, add)]}
    return {"dtype": _dtype_name(value, path)}


def encode_fields(value: Any, path: str, add: Callable[[np.ndarray], Tensor]) -> Json:
    """All fields of a dataclass."""
    return {f.name: encode_static(getattr(value, f.name), f"{path}.{f.name}", add) for f in fields(value)}


def _dtype_name(value: Any, path: str) -> str:
    try:
        return str(jnp.dtype(value))
    except TypeError:
        mend = " Files hold no code: name what it selects by a regular expression." if callable(value) else ""
        raise TypeError(
            f"save: {path!r} has a static field of {type(value).__name__}, which files do not hold.{mend}"
        ) from None


@dataclass(frozen=True)
class Statics:
    """Reads what :func:`encode_static` wrote."""

    companders: Mapping[str, Compander]
    array: Callable[[Json, str], np.ndarray]

    def read(self, value: Json, path: str) -> Any:
        """One field."""
        if isinstance(value, list):
            return tuple(self.read(v, path) for v in value)
        if not isinstance(value, dict):
            return value
        (kind,) = value
        readers: dict[str, Callable[[Json], object]] = {
            "float": lambda _: number_again(value),
            "int": lambda _: number_again(value),
            "dtype": dtype_named,
            "compander": lambda name: self._compander(name, path),
            "spec": lambda body: self._spec(body, path),
            "array": lambda number: self.array(number, path),
            "dict": lambda items: {k: self.read(v, path) for k, v in items},
            "record": lambda body: self.record(body, path),
        }
        if kind not in readers:
            raise ValueError(f"{path!r} has a static field of kind {kind!r}, which is not known here")
        return readers[kind](value[kind])

    def record(self, body: Json, path: str) -> Any:
        """A plan, or a part of one."""
        name, given = body
        if name not in _PARTS:
            raise ValueError(f"{path!r} is made of {name!r}, which is not known here")
        return _PARTS[name](**{k: self.read(v, f"{path}.{k}") for k, v in given.items()})

    def _spec(self, body: Json, path: str) -> Spec:
        name, given = body
        kept = {k: self.read(v, path) for k, v in given.items() if (name, k) not in RETIRED}
        try:
            made: Spec = known_at(Spec, name, path)(**kept)
        except TypeError as e:
            raise ValueError(f"{path!r} is made of {name}(**{kept!r}), which this jaxcomp has not: {e}") from e
        return made

    def _compander(self, name: str, path: str) -> Compander:
        if name not in self.companders:
            raise ValueError(f"{path!r} is companded by {name!r}, which is not known here; name it in companders=[...]")
        return self.companders[name]


def known_at(base: type, name: str, path: str) -> type[Any]:
    """:func:`known`, whose error names the path."""
    try:
        return known(base, name)
    except ValueError as e:
        raise ValueError(f"{path!r} {e}") from None


OTHERS = tuple(
    jnp.dtype(name)
    for name in (
        *("int2", "uint2", "int4", "uint4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
        *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "complex64", "complex128"),
    )
)
"""Types of arrays that safetensors has no name for."""
_ALL = {dtype.name: dtype for dtype in (*DTYPES.values(), *OTHERS)}


def dtype_named(name: Json) -> np.dtype:
    """The type of arrays of this name.

    Raises:
      ValueError: there is none.
    """
    if not isinstance(name, str) or name not in _ALL:
        raise ValueError(f"an array is of type {name!r}, which is not known here")
    return _ALL[name]
