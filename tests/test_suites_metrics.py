"""A benchmark's own metric: aggregates, their intervals, choices by likelihood, tasks of several rounds."""

# ruff: noqa: F811 (fixtures are imported)

import copy
import json
import math

import numpy as np
import pytest
import torch
from eval_fixtures import read_lines
from suite_fixtures import data, model  # noqa: F401 (fixtures)

from vtc.eval import measure, scenes, suites

ARMS = {"methods": ("random",), "budgets": (0.25,), "batch_size": 4, "device": "cpu"}


class Task:
    """As much of lmms-eval's as an aggregate needs."""

    def __init__(self, name, aggregations):
        self.config = type("Config", (), {"task": name})
        self.aggregation = lambda: aggregations


def samples(metric, items):
    return [{metric: item} for item in items]


# -- the aggregate, and its interval --------------------------------------------------------------------------------


def test_an_aggregate_that_is_a_mean_is_bootstrapped_as_one():
    def share(items):
        return sum(item["pred"] == item["answer"] for item in items) / len(items)

    rng = np.random.default_rng(0)
    arms = [[{"pred": int(x), "answer": 1} for x in rng.integers(0, 2, 60)] for _ in range(2)]
    own = measure.own_metric(Task("seed", {"all": share}), [samples("all", arm) for arm in arms], seed=3)
    values = np.array([[item["pred"] for item in arm] for arm in arms], float)
    assert own.percent
    assert np.array_equal(own.singles, values)
    assert np.array_equal(own.draws, measure.report.bootstrap(values.T, 3))
    assert own.values == pytest.approx(values.mean(1))


def test_an_aggregate_that_is_none_is_run_again_on_resampled_questions():
    """F1, slowly and by its formula, on the same questions in both arms."""

    def f1(items):
        hits = sum(p and t for p, t in items)
        said, there = sum(p for p, _ in items), sum(t for _, t in items)
        return 2 * hits / (said + there) if said + there else 0.0

    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, 200)
    arms = [[(int(t if rng.random() < right else 1 - t), int(t)) for t in truth] for right in (0.9, 0.6)]
    own = measure.own_metric(Task("pope", {"pope_f1_score": f1}), [samples("pope_f1_score", a) for a in arms], 0)
    assert own.singles is None
    assert own.draws.shape == (measure.RESAMPLES, 2)
    rng = np.random.default_rng(0)
    for row in own.draws[:5]:
        chosen = rng.integers(0, 200, 200)
        assert row == pytest.approx([f1([arm[i] for i in chosen]) for arm in arms])
    low, high = measure.report.interval(own.draws[:, 0])
    assert low < own.values[0] < high


def test_the_pairs_of_mme_are_drawn_together():
    from lmms_eval.tasks.mme.utils import mme_aggregate_results

    rng = np.random.default_rng(2)
    items = [
        {"question_id": f"{n // 2}.png", "category": "count", "score": float(rng.integers(0, 2))} for n in range(40)
    ]
    own = measure.own_metric(
        Task("mme", {"mme_perception_score": mme_aggregate_results}), [samples("mme_perception_score", items)], 0
    )
    assert not own.percent
    pairs = np.array([item["score"] for item in items]).reshape(-1, 2)
    points = 100 * pairs.mean(1) + 100 * (pairs.sum(1) == 2)
    assert own.values[0] == pytest.approx(points.mean())
    spread = points.std() / math.sqrt(len(points))
    assert own.draws.std() == pytest.approx(spread, rel=0.25)


def test_what_is_better_when_lower_is_no_accuracy():
    def task(**better):
        return type("Rated", (Task,), {"higher_is_better": lambda self: better})("rated", {})

    given = {"wer": 0.75, "bleu": 0.5, "halved": {"score": 0.25}}
    assert suites._score(task(wer=False, bleu=True), given) == 0.5
    assert suites._score(task(wer=False, other=True, halved=True), given) == 0.25
    assert suites._score(task(wer=False), given) is None


# -- tasks that score in the aggregate only -------------------------------------------------------------------------


def test_tasks_that_score_in_the_aggregate_only(data, tmp_path):
    pytest.importorskip("openpyxl", reason="MMBench writes a sheet")
    tasks = ("seedbench", "mmbench_en_dev_static", "refcoco_bbox_rec_val", "mme", "pope")
    rows = suites.evaluate(suites.Settings(tasks, limit=8, gen_kwargs="max_new_tokens=4", **ARMS), tmp_path / "run")
    metrics = {task: found[0]["metric"] for task, found in rows.items()}
    assert metrics == {
        "seedbench": "seed_all",
        "mmbench_en_dev_static": "gpt_eval_score",
        "refcoco_bbox_rec_val": "refcoco_ACC@0.5",
        "mme": "mme_perception_score",
        "pope": "pope_f1_score",
    }
    for found in rows.values():
        for row in found:
            assert row["value"] == pytest.approx(row["metrics"][f"{row['metric']},none"])
            assert row["value_low"] <= row["value"] <= row["value_high"]
    assert rows["seedbench"][0]["percent"]
    assert rows["pope"][0]["percent"]
    for line in read_lines(tmp_path / "run" / "seedbench"):
        assert line["correct"] is None
    assert rows["seedbench"][0]["accuracy"] is None
    stored = [json.loads(line) for line in (tmp_path / "run" / "replies-0.jsonl").read_text().splitlines()]
    assert max(line["measured"]["output_tokens"] for line in stored) <= 4  # the tasks ask for up to 1,024
    json.dumps(rows, allow_nan=False)


# -- choices by likelihood ------------------------------------------------------------------------------------------


def test_choices_by_likelihood(model, data, tmp_path):
    """Each choice as one forward over the prompt and the choice gives it, also where the prompt was pruned."""
    task = suites.load_tasks(("seedbench_ppl",))["seedbench_ppl"]
    model.task_dict["seedbench_ppl"] = task.dataset
    requests = [request for number in range(3) for request in requests_of(task, number)]
    assert len(requests) == 12
    model.is_simple = True
    for method, budget in (("uniform", 1.0), ("vtc-cls", 36), ("fastv", 0.5)):
        model.use(method, budget)
        model.batch_size = 8
        together = model.loglikelihood(requests)
        assert [found.text[0] for found in together] == pytest.approx(
            [likelihood(model, r) for r in requests], rel=1e-4
        )
        assert len({round(found.text[0], 4) for found in together}) > 6
    model.use("tokenselect", 0.5)
    with pytest.raises(ValueError, match="an answer is rated in one step"):
        model.loglikelihood(requests)
    model.use("uniform", 1.0)
    del model.is_simple
    rows = suites.evaluate(suites.Settings(("seedbench_ppl",), limit=4, **ARMS), tmp_path / "run")["seedbench_ppl"]
    assert [row["tokens"] for row in rows] == [144, 0, 36]
    assert rows[0]["metric"] == "acc"
    assert {line["prediction"] for line in read_lines(tmp_path / "run" / "seedbench_ppl")} <= set("0123")


def requests_of(task, number):
    about = {"task": task.config.task, "doc_id": number, "repeats": 1, "split": "test"}
    return task.construct_requests(doc_id=number, ctx=task.doc_to_text(task.eval_docs[number]), metadata=about)


def likelihood(model, request):
    """Token by token on a copy of the pruned prompt's cache, as generation would go on."""
    (chat, images, _), answer = model._document(request), model._target(request)
    inputs = model.reader.chats([chat], [images])
    mask, losses = inputs["attention_mask"], []
    with torch.inference_mode():
        found = model.reader.model(**inputs, use_cache=True, logits_to_keep=1)
        cache = copy.deepcopy(found.past_key_values)
        for token in model.reader.continuation(chat, answer):
            losses.append(-found.logits[0, -1].float().log_softmax(-1)[token].item())
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
            found = model.reader.model(
                input_ids=torch.tensor([[token]]), attention_mask=mask, past_key_values=cache, logits_to_keep=1
            )
    return sum(losses) / len(losses)


# -- several rounds -------------------------------------------------------------------------------------------------


def test_several_rounds(model):
    """Each round's prompt is the task's, made of the replies before; the last round ends it."""
    example, asked = scenes.example("test", 0, 0), []

    def messages(doc, round_idx=None, previous_output=None, previous_round_info=None):
        asked.append((round_idx, list(previous_output or []), previous_round_info))
        content = [{"type": "image", "url": example.image}, {"type": "text", "text": example.question}]
        turn = [{"role": "user", "content": content}]
        return turn if round_idx is None else (turn, round_idx == 2, previous_output, {"seen": round_idx})

    from lmms_eval.api.instance import Instance

    model.task_dict["rounds"] = {"test": [{}]}
    model.use("vtc-cls", 36)
    about = {"task": "rounds", "doc_id": 0, "repeats": 1, "split": "test"}
    arguments = ("", messages, {"max_new_tokens": 3}, 0, "rounds", "test")
    request = Instance(request_type="generate_until_multi_round", arguments=arguments, idx=0, metadata=about)
    (result,) = model.generate_until_multi_round([request])
    replies = result.text
    (alone,) = model.ask([suites_chat(messages({}))], max_new_tokens=3)
    assert replies == [alone.text, alone.text]
    assert asked[1:3] == [(1, [replies[0]], None), (2, replies, {"seen": 1})]
    assert model.taken[-1][1].visual_tokens == 72
    model.taken.clear()
    model.use("uniform", 1.0)


def suites_chat(messages):
    from vtc.eval.suite_model import document

    return document(messages, 4)
