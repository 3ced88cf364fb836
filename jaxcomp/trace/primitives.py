"""Facts about primitives, by name, each said once; what reads or changes programs takes them from here."""

from __future__ import annotations


def named(names: str) -> frozenset[str]:
    """Names with spaces between."""
    return frozenset(names.split())


ATTENTION = "attend_rows"
"""Of queries to a cache of codes (:mod:`jaxcomp.kernels.attention`)."""
CODED_CONVOLUTION = "convolve_codes"
"""Of images in codes (:mod:`jaxcomp.activations.coded_convolutions`)."""
CODED_DOT = "multiply_codes"
"""Of two operands in codes (:mod:`jaxcomp.activations.coded_dots`)."""
REGION = "run_region"
"""Of equations that a CPU has one code for (:mod:`jaxcomp.activations.regions`)."""
ROUNDING = "round_to_codes"
"""Of activations (:mod:`jaxcomp.activations.encoded`)."""
ROUNDING_ROWS = "round_rows_to_codes"
"""Of activations whose rows have ranges of their own (:mod:`jaxcomp.activations.coded_rows`)."""
PIECES = frozenset({ATTENTION, CODED_CONVOLUTION, CODED_DOT, REGION, ROUNDING, ROUNDING_ROWS})
"""Calls that a backend may run in one piece."""
CALLS = frozenset(
    {
        "jit",
        "pjit",
        "closed_call",
        "composite",
        "core_call",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
        *PIECES,
    }
)
"""Equations that run one inner jaxpr, their parameter ``jaxpr`` or ``call_jaxpr``, on exactly their operands."""
EXPANDS = frozenset({"call_hi_primitive"})
"""Equations that are a program of other primitives, which their parameter ``_prim`` expands to."""
JIT = frozenset({"jit", "pjit"})
REMAT = frozenset({"remat2", "checkpoint"})
CUSTOM_RULE = frozenset({"custom_jvp_call", "custom_vjp_call"})
CONTROL = frozenset({"scan", "while", "cond"})
"""Equations that run inner jaxprs several times, or one of several."""
SEALED = frozenset({"shard_map"})
"""Equations whose inner jaxpr is read, and never rewritten."""
UNSEEN = SEALED | {"while_cond"}
"""Where values cannot be gathered from: these, and conditions of while loops."""
BARRED = CUSTOM_RULE | UNSEEN
"""Equations inside of which nothing is rewritten."""
UNREAD = {
    **dict.fromkeys(
        ("pallas_call", "cudnn_fusion", "ffi_call", "pure_callback", "io_callback", "call_exported", "mpmd_map"),
        "nothing can look into it",
    ),
    **dict.fromkeys(
        named(
            """scaled_dot scaled_matmul scaled_matmul_wrapper dot_product_attention_fwd
            dot_product_attention_fwd_wrapper dot_product_attention_fp8_fwd dot_product_attention_fp8_fwd_wrapper
            triangular_solve tridiagonal_solve symmetric_product cholesky_update householder_product ormqr"""
        ),
        "no rule reads what it multiplies",
    ),
}
"""Equations that multiply, or call what may, and that nothing here reads; and why."""
HEAVY = frozenset({"dot_general", "ragged_dot_general", "conv_general_dilated", "gather", *UNREAD})

UNCHANGED = frozenset({"copy", "copy_p", "name", "stop_gradient"})
"""The result is the operand."""
COPIES = UNCHANGED | frozenset(
    {"convert_element_type", "layout_constraint", "pvary", "reduce_precision", "reshard", "sharding_constraint"}
)
"""The result is the operand, cast, rounded or placed elsewhere at most."""
PASSES = frozenset({"device_put", "optimization_barrier"})
"""As ``COPIES``, for any number of operands: result i is operand i."""
SAME = COPIES | PASSES

RELAID = frozenset({"broadcast_in_dim", "reshape", "squeeze", "transpose"})
"""Every element of the operand is in the result."""
CUTS = frozenset({"dynamic_slice", "rev", "slice", "split", "tile", "unstack"})
"""The results hold elements of the operand, each axis cut, turned round, taken apart or repeated."""
JOINS = frozenset({"concatenate", "stack"})
"""The result holds every element of all operands, side by side."""
SUMS = frozenset({"add", "add_any"})
"""Sums of two."""
AFFINE = frozenset({"add", "sub", "mul", "div", "neg"})
"""Affine in each operand, of a quotient's the first."""


ZERO_FIRST = named(
    """abs asin asinh atan atanh bitcast_convert_type cbrt ceil conj div erf erf_inv expm1 floor imag integer_pow log1p
    neg pow real rem round shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square tan tanh"""
)
"""Elementwise, and zero where the first operand is; the two powers, if the exponent is positive."""
ZERO_ALL = named("add add_any atan2 complex max min or sub xor")
"""Elementwise, and zero where all operands are."""
ZERO_ANY = named("and mul mulhi")
"""Elementwise, and zero where any operand is."""
NOT_ZERO = named(
    """acos acosh bessel_i0e bessel_i1e clamp clz cos cosh digamma eq eq_to erfc exp exp2 ge gt igamma igamma_grad_a
    igammac is_finite le le_to lgamma log log2 logistic lt lt_to ne nextafter not one_minus_square polygamma polynomial
    population_count
    random_gamma_grad regularized_incomplete_beta rsqrt select_n zeta"""
)
"""Elementwise, and of other values where operands are zero, or of values that depend on the others."""
ELEMENTWISE = ZERO_FIRST | ZERO_ALL | ZERO_ANY | NOT_ZERO
"""The result at an index depends on the operands at that index only."""
