"""The server: replies as OpenAI's, bounds that hold, clients that go away, a worker that dies."""

import asyncio
import gc
import json
import re
import threading
import weakref
from dataclasses import replace

import httpx
import models
import numpy
import pytest
from own_models import llava_next_processor, llava_onevision_processor
from PIL import Image
from serve_fixtures import (
    NEW,
    QUARTER,
    QUESTIONS,
    SIZES,
    alone,
    chat,
    content,
    get,
    in_a_loop,
    picture,
    post,
    request,
    serving,
    soon,
    spoken,
    tiny,
)
from transformers.cli.serving.utils import CBStreamer

from vtc.serve.alone import Solo
from vtc.serve.encode import NOTHING
from vtc.serve.limits import Limits
from vtc.serve.request import read
from vtc.serve.stops import Stops


def test_replies_are_those_of_generate(served):
    """At once: packed and alone, streamed and whole, several budgets, several images, none."""
    asked = [
        (QUESTIONS[0], QUARTER, [picture(0)], {}),
        (QUESTIONS[0], QUARTER, [picture(0)], {"stream": True}),
        (QUESTIONS[1], ("vtc-cls", 5), [picture(1)], {"vtc": {"budget": 5}}),
        (QUESTIONS[1], ("tome", 0.5), [picture(2)], {"vtc": {"method": "tome", "budget": 0.5}, "stream": True}),
        (QUESTIONS[2], NOTHING, [picture(3), picture(4)], {"vtc": {"method": "none"}}),
        (QUESTIONS[2], ("fastv", 0.5), [picture(5)], {"vtc": {"method": "fastv", "budget": 0.5}}),
        (QUESTIONS[2], ("fastv", 0.5), [picture(6)], {"vtc": {"method": "fastv", "budget": 0.5}, "stream": True}),
        (QUESTIONS[2], ("coverpruner", 0.25), [picture(7)], {"vtc": {"method": "coverpruner", "budget": 0.25}}),
        (QUESTIONS[0], QUARTER, [], {}),
    ]
    replies = post(served, *(request(question, *seen, **more) for question, _, seen, more in asked))
    assert [*map(content, replies)] == [spoken(question, spend, *seen) for question, spend, seen, _ in asked]


@pytest.mark.parametrize("together", [False, True], ids=["onevision", "next"])
def test_several_images_are_read_as_generate_reads_them(together):
    """OneVision cuts an image into tiles where it is the only one of its prompt."""
    model = models.llava_next(windows=False) if together else models.llava_onevision()
    model.generation_config.suppress_tokens = None
    served = model, llava_next_processor() if together else llava_onevision_processor()
    seen, strip = [picture(0).resize((96, 48)), picture(1).resize((48, 100))], picture(2).resize((720, 12))
    told = []
    with serving(sizes=replace(SIZES, cache=4096, remembered=2048), served=served) as server:
        for images in (seen, seen[:1], [strip]):
            (reply,) = post(server, request(QUESTIONS[1], *images))
            assert content(reply) == spoken(QUESTIONS[1], QUARTER, *images, served=served)
            told.append(reply.json()["usage"]["vtc"]["packed"])
    assert told == [together, True, True]


def test_who_ends_with_the_last_word_has_ended(monkeypatch):
    """Packed and alone, whole and streamed; a token earlier it is the length that ends the answer."""
    model, processor = tiny()
    text = processor.apply_chat_template(chat(QUESTIONS[0]), add_generation_prompt=True)
    said = alone(text, [picture(0)], QUARTER)
    last = next(place for place in range(2, NEW) if said[place] not in said[:place])
    monkeypatch.setattr(model.generation_config, "eos_token_id", said[last])
    kinds = [{}, {"stream": True}, {"top_p": 0.5}, {"top_p": 0.5, "stream": True}]
    with serving() as server:
        for most, reason in (last + 1, "stop"), (last, "length"):
            replies = post(
                server, *(request(QUESTIONS[0], picture(0), **kind) | {"max_tokens": most} for kind in kinds)
            )
            found = [re.findall(r'"finish_reason":"(\w+)"', reply.text) for reply in replies]
            assert found == [[reason]] * 4


def test_null_means_the_default(served):
    nothing = dict.fromkeys(("stream", "n", "temperature", "top_p", "stop", "stream_options", "user", "vtc"))
    assert content(post(served, request(QUESTIONS[0], picture(0), **nothing))[0]) == spoken(
        QUESTIONS[0], QUARTER, picture(0)
    )


def test_a_stream_tells_its_usage_unless_it_is_not_to(served):
    options = (None, {}, {"include_usage": None}, {"include_usage": True}, {"include_usage": False})
    replies = post(served, *(request(QUESTIONS[0], stream=True, stream_options=one) for one in options))
    assert len({*map(content, replies)}) == 1
    assert ["completion_tokens" in reply.text for reply in replies] == [*[True] * 4, False]
    assert all('"finish_reason":"length"' in reply.text for reply in replies)


def test_grey_of_16_bits_is_answered_as_of_8(served):
    """Pillow alone would make it white."""
    grey, white = picture(0).convert("L"), Image.new("RGB", (48, 48), "white")
    deep = Image.fromarray(numpy.asarray(grey, dtype=numpy.uint16) * 257)
    answer = spoken(QUESTIONS[0], QUARTER, grey.convert("RGB"))
    assert content(post(served, request(QUESTIONS[0], deep))[0]) == answer != spoken(QUESTIONS[0], QUARTER, white)


def test_a_reply_tells_what_it_cost(served):
    packed, alone_ = post(
        served,
        request(QUESTIONS[0], picture(0), picture(1)),
        request(QUESTIONS[0], picture(0), vtc={"method": "fastv", "budget": 0.5}),
    )
    told = packed.json()["usage"]
    assert told["vtc"] == {
        "method": "vtc-cls", "budget": 0.25, "visual_tokens_before": 72, "visual_tokens_after": 18, "packed": True
    }  # fmt: skip
    assert told["completion_tokens"] == NEW
    assert told["prompt_tokens"] == told["total_tokens"] - NEW > 72
    fastv = alone_.json()["usage"]["vtc"]
    assert (fastv["visual_tokens_before"], fastv["packed"]) == (36, False)
    assert 17 <= fastv["visual_tokens_after"] <= 18


def test_a_sampled_answer_is_alone(served):
    reply = post(served, request(QUESTIONS[0], picture(0), temperature=0.7, top_p=0.9))[0].json()
    assert reply["usage"]["vtc"]["packed"] is False


def test_a_temperature_that_is_all_but_nothing_is_greedy(served):
    """Packed, and alone where something else asks for that."""
    asked = [request(QUESTIONS[0], picture(0), temperature=1e-40, **more) for more in ({}, {"top_p": 0.9})]
    replies = post(served, *asked, request(QUESTIONS[0], picture(0), temperature=1e-3))
    assert [*map(content, replies[:2])] == [spoken(QUESTIONS[0], QUARTER, picture(0))] * 2
    assert [reply.json()["usage"]["vtc"]["packed"] for reply in replies] == [True, False, False]


def test_an_answer_ends_before_a_stop_string(served):
    """Whole and streamed, where it spans two tokens, and where it only begins."""
    answer = spoken(QUESTIONS[0], QUARTER, picture(0))
    first, second, *_, last = answer.split()
    stops = [second, f"{first} {second}", ["no such words", f"{first[-1]} {second[0]}"], f"{last} and more", []]
    asked = [request(QUESTIONS[0], picture(0), stop=stop, stream=stream) for stop in stops for stream in (False, True)]
    replies = post(served, *asked)
    cut = [answer.partition(stop)[0] for stop in (second, f"{first} {second}", f"{first[-1]} {second[0]}")]
    assert [*map(content, replies)] == [text for text in (*cut, answer, answer) for _ in (False, True)]
    assert len({*cut, answer}) == 4
    whole = [reply.json() for reply in replies[::2]]
    assert [reply["choices"][0]["finish_reason"] for reply in whole] == [*["stop"] * 3, *["length"] * 2]
    assert [reply["usage"]["completion_tokens"] < NEW for reply in whole] == [*[True] * 3, *[False] * 2]


def test_pieces_that_may_become_a_stop_string_wait():
    stops = Stops(["end", "and so"])
    assert [stops.tell(piece) for piece in ("a", " e", "n", "t", "r an", "d ", "s", "i en", "d.")] == [
        "", "a ", "", "ent", "r ", "", "", "and si ", ""
    ]  # fmt: skip
    assert stops.over
    assert [stops.tell(""), stops.tell("more", last=True)] == ["", ""]
    stops = Stops(["end"])
    assert [stops.tell("an en"), stops.tell("", last=True), stops.over] == ["an ", "en", False]


def test_a_budget_goes_down_with_the_load_and_up_again():
    with serving(Limits(waiting=9), budgets=(0.5, 0.25, 0.11)) as server:
        found = [server.spend()]
        for inside in (1, 3, 4, 6, 7, 9, 2):
            server.app.inside = inside
            found.append(server.spend())
        assert [budget for _, budget in found] == [0.5, 0.5, 0.5, 0.25, 0.25, 0.11, 0.11, 0.5]
        server.app.inside = 6
        told = post(server, request(QUESTIONS[0], picture(0)))[0].json()["usage"]["vtc"]
        assert (told["budget"], told["visual_tokens_after"]) == (0.11, 4)


def test_only_what_is_for_clients_is_served(served):
    assert get(served, "/v1/models").json()["data"][0]["id"] == "tiny"
    assert get(served, "/health").json() == {"status": "ok"}
    for path in ("/docs", "/openapi.json", "/reset", "/load_model", "/v1/completions", "/v1/responses"):
        assert get(served, path).status_code in (404, 405), path

    async def gone(path: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=served.app), base_url="http://x") as client:
            return (await client.post(path, json={"model": "x"})).status_code

    assert {in_a_loop(gone(path)) for path in ("/reset", "/load_model", "/v1/responses")} == {404}


def test_metrics_count(served):
    def value(name: str) -> float:
        return float(re.search(rf"^{re.escape(name)} (\S+)$", get(served, "/metrics").text, re.MULTILINE)[1])

    names = ('vtc_requests_total{status="200"}', 'vtc_visual_tokens_total{when="before"}', "vtc_new_tokens_total")
    names += ('vtc_visual_tokens_total{when="after"}', "vtc_first_token_seconds_count")
    post(served, request(QUESTIONS[0], picture(0)))
    before = [value(name) for name in names]
    post(served, request(QUESTIONS[0], picture(0)), request(QUESTIONS[0], picture(1), stream=True))
    assert [value(name) - start for name, start in zip(names, before, strict=True)] == [2, 72, 2 * NEW, 18, 2]
    assert soon(lambda: value("vtc_blocks_in_use") == 0)
    assert value("vtc_visual_tokens_remembered") >= 18


def test_greedy_is_packed_and_only_greedy():
    messages = [{"role": "user", "content": "a"}]
    for more, packed in ({}, True), ({"temperature": 0}, True), ({"temperature": 1}, False), ({"stop": "a"}, False):
        assert read({"model": "m", "messages": messages, **more}).packed is packed
    assert read({"model": "m", "messages": messages, "max_completion_tokens": 3}).max_tokens == 3


@pytest.mark.parametrize("more", [{}, {"temperature": 1}], ids=["packed", "alone"])
def test_who_leaves_before_the_first_part_is_answered_no_further(more, monkeypatch):
    """Nothing of a stream runs, nor ends, before somebody asks for a part."""
    solos: list[Solo] = []
    monkeypatch.setattr("vtc.serve.chat.Solo", lambda *parts: solos.append(Solo(*parts)) or solos[-1])
    with serving(Limits(new_tokens=900)) as server:
        cancelled, cancel = [], server.engine.cancel_request
        monkeypatch.setattr(server.engine, "cancel_request", lambda one: (cancelled.append(one), cancel(one)))

        async def run() -> bool:
            asked = request(QUESTIONS[0], picture(0), stream=True, **more) | {"max_tokens": 900}
            await asyncio.create_task(server.chat.handle_request(asked, "its task ends here"))
            return await asyncio.to_thread(
                soon, lambda: not server.engine.prompts and not server.engine.blocks_in_use()
            )

        assert in_a_loop(run())
        assert bool(cancelled) is not bool(solos)
        assert all(solo.gone.is_set() for solo in solos)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_who_leaves_before_its_turn_leaves_no_pixels(served, stream, monkeypatch):
    """Nobody counts those who have left, and a turn may be long in coming."""
    reading, turn, kept = served.chat.reading, threading.Event(), []
    make = reading.inputs

    async def made(*given):
        inputs = await make(*given)
        kept.append(weakref.ref(inputs["pixel_values"]))
        return inputs

    async def run() -> None:
        asked = request(QUESTIONS[0], picture(0), stream=stream, temperature=1)
        task = asyncio.create_task(served.chat.handle_request(asked, "x"))
        while not kept:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        del task
        gc.collect()
        left = kept[0]()
        turn.set()
        await asyncio.wrap_future(served.chat.alone.submit(lambda: None))
        assert left is None

    monkeypatch.setattr(reading, "inputs", made)
    served.chat.alone.submit(turn.wait, 60)
    in_a_loop(run())


def test_a_stream_that_fails_says_why(served, monkeypatch):
    """As OpenAI's do: an object of its own, and no [DONE] behind it."""

    def broken(*model, **inputs):
        raise RuntimeError('no "room"\nhere')

    monkeypatch.setattr(type(served.chat.reading.model), "generate", broken)
    (reply,) = post(served, request(QUESTIONS[0], picture(0), stream=True, temperature=1))
    *_, last = [line for line in reply.text.splitlines() if line]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["message"], error["type"]) == ('no "room"\nhere', "server_error")


def test_an_answer_that_is_there_at_once_is_streamed(served, monkeypatch):
    """Upstream says who is to be called once it has handed the request in, which may be answered by then."""
    router, answered, begin = served.engine.output_router, [], CBStreamer.__init__
    deliver = router.deliver_batch
    monkeypatch.setattr(router, "deliver_batch", lambda outputs: (deliver(outputs), answered.extend(outputs)))
    monkeypatch.setattr(CBStreamer, "__init__", lambda *args, **more: soon(lambda: answered) and begin(*args, **more))

    async def run() -> str:
        reply = await served.chat.handle_request(request(QUESTIONS[1], picture(0), stream=True, max_tokens=1), "x")
        return "".join([part async for part in reply.body_iterator])

    streamed = in_a_loop(asyncio.wait_for(run(), 20))
    assert spoken(QUESTIONS[1], QUARTER, picture(0)).split()[0] in streamed
    assert streamed.endswith("data: [DONE]\n\n")
