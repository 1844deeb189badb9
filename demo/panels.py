"""The page's texts as HTML: answers with their figures, examples, methods, how to call it from Python."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from html import escape

from vtc.demo.asking import Answer, Asked, HandPicked, Pair
from vtc.stage import Method

API = """from gradio_client import Client, handle_file

client = Client("<span class="origin">http://127.0.0.1:7860/</span>")
result = client.predict(
    image=handle_file("photo.png"),  # or a list of them
    question="what color is the circle?",
    method="vtc-cls",
    budget=0.25,  # a share of the visual tokens (float), or a number of them (int)
    api_name="/predict",
)
result["answers"]["compressed"]["text"], result["kept"]"""


def thumbnails(examples: Sequence[tuple[str, str]]) -> str:
    """A button for each (image URL, question), and one for a new scene."""
    buttons = "".join(
        f'<button type="button" data-number="{number}" title="{escape(question)}">'
        f'<img src="{image}" alt="Example: {escape(question)}"></button>'
        for number, (image, question) in enumerate(examples)
    )
    new = '<button type="button" class="new" data-number="-1" title="Another scene of the benchmark">New scene</button>'
    return f'<div class="thumbnails">{buttons}{new}</div>'


def problem(text: str = "") -> str:
    """What is missing or wrong."""
    return f'<p class="problem" role="alert">{escape(text)}</p>' if text else ""


def described(method: type[Method]) -> str:
    """A method in one line, with a link to its paper, as Markdown."""
    line = (method.__doc__ or "").strip().splitlines()[0]
    found = re.fullmatch(r"(.*), arXiv (\d{4}\.\d{4,5})", method.paper)
    paper = f"[{found[1]}, arXiv {found[2]}](https://arxiv.org/abs/{found[2]})" if found else method.paper
    return f"{line} *{paper}*" if not found else f"{line} {paper}"


def api() -> str:
    """How to ask from Python."""
    return (
        f"<pre><code>{API}</code></pre><p class='hint'>The result is what <em>Download JSON</em> saves: answers, "
        "figures, indices of the kept tokens, the layer before which each other one left, scores, settings, versions."
        "</p>"
    )


def answers(pair: Pair, device: str, asked: Asked | None = None, truth: str | None = None) -> str:
    """Both answers side by side, words of the compressed one marked that the full one does not have."""
    full, small, done = pair.full, pair.compressed, pair.trace is not None
    marked = _marked(full.text, small.text) if done else escape(small.text)
    asks = f'<p class="asked">{escape(asked.question)}</p>' if asked else ""
    right = f'<p class="truth">Right answer: <strong>{escape(truth)}</strong></p>' if truth and done else ""
    cards = (
        _card("Full model", "", escape(full.text), full, done or small.text, _verdict(full, truth, done)),
        _card("Compressed", _setting(asked), marked, small, done, _verdict(small, truth, done)),
    )
    reason = f'<p class="why">{escape(pair.why)} <span>Measured now on {escape(device)}.</span></p>' if pair.why else ""
    return f'{asks}{right}<div class="answers">{"".join(cards)}</div>{reason}'


def _setting(asked: Asked | None) -> str:
    """Method and budget in words."""
    if asked is None:
        return ""
    if isinstance(asked.method, HandPicked):
        count = len(asked.method.tokens)
        return f"{count} token{'s' * (count != 1)} picked by hand"
    return f"{asked.method.name} at {setting(asked.budget)}"


def setting(budget: int | float | None) -> str:
    """A budget in words."""
    return f"{budget} tokens" if isinstance(budget, int) else "its own" if budget is None else f"{100 * budget:g} %"


def _verdict(answer: Answer, truth: str | None, done: bool) -> str:
    if not truth or not done:
        return ""
    right = answer.text.strip().lower() == truth.lower()
    return f'<span class="verdict {"right" if right else "wrong"}">{"✓ right" if right else "✗ wrong"}</span>'


def _card(title: str, setting: str, text: str, answer: Answer, done: object, verdict: str) -> str:
    figures = (
        ("visual tokens", _number(answer.tokens, 1)),
        ("prefill", _number(answer.prefill, 1e3, "ms")),
        ("a token", _number(answer.decode, 1e3, "ms")),
        ("KV cache", _number(answer.kv_bytes, 2**-20, "MiB")),
    )
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    shown = text or ('<span class="none">(no answer)</span>' if done else "&nbsp;")
    return (
        f'<section class="answer"><h3>{title} <span class="setting">{escape(setting)}</span></h3>'
        f'<p class="text" aria-live="polite">{shown}</p>{verdict}<dl>{rows}</dl></section>'
    )


def _number(value: float | None, scale: float, unit: str = "") -> str:
    if value is None:
        return "–"
    scaled = value * scale
    return f"{scaled:,.0f} <small>{unit}</small>" if scaled >= 100 else f"{scaled:.3g} <small>{unit}</small>"


def _marked(before: str, after: str) -> str:
    old, new = before.split(), after.split()
    parts = []
    for kind, _, _, start, end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if words := escape(" ".join(new[start:end])):
            parts.append(words if kind == "equal" else f"<mark>{words}</mark>")
    return " ".join(parts)
