"""What ``jaxcomp compress`` does: a file of weights, a function and samples become a smaller file, and a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from jaxcomp.core.types import Params, PyTree
from jaxcomp.core.words import shape_words
from jaxcomp.export.command import function_of
from jaxcomp.export.errors import ExportError
from jaxcomp.search.budgets import Smaller
from jaxcomp.search.compressing import compress
from jaxcomp.search.measures import kl, noise
from jaxcomp.search.menus import Terms
from jaxcomp.search.results import Compressed

MEASURES = {"noise": noise, "kl": kl}
_BATCH = 64


def compress_file(
    tree: Params,
    fn: str,
    samples: Sequence[Path],
    *,
    out: Path,
    ratio: float,
    macs: float | None,
    measure: Literal["noise", "kl"],
    coding: Literal["ans", "zstd", "none"],
    keep: str,
) -> Compressed:
    """Compresses a tree to a budget, and writes the folder.

    Args:
      tree: of arrays.
      fn: ``"module:function"`` of the parameters and the arguments.
      samples: .npy files, one an argument, of examples along the first axis.
      out: the folder.
      ratio: how many times smaller the file is.
      macs: how many times fewer multiply-accumulates; None asks for none.
      measure: the distance from the original's outputs.
      coding: of the file.
      keep: a rule of paths that stay as they are; "" keeps none.

    Raises:
      ValueError: a function that cannot be had, samples that are too few or of different lengths, what ``compress``
        raises.
    """
    try:
        function = function_of(fn)
    except ExportError as e:
        raise ValueError(str(e).replace("export:", "compress:", 1)) from e
    batches = batches_of(samples)
    _check_call(function, fn, tree, batches[0])
    budget = {"bytes": Smaller(ratio)} | ({} if macs is None else {"macs": Smaller(macs)})
    return compress(
        function,
        tree,
        batches,
        budget=budget,
        measure=MEASURES[measure],
        terms=Terms(coding=None if coding == "none" else coding),
        keep=keep or None,
        folder=out,
    )


def _check_call(function: Callable[..., PyTree], name: str, tree: Params, batch: Sequence[np.ndarray]) -> None:
    """Raises ValueError, in one line, where a function does not take a tree and a batch."""
    try:
        jax.eval_shape(function, tree, *batch)
    except Exception as e:  # whatever the user's function raises
        words = ", ".join(shape_words(x.shape) + f" of {x.dtype}" for x in batch)
        said = " ".join(str(e).split())
        raise ValueError(
            f"compress: --fn {name} does not take the file's parameters and --samples, a batch of {words}:"
            f" {type(e).__name__}: {said:.300}"
        ) from e


def batches_of(samples: Sequence[Path]) -> list[tuple[np.ndarray, ...]]:
    """At least four batches of equal sizes, of up to 64 examples.

    Raises:
      ValueError: no file, files of different lengths, or fewer than four examples.
    """
    if not samples:
        raise ValueError("compress: give --samples, a .npy file for each argument of the function.")
    arrays = [np.load(path, allow_pickle=False) for path in samples]
    lengths = {len(array) if array.ndim else 0 for array in arrays}
    if len(lengths) != 1 or min(lengths) < 4:
        raise ValueError(
            f"compress: --samples want as many examples each along the first axis, four or more, got {sorted(lengths)}."
        )
    count = lengths.pop()
    size = min(_BATCH, count // 4)
    return [tuple(array[i : i + size] for array in arrays) for i in range(0, count - size + 1, size)]
