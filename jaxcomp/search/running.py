"""One call of ``compress``: deciding, recovering, judging, writing."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import jax

from jaxcomp.artifact.files import save
from jaxcomp.core.batches import Batch, as_batch
from jaxcomp.core.leaves import materialize, pack
from jaxcomp.core.types import Params, PyTree
from jaxcomp.report.frontier import Point
from jaxcomp.search.allocation import Infeasible, allocate, frontier
from jaxcomp.search.budgets import Quality
from jaxcomp.search.building import Builder, Built
from jaxcomp.search.channels import undominated
from jaxcomp.search.judging import Judge
from jaxcomp.search.measuring import around, checksum, fingerprint, measured, same_as_before
from jaxcomp.search.options import Table
from jaxcomp.search.plans import Plan
from jaxcomp.search.recovery import Recovery, Trainer
from jaxcomp.search.results import Compressed
from jaxcomp.search.solving import solved

Fn = Callable[..., PyTree]
_TIGHTER = 8
_TRAINED = 0.98
"""The part of a budget of bytes that is planned for where the codes are trained and then coded to their entropy."""


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the block's wall time to a stage."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass
class Run:
    """What a call was given, and what it has found so far."""

    builder: Builder
    final: Judge
    rounds: int
    quality: Quality | None
    recover: Recovery | None
    second_order: bool
    folder: Path | None
    seconds: dict[str, float]
    limits: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    @cached_property
    def fingerprint(self) -> str:
        """Of what files in the folder are of; nothing is read for it where there is none."""
        return "" if self.folder is None else fingerprint(self.builder.menus, self.builder.judge)

    # Deciding

    def decided(self, channels: Sequence[float] | None, plan: Plan | None) -> Built:
        """The plan, made real within the budgets."""
        if plan is not None:
            return self.builder.built(plan)
        with timed(self.seconds, "measuring"):
            file = self._file("measured.json")
            same = same_as_before(file, self.fingerprint)
            table = measured(self.builder.menus, self.builder.judge, file, mark=self.fingerprint)
            if channels is not None:
                table = self.builder.with_channels(undominated(table), channels)
        with timed(self.seconds, "deciding"):
            if (found := self._read_plan(table, same=same)) is not None:
                return self.builder.built(found)
            best = self._fitted(table) if self.limits else self._walked(table)
        if self.folder is not None:
            best.plan.save(self.folder / "plan.json")
        return best

    def _read_plan(self, table: Table, *, same: bool) -> Plan | None:
        """The one in the folder, perhaps edited, if it was made of this network, its data, and for these budgets."""
        file = self._file("plan.json")
        if file is None or not file.exists():
            return None
        held = Plan.load(file)
        if not same or held.budgets != self.limits or [u.name for u in held.table] != [u.name for u in table]:
            what = "budgets or units" if same else "parameters, data, options or terms"
            self.notes.append(f"The plan that was in {file} is of other {what}, and is written anew.")
            return None
        self.notes.append(f"The plan is that of {file}.")
        return held

    def _fitted(self, table: Table) -> Built:
        """The best plan whose file is within the budget too: the sum over leaves is not quite the file."""
        asked = dict(self.limits)
        if self.recover is not None and self.builder.menus.terms.coding is not None and "bytes" in asked:
            asked["bytes"] *= _TRAINED
        aim = dict(asked)
        for _ in range(_TIGHTER):
            built = self.builder.built(self._best(table, aim))
            over = {k: built.costs[k] / limit for k, limit in asked.items() if built.costs[k] > limit}
            if not over:
                return built
            aim |= {k: aim[k] / factor * 0.999 for k, factor in over.items()}
        names = ", ".join(f"{built.costs[k]:,.10g} {k} of {self.limits[k]:,.10g}" for k in over)
        raise Infeasible(f"compress: after {_TIGHTER} tries the network still takes {names}.", built.plan)

    def _best(self, table: Table, limits: Mapping[str, float]) -> Plan:
        """Of the allocated plan and uniform ones the one that is nearest to the original as a whole; then refined."""
        plans = [allocate(table, limits), *self._uniform(table, limits)]
        near = [self.builder.distance(plan) for plan in plans]
        at = min(range(len(plans)), key=near.__getitem__)
        best, distance = plans[at], near[at]
        for _ in range(self.rounds if self.builder.widths is None else 0):
            again = allocate(around(self.builder.menus, self.builder.judge, best), limits)
            found = self.builder.distance(again)
            if found >= distance:
                break
            best, distance = Plan(table, again.choice, dict(limits)), found
        return Plan(table, best.choice, dict(self.limits), bound=best.bound if best is plans[0] else math.nan)

    def _uniform(self, table: Table, limits: Mapping[str, float]) -> list[Plan]:
        """Every unit alike, where that is within the budgets."""
        free = [unit for unit in table if len(unit.options) > 1]
        shared = [{option.label for option in unit.options} for unit in free]
        labels = [o.label for o in free[0].options if all(o.label in own for own in shared)] if free else []
        plans = []
        for label in labels:
            choice = {u.name: label if len(u.options) > 1 else u.options[0].label for u in table}
            plan = Plan(table, choice, dict(limits))
            if not plan.broken:
                plans.append(plan)
        return plans

    def _walked(self, table: Table) -> Built:
        """The smallest plan on the frontier that keeps the quality; all are judged: scores need not be monotone."""
        assert self.quality is not None
        original = self.score(self.builder.menus.params, self.builder.fn)
        tried: list[tuple[Built, float]] = []
        for plan in frontier(table, "bytes", points=10):
            built = self.builder.built(plan)
            tried.append((built, self.score(built.leaves, built.fn)))
            self.points.append(Point(f"plan {len(tried)}", int(built.costs["bytes"]), tried[-1][1]))
        good = [i for i, (_, score) in enumerate(tried) if self.quality.kept(score, original)]
        if not good:
            built, score = max(tried, key=lambda t: t[1] if self.quality and self.quality.higher else -t[1])
            raise Infeasible(
                f"compress: no plan keeps {self.quality.name} within {self.quality.drop:g} of {original:.6g}; the"
                f" nearest has {score:.6g} at {built.costs['bytes']:,.0f} bytes.",
                built.plan,
            )
        if worse := [i for i in range(good[0], len(tried)) if i not in good]:
            sizes = ", ".join(f"{tried[i][0].costs['bytes']:,.0f}" for i in worse)
            self.notes.append(f"{self.quality.name} is not monotone: larger plans, of {sizes} bytes, do not keep it.")
        return tried[good[0]][0]

    # Finishing

    def score(self, leaves: Params, fn: Fn) -> float:
        """On held-out data: the quality, or else the distance from the original.

        Raises:
          ValueError: a quality that is no number.
        """
        if self.quality is None:
            return self.final(leaves, None if fn is self.builder.fn else fn)
        dense, run = materialize(leaves), jax.jit(fn)
        value = float(self.quality.measure(lambda *args: run(dense, *args)))
        if math.isnan(value):
            raise ValueError(f"compress: the quality {self.quality.name!r} is NaN; mend its measure, or the data.")
        return value

    def finish(self, built: Built) -> Compressed:
        """Recovers, judges, writes."""
        with timed(self.seconds, "judging"):
            original = self.score(self.builder.menus.params, self.builder.fn)
            score = self.score(built.leaves, built.fn)
        leaves, costs = built.leaves, built.costs
        if self.recover is None and self.second_order and (better := self._solved(built)) is not None:
            leaves, costs = better
            score = self.score(leaves, built.fn)
            self.notes.append("Rounded by second order.")
        if self.recover is not None:
            with timed(self.seconds, "recovering"):
                leaves = self._recovered(built, self.recover)
            self.notes.append(f"Before recovery: {score:.6g}.")
            costs, score = self.builder.costs(built.plan, leaves), self.score(leaves, built.fn)
        sizes = int(self.builder.original["bytes"]), int(costs["bytes"])
        self.points += [Point("original", sizes[0], original), Point("this", sizes[1], score)]
        done = Compressed(
            params=leaves,
            original=self.builder.fn,
            before=self.builder.menus.params,
            plan=built.plan,
            kept=built.kept,
            coding=self.builder.menus.terms.coding,
            costs=costs,
            costs_before=self.builder.original,
            score=score,
            score_before=original,
            score_name=self.quality.name if self.quality else f"{self.final.measure.name} on held-out data",
            higher=bool(self.quality and self.quality.higher),
            met=not self._missed(costs, score, original),
            points=tuple(self.points),
            notes=tuple(self.notes),
            seconds=dict(self.seconds),
        )
        self._write(done)
        return done

    def _solved(self, built: Built) -> tuple[Params, dict[str, float]] | None:
        """The leaves by the column solver, where they are nearer to the original and within the budgets."""
        transform, judge = built.plan.transform, self.builder.judge
        with timed(self.seconds, "solving"):
            made = transform.apply(transform.init(built.params), built.params)
            leaves = pack(solved(built.fn, built.params, made, judge.batches))
            costs = self.builder.costs(built.plan, leaves)
            fits = all(costs[k] <= limit for k, limit in self.limits.items() if built.costs[k] <= limit)
            other = None if built.fn is self.builder.fn else built.fn
            return (leaves, costs) if fits and judge(leaves, other) < judge(built.leaves, other) else None

    def _missed(self, costs: Mapping[str, float], score: float, original: float) -> list[str]:
        """What of budget and quality is not kept, in words, and as a warning."""
        missed = [f"{costs[k]:,.10g} {k} of {limit:,.10g}" for k, limit in self.limits.items() if costs[k] > limit]
        if self.quality and not self.quality.kept(score, original):
            missed.append(f"{self.quality.name} {score:.6g}, more than {self.quality.drop:g} from {original:.6g}")
        if missed:
            warnings.warn(f"compress: not kept: {'; '.join(missed)}.", stacklevel=4)
        return missed

    def _recovered(self, built: Built, recover: Recovery) -> Params:
        transform, judge = built.plan.transform, self.builder.judge
        batches = judge.batches if recover.batches is None else [as_batch(batch) for batch in recover.batches]
        trainer = Trainer(
            recover,
            built.fn,
            teacher=partial(self.builder.fn, materialize(self.builder.menus.params)),
            measure=judge.measure,
            transform=transform,
            state=transform.init(built.params),
            batches=batches,
            arguments=len(judge.batches[0]),
            file=self._file("recovery.safetensors"),
            mark=self._mark(built, recover, batches),
        )
        return pack(transform.apply(trainer.state, trainer.run(built.params)))

    def _mark(self, built: Built, recover: Recovery, batches: Sequence[Batch]) -> str:
        """Of what a training is that may be gone on with; functions of the user's own have no mark."""
        if self.folder is None:
            return ""
        how = (recover.steps, recover.distill, recover.learning_rate, len(batches), checksum(batches[0]))
        return f"{self.fingerprint} {sorted(built.plan.choice.items())} {how}"

    def _write(self, done: Compressed) -> None:
        if self.folder is None:
            return
        tree = {"params": done.params} if done.kept is None else {"params": done.params, "kept": list(done.kept.kept)}
        save(self.folder / "compressed.safetensors", tree, coding=self.builder.menus.terms.coding)
        done.plan.save(self.folder / "plan.json")
        done.report().save(self.folder / "report.md")

    def _file(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name
