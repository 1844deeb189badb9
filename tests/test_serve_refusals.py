"""What `vtc serve` refuses, with a reason, and goes on."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image, ImageFile
from pydantic import ValidationError
from serve_fixtures import (
    QUARTER,
    QUESTIONS,
    SIZES,
    content,
    data_url,
    in_a_loop,
    picture,
    post,
    request,
    serving,
    soon,
    spoken,
)

from vtc.serve.encode import Pruned
from vtc.serve.replicas import application, budget_of
from vtc.serve.request import Asked, read


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def damaged_exif(place: int, byte: int) -> str:
    """A picture that says how it is turned, with a byte of its tags changed."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif.update({0x010F: "maker", 0x0112: 6, 0x011A: 72.0})
    Image.new("L", (8, 8)).save(buffer, "JPEG", exif=exif)
    content = bytearray(buffer.getvalue())
    content[place] = byte
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def shows(*urls: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"model": "tiny", "messages": [{"role": "user", "content": parts}]}


def many_parts() -> dict:
    """Of two messages, each of which alone would do."""
    half = {"role": "user", "content": [{"type": "text", "text": ""}] * 501}
    return {"model": "tiny", "messages": [half, half]}


BAD = {
    "no image": (400, shows("data:image/png;base64," + base64.b64encode(b"GIF? no").decode()), "not an image"),
    "no base64": (400, shows("data:image/png;base64,%%%"), "no base64"),
    "a damaged one": (400, shows(data_url(picture(0))[:-400]), "damaged|base64"),
    "damaged tags": (400, shows(damaged_exif(65, 0)), "a damaged image"),
    "tags of a wrong type": (400, shows(damaged_exif(67, 7)), "a damaged image"),
    "half a character": (400, json.dumps(request("a \ud800")).encode(), "no Unicode text: surrogates not allowed at 2"),
    "half a character for a name": (400, json.dumps(request("a") | {"\ud800": 1}).encode(), "a unicode string"),
    "half a character of kind": (400, json.dumps(shows("x")).replace("image_url", "\\ud800", 1).encode(), "."),
    "half a character to stop at": (400, json.dumps(request("a", stop="\udfff")).encode(), "stop.*[Uu]nicode"),
    "a bomb": (400, shows(png(9_000, 9_000)), "9000 x 9000 pixels"),
    "too many pixels together": (400, shows(png(90, 90), png(90, 90)), "1900 are left"),
    "a strip": (400, shows(png(3000, 1)), "3000 x 1 pixels: one side is over 200"),
    "a standing strip": (400, shows(png(1, 201)), "1 x 201 pixels: one side is over 200"),
    "too many images": (400, shows(*[png(1, 1)] * 3), "3 images"),
    "an address": (400, shows("http://127.0.0.1/x.png"), "fetches no URLs"),
    "a file": (400, shows("file:///etc/passwd"), "data URL"),
    "too large": (413, request("a" * 100_001), "more than 100000 bytes"),
    "no JSON": (400, b"{", "JSON object"),
    "no object": (400, b"[1]", "JSON object"),
    "deep": (400, b"[" * 50_000, "."),
    "no messages": (400, {"model": "tiny", "messages": []}, "messages"),
    "unknown role": (400, {"model": "tiny", "messages": [{"role": "tool", "content": "a"}]}, "role"),
    "another model": (404, request("a", model="other"), "'tiny'"),
    "unknown field": (400, request("a", logprobs=True), "logprobs"),
    "several answers": (400, request("a", n=2), "n: "),
    "several answers by truth": (400, request("a", n=True), "n"),
    "a text for a number": (400, request("a") | {"max_tokens": "5"}, "max_tokens: .*integer"),
    "a truth for a number": (400, request("a") | {"max_tokens": True}, "max_tokens: .*integer"),
    "a truth for a temperature": (400, request("a", temperature=True), "temperature: .*number"),
    "a text for a truth": (400, request("a", stream="no"), "stream: .*boolean"),
    "unknown method": (400, request("a", vtc={"method": "nope"}), "unknown method 'nope'.*vtc-cls"),
    "a path for a method": (400, request("a", vtc={"method": "/etc/passwd"}), "unknown method"),
    "no budget": (400, request("a", picture(0), vtc={"method": "vtc-cls"}), "budget"),
    "unreachable budget": (400, request("a", picture(0), vtc={"method": "fastv", "budget": 0.01}), "range is"),
    "budget above all": (400, request("a", picture(0), vtc={"budget": 1.5}), "budget"),
    "a budget without bounds": (400, request("a", vtc={"budget": 10**400}), "less than or equal to 1000000"),
    "too long a stop string": (400, request("a", stop="a" * 65), "stop.*at most 64 characters"),
    "an empty stop string": (400, request("a", stop=[""]), "stop.*at least 1 character"),
    "too many stop strings": (400, request("a", stop=["a"] * 5), "stop.*at most 4"),
    "too long an answer": (400, request("a", max_tokens=21), "20 at most"),
    "too long a prompt": (400, request("a " * 1100), "this server holds 1024"),
    "too many messages": (400, request("") | {"messages": [{"role": "user", "content": ""}] * 1001}, "1001 messages"),
    "too many parts": (400, many_parts(), "1002 messages and parts of them; this server takes 1000"),
    "a placeholder in text": (400, request("what is <image>", picture(0)), "<image> stands for an image"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_reason(served, case, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval sets it, where it was imported before
    status, body, why = BAD[case]
    (reply,) = post(served, body)
    assert reply.status_code == status, reply.text
    assert re.search(why, reply.json()["error"]["message"], re.DOTALL)


def test_where_the_model_lies_stays_private(served, monkeypatch):
    """Also in a stream, and where the server itself fails."""
    home = str(Path(served.chat.reading.model.config._name_or_path))

    def broken(*model, **inputs):
        raise RuntimeError(f"no weights in {home}")

    untrained = post(served, request("a", picture(0), vtc={"method": "atp", "budget": 0.4}))[0]
    monkeypatch.setattr(type(served.chat.reading.model), "generate", broken)
    whole, streamed = post(served, *[request("a", temperature=1, stream=stream) for stream in (False, True)])
    assert (untrained.status_code, "tiny/atp has modules for none" in untrained.text) == (400, True)
    assert (whole.status_code, whole.json()["error"]["message"]) == (
        500, "the server failed at this request; its log says why"
    )  # fmt: skip
    assert "no weights in tiny" in streamed.text
    assert not any(home in reply.text for reply in (untrained, whole, streamed))


def test_a_budget_out_of_reach_is_refused_before_a_stream_begins(served):
    alone = request("a", picture(0), vtc={"method": "fastv", "budget": 0.01}, temperature=1)
    replies = post(served, alone, alone | {"stream": True})
    assert [reply.status_code for reply in replies] == [400, 400]
    assert replies[0].json() == replies[1].json()


def test_a_budget_of_no_method_is_refused():
    """Where a server reads all visual tokens, and not where its method happens to."""
    asked = request("a", picture(0), vtc={"budget": 0.5})
    with serving(method=None) as server:
        (refused,) = post(server, asked)
        assert refused.status_code == 400
        assert "vtc.budget: this server reads all visual tokens" in refused.json()["error"]["message"]
    assert read(asked).spend(("uniform", 1.0)) == ("uniform", 0.5)


@pytest.mark.parametrize(
    ("given", "budget"), [("0.25", 0.25), (0.25, 0.25), ("64", 64), (64, 64), (1, 1), ("1.0", 1.0)]
)
def test_a_config_of_ray_names_a_budget_with_and_without_quotation_marks(given, budget):
    assert (budget_of(given), type(budget_of(given))) == (budget, type(budget))


@pytest.mark.parametrize("given", ["much", "2.5", None, True, 1.5, "nan", -3, "", [0.25]])
def test_a_config_of_ray_without_a_budget_is_refused(given):
    """Before Ray is there."""
    with pytest.raises(ValueError, match=r"budget: .*; name a fraction like 0.25, or a number of tokens like 64"):
        application({"budget": given})


def test_the_server_lives_after_bad_input(served):
    post(served, *(body for _, body, _ in BAD.values()))
    assert content(post(served, request(QUESTIONS[0], picture(0)))[0]) == spoken(QUESTIONS[0], QUARTER, picture(0))
    assert soon(lambda: not served.engine.prompts and served.app.inside == 0)
    assert served.engine.blocks_in_use() == 0


def test_images_that_have_no_room_now_are_told_to_come_again():
    with serving(sizes=replace(SIZES, remembered=40)) as server:
        memory = server.tower.memory
        kept = memory.add("another's", Pruned([], [], 36, torch.zeros(36, 32), False))
        (refused,) = post(server, request(QUESTIONS[0], picture(0)))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        memory.release(kept)
        assert content(post(server, request(QUESTIONS[0], picture(0)))[0]) == spoken(QUESTIONS[0], QUARTER, picture(0))


def test_who_has_an_answer_has_given_its_images_back():
    """Room for one image, and a client that asks again at once."""
    with serving(sizes=replace(SIZES, remembered=40), method=None) as server:

        async def asked() -> list[int]:
            bodies = [request(QUESTIONS[0], picture(n), stream=n % 2 > 0) | {"max_tokens": 2} for n in range(6)]
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=server.app), base_url="http://x") as client:
                return [(await client.post("/v1/chat/completions", json=body)).status_code for body in bodies]

        assert in_a_loop(asked()) == [200] * 6


def test_what_is_too_long_is_refused_before_the_work(served, monkeypatch):
    """A text of more characters than any prompt before the tokenizer, one of more tokens before the tower."""
    worked = []
    tokenizer = type(served.chat.reading._beside.tokenizer)
    monkeypatch.setattr(tokenizer, "__call__", lambda *args, **kwargs: worked.append("tokenizer") or {"input_ids": []})
    (reply,) = post(served, request("color " * 3000, picture(0)))
    assert (reply.status_code, worked) == (400, [])
    assert re.search(r"a text of 180\d\d characters; this server holds 1024 tokens", reply.json()["error"]["message"])
    monkeypatch.undo()
    monkeypatch.setattr(served.tower, "submit", lambda *args: worked.append("tower"))
    (reply,) = post(served, request("color " * 1020, picture(0)))
    assert (reply.status_code, worked) == (400, [])
    assert "this server holds 1024" in reply.json()["error"]["message"]


def test_too_many_images_are_refused_before_the_template(served, monkeypatch):
    monkeypatch.setattr(type(served.chat.reading.processor), "apply_chat_template", None)
    (reply,) = post(served, shows(*[png(1, 1)] * 3))
    assert (reply.status_code, "3 images" in reply.json()["error"]["message"]) == (400, True)


def test_of_many_unknown_fields_one_is_told():
    """Others wait while a request is checked."""
    with pytest.raises(ValidationError) as caught:
        Asked.model_validate(request("a", **{f"x{n}": n for n in range(1000)}))
    assert [error["loc"] for error in caught.value.errors()] == [("x0",)]


def test_a_request_fills_the_blocks_of_the_cache_and_no_more():
    """Of 62 tokens in blocks of 8 there are 56: the engine dies of a request that needs one more."""
    with serving(sizes=replace(SIZES, cache=62)) as server:
        prompt = post(server, request(QUESTIONS[0], max_tokens=1))[0].json()["usage"]["prompt_tokens"]
        fits, does_not = (request(QUESTIONS[0], max_tokens=most - prompt) for most in (56, 57))
        assert post(server, does_not)[0].json()["error"]["message"].endswith("this server holds 56")
        assert post(server, fits)[0].json()["usage"]["total_tokens"] == 56


def test_images_that_never_have_room_together_are_refused():
    """Memory for 16 visual tokens, of which an image keeps 9: two are too much, unless they are one."""
    with serving(sizes=replace(SIZES, remembered=16)) as server:
        (refused,) = post(server, request(QUESTIONS[0], picture(0), picture(1)))
        assert refused.status_code == 400
        assert "images of 18 visual tokens together, and memory for 16" in refused.json()["error"]["message"]
        (twice,) = post(server, request(QUESTIONS[0], picture(1), picture(1)))
        assert content(twice) == spoken(QUESTIONS[0], QUARTER, picture(1), picture(1))
