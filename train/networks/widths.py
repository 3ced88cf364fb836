"""The widths of networks: what a class is built with, or read off the shapes of parameters that were made smaller."""

from __future__ import annotations

from collections.abc import Mapping

Widths = tuple[int, tuple[tuple[int, int], ...]]
"""Channels of ResNet-18: the stem's, then for each of the eight blocks its inner and its outer convolution's."""

Shapes = Mapping[str, tuple[int, ...]]
"""Parameters' shapes by path, as ``jaxcomp.structure.Plan.widths`` has them; every ``widths`` below takes them too."""


def outputs_of(shapes: Shapes, kernel: str) -> int:
    """The output channels of one layer.

    >>> outputs_of({"params/stem/kernel": (3, 3, 1, 24)}, "stem/kernel")
    24

    Raises:
      ValueError: the shapes have no such kernel, or more than one.
    """
    found = [shape for path, shape in shapes.items() if path == kernel or path.endswith("/" + kernel)]
    if len(found) != 1:
        raise ValueError(
            f"widths: of {kernel!r} there must be one, found {len(found)} in {', '.join(shapes) or 'no shapes'}; pass"
            " plan.widths of this very network."
        )
    return found[0][-1]


def chain_widths(widths: tuple[int, ...] | Shapes, layer: str) -> tuple[int, ...]:
    """The widths of ``layer_0``, ``layer_1``, …, given as they are or read off shapes.

    >>> chain_widths({"dense_0/kernel": (64, 32), "dense_1/kernel": (32, 16), "head/kernel": (16, 10)}, "dense")
    (32, 16)
    """
    if not isinstance(widths, Mapping):
        return widths
    count = sum(path.split("/")[-2].startswith(f"{layer}_") for path in widths if path.endswith("/kernel"))
    return tuple(outputs_of(widths, f"{layer}_{i}/kernel") for i in range(count))


def resnet18_widths(width: int) -> Widths:
    """The widths of an unpruned ResNet-18: ``width`` channels in the first stage, doubled in each of the next three.

    >>> resnet18_widths(64)
    (64, ((64, 64), (64, 64), (128, 128), (128, 128), (256, 256), (256, 256), (512, 512), (512, 512)))
    """
    return width, tuple((width * 2**stage, width * 2**stage) for stage in range(4) for _ in range(2))


def resnet18_plan(width: int, widths: Widths | Shapes | None) -> tuple[int, list[tuple[int, int, int]]]:
    """The stem's channels and each block's ``(inner, outer, stride)``; ``widths`` wins over ``width``.

    Blocks 2, 4 and 6 (from 0) halve the image and have a projection on the shortcut. The others add their input
    as it is, so their outer width must be that of what they are given.

    Raises:
      ValueError: not eight blocks, a width under 1, or an outer width that the shortcut cannot match.
    """
    if isinstance(widths, Mapping):
        names = [f"block_{i}/conv_{j}/kernel" for i in range(8) for j in (1, 2)]
        channels = [outputs_of(widths, name) for name in names]
        widths = outputs_of(widths, "stem/kernel"), tuple(zip(channels[::2], channels[1::2], strict=True))
    stem, blocks = resnet18_widths(width) if widths is None else widths
    if len(blocks) != 8 or any(len(b) != 2 for b in blocks) or min(stem, *(c for b in blocks for c in b)) < 1:
        raise ValueError(f"ResNet18: widths must be (stem, eight pairs (inner, outer)), all >= 1, got {(stem, blocks)}")
    plan, given = [], stem
    for i, (inner, outer) in enumerate(blocks):
        stride = 2 if i in (2, 4, 6) else 1
        if stride == 1 and outer != given:
            raise ValueError(f"ResNet18: block_{i} adds its {given} input channels to its output, got outer={outer}")
        plan.append((inner, outer, stride))
        given = outer
    return stem, plan
