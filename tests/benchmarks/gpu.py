"""What a GPU must show, beside raw XLA and qwix: ``python -m tests.benchmarks gpu --json FILE``.

A section runs alone as ``gpu.SECTION``, see ``SECTIONS``. All of them are to take less than five minutes on an H100:
after that nothing more is begun, and the rows say so. The file holds every table that was printed, however the run
ends, and a case that fails is a row with its error. ``--toy`` runs everything at sizes for which a CPU takes minutes:
it shows that each case runs, or why not, and its ratios mean nothing. Aims are those of an H100. qwix's rows need the
extra ``benchmarks``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

import jax

from tests.benchmarks import gpu_cache, gpu_methods, gpu_networks, gpu_products
from tests.benchmarks.gpu_cases import Setting, said
from tests.benchmarks.timing import Report, Row

SECONDS = 285.0
TOY_SECONDS = 1800.0
SECTIONS: dict[str, Callable[[Setting], Iterator[Report]]] = {
    "precision": gpu_products.precision,
    "bandwidth": gpu_products.bandwidth,
    "dots": gpu_products.dots,
    "decode": gpu_products.decode,
    "cache": gpu_cache.cache,
    "quantize": gpu_methods.quantize,
    "kmeans": gpu_methods.kmeans,
    "masks": gpu_methods.masks,
    "inference": gpu_networks.inference,
    "qat_resnet": gpu_networks.qat_resnet,
    "qat_vit": gpu_networks.qat_vit,
}


def sections(name: str, *, toy: bool) -> Callable[[], Iterator[Report]]:
    """What runs the section of this name, or all of them for an empty one.

    Raises:
      ValueError: there is no such section, or no GPU for the full size.
    """
    if name and name not in SECTIONS:
        raise ValueError(f"gpu has no section {name!r}; there are {', '.join(SECTIONS)}")
    # Before the first array: the largest section keeps 8 GB of weights and their copies.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    if not toy and jax.default_backend() == "cpu":
        raise ValueError("gpu wants a GPU, and JAX sees CPUs alone; --toy runs all of it here, at toy size")
    return partial(run, [name] if name else list(SECTIONS), toy=toy)


def run(names: list[str], *, toy: bool) -> Iterator[Report]:
    """The reports of these sections; one that fails is a report that says so."""
    setting = Setting.lasting(TOY_SECONDS if toy else SECONDS, toy=toy)
    for name in names:
        try:
            yield from SECTIONS[name](setting)
        except Exception as error:
            yield Report(f"gpu.{name}", "nothing", [Row.failed(name, said(error))], ["the section stopped here"])
