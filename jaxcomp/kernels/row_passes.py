"""Functions of rows as passes over a row that lies in memory: each goes up to the next sum or extreme of it."""

from __future__ import annotations

from collections.abc import Sequence

from jaxcomp.trace.pointwise import TRUTH, Pointwise
from jaxcomp.trace.rowwise import REDUCTIONS

CODES = "codes"
"""The last step of a function that gives int8 codes: of a number, its row's zero point, the two factors of its scale,
the ends of codes and what they are kept less."""


class Passes:
    """How a function of rows goes over a row, number by number.

    Values are named by their steps: 0 is the row's number, ``i`` what step ``i - 1`` gives.

    Args:
      function: it; its last step varies along the row.
      varying: for each value whether it does.
      given: whether the row may only be read, so that nothing else may lie in its slot, nor in the result's.
      numbers: values of the whole row that are wanted, too.

    Attributes:
      slots: how many rows of numbers are kept at once.
      result: which of them is the function's at last; slot 0 is the row at first.
      rows, sums, divisors: of each pass the numbers of the whole row that it reads, the reductions that it ends with,
        and the numbers of the row that others are divided by.

    >>> from jaxcomp.trace.pointwise import Step
    >>> softmax = (Step("reduce_max", (0,)), Step("sub", (0, 1)), Step("exp", (2,)), Step("reduce_sum", (3,)),
    ...            Step("div", (3, 4)))
    >>> passes = Passes(softmax, [True, False, True, True, False, True])
    >>> passes.count, passes.slots, [passes.kept(at) for at in range(3)]
    (3, 1, [[], [3], [5]])
    """

    def __init__(
        self, function: Pointwise, varying: Sequence[bool], *, given: bool = False, numbers: Sequence[int] = ()
    ) -> None:
        self.function, self.varying, self.numbers = function, varying, numbers
        self._level = [0]
        for step in function:
            before = max((self._level[i] for i in step.operands), default=0)
            self._level.append(before + 1 if step.name in REDUCTIONS else before)
        self.count = self._level[-1] + 1
        self._last = {len(function): self.count}  # of what is kept the last pass that reads it
        self.rows, self.sums, self.divisors = ([set[int]() for _ in range(self.count)] for _ in range(3))
        for at in reversed(range(self.count)):
            seen: set[int] = set()
            wanted = numbers if at == self.count - 1 else ()
            for i in (*wanted, *self.kept(at), *(self._summed(i) for i in self.sums[at])):
                self._visit(i, at, seen)
        self.slots, self._slot = self._placed(given=given)
        self.result = self._slot[len(function)]

    def kept(self, at: int) -> list[int]:
        """What a pass makes that is read later."""
        return sorted(i for i in self._last if i and self._level[i] == at)

    def slot(self, i: int, at: int) -> int | None:
        """Where a pass finds a value that an earlier one kept."""
        return self._slot[i] if self._is_earlier(i, at) else None

    def falls(self, i: int) -> bool:
        """Whether a value is what another is less than its largest number of the row."""
        step = self.function[i - 1] if i else None
        if step is None or step.name != "sub":
            return False
        value, top = step.operands
        return top > 0 and self._is_top(top, value)

    def _is_top(self, i: int, value: int) -> bool:
        step = self.function[i - 1] if i else None
        if step is not None and step.name == "max":
            return any(self._is_top(operand, value) for operand in step.operands)
        return step is not None and step.name == "reduce_max" and step.operands == (value,)

    def _summed(self, i: int) -> int:
        return self.function[i - 1].operands[0]

    def _is_earlier(self, i: int, at: int) -> bool:
        """Whether a pass finds it kept; what is read from elsewhere, or no float, is made again."""
        return i == 0 or (self._level[i] < at and self.function[i - 1].name not in TRUTH | {"operand", "constant"})

    def _visit(self, i: int, at: int, seen: set[int]) -> None:
        """Learns what a value needs in a pass."""
        if i in seen:
            return
        seen.add(i)
        if not self.varying[i]:
            self.rows[at].add(i)
            self._visit_row(i)
        elif self._is_earlier(i, at):
            self._last[i] = max(self._last.get(i, 0), at)
        else:
            step = self.function[i - 1]
            if step.name == "div" and not self.varying[step.operands[1]]:
                self.divisors[at].add(step.operands[1])
            for operand in step.operands:
                self._visit(operand, at, seen)

    def _visit_row(self, i: int) -> None:
        if self.function[i - 1].name in REDUCTIONS:
            self.sums[self._level[i] - 1].add(i)
        else:
            for operand in self.function[i - 1].operands:
                self._visit_row(operand)

    def _placed(self, *, given: bool) -> tuple[int, dict[int, int]]:
        """The slots: what a pass reads for the last time makes room for what it keeps."""
        slot, count = {0: 0}, 1
        free = [] if given or 0 in self._last else [0]
        for at in range(self.count):
            free += [slot[i] for i, last in self._last.items() if last == at and i in slot and (i or not given)]
            for i in self.kept(at):
                if not free or (given and i == len(self.function)):
                    free, count = [*free, count], count + 1
                slot[i] = free.pop()
        return count, slot
