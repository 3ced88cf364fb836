"""Why no more is done at a site, and the mend."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Why(NamedTuple):
    """Why no more was done, and what to do about it; an empty mend where nothing was asked for, or nothing can be."""

    reason: str
    mend: str = ""


class Record(Protocol):
    """Learns what was done at a site."""

    def __call__(self, path: str, done: str, why: Why | None, form: str = "") -> None:
        """What was done at a site ("integer", "float8", "fake", "lookup", …), why no more, and by which form."""


TO_INT = "quantize it with Int(bits), or give the site the rule None"
LEAVE = "give the site the rule None"
KEPT_AXES = (
    "put the weight's scales on axes that the product keeps: per=Channels(axes), or roles=jaxcomp.roles(fn)(params,"
    " *args), of quantize"
)
FEWER_BITS = "take fewer bits for the weight or for the activations"

UNMATCHED = Why("no rule matches it")
LEFT = Why("the rule leaves it")
COMPUTED = Why("the weight is computed, not a leaf", "compute it before, so that it is a leaf, or " + LEAVE)
MULTIPLIED_OUT = Why("its codes were multiplied out on the way, by an operation that they cannot follow", LEAVE)
UNQUANTIZED = Why("the weight is not quantized", "quantize it")
MIXED_KINDS = Why("one operand is integers, the other float8", "ask for Act(8) beside integer weights, or " + LEAVE)
LARGE_SUM = Why("the sum may leave int32", FEWER_BITS)
CUT_WINDOW = Why("a scale varies along what the convolution sums over", KEPT_AXES)
GROUPED_BATCH = Why("the convolution groups its batch", LEAVE)
SHIFTED_KERNEL = Why("a convolution's weight needs a symmetric grid", "quantize it with Int(bits), whose zero is 0")
RAGGED = Why("integers are for ragged dots of rows, each by one group's matrix", LEAVE)
WIDENED = Why("on CPU, float8 is widened before it is multiplied")
OF_FACTORS = "merge the factors with materialize and quantize the result, or " + LEAVE
IN_FLOAT = Why("its factors run in float", OF_FACTORS)


AS_VALUES = "in float its values are multiplied, at the highest precision"
"""Why a product is slow in fake mode on a backend that rounds what it multiplies: no such rounding may change it."""

ALONG_SUM = Why(f"a scale varies along what the product sums over: {AS_VALUES}", KEPT_AXES)
GROUPED_BATCH_VALUES = Why(f"{GROUPED_BATCH.reason}: {AS_VALUES}", LEAVE)
RAGGED_VALUES = Why(f"a ragged dot that is none of rows, each by one group's matrix: {AS_VALUES}", LEAVE)
LONG_SUM = Why("its sums may leave 2^24, beyond which float32 rounds them", FEWER_BITS)


def barred(primitive: str) -> Why:
    """A site inside of an equation that nothing rewrites."""
    return Why(f"it is inside a {primitive}, where nothing is rewritten", LEAVE)


def short_blocks(length: int, count: int, least: int) -> Why:
    """Scales along a summed axis that serve too few elements, or do not fit those of the other operand."""
    return Why(
        f"the contracted axis of {length} has {count} scales; blocks need {least} elements",
        f"{KEPT_AXES}; or groups of {least} elements or more, alike in both operands",
    )
