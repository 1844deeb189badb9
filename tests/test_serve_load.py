"""`vtc load`: what its clients count, against a server in this process."""

import asyncio
import threading

import models
import pytest
from serve_fixtures import free_port, healthy, in_a_loop, picture, serving, soon

from vtc.eval import arms as arms_
from vtc.eval import clients
from vtc.eval.arms import Arm, Case, arms
from vtc.eval.clients import Sample
from vtc.serve.limits import Limits

PACKED = Arm("packed, 25%", True, 0.25)


@pytest.fixture(scope="module")
def url():
    with serving(Limits(new_tokens=20, waiting=3)) as server:
        server.chat.model_manager.force_model = clients.NAME
        port, stopped = free_port(), threading.Event()

        async def run() -> None:
            task = asyncio.create_task(server.serve("127.0.0.1", port))
            while not stopped.is_set():
                await asyncio.sleep(0.05)
            task.cancel()

        thread = threading.Thread(target=lambda: asyncio.run(run()))
        thread.start()
        address = f"http://127.0.0.1:{port}"
        assert soon(lambda: healthy(address))
        yield address
        stopped.set()
        thread.join(10)


def test_a_closed_loop_counts_what_is_answered(url):
    case = Case("tiny", new_tokens=5)
    bodies = [clients.body(PACKED, case, number) for number in range(6)]
    samples, seconds = in_a_loop(clients.closed(url, bodies, 2))
    assert [(sample.status, sample.tokens) for sample in samples] == [(200, 5)] * 6
    assert all(0 < sample.first <= sample.whole <= seconds for sample in samples)
    found = clients.summary(samples, seconds)
    assert found["requests_per_second"] == pytest.approx(6 / seconds)
    assert found["tokens_per_second"] == pytest.approx(30 / seconds)
    assert found["refused"] == 0


def test_an_open_loop_does_not_wait_and_counts_who_is_refused(url):
    case = Case("tiny", new_tokens=20)
    bodies = [clients.body(PACKED, case, number) for number in range(12)]
    samples, seconds = in_a_loop(clients.opened(url, bodies, 1000.0, 0))
    refused = [sample for sample in samples if sample.status == 429]
    assert 1 <= len(refused) <= 9
    assert clients.summary(samples, seconds)["refused"] == len(refused)


def test_every_number_has_an_image_of_its_own():
    case = Case("tiny")
    assert clients.body(PACKED, case, 1) == clients.body(PACKED, case, 1) != clients.body(PACKED, case, 2)
    turns = clients.body(PACKED, case, 1, ("red", "how many?"))["messages"]
    assert [message["role"] for message in turns] == ["user", "assistant", "user"]
    full, pruned = (clients.body(Arm("", True, budget), case, 1)["vtc"] for budget in (None, 0.25))
    assert (full, pruned) == ({"method": "none"}, {"method": "vtc-cls", "budget": 0.25})
    assert "vtc" not in clients.body(Arm("", False, 0.25), case, 1), "transformers' server knows no such field"


def test_ratios_are_to_the_first_arm_at_the_same_load():
    def row(arm: str, count: int, number: int, rate: float) -> dict:
        samples = [Sample(0.1, 0.2, 4)] * 2
        return {"arm": arm, "clients": count, "round": number, **clients.summary(samples, 2 / rate)}

    loads = [(count, number) for count in (1, 4) for number in (0, 1)]
    rows = [row(arm, count, number, rate * count) for arm, rate in (("a", 2.0), ("b", 3.0)) for count, number in loads]
    assert [(x["arm"], x["clients"], x["ratio"]) for x in clients.medians(rows)] == [
        ("a", 1, 1.0), ("a", 4, 1.0), ("b", 1, 1.5), ("b", 4, 1.5)
    ]  # fmt: skip


def test_a_shape_has_a_processor_whose_words_are_its_ids():
    config = models.llava().config
    processor = arms_._processor(config)
    (request,) = clients.body(PACKED, Case("tiny"), 1)["messages"]
    chat = [{"role": "user", "content": [{"type": "image"}, request["content"][1]]}]
    text = processor.apply_chat_template(chat)
    ids = processor(images=picture(0), text=text)["input_ids"][0]
    assert ids.count(config.image_token_id) == 36
    assert len(ids) > 40
    assert processor.decode([5, 6]) == "w5 w6"


def test_the_baselines_come_first():
    assert [arm.name for arm in arms([0.25, 64])] == [
        "one by one, full", "one by one, 25%", "packed, full", "packed, 25%", "packed, 64 tokens"
    ]  # fmt: skip
