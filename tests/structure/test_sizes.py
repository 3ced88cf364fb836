"""Full-size networks are analysed on shapes alone, by work that grows with the program; seconds: the benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from jaxcomp.structure import channel_groups
from tests.full_size import Decoder, ResNet50, decoder, resnet_50


def calls(fn: Callable[[], object]) -> int:
    """How many Python functions are called: a measure of work that a busy machine does not change."""
    count = 0

    def count_call(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(count_call)
    try:
        fn()
    finally:
        sys.setprofile(before)
    return count


def test_resnet_50():
    shapes, image = resnet_50()
    groups = channel_groups(ResNet50().apply)(shapes, image)
    assert sorted(g.units for g in groups) == sorted([64] * 7 + [128] * 8 + [256] * 13 + [512] * 7 + [1024, 2048])
    assert groups.parameters() == 25_557_032 + 2 * 26_560  # with the batch statistics
    assert 4.0e9 < groups.macs() < 4.2e9


def test_a_transformer_of_a_billion():
    shapes, tokens = decoder()
    groups = channel_groups(Decoder().apply)(shapes, tokens)
    assert groups.parameters() > 1.1e9
    assert sorted({g.units for g in groups}) == [32, 64, 5632]
    assert len(groups) == 22 * 4


def test_fault_10_the_work_grows_with_the_depth_and_not_with_its_square():
    work = {}
    for layers in (4, 8, 16):
        read, made = channel_groups(Decoder(layers, 256).apply), decoder(layers, width=256)
        work[layers] = calls(partial(read, *made))
    # Twice the layers, twice the work; four times, were it to grow with the square.
    assert (work[16] - work[8]) / (work[8] - work[4]) < 2.5, work
