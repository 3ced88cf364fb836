"""GGUF, the file of llama.cpp: named tensors in blocks of 32 weights, behind typed metadata."""
