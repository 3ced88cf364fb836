"""What constructors made, as data that JSON, YAML or TOML hold, for the config of a run; and made again from it.

A call is a dict of one entry: the constructor's name and its arguments by name, ``{"prune": {"sparsity": 0.5}}``. Lists
are tuples; all that JSON has no word for is a dict of one entry too, by one of a few tags. Reading calls recorded
constructors and makes specs, and runs nothing else.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.records import CONSTANTS, MAKERS, bound, constant, is_key, made_of, parts_of, text_of
from jaxcomp.core.specs import Spec, is_integer, known

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]
"""What JSON holds."""


def to_plain(value: object, at: str = "") -> Plain:
    """What was made by recorded constructors, as plain data; bit for bit, arrays too.

    Args:
      value: a transform, a spec, a schedule, or what else a transform takes.
      at: where it stands, for messages.

    Raises:
      TypeError: a function of one's own, or another thing that plain data has no word for; the message names where.

    >>> from jaxcomp import Int, quantize
    >>> to_plain(quantize(Int(4)))
    {'quantize': {'grid': {'Int': {'bits': 4}}}}
    """
    made, parts = made_of(value), parts_of(value)
    if made is not None and made.arguments is None:
        return {"named": made.name}
    if parts is not None:
        found = f"{at}.{parts.name}" if at else parts.name
        return {parts.name: {name: to_plain(x, f"{found}.{name}") for name, x in parts.arguments.items()}}
    if isinstance(value, Mapping):
        return {"dict": [[to_plain(k, at), to_plain(x, f"{at}[{text_of(k)}]")] for k, x in value.items()]}
    if type(value) is tuple or type(value) is list:
        return [to_plain(x, f"{at}[{i}]") for i, x in enumerate(value)]
    return _scalar(value, at)


def _scalar(value: object, at: str) -> Plain:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if is_integer(value):
        return int(value)
    if isinstance(value, float | np.floating):
        x = float(str(value))  # of a narrower type the decimal that it prints
        return x if math.isfinite(x) else {"float": repr(x)}
    if is_key(value):
        return {"key": {"impl": str(jax.random.key_impl(value)), "data": jax.random.key_data(value).tolist()}}
    if isinstance(value, np.ndarray | jax.Array):
        host, kind = np.asarray(value), "numpy" if isinstance(value, np.ndarray) else "jax"
        data = base64.b64encode(host.tobytes()).decode()
        return {"array": {"dtype": host.dtype.name, "shape": list(host.shape), "base64": data, "kind": kind}}
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    raise TypeError(
        f"to_plain: {at or 'this'} is {text_of(value)}, which plain data has no word for; make it in a function that"
        " jaxcomp.core.recorded decorates, as in recorded(optax.linear_schedule)(0.0, 0.8, 1000), or name a leaf by a"
        " regular expression instead of a predicate."
    )


def from_plain(data: object) -> object:
    """The inverse of :func:`to_plain`.

    Raises:
      ValueError: a name that is not known here, with the one that may be meant, or data that it did not write.
      TypeError: arguments that the constructor does not take, or what it raises itself.

    >>> from_plain({"prune": {"sparsity": 0.5}})
    prune(0.5)
    """
    if isinstance(data, list | tuple):
        return tuple(map(from_plain, data))
    if not isinstance(data, Mapping):
        return data
    if len(data) != 1 or not isinstance(next(iter(data)), str):
        raise ValueError(
            f"from_plain: a dict has one entry, a constructor's name and its arguments, got {_some(data)}; a table is"
            ' written as {"dict": [[key, value], ...]}.'
        )
    ((name, body),) = data.items()
    try:
        if name in _READERS:
            return _READERS[name](body)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ValueError(f"from_plain: {_some(data)} is not what to_plain writes as {name!r}: {e}") from e
    return _called(name, body)


def _called(name: str, body: object) -> object:
    maker = _maker(name)
    if not isinstance(body, Mapping):
        raise ValueError(f"from_plain: {name} wants its arguments by name, as a dict, got {_some(body)}.")
    arguments = {k: from_plain(x) for k, x in body.items()}
    try:
        call = bound(maker, arguments)
    except TypeError as e:
        raise TypeError(f"from_plain: {name} {e}.") from e
    return maker(*call.args, **call.kwargs)


def _maker(name: str) -> Callable[..., object]:
    """The constructor, or the class of specs, of this name."""
    if name not in MAKERS:
        _room_of(name)
    if name in MAKERS:
        return MAKERS[name]
    try:
        return known(Spec, name)
    except ValueError:
        near = get_close_matches(name, MAKERS, 1)
        meant = f"did you mean {near[0]!r}?" if near else "import the module that defines it."
        raise ValueError(f"from_plain: no constructor or spec is called {name!r} here; {meant}") from None


def _room_of(name: str) -> ModuleType | None:
    """Imports the room of jaxcomp that a name with a dot says."""
    room = name.partition(".")[0]
    if "." not in name or not re.fullmatch("[a-z]+", room):
        return None
    try:
        return import_module(f"jaxcomp.{room}")
    except ModuleNotFoundError:
        return None


def _named(name: str) -> object:
    if name not in CONSTANTS:
        _room_of(name)
    return constant(name)


def _array(body: Mapping[str, object]) -> np.ndarray | jax.Array:
    flat = np.frombuffer(base64.b64decode(str(body["base64"])), jnp.dtype(str(body["dtype"])))
    array = flat.reshape(body["shape"])  # type: ignore[call-overload] # a list of integers
    return array.copy() if body["kind"] == "numpy" else jnp.asarray(array)


_READERS: dict[str, Callable[..., object]] = {
    "named": _named,
    "float": float,
    "dict": lambda items: {from_plain(k): from_plain(x) for k, x in items},
    "dtype": jnp.dtype,
    "array": _array,
    "key": lambda body: jax.random.wrap_key_data(jnp.asarray(body["data"], jnp.uint32), impl=body["impl"]),
}


def _some(data: object) -> str:
    text = repr(data)
    return text if len(text) < 80 else text[:77] + "..."
