"""No mask, threshold, quantizer or k-means gathers a weight on a mesh, and none gives other bits than one device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache

import pytest

from tests.collectives import CASES, SPLITS, least_of, sent


@cache
def ran(*args: str) -> list[tuple[str, str, bool, dict[str, int], bool]]:
    env = {k: v for k, v in os.environ.items() if k not in {"XLA_FLAGS", "JAX_PLATFORMS"}}
    command = [sys.executable, "-m", "tests.collectives", "--json", *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def check(name: str, *args: str) -> None:
    """Bits as on one device; of gathers there are none, but of scales."""
    found = [row for row in ran(*args) if row[0] == name]
    assert len(found) == 2 * len(SPLITS)
    for _, split, packed, ops, equal in found:
        assert equal, f"{split}, packed {packed}: other bits than on one device"
        # On Auto axes XLA chooses how a packed result lies, and may take it whole on each device.
        least = least_of(name)
        most = least / 8 if packed and "--auto" in args else least / 32
        assert ops.get("all-gather", 0) <= most, f"{split}, packed {packed}: {ops}"


def test_global_masks_with_ties_send_counts_alone() -> None:
    check("global mask", "global mask")
    assert all(ops["all-reduce"] <= 64 for _, _, _, ops, _ in ran("global mask"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("axes", ["explicit", "auto"])
def test_nothing_gathers_a_weight(name: str, axes: str) -> None:
    check(name, *(["--auto"] if axes == "auto" else []))


@pytest.mark.slow
def test_low_rank_gathers_one_leaf_after_another() -> None:
    ((order,),) = ran("--order")
    assert re.fullmatch("(g+s){3}", order), order


def test_collectives_are_read_in_compiled_text() -> None:
    text = (
        "%a = (f32[2,8]{1,0}, s8[4]{0}) all-to-all(%x, %y)\n%b = u32[] all-reduce-start(%c)\n%d = pred[16]{0} add(%e)"
    )
    assert sent(text) == {"all-to-all": 64, "all-reduce": 4}
