"""What the model `vtc` of lmms-eval may be asked for: passed on, or refused by name."""

# ruff: noqa: F811 (fixtures are imported)

import pytest
import torch
from loguru import logger
from suite_fixtures import data, model  # noqa: F401 (fixtures)

import vtc
from vtc.eval import arguments, scenes, suites
from vtc.eval.suite_model import Vtc, _check_processes, folder_name


def document(number=0):
    example = scenes.example("test", 0, number)
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.question}]}], [
        example.image
    ]


# -- generation -----------------------------------------------------------------------------------------------------


def test_options_of_task_files():
    greedy = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": ["\n"]}
    assert arguments.generation(greedy) == {"max_new_tokens": 16, "num_beams": 1, "until": ("\n",)}
    assert arguments.generation({}) == {"max_new_tokens": 1024, "num_beams": 1}
    sampled = {"temperature": 0.7, "top_p": 0.9, "num_beams": 2}
    assert arguments.generation(sampled) == {"max_new_tokens": 1024, "do_sample": True, **sampled}
    assert arguments.generation({"temperature": 0.2, "do_sample": False}) == {"max_new_tokens": 1024, "num_beams": 1}


def test_options_of_generation_reach_it_and_others_are_refused_by_name():
    asked = {
        "top_k": 3,
        "do_sample": True,
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 4,
        "length_penalty": 0.5,
    }
    assert arguments.generation(asked) == {"max_new_tokens": 1024, "num_beams": 1, **asked}
    assert arguments.generation({"until": ["Q:", "\n\n", ""], "image_aspect_ratio": "pad"})["until"] == ("Q:",)
    for name in ("num_return_sequences", "seed", "return_dict_in_generate"):
        with pytest.raises(ValueError, match=f"takes no {name}; it takes .*top_k"):
            arguments.generation({name: 2})


def test_a_reply_ends_where_a_stop_string_begins(model):
    whole = model.ask([document()], max_new_tokens=6, min_new_tokens=6)[0]
    stop = whole.text[len(whole.text) // 2 :][:2]
    cut = model.ask([document(), document(1)], max_new_tokens=6, min_new_tokens=6, until=(stop,))[0]
    assert cut.text == whole.text[: whole.text.index(stop)] != whole.text
    assert cut.token_counts.output_tokens <= whole.token_counts.output_tokens


@pytest.mark.parametrize(("method", "budget"), [("uniform", 1.0), ("vtc-cls", 36), ("fastv", 0.5)])
def test_beams(model, method, budget):
    """Each row's tokens are its own, whatever the number of beams, and the reply is generate's."""
    model.use(method, budget)
    batch = [document(), document(1)]
    found = model.ask(batch, max_new_tokens=4, num_beams=3)
    assert [r.token_counts.visual_tokens for r in found] == [
        r.token_counts.visual_tokens for r in model.ask(batch, max_new_tokens=4)
    ]
    inputs = model.reader.chats(*zip(*batch, strict=True))
    ids = model.reader.model.generate(
        **inputs,
        max_new_tokens=4,
        num_beams=3,
        do_sample=False,
        pad_token_id=model.reader.processor.tokenizer.pad_token_id,
    )[:, inputs["input_ids"].shape[1] :]
    assert [r.text for r in found] == model.reader.processor.batch_decode(ids, skip_special_tokens=True)
    model.use("uniform", 1.0)


# -- --model_args ---------------------------------------------------------------------------------------------------


def test_hyper_parameters_and_what_from_pretrained_takes(data):
    asked = (
        "pretrained=reference,method=transprune,alpha=0.25,layers=[2,3,5],budget=50%,"
        "dtype=bfloat16,attn_implementation=eager"
    )
    lm = Vtc.create_from_arg_string(asked, {"device": "cpu", "batch_size": "3"})
    compression = lm.reader.model.vtc
    assert (compression.method.alpha, compression.method.layers, compression.budget) == (0.25, (2, 3, 5), 0.5)
    assert lm.reader.model.dtype == torch.bfloat16
    assert lm.reader.model.config._attn_implementation == "eager"
    assert lm.batch_size == 3
    assert folder_name(asked).endswith("__transprune__alpha=0.25__layers=[2,3,5]__50%")


@pytest.mark.parametrize(
    ("asked", "error", "match"),
    [
        ("method=fastv,ratoi=0.5,budget=0.5", TypeError, "fastv has no ratoi; it has .*layer"),
        ("method=fastv,budget=much", ValueError, "'much' is no budget"),
        ("batch_size=auto", ValueError, "batch_size=auto: vtc does not search"),
        ("dtype=float99", ValueError, "dtype 'float99'"),
        ("max_pixels=1000", ValueError, "does not read max_pixels"),
        ("alpha=1", TypeError, "alpha"),
    ],
)
def test_what_cannot_be_given(data, asked, error, match):
    with pytest.raises(error, match=match):
        Vtc.create_from_arg_string(f"pretrained=reference,{asked}", {"device": "cpu"})


def test_pixels_are_read_where_the_processor_reads_them(monkeypatch):
    from types import SimpleNamespace

    from transformers import AutoProcessor, AutoTokenizer, Qwen2VLImageProcessor

    def qwen(path, revision=None, **pixels):
        return SimpleNamespace(
            image_processor=Qwen2VLImageProcessor(**pixels), tokenizer=AutoTokenizer.from_pretrained(path)
        )

    monkeypatch.setattr(AutoProcessor, "from_pretrained", qwen)
    lm = Vtc("reference", device="cpu", min_pixels=784, max_pixels=3136)
    assert dict(lm.reader.processor.image_processor.size)["longest_edge"] == 3136
    assert dict(lm.reader.processor.image_processor.size)["shortest_edge"] == 784


def test_tuned_methods_take_hyper_parameters_too(tmp_path):
    vtc.list_methods()["vflowopt"](alpha=0.5).to_json(tmp_path / "tuned.json")
    found = arguments.method(str(tmp_path / "tuned.json"), {"threshold": 3.0})
    assert (found.alpha, found.threshold) == (0.5, 3.0)


def test_a_file_is_run_at_its_own_budget_unless_another_is_given(data, tmp_path):
    vtc.FastV(layer=3).to_json(file := tmp_path / "choice.json", 0.5)
    for more, budget in (("", 0.5), (",budget=75%", 0.75), (",layer=2", 0.5)):
        asked = f"pretrained=reference,method={file}{more}"
        lm = Vtc.create_from_arg_string(asked, {"device": "cpu"})
        assert (lm.reader.model.vtc.compression.budget, lm.arm[1]) == (budget, budget)
    assert folder_name(f"pretrained=reference,method={file}").endswith("__choice__0.5")
    assert folder_name(f"pretrained=reference,method={file},budget=75%").endswith("__choice__75%")
    assert folder_name("pretrained=reference,method=fastv").endswith("__fastv")


# -- lmms-eval's own switches ---------------------------------------------------------------------------------------


def test_switches_of_lmms_eval_that_its_chat_models_cannot_serve(model):
    for name in ("chat_template", "apply_chat_template"):
        with pytest.raises(ValueError, match="leave --apply_chat_template out"):
            getattr(model, name)
    task = suites.load_tasks(("pope",))["pope"]
    task.set_config("num_fewshot", 2)
    model.task_dict["pope"] = task.dataset
    with pytest.raises(ValueError, match=r"pope, question 0: .*leave num_fewshot out"):
        model.generate_until(suites._first(task))


def test_answering_waits_for_no_other_process(model, monkeypatch):
    """A process whose replies all come from --use_cache answers nothing; it takes part in what `clean` gathers."""
    from vtc.eval import suite_model

    task = suites.load_tasks(("vtc_scenes",))["vtc_scenes"]
    model.task_dict["vtc_scenes"] = task.dataset
    gathered = []
    monkeypatch.setattr(suite_model, "gather_object", lambda own: gathered.append(own) or own)
    model.generate_until(suites._first(task))
    assert gathered == []
    model.clean()
    model.clean()  # of a process that had nothing to answer
    assert [len(own) for own in gathered] == [1, 0]


def test_one_process_where_several_were_promised_is_said(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    said = []
    sink = logger.add(lambda message: said.append(str(message)))
    _check_processes(several=False)
    monkeypatch.delenv("MASTER_ADDR")
    _check_processes(several=False)
    logger.remove(sink)
    assert len(said) == 1
    assert "asked for several processes and started one" in said[0]
