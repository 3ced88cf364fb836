"""Every public function of jax.numpy, jax.nn and jax.lax called once, and every layer of flax: what they bind.

``programs`` gives the calls by name. Most functions take one of a few usual sets of arguments; ``CALLS`` has those that
take others, ``NOT_TRACED`` says of the rest why no program is made of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.extend import core

MODULES: dict[str, ModuleType] = {
    "numpy": jnp, "numpy.linalg": jnp.linalg, "numpy.fft": jnp.fft, "nn": jax.nn,
    "nn.initializers": jax.nn.initializers, "lax": lax, "lax.linalg": lax.linalg,
}  # fmt: skip

X, N, B = jnp.ones((3, 3)), jnp.ones((3, 3), jnp.int32), jnp.ones((3, 3), bool)
V, C, I = jnp.ones(3), jnp.ones((3, 3), jnp.complex64), jnp.arange(3)
IMAGE, KERNEL, KEY = jnp.ones((1, 2, 6, 6)), jnp.ones((2, 2, 3, 3)), jax.random.key(0)
USUAL: tuple[tuple[Any, ...], ...] = ((X,), (X, X), (X, X, X), (N,), (N, N), (N, N, N), (C,), (V,), (V, V), (B, X, X))
"""Arguments of arrays that most functions take, tried in order; those that take a list of arrays come after."""
LISTS = ([X, X],)

Call = Callable[..., Any]


def _of(module: str, names: str) -> list[str]:
    return [f"{module}.{name}" for name in names.split()]


CALLS: dict[str, tuple[Call, tuple[Any, ...]]] = {
    "numpy.apply_along_axis": (lambda x: jnp.apply_along_axis(jnp.sum, 0, x), (X,)),
    "numpy.apply_over_axes": (lambda x: jnp.apply_over_axes(jnp.sum, x, (0,)), (X,)),
    "numpy.argpartition": (lambda x: jnp.argpartition(x, 1), (X,)),
    "numpy.arange": (lambda: jnp.arange(3), ()),
    "numpy.argwhere": (lambda x: jnp.argwhere(x, size=2), (X,)),
    "numpy.astype": (lambda x: jnp.astype(x, jnp.int32), (X,)),
    "numpy.bartlett": (lambda: jnp.bartlett(5), ()),
    "numpy.bincount": (lambda n: jnp.bincount(n, length=3), (I,)),
    "numpy.blackman": (lambda: jnp.blackman(5), ()),
    "numpy.block": (lambda x: jnp.block([[x, x], [x, x]]), (X,)),
    "numpy.broadcast_to": (lambda x: jnp.broadcast_to(x, (2, 3, 3)), (X,)),
    "numpy.choose": (lambda n, x: jnp.choose(n, [x, x], mode="clip"), (N, X)),
    "numpy.compress": (lambda v, x: jnp.compress(v > 0, x, axis=0, size=2), (V, X)),
    "numpy.concatenate": (lambda x: jnp.concatenate([x, x]), (X,)),
    "numpy.delete": (lambda x: jnp.delete(x, 1, axis=0), (X,)),
    "numpy.diag_indices": (lambda: jnp.diag_indices(3), ()),
    "numpy.dsplit": (lambda x: jnp.dsplit(x[None], 3), (X,)),
    "numpy.einsum": (lambda x: jnp.einsum("ij,jk->ik", x, x), (X,)),
    "numpy.empty": (lambda: jnp.empty((2, 3)), ()),
    "numpy.expand_dims": (lambda x: jnp.expand_dims(x, 0), (X,)),
    "numpy.extract": (lambda b, x: jnp.extract(b, x, size=2), (B, X)),
    "numpy.eye": (lambda: jnp.eye(3), ()),
    "numpy.fill_diagonal": (lambda x: jnp.fill_diagonal(x, 1.0, inplace=False), (X,)),
    "numpy.flatnonzero": (lambda x: jnp.flatnonzero(x, size=2), (X,)),
    "numpy.fromfunction": (lambda: jnp.fromfunction(lambda i, j: i + j, (2, 3)), ()),
    "numpy.frompyfunc": (lambda x: jnp.frompyfunc(lax.add, 2, 1, identity=0).outer(x, x), (V,)),
    "numpy.full": (lambda: jnp.full((2, 3), 1.0), ()),
    "numpy.geomspace": (lambda: jnp.geomspace(1.0, 2.0, 3), ()),
    "numpy.hamming": (lambda: jnp.hamming(5), ()),
    "numpy.hanning": (lambda: jnp.hanning(5), ()),
    "numpy.hsplit": (lambda x: jnp.hsplit(x, 3), (X,)),
    "numpy.identity": (lambda: jnp.identity(3), ()),
    "numpy.indices": (lambda: jnp.indices((2, 3)), ()),
    "numpy.insert": (lambda x: jnp.insert(x, 1, 2.0, axis=0), (X,)),
    "numpy.interp": (lambda x, v: jnp.interp(x, v, v), (X, V)),
    "numpy.intersect1d": (lambda x: jnp.intersect1d(x, x, size=2), (V,)),
    "numpy.isin": (jnp.isin, (X, V)),
    "numpy.kaiser": (lambda: jnp.kaiser(5, 1.0), ()),
    "numpy.linspace": (lambda: jnp.linspace(1.0, 2.0, 3), ()),
    "numpy.logspace": (lambda: jnp.logspace(1.0, 2.0, 3), ()),
    "numpy.mask_indices": (lambda: jnp.mask_indices(3, jnp.triu, size=2), ()),
    "numpy.matrix_transpose": (jnp.matrix_transpose, (X,)),
    "numpy.moveaxis": (lambda x: jnp.moveaxis(x, 0, 1), (X,)),
    "numpy.nonzero": (lambda x: jnp.nonzero(x, size=2), (X,)),
    "numpy.ones": (lambda: jnp.ones((2, 3)), ()),
    "numpy.pad": (lambda x: jnp.pad(x, 1, mode="reflect"), (X,)),
    "numpy.partition": (lambda x: jnp.partition(x, 1), (X,)),
    "numpy.permute_dims": (lambda x: jnp.permute_dims(x, (1, 0)), (X,)),
    "numpy.piecewise": (lambda x: jnp.piecewise(x, [x < 0, x > 0], [jnp.sin, jnp.cos]), (X,)),
    "numpy.place": (lambda x: jnp.place(x, x > 0, jnp.array([1.0, 2.0]), inplace=False), (X,)),
    "numpy.polyfit": (lambda x, y: jnp.polyfit(x, y, 2), (V, V)),
    "numpy.put": (lambda x: jnp.put(x, jnp.array([0, 1]), 2.0, inplace=False), (X,)),
    "numpy.put_along_axis": (lambda x, n: jnp.put_along_axis(x, n, 1.0, 0, inplace=False), (X, N)),
    "numpy.ravel_multi_index": (lambda n: jnp.ravel_multi_index((n, n), (3, 3), mode="clip"), (N,)),
    "numpy.repeat": (lambda x: jnp.repeat(x, 2, axis=0), (X,)),
    "numpy.reshape": (lambda x: jnp.reshape(x, (9,)), (X,)),
    "numpy.resize": (lambda x: jnp.resize(x, (2, 2)), (X,)),
    "numpy.roll": (lambda x: jnp.roll(x, 1, axis=0), (X,)),
    "numpy.rollaxis": (lambda x: jnp.rollaxis(x, 1), (X,)),
    "numpy.roots": (lambda v: jnp.roots(v, strip_zeros=False), (V,)),
    "numpy.rot90": (jnp.rot90, (X,)),
    "numpy.select": (lambda b, x: jnp.select([b, ~b], [x, -x]), (B, X)),
    "numpy.setdiff1d": (lambda x: jnp.setdiff1d(x, x, size=2), (V,)),
    "numpy.setxor1d": (lambda x: jnp.setxor1d(x, x, size=2), (V,)),
    "numpy.split": (lambda x: jnp.split(x, 3), (X,)),
    "numpy.array_split": (lambda x: jnp.array_split(x, 2), (X,)),
    "numpy.stack": (lambda x: jnp.stack([x, x]), (X,)),
    "numpy.swapaxes": (lambda x: jnp.swapaxes(x, 0, 1), (X,)),
    "numpy.take": (lambda x, n: jnp.take(x, n, axis=0), (X, N)),
    "numpy.take_along_axis": (lambda x, n: jnp.take_along_axis(x, n, axis=0), (X, N)),
    "numpy.tile": (lambda x: jnp.tile(x, (2, 2)), (X,)),
    "numpy.top_k": (lambda x: jnp.top_k(x, 2), (X,)),
    "numpy.tri": (lambda: jnp.tri(3), ()),
    "numpy.tril_indices": (lambda: jnp.tril_indices(3), ()),
    "numpy.triu_indices": (lambda: jnp.triu_indices(3), ()),
    "numpy.union1d": (lambda x: jnp.union1d(x, x, size=2), (V,)),
    "numpy.unpackbits": (jnp.unpackbits, (jnp.ones(2, jnp.uint8),)),
    "numpy.packbits": (jnp.packbits, (B,)),
    "numpy.vectorize": (jnp.vectorize(lambda x: x + 1), (X,)),
    "numpy.vsplit": (lambda x: jnp.vsplit(x, 3), (X,)),
    "numpy.zeros": (lambda: jnp.zeros((2, 3)), ()),
    **{f"numpy.unique{f}": (lambda x, f=f: getattr(jnp, "unique" + f)(x, size=2), (X,))
       for f in ("", "_all", "_counts", "_inverse", "_values")},
    "numpy.linalg.multi_dot": (lambda x: jnp.linalg.multi_dot([x, x, x]), (X,)),
    "numpy.linalg.matrix_power": (lambda x: jnp.linalg.matrix_power(x, 3), (X,)),
    "numpy.linalg.tensorinv": (lambda x: jnp.linalg.tensorinv(x.reshape(3, 3), ind=1), (X,)),
    "numpy.linalg.tensorsolve": (jnp.linalg.tensorsolve, (X, V)),
    "numpy.fft.fftfreq": (lambda: jnp.fft.fftfreq(4), ()),
    "numpy.fft.rfftfreq": (lambda: jnp.fft.rfftfreq(4), ()),
    "nn.glu": (lambda x: jax.nn.glu(x), (jnp.ones((3, 4)),)),
    "nn.dot_product_attention": (lambda q: jax.nn.dot_product_attention(q, q, q), (jnp.ones((1, 3, 2, 4)),)),
    "nn.one_hot": (lambda n: jax.nn.one_hot(n, 3), (N,)),
    "nn.scaled_matmul": (
        jax.nn.scaled_matmul, (jnp.ones((1, 4, 64), jnp.float8_e4m3fn), jnp.ones((1, 4, 64), jnp.float8_e4m3fn),
                               jnp.ones((1, 4, 2), jnp.float8_e8m0fnu), jnp.ones((1, 4, 2), jnp.float8_e8m0fnu))),
    "nn.scaled_dot_general": (
        lambda x: jax.nn.scaled_dot_general(x, x, (((2,), (2,)), ((0,), (0,)))), (jnp.ones((1, 4, 64)),)),
    "nn.standardize": (jax.nn.standardize, (X,)),
    "nn.initializers.constant": (lambda: jax.nn.initializers.constant(2.0)(KEY, (2, 3)), ()),
    "nn.initializers.delta_orthogonal": (lambda: jax.nn.initializers.delta_orthogonal()(KEY, (3, 3, 3, 3)), ()),
    "nn.initializers.variance_scaling": (
        lambda: jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")(KEY, (2, 3)), ()),
    **{f: (lambda f=f: getattr(jax.nn.initializers, f.rpartition(".")[2])()(KEY, (2, 3)), ())
       for f in _of("nn.initializers", """glorot_normal glorot_uniform he_normal he_uniform kaiming_normal
       kaiming_uniform lecun_normal lecun_uniform normal orthogonal truncated_normal uniform xavier_normal
       xavier_uniform""")},
    "nn.initializers.ones": (lambda: jax.nn.initializers.ones(KEY, (2, 3)), ()),
    "nn.initializers.zeros": (lambda: jax.nn.initializers.zeros(KEY, (2, 3)), ()),
    "lax.after_all": (lambda: lax.after_all(lax.create_token()), ()),
    "lax.argmax": (lambda x: lax.argmax(x, 0, jnp.int32), (X,)),
    "lax.argmin": (lambda x: lax.argmin(x, 0, jnp.int32), (X,)),
    "lax.associative_scan": (lambda x: lax.associative_scan(jnp.add, x), (X,)),
    "lax.bitcast_convert_type": (lambda x: lax.bitcast_convert_type(x, jnp.int32), (X,)),
    "lax.broadcast": (lambda x: lax.broadcast(x, (2,)), (X,)),
    "lax.broadcast_in_dim": (lambda x: lax.broadcast_in_dim(x, (2, 3, 3), (1, 2)), (X,)),
    "lax.broadcasted_iota": (lambda: lax.broadcasted_iota(jnp.int32, (2, 3), 1), ()),
    "lax.collapse": (lambda x: lax.collapse(x, 0, 2), (X,)),
    "lax.composite": (lambda x: lax.composite(jnp.sin, "mine.sin")(x), (X,)),
    "lax.concatenate": (lambda x: lax.concatenate([x, x], 0), (X,)),
    "lax.broadcast_to_rank": (lambda x: lax.broadcast_to_rank(x, 3), (X,)),
    "lax.cond": (lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), (X,)),
    "lax.conv": (lambda i, k: lax.conv(i, k, (1, 1), "SAME"), (IMAGE, KERNEL)),
    "lax.conv_general_dilated": (lambda i, k: lax.conv_general_dilated(i, k, (1, 1), "SAME"), (IMAGE, KERNEL)),
    "lax.conv_general_dilated_local": (
        lambda i, k: lax.conv_general_dilated_local(i, k, (1, 1), "VALID", (3, 3)), (IMAGE, jnp.ones((2, 18, 4, 4)))),
    "lax.conv_general_dilated_patches": (
        lambda i: lax.conv_general_dilated_patches(i, (3, 3), (1, 1), "SAME"), (IMAGE,)),
    "lax.conv_transpose": (
        lambda i, k: lax.conv_transpose(i, k, (2, 2), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")),
        (IMAGE, KERNEL)),
    "lax.conv_with_general_padding": (
        lambda i, k: lax.conv_with_general_padding(i, k, (1, 1), [(0, 0), (0, 0)], None, None), (IMAGE, KERNEL)),
    "lax.convert_element_type": (lambda x: lax.convert_element_type(x, jnp.int32), (X,)),
    "lax.custom_linear_solve": (
        lambda x, v: lax.custom_linear_solve(lambda y: x @ y, v, lambda _, b: b, symmetric=True), (X, V)),
    "lax.custom_root": (
        lambda x: lax.custom_root(lambda y: y - x, x, lambda f, y: f(y), lambda g, y: y / g(jnp.ones_like(y))), (X,)),
    "lax.dot_general": (lambda x: lax.dot_general(x, x, (((1,), (0,)), ((), ()))), (X,)),
    "lax.dynamic_index_in_dim": (lambda x, i: lax.dynamic_index_in_dim(x, i), (X, I[0])),
    "lax.dynamic_slice": (lambda x, i: lax.dynamic_slice(x, (i, i), (1, 1)), (X, I[0])),
    "lax.dynamic_slice_in_dim": (lambda x, i: lax.dynamic_slice_in_dim(x, i, 1), (X, I[0])),
    "lax.dynamic_update_index_in_dim": (lambda x, i: lax.dynamic_update_index_in_dim(x, x[0], i, 0), (X, I[0])),
    "lax.dynamic_update_slice": (lambda x, i: lax.dynamic_update_slice(x, x[:1], (i, i)), (X, I[0])),
    "lax.dynamic_update_slice_in_dim": (lambda x, i: lax.dynamic_update_slice_in_dim(x, x[:1], i, 0), (X, I[0])),
    "lax.empty": (lambda: lax.empty((2, 3), jnp.float32), ()),
    "lax.expand_dims": (lambda x: lax.expand_dims(x, (0,)), (X,)),
    "lax.fft": (lambda c: lax.fft(c, "FFT", (3,)), (C,)),
    "lax.fori_loop": (lambda x, i: lax.fori_loop(0, i, lambda i, y: y * 2, x), (X, I[0])),
    "lax.full": (lambda: lax.full((2, 3), 1.0), ()),
    "lax.full_like": (lambda x: lax.full_like(x, 1.0), (X,)),
    "lax.gather": (
        lambda x, n: lax.gather(x, n, lax.GatherDimensionNumbers((1,), (0,), (0,)), (1, 3)), (X, I[:, None])),
    "lax.index_in_dim": (lambda x: lax.index_in_dim(x, 0), (X,)),
    "lax.index_take": (lambda x, i: lax.index_take(x, (i,), (0,)), (X, I)),
    "lax.integer_pow": (lambda x: lax.integer_pow(x, 3), (X,)),
    "lax.iota": (lambda: lax.iota(jnp.int32, 3), ()),
    "lax.map": (lambda x: lax.map(jnp.sin, x), (X,)),
    "lax.pad": (lambda x: lax.pad(x, 0.0, ((1, 1, 1), (0, 0, 0))), (X,)),
    "lax.platform_dependent": (lambda x: lax.platform_dependent(x, cpu=jnp.sin, default=jnp.cos), (X,)),
    "lax.polynomial": (lambda x: lax.polynomial(x, [1.0, 2.0]), (X,)),
    "lax.ragged_dot": (lax.ragged_dot, (X, jnp.ones((2, 3, 4)), I[1:])),
    "lax.ragged_dot_general": (
        lambda x, y, n: lax.ragged_dot_general(
            x, y, n, lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))),
        (X, jnp.ones((2, 3, 4)), I[1:])),
    "lax.reduce": (lambda x: lax.reduce((x, x), (0.0, 0.0), lambda a, b: (a[0] * b[0], a[1] + b[1]), (0,)), (X,)),
    **{f"lax.reduce_{f}": (lambda x, f=f: getattr(lax, "reduce_" + f)(x, (0,)), (N,))
       for f in ("and", "max", "min", "or", "prod", "sum", "xor")},
    "lax.reduce_precision": (lambda x: lax.reduce_precision(x, 5, 4), (X,)),
    "lax.reduce_window": (lambda x: lax.reduce_window(x, 1.0, lax.mul, (2, 2), (1, 1), "SAME"), (X,)),
    "lax.reshape": (lambda x: lax.reshape(x, (9,)), (X,)),
    "lax.rev": (lambda x: lax.rev(x, (0,)), (X,)),
    "lax.rng_uniform": (lambda a: lax.rng_uniform(a, a, (2, 3)), (V[0],)),
    "lax.rng_bit_generator": (lambda: lax.rng_bit_generator(jnp.zeros(4, jnp.uint32), (2, 3)), ()),
    "lax.scan": (lambda x: lax.scan(lambda c, y: (c + y, c), x[0], x), (X,)),
    **{f"lax.scatter{f}": (
        lambda x, n, f=f: getattr(lax, "scatter" + f)(
            x, n, x, lax.ScatterDimensionNumbers((1,), (0,), (0,))), (X, I[:, None]))
       for f in ("", "_add", "_max", "_min", "_mul", "_sub")},
    "lax.scatter_apply": (
        lambda x, n: lax.scatter_apply(
            x, n, jnp.sin, lax.ScatterDimensionNumbers((1,), (0,), (0,)), update_shape=(3, 3)), (X, I[:, None])),
    "lax.slice": (lambda x: lax.slice(x, (0, 0), (2, 2)), (X,)),
    "lax.slice_in_dim": (lambda x: lax.slice_in_dim(x, 0, 2), (X,)),
    "lax.split": (lambda x: lax.split(x, (1, 2)), (X,)),
    "lax.squeeze": (lambda x: lax.squeeze(x[None], (0,)), (X,)),
    "lax.stack": (lambda x: lax.stack([x, x]), (X,)),
    "lax.switch": (lambda x, i: lax.switch(i, [jnp.sin, jnp.cos, jnp.tan], x), (X, I[0])),
    "lax.tile": (lambda x: lax.tile(x, (2, 2)), (X,)),
    "lax.top_k": (lambda x: lax.top_k(x, 2), (X,)),
    "lax.approx_max_k": (lambda x: lax.approx_max_k(x, 2), (X,)),
    "lax.approx_min_k": (lambda x: lax.approx_min_k(x, 2), (X,)),
    "lax.transpose": (lambda x: lax.transpose(x, (1, 0)), (X,)),
    "lax.unstack": (lambda x: lax.unstack(x), (X,)),
    "lax.while_loop": (lambda x: lax.while_loop(lambda y: y.sum() > 0, lambda y: y - 1, x), (X,)),
    "lax.with_sharding_constraint": (
        lambda x: lax.with_sharding_constraint(x, jax.sharding.SingleDeviceSharding(jax.devices()[0])), (X,)),
    "lax.linalg.cholesky_update": (lax.linalg.cholesky_update, (X, V)),
    "lax.linalg.householder_product": (lax.linalg.householder_product, (X, V)),
    "lax.linalg.lu_pivots_to_permutation": (lambda i: lax.linalg.lu_pivots_to_permutation(i, 3), (I,)),
    "lax.linalg.ormqr": (lambda x, v: lax.linalg.ormqr(x, v, x), (X, V)),
    "lax.linalg.tridiagonal_solve": (lambda v, x: lax.linalg.tridiagonal_solve(v, v, v, x), (V, X)),
}  # fmt: skip

_SHAPES = "computes with shapes and types only"
_HOST = "reads or prints on the host"
_NAMED = "talks between devices by the name of an axis, so only inside shard_map, which has no rule"
_SIZES = "its result's shape depends on values, and it takes no size"
NOT_TRACED: dict[str, str] = {
    **dict.fromkeys(_of("numpy", """broadcast_shapes einsum_path promote_types result_type dtype can_cast finfo
        iinfo isdtype issubdtype iscomplexobj isrealobj isscalar ndim shape size"""), _SHAPES),
    **dict.fromkeys(_of("numpy", """array_repr array_str from_dlpack frombuffer fromfile fromiter fromstring
        get_printoptions load printoptions save savez set_printoptions"""), _HOST),
    "numpy.trim_zeros": _SIZES,
    "nn.get_scaled_dot_general_config": "a setting of scaled_dot_general",
    **dict.fromkeys(_of("lax", """broadcast_shapes conv_dimension_numbers conv_general_permutations
        conv_general_shape_tuple conv_shape_tuple conv_transpose_shape_tuple dtype padtype_to_pads
        reduce_window_shape_tuple ConvGeneralDilatedDimensionNumbers PrecisionLike"""), _SHAPES),
    **dict.fromkeys(_of("lax", """all_gather all_to_all axis_index axis_size pbroadcast pcast pmax pmean pmin
        ppermute precv psend pshuffle psum psum_scatter psum_scatter_start pswapaxes ragged_all_to_all all_gather_start
        all_gather_done"""), _NAMED),
}  # fmt: skip
"""Public functions of which no program is made, and why."""


def functions(module: str) -> list[str]:
    """The public functions of a module, as "lax.add"."""
    found = MODULES[module]
    return [
        f"{module}.{name}" for name, f in sorted(vars(found).items())
        if not name.startswith("_") and callable(f) and not isinstance(f, type) and not inspect.ismodule(f)
    ]  # fmt: skip


def traced(name: str) -> core.ClosedJaxpr | None:
    """The program of one public function; None if no arguments that it takes are known: others than its own fail."""
    module, _, own = name.rpartition(".")
    if name in CALLS:
        f, args = CALLS[name]
        return jax.make_jaxpr(f)(*args)
    f = getattr(MODULES[module], own)
    for args in (*USUAL, *((list_,) for list_ in LISTS)):
        try:
            return jax.make_jaxpr(f)(*args)
        except Exception:
            continue
    return None


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Every equation, also of the programs inside."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


SEQUENCE, PICTURE, TOKENS = jnp.ones((2, 5, 4)), jnp.ones((2, 6, 6, 4)), jnp.ones((2, 5), jnp.int32)
LINEN: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "BatchNorm": (lambda: nn.BatchNorm(use_running_average=False), SEQUENCE),
    "Bidirectional": (lambda: nn.Bidirectional(nn.RNN(nn.GRUCell(3)), nn.RNN(nn.LSTMCell(3))), SEQUENCE),
    "Conv": (lambda: nn.Conv(4, (3, 3)), PICTURE),
    "ConvLSTMCell": (lambda: nn.RNN(nn.ConvLSTMCell(3, (3, 3))), PICTURE[:, None]),
    "ConvLocal": (lambda: nn.ConvLocal(3, (3, 3)), PICTURE),
    "ConvTranspose": (lambda: nn.ConvTranspose(3, (3, 3), strides=(2, 2)), PICTURE),
    "Dense": (lambda: nn.Dense(3), SEQUENCE),
    "DenseGeneral": (lambda: nn.DenseGeneral((2, 3), axis=(-2, -1)), SEQUENCE),
    "Dropout": (lambda: nn.Dropout(0.5, deterministic=False), SEQUENCE),
    "Einsum": (lambda: nn.Einsum((4, 3), "abc,cd->abd"), SEQUENCE),
    "Embed": (lambda: nn.Embed(7, 3), TOKENS),
    "GRUCell": (lambda: nn.RNN(nn.GRUCell(3)), SEQUENCE),
    "GroupNorm": (lambda: nn.GroupNorm(2), SEQUENCE),
    "InstanceNorm": (lambda: nn.InstanceNorm(), PICTURE),
    "LSTMCell": (lambda: nn.RNN(nn.LSTMCell(3), return_carry=True), SEQUENCE),
    "LayerNorm": (lambda: nn.LayerNorm(), SEQUENCE),
    "MGUCell": (lambda: nn.RNN(nn.MGUCell(3)), SEQUENCE),
    "MultiHeadAttention": (lambda: nn.MultiHeadAttention(2), SEQUENCE),
    "MultiHeadDotProductAttention": (lambda: nn.MultiHeadDotProductAttention(2, normalize_qk=True), SEQUENCE),
    "OptimizedLSTMCell": (lambda: nn.RNN(nn.OptimizedLSTMCell(3), reverse=True, keep_order=True), SEQUENCE),
    "PReLU": (lambda: nn.PReLU(), SEQUENCE),
    "RMSNorm": (lambda: nn.RMSNorm(), SEQUENCE),
    "RNN": (lambda: nn.RNN(nn.SimpleCell(3), time_major=True), SEQUENCE),
    "SelfAttention": (lambda: nn.SelfAttention(2), SEQUENCE),
    "Sequential": (lambda: nn.Sequential([nn.Dense(3), nn.relu]), SEQUENCE),
    "SimpleCell": (lambda: nn.RNN(nn.SimpleCell(3)), SEQUENCE),
    "SpectralNorm": (lambda: Spectral(), SEQUENCE),
    "WeightNorm": (lambda: nn.WeightNorm(nn.Dense(3)), SEQUENCE),
}  # fmt: skip
NO_LINEN = {"Module": "the base class", "RNNCellBase": "a base class", "Fp8DotGeneral": "deprecated", **dict.fromkeys(
    ("Fp8DirectDotGeneralOp", "Fp8DotGeneralBase", "Fp8DotGeneralOp", "Fp8Einsum", "NANOOFp8DotGeneralOp"),
    "an operation that other layers take")}  # fmt: skip
"""Modules of linen that are no layers."""


class Spectral(nn.Module):
    """A layer under spectral normalization, which must be told to update."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.SpectralNorm(nn.Dense(3))(x, update_stats=True)


def linen_program(name: str) -> core.ClosedJaxpr:
    """One forward pass of a layer of linen, with its state."""
    make, x = LINEN[name]
    keys = {"params": KEY, "dropout": KEY}
    shapes = jax.eval_shape(lambda: make().init(keys, x))
    return jax.make_jaxpr(lambda p, x: make().apply(p, x, rngs=keys, mutable=True))(shapes, x)


NNX: dict[str, tuple[Callable[[nnx.Rngs], Callable[..., Any]], Any]] = {
    "BatchNorm": (lambda r: nnx.BatchNorm(4, rngs=r), SEQUENCE),
    "Bidirectional": (lambda r: nnx.Bidirectional(
        nnx.RNN(nnx.GRUCell(4, 3, rngs=r), rngs=r), nnx.RNN(nnx.LSTMCell(4, 3, rngs=r), rngs=r), rngs=r), SEQUENCE),
    "Conv": (lambda r: nnx.Conv(4, 3, (3, 3), rngs=r), PICTURE),
    "ConvTranspose": (lambda r: nnx.ConvTranspose(4, 3, (3, 3), rngs=r), PICTURE),
    "Dropout": (lambda r: nnx.Dropout(0.5, rngs=r), SEQUENCE),
    "Einsum": (lambda r: nnx.Einsum("abc,cd->abd", (4, 3), (3,), rngs=r), SEQUENCE),
    "Embed": (lambda r: nnx.Embed(7, 3, rngs=r), TOKENS),
    "GRUCell": (lambda r: nnx.RNN(nnx.GRUCell(4, 3, rngs=r), rngs=r), SEQUENCE),
    "GroupNorm": (lambda r: nnx.GroupNorm(4, num_groups=2, rngs=r), SEQUENCE),
    "InstanceNorm": (lambda r: nnx.InstanceNorm(4, rngs=r), SEQUENCE),
    "LSTMCell": (lambda r: nnx.RNN(nnx.LSTMCell(4, 3, rngs=r), rngs=r), SEQUENCE),
    "LayerNorm": (lambda r: nnx.LayerNorm(4, rngs=r), SEQUENCE),
    "Linear": (lambda r: nnx.Linear(4, 3, rngs=r), SEQUENCE),
    "LinearGeneral": (lambda r: nnx.LinearGeneral((5, 4), (2, 3), axis=(-2, -1), rngs=r), SEQUENCE),
    "LoRA": (lambda r: nnx.LoRA(4, 2, 3, rngs=r), SEQUENCE),
    "LoRALinear": (lambda r: nnx.LoRALinear(4, 3, lora_rank=2, rngs=r), SEQUENCE),
    "MultiHeadAttention": (lambda r: nnx.MultiHeadAttention(2, 4, decode=False, rngs=r), SEQUENCE),
    "OptimizedLSTMCell": (lambda r: nnx.RNN(nnx.OptimizedLSTMCell(4, 3, rngs=r), rngs=r), SEQUENCE),
    "PReLU": (lambda r: nnx.PReLU(), SEQUENCE),
    "RMSNorm": (lambda r: nnx.RMSNorm(4, rngs=r), SEQUENCE),
    "RNN": (lambda r: nnx.RNN(nnx.SimpleCell(4, 3, rngs=r), reverse=True, rngs=r), SEQUENCE),
    "Sequential": (lambda r: nnx.Sequential(nnx.Linear(4, 3, rngs=r), nnx.relu), SEQUENCE),
    "SimpleCell": (lambda r: nnx.RNN(nnx.SimpleCell(4, 3, rngs=r), rngs=r), SEQUENCE),
    "SpectralNorm": (lambda r: nnx.SpectralNorm(nnx.Linear(4, 3, rngs=r), rngs=r), SEQUENCE),
    "WeightNorm": (lambda r: nnx.WeightNorm(nnx.Linear(4, 3, rngs=r), rngs=r), SEQUENCE),
}  # fmt: skip
if hasattr(nnx, "RoPE"):
    NNX["RoPE"] = (lambda r: nnx.RoPE(4), jnp.ones((2, 5, 2, 4)))
NO_NNX = {"Module": "the base class", "Dict": "a container", "List": "a container", "RNNCellBase": "a base class"}
"""Modules of NNX that are no layers."""
UNSHAPED = {"WeightNorm"}
"""Layers of NNX whose initialisation needs arrays at the older end of the versions."""


def nnx_program(name: str) -> core.ClosedJaxpr:
    """One forward pass of a layer of NNX, with its state."""
    make, x = NNX[name]
    graph, state = nnx.split(make(nnx.Rngs(0)) if name in UNSHAPED else nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def run(state: Any, x: Any) -> Any:
        module = nnx.merge(graph, state)
        return module(x), nnx.state(module)

    return jax.make_jaxpr(run)(state, x)
