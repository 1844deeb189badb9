"""`vtc tune`: the hyper-parameters of a method for one model and one budget, without labels.

As VFlowOpt does it (arXiv 2508.05211, Alg. 1), for any method that declares a search space: Bayesian optimisation (a
Gaussian process and expected improvement) of how similar the last prompt token's final hidden state stays when tokens
leave. The budget is fixed: what is searched decides which tokens leave where, never how many.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

import vtc
from vtc.eval import benchmarks, progress
from vtc.eval.album import find_questions
from vtc.eval.images import list_images, open_image
from vtc.eval.reader import Reader, load, model_path


@dataclass(frozen=True)
class Search:
    """What is searched and how long.

    `images` is a folder, with `questions` in a file as for `vtc choose`, or a benchmark of this package: its training
    split has questions of its own.
    """

    model: str = "reference"
    method: str = "vflowopt"
    budget: int | float = 0.25
    images: str = "scenes"
    questions: Path | None = None
    samples: int = 30
    trials: int = 50
    seed: int = 0
    batch_size: int = 32


def tune(search: Search, out: Path) -> tuple[vtc.Method, float, float]:
    """Search, write the best method to the JSON file `out`, and return it with its similarity and that of the defaults,
    or of what a JSON file says in their place.

    Similarities are mean cosines in [-1, 1]. Raises ValueError for a method without a search space or a folder without
    images.
    """
    import optuna

    start = vtc.find_method(search.method)
    if not start.space:
        raise ValueError(f"{search.method} declares nothing to tune")
    reader = load(model_path(search.model), "cuda" if torch.cuda.is_available() else "cpu")
    space = searched(reader, start)
    asked = batches(reader, search)
    full = [last_states(reader, batch) for batch in asked]

    def similarity(method: vtc.Method) -> float:
        with vtc.compressed(reader.model, method, search.budget):
            pruned = [last_states(reader, batch) for batch in asked]
        return torch.cosine_similarity(torch.cat(pruned), torch.cat(full)).mean().item()

    def objective(trial: optuna.Trial) -> float:
        chosen = {
            name: (trial.suggest_int if isinstance(low, int) else trial.suggest_float)(name, low, high)
            for name, (low, high) in space.items()
        }
        try:
            return similarity(start.tuned(chosen))
        except ValueError as error:  # a combination that the model or the budget does not allow
            raise optuna.TrialPruned(str(error)) from error

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.GPSampler(seed=search.seed))
    with progress.bar("trials", search.trials) as tick:
        study.optimize(objective, n_trials=search.trials, callbacks=[lambda study, trial: tick()])
    if not any(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials):
        raise ValueError(f"none of {search.trials} combinations can reach a budget of {search.budget} on this model")
    best, defaults = start.tuned(study.best_params), similarity(start)
    best.to_json(out)
    return best, study.best_value, defaults


def searched(reader: Reader, method: vtc.Method) -> dict[str, tuple[float, float]]:
    """What there is to search of a method's space on this model: without what the model refuses at any budget.

    Whole numbers, such as layers, end where the model does.
    """
    space = {}
    for name, (low, high) in method.space.items():
        if refusal := _refused(reader, method, name, low):
            Console(stderr=True).print(f"{name} stays as it is: {refusal}", markup=False)
            continue
        while isinstance(high, int) and high > low and _refused(reader, method, name, high):
            high -= 1
        space[name] = low, high
    return space


def _refused(reader: Reader, method: vtc.Method, name: str, value: float) -> str:
    """Why this model takes no method with such a hyper-parameter; empty where it does."""
    try:
        with vtc.compressed(reader.model, method.tuned({name: value}), 1.0):
            return ""
    except ValueError as error:
        return str(error)


def batches(reader: Reader, search: Search) -> list[dict[str, Tensor]]:
    """What a search asks the model. Raises ValueError as `find_questions` and `list_images`."""
    images, questions = _benchmark(search) if search.images in benchmarks.NAMES else _folder(search)
    step = search.batch_size
    return [reader.inputs(images[n : n + step], questions[n : n + step]) for n in range(0, len(images), step)]


def _benchmark(search: Search) -> tuple[list[Image.Image], list[str]]:
    examples = benchmarks.find(search.images).load("train", search.samples, search.seed)
    return [example.image for example in examples], [example.question for example in examples]


def _folder(search: Search) -> tuple[list[Image.Image], list[str]]:
    """All questions about some of a folder's images."""
    files = list_images(Path(search.images))
    asked = list(zip(files, find_questions(search.questions, files), strict=True))
    random.Random(search.seed).shuffle(asked)
    some = [(file, questions) for file, questions in asked if questions][: search.samples]
    pairs = [(open_image(file), question) for file, questions in some for question in questions]
    return [image for image, _ in pairs], [question for _, question in pairs]


@torch.inference_mode()
def last_states(reader: Reader, inputs: dict[str, Tensor]) -> Tensor:
    """The final hidden state of each prompt's last token: (batch, width) float32."""
    return reader.model.base_model(**inputs).last_hidden_state[:, -1].float()
