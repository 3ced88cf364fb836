"""The wheel: what it holds, what it asks for, and that it works where nothing but it was installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest

import jaxcomp

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

EXAMPLE = """
import importlib.resources
import jax, jaxcomp as jc
assert importlib.resources.files("jaxcomp").joinpath("py.typed").is_file()
assert "site-packages" in jc.__file__, jc.__file__
import jax.numpy as jnp
params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
compress = jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4)))
tree = compress.apply(compress.init(params), params)
jc.save("net.safetensors", tree)
assert (jc.materialize(jc.load("net.safetensors"))["kernel"] == jc.materialize(tree)["kernel"]).all()
"""


def test_the_wheel_is_the_package_alone_and_typed() -> None:
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["jaxcomp"]
    assert (ROOT / "jaxcomp" / "py.typed").exists()
    assert not list((ROOT / "jaxcomp").rglob("test_*.py"))


def test_nothing_that_is_asked_for_is_bounded_above() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]
    assert not [line for line in wanted if "<" in line or "==" in line]


def pythons() -> dict[str, str]:
    """The ends of the supported versions that are at hand and can make environments."""
    found = {}
    for version in ("3.11", "3.13"):
        versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        for python in [*versions.glob(f"{version}.*/bin/python"), shutil.which(f"python{version}")]:
            if python and subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0:
                found.setdefault(version, str(python))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.13"])
def test_the_wheel_works_alone_in_a_clean_environment(version, tmp_path) -> None:
    python = pythons().get(version)
    if python is None:
        pytest.skip(f"no Python {version} that makes environments is at hand")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_CONSTRAINT")}

    def run(*command: str | Path) -> str:
        done = subprocess.run([*map(str, command)], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    run(python, "-m", "venv", tmp_path / "venv")
    inside = tmp_path / "venv" / "bin" / "python"
    run(inside, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert "jaxcomp/py.typed" in files
    assert {name.split("/")[0] for name in files} == {"jaxcomp", f"jaxcomp-{jaxcomp.__version__}.dist-info"}
    run(inside, "-m", "pip", "install", "-q", wheel)
    run(inside, "-m", "pip", "check")
    run(inside, "-c", EXAMPLE)
