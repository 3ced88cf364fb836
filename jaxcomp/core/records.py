"""What made a value: a constructor's name and its arguments, for a repr, for a run's config and for a pickle.

One idea: a public constructor is :func:`recorded`, and what it makes remembers the call. A frozen spec needs no record,
for its class and its fields say it; a value that stands for itself, as a score does, is :func:`named`. So
``chain(prune(0.5), quantize(Int(4)))`` is known as these words, as nested lists and dicts, and as a call to make again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.specs import Spec, is_number
from jaxcomp.core.types import Key

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

MAKERS: dict[str, Callable[..., object]] = {}
"""The recorded constructors, by name."""
CONSTANTS: dict[str, object] = {}
"""The named values, by name."""
TAGS = frozenset({"array", "dict", "dtype", "float", "key", "named"})
"""What plain data calls a value that no constructor made (see :mod:`jaxcomp.core.plain`)."""


@dataclass(frozen=True)
class Made:
    """What a value remembers.

    Fields:
      name: of the constructor, or of the value itself.
      arguments: by the constructor's parameters, those alone that were given; None for a named value.
      of: the value's ``id``, for ``functools.wraps`` copies this to a function that is another.
    """

    name: str
    arguments: Mapping[str, object] | None
    of: int


def recorded(make: Callable[P, R]) -> Callable[P, R]:
    """Decorates a constructor, of a transform, a schedule or a score: what it makes remembers name and arguments.

    So its repr says what it is made of, it can be written as plain data and pickled. One of your own is found by its
    name, in whatever module it is, once that is imported.

    Args:
      make: a function whose result takes attributes: a Transform, a function, a dataclass.

    Raises:
      ValueError: another constructor has the name.

    >>> import optax
    >>> from jaxcomp import prune
    >>> linear = recorded(optax.linear_schedule)
    >>> prune(linear(0.0, 0.8, transition_steps=100))
    prune(linear_schedule(0.0, 0.8, 100))
    """
    return recorded_as(make.__name__)(make)


def recorded_as(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """:func:`recorded` by another name; one with a dot says the room that is imported to find it: "recipes.mx"."""

    def decorate(make: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(make)

        @wraps(make)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            made = make(*args, **kwargs)
            if not any(made is given for given in (*args, *kwargs.values())):  # handed through, it keeps its own record
                remember(made, name, signature.bind(*args, **kwargs).arguments)
            return made

        _register(MAKERS, name, run)
        return run

    return decorate


def named(name: str, value: T) -> T:
    """The value, known by a name of its own: a score, a rule, a function of the step that takes no arguments.

    Args:
      name: by which plain data and reprs call it.
      value: which remembers the name.

    >>> def warm(step):
    ...     return step < 100
    >>> named("warm", warm) is warm
    True
    """
    _register(CONSTANTS, name, value)
    remember(value, name, None)
    return value


def remember(value: object, name: str, arguments: Mapping[str, object] | None) -> None:
    """Makes a record part of a value; frozen dataclasses take it too."""
    object.__setattr__(value, "_made", Made(name, arguments, id(value)))


def made_of(value: object) -> Made | None:
    """The record of a value, if it has one of its own."""
    made = getattr(value, "_made", None)
    return made if isinstance(made, Made) and made.of == id(value) else None


class Parts(NamedTuple):
    """A value as the call that makes it."""

    name: str
    maker: Callable[..., object]
    arguments: Mapping[str, object]

    @property
    def bound(self) -> inspect.BoundArguments:
        """The arguments in the order of the maker's parameters."""
        return bound(self.maker, self.arguments)


def bound(maker: Callable[..., object], arguments: Mapping[str, object]) -> inspect.BoundArguments:
    """Arguments by parameter, to be called with ``*bound.args, **bound.kwargs``.

    Raises:
      TypeError: a parameter that the maker has not, or one that it wants and is not there.
    """
    signature = inspect.signature(maker)
    unknown = [name for name in arguments if name not in signature.parameters]
    if unknown:
        raise TypeError(f"has no parameter {unknown[0]!r}, only {', '.join(signature.parameters)}")
    found = inspect.BoundArguments(signature, {n: arguments[n] for n in signature.parameters if n in arguments})
    signature.bind(*found.args, **found.kwargs)
    return found


def parts_of(value: object) -> Parts | None:
    """The call that makes a value: its record, or the class and the changed fields of a frozen spec; else None.

    >>> from jaxcomp import Int
    >>> parts_of(Int(4)).arguments
    {'bits': 4}
    """
    made = made_of(value)
    if made is not None and made.arguments is not None:
        return Parts(made.name, MAKERS[made.name], made.arguments)
    if isinstance(value, Spec) and is_dataclass(value) and made is None:
        own = [f for f in fields(value) if f.init]
        kept = {f.name: getattr(value, f.name) for f in own if _said(f, value, f is own[0])}
        return Parts(type(value).__name__, type(value), kept)
    return None


def _said(field: Field[object], value: object, first: bool) -> bool:
    """Whether a field is not as by default; the first is said too where it is a number, as ``Int(8)`` says it."""
    x = getattr(value, field.name)
    return field.default is MISSING or bool(x != field.default) or (first and is_number(x))


def text_of(value: object) -> str:
    """A value as one would write it: constructors and specs as calls, of arrays the type and shape alone.

    >>> from jaxcomp import Int, quantize
    >>> text_of(quantize(Int(4, narrow=True))), text_of({"a": (jnp.ones(2), 1)})
    ('quantize(Int(4, narrow=True))', "{'a': (float32[2], 1)}")
    """
    made, parts = made_of(value), parts_of(value)
    if made is not None and made.arguments is None:
        return made.name
    if parts is not None:
        return f"{parts.name}({', '.join(_arguments(parts))})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{text_of(k)}: {text_of(v)}" for k, v in value.items()) + "}"
    if type(value) is tuple or type(value) is list:
        inner = ", ".join(map(text_of, value))
        return f"[{inner}]" if type(value) is list else f"({inner},)" if len(value) == 1 else f"({inner})"
    if is_key(value):
        return "key" if isinstance(value, jax.core.Tracer) else f"key({jax.random.key_data(value).tolist()})"
    if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return f"{value.dtype}{list(value.shape)}"
    if callable(value) or hasattr(value, "__qualname__"):
        return getattr(value, "__qualname__", type(value).__name__)
    return repr(value)


def _arguments(parts: Parts) -> list[str]:
    """The first argument, and what has no default, by place; all others by name."""
    call = parts.bound
    by_place: list[str] = []
    by_name: list[str] = []
    for i, (name, value) in enumerate(call.arguments.items()):
        parameter = call.signature.parameters[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            by_place += map(text_of, value)
        elif parameter.kind is parameter.VAR_KEYWORD:
            by_name += [f"{k}={text_of(v)}" for k, v in value.items()]
        elif not by_name and parameter.kind is not parameter.KEYWORD_ONLY and _leads(i, name, call):
            by_place.append(text_of(value))
        else:
            by_name.append(f"{name}={text_of(value)}")
    return by_place + by_name


def _leads(place: int, name: str, call: inspect.BoundArguments) -> bool:
    parameters = call.signature.parameters
    needed = parameters[name].default is inspect.Parameter.empty
    return list(parameters)[place] == name and (needed or (place == 0 and not isinstance(call.arguments[name], bool)))


def is_key(value: object) -> TypeGuard[Key]:
    """Whether it is a typed random key."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


class Again(NamedTuple):
    """A call that pickles: the maker, and arguments of which those that were made are such calls in turn."""

    maker: Callable[..., object]
    arguments: tuple[tuple[str, object], ...]


def portable(value: object) -> object:
    """A value with what was made in it as calls, for closures do not pickle and the calls do."""
    made, parts = made_of(value), parts_of(value)
    if made is not None and made.arguments is None:
        return Again(constant, (("name", made.name),))
    if parts is not None:
        return Again(parts.maker, tuple((name, portable(x)) for name, x in parts.arguments.items()))
    return _through(portable, value)


def again(value: object) -> object:
    """The inverse of :func:`portable`."""
    if isinstance(value, Again):
        call = bound(value.maker, {name: again(x) for name, x in value.arguments})
        return value.maker(*call.args, **call.kwargs)
    return _through(again, value)


def constant(name: str) -> object:
    """The value of this name.

    Raises:
      ValueError: there is none here.
    """
    if name not in CONSTANTS:
        raise ValueError(f"nothing is named {name!r} here; import the module that names it.")
    return CONSTANTS[name]


def _through(f: Callable[[object], object], value: object) -> object:
    """``f`` of what plain containers hold."""
    if type(value) is dict:
        return {f(k): f(v) for k, v in value.items()}
    if type(value) is tuple or type(value) is list:
        return type(value)(map(f, value))
    return value


def _register(table: dict[str, object] | dict[str, Callable[..., object]], name: str, value: object) -> None:
    old = table.get(name)
    place = [(getattr(x, "__module__", None), getattr(x, "__qualname__", None)) for x in (old, value)]
    if name in TAGS or (old is not None and place[0] != place[1]):
        raise ValueError(f"recorded: {name!r} is taken, by {place[0][0] or 'plain data'}; give it another name.")
    table[name] = value  # type: ignore[assignment] # of one definition that ran twice, as in a notebook, the last
