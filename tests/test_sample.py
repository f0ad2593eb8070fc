"""Promises of sample.py, on tiny random models, a chain whose distribution is known, and tokenizers
made here."""
import contextlib
import io
import json
import math
import resource
import runpy
import sys
from collections import Counter
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerFast
from transformers.integrations import sdpa_attention

import sample as program
from conftest import (ARCHITECTURES, CHATML, INST, LINES, PARTS, ROPES, USER_ONLY, add_adapter,
                      apply_template, build_any, build_chain, build_model, build_tokenizer,
                      cut_half, forward, generate, spy)
from sample import (UserError, encode_chat, encode_turns, find_stop_ids, load_model,
                    response_logits, sample)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames things
ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "data" / "tiny")
PROMPTS = [[5, 17, 0, 60, 8], [4, 61], [9, 9, 96, 3, 4, 31, 22, 48, 71, 13, 5, 55], [44, 3, 6],
           [7, 8], [11, 12, 13, 14, 15, 16, 17]]  # ragged, and longer than conftest's short windows


def greedy(model, prompts, n, stop_ids=()):
    return sample(model, prompts, max_new_tokens=n, stop_ids=stop_ids, temperature=0)


# ---- every architecture ----

@pytest.mark.parametrize("name", [*ARCHITECTURES, "LoRA"])
def test_greedy_equals_generate_and_response_logits_each_rows_own_forward(name):
    model = build_any(name)
    stop_ids, want = cut_half(generate(model, PROMPTS, 8))
    assert 0 < sum(len(row) < 8 for row in want) <= 3  # so rows leave the batch, and rows stay
    assert greedy(model, PROMPTS, 8, stop_ids) == want
    logits = torch.cat([forward(model, p, r) for p, r in zip(PROMPTS, want)])
    torch.testing.assert_close(response_logits(model, PROMPTS, want), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPT2", "Cohere", "Mixtral", "Mistral wide",
                                  "Gemma3Text wide", "LoRA"])
def test_rows_that_begin_alike_decode_as_if_each_were_alone(name, dtype):
    model = build_any(name).to(dtype)
    alike = [[9, 33, 2, *prompt] for prompt in PROMPTS]
    want = torch.stack([forward(model, prompt, [7, 8, 6]) for prompt in alike])  # (B, 3, V)
    exact = 1e-4 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        decoder = program.RaggedDecoder(model, alike, slots=18)
        for i, token in enumerate([7, 8, 6]):
            torch.testing.assert_close(decoder.logits, want[:, i], atol=exact, rtol=exact)
            decoder.step(torch.tensor([token] * len(alike)))


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Cohere", "Granite", "Gemma2"])
def test_a_head_that_scales_or_caps_is_known_so_it_sees_response_positions_alone(name):
    model = build_model(name)
    assert program.find_head(model)[0] is model.base_model


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_a_decoder_that_stays_in_float32_has_a_head_in_bfloat16(name):
    model = build_model(name).bfloat16()
    assert program.find_head(model)[0] is model.base_model
    assert response_logits(model, PROMPTS, PROMPTS).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ROPES)
def test_rows_that_cross_the_original_length_of_a_rope_are_as_if_alone(name):
    def build():
        return build_model(name)  # anew: a dynamic rope remembers the longest row that it has seen
    alone = [greedy(build(), [prompt], 4)[0] for prompt in PROMPTS]
    assert greedy(build(), PROMPTS, 4) == alone
    logits = torch.cat([forward(build(), p, r) for p, r in zip(PROMPTS, alone)])
    torch.testing.assert_close(response_logits(build(), PROMPTS, alone), logits,
                               atol=1e-4, rtol=1e-4)


def test_where_a_long_rope_turns_the_row_is_read_again():
    for seed in range(4):
        model = build_model("Phi3 long", seed)
        [response] = greedy(model, PROMPTS[:1], 8)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alibi_is_seen_in_a_model_of_small_weights_too(dtype):
    config = transformers.MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=100)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    assert not program.decodes_ragged(model, 16)


def test_an_encoder_that_was_made_a_decoder_is_one():
    model = build_model("Bert", is_decoder=True)
    assert greedy(model, PROMPTS, 2) == generate(model, PROMPTS, 2)


# ---- a step as a CUDA graph, as far as a CPU can tell: its tensor operations on the very tensors,
# without the Python around them

FORBIDDEN = {"aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh"}  # they wait for it


def list_tensors(*trees):
    return [x for x in tree_leaves(trees) if isinstance(x, torch.Tensor)]


def list_storages(*trees):
    return {x.untyped_storage().data_ptr(): x.untyped_storage() for x in list_tensors(*trees)}


class Graph:
    """In place of torch.cuda.CUDAGraph."""
    replays = 0

    def __init__(self):
        self.calls = []

    def replay(self):
        Graph.replays += 1
        for func, args, kwargs, out in self.calls:
            if not func._schema.is_mutable and list_storages(out).keys() <= list_storages(
                    args, kwargs).keys():
                continue  # a view
            for old, new in zip(list_tensors(out), list_tensors(func(*args, **kwargs))):
                if old is not new:
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph
        self.before = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in FORBIDDEN:
            raise RuntimeError(f"not permitted when stream is capturing: {func}")
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for at, storage in list_storages(args, kwargs).items():
                self.before.setdefault(at, (storage, storage.clone()))
        out = func(*args, **kwargs)
        self.graph.calls.append((func, args, kwargs, out))
        return out


@contextlib.contextmanager
def capture(graph):
    """In place of torch.cuda.graph, which runs nothing."""
    recorder = Recorder(graph)
    with recorder:
        yield
    for storage, before in recorder.before.values():
        storage.copy_(before)


@pytest.fixture
def graphs(monkeypatch):
    class Decoder(program.RaggedDecoder):
        def __init__(self, model, prompts, slots):
            super().__init__(model, prompts, slots + -slots % 128)
            self.is_static = True

    Graph.replays = 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return lambda: monkeypatch.setattr(program, "RaggedDecoder", Decoder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [
    "Llama", "Qwen2", "Qwen3", "Phi3", "Olmo2", "GPT2", "GPTNeoX", "Cohere", "Granite", "Mixtral",
    "Mistral wide", "Gemma3Text wide", "LoRA"])
def test_a_step_replayed_without_its_python_is_the_step(graphs, name, dtype):
    model = build_any(name).to(dtype)
    stop_ids, _ = cut_half(greedy(model, PROMPTS, 9))
    options = dict(max_new_tokens=9, stop_ids=stop_ids, temperature=0, return_logprobs=True)
    want = sample(model, PROMPTS, **options)
    del model.is_ragged  # tried again, in this way
    graphs()
    responses, logprobs = sample(model, PROMPTS, **options)
    assert responses == want[0] and model.is_ragged and Graph.replays >= 5
    exact = 1e-5 if dtype == torch.float32 else 0.05
    assert sum(logprobs, []) == pytest.approx(sum(want[1], []), abs=exact)


# ---- where a response ends, and what cannot be asked ----

COUNTER = (50 * torch.eye(8).roll(1, 1)).tolist()  # 0 → 1 → … → 7 → 0, for certain


@pytest.mark.parametrize("stop_ids, n, want", [
    ([], 4, [[2, 3, 4, 5], [4, 5, 6, 7], [7, 0, 1, 2]]),
    ({7, 3, 0}, 4, [[2, 3], [4, 5, 6, 7], [7]]),
    ([1, 3, 6], 3, [[2, 3], [4, 5, 6], [7, 0, 1]]),  # those in the prompt stop nothing
])
def test_a_response_ends_with_its_first_stop_id_or_at_max_new_tokens(stop_ids, n, want):
    prompts = [[1], [3], [2, 6]]
    got, logprobs = sample(build_chain(COUNTER), prompts, max_new_tokens=n, stop_ids=stop_ids,
                           return_logprobs=True)
    assert got == want and prompts == [[1], [3], [2, 6]]
    assert [len(row) for row in logprobs] == [len(row) for row in want]
    assert set(map(type, sum(got, []))) == {int}


def test_rows_that_are_done_leave_once_they_are_half_and_no_step_follows_the_last_token():
    model = build_chain(COUNTER)
    greedy(model, [[1]], 2)  # what is tried once a model
    calls = spy(model)
    greedy(model, [[0, 1], [4], [6], [5, 3]], 20, stop_ids=[7])
    # the longest prompt is read alone; then rows take 6, 3, 1 and 4 tokens
    assert [call[0] for call in calls] == [1, 3, 4, 4, 2, 1, 1]


@pytest.mark.parametrize("prompts, read", [
    ([[1, 2, 3, 4, 5], [1, 2, 3, 7], [1, 2, 3, 6]], [(1, 5), (2, 1)]),
    ([[1, 2, 3]] * 3, [(1, 3), (2, 1)]),  # of each row something is read
    ([[1, 2], [1], [1, 2, 3]], [(1, 3), (2, 2)]),
    ([[4, 5], [1, 2, 3]], [(1, 3), (1, 2)]),
    ([[1, 2, 3]], [(1, 3)]),
    # what is left of them is cut by length: 1, 12 and, the longest, 13
    ([[5] * 40 + rest for rest in ([1], [2] * 12, [3] * 13)], [(1, 53), (1, 1), (1, 12)]),
])
def test_what_all_prompts_begin_with_is_read_once(prompts, read):
    model = build_chain(COUNTER)
    greedy(model, [[1]], 2)  # what is tried once a model
    calls = spy(model)
    assert greedy(model, prompts, 2) == [[(p[-1] + 1) % 8, (p[-1] + 2) % 8] for p in prompts]
    assert calls == [*read, (len(prompts), 1)]


def test_what_does_not_fit_the_context_is_one_line():
    sample(build_chain(COUNTER), [[1]], max_new_tokens=255, stop_ids=[3])
    with pytest.raises(UserError, match="^.*context.*$"):
        sample(build_chain(COUNTER), [[1]], max_new_tokens=256, stop_ids=[3])


@pytest.mark.parametrize("value, temperature", [(math.nan, 0), (math.inf, 1.0)])
def test_logits_that_are_not_finite_are_one_line_that_names_them(model, value, temperature):
    model.get_output_embeddings().weight.data[5] = value
    with pytest.raises(UserError, match="^.*logits.*$"):
        sample(model, PROMPTS, max_new_tokens=2, stop_ids=[], temperature=temperature)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_of_logits_that_are_not_finite_none_is_drawn(temperature):
    logits = torch.tensor([[0, math.inf], [math.nan, 0], [-math.inf, 0]])
    assert program.sample_next_token(logits, temperature).tolist() == [-1, -1, 1]


def test_without_a_prompt_there_is_no_response():  # as a process's share of a small batch
    assert greedy(build_chain(COUNTER), [], 2) == []


def test_an_id_that_the_model_has_no_embedding_for_is_one_line(model):
    with pytest.raises(UserError, match="500.*97"):
        greedy(model, [[1, 500], [2] * 9], 2)
    with pytest.raises(UserError, match="500.*97"):
        response_logits(model, [[1]], [[2, 500]])


# ---- the distribution ----

PROBS = [0.15, 0.40, 0.07, 0.20, 0.10, 0.08]  # by rank: ids 1 3 0 4 5 2, cumulated .40 .60 .75


@pytest.mark.parametrize("kw, kept", [
    ({}, [0, 1, 2, 3, 4, 5]),
    ({"top_k": 100}, [0, 1, 2, 3, 4, 5]),
    ({"top_p": 0.5}, [1, 3]),  # .40 < .5: the token that crosses it, 3, stays
    ({"top_k": 3, "top_p": 0.7}, [1, 3]),  # renormalised .53 .80 crosses .7; .40 .60 would not
    ({"temperature": 2.0, "top_p": 0.5}, [1, 3, 0]),  # flattened first: .27 .46 .63
    ({"vocab_size": 3, "top_k": 2}, [1, 0]),
])
def test_truncation_keeps_the_right_tokens_at_the_right_frequencies(kw, kept):
    n = 6000
    model = build_chain([[math.log(p) + 3 for p in PROBS]] * 6)
    generator = torch.Generator().manual_seed(0)
    rows = sample(model, [[0]] * n, max_new_tokens=1, stop_ids=[], generator=generator, **kw)
    count = Counter(token for [token] in rows)
    assert set(count) == set(kept)
    weights = {i: PROBS[i] ** (1 / kw.get("temperature", 1)) for i in kept}
    for i in kept:
        p = weights[i] / sum(weights.values())
        assert count[i] / n == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / n) + 1e-9)


def test_a_draw_is_the_first_of_torchs_own_exponential_clocks():
    logits = 3 * torch.randn(9, 5000)
    tokens = program.sample_next_token(logits, generator=torch.Generator().manual_seed(4))
    clocks = torch.empty_like(logits).exponential_(generator=torch.Generator().manual_seed(4))
    assert tokens.equal((logits.softmax(-1) / clocks).argmax(-1))


def test_a_generator_decides_the_draw_and_the_global_seed_where_there_is_none(model):
    def draw(seed, generator=None):
        torch.manual_seed(seed)
        return sample(model, [[1, 2, 3]] * 4, max_new_tokens=8, stop_ids=[3], generator=generator)
    zero, again, one = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    assert draw(1, zero) == draw(2, again) != draw(1, one)
    assert draw(1) == draw(1) != draw(2)
    assert len(set(map(tuple, draw(1)))) == 4  # equal prompts, rows of their own


@pytest.mark.parametrize("kw", [{"temperature": 1e-3}, {"top_k": 1}, {"top_p": 1e-6}, {"top_p": 0}])
def test_what_leaves_one_token_is_greedy(model, kw):
    got = sample(model, PROMPTS, max_new_tokens=6, stop_ids=[], **kw)
    assert got == greedy(model, PROMPTS, 6)


def test_of_no_new_tokens_there_are_none(model):
    assert sample(model, PROMPTS, max_new_tokens=0, stop_ids=[]) == [[] for _ in PROMPTS]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_ids_past_vocab_size_are_never_drawn(temperature):
    model = build_chain([[0.0, 0, 0, 0, 20, 50]] * 6)
    rows = sample(model, [[5], [0, 4]] * 20, max_new_tokens=3, stop_ids=[],
                  temperature=temperature, vocab_size=3)
    assert max(map(max, rows)) < 3


# ---- the sampler is the trainer, and leaves the model as found ----

@pytest.mark.parametrize("kw", [{"temperature": 1.6, "top_k": 5, "top_p": 0.6}, {"temperature": 0},
                                {"vocab_size": 40}])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2", "Mamba"])
def test_logprobs_equal_those_of_the_training_forward_untruncated(name, kw):
    model = build_model(name)
    rows, logprobs = sample(model, PROMPTS, max_new_tokens=9, stop_ids=range(9, 25),
                            return_logprobs=True, **kw)
    logits = response_logits(model, PROMPTS, rows) / (kw.get("temperature") or 1.0)
    want = logits.log_softmax(-1)[range(len(logits)), sum(rows, [])]
    assert sum(logprobs, []) == pytest.approx(want.tolist(), abs=1e-4)


def test_dropout_is_off_and_each_modules_mode_comes_back_after_an_exception_too():
    options = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    want = greedy(build_model("GPT2", **options), PROMPTS, 6)
    model = build_model("GPT2", **options).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    assert program.find_head(model)[0] is model.base_model  # tried without dropout, too
    assert greedy(model, PROMPTS, 6) == want
    assert [module.training for module in model.modules()] == before
    model.transformer.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        greedy(model, PROMPTS, 2)
    assert [module.training for module in model.modules()] == before


def test_a_step_moves_no_tensor_so_that_a_graph_may_hold_it(model):
    """What a CUDA graph reads and writes lies where it lay, and the ids are copied in."""
    decoder = program.RaggedDecoder(model, PROMPTS, slots=20)

    def find():
        held = [decoder.token, decoder.positions, decoder.mask]
        for layer in decoder.cache.layers:
            held += [layer.keys, layer.values, layer.cumulative_length]
        return [x.data_ptr() for x in held]

    before = find()
    for token in (3, 4):
        with torch.no_grad():
            decoder.step(torch.full((len(PROMPTS),), token))
        assert find() == before and decoder.token.eq(token).all()


def test_before_transformers_5_23_too_heads_that_share_keys_and_values_copy_none(monkeypatch):
    model = build_model("Llama")  # two heads share one
    want = generate(model, PROMPTS, 8)
    decoder = program.RaggedDecoder(model, PROMPTS, slots=21)
    monkeypatch.delattr(sdpa_attention, "pack_gqa", raising=False)  # 5.23's own way
    monkeypatch.delattr(sdpa_attention, "repeat_kv")
    own = program.ALL_ATTENTION_FUNCTIONS["sdpa"]
    linear = torch.nn.functional.linear
    for i in range(8):
        token = decoder.logits.argmax(-1)
        assert token.tolist() == [row[i] for row in want]
        with torch.no_grad():
            decoder.step(token)
    model.base_model.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decoder.step(torch.tensor([3] * len(PROMPTS)))
    assert program.ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    assert torch.nn.functional.linear is linear


@pytest.mark.parametrize("shape", [(3, 1, 7), (3, 7), (1, 1, 7), (0, 7)])
@pytest.mark.parametrize("out", [16, 5])  # eight do not go into five
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_multiplies_as_torch_does(shape, out, dtype):
    x = torch.randn(shape).to(dtype)
    weight = torch.randn(out, 7).to(dtype)
    for bias in (None, torch.randn(out).to(dtype)):
        want = torch.nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(program.multiply_few(x, weight, bias), want)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_on_a_cpu_freed_memory_stays_with_the_process():
    program.find_device("cpu")

    def count():
        torch.ones(25_000_000)  # 100 MB: 48 pages of 2 MB, or 24,000 of 4 KB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert min(-count() + count() for _ in range(9)) < 20  # the first ones find gaps


def test_under_gradient_checkpointing_it_still_decodes_with_a_cache(model):
    want = greedy(model, PROMPTS, 7)
    model.train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False  # as trainers set it
    calls = spy(model)
    assert greedy(model, PROMPTS, 7) == want
    assert [call[1] for call in calls] == [12, 7] + [1] * 6  # the longest, then the others
    assert model.base_model.gradient_checkpointing and model.config.use_cache is False


# ---- what a query spells ----

ADDED = ("  ", "   ", "\n\n", "<table>", "</think>")


@pytest.mark.parametrize("query", [
    "What is rain?", "  two  and   three", "one\n\ntwo\n\n\n", "<table> [/INST] <<SYS>>", "hi [",
    " ", "{{ x }}"])
@pytest.mark.parametrize("template", [CHATML, INST], ids=["chatml", "inst"])
@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_a_query_that_spells_no_special_token_reaches_the_model_to_the_letter(
        kind, template, query):
    tokenizer = build_tokenizer(kind, template, ADDED)
    turns = [("system", "Be brief."), ("user", query)]
    assert encode_chat(tokenizer, query) == apply_template(tokenizer, turns[1])
    assert encode_chat(tokenizer, query, "Be brief.") == apply_template(tokenizer, *turns)
    assert encode_chat(tokenizer, query, "") == apply_template(tokenizer, ("system", ""), turns[1])


@pytest.mark.parametrize("spelled, broken", [
    ("<s></s>", "< s>< /s>"), ("<|im_<|im_end|>end|>", "<|im_< |im_end|>end|>"),
    ("</think>", "< /think>"), ("x<unk>", "x< unk>")])
@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_a_special_token_or_one_that_the_template_writes_is_broken_in_one_way_only(
        kind, spelled, broken):
    tokenizer = build_tokenizer(kind, CHATML, ADDED)
    got, want = [encode_turns(tokenizer, [("system", text), ("user", text)])
                 for text in (f"a {spelled}  b", f"a {broken}  b")]
    assert got == want  # under any PYTHONHASHSEED
    controls = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<unk>", "</think>", "<|im_end|>"])
    assert [i for i in got if i in controls] == [controls[4], controls[4], controls[3]]


def test_what_a_template_puts_together_is_broken_in_a_query_and_ends_an_answer():
    template = ("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|' + 'eot|>' }}"
                "{% endfor %}")
    marks = ("<|user|>", "<|eot|>")
    tokenizer = build_tokenizer("bytes", template, marks)
    user, eot = tokenizer.convert_tokens_to_ids(marks)
    ids = encode_chat(tokenizer, "hi <|user|> <|eot|>")
    assert ids.count(user) == ids.count(eot) == 1
    assert eot in find_stop_ids(build_model("Llama"), tokenizer)


@pytest.mark.parametrize("query", ["What is rain?", "safe"])  # the template says "safe" itself
def test_a_template_that_reads_parts_gets_parts(query):
    tokenizer = build_tokenizer("bytes", PARTS)
    want = apply_template(tokenizer, ("user", [{"type": "text", "text": query}]))
    assert encode_chat(tokenizer, query) == want and f"user\n{query}" in tokenizer.decode(want)


@pytest.mark.parametrize("template, system", [
    ("<|im_start|>user", None), ("{{ raise_exception('no user') }}", None), ("{% for %}", None),
    (USER_ONLY.replace("OTHER", ""), "Be brief."),
    (USER_ONLY.replace("OTHER", "{{ 1 / 0 }}"), "Be brief.")])
def test_a_template_that_fails_or_does_not_show_a_turn_is_one_line(template, system):
    with pytest.raises(UserError, match="^.*template.*$"):
        encode_chat(build_tokenizer("bytes", template), "What is rain?", system)


@pytest.mark.parametrize("single", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("kind", ["bytes", "words"])
@pytest.mark.parametrize("template", [None, INST], ids=["plain", "inst"])
def test_whatever_a_tokenizer_adds_there_is_one_bos_and_no_eos_at_the_end(kind, single, template):
    tokenizer = build_tokenizer(kind, template)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    got = encode_chat(tokenizer, "hi </s>")
    assert got.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in got


# ---- stop ids and the size of the vocabulary ----

@pytest.mark.parametrize("template, eos, want", [
    (None, [5, 9], [5, 9, "</s>"]), (None, 7, [7, "</s>"]),
    (PARTS, [5], [5, "</s>", "<|im_end|>"]), (CHATML, None, ["</s>", "<|im_end|>"]),
    (CHATML.replace("<|im_end|>", "\n <|im_end|>"), None, ["</s>", "<|im_end|>"]),
    (INST, None, ["</s>"]), (LINES, None, ["</s>"])])
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


# ---- loading ----

def load(name):
    return load_model(str(name), torch.device("cpu"), torch.float32)


def fails_to_load(name):
    with pytest.raises(UserError) as error:
        load(name)
    return str(error.value)  # Parser.error makes a line of it


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def save_adapter(base, path, **changes):
    """Save an adapter of a model and return it; the changes are to its config."""
    student = add_adapter(load(base)[0])
    student.save_pretrained(path)
    edit(path / "adapter_config.json", **changes)
    return student


def is_same(model, other):
    return torch.allclose(forward(model, [1, 2], [3, 4]), forward(other, [1, 2], [3, 4]))


@pytest.mark.parametrize("old, new", [("model", "_orig_mod.model"), ("layers.1", "layers.7")])
def test_missing_and_renamed_weights_are_one_line_that_names_some_and_tied_ones_are_fine(
        folder, old, new):
    load(folder)  # whose head is tied, and not in the file
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    renamed = {key.replace(old, new): weight for key, weight in weights.items()}
    safetensors.torch.save_file(renamed, file, {"format": "pt"})
    error = fails_to_load(folder)
    assert any(key in error for key in weights)


def test_a_folder_without_safetensors_or_model_says_which(folder):
    save_adapter(folder, folder / "a", base_model_name_or_path="/gone/base")
    assert "/gone/base" in fails_to_load(folder / "a")
    file = folder / "model.safetensors"
    torch.save(safetensors.torch.load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    assert "safetensors" in fails_to_load(folder)
    assert str(folder / "none") in fails_to_load(folder / "none")


def test_code_that_comes_with_a_model_never_runs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "x"))
    edit(folder / "config.json", model_type="own",
         auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as Own")
    assert "code" in fails_to_load(folder)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_loads_with_its_base_and_the_bases_tokenizer(folder, tmp_path, monkeypatch):
    student = save_adapter(folder, tmp_path / "a", base_model_name_or_path="m")
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load("a")
    assert is_same(model, student) and tokenizer.chat_template == CHATML


def test_an_adapter_keeps_its_float32_over_a_bfloat16_base(folder, tmp_path):
    student = save_adapter(folder, tmp_path / "a", base_model_name_or_path=str(folder))
    model, _ = load_model(str(tmp_path / "a"), torch.device("cpu"), torch.bfloat16)
    found = {name: p.dtype for name, p in model.named_parameters()}
    assert {dtype for name, dtype in found.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in found.items() if "lora_" not in name} == {torch.bfloat16}
    for name, p in student.named_parameters():
        if "lora_" in name:
            assert p.equal(model.get_parameter(name))


def test_an_adapter_on_the_hub_loads_with_the_revision_of_its_base_that_it_names(
        tmp_path, monkeypatch):
    def place(name, revision):
        """The folder of a model on the hub, as a cache holds it."""
        repository = tmp_path / f"models--me--{name}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(revision)
        return repository / "snapshots" / revision

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    tokenizer = build_tokenizer("bytes", CHATML)
    for seed, revision in enumerate(("v1", "main")):
        base = place("base", revision)
        build_model("Llama", seed, vocab_size=len(tokenizer)).save_pretrained(base)
        tokenizer.save_pretrained(base)
    student = save_adapter(place("base", "v1"), place("adapter", "main"),
                           base_model_name_or_path="me/base", revision="v1")
    assert is_same(load("me/adapter")[0], student)


def test_an_adapter_that_is_more_than_added_weights_is_one_line(folder, tmp_path):
    save_adapter(folder, tmp_path / "first")
    save_adapter(folder, tmp_path / "second", base_model_name_or_path=str(tmp_path / "first"))
    assert "is not read" in fails_to_load(tmp_path / "second")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    peft.get_peft_model(load(folder)[0], config).save_pretrained(tmp_path / "virtual")
    assert "is not read" in fails_to_load(tmp_path / "virtual")


def test_an_adapters_weights_that_have_no_place_are_told(folder, tmp_path, capsys):
    save_adapter(folder, tmp_path / "a", target_modules=["q_proj"])
    load(tmp_path / "a")
    assert "have no place" in capsys.readouterr().err


def test_a_file_here_goes_before_one_beside_the_program(tmp_path, monkeypatch):
    (tmp_path / "LICENSE").touch()
    monkeypatch.chdir(tmp_path)
    assert program.find_path("LICENSE") == f"{tmp_path}/LICENSE"


# ---- the command, and what every program shares ----

def run(monkeypatch, *argv):
    """sample.py as a script, read anew: what it says once, it says once a run."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, argv)])
    monkeypatch.delitem(sys.modules, "sample", raising=False)
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")


@pytest.mark.parametrize("flag, value", [
    ("--prompt", ""), ("--prompt", " \n"), ("--temp", "1"), ("--model", "/none"),
    ("--max-new-tokens", "0"), ("--temperature", "nan"), ("--device", "abacus"),
    ("--device", "hpu")])
def test_a_mistake_costs_one_line_and_exit_code_2(monkeypatch, capsys, flag, value):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--prompt", "x", flag, value)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("sample.py: error: ") and err.count("\n") == 1
    assert flag in err or value in err


def test_from_any_folder_it_answers_each_line(monkeypatch, capsys, tmp_path):
    model, tokenizer = load(TINY)
    query = "How do I bake bread?"
    typed = f"{query}\r\n \n{query}\n"
    stop_ids = find_stop_ids(model, tokenizer)
    [ids] = greedy(model, [encode_chat(tokenizer, query)], 8, stop_ids)
    want = tokenizer.decode(ids, skip_special_tokens=True).strip()
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed, newline=""))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()  # what loading said here
    run(monkeypatch, "--max-new-tokens", 8, "--device", "cpu")
    out, err = capsys.readouterr()
    assert want and out.splitlines() == [want, want] and not err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as under C.UTF-8 and under C
def test_what_is_typed_and_is_no_utf_8_is_one_line(monkeypatch, capsys, errors):
    typed = io.TextIOWrapper(io.BytesIO(b"hi \xff\xfe\n\n"), "utf-8", errors)
    monkeypatch.setattr(sys, "stdin", typed)
    with pytest.raises(SystemExit):
        run(monkeypatch)
    err = capsys.readouterr().err
    assert err.startswith("sample.py: error: ") and "utf-8" in err and err.count("\n") == 1


def test_without_a_template_it_asks_plainly_and_says_so(folder, monkeypatch, capsys):
    (folder / "chat_template.jinja").unlink()
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    run(monkeypatch, "--model", folder, "--max-new-tokens", 2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no chat template" in err
    _, tokenizer = load(folder)
    asked = encode_chat(tokenizer, "hi", "Be brief.")
    assert tokenizer.decode(asked) == "<s>System: Be brief.\nUser: hi\nAssistant:"


def test_out_of_memory_in_a_capture_that_breaks_of_it_is_one_line(capsys):
    @contextlib.contextmanager
    def break_off():
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def main(args):
        with break_off():
            raise torch.OutOfMemoryError("CUDA")
    with pytest.raises(SystemExit):
        program.Parser(prog="any.py").run(main, [])
    assert "any.py: error: out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt(), 130, ["interrupted"]),
    (UserError("two\nlines"), 2, ["error: two lines"]),
    (torch.OutOfMemoryError("CUDA"), 2, ["--micro-batch-size", "--max-new-tokens", "--lora-rank"]),
    (RuntimeError("DefaultCPUAllocator: can't allocate"), 2, ["out of memory", "--batch-size"])])
def test_what_a_user_can_mend_is_one_line(capsys, error, code, words):
    def main(args):
        raise error
    with pytest.raises(SystemExit) as stop:
        program.Parser(prog="any.py").run(main, [])
    err = capsys.readouterr().err.strip()
    assert stop.value.code == code and err.startswith("any.py: ") and "\n" not in err
    assert all(word in err for word in words)


class Query:
    text = {"jv": "Apa {query_en} kuwi?", "en": "What is {language}?", "xx": "…"}


def test_a_teacher_prompt_is_found_by_name_or_file_without_its_bom_and_filled_once(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("\ufeff{query_en}, {query}, {language}", encoding="utf-8")
    filled = program.fill_template(program.read_template(str(file)), Query, "jv", "en")
    assert filled == "What is {language}?, Apa {query_en} kuwi?, Javanese"
    assert "{query" in program.read_template("cot")
    file.write_text("{query_sw}", encoding="utf-8")
    for name in (str(tmp_path), "nobody", str(file)):
        with pytest.raises(UserError, match="--teacher-prompt"):
            program.read_template(name)


def test_ours_are_found_from_any_folder_and_a_language_without_a_name_is_its_code(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    template = program.read_template("data/jailbreak.txt")
    assert "{query}" in template
    assert program.fill_template("{language}", Query, "jv", "xx") == "Javanese"
    assert program.fill_template("{language}", Query, "xx", "xx") == "xx"
