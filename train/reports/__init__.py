"""What the experiments gave: tables on the terminal, reports as JSON, pictures."""

from train.reports.figures import accuracy_axes, png_of
from train.reports.terminal import devices_line, make_console, print_error

__all__ = ["accuracy_axes", "devices_line", "make_console", "png_of", "print_error"]
