"""Other libraries' quantized training, for rows beside ours: 8-bit weights and activations, gradients in float.

Both are in the extra ``benchmarks``. qwix rewrites the model by its own provider. AQT's products are put in the place
of the model's by this package's evaluator, which spares the model a field for them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcomp.trace.evaluator import rewrite
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim

INSTALL = 'pip install -e ".[benchmarks]"'
Apply = Callable[..., Any]
"""``apply(variables, images) -> (logits, updated)``, in training mode."""


def peers(model: nn.Module) -> tuple[dict[str, Apply], list[str]]:
    """The model as each peer that is installed quantizes it, by the peer's name and version; and who is missing."""
    found: dict[str, Apply] = {}
    missing = []
    for name, package, quantized in (("qwix", "qwix", qwix), ("AQT", "aqtp", aqt)):
        if importlib.util.find_spec("qwix" if name == "qwix" else "aqt") is None:
            missing.append(f"no rows for {name}, which is not installed: {INSTALL}")
        else:
            found[f"{name} {importlib.metadata.version(package)}, W8A8"] = quantized(model)
    return found, missing


def training(model: nn.Module) -> Apply:
    """The model's own training mode."""
    return lambda variables, images: model.apply(variables, images, train=True, mutable=["batch_stats"])


def qwix(model: nn.Module) -> Apply:
    """qwix's provider for quantized training: weights by channel, activations by their own largest magnitude."""
    import qwix as peer

    rule = peer.QtRule(module_path=".*", weight_qtype=jnp.int8, act_qtype=jnp.int8)
    return training(peer.quantize_model(model, peer.QtProvider([rule])))


def aqt(model: nn.Module) -> Apply:
    """AQT's dots and convolutions, both factors in 8 bits forward, float backward."""
    from aqt.jax.v2 import aqt_conv_general, config

    dot = config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None)
    conv = aqt_conv_general.make_conv_general_dilated(aqt_conv_general.conv_general_dilated_make(2, 8, 8))
    wanted = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "feature_group_count")

    def handler(op: Op) -> Claim | None:
        params = op.eqn.params
        if op.name == "dot_general":
            return Claim(lambda a, b: [dot(a, b, params["dimension_numbers"])])
        if op.name == "conv_general_dilated":
            return Claim(lambda a, b: [conv(a, b, **{name: params[name] for name in wanted})])
        return None

    return rewrite(training(model), handler)
