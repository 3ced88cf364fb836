"""Imports go downward only, jaxcomp never imports train, and importing it changes nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import jaxcomp

ROOT = Path(jaxcomp.__file__).parent

# Lowest first; a module may import its own layer's package and what is below.
LAYERS = [
    {"grids", "paths", "rank_specs", "scaling", "specs", "structures"},
    {"codebooks", "factors", "leaves", "masks", "numerics"},
    {"factoring", "resets", "schedules", "slots", "trace", "transform"},
    {
        "activations",
        "adaround",
        "contraction",
        "distill",
        "federated",
        "learned",
        "low_rank",
        "prune",
        "quantize",
        "ranks",
        "regrow",
        "share",
        "share_vectors",
        "statistics",
        "structure",
    },
    {"search"},
    {"artifact", "export", "report"},
]
# artifact is read by nobody below; the top-level __init__ gathers everything.


def layer_of(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


def imports_of(path: Path) -> set[str]:
    """Top-level jaxcomp modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jaxcomp":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("jaxcomp.")}
    return found


def test_imports_go_downward() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        wrong += [f"{path.name} imports {i}" for i in imports_of(path) if i != own and layer_of(i) > layer_of(own)]
    assert not wrong


def test_jaxcomp_does_not_know_train() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n == "train" or n.startswith("train.") for n in names), path


def test_private_parts_of_jax_are_left_alone() -> None:
    for path in ROOT.rglob("*.py"):
        assert "jax._src" not in path.read_text(), path


def test_importing_changes_no_setting_and_loads_no_trainer() -> None:
    code = (
        "import jax; before = dict(jax.config.values); import jaxcomp, sys;"
        "assert dict(jax.config.values) == before;"
        "assert not {'tensorflow', 'tensorflow_datasets', 'orbax', 'torch', 'matplotlib', 'train'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_documented() -> None:
    assert len(set(jaxcomp.__all__)) == len(jaxcomp.__all__)
    for name in jaxcomp.__all__:
        thing = getattr(jaxcomp, name)
        if callable(thing):
            assert thing.__doc__, name
