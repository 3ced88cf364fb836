"""What is worth compressing how much: it measures, allocates under budgets, and decides."""

__all__: list[str] = []
