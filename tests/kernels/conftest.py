"""Kinds of processors whose code is tested where it can run."""

from __future__ import annotations

import pytest

from jaxcomp.kernels import llvm_amx, llvm_calls, llvm_depthwise, llvm_integers, llvm_panels

PROCESSORS = {
    "avx2": {"avx2"},
    "vnni": {"avx2", "avxvnni"},
    "vnni of 512 bits": {"avx2", "avx512f", "avx512vnni"},
    "amx": {"avx2", "avx512f", "avx512vnni", "avx512bw", "amx-int8"},
}


@pytest.fixture(params=PROCESSORS)
def processor(request, monkeypatch) -> str:
    """The code for one kind of them is chosen; what this one cannot run is skipped."""
    pytest.importorskip("llvmlite")
    wanted = frozenset(PROCESSORS[request.param])
    if lacking := wanted - llvm_panels.features():
        pytest.skip(f"the processor has no {', '.join(sorted(lacking))}")
    for module in (llvm_calls, llvm_panels, llvm_amx, llvm_integers, llvm_depthwise):
        monkeypatch.setattr(module, "features", lambda: wanted)
    if request.param == "amx" and (why := llvm_amx.refusal(llvm_amx.ROWS)):
        pytest.skip(why)
    return request.param
