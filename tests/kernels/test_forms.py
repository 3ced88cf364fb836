"""The table of forms: which one runs where, chosen when a program is lowered, and what is said where one is missing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxcomp.kernels.blocks import TABLE as BLOCKS
from jaxcomp.kernels.blocks import shape_class
from jaxcomp.kernels.forms import BACKENDS, FORMS, TABLE, Product, form_of, forms_of
from jaxcomp.kernels.panels import PanelWeight
from jaxcomp.kernels.products import weight_only
from jaxcomp.kernels.sparse import SparseWeight, sparse_parts
from jaxcomp.quantization import NF4, Int
from tests.kernels.hardware import TRITON, an_h100
from tests.kernels.weights import Case, activations, weight_of

BF16, INT = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int8)
INT4 = Case(1, 64, 256, 4, 128)
WEIGHT, DENSE = weight_of(INT4)
INT8, _ = weight_of(Case(1, 64, 256, 8))
PANELS = PanelWeight(
    codes=jnp.zeros((4, 4096), jnp.uint8),
    scale=jnp.ones((64, 1)),
    totals=jnp.zeros(64, jnp.int32),
    grid=Int(8),
    taps=4,
    channels=64,
    features=64,
    dtype=jnp.dtype("float32"),
)
SPARSE = SparseWeight(*map(jnp.asarray, sparse_parts(np.eye(64), np.eye(64))), None, None, 64, jnp.dtype("float32"))


def test_every_row_of_the_table_is_reached_and_names_what_there_is() -> None:
    weights = {"bytes": INT8, "packed": WEIGHT, "sparse": SPARSE, "panels": PANELS}
    given = [(types, w, BF16) for types, w in weights.items()]
    given += [("codes", WEIGHT, INT), ("codes by bytes", INT8, INT)]
    found = set()
    for backend, (types, w, dtype), rows in product((*BACKENDS, "another"), given, (1, 16, 100)):
        p = Product(rows, dtype, w, device="some")
        names = {"*", types, "codes", "bytes"} if types == "codes by bytes" else {"*", types}
        row = next(
            row
            for row in TABLE
            if row.types in names and row.backend in ("*", backend) and row.shape in ("*", shape_class(rows))
        )
        assert form_of(backend, p) == row.forms[0]
        found.add(row)
    assert found == set(TABLE)
    assert {form for row in found for form in row.forms} == set(FORMS)
    assert {form for form, _, _ in BLOCKS} == {"triton", "mosaic"}


@pytest.mark.parametrize(
    ("change", "cuda", "tpu"),
    [
        ({"rows": 16}, "triton", "mosaic"),
        ({"rows": 65}, "whole", "whole"),
        ({"dtype": jnp.dtype(jnp.float64)}, "sums", "sums"),
        ({"device": ""}, "sums", "mosaic"),
        ({"kept": True}, "sums", "mosaic"),
        ({"parted": True}, "sums", "sums"),
        ({"weight": replace(WEIGHT, grid=NF4())}, "whole", "whole"),
    ],
)
def test_what_is_known_of_a_product_decides(change, cuda, tpu) -> None:
    p = Product(1, BF16, WEIGHT, device="some")._replace(**change)
    assert (form_of("cuda", p), form_of("tpu", p)) == (cuda, tpu)


def test_a_report_says_all_backends_in_one_line() -> None:
    assert forms_of(1, BF16, WEIGHT) == "llvm on cpu, triton on cuda, sums on rocm, mosaic on tpu"
    assert forms_of(100, BF16, WEIGHT) == "chunks on cpu, whole on cuda, rocm and tpu"
    assert forms_of(1, INT, WEIGHT) == "integers on cpu, triton on cuda, sums on rocm, mosaic on tpu"
    assert forms_of(1, INT, INT8) == "integers on cpu, dot on cuda, rocm and tpu"


def test_a_form_that_is_not_there_is_named_with_what_runs() -> None:
    x = activations(INT4, jnp.bfloat16)
    with pytest.raises(ValueError, match="'triton' does not run on cpu here: it is for cuda; 'llvm' runs: ask for it"):
        weight_only(x, WEIGHT, form="triton")
    with pytest.raises(
        ValueError, match="there is no form 'fast'; there are sums, chunks, whole, llvm, integers, dot, triton"
    ):
        weight_only(x, WEIGHT, form="fast")
    three, _ = weight_of(Case(3, 16, 80, 3, 20))
    with pytest.raises(ValueError, match=r"'mosaic' does not run on tpu here: only 4 neighbours .*; 'whole' runs"):
        form_of("tpu", Product(3, BF16, three), "mosaic")
    with pytest.raises(ValueError, match="'sums' does not run on cpu here: it takes one row, and there are 2; 'llvm'"):
        weight_only(jnp.concatenate([x, x]), WEIGHT, form="sums")
    with pytest.raises(ValueError, match="'integers' does not run on cpu here: it takes int16, int8, and the activ"):
        weight_only(x, WEIGHT, form="integers")
    with pytest.raises(ValueError, match="'dot' does not run on cpu here: it takes codes of activations, and weights"):
        weight_only(x, WEIGHT, form="dot")
    with pytest.raises(ValueError, match="it takes bfloat16, float16, float32, and the activations are float64"):
        form_of("cuda", Product(3, jnp.dtype(jnp.float64), WEIGHT, device="some"), "triton")


@pytest.mark.parametrize("form", [None, "sums", "chunks", "whole"])
def test_plain_forms_equal_the_dense_product(form) -> None:
    x = activations(INT4, jnp.float32, whole=True)
    want = (np.asarray(x, np.float64) @ DENSE.T).tolist()
    assert weight_only(x, WEIGHT, form=form).tolist() == want
    assert jax.jit(partial(weight_only, form=form))(x, WEIGHT).tolist() == want
    assert weight_only(x[0], WEIGHT, form=form, dtype=jnp.dtype(jnp.float32)).tolist() == want[0]


def test_gradients_and_maps_pass() -> None:
    x = activations(INT4, jnp.float32, whole=True)
    assert jax.grad(lambda x: weight_only(x, WEIGHT).sum())(x).tolist() == DENSE.sum(0, keepdims=True).tolist()
    scale = jax.grad(lambda s: weight_only(x, replace(WEIGHT, scale=s)).sum())(WEIGHT.scale)
    assert scale.shape == WEIGHT.scale.shape
    more = jnp.stack([x, 2 * x, x])
    assert jax.vmap(weight_only, (0, None))(more, WEIGHT).tolist() == weight_only(more, WEIGHT).tolist()
    columns = jax.vmap(weight_only, (1, None), 1)(jnp.moveaxis(more, 0, 1), WEIGHT)
    assert columns.tolist() == jnp.moveaxis(weight_only(more, WEIGHT), 0, 1).tolist()
    stack = jax.tree.map(lambda v: jnp.stack([v, v]), WEIGHT)
    both = jax.vmap(weight_only)(jnp.stack([x, 2 * x]), stack)
    assert both.tolist() == jnp.stack([weight_only(x, WEIGHT), weight_only(2 * x, WEIGHT)]).tolist()
    with pytest.raises(ValueError, match="'whole' does not run under vmap over weights"):
        jax.vmap(partial(weight_only, form="whole"))(jnp.stack([x, x]), stack)


# Chosen when lowered

PLATFORMS = ["cpu", "cuda", "tpu"]
CALLS = ("@__gpu$xla.gpu.triton", "@tpu_custom_call")


def calls_of(exported: export.Exported) -> list[int]:
    text = exported.mlir_module()
    return [text.count(call) for call in CALLS]


def test_one_exported_function_holds_the_form_of_each_platform() -> None:
    x = activations(INT4, jnp.bfloat16)
    made = export.export(jax.jit(weight_only), platforms=PLATFORMS)(x, WEIGHT)
    assert calls_of(made) == [0, 1], "what jax promises to keep, and no more"
    assert made.call(x, WEIGHT).tolist() == weight_only(x, WEIGHT).tolist()
    one = {name: calls_of(export.export(jax.jit(weight_only), platforms=[name])(x, WEIGHT)) for name in PLATFORMS}
    assert one == {"cpu": [0, 0], "cuda": [0, 0], "tpu": [0, 1]}


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_a_kernel_is_exported_where_it_is_asked_for() -> None:
    x, run = activations(INT4, jnp.bfloat16), jax.jit(partial(weight_only, form="triton"))
    with an_h100():
        made = export.export(run, platforms=["cuda"], disabled_checks=[TRITON])(x, WEIGHT)
        with pytest.raises(ValueError, match="'triton' does not run on tpu here"):
            export.export(run, platforms=["cuda", "tpu"], disabled_checks=[TRITON])(x, WEIGHT)
    assert calls_of(made) == [1, 0]
    with pytest.raises(ValueError, match="no GPU is known here"):
        export.export(run, platforms=["cuda"], disabled_checks=[TRITON])(x, WEIGHT)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_lowered_for_a_gpu_that_is_named_it_holds_the_kernel() -> None:
    x = activations(INT4, jnp.bfloat16)
    with an_h100():
        lowered = jax.jit(weight_only).trace(x, WEIGHT).lower(lowering_platforms=("cuda",))
    assert CALLS[0] in lowered.as_text()
