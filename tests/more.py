"""Further cases of a kind, which the quick suite leaves to ``pytest -m more``: read from a list, and how it is made.

Of the cases of one test the first run in the quick suite, until they have taken ``SECONDS``, and one at least where it
takes no more than ``LONGEST``; the others are listed in ``more.txt``. The list is made from a run of all of them, on a
machine that does nothing else:

    pytest -n 2 -m "not slow and not gpu and not notebooks" --junitxml=times.xml
    python -m tests.more times.xml

or from one of the quick suite and one of ``-m more``, given both.
"""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

LIST = Path(__file__).with_name("more.txt")
SECONDS, LONGEST = 0.4, 2.5
LONG_FIXTURES = frozenset({"finished"})
"""What takes long to set up; whatever stands on it is left out too."""
EVERY = "not slow and not gpu and not notebooks"


def listed() -> frozenset[str]:
    """The cases of the list, as pytest names them."""
    return frozenset(LIST.read_text().splitlines()) if LIST.exists() else frozenset()


def further(cases: Iterable[str], seconds: Mapping[str, float]) -> list[str]:
    """The cases, in their order, that come after the first ones of their test, and single ones that take long.

    >>> further(["f[a]", "f[b]", "f[c]", "g"], {"f[a]": 2.0, "f[b]": 0.1, "f[c]": 0.1, "g": 9.0})
    ['f[b]', 'f[c]', 'g']
    """
    taken: dict[str, float] = defaultdict(float)
    later = []
    for case in cases:
        test, time = re.sub(r"\[.*", "", case), seconds.get(case, 0.0)
        if time > LONGEST or (test in taken and taken[test] + time > SECONDS):
            later.append(case)
        else:
            taken[test] += time
    return later


def timed(report: Path) -> dict[str, float]:
    """Seconds of each test of a JUnit report, by pytest's names; examples of docstrings are left out."""
    cases = ElementTree.parse(report).iter("testcase")
    named = ((c.get("classname", ""), c.get("name", ""), float(c.get("time", 0))) for c in cases)
    return {f"{place.replace('.', '/')}.py::{name}": t for place, name, t in named if place.startswith("tests.")}


def collected() -> list[str]:
    """The tests that there are, in their order."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", EVERY, "tests"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if line.startswith("tests/") and "::" in line]


if __name__ == "__main__":
    seconds = {case: time for report in sys.argv[1:] for case, time in timed(Path(report)).items()}
    found = further(collected(), seconds)
    LIST.write_text("".join(f"{case}\n" for case in found))
    print(f"{len(found)} cases are left to -m more")
