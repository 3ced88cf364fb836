"""``jaxcomp compress``: a folder with a smaller file, or an error in one line."""

import os

import numpy as np
import pytest

import jaxcomp as jc
from tests.command_line import runner
from train.__main__ import parse
from train.errors import RunError

NETWORK = """
import jax

def network(p, x):
    return jax.nn.relu(x @ p["up"]) @ p["down"]
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The exit code, output and errors of a command, beside a network and its samples."""
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((32, 256)), rng.standard_normal((256, 32))
    jc.save(tmp_path / "net.safetensors", {"up": np.float32(up), "down": np.float32(down) / 16})
    np.save(tmp_path / "x.npy", np.float32(rng.standard_normal((400, 32))))
    np.save(tmp_path / "few.npy", np.zeros((3, 32), np.float32))
    np.save(tmp_path / "wide.npy", np.zeros((8, 7), np.float32))
    (tmp_path / "small_network.py").write_text(NETWORK)
    return runner(tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_a_file_is_compressed_from_the_command_line(run, tmp_path):
    code, out, err = run("compress net.safetensors --fn small_network:network --samples x.npy --ratio 5")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["unit", "choice", "bytes", "macs", "bops", "loss"]
    assert any(line.startswith("Compressed: ") for line in lines)
    done = tmp_path / "net_compressed"
    assert sorted(os.listdir(done)) == ["compressed.safetensors", "measured.json", "plan.json", "report.md"]
    before = jc.artifact.file_size(jc.load(tmp_path / "net.safetensors"))
    assert os.path.getsize(done / "compressed.safetensors") < before / 4.9
    too_small = "compress net.safetensors --fn small_network:network --samples x.npy --ratio 500"
    assert run(too_small)[2].startswith("error: allocate: no choice takes at most")
    assert set(jc.load(done / "compressed.safetensors")["params"]) == {"up", "down"}


def test_what_is_wrong_is_one_line(run):
    said = "compress net.safetensors --fn small_network:network --samples"
    code, _, err = run(f"{said} few.npy")
    assert code == 2
    assert err.startswith("error: compress: --samples want as many examples each along the first axis, four or more")
    assert (
        "compress: --fn small_network:nothing"
        in run("compress net.safetensors --fn small_network:nothing --samples x.npy")[2]
    )
    _, _, err = run(f"{said} wide.npy")
    assert "--fn small_network:network does not take the file's parameters and --samples, a batch of 2x7 of" in err
    assert err.count("\n") == 1


def test_the_main_job_takes_a_ratio():
    config = parse(["digits", "compress", "--ratio", "16", "--seed", "3"])
    assert config.methods == ("compress16",)
    assert config.seed == 3
    assert parse(["compress"]).methods == ("compress8",)
    with pytest.raises(RunError, match="--ratio must be one of 2, 4, 8, 16, 32, 64, got '5'"):
        parse(["compress", "--ratio", "5"])
