"""What to type where something is not installed."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

DISTRIBUTION = "visual-token-compression"
"""The name to install by; the package that is imported is `vtc`. On PyPI `vtc` is another project."""


def install_line(extra: str) -> str:
    """The pip command that adds an extra to this installation, or to this checkout where nothing is installed."""
    try:
        distribution(DISTRIBUTION)
    except PackageNotFoundError:
        return f"pip install '{Path(__file__).parents[1]}[{extra}]'"
    return f"pip install '{DISTRIBUTION}[{extra}]'"
