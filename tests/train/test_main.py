"""The command line of the main job: presets, overrides, and help that names every field."""

from __future__ import annotations

import dataclasses

import pytest

from train.__main__ import parse
from train.configs import DIGITS, Config


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
