"""`vtc choose`: the cheapest method and budget that keep a model's answers on a user's images, with a bound.

Nothing is labelled: an image agrees where the pruned model gives the full model's answers. Images are dealt into two
parts. On the search part, successive halving (Jamieson and Talwalkar, arXiv 1502.07943) finds a method for each budget.
On the held-out part these are tested from the largest budget down, each against the promise by the exact binomial bound
(Clopper and Pearson, Biometrika 26, 1934), and the first that fails ends it. As the order and the methods are fixed
before a held-out image is looked at, the chance that a broken promise is made is at most 1 - CONFIDENCE over all tests
together (fixed-sequence testing, as in Learn then Test, arXiv 2110.01052).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.stats import beta

import vtc
from vtc.eval import folder, progress, report
from vtc.eval.album import Album, Candidate, find_images, find_questions
from vtc.eval.reader import Reader, load, model_path, pick_device
from vtc.eval.store import Store
from vtc.methods.compose import with_budget
from vtc.stage import EVIDENCE, write_json

CONFIDENCE = 0.95
SEARCH = 16
"""The least images to search on, and the first slice of the halving."""

NONE = Candidate("uniform", 1.0)
"""What stands for no pruning: at a full budget any method is the untouched model, bit for bit."""
Agree = Callable[[Candidate, Sequence[int]], np.ndarray]
"""Whether a candidate's answers about each of these images are the full model's: (images,) bool. Raises BudgetError for
one that cannot reach its budget on them."""


@dataclass(frozen=True)
class Tested:
    """A candidate on held-out images; those that follow too many misses are not looked at."""

    candidate: Candidate
    images: int
    agreeing: int
    passed: bool
    """Whether the promise is kept. No bound of its own: picked among several, one would not hold with CONFIDENCE."""
    reason: str = ""
    """Why it cannot be run on some image, where that ended the test."""


@dataclass(frozen=True)
class Verdict:
    """What was found: the last candidate that passed, if any, and all that were tested."""

    chosen: Tested | None
    tested: list[Tested]
    searched: int
    """Images of the search part."""
    held: int
    """Images of the held-out part."""
    allowed: int
    """How many of these a candidate may miss."""
    tried: Sequence[float] = ()
    """Other promises that were tried on these answers before: with several the confidence is less than it says."""


# -- the promise ----------------------------------------------------------------------------------------------------


def lower_bound(agreeing: int, images: int) -> float:
    """The one-sided bound of Clopper and Pearson on the share of all images that `agreeing` of `images` speak for."""
    return float(beta.ppf(1 - CONFIDENCE, agreeing, images - agreeing + 1)) if agreeing else 0.0


def images_needed(promise: float) -> int:
    """How many held-out images a promise takes, where all of them agree."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(promise))


def misses_allowed(images: int, promise: float) -> int:
    """How many of `images` may disagree so that the bound keeps the promise; -1 where none may."""
    return next((n - 1 for n in range(images + 1) if lower_bound(images - n, images) < promise), images)


def deal(images: int, promise: float, seed: int) -> tuple[list[int], list[int]]:
    """The search part and the held-out part. Raises ValueError for too few images, with how many it takes."""
    if not 0 < promise < 1:
        raise ValueError(f"an agreement of {promise:g} cannot be promised: it lies above 0 and below 1")
    needed = images_needed(promise)
    if images < needed + SEARCH:
        possible = math.floor(1000 * lower_bound(images - SEARCH, images - SEARCH)) / 1000 if images > SEARCH else 0
        most = f"; with these, {possible:g} is the most that can be promised" if possible > 0 else ""
        raise ValueError(
            f"{images} images are too few: an agreement of {promise:g} at {CONFIDENCE:.0%} confidence takes {needed} "
            f"held-out ones without a single miss, and {SEARCH} to search on, {needed + SEARCH} in all{most}"
        )
    order = Random(seed).sample(range(images), images)
    cut = max(SEARCH, min(images // 4, images - needed))
    return order[:cut], order[cut:]


# -- the search -----------------------------------------------------------------------------------------------------


def rounds(methods: int, images: int) -> Iterator[tuple[range, int]]:
    """The halving's rounds: the images that are asked anew, twice as many each time, and how many methods stay."""
    start = 0
    while start < images:
        stop, methods = min(max(SEARCH, 2 * start), images), math.ceil(methods / 2)
        yield range(start, stop), methods
        if methods == 1:
            return
        start = stop


def halve(agree: Agree, methods: Sequence[str], budget: vtc.Budget, images: Sequence[int]) -> str | None:
    """Successive halving: all methods on few images, then the better half of them on more, until one is left.

    Among equals those named first. None where no method reaches the budget.
    """
    left, agreeing = list(methods), dict.fromkeys(methods, 0)
    for new, stay in rounds(len(methods), len(images)):
        for method in list(left):
            try:
                agreeing[method] += int(agree(Candidate(method, budget), [images[n] for n in new]).sum())
            except vtc.BudgetError:
                left.remove(method)
        left = sorted(left, key=lambda method: -agreeing[method])[:stay]
    return left[0] if left else None


def examine(agree: Agree, candidate: Candidate, images: Sequence[int], promise: float, step: int = 32) -> Tested:
    """A candidate on held-out images, `step` at a time, until they are done or it has missed too many."""
    allowed, seen, agreeing = misses_allowed(len(images), promise), 0, 0
    while seen < len(images) and seen - agreeing <= allowed:
        new = images[seen : seen + step]
        try:
            agreeing += int(agree(candidate, new).sum())
        except vtc.BudgetError as error:  # images of many sizes: it cannot be run on some
            return Tested(candidate, seen, agreeing, False, str(error))
        seen += len(new)
    return Tested(candidate, seen, agreeing, seen - agreeing <= allowed)


def choose(agree: Agree, candidates: Sequence[Candidate], images: int, promise: float, seed: int = 0) -> Verdict:
    """Search and test. Raises ValueError for too few images, and for budgets that have no order."""
    if len({type(candidate.budget) for candidate in candidates}) > 1:
        raise ValueError("budgets are all fractions or all numbers of tokens: else nobody knows which is the larger")
    search, held = deal(images, promise, seed)
    tested: list[Tested] = []
    for budget in sorted({candidate.budget for candidate in candidates}, reverse=True):
        methods = [candidate.method for candidate in candidates if candidate.budget == budget]
        if (method := halve(agree, methods, budget, search)) is None:
            continue
        tested.append(examine(agree, Candidate(method, budget), held, promise))
        if not tested[-1].passed:
            break
    passed = [one for one in tested if one.passed]
    chosen = passed[-1] if passed else None
    return Verdict(chosen, tested, len(search), len(held), misses_allowed(len(held), promise))


# -- the command ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What is asked for. `questions` None: `QUESTIONS`."""

    images: str
    model: str = "reference"
    questions: str | None = None
    agree: float = 0.98
    methods: tuple[str, ...] = ("tally", "tome", "vflowopt", "vtc-cls", "fastv", "uniform")
    budgets: tuple[vtc.Budget, ...] = (0.75, 0.5, 0.35, 0.25, 0.16, 0.11)
    seed: int = 0
    batch_size: int = 8
    max_new_tokens: int = 16
    device: str = "auto"


ANSWERS = ("model", "batch_size", "max_new_tokens")
"""The settings that answers depend on, beside method and budget, by which they are found, images and questions: a run
with another promise, seed or budgets goes on with what the folder holds."""


def run(settings: Settings, out: Path, restart: bool = False, bar: bool = False) -> tuple[Verdict, dict[str, str]]:
    """Choose, resuming what `out` holds of the same run, and write choice.json there.

    Returns the verdict, and why what cannot work on this model was left out, by its name. Raises
    ValueError for what cannot be read, for too few images, and for a folder that holds another run, or that another
    process is at work in.
    """
    images, digests = find_images(Path(settings.images), bar)
    questions = find_questions(Path(settings.questions) if settings.questions else None, images)
    asked = [n for n, about in enumerate(questions) if about]
    images, digests, questions = ([part[n] for n in asked] for part in (images, digests, questions))
    deal(len(images), settings.agree, settings.seed)
    path, device = model_path(settings.model), pick_device(settings.device)
    reader = load(path, device, settings.max_new_tokens)
    methods = resolve(settings.methods)
    candidates, refused = working(reader, methods, settings.budgets)
    names = [image.name for image in images]
    data = hashlib.sha256(json.dumps([names, digests, questions]).encode()).hexdigest()[:16]
    found = _digests(reader, candidates, methods)
    asked_with = SimpleNamespace(**{name: getattr(settings, name) for name in ANSWERS})
    config = folder.configuration(asked_with, path, device, {**found, "images and questions": data})
    with folder.alone(out):
        others = _open(out, config, restart)
        tried = promised(out / "choice.json")
        album = Album(reader, images, questions, Store(out / "results.jsonl"), methods, settings.batch_size)
        with progress.bar("asking", _at_most(settings, candidates, len(images)), shown=bar) as album.tick:
            verdict = choose(album, candidates, len(images), settings.agree, settings.seed)
        verdict = replace(verdict, tried=sorted({*tried} - (set() if others else {settings.agree})))
        write(verdict, settings, album, out / "choice.json")
    return verdict, refused


def _digests(reader: Reader, candidates: Sequence[Candidate], methods: Mapping[str, vtc.Method]) -> dict[str, str]:
    """One for each candidate, as it is bound to its budget."""
    found = {}
    for candidate in candidates:
        name, budget = candidate.method, candidate.budget
        (digest,) = folder.method_digests(reader.model, {name: methods[name]}, [budget]).values()
        found[f"method {name} at {budget}"] = digest
    return found


def _open(out: Path, config: dict[str, Any], restart: bool) -> bool:
    """Make `out` this run's folder; gives whether other candidates have answers there.

    They stay, since an answer is found by its method and budget: what both runs ask has to be the same.
    """
    asked = config["digests"]
    there = {} if restart else folder.read_config(out).get("digests", {})
    both = {name: asked.get(name, digest) for name, digest in there.items()}
    folder.open_folder(out, {**config, "digests": both or asked}, restart)
    write_json(out / "config.json", {**config, "digests": {**there, **asked}})
    return bool(there.keys() - asked.keys())


def resolve(names: Sequence[str]) -> dict[str, vtc.Method]:
    """The methods that are named. Raises ValueError for a file that says a budget."""
    found: dict[str, vtc.Method] = {}
    for name in names:
        found[name], own = with_budget(name)
        if own is not None:
            raise ValueError(f"{name} names a budget, and the budget is what is looked for: take it out of the file")
    return found


def working(
    reader: Reader, methods: Mapping[str, vtc.Method], budgets: Sequence[vtc.Budget]
) -> tuple[list[Candidate], dict[str, str]]:
    """What this model can be wrapped with, and why not the rest. Raises ValueError where nothing is left.

    A budget that is out of reach is not refused here: that may hang on the image.
    """
    left: list[Candidate] = []
    refused: dict[str, str] = {}
    for name, method in methods.items():
        for budget in report.distinct(budgets):
            try:
                with vtc.compressed(reader.model, method, budget):
                    left.append(Candidate(name, budget))
            except vtc.BudgetError:
                left.append(Candidate(name, budget))
            except ValueError as error:
                refused[f"{name} at {report.written(budget)}"] = str(error)
    if not left:
        raise ValueError(f"no method works on this model: {'; '.join(refused.values())}")
    return left, refused


def _at_most(settings: Settings, candidates: Sequence[Candidate], images: int) -> int:
    """How many images candidates are asked about, at the most."""
    search, held = deal(images, settings.agree, settings.seed)
    asked = 0
    for methods in Counter(candidate.budget for candidate in candidates).values():
        asked += len(held)
        for new, stay in rounds(methods, len(search)):
            asked, methods = asked + methods * len(new), stay
    return asked


def promised(file: Path) -> list[float]:
    """The promises that were tried with the answers of this file's folder."""
    try:
        evidence = json.loads(file.read_text(encoding="utf-8"))[EVIDENCE]
        return [*evidence["tried"], evidence["agree"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write(verdict: Verdict, settings: Settings, album: Album, file: Path) -> None:
    """The JSON file that stands for method and budget wherever a method is named; evidence beside."""
    chosen = verdict.chosen.candidate if verdict.chosen else NONE
    evidence: dict[str, Any] = {
        "kept": verdict.chosen is not None,
        "model": settings.model,
        "agree": settings.agree,
        "confidence": CONFIDENCE,
        "tried": verdict.tried,
        "searched": verdict.searched,
        "held": verdict.held,
        "misses_allowed": verdict.allowed,
        "questions": settings.questions or "default",
        "seed": settings.seed,
        "tested": [{**asdict(one), "tokens": album.tokens(one.candidate)} for one in verdict.tested],
    }
    method = album.methods.get(chosen.method) or vtc.find_method(chosen.method)
    method.to_json(file, chosen.budget, evidence)


def sentences(verdict: Verdict, promise: float) -> Iterator[str]:
    """What was found, in words."""
    rule = f"of {verdict.held} held-out images a candidate may miss {verdict.allowed}"
    for one in verdict.tested:
        name = f"{one.candidate.method} at {report.written(one.candidate.budget)}"
        failed = (
            f", and it cannot be run on all of them: {one.reason}" if one.reason else f", and that is too few ({rule})"
        )
        yield f"{name}: {one.agreeing} of {one.images} as the full model{'' if one.passed else failed}"
    if verdict.chosen:
        best = verdict.chosen.candidate
        yield (
            f"take {best.method} at {report.written(best.budget)}: at least {100 * promise:g} % of images like these "
            f"keep their answers, with {CONFIDENCE:.0%} confidence"
        )
    elif verdict.tested:
        yield f"none: do not prune this, where {100 * promise:g} % of the answers have to stay"
    else:
        yield "none: no method reaches any of these budgets on this model"
