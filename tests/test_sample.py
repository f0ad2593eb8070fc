"""Promises of sample.py, on tiny random models, a chain whose distribution is known, and tokenizers made here."""
import contextlib
import io
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import sample as program
from conftest import (ARCHITECTURES, CHATML, INST, LINES, PARTS, ROPES, USER_ONLY, add_adapter, apply_template,
                      build_chain, build_model, build_tokenizer, cut_half, forward, generate, spy)
from sample import UserError, encode_chat, encode_turns, find_stop_ids, load_model, response_logits, sample

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames what all call
ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "data" / "tiny")
CPU = torch.device("cpu")
PROMPTS = [[5, 17, 0, 60, 8], [4, 61], [9, 9, 96, 3, 4, 31, 22, 48, 71, 13, 5, 55], [44, 3, 6], [7, 8],
           [11, 12, 13, 14, 15, 16, 17]]  # ragged, and longer than the short windows of conftest


# ---- every architecture ----
@pytest.mark.parametrize("name", [*ARCHITECTURES, "LoRA"])
def test_greedy_equals_generate_and_response_logits_each_rows_own_forward(name):
    model = add_adapter(build_model("Llama")) if name == "LoRA" else build_model(name)
    stop_ids, want = cut_half(generate(model, PROMPTS, 8))
    assert 0 < sum(len(row) < 8 for row in want) <= 3  # so rows leave the batch, and rows stay
    assert sample(model, PROMPTS, max_new_tokens=8, stop_ids=stop_ids, temperature=0) == want
    logits = torch.cat([forward(model, p, r) for p, r in zip(PROMPTS, want)])
    torch.testing.assert_close(response_logits(model, PROMPTS, want), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ROPES)
def test_rows_that_cross_the_original_length_of_a_rope_are_as_if_alone(name):
    model = build_model(name)
    kw = {"max_new_tokens": 4, "stop_ids": [], "temperature": 0}
    alone = [sample(build_model(name), [p], **kw)[0] for p in PROMPTS]
    logits = torch.cat([forward(build_model(name), p, r) for p, r in zip(PROMPTS, alone)])
    assert sample(model, PROMPTS, **kw) == alone
    model = build_model(name)  # a dynamic rope remembers the longest row that it has seen
    torch.testing.assert_close(response_logits(model, PROMPTS, alone), logits, atol=1e-4, rtol=1e-4)


def test_where_a_long_rope_turns_the_row_is_read_again():
    for seed in range(4):
        model = build_model("Phi3 long", seed)
        [response] = sample(model, PROMPTS[:1], max_new_tokens=8, stop_ids=[], temperature=0)
        for i, token in enumerate(response):  # as without a cache
            read = torch.tensor([PROMPTS[0] + response[:i]])
            assert model(input_ids=read, use_cache=False).logits[0, -1].argmax() == token


def test_the_mask_has_the_querys_dtype_which_attention_on_a_gpu_asks_for(monkeypatch):
    attend = torch.nn.functional.scaled_dot_product_attention

    def attend_strictly(query, *args, attn_mask=None, **kw):
        assert attn_mask is None or attn_mask.dtype in (torch.bool, query.dtype)
        return attend(query, *args, attn_mask=attn_mask, **kw)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend_strictly)
    assert program.decodes_ragged(build_model("Llama").bfloat16(), 16)


def test_a_greedy_row_does_not_depend_on_its_neighbours(model):
    prompts = [*PROMPTS, [0]]
    stop_ids, want = cut_half(generate(model, prompts, 8))
    kw = {"max_new_tokens": 8, "stop_ids": stop_ids, "temperature": 0}
    together = sample(model, prompts, **kw)
    assert together == [sample(model, [p], **kw)[0] for p in prompts] == want
    assert together[::-1] == sample(model, prompts[::-1], **kw)
    assert together * 3 == sample(model, prompts * 3, **kw)


# ---- where a response ends, and what cannot be asked ----
COUNTER = [[50.0 * (j == (i + 1) % 8) for j in range(8)] for i in range(8)]  # 0 → 1 → … → 7 → 0, for certain


@pytest.mark.parametrize("stop_ids, n, want", [
    ([7], 4, [[2, 3, 4, 5], [4, 5, 6, 7], [7]]), ({7, 3, 0}, 4, [[2, 3], [4, 5, 6, 7], [7]]),
    ([], 4, [[2, 3, 4, 5], [4, 5, 6, 7], [7, 0, 1, 2]]), ((2, 7), 1, [[2], [4], [7]]),
    ([1, 3, 6], 3, [[2, 3], [4, 5, 6], [7, 0, 1]]),  # those in the prompt stop nothing
])
def test_a_response_ends_with_its_first_stop_id_or_at_max_new_tokens(stop_ids, n, want):
    prompts = [[1], [3], [2, 6]]
    got, logprobs = sample(build_chain(COUNTER), prompts, max_new_tokens=n, stop_ids=stop_ids, temperature=0,
                           return_logprobs=True)
    assert got == want and prompts == [[1], [3], [2, 6]]
    assert [len(row) for row in logprobs] == [len(row) for row in want]
    assert {type(token) for row in got for token in row} == {int}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_done_leave_once_they_are_half_and_no_step_follows_the_last_token(dtype):
    model = build_chain(COUNTER).to(dtype)
    sample(model, [[1]], max_new_tokens=2, stop_ids=[])  # what is tried once a model
    calls = spy(model)
    sample(model, [[0, 1], [4], [6], [5, 3]], max_new_tokens=20, stop_ids=[7], temperature=0)
    assert [call[0] for call in calls] == [4, 4, 4, 2, 1, 1]  # rows take 6, 3, 1 and 4 tokens


@pytest.mark.parametrize("prompts, bad", [
    ([[1], []], {}), ([[1]], {"max_new_tokens": 0}), ([[1]], {"temperature": -0.1}),
    ([[1]], {"temperature": math.nan}), ([[1]], {"temperature": math.inf}), ([[1]], {"top_k": -1}),
    ([[1]], {"top_p": 0.0}), ([[1]], {"top_p": 1.01}), ([[1]], {"top_p": math.nan})])
def test_what_cannot_be_asked_for_is_a_value_error_and_no_prompts_no_responses(prompts, bad):
    model = build_chain(COUNTER)
    with pytest.raises(ValueError):
        sample(model, prompts, **{"max_new_tokens": 3, "stop_ids": [7], **bad})
    assert sample(model, [], max_new_tokens=3, stop_ids=[7]) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_one_line_that_names_them(model, value, temperature):
    model.get_output_embeddings().weight.data[5] = value
    with pytest.raises(ValueError, match="logits") as error:
        sample(model, PROMPTS, max_new_tokens=2, stop_ids=[], temperature=temperature)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_an_id_that_the_model_has_no_embedding_for_is_one_line(name):
    model = build_model(name)
    for call in (lambda: sample(model, [[1, 500], [2] * 9], max_new_tokens=2, stop_ids=[]),
                 lambda: response_logits(model, [[1]], [[2, 500]])):
        with pytest.raises(UserError, match="500.*97"):
            call()


# ---- the distribution ----
PROBS = [0.15, 0.40, 0.07, 0.20, 0.10, 0.08]  # by rank: ids 1 3 0 4 5 2, cumulated .40 .60 .75 .85 .93 1


def truncate(probs, temperature=1.0, top_k=0, top_p=1.0, vocab_size=None):
    """{id: probability} in plain loops: temperature, top-k, renormalise, top-p, renormalise."""
    weights = {i: p ** (1 / temperature) for i, p in enumerate(probs[:vocab_size])}
    ranked = sorted(weights, key=weights.get, reverse=True)[:top_k or None]
    total = sum(weights[i] for i in ranked)
    kept, mass = {}, 0.0
    for i in ranked:
        if mass < top_p:  # the token that crosses p stays
            kept[i] = weights[i] / total
            mass += kept[i]
    return {i: p / sum(kept.values()) for i, p in kept.items()}


@pytest.mark.parametrize("kw, support", [
    ({}, {0, 1, 2, 3, 4, 5}), ({"top_k": 3}, {1, 3, 0}), ({"top_k": 100}, {0, 1, 2, 3, 4, 5}), ({"top_p": 0.39}, {1}),
    ({"top_p": 0.5}, {1, 3}),  # .40 < .5: the token that crosses it, 3, stays
    ({"top_k": 3, "top_p": 0.7}, {1, 3}),  # renormalised .53 .80 crosses .7; .40 .60 would not
    ({"top_k": 3, "top_p": 0.9}, {1, 3, 0}),  # top-p first would keep five
    ({"temperature": 2.0, "top_p": 0.5}, {1, 3, 0}),  # flattened first: .27 .46 .63
    ({"temperature": 0.5, "top_p": 0.8}, {1, 3}),  # sharpened first: .66 .82
    ({"temperature": 0.5, "top_k": 4, "top_p": 0.99}, {1, 3, 0, 4}),
    ({"vocab_size": 4}, {0, 1, 2, 3}), ({"vocab_size": 3, "top_k": 2}, {1, 0}), ({"vocab_size": 1}, {0}),
])
def test_truncation_keeps_the_right_tokens_at_the_right_frequencies(kw, support):
    n = 6000
    model = build_chain([[math.log(p) + 3 for p in PROBS]] * 6)
    rows = sample(model, [[0]] * n, max_new_tokens=1, stop_ids=[], generator=torch.Generator().manual_seed(0), **kw)
    want = truncate(PROBS, **kw)
    assert set(want) == support == {row[0] for row in rows}
    for i, p in want.items():
        share = sum(row == [i] for row in rows) / n
        assert share == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / n) + 1e-9)


def test_a_generator_decides_the_draw_and_the_global_seed_where_there_is_none(model):
    def draw(seed, **kw):
        torch.manual_seed(seed)
        return sample(model, [[1, 2, 3]] * 4, max_new_tokens=8, stop_ids=[3], **kw)
    zero, again, one = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    assert draw(1, generator=zero) == draw(2, generator=again) != draw(1, generator=one)
    assert draw(1) == draw(1) != draw(2)
    assert len(set(map(tuple, draw(1)))) == 4  # equal prompts, rows of their own


@pytest.mark.parametrize("kw", [{"temperature": 1e-39}, {"temperature": 1e-5}, {"top_k": 1}, {"top_p": 1e-6},
                                {"temperature": 0, "top_k": 5, "top_p": 0.5}])
def test_what_leaves_one_token_is_greedy(model, kw):
    want = sample(model, PROMPTS, max_new_tokens=6, stop_ids=[], temperature=0)
    assert sample(model, PROMPTS, max_new_tokens=6, stop_ids=[], **kw) == want


@pytest.mark.parametrize("kw", [{}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0}])
def test_ids_past_vocab_size_are_never_drawn_but_a_stop_id_past_it_is(kw):
    model = build_chain([[0.0, 0, 0, 0, 20, 50]] * 6)
    rows = sample(model, [[5], [0, 4]] * 20, max_new_tokens=3, vocab_size=3, stop_ids=[], **kw)
    assert max(map(max, rows)) < 3
    assert sample(model, [[5], [0, 4]], max_new_tokens=3, vocab_size=3, stop_ids=[4], **kw) == [[4], [4]]


# ---- the sampler is the trainer, and leaves the model as found ----
@pytest.mark.parametrize("kw", [{}, {"temperature": 0.7}, {"temperature": 1.6, "top_k": 5, "top_p": 0.6},
                                {"temperature": 0}, {"vocab_size": 40}])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2", "Mamba"])
def test_logprobs_equal_those_of_the_training_forward_untruncated(name, kw):
    model = build_model(name)
    generator = torch.Generator().manual_seed(0)
    rows, logprobs = sample(model, PROMPTS, max_new_tokens=9, stop_ids=range(9, 25), generator=generator,
                            return_logprobs=True, **kw)
    want = (response_logits(model, PROMPTS, rows) / (kw.get("temperature") or 1.0)).log_softmax(-1)
    want = want.gather(-1, torch.tensor(sum(rows, []))[:, None])[:, 0]
    assert sum(logprobs, []) == pytest.approx(want.tolist(), abs=1e-4)


def test_dropout_is_off_and_each_modules_mode_comes_back_after_an_exception_too():
    model = build_model("GPT2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    want = sample(model, PROMPTS, max_new_tokens=6, stop_ids=[], temperature=0)
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    calls = spy(model)
    assert sample(model, PROMPTS, max_new_tokens=6, stop_ids=[], temperature=0) == want
    assert not any(training for *_, training in calls)
    assert [module.training for module in model.modules()] == before
    model.transformer.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(model, PROMPTS, max_new_tokens=2, stop_ids=[])
    assert [module.training for module in model.modules()] == before


def test_a_step_moves_no_tensor_so_that_a_graph_may_hold_it(model):
    """What a CUDA graph reads and writes lies where it lay, and the ids are copied in."""
    decoder = program.RaggedDecoder(model, PROMPTS, slots=20)
    layers = [x for layer in decoder.cache.layers for x in (layer.keys, layer.values)]

    def find():
        held = [decoder.token, decoder.positions, decoder.at, decoder.mask]
        return [x.data_ptr() for x in [*held, *layers]]

    before = find()
    for token in (3, 4):
        with torch.no_grad():
            decoder.step(torch.full((len(PROMPTS),), token))
        assert find() == before and decoder.token.eq(token).all()
    now = [x for layer in decoder.cache.layers for x in (layer.keys, layer.values)]
    assert [x.data_ptr() for x in now] == before[4:]


def test_under_gradient_checkpointing_it_still_decodes_with_a_cache(model):
    want = sample(model, PROMPTS, max_new_tokens=7, stop_ids=[], temperature=0)
    model.train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False  # as trainers set it
    calls = spy(model)
    assert sample(model, PROMPTS, max_new_tokens=7, stop_ids=[], temperature=0) == want
    assert [call[1] for call in calls] == [7, 12] + [1] * 6  # the prompts in two batches
    assert model.training and model.base_model.gradient_checkpointing and model.config.use_cache is False


# ---- what a query spells ----
ADDED = ("  ", "   ", "\n\n", "<table>", "</think>")
QUERIES = ["What is rain?", "  two  and   three", "one\n\ntwo\n\n\n", "<table> [/INST] <<SYS>>", "hi [", " ", "{{ x }}"]

@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("template", [CHATML, INST], ids=["chatml", "inst"])
@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_a_query_that_spells_no_special_token_reaches_the_model_to_the_letter(kind, template, query):
    tokenizer = build_tokenizer(kind, template, ADDED)
    turns = [("system", "Be brief."), ("user", query), ("assistant", "Water."), ("user", "And snow?")]
    assert encode_chat(tokenizer, query) == apply_template(tokenizer, turns[1])
    assert encode_chat(tokenizer, query, "Be brief.") == apply_template(tokenizer, *turns[:2])
    assert encode_turns(tokenizer, turns) == apply_template(tokenizer, *turns)


@pytest.mark.parametrize("spelled", ["<|im_end|>", "<s></s>", "<|im_<|im_end|>end|>", "</think>", "x<unk>", "</s>"])
@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_no_special_token_and_none_that_the_template_writes_comes_through(kind, spelled):
    tokenizer = build_tokenizer(kind, CHATML, ADDED)
    controls = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special or t.content == "</think>"}
    plain, got = [encode_turns(tokenizer, [("system", text), ("user", text)]) for text in ("a b", f"a {spelled} b")]
    assert [i for i in got if i in controls] == [i for i in plain if i in controls]
    assert spelled[1:] in tokenizer.decode(encode_chat(tokenizer, spelled)).replace(" ", "")


def test_the_ids_are_the_same_under_every_hash_seed():
    code = ("from conftest import *; from sample import encode_chat; "
            "tokenizer = build_tokenizer('bytes', CHATML, ['  ', '   ', '    ', '\\n\\n', '<table>']); "
            "print(encode_chat(tokenizer, 'a    b  c\\n\\n<table><|im_end|></s>'))")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    runs = [subprocess.Popen([sys.executable, "-c", code], env={**env, "PYTHONHASHSEED": seed},
                             stdout=subprocess.PIPE) for seed in "12"]
    first, second = [run.communicate()[0] for run in runs]
    assert first == second and first.startswith(b"[")


@pytest.mark.parametrize("query", ["What is rain?", "No", "safe", "this"])  # the template has the last three itself
def test_a_template_that_reads_parts_gets_parts(query):
    tokenizer = build_tokenizer("bytes", PARTS)
    want = apply_template(tokenizer, ("user", [{"type": "text", "text": query}]))
    assert encode_chat(tokenizer, query) == want and f"user\n{query}" in tokenizer.decode(want)


@pytest.mark.parametrize("template, system", [
    ("<|im_start|>user", None), ("{{ raise_exception('no user') }}", None), ("{% for %}", None), ("{{ 1 / 0 }}", None),
    (USER_ONLY.replace("OTHER", ""), "Be brief."), (USER_ONLY.replace("OTHER", "{{ 1 / 0 }}"), "Be brief.")])
def test_a_template_that_fails_or_does_not_show_a_turn_is_one_line(template, system):
    with pytest.raises(UserError, match="template") as error:
        encode_chat(build_tokenizer("bytes", template), "What is rain?", system)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("single", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("kind", ["bytes", "words"])
@pytest.mark.parametrize("template", [None, INST], ids=["plain", "inst"])
def test_whatever_a_tokenizer_adds_there_is_one_bos_and_no_eos_at_the_end(kind, single, template):
    tokenizer = build_tokenizer(kind, template)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    got = encode_chat(tokenizer, "hi </s>")
    assert got.count(tokenizer.bos_token_id) == int(template is not None or "<s>" in single)
    assert tokenizer.eos_token_id not in got


# ---- stop ids and the size of the vocabulary ----
@pytest.mark.parametrize("template, eos, want", [
    (None, [5, 9], [5, 9, "</s>"]), (None, 7, [7, "</s>"]), (PARTS, [5], [5, "</s>", "<|im_end|>"]),
    (CHATML, None, ["</s>", "<|im_end|>"]),  # whatever config and tokenizer say
    (INST, None, ["</s>"]), (LINES, None, ["</s>"]), (LINES.replace("\n", "  \n"), None, ["</s>"])])
@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_the_config_the_tokenizer_and_the_turns_end_say_where_to_stop(kind, template, eos, want):
    tokenizer = build_tokenizer(kind, template, ("\n", "  ", "<table>"))
    model = build_model("Llama")
    model.generation_config.eos_token_id = eos  # a number, a list, or nothing
    ids = [i if isinstance(i, int) else tokenizer.convert_tokens_to_ids(i) for i in want]
    assert find_stop_ids(model, tokenizer) == sorted(ids)


def test_the_vocabulary_reaches_its_largest_id_holes_or_not():
    holes = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 40}, unk_token="a"))
    assert program.find_vocab_size(PreTrainedTokenizerFast(tokenizer_object=holes)) == 41
    assert program.find_vocab_size(build_tokenizer()) == len(build_tokenizer())


# ---- loading ----
def fails_to_load(folder):
    with pytest.raises(UserError) as error:
        load_model(str(folder), CPU, torch.float32)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("rename", [lambda key: f"_orig_mod.{key}", lambda key: key.replace("layers.1", "layers.7"),
                                    lambda key: key.replace("norm.weight", "norm.w")])
def test_missing_and_renamed_weights_are_one_line_that_names_some_and_tied_ones_are_fine(folder, rename):
    load_model(str(folder), CPU, torch.float32)  # whose head is tied, and not in the file
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({rename(k): v for k, v in weights.items()}, file, {"format": "pt"})
    assert any(key in fails_to_load(folder) for key in weights)


def test_a_folder_without_safetensors_or_model_says_which(folder):
    file = folder / "model.safetensors"
    torch.save(safetensors.torch.load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    assert "safetensors" in fails_to_load(folder)
    assert "no such folder" in fails_to_load(folder / "none")
    add_adapter(load_model(str(TINY), CPU, torch.float32)[0]).save_pretrained(folder / "a")
    config = folder / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(TINY), "/gone/base"))
    assert "no such folder as /gone/base" in fails_to_load(folder / "a")


@pytest.mark.parametrize("error, word", [
    (OSError("You are trying to access a gated repo.\n401 Client Error"), "licence"),
    (OSError("x does not appear to have a file named model.safetensors"), "safetensors"),
    (ImportError("This needs the `dingbat` library"), "dingbat")])
def test_what_a_hub_model_lacks_is_told_as_what_it_is(folder, monkeypatch, error, word):
    def refuse(*args, **kwargs):
        raise error
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    assert word in fails_to_load(folder)


def test_an_adapter_loads_with_its_base_as_a_folder_and_as_a_hub_id(folder, tmp_path, monkeypatch):
    student = add_adapter(load_model(str(folder), CPU, torch.float32)[0])
    want = forward(student, [1, 2], [3, 4])
    hub = tmp_path / "hub" / "models--me--adapter"
    snapshot = hub / "snapshots" / "abc"
    student.save_pretrained(snapshot)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = snapshot / "adapter_config.json"
    for base, cwd in ((str(folder), "/"), ("m", tmp_path)):
        monkeypatch.chdir(cwd)
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
        for name in (str(snapshot), "me/adapter"):
            model, tokenizer = load_model(name, CPU, torch.float32)
            torch.testing.assert_close(forward(model, [1, 2], [3, 4]), want)
            assert tokenizer.chat_template == CHATML


@pytest.mark.parametrize("kind", ["stacked", "PrefixTuning", "PromptTuning"])
def test_an_adapter_that_is_more_than_added_weights_is_one_line(folder, tmp_path, kind):
    base = load_model(str(folder), CPU, torch.float32)[0]
    if kind == "stacked":
        add_adapter(base).save_pretrained(tmp_path / "first")
        student = add_adapter(load_model(str(folder), CPU, torch.float32)[0])
        student.peft_config["default"].base_model_name_or_path = str(tmp_path / "first")
    else:
        config = getattr(peft, f"{kind}Config")(num_virtual_tokens=3, task_type="CAUSAL_LM")
        student = peft.get_peft_model(base, config)
    student.save_pretrained(tmp_path / "a")
    assert "is not read" in fails_to_load(tmp_path / "a")


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_a_model_that_looks_to_the_right_is_one_line(name):
    config = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64,
              "num_attention_heads": 4}
    torch.manual_seed(0)
    causal = {"Bert": "BertLMHeadModel", "Roberta": "RobertaForCausalLM"}[name]
    for is_decoder in (False, True):
        model = getattr(transformers, causal)(
            getattr(transformers, f"{name}Config")(**config, is_decoder=is_decoder)).eval()
        with contextlib.nullcontext() if is_decoder else pytest.raises(UserError, match="right"):
            sample(model, [[5, 6, 7]], max_new_tokens=2, stop_ids=[])


def test_an_adapter_loads_with_the_revision_of_its_base_that_it_names(tmp_path, monkeypatch):
    hub = tmp_path / "models--me--base"
    (hub / "refs").mkdir(parents=True)
    for seed, ref in ((0, "v1"), (7, "main")):
        tokenizer = build_tokenizer("bytes", CHATML)
        build_model("Llama", seed, vocab_size=len(tokenizer)).save_pretrained(hub / "snapshots" / ref)
        tokenizer.save_pretrained(hub / "snapshots" / ref)
        (hub / "refs" / ref).write_text(ref)
    student = add_adapter(load_model(str(hub / "snapshots" / "v1"), CPU, torch.float32)[0])
    student.save_pretrained(tmp_path / "a")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = tmp_path / "a" / "adapter_config.json"
    named = {"base_model_name_or_path": "me/base", "revision": "v1"}
    config.write_text(json.dumps({**json.loads(config.read_text()), **named}))
    model, _ = load_model(str(tmp_path / "a"), CPU, torch.float32)
    torch.testing.assert_close(forward(model, [1, 2], [3, 4]), forward(student, [1, 2], [3, 4]))


def test_an_adapters_weights_that_have_no_place_are_told(folder, tmp_path, capsys):
    add_adapter(load_model(str(folder), CPU, torch.float32)[0]).save_pretrained(tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": ["q_proj"]}))
    load_model(str(tmp_path / "a"), CPU, torch.float32)
    assert "have no place" in capsys.readouterr().err


def test_a_window_of_another_name_decodes_a_row_at_a_time():
    config = transformers.GPTNeoConfig(vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, window_size=8,
                                       attention_types=[[["global", "local"], 1]])
    torch.manual_seed(0)
    model = transformers.GPTNeoForCausalLM(config).eval()
    for p in model.parameters():
        p.data.mul_(5 if p.dim() > 1 else 1)
    prompts = [[3 + i * 7 % 90 for i in range(12)], [5, 6, 7]]
    got = sample(model, prompts, max_new_tokens=10, stop_ids=[], temperature=0)
    assert got == generate(model, prompts, 10)


@pytest.mark.parametrize("gap", ["", "\n", " "])
def test_a_turns_end_behind_white_space_is_a_stop(gap):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + gap + "<|im_end|>\n{% endfor %}"
    tokenizer = build_tokenizer("bytes", template)
    stops = find_stop_ids(build_model("Llama", vocab_size=len(tokenizer)), tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stops


def test_files_in_folders_whose_names_hold_an_equals_sign_are_found(tmp_path, monkeypatch):
    for lang in ("en", "jv"):
        (tmp_path / f"lang={lang}").mkdir()
        (tmp_path / f"lang={lang}" / "x.csv").write_text("prompt\na\n")
    monkeypatch.chdir(tmp_path)
    named = program.find_path("en=lang=en/x.csv,jv=lang=jv/x.csv")
    assert named == f"en={tmp_path}/lang=en/x.csv,jv={tmp_path}/lang=jv/x.csv"


def test_a_model_in_training_mode_is_tried_without_its_dropout(model):
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.5
    student = peft.get_peft_model(model, peft.LoraConfig(
        r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
    student.train()
    assert response_logits(student, [[5, 6, 7]], [[8, 9]]).shape == (2, 97)
    assert student.training


def test_code_that_comes_with_a_model_never_runs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n"
                                   "from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as Own")
    assert "code" in fails_to_load(folder)
    assert not (tmp_path / "ran").exists()


# ---- the command, and what every program shares ----
def run(monkeypatch, *argv):
    """sample.py as a script, read anew: what it says once, it says once a run."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, argv)])
    monkeypatch.delitem(sys.modules, "sample", raising=False)
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")


@pytest.mark.parametrize("flag, value", [
    ("--prompt", ""), ("--tempratur", "1"), ("--temp", "1"), ("--model", "/none"), ("--top-p", "0"), ("--top-k", "-1"),
    ("--max-new-tokens", "0"), ("--device", "abacus"), ("--device", "hpu"), ("--temperature", "nan")])
def test_a_mistake_costs_one_line_and_exit_code_2(monkeypatch, capsys, flag, value):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--prompt", "x", flag, value)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("sample.py: error: ") and err.count("\n") == 1 and (flag in err or value in err)


def test_it_answers_each_line_until_an_empty_one(monkeypatch, capsys):
    query = "How do I bake bread?"
    model, tokenizer = load_model(TINY, CPU, torch.float32)
    [ids] = sample(model, [encode_chat(tokenizer, query)], max_new_tokens=8, temperature=0,
                   stop_ids=find_stop_ids(model, tokenizer))
    want = tokenizer.decode(ids, skip_special_tokens=True).strip()
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{query}\r\n{query}\n\r\n{query}\n", newline=""))
    run(monkeypatch, "--model", TINY, "--max-new-tokens", 8, "--device", "cpu")
    out, err = capsys.readouterr()
    assert want and out.splitlines() == [want, want] and not err


def test_what_is_typed_and_is_no_utf_8_is_one_line():
    runs = [subprocess.Popen([sys.executable, ROOT / "sample.py", "--max-new-tokens", "2"], stdin=subprocess.PIPE,
                             stderr=subprocess.PIPE, env={**os.environ, "LC_ALL": locale})
            for locale in ("C.UTF-8", "C")]
    for run in runs:
        err = run.communicate(b"hi \xff\xfe\n\n")[1]
        assert run.returncode == 2 and err.decode().strip() == "sample.py: error: what was typed is not UTF-8"


def test_from_another_folder_it_finds_its_own_model_and_answers(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--prompt", "What is rain?", "--max-new-tokens", "4"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() and "Traceback" not in done.stderr


def test_without_a_template_it_asks_plainly_and_says_so_and_chat_template_json_is_one(folder, monkeypatch, capsys):
    (folder / "chat_template.jinja").unlink()
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    run(monkeypatch, "--model", folder, "--max-new-tokens", 2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no chat template" in err
    _, tokenizer = load_model(str(folder), CPU, torch.float32)
    assert tokenizer.decode(encode_chat(tokenizer, "hi")) == "User: hi\nAssistant:"
    assert tokenizer.decode(encode_chat(tokenizer, "hi", "Be brief.")) == "Be brief.\n\nUser: hi\nAssistant:"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": INST}))
    assert load_model(str(folder), CPU, torch.float32)[1].chat_template == INST


@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt(), 130, ["interrupted"]), (UserError("two\nlines"), 2, ["error: two lines"]),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, ["--micro-batch-size", "--max-new-tokens", "--lora-rank"]),
    (RuntimeError("DefaultCPUAllocator: can't allocate"), 2, ["out of memory", "--batch-size"])])
def test_what_a_user_can_mend_is_one_line(monkeypatch, capsys, error, code, words):
    def main(args):
        raise error
    monkeypatch.setattr(sys, "argv", ["any.py"])
    with pytest.raises(SystemExit) as stop:
        program.Parser(prog="any.py").run(main)
    err = capsys.readouterr().err.strip()
    assert stop.value.code == code and err.startswith("any.py: ") and "\n" not in err
    assert all(word in err for word in words)


def test_a_teacher_prompt_is_found_by_name_or_file_without_its_bom_and_filled_once(tmp_path):
    class Query:
        text = {"jv": "Apa {query_en} kuwi?", "en": "What is {language}?"}
    file = tmp_path / "p.txt"
    file.write_text("\ufeff{query_en}, {query}, {language}", encoding="utf-8")
    filled = program.fill_template(program.read_template(str(file)), Query, "jv", "en")
    assert filled == "What is {language}?, Apa {query_en} kuwi?, Javanese"
    assert "{query" in program.read_template("cot")
    file.write_text("{query_en}, {query}, {langauge}")
    for name in (str(tmp_path), "nobody", str(file)):
        with pytest.raises(UserError, match="--teacher-prompt"):
            program.read_template(name)


def test_where_nobody_reads_on_the_exit_code_is_that_of_a_closed_pipe(monkeypatch, capfd):
    def main(args):
        raise BrokenPipeError
    monkeypatch.setattr(os, "dup2", lambda *files: None)
    with pytest.raises(SystemExit) as stop:
        program.Parser(prog="any.py").run(main, [])
    assert stop.value.code == 141
