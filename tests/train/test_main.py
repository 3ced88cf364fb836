"""The command line of the main job: presets, overrides, and help that names every field."""

from __future__ import annotations

import dataclasses

import pytest

from train.__main__ import parse
from train.configs import DIGITS, Config, identity_of


def test_the_command_line() -> None:
    assert parse([]) == DIGITS
    assert parse(["--seed", "3"]).seed == 3
    config = parse(["fashion_mnist", "--model.width", "8", "--finetune.epochs", "2"])
    assert (config.dataset, config.model.width, config.finetune.epochs) == ("fashion_mnist", 8, 2)
    cifar = parse(["cifar10"])
    assert (cifar.model.name, cifar.model.width, cifar.dataset) == ("resnet18", 64, "cifar10")


def test_help_names_every_field(capsys) -> None:
    with pytest.raises(SystemExit) as e:
        parse(["digits", "--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        if field.name not in ("model", "baseline", "finetune"):
            assert f"--{field.name.replace('_', '-')}" in text
    assert "--finetune.learning-rate" in text


def test_how_many_processes_there_are_is_not_what_a_run_is_known_by() -> None:
    config = parse(["--processes", "2", "--process-id", "1", "--coordinator", "10.0.0.1:9876"])
    assert (config.processes, config.process_id, config.coordinator) == (2, 1, "10.0.0.1:9876")
    assert parse(["--processes", "auto"]).processes == "auto"
    assert identity_of(config) == identity_of(DIGITS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"processes": 0}, r"processes must be at least 1, or auto, got 0\."),
        ({"processes": 2}, r"process-id must be in 0\.\.1, another one for each process, got None\."),
        ({"processes": 2, "process_id": 2}, r"process-id must be in 0\.\.1, .* got 2\."),
        ({"processes": 2, "process_id": 0}, r"coordinator must be the HOST:PORT of process 0, got None\."),
        ({"processes": 2, "process_id": 0, "coordinator": "host"}, r"coordinator must be the HOST:PORT"),
        ({"process_id": 0}, r"belong to a number of processes: write --processes N\."),
        ({"processes": "auto", "coordinator": "host:1"}, r"belong to a number of processes"),
    ],
)
def test_what_is_said_of_processes_fits_together(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DIGITS, **change)
