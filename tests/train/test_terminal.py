"""Fault 11: what the commands print is whole at 80 and 60 columns and in a pipe, and every error says the mend."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from train import federated, seeds, sparse
from train.__main__ import main, parse
from train.configs import CIFAR10, DIGITS, PRESETS, OptimConfig
from train.data import sets
from train.errors import DataError, RunError
from train.experiments import main_job
from train.experiments.federated_configs import Config as Federation
from train.experiments.federated_configs import Row as Sent
from train.experiments.folder import check_folder, claimed
from train.experiments.methods import METHODS
from train.experiments.records import Row
from train.experiments.sparse import Result, Sparse
from train.reports import federated as federated_report
from train.reports import main_job as main_report
from train.reports import sparse as sparse_report
from train.reports.terminal import print_error, print_table

ROWS = [
    Row(n, METHODS[n].title if n in METHODS else "float32 baseline", 0.1234, 0.9876, 123, 0.805, 32, 1_234_567, 123.4)
    for n in ("baseline", *METHODS)
]
SENT = [Sent(f"r{i}", "PowerSGD rank 2 + feedback", 1.25, 407_000_000, 407_000_000, 0.8627, 12.5) for i in range(3)]
SPARSE = [Result("gradual", [0.8969, 0.8831, 0.8858], 0.9, 123.0)]

TABLES: dict[str, tuple[Table, list[str]]] = {
    "main": (
        main_report.make_table(ROWS, "digits: accuracy on the test split after the last epoch"),
        [
            "additive powers of two, 4-bit",
            "12.34%",
            "98.76%",
            "+0.00 pp",
            "80.5%",
            "1.00x",
            "1,234,567",
            "1.0x",
            "123.4",
        ],
    ),
    "federated": (
        federated_report.make_table(SENT, Federation()),
        ["PowerSGD rank 2 + feedback", "1.25", "407.00", "1.0x", "407.0", "86.27%", "+0.00 pp", "12.5"],
    ),
    "sparse": (sparse_report.make_table(SPARSE, Sparse()), ["gradual", "88.86%", "89.69%", "88.31%", "90.0%", "123"]),
}


def printed(table: Table, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    print_table(console, table)
    return console.export_text()


@pytest.mark.parametrize("width", [200, 80, 60, 40])
@pytest.mark.parametrize("name", TABLES)
def test_fault_11_tables_are_whole_at_any_width(name, width) -> None:
    table, wanted = TABLES[name]
    text = printed(table, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for figure in wanted:
        assert figure in text, figure
    headers = [str(c.header) for c in table.columns]
    found = " ".join(text.split())
    for header in headers[1:]:
        assert header in found, header
    if width == 200:
        assert text.count(headers[0]) == 1


def test_fault_11_columns_that_do_not_fit_stand_below_in_order() -> None:
    text = printed(TABLES["main"][0], 60)
    places = [text.index(h) for h in ("untuned", "change", "zeros", "file bytes", "seconds")]
    assert places == sorted(places)
    assert text.count("method") > 1


def test_fault_11_what_is_in_brackets_is_printed(capsys) -> None:
    print_error(ValueError("pip install 'jaxcomp[tensorboard]', a number in [0, 1) [/]"))
    assert capsys.readouterr().err == "error: pip install 'jaxcomp[tensorboard]', a number in [0, 1) [/]\n"


def test_fault_11_rows_of_the_picture_lie_around_each_other_not_over() -> None:
    same = [(1000.0, 99.0)] * 3
    assert main_report.rings(same) == [0, 1, 2]
    assert main_report.rings([(1000.0, 99.0), (2000.0, 98.0), (1000.0, 97.0)]) == [0, 0, 0]
    assert main_report.rings([(5.0, 50.0)]) == [0]


def test_fault_11_every_row_of_the_picture_is_seen() -> None:
    image = pytest.importorskip("PIL.Image")
    rows = [dataclasses.replace(ROWS[0], name=f"r{i}", method=f"row {i}") for i in range(4)]
    rows.append(dataclasses.replace(rows[0], file_bytes=1000, test_accuracy=0.9))
    drawn = np.asarray(image.open(io.BytesIO(main_report.picture(rows, "x"))).convert("RGB"))
    drawn = drawn[:, : drawn.shape[1] * 5 // 6]  # the axes, without the legend
    for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189)):
        assert (np.abs(drawn.astype(int) - colour).max(-1) < 10).sum() > 20, colour


def said(capsys) -> str:
    return " ".join(re.sub(r"[│|╭╮╰╯─]", " ", capsys.readouterr().err).split())


MAIN = {
    "nonsense": "no data set is called 'nonsense'; there are digits, fashion_mnist, cifar10.",
    "Digits": "no data set is called 'Digits'; there are digits, fashion_mnist, cifar10.",
    "--dataset cifar10": "write `python -m train cifar10`",
    "fashion_mnist --dataset digits": "write `python -m train digits`",
    "--methods magic": "no method is called 'magic'; there are l1, sensitivity,",
    "--seed": "Missing value for argument '--seed'",
    "--seed x": "Error parsing --seed: invalid literal for int() with base 10: 'x'",
    "--dataset foo": "Expected one of ('digits', 'fashion_mnist', 'cifar10')",
    "--model.name foo": "Expected one of ('convnet', 'resnet18', 'mlp', 'vit')",
    "--model.width 0": "width must be at least 1, got 0",
    "--baseline.epochs 0": "epochs must be at least 1, got 0",
    "--finetune.learning-rate 0": "learning_rate must be above 0, got 0.0",
    "--baseline.warmup 2": "warmup must be a fraction in 0..1, got 2.0",
    "--accumulate 0": "accumulate must be at least 1, got 0",
    "--accumulate 3": "it must be a multiple of the 1 devices times 3 parts",
    "--compilation-cache /dev/null": "the folder '/dev/null' cannot be used: File exists; choose another with",
    "--nope 1": "Unrecognized options: --nope",
    "compress --ratio=5": "--ratio must be one of 2, 4, 8, 16, 32, 64, got '5'",
    "compress --ratio 16 --methods=int8": "compress makes one row",
}
OTHERS = {
    "sparse --methods": "methods is empty; name at least one",
    "sparse --seeds": "seeds is empty; name at least one",
    "sparse --methods magic": "Expected one of ('dense', 'static', 'set', 'rigl', 'gradual')",
    "sparse --dataset cifar10": "Expected one of ('fashion_mnist', 'digits')",
    "sparse --period 0": "period must be at least 1, got 0",
    "federated --compressors gzip": "there is no 'gzip'; there are dense, uniform4",
    "federated --dataset foo": "Expected one of ('digits', 'fashion_mnist', 'cifar10')",
    "federated --rounds x": "Error parsing --rounds: invalid literal for int() with base 10: 'x'",
}


def code_of(command, arguments) -> int:
    try:
        return command(arguments)
    except SystemExit as e:
        return e.code


@pytest.mark.parametrize("arguments", MAIN)
def test_fault_11_errors_of_the_main_command(arguments, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = [] if arguments.startswith("--seed") else ["--out", str(tmp_path / "run")]
    assert code_of(main, [*arguments.split(), *out]) == 2
    assert MAIN[arguments] in said(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "methods", "out"),
    [
        ("compress", ("compress8",), None),
        ("compress --ratio=16", ("compress16",), None),
        ("digits compress --ratio 16 --out compress", ("compress16",), Path("compress")),
        ("--out compress", (), Path("compress")),
        ("digits --methods=int8", ("int8",), None),
    ],
)
def test_compress_is_a_row_where_it_is_a_command(arguments, methods, out) -> None:
    config = parse(arguments.split())
    assert (config.methods, config.out) == (methods, out)


@pytest.mark.parametrize("arguments", OTHERS)
def test_fault_11_errors_of_the_other_commands(arguments, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    command, *rest = arguments.split()
    assert code_of({"sparse": sparse.main, "federated": federated.main}[command], rest) == 2
    assert OTHERS[arguments] in said(capsys)


def test_fault_11_seeds_without_folders(capsys) -> None:
    assert seeds.main(()) == 2
    assert "name the folders of finished runs" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_fault_11_help_calls_nothing_required_that_has_a_value(name, capsys) -> None:
    with pytest.raises(SystemExit):
        parse([name, "--help"])
    assert "required" not in capsys.readouterr().out


def test_fault_11_a_failed_download_blocks_nothing(tmp_path, monkeypatch) -> None:
    def fails(*_: object, **__: object):
        raise DataError("no network")

    monkeypatch.setattr(main_job, "load", fails)
    out = tmp_path / "run"
    with pytest.raises(DataError):
        main_job.run(dataclasses.replace(CIFAR10, out=out), Console(quiet=True))
    assert not out.exists()
    monkeypatch.setattr(main_job, "load", sets.load)
    assert check_folder(dataclasses.replace(DIGITS, out=out)) is None


def test_fault_11_a_folder_of_a_run_that_made_nothing_is_taken(tmp_path) -> None:
    out = tmp_path / "run"
    with claimed(dataclasses.replace(CIFAR10, out=out), (), Console(quiet=True)):
        pass  # as older versions left it
    console = Console(file=io.StringIO(), record=True, width=60)
    config = dataclasses.replace(CIFAR10, out=out, seed=3)
    with claimed(config, (), console):
        assert "held a run with seed = 0, this one has 3; that one had made nothing" in console.export_text()
        (out / "baseline.safetensors").write_bytes(b"work")
    with claimed(config, (), console):
        assert "holds a run with these settings" in console.export_text()
    refused = claimed(dataclasses.replace(CIFAR10, out=out), (), Console(quiet=True))
    with pytest.raises(RunError, match="holds a run with seed = 3, this one has 0"), refused:
        pass


SMALL = dataclasses.replace(
    DIGITS,
    model=dataclasses.replace(DIGITS.model, name="mlp"),
    baseline=OptimConfig(epochs=3, learning_rate=1e-3),
    finetune=OptimConfig(epochs=1, learning_rate=1e-3),
    batch=512,
    methods=("l1",),
    checkpoint_seconds=0.0,
)


@pytest.mark.slow
def test_fault_11_resuming_says_what_is_found(tmp_path, monkeypatch) -> None:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        config = dataclasses.replace(SMALL, out=tmp_path / "run")
        written, times = main_job.fit.__globals__["write_history"], []

        def stops(*arguments: object) -> None:
            written(*arguments)
            times.append(1)
            if len(times) == 3:
                raise KeyboardInterrupt

        monkeypatch.setitem(main_job.fit.__globals__, "write_history", stops)
        console = Console(file=io.StringIO(), record=True, width=60)
        with pytest.raises(KeyboardInterrupt):
            main_job.run(config, console)
        monkeypatch.setitem(main_job.fit.__globals__, "write_history", written)
        console.export_text()
        main_job.run(config, console)
        text = console.export_text()
        assert "holds a run with these settings: this one goes on with it." in text
        assert "baseline: goes on from the checkpoint of step 6 of 6." in text
        main_job.run(dataclasses.replace(config, methods=("l1",)), console)
        assert "l1: finished earlier, " in console.export_text()
        (tmp_path / "run" / "l1" / "row.json").write_text("{}")
        main_job.run(config, console)
        assert "row.json' is damaged or of another version" in console.export_text()
