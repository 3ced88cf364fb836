"""Numeric kernels: rounding, quantizers, bit packing. Arrays in, arrays out."""
