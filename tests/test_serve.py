"""Packed prompts: answers are those of generate(), images are read once, and nothing stays behind."""

import ast
import dataclasses
import threading

import models
import pytest
import torch
from own_models import llava_next_processor, load_qwen2_vl, save_llava_next, save_qwen2_vl
from PIL import Image
from serve_fixtures import NEW, QUESTIONS, SIZES, alone, chat, engine, picture, results, soon, tiny
from test_house import MODULES
from transformers.generation.continuous_batching import continuous_api

import vtc
import vtc.adapter as adapters
from vtc.eval.reader import load
from vtc.serve.encode import NOTHING, Alone, _stop, prune
from vtc.serve.memory import Full, Memory
from vtc.serve.tower import Tower

QUARTER = ("vtc-cls", 0.25)
SPENDS = (
    QUARTER,
    ("vtc-cls", 5),
    ("tome", 0.5),
    ("uniform", 0.11),
    (vtc.VtcCls(positions="contiguous"), 0.25),
    NOTHING,
)
EARLY = [
    {"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[1]}, {"type": "image"}]},
]
"""Text before the first image, and between two."""


def text(*messages: dict) -> str:
    return tiny()[1].apply_chat_template(list(messages), add_generation_prompt=True)


def cases():
    """(prompt, images, method and budget)"""
    for number, spend in enumerate(SPENDS):
        yield text(*chat(QUESTIONS[number % 3])), [picture(number)], spend
    yield text(*EARLY), [picture(0), picture(7)], QUARTER
    yield text(*chat(QUESTIONS[2], images=0)), [], QUARTER


# -- answers ------------------------------------------------------------------------------------------------------


def test_packed_answers_are_those_of_generate():
    """All at once, in steps that are shorter than some prompts, with and without original positions."""
    given = list(cases())
    expected = [alone(*case) for case in given]
    assert len({*map(tuple, expected)}) == len(expected), "prompts that are told apart"
    with engine() as (runs, prompt):
        assert results(runs, [prompt(*case) for case in given]) == expected


def test_tiles_are_packed():
    """LLaVA-NeXT before a decoder without windows: images of three shapes, each an overview and tiles with newlines."""
    model = models.llava_next(windows=False)
    model.generation_config.suppress_tokens = None
    served, sizes = (model, llava_next_processor()), dataclasses.replace(SIZES, cache=2048, remembered=1024)
    shapes = [picture(0), picture(1).resize((96, 48)), picture(2).resize((48, 100))]
    given = [(text(*chat(QUESTIONS[n])), [image], spend) for n, image in enumerate(shapes) for spend in SPENDS[:3]]
    given.append((text(*chat(QUESTIONS[0])), [shapes[1]], NOTHING))
    expected = [alone(*case, served=served) for case in given]
    assert len({*map(tuple, expected)}) == len(expected), "prompts that are told apart"
    with engine(sizes, served) as (runs, prompt):
        assert results(runs, [prompt(*case) for case in given]) == expected


@pytest.mark.parametrize("wrong", ["positions", "shift", "rows"])
def test_answers_hang_on_what_is_claimed(wrong):
    """Each of what a prompt carries, taken away, gives other answers: so the test above can fail."""
    case = text(*EARLY), [picture(0), picture(7)], QUARTER
    with engine() as (runs, prompt):
        right = prompt(*case)
        numbers = torch.arange(len(right), dtype=torch.int32)
        changed = {"positions": {"positions": numbers}, "shift": {"shift": 0}, "rows": {"read": right.read.clone()}}[
            wrong
        ]
        if wrong == "rows":
            visual = right.read >= runs._memory.vocabulary
            changed["read"][visual] = right.read[visual].flip(0)
        # an id of its own, so that nothing is found in the cache
        (given,) = results(runs, [dataclasses.replace(right, **changed)])
    assert given != alone(*case)


def test_the_text_around_an_image_is_that_of_the_processor():
    model, processor = tiny()
    inputs = processor(images=[picture(0)], text=text(*chat(QUESTIONS[0])), add_special_tokens=False)
    with engine() as (_, prompt):
        full = prompt(text(*chat(QUESTIONS[0])), [picture(0)], NOTHING)
    ids = inputs["input_ids"][0]
    assert full.unpruned == len(full) == len(ids)
    assert [a for a, b in zip(ids, full.ids, strict=True) if a != model.config.image_token_id] == [
        token for token in full.ids if token < model.get_input_embeddings().num_embeddings
    ]


# -- an image once ------------------------------------------------------------------------------------------------


def test_a_repeated_image_and_a_next_turn_share_blocks():
    """And only those that are the same: another image, or another budget, matches nothing of an image."""
    first = text(*chat(QUESTIONS[2]))
    with engine() as (runs, prompt):
        before = prompt(first, [picture(0)], QUARTER)
        (answer,) = results(runs, [before])
        cache, found = runs.batch_processor.cache, []
        search = cache.search_prefix_match
        cache.search_prefix_match = lambda *args: found.append(search(*args)) or found[-1]
        turn = text(*chat(QUESTIONS[2]), {"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}]})
        for images, spend in (([picture(0)], QUARTER), ([picture(1)], QUARTER), ([picture(0)], ("vtc-cls", 0.5))):
            assert results(runs, [prompt(turn, images, spend)]) == [alone(turn, images, spend)]
        assert results(runs, [prompt(first, [picture(0)], QUARTER)]) == [answer]
    shared = len(before) // SIZES.page * SIZES.page
    assert found[0] >= shared - SIZES.page >= SIZES.page
    assert max(found[1:3]) <= SIZES.page, "text before the image at most"
    assert found[3] >= SIZES.page


def test_memory_is_bounded_and_ids_are_never_used_again():
    model, processor = tiny()
    memory = Memory(model, 20)
    (one,) = prune(model, adapters.find(model), processor, [picture(0)], QUARTER)
    assert len(one.rows) == 9
    first, second = memory.add("first", one), memory.add("second", one)
    assert memory.used == 18
    assert not {*first.slots.tolist()} & {*second.slots.tolist()}
    with pytest.raises(Full, match="running requests"):
        memory.add("third", one)
    memory.release(first)
    assert memory.find("first") is first, "kept as long as nobody needs the room"
    memory.release(first)
    memory.release(second)
    assert memory.find("first") is first
    third = memory.add("third", one)
    assert memory.find("second") is None
    assert memory.find("first") is first
    assert len({first.id, second.id, third.id}) == 3
    assert {*third.slots.tolist()} == {*second.slots.tolist()}
    assert torch.equal(memory.rows[third.slots], one.rows)
    with pytest.raises(ValueError, match="36 visual tokens, and memory for 20"):
        memory.add("large", prune(model, adapters.find(model), processor, [picture(0)], NOTHING)[0])


def test_digests_are_of_content_and_of_this_process():
    memory, other = Memory(tiny()[0], 8), Memory(tiny()[0], 8)
    assert memory.digest(picture(0)) == memory.digest(picture(0)) != memory.digest(picture(1))
    assert memory.digest(picture(0)) != other.digest(picture(0))
    flat = Image.new("RGB", (4, 2)), Image.new("RGB", (2, 4))
    assert memory.digest(flat[0]) != memory.digest(flat[1]), "the same bytes in another shape"


def test_images_that_arrive_together_go_through_the_tower_together():
    """A repeated one once; one that fails alone fails nobody else."""
    model, processor = tiny()
    tower = Tower(model, processor, Memory(model, 512), together=16)
    sent = [picture(0), picture(1), picture(0)]
    futures = [tower.submit(image, tower.memory.digest(image), QUARTER) for image in sent]
    tower.start()
    kept = [future.result(timeout=20) for future in futures]
    assert tower.runs == 1
    assert kept[0] is kept[2] is not kept[1]
    assert kept[0].users == 2
    assert tower.submit(picture(1), tower.memory.digest(picture(1)), QUARTER).result(timeout=20) is kept[1]
    assert tower.runs == 1
    (single,) = prune(model, tower.adapter, processor, [picture(1)], QUARTER)
    assert kept[1].pruned.index == single.index
    torch.testing.assert_close(tower.memory.rows[kept[1].slots], single.rows)
    tower.stop()

    tower = Tower(model, processor, Memory(model, 512), together=16)
    bad, good = tower.submit("no image", b"bad", QUARTER), tower.submit(picture(2), b"good", QUARTER)
    tower.start()
    assert bad.exception(timeout=20) is not None
    assert good.result(timeout=20).pruned.tokens == 36
    tower.stop()


def test_images_that_nobody_waits_for_do_not_go_through_the_tower(monkeypatch):
    """Not even beside others; one of which one of two clients has left does, and who comes later is answered."""
    model, processor = tiny()
    tower, seen = Tower(model, processor, Memory(model, 512), together=16), []
    monkeypatch.setattr("vtc.serve.tower.prune", lambda *args: seen.extend(args[3]) or prune(*args))
    sent = [picture(0), picture(1), picture(1), picture(2)]
    futures = [tower.submit(image, tower.memory.digest(image), QUARTER) for image in sent]
    assert all(future.cancel() for future in (futures[0], futures[1], futures[3]))
    tower.start()
    assert futures[2].result(timeout=20).users == 1
    assert seen == [sent[1]]
    assert tower.submit(sent[0], tower.memory.digest(sent[0]), QUARTER).result(timeout=20).users == 1
    assert seen == [sent[1], sent[0]]
    assert not tower._waiting
    tower.stop()


def test_who_comes_while_an_image_fails_is_told(monkeypatch):
    """Between the moment in which it finds that others wait for the image, and the one in which it waits with them."""
    model, processor = tiny()
    tower, comes, fails = Tower(model, processor, Memory(model, 512), together=16), threading.Event(), threading.Event()

    class Slow(dict):
        def __contains__(self, key):
            found = super().__contains__(key)
            if found:
                comes.set()
                fails.wait(0.5)
            return found

    def broken(*args):
        comes.wait(20)
        raise RuntimeError("no image")

    monkeypatch.setattr("vtc.serve.tower.prune", broken)
    tower._waiting = Slow()
    first = tower.submit(picture(0), b"key", QUARTER)
    first.add_done_callback(lambda _: fails.set())
    tower.start()
    second = tower.submit(picture(0), b"key", QUARTER)
    assert [str(future.exception(timeout=20)) for future in (first, second)] == ["no image"] * 2
    tower.stop()


def test_of_what_cannot_be_packed_the_last_is_remembered(monkeypatch):
    """Clients name budgets as they like, and each is an entry."""
    monkeypatch.setattr("vtc.serve.tower.REASONS", 2)
    model, processor = tiny()
    tower = Tower(model, processor, Memory(model, 512), together=16)
    tower.start()
    for budget in (0.5, 0.6, 0.7):
        with pytest.raises(Alone):
            tower.submit(picture(0), b"key", ("fastv", budget)).result(timeout=20)
    assert [*tower._reasons] == [("fastv", 0.6), ("fastv", 0.7)]
    tower.stop()


# -- who is alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spend", "why"),
    [
        (("fastv", 0.5), "drops inside the decoder"),
        (("random-kv", 0.5), "drops inside the decoder"),
        (("cdpruner", 0.5), "chooses by the question"),
        ((vtc.Tally(power=1.0), 0.5), "weighs merged tokens"),
        (("uniform", 0), "nothing is left"),
    ],
)
def test_methods_that_cannot_be_packed_say_why(spend, why):
    model, processor = tiny()
    with pytest.raises(Alone, match=why):
        prune(model, adapters.find(model), processor, [picture(0)], spend)


def test_families_that_cannot_be_packed_say_why(tmp_path, monkeypatch):
    save_llava_next(tmp_path / "next")
    save_qwen2_vl(tmp_path / "qwen")
    windows, axes = load(str(tmp_path / "next"), "cpu"), load_qwen2_vl(tmp_path / "qwen")
    with pytest.raises(Alone, match="sliding windows"):
        prune(windows.model, adapters.find(windows.model), windows.processor, [picture(0)], NOTHING)
    with pytest.raises(Alone, match="time, height and width"):
        prune(axes.model, adapters.find(axes.model), axes.processor, [picture(0)], NOTHING)
    model, processor = tiny()
    monkeypatch.setattr(adapters.ADAPTERS["llava"], "blocks", lambda self, inputs: torch.zeros(1, 36).long())
    with pytest.raises(Alone, match="both ways"):
        prune(model, adapters.find(model), processor, [picture(0)], NOTHING)


def test_a_prune_leaves_the_model_as_it_was():
    model, processor = tiny()

    def hooks() -> list[int]:
        return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]

    alone(text(*chat(QUESTIONS[0])), [picture(0)], QUARTER)  # transformers hangs some of its own in a first call
    before = hooks()
    prune(model, adapters.find(model), processor, [picture(0)], QUARTER)
    with pytest.raises(Alone):
        prune(model, adapters.find(model), processor, [picture(0)], ("fastv", 0.5))
    assert hooks() == before
    assert not hasattr(model, "vtc")


def test_a_hook_that_is_half_hung_harms_no_other_thread():
    """As another thread's call finds it between the two steps in which torch hangs it."""
    model, _ = tiny()
    handle = adapters.find(model).decoder.register_forward_pre_hook(_stop)
    try:
        assert alone(text(*chat(QUESTIONS[0])), [picture(0)], ("fastv", 0.5))
    finally:
        handle.remove()


def test_the_engine_shares_weights_and_nothing_else():
    model, _ = tiny()
    with engine() as (runs, _):
        assert runs.model is not model
        assert not model._forward_pre_hooks
        own, shared = dict(model.named_parameters()), dict(runs.model.named_parameters())
        assert own.keys() == shared.keys()
        assert all(own[name] is shared[name] for name in own)


# -- what goes away -----------------------------------------------------------------------------------------------


def blocks(runs) -> tuple[int, int]:
    """Blocks in use, and those that are free or wait to be shared."""
    cache = runs.batch_processor.cache
    (allocator,) = cache.cache_allocators.values()
    free = cache.pool.num_free_sectors * allocator.blocks_per_sector + cache.pool.count_free_blocks(allocator.index)
    return runs.blocks_in_use(), free + len(allocator.ledger.cached_blocks)


def test_who_goes_away_gives_blocks_and_images_back():
    with engine() as (runs, prompt):
        soon(lambda: runs.batch_processor is not None)
        whole = blocks(runs)[1]
        given = [prompt(text(*chat(QUESTIONS[n])), [picture(n)], QUARTER) for n in range(3)]
        for n, one in enumerate(given):
            runs.add_request(one, f"gone {n}", max_new_tokens=400)
        assert soon(lambda: blocks(runs)[0] > 0)
        runs.cancel_request("gone 0")
        assert soon(lambda: "gone 0" not in runs.prompts)
        assert given[0].images[0].users == 0
        assert {*runs.prompts} == {"gone 1", "gone 2"}
        assert given[1].images[0].users == 1
        runs.cancel_request("gone 1")
        runs.cancel_request("gone 2")
        assert soon(lambda: not runs.prompts)
        assert blocks(runs) == (0, whole)
        assert results(runs, [given[0]], NEW) == [alone(text(*chat(QUESTIONS[0])), [picture(0)], QUARTER)]
        assert soon(lambda: blocks(runs) == (0, whole))


def test_what_a_step_still_had_for_who_has_left_is_not_kept():
    with engine() as (runs, prompt):
        for n in range(3):
            given = prompt(text(*chat(QUESTIONS[0])), [picture(n)], QUARTER)
            runs.add_request(given, f"gone {n}", max_new_tokens=400, streaming=True)
            assert soon(lambda: runs.output_router.output_queue.qsize() > 1)  # nobody has asked to be called
            runs.cancel_request(f"gone {n}")
            assert soon(lambda: not runs.prompts)
            assert soon(runs.output_router.output_queue.empty)
        assert results(runs, [given]) == [alone(text(*chat(QUESTIONS[0])), [picture(2)], QUARTER)]


def test_who_goes_between_two_looks_of_the_engine_goes(monkeypatch):
    """Upstream looks at what is new, then at what is cancelled: a request that comes and goes between is new later."""
    drain, looked, going, seen = continuous_api.drain_queue, threading.Event(), threading.Event(), []
    case = text(*chat(QUESTIONS[0])), [picture(2)], QUARTER
    with engine() as (runs, prompt):
        soon(lambda: runs.batch_processor is not None)
        for n in range(2):  # these have the first rows of the memory
            prompt(text(*chat(QUESTIONS[0])), [picture(n)], QUARTER)
        given = prompt(*case)

        def paused(queue):
            found = drain(queue)
            if queue is runs.input_queue and not looked.is_set():
                looked.set()
                going.wait(10)
            seen.append({**runs.batch_processor.scheduler.active_requests})
            return found

        monkeypatch.setattr(continuous_api, "drain_queue", paused)
        assert looked.wait(10)
        runs.add_request(given, "gone", max_new_tokens=400)
        runs.cancel_request("gone")
        going.set()
        assert soon(lambda: "gone" not in runs.prompts)
        assert given.images[0].users == 0
        assert runs.blocks_in_use() == 0
        assert sum("gone" in active for active in seen) <= 4, "two looks a step: it is not answered to its end"
        assert results(runs, [prompt(*case)]) == [alone(*case)]


def test_a_cache_too_small_for_all_at_once_changes_nothing():
    """Requests are set back and begin again with what they have said: text of prompts and answers keeps its place."""
    small = dataclasses.replace(SIZES, cache=256)
    given = [(text(*chat(QUESTIONS[n % 3])), [picture(n)], QUARTER) for n in range(6)]
    expected = [alone(*case, 40) for case in given]
    with engine(small) as (runs, prompt):
        prompts = [prompt(*case) for case in given]
        assert sum(len(one) + 40 for one in prompts) > small.cache
        assert results(runs, prompts, 40) == expected


def test_a_full_cache_that_all_have_left_takes_new_ones():
    """Upstream lets nobody new in until a request finishes, and none does."""
    case = text(*chat(QUESTIONS[0])), [picture(0)], QUARTER
    with engine(dataclasses.replace(SIZES, cache=96)) as (runs, prompt):
        given = [prompt(text(*chat(QUESTIONS[n % 3])), [picture(n)], QUARTER) for n in range(6)]
        for n, one in enumerate(given):
            runs.add_request(one, f"gone {n}", max_new_tokens=60, eos_token_id=-1)
        assert soon(lambda: runs.batch_processor is not None and runs.batch_processor.scheduler.block_new_requests)
        with runs.pause():
            for n in range(6):
                runs.cancel_request(f"gone {n}")
        assert soon(lambda: not runs.prompts)
        assert results(runs, [prompt(*case)], 3) == [alone(*case, 3)]


# -- the house ----------------------------------------------------------------------------------------------------


def test_arrows_point_one_way():
    """vtc.serve knows the library; of the library only the command knows vtc.serve. Its packages are its own."""
    for name, path in MODULES.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            found |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            found |= {node.module} if isinstance(node, ast.ImportFrom) else set()
        if name.startswith("vtc.serve"):
            above = ("vtc.demo", "vtc.cli", *["vtc.eval"] * (name != "vtc.serve.replicas"))
            assert not [module for module in found if module.startswith(above)], name
        else:
            own = ("fastapi", "uvicorn", "openai", "prometheus_client", *["vtc.serve"] * (name != "vtc.cli.serving"))
            assert not [module for module in found if module.startswith(own)], name
