"""`vtc serve` as a process against clients as processes."""

import json
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest
from openai import BadRequestError, OpenAI
from serve_fixtures import (
    NAME,
    QUARTER,
    QUESTIONS,
    alone,
    free_port,
    healthy,
    picture,
    request,
    soon,
    spoken,
    tiny,
)
from test_readme import SERVED, blocks


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """`vtc serve` with a model that never ends by itself, and OpenAI's client for it."""
    port, folder = free_port(), tmp_path_factory.mktemp("served")
    for part in tiny():
        part.save_pretrained(folder)
    given = {"--model": folder, "--name": "tiny", "--port": port, "--max-new-tokens": 300}
    command = [sys.executable, "-m", "vtc.cli", "serve", *(str(x) for pair in given.items() for x in pair)]
    one_core = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=one_core) as running:
        try:
            url = f"http://127.0.0.1:{port}"

            def up() -> bool:
                assert running.poll() is None, running.stderr.read()
                return healthy(url)

            assert soon(up, 120)
            yield OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), url
            running.send_signal(signal.SIGINT)
            assert running.wait(20) in (0, -signal.SIGINT, 130)
        finally:
            running.kill()


def test_openai_client_against_the_command(process):
    client, _ = process
    asked = request(QUESTIONS[0], picture(0))
    whole = client.chat.completions.create(**asked)
    chunks = [*client.chat.completions.create(**asked, stream=True)]
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert whole.choices[0].message.content == streamed == spoken(QUESTIONS[0], QUARTER, picture(0))
    assert chunks[-1].usage.vtc["visual_tokens_after"] == whole.usage.vtc["visual_tokens_after"] == 9
    more = {"extra_body": {"vtc": {"method": "vtc-cls", "budget": 12}}}
    assert client.chat.completions.create(**asked, **more).usage.vtc["visual_tokens_after"] == 12
    with pytest.raises(BadRequestError, match="unknown method"):
        client.chat.completions.create(**asked, extra_body={"vtc": {"method": "nope"}})
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_the_chat_of_gradio_against_the_command(process, tmp_path):
    """It sends an image as a message of its own, and a turn before as it keeps it, with fields that say nothing."""
    import gradio

    image, said = tmp_path / "photo.png", {"metadata": None, "options": None}
    picture(0).save(image)
    talk = gradio.load_chat(f"{process[1]}/v1", model=NAME, file_types="image")
    asked = {"text": QUESTIONS[0], "files": [str(image)]}
    *_, answer = talk.fn(asked, [])
    parts = [{"type": "image"}], [{"type": "text", "text": QUESTIONS[0]}]
    messages = [{"role": "user", "content": part} for part in parts]
    prompt = tiny()[1].apply_chat_template(messages, add_generation_prompt=True)
    first = tiny()[1].decode(alone(prompt, [picture(0)], QUARTER), skip_special_tokens=True)
    assert answer.startswith(first)
    turns = [
        {"role": "user", "content": [{"type": "file", "file": {"path": str(image)}}], **said},
        {"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}], **said},
        {"role": "assistant", "content": [{"type": "text", "text": first}], **said},
    ]
    assert [*talk.fn({"text": QUESTIONS[1], "files": []}, turns)][-1]


def test_clients_that_are_killed_give_their_blocks_back(process):
    client, url = process
    curl = ["curl", "-sN", f"{url}/v1/chat/completions", "-H", "content-type: application/json", "-d", "@-"]

    def blocks() -> float:
        return float(re.search(r"^vtc_blocks_in_use (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)[1])

    for stream in (True, False):
        asked = request(QUESTIONS[0], picture(0), stream=stream) | {"max_tokens": 300}
        with subprocess.Popen(curl, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
            child.stdin.write(json.dumps(asked).encode())
            child.stdin.close()
            assert soon(lambda: blocks() > 0)
            child.kill()
        assert soon(lambda: blocks() == 0)
    text = client.chat.completions.create(**request(QUESTIONS[1], picture(1))).choices[0].message.content
    assert text == spoken(QUESTIONS[1], QUARTER, picture(1))


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_what_pages_say_to_the_server(process, page, tmp_path):
    """Blocks of Python and lines of curl, with this server's address and model in theirs."""
    _, url = process
    picture(0).save(tmp_path / "scene.png")
    spoken_to = [(kind, block) for kind in ("python", "sh") for block in blocks(page, kind) if SERVED in block]
    assert spoken_to
    for kind, block in spoken_to:
        here = block.replace(f"http://{SERVED}", url).replace('"reference"', '"tiny"')
        command = [sys.executable if kind == "python" else "bash", "-c", here]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "visual_tokens_after" in done.stdout, done.stdout
