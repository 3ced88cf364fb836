"""English prose that lies on any machine with this project's environment, cut into sentences; never downloaded.

``calibration``: what ships with Python and with the environment's packages: the language reference, documentation
strings, descriptions of packages. ``everyday``: WordNet's examples, where ``JAXCOMP_WORDNET`` is the folder of its data
files (version 3; Debian's package ``wordnet-base`` installs them in ``/usr/share/wordnet``). ``judged``: documentation
strings of NumPy and SciPy, which the first leaves out, so that nothing is judged on what it was calibrated on.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

WORDNET = "JAXCOMP_WORDNET"
JUDGED = ("numpy", "scipy.signal", "scipy.stats", "scipy.optimize")
_OTHERS = re.compile(r"(^|/)(numpy|scipy|numpy_like|tests?)(/|\.|$)")
"""Folders whose text is judged, imitates it, or tests something."""


def sentences(text: str) -> Iterator[str]:
    """The plain sentences of prose of 8 to 40 words."""
    for paragraph in re.split(r"\n\s*\n", text):
        if re.search(r">>>|::|^\s*[-=~+*|]{3}|\|", paragraph):
            continue
        plain = re.sub(r"[`*]|:\w+:", "", " ".join(paragraph.split()))
        for sentence in re.split(r"(?<=[.?!]) (?=[A-Z])", plain):
            letters = sum(c.isalpha() or c == " " for c in sentence)
            if 8 <= len(sentence.split()) <= 40 and sentence[-1] in ".?!" and letters > 0.9 * len(sentence):
                yield sentence


def _of(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(s for text in texts for s in sentences(text)))


@cache
def reference() -> list[str]:
    """Of Python's language reference."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return _of(topics[name] for name in sorted(topics))


@cache
def judged() -> list[str]:
    """Of the documentation strings of NumPy and SciPy."""
    modules = map(importlib.import_module, JUDGED)
    return _of(inspect.getdoc(getattr(module, name)) or "" for module in modules for name in sorted(dir(module)))


@cache
def calibration() -> list[str]:
    """The reference, then documentation strings and packages' descriptions, but nothing that is judged."""
    known = set(judged())
    found = dict.fromkeys(reference()) | dict.fromkeys(_of(_documentation()))
    return [sentence for sentence in found if sentence not in known]


@cache
def everyday() -> list[str]:
    """WordNet's examples of four words and more, as sentences; none where nobody says where it lies."""
    folder = os.environ.get(WORDNET)
    if not folder:
        return []
    files = [Path(folder) / f"data.{kind}" for kind in ("noun", "verb", "adj", "adv")]
    lost = [str(file) for file in files if not file.is_file()]
    if lost:
        raise FileNotFoundError(f"{WORDNET}: there is no {lost[0]}; give the folder of WordNet 3's data files.")
    found = (e for file in files for e in re.findall(r'"([^"]+)"', file.read_text(encoding="utf-8", errors="ignore")))
    return list(dict.fromkeys(f"{e[0].upper()}{e[1:].rstrip('.?!')}." for e in found if len(e.split()) >= 4))


def _documentation() -> Iterator[str]:
    paths = sysconfig.get_paths()
    for folder in dict.fromkeys((Path(paths["stdlib"]), Path(paths["purelib"]))):
        for file in sorted(folder.rglob("*")):
            inside = str(file.relative_to(folder))
            if _OTHERS.search(inside) or (folder.name != "site-packages" and "site-packages" in inside):
                continue
            if file.suffix == ".py":
                text = file.read_text(encoding="utf-8", errors="ignore")
                yield from (inspect.cleandoc(found) for found in re.findall(r'"""(.*?)"""', text, re.DOTALL))
            elif file.name in ("METADATA", "News3.txt", "NEWS.txt"):
                yield file.read_text(encoding="utf-8", errors="ignore")
