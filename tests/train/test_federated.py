"""The command line of the federation: settings that cannot be are one error."""

from __future__ import annotations

import pytest

from train.federated import main


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--compressors", "gzip"], "there is no 'gzip'; there are dense, uniform4"),
        (["--per-round", "60"], "per_round must be at most 50, the number of clients, got 60"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--dataset", "digits", "--clients", "2000"], "clients must be in 1..1078"),
    ],
)
def test_bad_settings_are_one_error(options, text, capsys, tmp_path) -> None:
    try:
        code = main([*options, "--out", str(tmp_path / "run")])
    except SystemExit as e:  # tyro's, for a field
        code = e.code
    assert code == 2
    assert text in " ".join(capsys.readouterr().err.replace("|", " ").replace("│", " ").split())
    assert not (tmp_path / "run").exists()
