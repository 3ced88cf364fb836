"""Entropy coding of the tensors of a file: bytes in, fewer bytes out, and back bit for bit."""

from jaxcomp.artifact.coding.blocks import CODINGS, Coding, check, decode, encode

__all__ = ["CODINGS", "Coding", "check", "decode", "encode"]
