"""The published GPTQ codes, for rows beside our column solver: int4 a column, symmetric, blocks of 128.

IST's is the authors', in torch: no package, so a folder with the files of IST-DASLab/gptq is named by ``JAXCOMP_IST``.
qwix's is in its ``contrib``. Both packages are in the extra ``benchmarks``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import sys
import types
from collections.abc import Callable, Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

INSTALL = 'pip install -e ".[benchmarks]"'
IST = "JAXCOMP_IST"
Solver = Callable[[], np.ndarray]
"""Solves, and gives the weight on its grid, ``(inputs, columns)``."""


def peers(w: np.ndarray, h: np.ndarray, *, eager: bool) -> tuple[dict[str, Solver], list[str]]:
    """Each peer that is to be had, by its name and version, at work on this weight and these moments; who is not.

    Args:
      w: the weight, ``(inputs, columns)``.
      h: second moments of its inputs.
      eager: whether qwix is among them, whose every row is a few calls of new shapes: minutes at any size.
    """
    found: dict[str, Solver] = {}
    missing = []
    if importlib.util.find_spec("torch") is None:
        missing.append(f"no row for IST's code, for torch is not installed: {INSTALL}")
    elif not os.environ.get(IST):
        missing.append(f"no row for IST's code: name a folder with the files of IST-DASLab/gptq by {IST}")
    else:
        found[f"IST's, torch {importlib.metadata.version('torch')}"] = ist(w, h, os.environ[IST])
    if not eager:
        missing.append("no row for qwix at toy size")
    elif importlib.util.find_spec("qwix") is None:
        missing.append(f"no row for qwix, which is not installed: {INSTALL}")
    else:
        found[f"qwix {importlib.metadata.version('qwix')}"] = qwix(w, h)
    return found, missing


def ist(w: np.ndarray, h: np.ndarray, folder: str) -> Solver:
    """The authors' code, large inputs first as ours.

    Raises:
      ValueError: the folder has not their files.
    """
    import torch

    theirs = _ist_module(folder)
    weight, moments = torch.tensor(w.T.copy()), torch.tensor(h)
    layer = torch.nn.Linear(*w.shape, bias=False)

    def solved() -> np.ndarray:
        layer.weight.data = weight.clone()
        solver = theirs.GPTQ(layer)
        solver.H = moments.clone()
        solver.quantizer = theirs.Quantizer()
        solver.quantizer.configure(4, perchannel=True, sym=True, mse=False)
        with torch.no_grad(), _quiet(torch):
            solver.fasterquant(blocksize=128, percdamp=0.01, actorder=True)
        return layer.weight.data.numpy().T

    return solved


def _ist_module(folder: str) -> types.ModuleType:
    """Their ``gptq``, without the package ``transformers``, of which they ask one class alone."""
    stand_in = types.ModuleType("transformers")
    stand_in.Conv1D = type("Conv1D", (), {})
    known = {} if importlib.util.find_spec("transformers") else {"transformers": stand_in}
    with mock.patch.object(sys, "path", [folder, *sys.path]), mock.patch.dict(sys.modules, known):
        try:
            return importlib.import_module("gptq")
        except ModuleNotFoundError as e:
            raise ValueError(
                f"{IST}: {folder!r} has no module {e.name!r}; it wants the files of IST-DASLab/gptq."
            ) from e


@contextlib.contextmanager
def _quiet(torch: types.ModuleType) -> Iterator[None]:
    """What they print goes nowhere, and they wait for a GPU where there is one alone."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch.object(torch.cuda, "synchronize", return_value=None))
        yield


def qwix(w: np.ndarray, h: np.ndarray) -> Solver:
    """qwix's, inputs in their own order and scales of its own: it has no others."""
    from qwix._src.core import qarray
    from qwix.contrib import gptq_core

    how = qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=(0,), tiled_axes={}, calibration_method="absmax")
    weight, moments = jnp.array(w.T), jnp.array(h)

    def solved() -> np.ndarray:
        done, _ = gptq_core.quantize_weight(weight, moments, how)
        return np.asarray(jax.block_until_ready(qarray.dequantize(done))).T

    return solved
