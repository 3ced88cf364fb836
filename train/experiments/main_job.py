"""The main job: a baseline, each method fine-tuned from it, each result saved, loaded and judged on the test split."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import flax.linen as nn
import jax
import numpy as np
from rich.console import Console

import jaxcomp as jc
from jaxcomp.artifact.coding import check
from jaxcomp.core.leaves import zeros_counted
from jaxcomp.core.types import Json, Params, PyTree, State
from jaxcomp.export import ExportError
from jaxcomp.export.running import ready
from train.configs import Config, ModelConfig, OptimConfig, identity_of
from train.data.sets import Dataset, load
from train.errors import RunError, TrainingError
from train.experiments.exports import Export, export, program_of
from train.experiments.folder import check_folder, claimed
from train.experiments.methods import MAIN_JOB, TAUGHT, Recipe, Start, method_named
from train.experiments.records import Row, finished, write_row
from train.loop.evaluate import accuracy
from train.loop.fit import Job, compressed_variables, first_compression, fit
from train.loop.processes import Processes
from train.loop.progress import Progress, say
from train.loop.step import Teacher, init_variables
from train.networks.compressed import macs_of
from train.networks.linen import build

BASELINE = "baseline"
"""The name of the first row."""


def run(config: Config, console: Console, processes: Processes | None = None) -> list[Row]:
    """Makes, or goes on making, every row of the table.

    Whatever stops it, the same command goes on from the last checkpoint and ends with the same numbers.

    Args:
      config: the settings.
      console: where to show what is done.
      processes: of the run, each of which calls this; none, and this one is alone.

    Raises:
      RunError: an unknown method, a runtime that is not installed, a folder that holds a run with other settings, that
        another run is working in, that cannot be written, or not be seen by all processes; processes with other
        settings or data.
      DataError, TrainingError: what their names say.
      Stopped: a signal came.
    """
    processes, methods = processes or Processes(), config.methods or MAIN_JOB
    processes.together(lambda: _check_names(config))
    processes.alike("The options or versions", _options(config))
    processes.first(lambda: check_folder(config))
    data = _data(config, processes)
    job = processes.together(lambda: Job.of(config, make_model(config.model, data), data, processes=processes))
    # Now that there is a run: one that cannot start claims nothing.
    with claimed(config, {BASELINE, *methods}, console, processes):
        board = config.folder / "tensorboard" if config.tensorboard and processes.writes else None
        progress = Progress(console, board)
        try:
            return [_row(job, name, progress) for name in (BASELINE, *methods)]
        finally:
            progress.close()


def _check_names(config: Config) -> None:
    """Before hours of training, that there are such rows and runtimes.

    Raises:
      RunError: there is one that is not.
    """
    for name in config.methods or MAIN_JOB:
        method_named(name)
    for target in config.export:
        try:
            ready(target)
        except ExportError as e:
            raise RunError(f"--export {e}") from e


def _options(config: Config) -> np.ndarray:
    """What all processes are to be started with, as bytes."""
    same = identity_of(config), config.methods, config.export, str(config.out), jc.__version__, jax.__version__
    return np.frombuffer(repr(same).encode(), np.uint8)


def _data(config: Config, processes: Processes) -> Dataset:
    """The data set, prepared by the first process before the others look for it."""

    def read() -> Dataset:
        return load(config.dataset, data_dir=config.data_dir)

    found = processes.together(lambda: read() if processes.writes else None)
    data = processes.together(lambda: found or read())
    splits = data.train, data.validation, data.test
    processes.alike(f"The examples of {data.name}", [x for split in splits for x in (split.images, split.labels)])
    return data


def export_all(config: Config, console: Console) -> list[Export]:
    """Every row's file as a program of each runtime that the settings name, judged there."""
    data = load(config.dataset, data_dir=config.data_dir)
    job = Job.of(config, make_model(config.model, data), data)
    done = []
    for name in (BASELINE, *(config.methods or MAIN_JOB)):
        held, (recipe, _) = jc.load(config.folder / f"{name}.safetensors"), _recipe(job, name)
        network = recipe.opened(held) if recipe.opened else recipe.network
        program = program_of(network, {key: held[key] for key in ("params", "batch_stats")})
        for target in config.export:
            done.append(export(name, target, program=program, data=data, folder=config.folder))
            say(console, str(done[-1]))
    return done


def make_model(config: ModelConfig, data: Dataset) -> nn.Module:
    """The network of a configuration, for a data set's classes."""
    sizes = {} if config.width is None else {"width": config.width}
    return build(config.name, num_classes=data.num_classes, dtype=config.dtype, **sizes)


def _row(job: Job, name: str, progress: Progress) -> Row:
    """The finished row, or the one that is made now."""
    folder, processes = job.config.folder / name, job.processes
    file = folder.parent / f"{name}.safetensors"
    if found := processes.first(lambda: _as_json(finished(folder, file, progress.say))):
        return _reused(Row(**cast(Mapping, found)), progress)
    processes.first(lambda: _make_folder(folder))
    recipe, optim = processes.together(lambda: _recipe(job, name))
    job = replace(job.on(recipe.network), teacher=_teacher(job, name))
    variables = recipe.variables["params"], recipe.variables["batch_stats"]
    first = first_compression(job, recipe.transform, variables)
    _check_alike(job, name, recipe, first)
    untuned = None if name == BASELINE else _accuracy(job, recipe.transform.apply(first, variables[0]), variables[1])
    state, reached = fit(
        job,
        name,
        recipe.transform,
        optim=optim,
        variables=variables,
        folder=folder,
        progress=progress,
        compression=first,
    )
    shipped = {**recipe.shipped(compressed_variables(state, recipe.transform)), **recipe.beside}
    about = {"method": name, "dataset": job.config.dataset, "model": asdict(job.config.model)}
    processes.first(lambda: jc.save(file, shipped, metadata=about, coding=recipe.coding))
    row = Row(
        name=name,
        method="float32 baseline" if name == BASELINE else method_named(name).title,
        untuned_accuracy=untuned,
        test_accuracy=_judge_file(job, recipe, file, shipped),
        macs=macs_of(recipe.network, recipe.variables, job.data),
        zeros=_fraction_of_zeros(shipped["params"]),
        bits=32 if name == BASELINE else method_named(name).bits,
        file_bytes=os.path.getsize(file),
        seconds=round(reached.seconds, 1),
        note=_note(job, recipe, shipped),
    )
    processes.first(lambda: write_row(folder, row, file=file, history=reached.history))
    return row


def _reused(row: Row, progress: Progress) -> Row:
    progress.say(f"{row.name}: finished earlier, {row.test_accuracy:.2%} on the test split; reused.")
    return row


def _as_json(row: Row | None) -> Json:
    return None if row is None else asdict(row)


def _check_alike(job: Job, name: str, recipe: Recipe, first: State) -> None:
    """That each process begins with the same: what a recipe found in the data is in no state, but in its network."""
    if job.processes.count > 1:
        seen = recipe.transform.apply(first, recipe.variables["params"])
        job.processes.alike(f"{name}: what is found before the first step", (seen, recipe.beside))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as e:
        raise RunError(f"the folder {str(folder)!r} cannot be made: {e.strerror}; choose another with --out.") from e


def _recipe(job: Job, name: str) -> tuple[Recipe, OptimConfig]:
    """What is trained, and how."""
    model = cast(nn.Module, job.model)  # the one that make_model built: rows have other networks, the job has it
    if name == BASELINE:
        params, batch_stats = init_variables(model, job.data, job.config.seed)
        return Recipe(jc.core.identity(), model, {"params": params, "batch_stats": batch_stats}), job.config.baseline
    optim = job.config.finetune
    saved = jc.load(job.config.folder / f"{BASELINE}.safetensors")
    steps = optim.epochs * (len(job.data.train) // job.config.batch)
    start = Start(model, job.data, saved, steps, job.config.folder / name if job.processes.writes else None)
    recipe = method_named(name).make(start)
    _check_coding(name, recipe)
    return recipe, replace(optim, learning_rate=job.config.baseline.learning_rate) if recipe.rewound else optim


def _teacher(job: Job, name: str) -> Teacher | None:
    """The float baseline, for a row that learns from it."""
    if not name.endswith(TAUGHT):
        return None
    return Teacher(job.model, jc.load(job.config.folder / f"{BASELINE}.safetensors"), job.config.distill)


def _check_coding(name: str, recipe: Recipe) -> None:
    """Before the training, that its file can be written after it.

    Raises:
      RunError: what codes is not installed.
    """
    try:
        if recipe.coding is not None:
            check(recipe.coding, owner=name)
    except ImportError as e:
        raise RunError(f"{name}: {e}.") from e


def _accuracy(job: Job, params: Params, batch_stats: PyTree) -> float:
    """On the test split, of parameters that may be compressed."""
    return accuracy(job.predict, jc.materialize(params), batch_stats, job.data.test, job.processes)


def _judge_file(job: Job, recipe: Recipe, file: Path, shipped: dict[str, PyTree]) -> float:
    """Test accuracy of the file, which must be that of what was trained.

    Raises:
      TrainingError: it is not.
    """

    def judge(held: dict[str, PyTree]) -> float:
        judged = job.on(recipe.opened(held)) if recipe.opened else job
        if recipe.integer:
            return accuracy(judged.predict, held["params"], held["batch_stats"], job.data.test, job.processes)
        return _accuracy(judged, held["params"], held["batch_stats"])

    trained, loaded = judge(shipped), judge(jc.load(file))
    if trained != loaded:
        raise TrainingError(f"{file.name}: accuracy {loaded:.4%} after loading, {trained:.4%} before saving.")
    return loaded


def _note(job: Job, recipe: Recipe, shipped: dict[str, PyTree]) -> str:
    if not recipe.integer:
        return ""
    fake = _accuracy(job, shipped["params"], shipped["batch_stats"])
    return f"judged on int8 products with int32 sums; rounded in float, as it was trained, it has {fake:.2%}"


def _fraction_of_zeros(params: Params) -> float:
    zeros, total = zeros_counted(params)
    return zeros / total
