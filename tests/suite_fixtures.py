"""lmms-eval on local data: the working folder, a sweep in this process, the commands that are started."""

import json
import os
import subprocess
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before anything imports datasets

import pytest
import suite_data
from eval_fixtures import TEMPLATE, WORDS, _tokenizer
from PIL import ImageFile

from vtc.eval import suites, tasks
from vtc.eval.reference import SHIPPED

TASKS = "vtc_scenes,pope,ai2d"
LIMIT = 7
"""Questions of each task: two processes do not get equally many."""
SETTINGS = suites.Settings(
    tasks=tuple(TASKS.split(",")),
    methods=("vtc-cls", "fastv"),
    budgets=(0.25, 0.05),
    limit=LIMIT,
    batch_size=4,
    device="cpu",
)


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    """The working folder with the local data, for this process and the commands that it starts."""
    folder = tmp_path_factory.mktemp("suites")
    suite_data.save_all(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        # importing lmms-eval makes Pillow take damaged images; other tests shall find it as it was
        patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
        yield folder


def evaluated(lm, loaded, limit=LIMIT) -> dict:
    """What lmms-eval itself makes of loaded tasks, with the index that this process has read."""
    from lmms_eval import evaluator

    return evaluator.simple_evaluate(
        model=lm, tasks=[*loaded.values()], limit=limit, bootstrap_iters=0, task_manager=suites._manager()
    )


def start(*command, **environment):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    return done


def torchrun(*command):
    return start(
        "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", *command, ACCELERATE_USE_CPU="true"
    )


def lmms_eval(launch, out, budget):
    """`python -m lmms_eval --model vtc`: (results, samples by task in the order of their questions)."""
    done = launch(
        "lmms_eval", "--model", "vtc",
        "--model_args", f"pretrained={SHIPPED['reference']},method=vtc-cls,budget={budget}",
        "--tasks", TASKS, "--include_path", tasks.PATH, "--limit", LIMIT, "--batch_size", 4, "--device", "cpu",
        "--output_path", out, "--log_samples",
    )  # fmt: skip
    assert list(out.glob("*/*_results.json")), done.stderr[-3000:]
    (results,) = out.glob("*/*_results.json")
    samples = {}
    for task in TASKS.split(","):
        (file,) = out.glob(f"*/*_samples_{task}.jsonl")
        samples[task] = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return results, json.loads(results.read_text()), samples


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return lmms_eval(start, tmp_path_factory.mktemp("one"), 36)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return lmms_eval(torchrun, tmp_path_factory.mktemp("two"), 36)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep in this process: the folder and the summary rows of each task."""
    out = tmp_path_factory.mktemp("swept") / "run"
    return out, suites.evaluate(SETTINGS, out)


@pytest.fixture(scope="module")
def model(data):
    from vtc.eval.suite_model import Vtc

    return Vtc("reference", batch_size=4, device="cpu")


def replies(samples):
    """By task, the answers as the model gave them."""
    return {task: [(s["doc_id"], reply(s)) for s in found] for task, found in samples.items()}


def reply(sample):
    """lmms-eval leaves `resps` out of its file where no filter changed anything."""
    found = sample.get("resps", sample["filtered_resps"])
    return found[0][0] if isinstance(found, list) else found


def tiny_llava_next():
    """A random model and its processor: images of 32 pixels, cut into up to 4 tiles."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    tiles = [[32, 64], [64, 32], [64, 64]]
    tokenizer = _tokenizer()
    tokenizer.padding_side = "left"
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=tiles
        ),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=32, patch_size=8),
        text_config=LlamaConfig(
            **sizes, **tokens, num_hidden_layers=8, vocab_size=len(tokenizer), initializer_range=0.3
        ),
        image_token_id=WORDS.index("<image>"),
        image_seq_length=16,
        image_grid_pinpoints=tiles,
    )
    torch.manual_seed(0)
    return LlavaNextForConditionalGeneration(config).eval(), processor
