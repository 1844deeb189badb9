"""ATP-LLaVA: small trained modules set, for each image and layer, the thresholds that visual tokens have to pass."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveFloat
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vtc import scores
from vtc.choice import Seen, Selection
from vtc.observe import SelfLogits, TextRow
from vtc.stage import Budget, BudgetError, Layer, Method, Shape, Stage, read_json

PAPER_LAYERS = 4, 14, 24
"""Of the 32 of a LLaVA-1.5-7B."""


class Thresholds(nn.Module):
    """One module: the mean self and cross scores of an image, (images, 2), to its two thresholds, each (images,).

    Eq. 6-8. The paper's summaries call it an MLP with two heads; two affine maps in a row would be one, so there is a
    GELU between them.
    """

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Linear(2, width)
        self.redundant = nn.Linear(width, 1)
        self.spatial = nn.Linear(width, 1)

    def forward(self, means: Tensor) -> tuple[Tensor, Tensor]:
        mixed = nn.functional.gelu(self.mix(means))
        return self.redundant(mixed).sigmoid()[:, 0], self.spatial(mixed).sigmoid()[:, 0]


@dataclass(frozen=True)
class Atp(Method):
    """Keep what passes trained thresholds on a redundancy score or on a spatial one, image by image, layer by layer.

    "ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models" (arXiv 2412.00447). Eq. 3-5: the redundancy
    score of a token is the mean of its self score (mean pre-softmax logit that it receives from the visual tokens) and
    its cross score (mean attention from the text after the image), seen in the layer before. SAP: tokens on an even
    lattice of rate R get the spatial score 1 - 3 R, the others 0. Eq. 9-11: in training a token is gated by the larger
    of two sigmoids, and log(gate) is added to its logits as a key in all later layers; otherwise what passes a
    threshold stays.

    Left open by what can be read of the paper, and chosen here: both scores are scaled to [0, 1] over the image (logits
    have no bounds, thresholds do); the lattice thins out by half from module to module; at least one token stays.
    Measured on the reference model at a budget of 0.25, modules trained anew for each choice, 1,000 validation
    questions (percent, +-2): as it is 86.5; scores not scaled 78.3; the same lattice in all modules 86.8; none 82.3;
    no GELU in the modules 85.0; 600 steps at half of the learning rate instead of 300 84.9.

    Left out: the paper's 2-D rotary embedding of visual tokens, which needs a decoder trained with it. A rate of 0.125
    is a lattice of 1/9, the nearest that has the same step in both axes.
    """

    layers: tuple[Layer, ...] | None = None
    """Decoder layers to prune before. None: the paper's 4, 14 and 24 of 32, scaled to the depth of the decoder."""
    rates: tuple[Annotated[float, Field(ge=1e-6, le=1)], ...] = (0.25, 0.125, 0.0625)
    """R of each module: the share of the image's tokens on the lattice, as near as a whole step in both axes comes."""
    sharpness: PositiveFloat = 10.0
    """tau, the slope of the gates in training."""
    modules: nn.ModuleList | None = field(default=None, compare=False, repr=False)
    """The trained `Thresholds`. None: those that lie beside the model's checkpoint, by budget."""

    name: ClassVar[str] = "atp"
    paper: ClassVar[str] = "ATP-LLaVA, arXiv 2412.00447"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = {len(self.rates), len(PAPER_LAYERS if self.layers is None else self.layers)}
        if self.modules is not None:
            wanted.add(len(self.modules))
        if len(wanted) > 1:
            raise ValueError("atp: layers, rates and modules: there must be as many of each")

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        layers = shape.layers(self.layers, *PAPER_LAYERS, of=32)
        return tuple(self._stage(number, layer) for number, layer in enumerate(layers))

    def _stage(self, number: int, layer: int) -> Stage:
        own, cross = SelfLogits(layer - 1), TextRow(layer - 1, ahead=False)

        def parts(seen: Seen) -> tuple[Tensor, Tensor]:
            return scores.unit(seen[own][:, 0], seen.valid), scores.unit(seen[cross][:, 0], seen.valid)

        def score(seen: Seen) -> Tensor:
            return sum(parts(seen)) / 2

        return Stage(layer, score, (own, cross), partial(self._select, number, parts))

    def _select(self, number: int, parts, redundancy: Tensor, seen: Seen, keep: Tensor) -> Selection:
        thresholds = self.modules[number]
        means = torch.stack([scores.mean(part, seen.valid) for part in parts(seen)], dim=1)
        redundant, spatial = (threshold[:, None] for threshold in thresholds(means))
        lattice = self._lattice(self.rates[number], seen)
        if thresholds.training:
            gates = [
                ((score - threshold) * self.sharpness).sigmoid()
                for score, threshold in ((redundancy, redundant), (lattice, spatial))
            ]
            return Selection(torch.ones_like(seen.valid), gate=torch.maximum(*gates))
        best = redundancy.masked_fill(~seen.valid, -torch.inf)
        best = best == best.amax(1, keepdim=True)
        return Selection(((redundancy > redundant) | (lattice > spatial) | best) & seen.valid)

    def _lattice(self, rate: float, seen: Seen) -> Tensor:
        """The spatial score: (images, tokens), 1 - 3 R on every n-th row and column, n = round(sqrt(1 / R)), else 0."""
        step = round((1 / rate) ** 0.5)
        row, column = seen.places()
        on = (row % step == 0) & (column % step == 0)
        return on * max(0.0, 1 - 3 * rate)

    def keep(self, tokens: int, budget: Budget | None, shape: Shape) -> tuple[int, ...]:
        """All under a full budget; else nobody knows before it is seen, and at least one."""
        return (tokens if _is_full(budget, tokens) else min(1, tokens),) * len(self.stages(shape))

    # -- the trained modules --------------------------------------------------------------------------------------

    def untrained(self, shape: Shape, width: int) -> Atp:
        """With new modules for this model, ready for training; `width` is the decoder's."""
        modules = nn.ModuleList(Thresholds(width) for _ in self.stages(shape))
        return replace(self, modules=modules)

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(replace(self, modules=None)).items() if name != "modules"}

    def to_json(self, path: str | Path) -> None:
        """Write the hyper-parameters. Raises ValueError where modules would be lost: they need `save_pretrained`."""
        if self.modules is not None:
            raise ValueError("trained modules do not fit into a JSON file: use save_pretrained(folder)")
        super().to_json(path)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self._settings(), indent=2) + "\n")
        save_file(
            {name: value.cpu() for name, value in self.modules.state_dict().items()}, folder / "model.safetensors"
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Atp:
        """Read what `save_pretrained` wrote.

        Raises OSError where there is nothing of the kind, and ValueError with the file's name where it is damaged.
        """
        config, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
        method = cls.described(read_json(config), config)
        try:
            state = load_file(weights)
            modules = nn.ModuleList(Thresholds(state["0.mix.bias"].numel()) for _ in method.rates)
            modules.load_state_dict(state)
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ValueError(f"{weights} does not hold {len(method.rates)} modules of atp: {error}") from None
        if not all(weight.isfinite().all() for weight in state.values()):
            raise ValueError(f"{weights} holds numbers that are not finite: train these modules anew")
        return replace(method, modules=modules.eval().requires_grad_(False))

    def bind(self, model: nn.Module, budget: Budget | None, tokens: int | None) -> Atp:
        """With the modules on the model's device; without modules, those in `<checkpoint>/atp/<budget>`.

        Raises ValueError where there are none for this budget: a BudgetError where it is lower than all that are.
        """
        if self.modules is not None:
            return replace(self, modules=self.modules.to(model.device))
        if _is_full(budget, tokens):
            return self
        home = getattr(model.config, "_name_or_path", "")  # empty where the model was not loaded from anywhere
        trained = _trained(Path(home) / "atp") if home else {}
        wanted = budget / tokens if isinstance(budget, int) and tokens else budget
        for fraction, path in trained.items():
            if wanted is not None and abs(fraction - wanted) < 0.5 / (tokens or 1e6):
                return Atp.from_pretrained(path).bind(model, budget, tokens)
        message = (
            f"atp is trained for one model and one budget, and {Path(home) / 'atp' if home else 'this model'} has "
            f"modules for {', '.join(map(str, sorted(trained))) or 'none'}, not for {wanted}: "
            "train them with `vtc train atp --model PATH --budget B`, or pass Atp.from_pretrained(folder)"
        )
        if trained and wanted is not None and wanted < min(trained):
            raise BudgetError(message, floor=min(trained))
        raise ValueError(message)


def _is_full(budget: Budget | None, tokens: int | None) -> bool:
    """Whether a budget is all of an image's tokens, as far as their number is known."""
    if isinstance(budget, int):
        return tokens is not None and budget >= tokens
    return budget == 1.0


def _trained(home: Path) -> dict[float, Path]:
    """The folders of modules in `home`, by the fraction that each is named after."""
    return {float(path.name): path for path in home.glob("0.*") if path.is_dir() and path.name[2:].isdecimal()}
