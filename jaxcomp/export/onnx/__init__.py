"""ONNX: an interpreter over the traced program that writes a node where JAX would run an equation."""
