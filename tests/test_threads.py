"""Threads that compress one model, each in its own way."""

import contextvars
import threading

import pytest
import torch
from bare import SHORT, fingerprint, logits
from models import prompt
from table import METHODS

import vtc


def run(*functions):
    """Each in a thread of its own; the first exception of any is raised here."""
    results, errors = [None] * len(functions), []

    def call(number, function):
        try:
            results[number] = function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=pair) for pair in enumerate(functions)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
    return results


CHOICES = ["random-half", "vtc-cls", "fastv-early", "tome", "transprune-high"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_threads_compress_one_model_each_in_its_own_way(llava, wrapped):
    prompts = [prompt(llava, (1,), seed=seed, length=8 + seed) for seed in range(len(CHOICES))]
    logits(llava, prompts[0])  # the first call of a model leaves things of transformers' own on it
    before, expected = fingerprint(llava), []
    for setting, inputs in zip(CHOICES, prompts, strict=True):
        with vtc.compressed(llava, *METHODS[setting]) as trace:
            expected.append((llava.generate(**inputs, **SHORT), trace.kept()[0]))
    if wrapped:
        vtc.wrap(llava, "uniform", 0.25)
        base = llava.generate(**prompts[0], **SHORT)

    def worker(number):
        def work():
            for _ in range(8):
                with vtc.compressed(llava, *METHODS[CHOICES[number]]) as trace:
                    text = llava.generate(**prompts[number], **SHORT)
                    assert torch.equal(text, expected[number][0])
                    assert torch.equal(trace.kept()[0], expected[number][1])
                    with torch.no_grad():
                        llava(**prompts[number])
                    assert torch.equal(trace.kept()[0], expected[number][1])

        return work

    def untouched():
        for _ in range(8):
            assert torch.equal(llava.generate(**prompts[0], **SHORT), base)

    run(*map(worker, range(len(CHOICES))), *([untouched] if wrapped else []))
    vtc.unwrap(llava)
    assert fingerprint(llava) == before


def test_a_thread_that_chose_nothing_is_refused(llava):
    inputs = prompt(llava)
    bare = llava.generate(**inputs, **SHORT)
    with vtc.compressed(llava, "random", 4) as trace:
        for call in (lambda: llava.generate(**inputs, **SHORT), lambda: logits(llava, inputs)):
            with pytest.raises(RuntimeError, match=r"has chosen nothing.*copy of the context"):
                run(call)
        context = contextvars.copy_context()
        inside, copied = (
            llava.generate(**inputs, **SHORT),
            run(lambda: context.run(llava.generate, **inputs, **SHORT)),
        )
        assert torch.equal(copied[0], inside)
        assert trace.average_tokens.tolist() == [4.0]
    assert torch.equal(run(lambda: llava.generate(**inputs, **SHORT))[0], bare)


def test_text_of_a_thread_that_chose_nothing_is_read_as_ever(llava):
    inputs = prompt(llava, (0,))
    bare = llava.generate(**inputs, **SHORT)
    with vtc.compressed(llava, "fastv", 0.4):
        for call in (lambda: llava.generate(**inputs, **SHORT), lambda: llava.generate(inputs["input_ids"], **SHORT)):
            assert torch.equal(run(call)[0], bare)


@pytest.mark.parametrize("change", ["unwrap", "wrap anew"])
def test_changes_wait_for_a_generation_of_another_thread(llava, change):
    inputs = prompt(llava)
    expected = vtc.wrap(llava, "fastv", 0.4).generate(**inputs, **SHORT)
    begun, go_on, changed = threading.Event(), threading.Event(), threading.Event()

    def pause(ids, scores):
        begun.set()
        assert go_on.wait(30)
        return scores

    def other():
        assert begun.wait(30)
        vtc.unwrap(llava) if change == "unwrap" else vtc.wrap(llava, "random", 3)
        changed.set()

    def releaser():
        assert begun.wait(30)
        assert not changed.wait(0.3)
        go_on.set()

    text, *_ = run(lambda: llava.generate(**inputs, **SHORT, logits_processor=[pause]), other, releaser)
    assert torch.equal(text, expected)
    assert changed.is_set()
    assert ("vtc" in vars(llava)) == (change != "unwrap")


def test_changes_inside_ones_own_generation_are_refused(llava):
    inputs = prompt(llava)
    expected = vtc.wrap(llava, "fastv", 0.4).generate(**inputs, **SHORT)
    for change in (lambda: vtc.unwrap(llava), lambda: vtc.wrap(llava, "random", 3)):
        with pytest.raises(RuntimeError, match=r"generate\(\) is running"):
            llava.generate(**inputs, **SHORT, logits_processor=[lambda ids, scores, change=change: change()])
    assert torch.equal(llava.generate(**inputs, **SHORT), expected)
