"""Kernels of any layout on a GPU's integers: the bodies of the tests of layouts and of unpacked leaves."""

from __future__ import annotations

import pytest

from tests.activations.test_layouts import (
    jax_defaults,
    test_groups_along_the_summed_axis_run_on_integers,
    test_rows_out_of_bounds_are_filled_as_those_of_a_float_table,
    test_scales_on_the_axes_that_are_kept_run_on_integers,
)

pytestmark = pytest.mark.gpu

__all__ = [
    "jax_defaults",
    "test_groups_along_the_summed_axis_run_on_integers",
    "test_rows_out_of_bounds_are_filled_as_those_of_a_float_table",
    "test_scales_on_the_axes_that_are_kept_run_on_integers",
]
