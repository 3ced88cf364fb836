"""Cases built one by one and measured side by side; what fails is a row that says why, and the rest goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from tests.benchmarks.timing import Report, Row, Timings, measure

Call = Callable[[], Any]
WRONG = 0.5
"""What is further off than that is no result of this product: the coarsest grid here is off by a quarter."""
BASE, CONTROL = "bf16", "bf16 again (control)"


@dataclass(frozen=True)
class Setting:
    """How large the sections are, and until when they may begin a case.

    Fields:
      toy: sizes that a CPU runs in seconds; nothing is aimed at then.
      end: on the clock of ``time.monotonic``.
    """

    toy: bool
    end: float

    @classmethod
    def lasting(cls, seconds: float, *, toy: bool) -> Setting:
        """From now on."""
        return cls(toy, time.monotonic() + seconds)

    def pick(self, full: Any, toy: Any) -> Any:
        """One of two sizes."""
        return toy if self.toy else full

    def check_time(self) -> None:
        """Raises TimeoutError when the time is over."""
        if time.monotonic() > self.end:
            raise TimeoutError("not begun: the time of the whole benchmark was over; name its section to run it alone")


class Compiled:
    """A compiled program and its arguments: a case whose memory can be read."""

    def __init__(self, fn: Callable[..., Any], *args: Any, **options: Any) -> None:
        self.program = jax.jit(fn, **options).lower(*args).compile()
        self.args = args

    def __call__(self) -> Any:
        return self.program(*self.args)

    def temporaries(self) -> int:
        """Bytes beside arguments and results."""
        return int(self.program.memory_analysis().temp_size_in_bytes)

    def bytes_accessed(self) -> float:
        """By XLA's cost analysis."""
        return float(self.program.cost_analysis()["bytes accessed"])


@dataclass
class Guarded:
    """A call that keeps its first error in the place of raising it."""

    call: Call
    error: str = ""

    def __call__(self) -> Any:
        if self.error:
            return None
        try:
            return self.call()
        except Exception as error:
            self.error = said(error)
            return None


def in_ms(seconds: float) -> str:
    """Seconds as words."""
    return f"{seconds * 1e3:.3f} ms"


def said(error: Exception) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


@dataclass(frozen=True)
class Ran:
    """Cases that were measured.

    Fields:
      timings: of those that ran at least once.
      errors: of those that did not run to the end.
      cases: what each is, as it was made.
    """

    setting: Setting
    timings: Timings
    errors: dict[str, str]
    cases: dict[str, Call] = field(default_factory=dict)

    def speed(
        self,
        case: str,
        base: str = BASE,
        *,
        target: str = "",
        detail: Callable[[float], str] = in_ms,
        compared: bool = False,
    ) -> Row:
        """Speed over the base's.

        Args:
          case, base: names.
          target: what is aimed at, at full size.
          detail: makes words of the seconds.
          compared: whether to say how far the result is from the base's, and to fail where it is another.
        """
        off = self._off(case, base) if compared else 0.0
        if off > WRONG:
            return Row.failed(case, f"wrong: {off:.1%} off the result of {base}", self.setting.pick(target, ""))
        words = (lambda s: f"{detail(s)}, {off:.1%} off") if compared else detail
        return self._row(case, base, Timings.speed_row, target, words)

    def time(self, case: str, base: str = BASE, *, target: str = "", detail: Callable[[float], str] = in_ms) -> Row:
        """Time over the base's."""
        return self._row(case, base, Timings.row, target, detail)

    def _off(self, case: str, base: str) -> float:
        """How far a result is from the base's, over the base's norm; 0 where one of them is missing."""
        if not {case, base} <= self.cases.keys():
            return 0.0
        got, wanted = (np.asarray(self.cases[name]()).astype(np.float64) for name in (case, base))
        off = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
        return math.inf if math.isnan(off) else off

    def milliseconds(self, case: str, *, target: str = "") -> Row:
        """A case by itself."""
        target = self.setting.pick(target, "")
        if case in self.errors:
            return Row.failed(case, self.errors[case], target)
        ms = sorted(1e3 * self.timings.seconds[case])
        return Row(case, 1e3 * self.timings.median(case), ms[0], ms[-1], "milliseconds", target)

    def counted(self, case: str, what: str, count: Callable[[Any], float], *, target: str = "", unit: str = "") -> Row:
        """A number that the case's program tells, ``count(case)``."""
        name, target = f"  {what}, {case}", self.setting.pick(target, "")
        if case not in self.cases:
            return Row.failed(name, self.errors.get(case, "not measured"), target)
        try:
            value = float(count(self.cases[case]))
        except Exception as error:
            return Row.failed(name, said(error), target)
        return Row(name, value, value, value, unit, target)

    def _row(self, case: str, base: str, make: Callable[..., Row], target: str, detail: Callable[[float], str]) -> Row:
        target = self.setting.pick(target, "")
        for name in (base, case):
            if name in self.errors:
                why = self.errors[name] if name == case else f"no {base}: {self.errors[name]}"
                return Row.failed(case, why, target)
        words = detail(self.timings.median(case))
        return make(self.timings, case, base, factor=1.0, detail=words, target=target)

    def report(self, title: str, rows: list[Row], base: str = BASE, *, unit: str = "speed") -> Report:
        """The rows under a title."""
        notes = list(self.timings.notes()) if self.timings.seconds else ["no case ran"]
        known = base in self.timings.seconds and base not in self.errors
        took = f" ({self.timings.median(base) * 1e3:.3f} ms)" if known else ""
        return Report(f"{title}: {unit}", f"{base}{took}", rows, notes)


def run_cases(makers: Mapping[str, Callable[[], Call]], setting: Setting, *, inner: int = 5, rounds: int = 7) -> Ran:
    """Builds each case, runs it once, and measures those that ran in interleaved rounds.

    Args:
      makers: name -> what builds the case's call.
      setting: cases that would begin after its end are not built.
      inner: calls a timing, queued.
      rounds: timings of each case.
    """
    guarded: dict[str, Guarded] = {}
    errors: dict[str, str] = {}
    for name, make in makers.items():
        try:
            setting.check_time()
            call = make()
            jax.block_until_ready(call())
            guarded[name] = Guarded(call)
        except Exception as error:
            errors[name] = said(error)
    inner, rounds = setting.pick((inner, rounds), (1, 2))
    timings = Timings({}, 0, None)
    if guarded:
        timings = measure({**guarded}, rounds=rounds, inner=inner, queued=True)
    errors |= {name: case.error for name, case in guarded.items() if case.error}
    cases = {name: case.call for name, case in guarded.items() if not case.error}
    return Ran(setting, timings, errors, cases)
