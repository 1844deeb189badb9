"""The reference model: a small but complete LLaVA that reads the scenes benchmark.

`PATH` holds the shipped weights and processor; `train` makes them anew (`vtc train reference`).
"""

from pathlib import Path

PATH = Path(__file__).parent / "weights"
