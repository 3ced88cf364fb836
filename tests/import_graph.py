"""Who imports whom, read off the source: at a file's top, under ``TYPE_CHECKING`` and inside functions alike.

A room's ``__init__`` is its face. A name that is imported from a face counts as imported from the file that the face
has it from, so that ``from jaxcomp.core import chain`` is an import of ``jaxcomp.core.transform``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """``source`` imports ``target``, both modules by their dotted names, in a line of the source."""

    source: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.source} (line {self.line}) imports {self.target}"


class Sources:
    """The modules under some packages' folders.

    Args:
      packages: their folders; a folder's name is the package's.
    """

    def __init__(self, *packages: Path) -> None:
        self.paths = {_dotted(p, root.parent): p for root in packages for p in sorted(root.rglob("*.py"))}
        self.trees = {name: ast.parse(path.read_text()) for name, path in self.paths.items()}
        self.faces = {name for name, path in self.paths.items() if path.name == "__init__.py"}
        self.imports = [found for name in self.paths for found in self._imports(name)]

    def files(self, package: str) -> list[str]:
        """The modules of a package that are no faces."""
        return [name for name in self.paths if _within(name, package) and name not in self.faces]

    def graph(self, package: str) -> dict[str, set[str]]:
        """For each file of a package the files of it that it imports; faces are left out."""
        graph: dict[str, set[str]] = {name: set() for name in self.files(package)}
        for found in self.imports:
            if found.source in graph and found.target in graph:
                graph[found.source].add(found.target)
        return graph

    def collapsed(self, folder: str) -> dict[str, set[str]]:
        """For each child of a folder, a file or a folder as one node, the children that it imports."""
        depth = folder.count(".") + 2

        def child(name: str) -> str | None:
            return ".".join(name.split(".")[:depth]) if _within(name, folder) and name != folder else None

        graph: dict[str, set[str]] = {c: set() for name in self.paths if (c := child(name))}
        for found in self.imports:
            source, target = child(found.source), child(found.target)
            if source and target and source != target:
                graph[source].add(target)
        return graph

    def own_faces_used(self) -> list[Import]:
        """Imports of names from the face of a room that the importing file is in."""
        return [found for found in self.imports if found.target in self.faces and _within(found.source, found.target)]

    def defining(self, module: str, name: str) -> str:
        """The module that ``from module import name`` reads in the end."""
        if f"{module}.{name}" in self.paths:
            return f"{module}.{name}"
        for node in self.trees[module].body if module in self.faces else ():
            if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
                origin = next(a.name for a in node.names if (a.asname or a.name) == name)
                source = self._absolute(module, node)
                return self.defining(source, origin) if source in self.paths else source
        return module

    def _imports(self, source: str) -> Iterator[Import]:
        for node in ast.walk(self.trees[source]):
            if isinstance(node, ast.Import):
                for a in node.names:
                    yield Import(source, a.name, node.lineno)
            elif isinstance(node, ast.ImportFrom):
                module = self._absolute(source, node)
                for a in node.names:
                    target = self._through(source, module, a.name)
                    yield Import(source, target, node.lineno)

    def _through(self, source: str, module: str, name: str) -> str:
        """What is imported; a name from the face of one's own room stays that face, unless it is a module."""
        if f"{module}.{name}" in self.paths:
            return f"{module}.{name}"
        own = module in self.faces and _within(source, module)
        return module if own or module not in self.paths else self.defining(module, name)

    def _absolute(self, source: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = source.split(".") if source in self.faces else source.split(".")[:-1]
        return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


def circle(graph: Mapping[str, set[str]]) -> list[str] | None:
    """A circle in a graph, its first node again at its end, or None.

    >>> circle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    True
    >>> circle({"a": {"b"}, "b": {"a"}})
    ['a', 'b', 'a']
    """
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return list(reversed(e.args[1]))  # graphlib's order is from what is needed to who needs it
    return None


def _dotted(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")
