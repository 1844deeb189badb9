"""Video questions of lmms-eval: real files, read frame by frame, on a family that reads videos.

transformers' own video processors need torchvision, which does not import beside a torch for CPUs: this one is ours.
"""

import av
import numpy as np
import pytest
import torch
from models import FAMILIES, VIDEO
from PIL import Image
from suite_fixtures import data, model  # noqa: F401
from transformers import BatchFeature

import vtc
from vtc.eval import video
from vtc.eval.reader import Reader

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
"""What the seconds of the film are painted with, at four frames a second."""


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("films") / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        for colour in [colour for colour in COLOURS for _ in range(4)]:
            painted = av.VideoFrame.from_ndarray(np.full((64, 64, 3), colour, np.uint8), format="rgb24")
            container.mux(stream.encode(painted))
        container.mux(stream.encode())
    return path


def colours(frames):
    means = torch.tensor(frames).double().mean((1, 2))
    return [min(range(5), key=lambda i: (torch.tensor(COLOURS[i]) - mean).abs().sum()) for mean in means]


def test_frames_are_evenly_spaced(film):
    frames, metadata = video.read(film, 5)
    assert colours(frames) == [0, 1, 2, 3, 4]
    assert metadata.frames_indices == [0, 5, 10, 14, 19]
    assert metadata.fps == 4


@pytest.mark.parametrize(
    ("start", "end", "expected"), [(1.0, 2.75, [1, 1, 2, 2]), (4.0, None, [4] * 4), (None, 0.0, [0])]
)
def test_a_part_of_a_film(film, start, end, expected):
    assert colours(video.read(film, 4, start, end).frames) == expected


def test_a_short_film_has_no_frame_twice(film):
    assert video.read(film, 64).metadata.frames_indices == list(range(20))


@pytest.mark.parametrize(
    ("path", "start", "message"),
    [("film", 9.0, "no frames from second 9"), ("https://a/b.mp4", None, "local files only")],
)
def test_what_cannot_be_read(film, path, start, message):
    with pytest.raises(ValueError, match=message):
        video.read(film if path == "film" else path, 4, start)


class Processor:
    """Words by their length, frames of 48 pixels, nine tokens each: what the tiny LLaVA-NeXT-Video reads."""

    video_processor = image_processor = object()

    class tokenizer:
        pad_token_id = 0

    def apply_chat_template(self, chat, add_generation_prompt):
        return [part.get("text", "<video>") for message in chat for part in message["content"]]

    def __call__(self, images, text, videos=(), video_metadata=(), do_sample_frames=True, **_):
        assert images is None
        assert not do_sample_frames
        assert [len(frames) for frames in videos] == [len(about.frames_indices) for about in video_metadata]
        films, rows = iter(videos), []
        for parts in text:
            rows.append([1])
            for part in parts:
                rows[-1] += [VIDEO] * 9 * len(next(films)) if part == "<video>" else [10 + len(w) for w in part.split()]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        found = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        if videos:
            small = [[np.asarray(Image.fromarray(frame).resize((48, 48))) for frame in frames] for frames in videos]
            found["pixel_values_videos"] = torch.tensor(np.array(small)).permute(0, 1, 4, 2, 3) / 127.5 - 1
        return BatchFeature(found)

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(map(str, row.tolist())) for row in ids]


def question(film, text="what is seen", **part):
    return [{"role": "user", "content": [{"type": "video", "url": str(film), **part}, {"type": "text", "text": text}]}]


@pytest.fixture
def reads_video(model, monkeypatch):  # noqa: F811
    monkeypatch.setattr(model, "reader", Reader(FAMILIES["llava_next_video"].model, Processor()))
    yield model
    vtc.unwrap(FAMILIES["llava_next_video"].model)


def test_videos_are_asked_about_by_task_and_counted(reads_video, film):
    """As a task gives them: each question has the frames that it would have alone, and a budget is of all frames."""
    from lmms_eval.api.instance import Instance

    messages = [question(film), question(film, "which colour", start_time=3.0), question(film)]
    reads_video.task_dict["films"] = {"test": [{}] * 3}
    reads_video.frames = 4
    about = {"task": "films", "repeats": 1, "split": "test"}
    requests = [
        Instance("generate_until", ("", lambda doc, at=at: messages[at], {"max_new_tokens": 3}, at, "films", "test"), 0,
                 {**about, "doc_id": at}) for at in range(3)
    ]  # fmt: skip
    texts = {}
    for method, budget, tokens in (("uniform", 1.0, 36), ("vtc-cls", 0.25, 9), ("fastv", 0.5, 53 / 3)):
        reads_video.use(method, budget)
        replies = reads_video.generate_until(requests)
        assert [reply.token_counts.visual_tokens for reply in replies] == pytest.approx([tokens] * 3)
        for request, reply in zip(requests, replies, strict=True):
            (alone,) = reads_video.ask([reads_video._document(request)], max_new_tokens=3)
            assert reply.text == alone.text
        texts[method] = [reply.text for reply in replies]
        assert texts[method][0] == texts[method][2]
    assert texts["uniform"][0] != texts["uniform"][1]
    reads_video.taken.clear()


def test_a_checkpoint_that_reads_no_videos_says_so(model, film):  # noqa: F811
    from vtc.eval.suite_model import Unreadable, document

    with pytest.raises(Unreadable) as error:
        model.ask([document(question(film), 4)], max_new_tokens=1)
    assert "reads no videos" in str(error.value.__cause__)
