"""Every law over every public transform on a GPU: the bodies of the tests of laws."""

from __future__ import annotations

import pytest

from tests.test_laws import (
    test_a_rescaled_leaf_is_compressed_alike_in_all_bits_of_its_type,
    test_law,
    test_law_of_leaves_in_params,
    test_laws_hold_in_half_precision,
)

pytestmark = pytest.mark.gpu

__all__ = [
    "test_a_rescaled_leaf_is_compressed_alike_in_all_bits_of_its_type",
    "test_law",
    "test_law_of_leaves_in_params",
    "test_laws_hold_in_half_precision",
]
