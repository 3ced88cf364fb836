"""``compress``: as small as a budget says, as good as a quality says, in one call whose decisions can be inspected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.batches import as_batch, checked_batches
from jaxcomp.core.paths import Where
from jaxcomp.core.types import Params, PyTree
from jaxcomp.search.budgets import Budget, Quality, limits_of
from jaxcomp.search.building import Builder
from jaxcomp.search.channels import LEVELS
from jaxcomp.search.judging import Judge
from jaxcomp.search.measures import Measure, noise
from jaxcomp.search.menus import Menu, Terms, choosing
from jaxcomp.search.plans import Plan
from jaxcomp.search.recovery import Recovery
from jaxcomp.search.results import Compressed
from jaxcomp.search.running import Run, timed

Fn = Callable[..., PyTree]


def compress(
    fn: Fn,
    params: Params,
    data: Iterable[PyTree],
    *,
    budget: Budget | None = None,
    quality: Quality | None = None,
    options: Menu | None = None,
    where: Where | None = None,
    keep: Where | None = None,
    tied: Mapping[str, Where] | None = None,
    channels: Sequence[float] | None = None,
    terms: Terms | None = None,
    measure: Measure = noise,
    recover: Recovery | None = None,
    second_order: bool = True,
    rounds: int = 1,
    plan: Plan | None = None,
    folder: str | Path | None = None,
) -> Compressed:
    """Compresses a network to a budget with the least harm, or as far as a quality allows; without labels.

    It measures what each leaf's options lose and take, allocates exactly, compares the best plans as a whole, applies
    the best, trains it again if asked to or else rounds it by second order where that is nearer, and judges it on data
    that took no part.

    Args:
      fn: ``fn(params, *args)``.
      params: its parameters, of floating arrays.
      data: batches, at least two: of each the arguments behind the parameters, as a tuple, or the only one. The last
        quarter is kept for the judgement.
      budget: how many times smaller the file is, ``8``; or of several costs, ``{"bytes": 1e6, "macs": Smaller(2)}``.
      quality: what must be kept of a score of your own. Without a budget, the smallest network that keeps it is looked
        for, among those of the least loss at their size.
      options: what each leaf may become; :func:`~jaxcomp.search.menus.menu` by default.
      where, keep, tied: which leaves, as of :func:`~jaxcomp.search.menus.choosing`.
      channels: the parts of each group of channels that may stay; by default none goes, unless a budget is of "macs",
        "bops" or "seconds".
      terms: how costs are counted: the file's coding, the width of activations, the device.
      measure: the distance from the original's outputs; ``kl`` for logits.
      recover: fine-tuning; None does none.
      second_order: without fine-tuning, round by the column solver of :func:`~jaxcomp.ptq.second_order.gptq`, and keep
        that where it is nearer.
      rounds: how often losses are measured again around the best plan, where errors meet.
      plan: a decision of your own, or of an earlier call, changed: nothing is measured.
      folder: where files are written, and where a killed run goes on: what was measured, plan.json (an edited one is
        taken, so long as the budget is the same), the network and a report.

    Raises:
      TypeError: a function, data or a quality that is none.
      Infeasible: no plan meets the budget; the nearest one is named.
      ValueError: neither budget nor quality; fewer than two batches; outputs or losses that are not finite; what is
        wrong with a rule, an option or a plan.

    >>> import jax.numpy as jnp
    >>> k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    >>> params = {"up": jax.random.normal(k1, (64, 256)), "down": jax.random.normal(k2, (256, 64))}
    >>> data = list(jax.random.normal(k3, (4, 128, 64)))
    >>> done = compress(lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"], params, data, budget=8, rounds=0)
    >>> done.ratio >= 8, done.plan.gap, done.met
    (True, 0.0, True)
    """
    if budget is None and quality is None and plan is None:
        raise ValueError("compress: give a budget, such as budget=8 for a file 8 times smaller, or a quality to keep.")
    _check(fn, quality)
    params = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, params)
    batches = [as_batch(batch) for batch in checked_batches("compress", data)]
    if len(batches) < 2:
        raise ValueError(f"compress: wants two batches or more, the last of them to judge by, got {len(batches)}.")
    held = max(1, len(batches) // 4)
    menus = choosing(fn, params, *batches[0], options=options, where=where, keep=keep, tied=tied, terms=terms)
    seconds: dict[str, float] = {}
    with timed(seconds, "compiling"):
        judge = Judge(fn, params, batches[:-held], measure=measure)
        final = Judge(fn, params, batches[-held:], measure=measure)
    run = Run(Builder(fn, menus, judge), final, rounds, quality, recover, second_order, _folder(folder), seconds)
    run.limits = limits_of(budget, run.builder.original)
    narrows = channels if channels is not None else (LEVELS if {"macs", "bops", "seconds"} & set(run.limits) else None)
    return run.finish(run.decided(narrows, plan))


def _check(fn: object, quality: object) -> None:
    """Raises TypeError where a function or a quality is none."""
    if quality is not None and not isinstance(quality, Quality):
        raise TypeError(f"compress: quality= wants Quality(measure, drop=0.01) around a score, got {quality!r}.")
    if not callable(fn):
        raise TypeError(
            f"compress: wants fn(params, *args) first, got {type(fn).__name__}; write compress(fn, params, data)."
        )


def _folder(folder: str | Path | None) -> Path | None:
    if folder is None:
        return None
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"compress: folder={str(path)!r} is a file; name a folder, which is made if there is none.")
    path.mkdir(parents=True, exist_ok=True)
    return path
