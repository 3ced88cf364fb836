"""What the tests of activations ask, on a GPU at its default precision: the same bodies and tolerances."""

from __future__ import annotations

import pytest

from tests.activations.test_backward import (
    test_bfloat16_keeps_its_type,
    test_forward_is_the_same_and_off_means_nothing,
    test_gradients_are_near_those_that_are_not_rounded,
    test_layers_of_a_scan_have_keys_of_their_own,
)
from tests.activations.test_fault_12_unpacked import test_fault_12_codes_reach_their_product
from tests.activations.test_float8 import (
    test_groups_have_scales_of_their_own,
    test_real_products_equal_fake_ones,
    test_static_ranges_clip_and_cut_the_gradient,
    test_values_are_those_of_ml_dtypes,
)
from tests.activations.test_integer_gradients import (
    test_asymmetric_and_masked_weights_learn_too,
    test_composes_with_vmap_and_remat,
    test_gradients_equal_those_of_the_fake_mode,
    test_scales_of_packed_codes_learn,
)
from tests.activations.test_nan import (
    test_fault_6_an_end_that_is_nan_or_infinite_shows_and_an_infinity_saturates,
    test_fault_6_convolutions_show_nan_where_float_does,
    test_fault_6_finite_values_stay_finite_near_a_types_end,
    test_fault_6_rows_that_are_nan_in_float_are_nan,
    test_small_integers_are_those_of_a_cast,
)
from tests.activations.test_quantize_function import (
    test_both_sides_of_an_attention_product_are_codes,
    test_composes_with_jit_grad_vmap_and_remat,
    test_conv_pads_with_the_zero_point,
    test_dot_is_the_sum_over_centered_codes,
    test_gradients_are_straight_through_in_values_and_weights,
    test_layers_of_a_scan_have_ranges_of_their_own,
    test_learned_step_has_the_gradient_of_lsq,
    test_lookup_takes_rows_of_codes,
    test_masked_codes_stay_zero,
    test_pact_learns_its_clip_alone,
    test_tokens_and_groups_have_scales_of_their_own,
)

pytestmark = pytest.mark.gpu

__all__ = [
    "test_asymmetric_and_masked_weights_learn_too",
    "test_bfloat16_keeps_its_type",
    "test_both_sides_of_an_attention_product_are_codes",
    "test_composes_with_jit_grad_vmap_and_remat",
    "test_composes_with_vmap_and_remat",
    "test_conv_pads_with_the_zero_point",
    "test_dot_is_the_sum_over_centered_codes",
    "test_fault_6_an_end_that_is_nan_or_infinite_shows_and_an_infinity_saturates",
    "test_fault_6_convolutions_show_nan_where_float_does",
    "test_fault_6_finite_values_stay_finite_near_a_types_end",
    "test_fault_6_rows_that_are_nan_in_float_are_nan",
    "test_fault_12_codes_reach_their_product",
    "test_forward_is_the_same_and_off_means_nothing",
    "test_gradients_are_near_those_that_are_not_rounded",
    "test_gradients_are_straight_through_in_values_and_weights",
    "test_gradients_equal_those_of_the_fake_mode",
    "test_groups_have_scales_of_their_own",
    "test_layers_of_a_scan_have_keys_of_their_own",
    "test_layers_of_a_scan_have_ranges_of_their_own",
    "test_learned_step_has_the_gradient_of_lsq",
    "test_lookup_takes_rows_of_codes",
    "test_masked_codes_stay_zero",
    "test_pact_learns_its_clip_alone",
    "test_real_products_equal_fake_ones",
    "test_scales_of_packed_codes_learn",
    "test_small_integers_are_those_of_a_cast",
    "test_static_ranges_clip_and_cut_the_gradient",
    "test_tokens_and_groups_have_scales_of_their_own",
    "test_values_are_those_of_ml_dtypes",
]
