"""The reference models: small but complete LLaVAs that read the benchmarks of this package.

`SHIPPED` holds folders of weights and processor by name; `train` makes them anew (`vtc train reference`).
"""

from pathlib import Path

PATH = Path(__file__).parent / "weights"
SHIPPED = {"reference": PATH, "reference-pages": PATH.with_name("weights-pages")}
"""reference reads scenes; reference-pages scenes and pages."""
