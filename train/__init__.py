"""The training program: data, models, loop, configs and the command line. It uses jaxcomp; jaxcomp never uses it."""
