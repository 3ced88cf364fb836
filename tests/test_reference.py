"""The reference is whole: every public name says what it is, what its arguments are and what it raises, and is shown.

Docstrings are read, nothing is run: doctests and the blocks of the pages run in tests of their own.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import jaxcomp

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxcomp"
PAGES = ROOT / "docs" / "reference"
ROOMS = sorted(
    path.name if path.is_dir() else path.stem
    for path in PACKAGE.iterdir()
    if (path / "__init__.py").exists() or (path.suffix == ".py" and path.stem not in ("__init__", "cli", "__main__"))
)
BLOCKS = [
    block
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S)
]
ON_PAGES = set(re.findall(r"[A-Za-z_]\w*", "\n".join(BLOCKS)))


def public() -> dict[str, Any]:
    """Every public name once, by its shortest path."""
    found = {f"jaxcomp.{name}": getattr(jaxcomp, name) for name in jaxcomp.__all__}
    for room in ROOMS:
        module = importlib.import_module(f"jaxcomp.{room}")
        for name in names(module):
            if name not in jaxcomp.__all__ or getattr(jaxcomp, name) is not getattr(module, name):
                found[f"jaxcomp.{room}.{name}"] = getattr(module, name)
    return found


def names(module: ModuleType) -> list[str]:
    """A room's ``__all__``, or what a file that is a room defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [n for n, v in vars(module).items() if n[0] != "_" and getattr(v, "__module__", "") == module.__name__]


NAMES = public()
FUNCTIONS = {name: f for name, f in NAMES.items() if inspect.isfunction(f)}
CLASSES = {name: c for name, c in NAMES.items() if inspect.isclass(c)}


def own_doc(thing: Any) -> str:
    """A docstring that was written for it, not its parent's nor a dataclass's signature."""
    doc = inspect.getdoc(thing) or ""
    made = inspect.isclass(thing) and (doc.startswith(f"{thing.__name__}(") or "__doc__" not in vars(thing))
    return "" if made else doc


def undocumented_arguments(f: Any) -> list[str]:
    doc = own_doc(f)
    return [n for n in inspect.signature(f).parameters if not re.search(rf"(?<!\w){re.escape(n)}(?!\w)", doc)]


def raises(source: str) -> bool:
    """Whether a function's body, without functions inside, holds a ``raise``."""
    body: list[ast.AST] = list(ast.parse(textwrap.dedent(source)).body[0].body)  # type: ignore[attr-defined]
    while body:
        node = body.pop()
        if isinstance(node, ast.Raise):
            return True
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            body.extend(ast.iter_child_nodes(node))
    return False


def test_the_names_are_found() -> None:
    assert len(FUNCTIONS) > 80
    assert len(CLASSES) > 60


def test_every_room_has_a_page_that_the_reference_leads_to() -> None:
    listed = (PAGES / "index.md").read_text().split()
    for room in ROOMS:
        assert f"automodule:: jaxcomp.{room}\n" in (PAGES / f"{room}.md").read_text()
        assert room in listed, f"docs/reference/index.md does not list {room}"


def test_every_function_and_class_says_what_it_is() -> None:
    assert [name for name, thing in (FUNCTIONS | CLASSES).items() if len(own_doc(thing)) < 20] == []


def test_every_function_names_its_arguments() -> None:
    missing = {name: gone for name, f in FUNCTIONS.items() if (gone := undocumented_arguments(f))}
    assert missing == {}


def test_every_function_that_raises_says_so() -> None:
    assert [
        name
        for name, f in FUNCTIONS.items()
        if raises(inspect.getsource(inspect.unwrap(f))) and "Raises" not in own_doc(f)
    ] == []


def test_every_function_is_shown_in_use() -> None:
    """By a doctest, or by a block of code on a page."""
    names = [name for name, f in FUNCTIONS.items() if ">>>" not in own_doc(f) and name.split(".")[-1] not in ON_PAGES]
    assert names == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(x):\n    raise ValueError", True),
        ("def f(x):\n    def g():\n        raise ValueError\n    return g", False),
    ],
)
def test_a_raise_of_its_own_would_be_seen(source, found) -> None:
    assert raises(source) == found
