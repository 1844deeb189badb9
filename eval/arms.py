"""The servers that `vtc load` compares, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vtc.stage import Budget

NAME = "model"
Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """A server, and what it is asked for."""

    name: str
    packs: bool
    """Whether it is vtc's; else transformers' own."""
    budget: Budget | None = None
    """None: all visual tokens."""


@dataclass(frozen=True)
class Case:
    """What is asked of every arm."""

    model: str
    method: str = "vtc-cls"
    clients: tuple[int, ...] = (1, 4, 12)
    """Closed loop: so many clients, each of which asks again when it is answered."""
    rates: tuple[float, ...] = ()
    """Open loop: requests a second that arrive by chance, whether others are answered or not."""
    requests: int = 24
    new_tokens: int = 16
    rounds: int = 3
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0


def arms(budgets: Sequence[Budget]) -> list[Arm]:
    """The baselines first: transformers' own server and the same engine unpruned."""
    found = [Arm("one by one, full", False), *(Arm(f"one by one, {shown(one)}", False, one) for one in budgets[:1])]
    return [*found, Arm("packed, full", True), *(Arm(f"packed, {shown(one)}", True, one) for one in budgets)]


def shown(budget: Budget) -> str:
    return f"{budget:.0%}" if isinstance(budget, float) else f"{budget} tokens"


# -- processes --------------------------------------------------------------------------------------------------------


@contextmanager
def servers(case: Case, compared: Sequence[Arm]) -> Iterator[dict[Arm, str]]:
    """The address of each arm; all of vtc's share one server. Raises RuntimeError where one does not come up."""
    kinds = {arm: arm if not arm.packs else None for arm in compared}
    context, found, running = multiprocessing.get_context("spawn"), {}, []
    try:
        for kind in dict.fromkeys(kinds.values()):
            with socket.socket() as one:
                one.bind(("127.0.0.1", 0))
                port = one.getsockname()[1]
            running.append(context.Process(target=_serve, args=(case, kind, port), daemon=True))
            running[-1].start()
            found[kind] = f"http://127.0.0.1:{port}"
            _wait(running[-1], found[kind])
        yield {arm: found[kind] for arm, kind in kinds.items()}
    finally:
        for process in running:
            process.terminate()
            process.join(30)


def _wait(process: Any, url: str) -> None:
    import httpx

    while process.is_alive():
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise RuntimeError(f"a server of this comparison ended with exit code {process.exitcode}")


def _serve(case: Case, arm: Arm | None, port: int) -> None:
    """A server until it is told to end; None: vtc's."""
    model, processor = material(case)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn ends by it, and would then die of it
    _packed(case, model, processor, port) if arm is None else _sequential(case, arm, model, processor, port)


def _packed(case: Case, model: Any, processor: Any, port: int) -> None:
    """`vtc serve`."""
    import asyncio

    from vtc.serve.app import Server
    from vtc.serve.limits import Limits

    server = Server(model, processor, NAME, method=None, limits=Limits(waiting=4096, new_tokens=case.new_tokens))
    server.start()
    try:
        asyncio.run(server.serve("127.0.0.1", port))
    finally:
        server.stop()


def _sequential(case: Case, arm: Arm, model: Any, processor: Any, port: int) -> None:
    """What `transformers serve` runs, around a model that is wrapped where the arm has a budget."""
    import uvicorn
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState

    import vtc

    if arm.budget is not None:
        vtc.wrap(model, case.method, arm.budget)

    class Loaded(ModelManager):
        def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            return model, processor

    manager, state, other = Loaded(model_timeout=-1), GenerationState(), None
    app = build_server(manager, ChatCompletionHandler(manager, state), other, other, other, other, state)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def material(case: Case) -> tuple[Any, Any]:
    """Model and processor: of a checkpoint, or of a true shape with random weights, which never ends by itself."""
    import logging

    import torch
    from transformers.utils import logging as transformers_logging

    from vtc.eval import shapes
    from vtc.eval.reader import load, model_path

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    if case.model not in shapes.SHAPES:
        reader = load(model_path(case.model), case.device)
        return reader.model, reader.processor
    model: Any = shapes.load(case.model, getattr(torch, case.dtype), case.device)
    model.generation_config.eos_token_id = None
    return model, _processor(model.config)


def _processor(config: Any) -> Any:
    """Of a LLaVA shape: each id is a word, so that what random weights say can be streamed."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(config.get_text_config().vocab_size)}
    del words[f"w{config.image_token_id}"]
    raw = Tokenizer(models.WordLevel(words | {"<image>": config.image_token_id}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    size = config.vision_config.image_size
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"height": size, "width": size}, do_center_crop=False),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=raw, unk_token="w0", pad_token="w1", additional_special_tokens=["<image>"]
        ),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }} {% endif %}{% endfor %}{% endfor %}",
    )
