"""Post-training compression: parameters to parameters, given what enters the layers, without labels."""

__all__: list[str] = []
