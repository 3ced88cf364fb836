"""Functions to functions: read a program, and run it again under another interpretation."""
