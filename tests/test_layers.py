"""The house's laws: what may import what, no circles, rooms built alike, and little of what should be little.

A message says which law is broken, where, and what to do.
"""

from __future__ import annotations

import ast
import inspect
import io
import itertools
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxcomp
from tests.import_graph import Sources, circle

ROOT = Path(jaxcomp.__file__).parent
TRAIN = ROOT.parent / "train"
SOURCES = Sources(ROOT, TRAIN)
FACES = sorted(name for name in SOURCES.faces - {"train"} if name.count(".") < 2)
"""Those of jaxcomp and of every room; folders within a room are the room's own."""

METHODS = {"factorization", "federated", "pruning", "quantization", "sharing", "trace"}
LEVELS = [
    {"core"},
    METHODS,
    {"kernels"},
    {"activations", "adapters", "artifact", "distill", "ptq", "recipes", "structure"},
    {"cli", "export", "report", "scale", "search"},
]
"""The rooms and loose files of jaxcomp, lowest first."""
APART = [{"core"}, METHODS]
"""Levels of which nobody imports a neighbour."""

BUILT = {
    "core": ("paths", "leaves", "slots", "transform", "errors", "types"),
    "factorization": ("specs", "leaves", "transform"),
    "federated": ("base", "compressors"),
    "pruning": ("specs", "transform"),
    "quantization": ("grids", "leaves", "transform"),
    "sharing": ("leaves", "transform"),
}
"""The files that a room must have: its values, its leaves, and what lifts the mathematics to trees. Pruning's leaf and
what sharing's tables are shared by are core's."""


def room_of(name: str) -> str:
    """The room, or the loose file, that a module of jaxcomp is in."""
    return name.split(".")[1]


def level_of(room: str) -> int:
    level = next((i for i, rooms in enumerate(LEVELS) if room in rooms), None)
    assert level is not None, f"jaxcomp/{room} has no level; say in LEVELS of {__name__} on what it stands."
    return level


def between_rooms() -> Iterator[tuple[str, str, str]]:
    """``(room, imported room, the import in words)`` of every import that leaves a room of jaxcomp."""
    for found in SOURCES.imports:
        inside = found.source.startswith("jaxcomp.") and found.target.startswith("jaxcomp.")
        if inside and room_of(found.source) != room_of(found.target):
            yield room_of(found.source), room_of(found.target), str(found)


# Who may import whom


def test_imports_go_down() -> None:
    wrong = [text for a, b, text in between_rooms() if level_of(b) > level_of(a)]
    assert not wrong, "a room imports what stands on it; move what both need down, or to core:\n" + "\n".join(wrong)


def test_core_stands_alone_and_no_method_knows_another() -> None:
    apart = [(a, b, text) for a, b, text in between_rooms() if any(a in level and b in level for level in APART)]
    wrong = [text for _, _, text in apart]
    assert not wrong, "methods know core and themselves only; move what both need to core:\n" + "\n".join(wrong)


def test_leaves_read_no_program() -> None:
    readers = {"activations", "structure", "trace"}
    wrong = [
        str(found)
        for found in SOURCES.imports
        if found.source.startswith("jaxcomp.") and found.source.rpartition(".")[2] in ("leaves", "specs", "grids")
        if room_of(found.source) not in readers and found.target.split(".")[1:2] and room_of(found.target) in readers
    ]
    assert not wrong, "programs read leaves, never the reverse; move this to the room that reads:\n" + "\n".join(wrong)


def test_jaxcomp_does_not_know_train() -> None:
    wrong = [str(i) for i in SOURCES.imports if i.source.startswith("jaxcomp") and i.target.split(".")[0] == "train"]
    assert not wrong, "jaxcomp never imports train; move what it needs into jaxcomp:\n" + "\n".join(wrong)


def test_the_walls_of_a_face_are_used_from_outside_only() -> None:
    wrong = [str(found) for found in SOURCES.own_faces_used()]
    assert not wrong, "inside a room, import from the file that defines it, not from the face:\n" + "\n".join(wrong)


# No circles


@pytest.mark.parametrize("package", ["jaxcomp", "train"])
def test_no_circle_of_files(package) -> None:
    found = circle(SOURCES.graph(package))
    assert not found, f"files import each other in a circle, {' -> '.join(found)}; move what both need into a third."


@pytest.mark.parametrize("folder", sorted(SOURCES.faces))
def test_no_circle_of_folders(folder) -> None:
    found = circle(SOURCES.collapsed(folder))
    assert not found, (
        f"children of {folder} import each other in a circle, {' -> '.join(found)}; move the file that closes it to the"
        " side that it belongs to."
    )


CIRCLES = {
    "at the top": {"a": "from house.b import g\n", "b": "import house.a\n"},
    "of types only": {"a": "if TYPE_CHECKING:\n    from house.b import g\n", "b": "from house import a\n"},
    "in a function": {"a": "def f():\n    from house.b import g\n", "b": "from . import a\n"},
    "of three": {"a": "from .b import g\n", "b": "from .c import h\n", "c": "from .a import f\n"},
    "through a face": {
        "r/__init__": "from house.r.b import g\n",
        "r/b": "import house.c\n",
        "c": "from house.r import g\n",
    },
}


def built(folder: Path, files: dict[str, str]) -> Sources:
    """The sources of a made-up package called house."""
    for name, text in {"__init__": "", **files}.items():
        path = folder / "house" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    return Sources(folder / "house")


@pytest.mark.parametrize("name", CIRCLES)
def test_the_finder_finds_circles_of_files(name, tmp_path) -> None:
    sources = built(tmp_path, CIRCLES[name])
    found = circle(sources.graph("house"))
    assert found
    assert found[0] == found[-1]
    assert set(found) == set(sources.files("house"))
    known = sources.graph("house")
    assert all(b in known[a] for a, b in itertools.pairwise(found)), "it reads from who imports to what"


def test_the_finder_finds_circles_of_folders(tmp_path) -> None:
    files = {"a/x": "import house.b.y\n", "b/y": "", "b/z": "from house.a.w import f\n", "a/w": "def f(): ...\n"}
    sources = built(tmp_path, files)
    assert circle(sources.graph("house")) is None
    assert sorted(set(circle(sources.collapsed("house")) or [])) == ["house.a", "house.b"]
    assert circle(sources.collapsed("house.a")) is None


def test_the_finder_finds_a_room_that_uses_its_own_face(tmp_path) -> None:
    files = {"r/__init__": "from house.r.a import f\n", "r/a": "def f(): ...\n", "r/b": "from house.r import f\n"}
    (found,) = built(tmp_path, files).own_faces_used()
    assert (found.source, found.target) == ("house.r.b", "house.r")
    outside = built(tmp_path / "other", {**files, "r/b": "", "c": "from house.r import f\n"})
    assert not outside.own_faces_used()
    assert outside.graph("house")["house.c"] == {"house.r.a"}


def test_the_finder_finds_no_circle_where_there_is_none(tmp_path) -> None:
    files = {"r/__init__": "from house.r.b import g\n", "r/b": "import house.c\n", "c": "import os, json.decoder\n"}
    sources = built(tmp_path, {**files, "top": "from house.r import g, b\n"})
    assert circle(sources.graph("house")) is None
    assert circle(sources.collapsed("house")) is None
    assert sources.graph("house") == {"house.c": set(), "house.r.b": {"house.c"}, "house.top": {"house.r.b"}}


# Rooms


@pytest.mark.parametrize("room", BUILT)
def test_rooms_are_built_alike(room) -> None:
    missing = [name for name in BUILT[room] if f"jaxcomp.{room}.{name}" not in SOURCES.paths]
    assert not missing, f"jaxcomp/{room} has no {', '.join(missing)}; docs/architecture.md says what goes there."


@pytest.mark.parametrize("room", [room for room, files in BUILT.items() if "transform" in files and room != "core"])
def test_values_come_before_leaves_and_leaves_before_transforms(room) -> None:
    graph = SOURCES.graph(f"jaxcomp.{room}")
    for low, high in (("specs", "leaves"), ("grids", "leaves"), ("leaves", "transform"), ("specs", "transform")):
        lower, higher = f"jaxcomp.{room}.{low}", f"jaxcomp.{room}.{high}"
        assert higher not in graph.get(lower, ()), f"{lower} imports {higher}; values and leaves know no transform."


def test_few_files_stand_loose() -> None:
    loose = {p.stem for p in ROOT.glob("*.py")} - {"__init__", "recipes"}
    assert len(loose) <= 2, f"{', '.join(sorted(loose))} stand beside the rooms of jaxcomp; move each into a room."


def test_every_room_is_there_after_one_import() -> None:
    rooms = sorted(p.parent.name for p in ROOT.glob("*/__init__.py"))
    code = (
        "import jaxcomp as jc\n"
        f"for room in {rooms}: assert room in dir(jc) and getattr(jc, room).__name__ == 'jaxcomp.' + room, room"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"import the room in jaxcomp/__init__.py:\n{done.stderr}"


def test_the_root_has_few_names() -> None:
    assert len(jaxcomp.__all__) <= 40, "jaxcomp has the verbs; leave the rest to its room's __all__."


@pytest.mark.parametrize("face", FACES)
def test_every_public_name_is_there_and_documented(face) -> None:
    module = sys.modules.get(face) or __import__(face, fromlist=["__all__"])
    names = getattr(module, "__all__", None)
    assert names, f"{face} names nothing; say in __all__ what is public."
    assert len(set(names)) == len(names), f"{face}.__all__ names something twice."
    assert module.__doc__, f"{face} has no docstring; say what is in it."
    missing = [name for name in names if not hasattr(module, name)]
    assert not missing, f"{face}.__all__ names {', '.join(missing)}, which it does not have."
    bare = [name for name in names if not documented(SOURCES.defining(face, name), name, getattr(module, name))]
    assert not bare, f"{face}: {', '.join(bare)} has no docstring; say in a line what it is."


def test_every_file_says_what_is_in_it() -> None:
    bare = [name for name, tree in SOURCES.trees.items() if not ast.get_docstring(tree)]
    assert not bare, f"{', '.join(bare)} begins without a docstring; say in a line what is in the file."


def documented(module: str, name: str, thing: object) -> bool:
    """Whether a class or function has a docstring of its own, or a value one under its assignment."""
    if inspect.isclass(thing) or inspect.isroutine(thing):
        doc = thing.__dict__.get("__doc__") if inspect.isclass(thing) else thing.__doc__
        return bool(doc) and not doc.startswith(f"{name}(")  # a dataclass makes one of its signature
    if inspect.ismodule(thing):
        return bool(thing.__doc__)
    body = SOURCES.trees[module].body
    for node, after in zip(body, [*body[1:], None], strict=True):
        stores = isinstance(node, ast.Assign | ast.AnnAssign)
        if stores and any(isinstance(t, ast.Name) and t.id == name for t in ast.walk(node)):
            return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return False


# How much there is of what should be little

LONG: dict[str, str] = {}
"""Functions of more than 40 lines without their docstring, each with the reason why it is not two."""

ON_GRIDS: dict[str, str] = {}
"""Functions that ask for a grid's class, besides those that raise, each with the reason why the grid cannot answer."""


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function of jaxcomp and train with its name, the module's and what it is in before it."""

    def inner(where: str, node: ast.AST) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            name = f"{where}.{child.name}" if isinstance(child, ast.FunctionDef | ast.ClassDef) else where
            if isinstance(child, ast.FunctionDef):
                yield name, child
            yield from inner(name, child)

    for module, tree in SOURCES.trees.items():
        yield from inner(module, tree)


def lines_of(function: ast.FunctionDef) -> int:
    """The lines of a function without its docstring and decorators."""
    assert function.end_lineno
    first = function.body[0]
    doc = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function, clean=False) is not None else 0
    return function.end_lineno - function.lineno + 1 - doc


def test_functions_are_short() -> None:
    long = {name: lines for name, f in functions() if (lines := lines_of(f)) > 40}
    new = [f"{name} ({lines} lines)" for name, lines in long.items() if name not in LONG]
    assert not new, f"{', '.join(new)}: split it in two, or give the reason in LONG of {__name__}."
    gone = set(LONG) - set(long)
    assert not gone, f"{', '.join(gone)} is short now; take it out of LONG."


@pytest.mark.parametrize(("package", "most"), [("jaxcomp", 20), ("train", 20)])
def test_types_are_said(package, most) -> None:
    found, lines = {}, 0
    for name in SOURCES.paths:
        if name.split(".")[0] == package:
            text = SOURCES.paths[name].read_text()
            tokens = tokenize.generate_tokens(io.StringIO(text).readline)
            found[name] = sum(t.type == tokenize.NAME and t.string == "Any" for t in tokens)
            found[name] -= sum(isinstance(a, ast.alias) and a.name == "Any" for a in ast.walk(SOURCES.trees[name]))
            lines += text.count("\n")
    share = 1000 * sum(found.values()) / lines
    worst = ", ".join(f"{name} ({found[name]})" for name in sorted(found, key=found.__getitem__)[:-6:-1])
    assert share <= most, (
        f"Any stands {share:.0f} times in 1000 lines of {package}, at most {most} are wanted; say Params, State, Stats,"
        f" Leaf, a Protocol or object instead. Most are in {worst}."
    )


def grids() -> set[str]:
    """The names of all concrete classes of grids."""
    files = ("grids", "level_grids", "microscaling", "companding", "tables")
    trees = [SOURCES.trees[name] for f in files if (name := f"jaxcomp.quantization.{f}") in SOURCES.trees]
    classes = {node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    return classes - {"Grid", "ScaleGrid", "Numbers", "Compander"}


def asked(function: ast.AST, names: set[str]) -> int:
    """How often a function asks whether something is one of these classes, where no error hangs on it."""
    raising = {
        id(inner)
        for node in ast.walk(function)
        if isinstance(node, ast.If) and any(isinstance(s, ast.Raise) for s in node.body)
        for inner in ast.walk(node.test)
    }
    return sum(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "isinstance"
        and id(node) not in raising
        and bool({n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)} & names)
        for node in ast.walk(function)
    )


def test_grids_answer_for_themselves() -> None:
    names = grids()
    assert {"Int", "Float"} <= names
    found = {name: n for name, f in functions() if name.startswith("jaxcomp.") and (n := asked(f, names))}
    new = [f"{name} ({n})" for name, n in found.items() if name not in ON_GRIDS]
    assert not new, (
        f"a class of grids is asked for in {', '.join(new)}; give the grid a method, or the reason in ON_GRIDS."
    )
    gone = set(ON_GRIDS) - set(found)
    assert not gone, f"{', '.join(gone)} asks for no grid's class now; take it out of ON_GRIDS."


def test_the_finder_of_ladders_counts() -> None:
    ladder = "def f(g):\n    if isinstance(g, Int): return 1\n    return 2 if isinstance(g, Log | None) else 3"
    checks = "def f(g):\n    if not isinstance(g, Int):\n        raise TypeError\n    return isinstance(g, dict)"
    assert asked(ast.parse(ladder), {"Int", "Log"}) == 2
    assert asked(ast.parse(checks), {"Int", "Log"}) == 0


# Guests


def test_private_parts_of_jax_are_left_alone() -> None:
    wrong = [name for name, path in SOURCES.paths.items() if "jax._src" in path.read_text()]
    assert not wrong, f"{', '.join(wrong)} reads jax._src; use what jax makes public."


def test_importing_changes_no_setting_and_loads_no_trainer() -> None:
    code = (
        "import jax; before = dict(jax.config.values); import jaxcomp, sys;"
        "assert dict(jax.config.values) == before;"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'orbax', 'torch', 'matplotlib', 'train'};"
        "heavy |= {'jax.experimental.pallas'};"
        "assert not heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
