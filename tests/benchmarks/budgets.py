"""``compress`` under budgets beside recipes by hand, on a trained network of the main job: bytes, MACs, accuracy.

Command: ``python -m tests.benchmarks.budgets RUN [--steps 470] [--ratios 4 8 16 32] [--macs 2 4] [--out FOLDER]``, and
``--by-hand NAME...`` for some of the recipes alone.

RUN is the folder of a run such as ``python -m train fashion_mnist --baseline.epochs 2``. All rows are trained again for
as many steps with the same loss; accuracy is that on the test split, losses are measured on the training split. What
was stopped goes on with the rows that are not in FOLDER/rows.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomp as jc
from jaxcomp.recipes import deep_compression
from jaxcomp.search import Quality, Recovery, Smaller, Terms, compress, kl
from jaxcomp.search.recovery import Trainer
from train.configs import ModelConfig
from train.data.images import normalize
from train.data.sets import load
from train.experiments.main_job import make_model
from train.networks.compressed import calibration, inference

BATCH = 128


class Case:
    """A trained network with its data."""

    def __init__(self, run: Path, *, judged: int | None = None) -> None:
        about = jc.artifact.load_metadata(run / "baseline.safetensors")
        self.data = load(about["dataset"])
        model = make_model(ModelConfig(**about["model"]), self.data)
        held = jc.load(run / "baseline.safetensors")
        self.params = {k: jax.tree.map(jnp.asarray, held[k]) for k in ("params", "batch_stats") if k in held}
        self.fn = inference(model)
        self.judged = judged or len(self.data.test)

    def images(self, at: np.ndarray | slice) -> jax.Array:
        """Of the training split, as the network takes them."""
        return normalize(jnp.asarray(self.data.train.images[at]), self.data.mean, self.data.std)

    def accuracy(self, run: Callable[..., Any]) -> float:
        """On the test split."""
        right = 0
        for s in range(0, self.judged, 500):
            x = normalize(jnp.asarray(self.data.test.images[s : s + 500]), self.data.mean, self.data.std)
            right += int((np.asarray(run(x)).argmax(-1) == self.data.test.labels[s : s + 500]).sum())
        return right / self.judged

    def recovery(self, steps: int) -> Recovery | None:
        """The same for all rows: labels and the original's logits."""
        if not steps:
            return None
        rng, whole = np.random.default_rng(0), len(self.data.train) // BATCH
        epochs = [rng.permutation(len(self.data.train))[: whole * BATCH] for _ in range(-(-steps // whole))]
        batches = Batches(self, np.concatenate(epochs).reshape(-1, BATCH)[:steps])
        return Recovery(steps, batches, loss=cross_entropy)


class Batches(Sequence[Any]):
    """Batches of the training split, made when they are asked for."""

    def __init__(self, case: Case, order: np.ndarray) -> None:
        self.case, self.order = case, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: Any) -> Any:
        if i >= len(self.order):
            raise IndexError(i)
        at = self.order[i]
        return self.case.images(at), jnp.asarray(self.case.data.train.labels[at])


def cross_entropy(logits: jax.Array, x: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def by_hand(roles: jc.core.Roles) -> dict[str, jc.Transform]:
    """The recipes that are to be beaten."""
    sparse = jc.prune(0.8, scope=jc.Global(), roles=roles)
    return {
        "int8": jc.quantize(jc.Int(8), roles=roles),
        "int4": jc.quantize(jc.Int(4), roles=roles),
        "80% + int8": jc.chain(sparse, jc.quantize(jc.Int(8), roles=roles)),
        "deep compression 92%": deep_compression(0.92, 16, roles=roles),
    }


def hand_row(case: Case, name: str, transform: jc.Transform, recover: Recovery | None) -> dict[str, Any]:
    """One recipe, trained like the others."""
    start = time.perf_counter()
    state, params = transform.init(case.params), case.params
    if recover is not None:
        params = Trainer(
            recover,
            case.fn,
            teacher=partial(case.fn, case.params),
            measure=kl,
            transform=transform,
            state=state,
            batches=recover.batches or (),
            arguments=1,
        ).run(params)
    leaves = jc.pack(transform.apply(state, params))
    run = jax.jit(partial(case.fn, jc.materialize(leaves)))
    size = jc.artifact.file_size(leaves, coding="ans")
    return {"name": name, "bytes": size, "accuracy": case.accuracy(run), "seconds": time.perf_counter() - start}


def row(case: Case, name: str, budget: Any, recover: Recovery | None, folder: Path) -> dict[str, Any]:
    """One call of ``compress``; what an earlier one has measured of the same network is taken over."""
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    measured = next(iter(sorted(folder.parent.glob("*/measured.json"))), None)
    if measured is not None and measured.parent != folder:
        shutil.copy(measured, folder)
    done = compress(
        case.fn,
        case.params,
        calibration(case.data, examples=8 * 64, size=64),
        budget=budget,
        quality=Quality(case.accuracy, drop=1.0),
        measure=kl,
        terms=Terms(coding="ans"),
        recover=recover,
        folder=folder,
    )
    done.report(name).save(folder / "report.html")
    costs = {k: done.costs[k] for k in ("bytes", "macs")}
    times = {"ratio": done.ratio, "gap": done.plan.gap, "stages": dict(done.seconds)}
    return {"name": name, **costs, "accuracy": done.score, "seconds": time.perf_counter() - start, **times}


def draw(rows: list[dict[str, Any]], own: set[str], file: Path) -> None:
    """Accuracy against bytes: ours a line, the recipes points."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    ours = sorted((r for r in rows if r["name"] in own), key=lambda r: r["bytes"])
    axes.plot([r["bytes"] for r in ours], [r["accuracy"] for r in ours], "o-", label="compress")
    for r in rows:
        if r["name"] not in own:
            axes.plot(r["bytes"], r["accuracy"], "s", label=r["name"])
    axes.set(xscale="log", xlabel="bytes of the file", ylabel="accuracy on the test split")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.budgets", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=470)
    parser.add_argument("--ratios", type=float, nargs="*", default=[4.0, 8.0, 16.0, 32.0])
    parser.add_argument("--macs", type=float, nargs="*", default=[2.0, 4.0])
    parser.add_argument("--by-hand", nargs="*", metavar="NAME", help="of the recipes: int8, int4, ...; all by default")
    parser.add_argument("--judged", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/budgets"))
    args = parser.parse_args()
    case = Case(args.run, judged=args.judged)
    recover = case.recovery(args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    budgets = {f"{x:g}x bytes": x for x in args.ratios} | {f"{x:g}x MACs": {"macs": Smaller(x)} for x in args.macs}
    roles = jc.roles(case.fn)(case.params, case.images(slice(0, 1)))
    recipes = by_hand(roles)
    if unknown := set(args.by_hand or ()) - set(recipes):
        parser.error(f"no recipe is called {min(unknown)!r}; there are {', '.join(recipes)}")
    asked = recipes if args.by_hand is None else args.by_hand
    jobs = {name: partial(hand_row, case, name, recipes[name], recover) for name in asked}
    folder = {name: args.out / name.replace(" ", "_") for name in budgets}
    jobs |= {name: partial(row, case, name, b, recover, folder[name]) for name, b in budgets.items()}
    file = args.out / "rows.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    if not rows:
        original = case.accuracy(jax.jit(partial(case.fn, case.params)))
        rows.append({"name": "original", "bytes": jc.artifact.file_size(case.params), "accuracy": original})
    for name, job in jobs.items():
        if name not in {r["name"] for r in rows}:
            rows.append(job())
            print(json.dumps(rows[-1]), flush=True)
            file.write_text(json.dumps(rows, indent=1))
    draw(rows, {name for name in budgets if "bytes" in name}, args.out / "frontier.png")


if __name__ == "__main__":
    main()
