"""The reference models: small but complete LLaVAs that read the benchmarks of this package.

`SHIPPED` holds folders of weights and processor by name; `train` makes them anew (`vtc train reference`).
"""

from pathlib import Path

HERE = Path(__file__).parent
SHIPPED = {"reference": HERE / "weights", "reference-pages": HERE / "weights-pages"}
"""reference reads scenes; reference-pages scenes and pages."""
