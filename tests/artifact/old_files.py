"""Files of versions 1 and 2, as jaxcomp wrote them before tensors had numbers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

NAMES = {"float32": "F32", "uint8": "U8", "int32": "I32", "int8": "I8"}


def write_old(path: Path, tree: Any, tensors: dict[str, np.ndarray], **more: Any) -> None:
    """A file of version 1, or of 2 where ``same=`` says which tensors are equal."""
    described = {"version": 2 if "same" in more else 1, "tree": tree, "metadata": {}, **more}
    sha = hashlib.sha256(json.dumps(described, separators=(",", ":")).encode())
    for name in sorted(tensors):
        x = tensors[name]
        sha.update(f"\n{name} {NAMES[x.dtype.name]} {list(x.shape)}\n".encode() + x.tobytes())
    described["sha256"] = sha.hexdigest()
    safetensors.numpy.save_file(tensors, path, metadata={"jaxcomp": json.dumps(described, separators=(",", ":"))})
