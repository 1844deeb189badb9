"""Methods with trained modules: saving them, loading them, and finding them beside a model's checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vtc.budget import BudgetError, is_full
from vtc.stage import Budget, Method, read_json


@dataclass(frozen=True)
class Trained(Method):
    """A method whose modules were trained for one model, or one budget of it. A subclass says how they are `built`."""

    modules: nn.ModuleList | None = field(default=None, compare=False, repr=False, kw_only=True)
    """The trained modules. None: those that lie beside the model's checkpoint, by budget or for all of them."""

    @property
    def parts(self) -> int:
        """How many modules there have to be."""
        raise NotImplementedError

    def built(self, state: dict[str, Tensor]) -> nn.ModuleList:
        """Untrained modules that `state` fits into. Raises KeyError or ValueError where it is not this method's."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Name and hyper-parameters. Raises ValueError where modules would be lost: they need `save_pretrained`."""
        if self.modules is not None:
            raise ValueError("trained modules do not fit into a JSON file: use save_pretrained(folder)")
        return {name: value for name, value in super().settings().items() if name != "modules"}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors. Raises ValueError where there are no modules."""
        if self.modules is None:
            raise ValueError(f"{self.name} has no modules to save: train them first")
        (folder := Path(folder)).mkdir(parents=True, exist_ok=True)
        settings = replace(self, modules=None).settings()
        del settings["method"]
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        state = {name: value.cpu().contiguous() for name, value in self.modules.state_dict().items()}
        save_file(state, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote.

        Raises OSError where there is nothing of the kind, and ValueError with the file's name where it is damaged.
        """
        config, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
        method = cls.described(read_json(config), config)
        try:
            state = load_file(weights)
            modules = method.built(state)
            modules.load_state_dict(state)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{weights} does not hold {method.parts} modules of {cls.name}: {' '.join(str(error).split())}"
            ) from None
        if not all(weight.isfinite().all() for weight in state.values()):
            raise ValueError(f"{weights} holds numbers that are not finite: train these modules anew")
        return replace(method, modules=modules.eval().requires_grad_(False))

    def bind(self, model: Any, budget: Budget | None, tokens: int | None) -> Self:
        """With the modules on the model's device; without modules, those in `<checkpoint>/<name>/<budget>`, or, for
        every budget, in `<checkpoint>/<name>`. Raises ValueError where there are none: a BudgetError where this budget
        is lower than all there are.
        """
        if self.modules is not None:
            return replace(self, modules=self.modules.to(model.device))
        if is_full(budget, tokens):
            return self
        home = getattr(model.config, "_name_or_path", "")  # empty where the model was not loaded from anywhere
        where = Path(home) / self.name if home else "this model"
        if home and (Path(where) / "config.json").is_file():
            return self.from_pretrained(where).bind(model, budget, tokens)
        trained = _trained(Path(where)) if home else {}
        wanted = budget / tokens if isinstance(budget, int) and tokens else budget
        for fraction, path in trained.items():
            if wanted is not None and abs(fraction - wanted) < 0.5 / (tokens or 1e6):
                return self.from_pretrained(path).bind(model, budget, tokens)
        message = (
            f"{self.name} is trained for one model, and {where} has modules for "
            f"{', '.join(map(str, sorted(trained))) or 'none'}, not for {wanted}: train them (see "
            f"`vtc train {self.name} --help`), or pass {type(self).__name__}.from_pretrained(folder)"
        )
        if trained and wanted is not None and wanted < min(trained):
            raise BudgetError(message, floor=min(trained))
        raise ValueError(message)


def _trained(home: Path) -> dict[float, Path]:
    """The folders of modules in `home`, by the fraction that each is named after."""
    return {float(path.name): path for path in home.glob("0.*") if path.is_dir() and path.name[2:].isdecimal()}
