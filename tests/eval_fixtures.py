"""A tiny random LLaVA saved to disk with its processor, as the commands load it: 16 visual tokens, 8 layers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

WORDS = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    *["user", "assistant", "what", "how", "many", "color", "is", "the", "a", "of", "there"],
)
ANSWERS = ("red", "green", "blue", "yes", "no", *map(str, range(10)))
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The folder of the checkpoint."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny(folder)
    return folder


def save_tiny(folder: Path) -> None:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = _tokenizer()
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=32, patch_size=8),
        text_config=LlamaConfig(
            **sizes,
            num_hidden_layers=8,
            vocab_size=len(tokenizer),
            initializer_range=0.3,  # answers of a model with weights of the usual size hardly depend on the image
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_id=WORDS.index("<image>"),
        image_seq_length=16,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate((*WORDS, *ANSWERS))}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special, additional_special_tokens=["<image>"])


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "vtc.cli", *map(str, arguments)]


ENVIRONMENT = {"COLUMNS": "200", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "TERM": "dumb"}
"""Wide enough that no table is cut."""


def start_vtc(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line as its own process: what others print there, too, is in its output."""
    environment = os.environ | ENVIRONMENT
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment, timeout=120)


def run_vtc(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process, which has loaded torch and transformers already."""
    from transformers.utils import logging

    from vtc import cli

    words, verbosity, code = ["vtc", *map(str, arguments)], logging.get_verbosity(), 0
    out, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, ENVIRONMENT),
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        warnings.catch_warnings(),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            logging.set_verbosity(verbosity)
    return subprocess.CompletedProcess(words, code, out.getvalue(), errors.getvalue())


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """A folder that another process is at work in."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = str(folder / ".lock")
    code = f"from filelock import FileLock\nwith FileLock({lock!r}): print('held', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        yield
        other.communicate("\n")


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
