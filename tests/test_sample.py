"""Promises of sample.py, on tiny random Hugging Face models and on chains whose distribution is known."""
import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers import Gemma2ForCausalLM, MistralForCausalLM

import sample as program
from conftest import ARCHITECTURES, build_model
from dpsw import dpsw_loss
from sample import sample

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames gradient_checkpointing_enable
V = 97
PROMPTS = [[5, 17, 3, 60, 8], [0], [9, 9, 96, 0, 0, 31, 22, 48, 71, 13, 2, 55], [44, 1, 0], [7, 8]]  # ragged
FAMILIES = ("llama", "gpt2")
SMALL = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.3,
             bos_token_id=None, eos_token_id=None, pad_token_id=None)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are tiny here: a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(family="llama", seed=0, **kw):
    """A random model whose greedy continuations depend on the whole prompt and its positions; eval mode."""
    torch.manual_seed(seed)
    if family == "gpt2":
        kw = {"n_positions": 64, **kw}
        return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
                                          resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3, bos_token_id=None,
                                          eos_token_id=None, **kw)).eval()
    if family == "mistral":  # a sliding window shorter than the prompts
        return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=6, **kw)).eval()
    if family == "gemma2":  # soft-capped logits, a sliding window on every other layer
        return Gemma2ForCausalLM(Gemma2Config(**SMALL, sliding_window=6, final_logit_softcapping=5.0,
                                              tie_word_embeddings=False, **kw)).eval()
    return LlamaForCausalLM(LlamaConfig(**SMALL, attention_dropout=0.3, **kw)).eval()


def make_chain(logits):
    """A Llama whose next-token logits are exactly logits[current token], whatever came before."""
    logits = torch.tensor(logits, dtype=torch.float)
    n = len(logits)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": n}, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for layer in model.model.layers:  # the layers add nothing, so the hidden state is a scaled one-hot
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(n, 32))
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :n] = logits.T * math.sqrt(1 / 32 + model.config.rms_norm_eps)
    return model


def make_counter(n=8):
    """0 → 1 → 2 → … → n − 1 → 0, for certain."""
    return make_chain((50 * torch.eye(n)).roll(1, dims=1).tolist())


def plain_logits(model, prompt, response):
    """(len(response), V): one forward over one row, no cache, no padding."""
    with torch.no_grad():
        return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1].float()


def generate(model, prompts, max_new_tokens, stop_ids=()):
    """transformers' own greedy responses, left-padded, cut after the first stop id."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    kw = dict(eos_token_id=list(stop_ids)) if stop_ids else {}
    rows = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0,
                          use_cache=True, **kw)[:, width:].tolist()
    ends = [next((i + 1 for i, t in enumerate(row) if t in stop_ids), max_new_tokens) for row in rows]
    return [row[:end] for row, end in zip(rows, ends)]


def spy(model):
    """A list that gets (input shape, training mode, grad mode) of every forward of the decoder from here on."""
    program.is_packing_exact(model)  # its trial is no part of the work
    calls = []

    def hook(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        calls.append((tuple(ids.shape), module.training, torch.is_grad_enabled()))
    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


# ---- greedy: the same tokens as transformers ----

@pytest.mark.parametrize("family", FAMILIES + ("mistral", "gemma2"))
def test_greedy_equals_generate_alone_and_in_a_ragged_batch(family):
    model = make_model(family)
    got = sample(model, PROMPTS, max_new_tokens=12, stop_ids=[], temperature=0)
    assert got == [generate(model, [p], 12)[0] for p in PROMPTS]
    if family in FAMILIES:
        assert got == generate(model, PROMPTS, 12)
    assert len({tuple(r) for r in got}) == len(PROMPTS) and max(len(set(r)) for r in got) > 4  # not one token repeated


@pytest.mark.parametrize("family", FAMILIES + ("mistral", "gemma2"))
@pytest.mark.parametrize("as_type", (list, set, tuple))
def test_greedy_equals_generate_with_several_stop_ids(family, as_type):
    model = make_model(family)
    free = generate(model, PROMPTS, 12)
    stop_ids = {free[0][3], free[2][5], free[4][0]}  # in the middle, later, and as the very first token
    got = sample(model, PROMPTS, max_new_tokens=12, stop_ids=as_type(stop_ids), temperature=0)
    assert got == [generate(model, [p], 12, stop_ids)[0] for p in PROMPTS]
    assert got[4] == [free[4][0]] and len({len(r) for r in got}) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_greedy_row_does_not_depend_on_its_neighbours(family):
    model = make_model(family)
    kw = dict(max_new_tokens=10, temperature=0, stop_ids=[generate(model, PROMPTS[:1], 10)[0][4]])
    together = sample(model, PROMPTS, **kw)
    assert together == [sample(model, [p], **kw)[0] for p in PROMPTS]
    assert together[::-1] == sample(model, PROMPTS[::-1], **kw)
    assert together * 3 == sample(model, PROMPTS * 3, **kw)
    assert len({len(r) for r in together}) > 1  # some rows left the batch early


def test_greedy_ignores_top_k_top_p_and_the_generator():
    model = make_model()
    want = sample(model, PROMPTS, max_new_tokens=6, stop_ids=[], temperature=0)
    for seed in (0, 1):
        g = torch.Generator().manual_seed(seed)
        assert want == sample(model, PROMPTS, max_new_tokens=6, stop_ids=[], temperature=0.0, top_k=5, top_p=0.5,
                              generator=g)


def test_sampling_tends_to_greedy():
    model, kw = make_model(), dict(max_new_tokens=8, stop_ids=[])
    want = sample(model, PROMPTS, temperature=0, **kw)
    assert want == sample(model, PROMPTS, temperature=1e-5, **kw)
    assert want == sample(model, PROMPTS, top_k=1, **kw)
    assert want == sample(model, PROMPTS, top_p=1e-6, **kw)  # one token always stays
    assert want != sample(model, PROMPTS, **kw)


def test_learned_positions_reach_the_last_one_and_no_further():
    model = make_model("gpt2", n_positions=16)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10]]
    got = sample(model, prompts, max_new_tokens=8, stop_ids=[], temperature=0)
    assert got == [generate(model, [p], 8)[0] for p in prompts]


# ---- where a response ends ----

def test_responses_end_with_their_stop_id_or_at_max_new_tokens():
    model = make_counter(8)
    kw = dict(max_new_tokens=4, temperature=0)
    assert sample(model, [[1], [3], [5, 6], [0, 4]], stop_ids=[7], **kw) == [[2, 3, 4, 5], [4, 5, 6, 7], [7], [5, 6, 7]]
    assert sample(model, [[1], [3], [5, 6]], stop_ids=[7, 3, 0], **kw) == [[2, 3], [4, 5, 6, 7], [7]]
    assert sample(model, [[1], [3]], stop_ids=[], **kw) == [[2, 3, 4, 5], [4, 5, 6, 7]]
    assert sample(model, [[1], [3]], stop_ids=[2], temperature=0, max_new_tokens=1) == [[2], [4]]


def test_stop_ids_in_the_prompt_stop_nothing():
    assert sample(make_counter(8), [[7, 7, 2], [7], [0, 7]], max_new_tokens=5, stop_ids=[7, 0], temperature=0) == [
        [3, 4, 5, 6, 7], [0], [0]]


def test_the_first_stop_id_is_the_last_token_and_nothing_follows():
    stop_ids = {1, 4}
    got = sample(make_chain([[0.0] * 6] * 6), [[2], [3, 0], [5]] * 40, max_new_tokens=4, stop_ids=stop_ids)
    assert {len(r) for r in got} == {1, 2, 3, 4}
    for r in got:
        assert not stop_ids & set(r[:-1]) and (r[-1] in stop_ids or len(r) == 4)


def test_responses_are_lists_of_ints_in_the_order_of_the_prompts_which_are_left_alone():
    prompts = [[1, 2], [4], [3, 5, 6]]
    got, logprobs = sample(make_counter(8), prompts, max_new_tokens=2, stop_ids=[7], temperature=0,
                           return_logprobs=True)
    assert got == [[3, 4], [5, 6], [7]] and prompts == [[1, 2], [4], [3, 5, 6]]
    assert isinstance(got, list) and all(isinstance(r, list) and all(type(t) is int for t in r) for r in got)
    assert [len(r) for r in logprobs] == [2, 2, 1]


# ---- the distribution ----

# token probabilities, shuffled so that no rank is an index:     id 0     1     2     3     4     5
PROBS = [0.15, 0.40, 0.07, 0.20, 0.10, 0.08]
# by rank: 1 (.40) 3 (.20) 0 (.15) 4 (.10) 5 (.08) 2 (.07), cumulated .40 .60 .75 .85 .93 1


def truncated(logits, temperature=1.0, top_k=0, top_p=1.0, vocab_size=None):
    """{id: probability}, in plain python: temperature, top-k, renormalise, top-p."""
    p = {v: math.exp(x / temperature) for v, x in enumerate(logits[:vocab_size])}
    p = dict(sorted(p.items(), key=lambda item: -item[1])[:top_k or None])
    p = {v: x / sum(p.values()) for v, x in p.items()}
    kept, mass = {}, 0.0
    for v, x in p.items():
        kept[v], mass = x, mass + x
        if mass >= top_p:  # the token that crosses p stays
            break
    return {v: x / sum(kept.values()) for v, x in kept.items()}


def frequencies(model, n=6000, seed=0, **kw):
    rows = sample(model, [[0]] * n, max_new_tokens=1, stop_ids=[], generator=torch.Generator().manual_seed(seed), **kw)
    assert all(len(r) == 1 for r in rows)
    return {v: sum(r == [v] for r in rows) / n for v in {r[0] for r in rows}}


@pytest.mark.parametrize("kw, support", [
    (dict(), {0, 1, 2, 3, 4, 5}),
    (dict(top_k=3), {1, 3, 0}),
    (dict(top_k=100), {0, 1, 2, 3, 4, 5}),
    (dict(top_p=0.5), {1, 3}),  # .40 < .5: the token that crosses it, 3, stays
    (dict(top_p=0.39), {1}),
    (dict(top_p=0.94), {0, 1, 2, 3, 4, 5}),
    (dict(top_k=3, top_p=0.7), {1, 3}),  # renormalised .533 .800: crosses .7; un-renormalised it would be .60 < .7
    (dict(top_k=3, top_p=0.9), {1, 3, 0}),  # top-p first would keep five, and 4 with them before top-k
    (dict(temperature=2.0, top_p=0.5), {1, 3, 0}),  # flattened: .271 .463 .629; top-p before temperature: {1, 3}
    (dict(temperature=0.5, top_p=0.8), {1, 3}),  # sharpened: .656 .820; top-p before temperature: {1, 3, 0, 4}
    (dict(temperature=0.5), {0, 1, 2, 3, 4, 5}),
    (dict(temperature=2.0), {0, 1, 2, 3, 4, 5}),
    (dict(temperature=0.5, top_k=4, top_p=0.99), {1, 3, 0, 4}),
    (dict(vocab_size=4), {0, 1, 2, 3}),
    (dict(vocab_size=3, top_k=2), {1, 0}),
    (dict(vocab_size=1, top_k=1), {0}),  # the best tokens are all out of the vocabulary
    (dict(vocab_size=3, top_p=0.5), {1}),  # .645 of what is left
])
def test_truncation_keeps_the_right_tokens_at_the_right_frequencies(kw, support):
    logits = [math.log(p) + 3 for p in PROBS]
    want, got = truncated(logits, **kw), frequencies(make_chain([logits] * 6), **kw)
    assert set(want) == support  # the reference agrees with the hand
    assert set(got) == support
    for v, p in want.items():
        assert got[v] == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / 6000) + 1e-9)


def test_later_tokens_are_sampled_from_their_own_rows_distribution():
    g = torch.Generator().manual_seed(0)
    table = (2 * torch.randn(6, 6, generator=g)).tolist()
    kw = dict(temperature=1.3, top_k=4, top_p=0.9)
    prompts = [[i % 6] * (1 + i % 4) for i in range(900)]
    rows = sample(make_chain(table), prompts, max_new_tokens=5, stop_ids=[], generator=g, **kw)
    seen = {}
    for prompt, row in zip(prompts, rows):
        for a, b in zip(prompt[-1:] + row, row):
            seen.setdefault(a, []).append(b)
    for a, follow in seen.items():
        want = truncated(table[a], **kw)
        assert set(follow) == set(want)
        for b, p in want.items():
            assert follow.count(b) / len(follow) == pytest.approx(
                p, abs=4.5 * math.sqrt(p * (1 - p) / len(follow)) + 1e-9)


def test_a_generator_makes_sampling_reproducible_whatever_the_global_seed():
    model, kw = make_model(), dict(max_new_tokens=10, stop_ids=[3])

    def draw(seed, global_seed):
        torch.manual_seed(global_seed)
        return sample(model, PROMPTS, generator=torch.Generator().manual_seed(seed), **kw)
    assert draw(0, 1) == draw(0, 2) != draw(1, 2)
    g = torch.Generator().manual_seed(0)
    assert sample(model, PROMPTS, generator=g, **kw) != sample(model, PROMPTS, generator=g, **kw)  # it moves on


def test_without_a_generator_the_global_seed_is_used():
    model, kw = make_model(), dict(max_new_tokens=10, stop_ids=[])
    draws = [(torch.manual_seed(seed), sample(model, PROMPTS, **kw))[1] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_equal_prompts_in_one_batch_are_sampled_independently():
    rows = sample(make_model(), [[1, 2, 3]] * 8, max_new_tokens=8, stop_ids=[])
    assert len({tuple(r) for r in rows}) == 8


# ---- vocab_size ----

@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_takes_the_best_id_below_vocab_size(family):
    model = make_model(family)
    rows = sample(model, PROMPTS, max_new_tokens=8, stop_ids=[], temperature=0, vocab_size=40)
    for prompt, row in zip(PROMPTS, rows):
        assert plain_logits(model, prompt, row)[:, :40].argmax(-1).tolist() == row
    assert rows != sample(model, PROMPTS, max_new_tokens=8, stop_ids=[], temperature=0)


def test_ids_past_vocab_size_are_never_sampled_however_likely():
    logits = [0.0, 0.0, 0.0, 20.0, 20.0, 20.0]
    for kw in (dict(), dict(top_k=2), dict(top_p=0.5), dict(temperature=0), dict(top_k=4, top_p=0.9)):
        rows = sample(make_chain([logits] * 6), [[5], [0, 4]] * 50, max_new_tokens=3, stop_ids=[], vocab_size=3, **kw)
        assert all(len(r) == 3 and max(r) < 3 for r in rows)


@pytest.mark.parametrize("vocab_size", (None, V, V + 50))
def test_a_vocab_size_of_the_models_or_more_changes_nothing(vocab_size):
    model = make_model()
    want = sample(model, PROMPTS, max_new_tokens=6, stop_ids=[], generator=torch.Generator().manual_seed(0))
    assert want == sample(model, PROMPTS, max_new_tokens=6, stop_ids=[], vocab_size=vocab_size,
                          generator=torch.Generator().manual_seed(0))


# ---- log-probs ----

@pytest.mark.parametrize("kw", [dict(), dict(temperature=0.7), dict(temperature=1.6, top_k=5), dict(top_p=0.6),
                                dict(temperature=0), dict(temperature=0, top_k=3), dict(vocab_size=40)])
@pytest.mark.parametrize("family", FAMILIES + ("gemma2",))
def test_logprobs_equal_a_plain_forward_untruncated(family, kw):
    model = make_model(family)
    stop_ids = [generate(model, PROMPTS[:1], 3)[0][2], 11, 12, 13, 14, 15, 16]
    rows, logprobs = sample(model, PROMPTS, max_new_tokens=9, stop_ids=stop_ids, return_logprobs=True,
                            generator=torch.Generator().manual_seed(0), **kw)
    assert rows == sample(model, PROMPTS, max_new_tokens=9, stop_ids=stop_ids,
                          generator=torch.Generator().manual_seed(0), **kw)  # asking for them changes nothing
    for prompt, row, logp in zip(PROMPTS, rows, logprobs, strict=True):
        want = (plain_logits(model, prompt, row) / (kw.get("temperature", 1.0) or 1.0)).log_softmax(-1)
        want = want.gather(-1, torch.tensor(row)[:, None])[:, 0].tolist()
        assert [float(x) for x in logp] == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("temperature, t", ((0, 1.0), (0.5, 0.5), (2.0, 2.0)))
def test_logprobs_of_a_known_distribution(temperature, t):
    logits = [math.log(p) for p in PROBS]
    rows, logprobs = sample(make_chain([logits] * 6), [[0], [1, 2]] * 10, max_new_tokens=3, stop_ids=[], top_k=2,
                            temperature=temperature, return_logprobs=True)
    total = sum(p ** (1 / t) for p in PROBS)
    for row, logp in zip(rows, logprobs):
        assert [float(x) for x in logp] == pytest.approx([math.log(PROBS[v] ** (1 / t) / total) for v in row], abs=1e-4)


def test_logprobs_of_a_bfloat16_model_are_taken_in_float32():
    table = (3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).tolist()
    model = make_chain(table).bfloat16()
    rows, logprobs = sample(model, [[0], [1, 2]], max_new_tokens=6, stop_ids=[], return_logprobs=True)
    for prompt, row, logp in zip([[0], [1, 2]], rows, logprobs):
        want = plain_logits(model, prompt, row).log_softmax(-1).gather(-1, torch.tensor(row)[:, None])[:, 0]
        assert [float(x) for x in logp] == pytest.approx(want.tolist(), abs=1e-5)


# ---- the model is left as found ----

@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_off_while_sampling_and_the_mode_is_left_as_found(family):
    model = make_model(family)
    kw = dict(max_new_tokens=8, stop_ids=[], temperature=0, return_logprobs=True)
    want, want_logprobs = sample(model, PROMPTS, **kw)
    assert not model.training
    model.train()
    calls = spy(model)
    got, logprobs = sample(model, PROMPTS, **kw)
    assert got == want and all(m.training for m in model.modules())
    for a, b in zip(logprobs, want_logprobs):
        assert [float(x) for x in a] == pytest.approx([float(x) for x in b], abs=1e-5)
    assert calls and not any(training or grad for _, training, grad in calls)


def test_the_mode_of_every_submodule_is_left_as_found():
    model = make_model("gpt2").train()
    model.transformer.h[0].eval()  # frozen below, as some trainers do
    before = [m.training for m in model.modules()]
    sample(model, PROMPTS, max_new_tokens=2, stop_ids=[])
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize("when", (1, 3))
@pytest.mark.parametrize("training", (True, False))
def test_the_mode_comes_back_after_an_exception(training, when):
    model = make_model().train(training)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    calls = spy(model)

    def fail(*_):
        if len(calls) == when:
            raise RuntimeError("out of memory")
    model.base_model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(model, PROMPTS, max_new_tokens=6, stop_ids=[])
    assert all(m.training == training for m in model.modules())
    assert model.model.gradient_checkpointing and model.config.use_cache is False


@pytest.mark.parametrize("reentrant", (True, False))
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_in_train_mode_still_decodes_with_a_cache(family, reentrant):
    model = make_model(family)
    want = sample(model, PROMPTS, max_new_tokens=7, stop_ids=[], temperature=0)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.config.use_cache = False  # as trainers set it
    flags = [m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    calls = spy(model)
    assert sample(model, PROMPTS, max_new_tokens=7, stop_ids=[], temperature=0) == want
    assert len(calls) == 7 and all(shape[1] == 1 for shape, _, _ in calls[1:])
    assert flags == [m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    assert any(flags) and model.config.use_cache is False and model.training


def test_sampling_leaves_no_gradient_and_the_weights_alone():
    model = make_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    _, logprobs = sample(model, PROMPTS, max_new_tokens=3, stop_ids=[], return_logprobs=True)
    assert not any(getattr(x, "requires_grad", False) for row in logprobs for x in row)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model(torch.tensor([[1, 2]])).logits.sum().backward()  # nothing of the sampler's mode sticks to the weights


@pytest.mark.parametrize("shared", [[], list(range(60, 72))], ids=["", "a shared beginning"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_continues_ragged_prompts_as_it_does_one_alone(name, shared):
    model, reference, prompts = build_model(name), build_model(name), [shared + p for p in PROMPTS]
    got = sample(model, prompts, max_new_tokens=6, stop_ids=[], temperature=0)
    for prompt, response in zip(prompts, got):
        expected = plain_logits(reference, prompt, response)
        assert response == expected.argmax(-1).tolist()


# ---- work ----

def test_prompts_are_read_without_padding_and_their_shared_beginning_once():
    model = make_model()
    calls = spy(model)
    sample(model, [[7, 8, 9, *p] for p in PROMPTS], max_new_tokens=2, stop_ids=[], temperature=0)
    assert [shape for shape, _, _ in calls] == [(1, 3 + sum(map(len, PROMPTS))), (len(PROMPTS), 1)]


def test_decoding_feeds_one_token_a_row_and_finished_rows_leave_the_batch():
    model = make_counter(8)
    calls = spy(model)
    got = sample(model, [[0, 1], [0, 4], [0, 6], [5, 4]], max_new_tokens=20, stop_ids=[7], temperature=0)
    assert got == [[2, 3, 4, 5, 6, 7], [5, 6, 7], [7], [5, 6, 7]]
    # after the prompt: 3 rows have two tokens to go, 1 row has three more after them
    assert [shape for shape, _, _ in calls if shape[1] == 1] == [(3, 1), (3, 1), (1, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize("stop_ids, forwards", (([], 4), ([2], 1)))
def test_no_forward_is_spent_after_the_last_token(stop_ids, forwards):
    model = make_counter(8)
    calls = spy(model)
    sample(model, [[0, 1], [3, 1]], max_new_tokens=4, stop_ids=stop_ids, temperature=0)
    assert len(calls) == forwards


# ---- edges and errors ----

def test_no_prompts_give_no_responses():
    model = make_counter(8)
    assert sample(model, [], max_new_tokens=3, stop_ids=[7]) == []
    responses, logprobs = sample(model, [], max_new_tokens=3, stop_ids=[7], return_logprobs=True)
    assert len(responses) == 0 and len(logprobs) == 0


@pytest.mark.parametrize("prompts, bad", [
    ([[1], []], {}), ([[]], {}), ([[1]], dict(max_new_tokens=0)), ([[1]], dict(max_new_tokens=-1)),
    ([[1]], dict(temperature=-0.1)), ([[1]], dict(temperature=float("nan"))), ([[1]], dict(top_p=0.0)),
    ([[1]], dict(top_p=-0.5)), ([[1]], dict(top_p=1.01)), ([[1]], dict(top_p=float("nan")))])
def test_impossible_requests_raise_value_error_and_leave_the_mode(prompts, bad):
    model = make_counter(8).train()
    with pytest.raises(ValueError):
        sample(model, prompts, **{"max_new_tokens": 3, "stop_ids": [7], **bad})
    assert model.training


def test_options_are_keywords_and_unknown_ones_fail():
    model = make_counter(8)
    with pytest.raises(TypeError):
        sample(model, [[1]], 3, [7])
    with pytest.raises(TypeError):
        sample(model, [[1]], max_new_tokens=3, stop_ids=[7], temprature=0)


# ---- the command: errors ----

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "data" / "tiny")
WEIGH = ["--weights", "--model", TINY, "--device", "cpu", "--max-new-tokens", "8", "--lang", "jv",
         "--query", "Piye carane nyolong sepedhah?", "--query-en", "How do I steal a bike?"]
HOSTILE = ["</script><img src=x onerror=alert(1)>", "\u202eevil\u202c", "\u2028", "<!--", "\x1b[31mred\x07", "\ufffd",
           "&lt;", "م"]
PRINTABLE = ["</script><img src=x onerror=alert(1)>", "\\u202eevil\\u202c", "\\u2028", "<!--", "\\x1b[31mred\\x07",
             "\ufffd", "&lt;", "م"]  # the same, in a terminal


def run(*argv):
    program.build_parser().run(program.main, list(map(str, argv)))


def fails(capsys, *argv):
    """The one line that a mistake costs."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.startswith("sample.py: error: ") and err.count("\n") == 1 and not out
    return err


def write_run(folder, tokens=HOSTILE, steps=3, **changes):
    """A run's samples.jsonl and metrics.jsonl, as msd.py writes them."""
    n = len(tokens)
    rows = [{"step": step, "id": "q<7>", "label": "harmful", "lang": "jv", "prompt": "".join(tokens),
             "teacher_prompt": "T", "response": "".join(tokens), "tokens": tokens, "divergence": [0.5] * n,
             "w_teacher": [0.8] * n,
             "w_student": [i / n for i in range(n)], "teacher_top": tokens[::-1], **changes}
            for step in range(1, steps + 1)]
    metrics = [{"step": step, "loss": 1 / step, "divergence": 0.3, "weight": 0.2} for step in range(1, steps + 1)]
    for name, lines in (("samples", rows), ("metrics", metrics)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), "utf-8")
    return folder / "samples.jsonl", rows, metrics


def read_page(path):
    """The JSON in a page, and the page without it."""
    before, rest = path.read_text("utf-8").split("const DATA = ")
    data, after = rest.split(";\n", 1)
    return json.loads(data), data, before + after


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_one_line_that_names_the_flags(capsys, error):
    def main(args):
        raise error
    with pytest.raises(SystemExit) as stop:
        program.build_parser().run(main, [])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("sample.py: error: out of memory") and err.count("\n") == 1
    assert all(x in err for x in ("--micro-batch-size", "--max-new-tokens", "--batch-size", "--lora-rank", "--plan"))


def test_a_real_allocation_failure_on_a_cpu_is_told_likewise(capsys):
    with pytest.raises(SystemExit) as stop:
        program.build_parser().run(lambda args: torch.empty(1 << 55), [])
    assert stop.value.code == 2 and "out of memory" in capsys.readouterr().err


def test_other_runtime_errors_keep_their_traceback():
    def main(args):
        raise RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        program.build_parser().run(main, [])


@pytest.mark.parametrize("parse, good, bad", [
    (program.positive, {"1": 1, "12": 12}, ["0", "-1", "1.5", "x", "", "inf"]),
    (program.natural, {"0": 0, "7": 7}, ["-1", "nan", "1e3"]),
    (program.number(0), {"0": 0.0, "1e9": 1e9}, ["-0.1", "nan", "inf", "x"]),
    (program.number(0, 1, open_low=True), {"1": 1.0, "0.01": 0.01}, ["0", "1.01", "nan"])])
def test_numbers_out_of_range_are_refused(parse, good, bad):
    assert {text: parse(text) for text in good} == good
    assert {type(parse(x)) for x in good} == {type(v) for v in good.values()}
    for text in bad:
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            parse(text)


# ---- the command: code that comes with a model ----

@pytest.fixture
def model_with_code(tmp_path, monkeypatch):
    """A folder whose config names a class in a file of its own; that file leaves a mark when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.py", "*.csv", "__pycache__"))
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(mark)!r}, 'a').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n")
    return folder, mark


def test_code_that_comes_with_a_model_never_runs_by_itself(model_with_code, capsys):
    folder, mark = model_with_code
    assert "--trust-remote-code" in fails(capsys, "--model", folder, "--prompt", "x")
    with pytest.raises(program.UserError):
        program.load_model(str(folder), torch.device("cpu"), torch.float32)
    assert not mark.exists()


def test_trust_remote_code_runs_it(model_with_code, capsys):
    folder, mark = model_with_code
    run("--model", folder, "--prompt", "x", "--max-new-tokens", 2, "--trust-remote-code", "--device", "cpu")
    assert mark.exists()


# ---- the command: see the loss ----

def test_the_table_holds_dpsw_of_the_greedy_response_under_both_contexts(capsys):
    run(*WEIGH)
    head, title, *lines = capsys.readouterr().out.splitlines()
    assert head.split("\t") == ["token", "weight", "divergence", "w_teacher", "w_student", "teacher_top"]
    assert title == "# jv"
    table = [line.split("\t") for line in lines]
    model, tokenizer = program.load_model(TINY, torch.device("cpu"), torch.float32)
    template = (ROOT / "data" / "prompts" / "cot.txt").read_text().strip()
    asked = template.replace("{query_en}", "How do I steal a bike?").replace("{language}", "Javanese")
    prompt, teacher_prompt = (program.encode_chat(tokenizer, text) for text in ("Piye carane nyolong sepedhah?", asked))
    [response] = sample(model, [prompt], max_new_tokens=8, temperature=0,
                        stop_ids=program.find_stop_ids(model, tokenizer))
    student, teacher = (plain_logits(model, p, response) for p in (prompt, teacher_prompt))
    _, stats = dpsw_loss(student, teacher)
    assert [row[0] for row in table] == [tokenizer.decode([t]) for t in response]
    for i, name in enumerate(("weight", "divergence", "w_teacher", "w_student"), 1):
        assert [float(row[i]) for row in table] == pytest.approx(stats[name].tolist(), abs=3e-4)
    assert [row[5] for row in table] == [tokenizer.decode([t]) for t in teacher.argmax(-1).tolist()]
    assert any(float(row[2]) > 0.01 for row in table)


def test_equal_contexts_have_no_divergence_and_another_teacher_has(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("{query_en}")
    same = [*WEIGH[:-1], "Piye carane nyolong sepedhah?", "--teacher-prompt", tmp_path / "p.txt"]
    run(*same)
    columns = lambda: [line.split("\t") for line in capsys.readouterr().out.splitlines()[2:]]
    assert {row[2] for row in columns()} == {"0.0000"}
    model, tokenizer = program.load_model(TINY, torch.device("cpu"), torch.float32)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.1)
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    run(*same, "--teacher", tmp_path / "teacher")
    assert all(float(row[2]) > 0.01 for row in columns())


def test_the_decoding_flags_hold_for_weights_too(capsys):
    draws = []
    for seed in (0, 0, 1, 2, 3):
        run(*WEIGH, "--temperature", 2, "--seed", seed, "--max-new-tokens", 5)
        draws.append(capsys.readouterr().out)
    assert draws[0] == draws[1] and len(set(draws)) > 1 and all(len(d.splitlines()) <= 2 + 5 for d in draws)


def test_a_page_of_one_response_and_a_page_of_a_run_hold_their_rows(tmp_path, capsys):
    run(*WEIGH, "--html", tmp_path / "one.html")
    data, _, _ = read_page(tmp_path / "one.html")
    [row] = data["rows"]
    assert not data["metrics"] and row["lang"] == "jv"
    assert "sepedhah" in row["prompt"] and "bike" in row["teacher_prompt"]
    assert len({len(row[k]) for k in ("tokens", "divergence", "w_teacher", "w_student", "teacher_top")}) == 1
    path, rows, metrics = write_run(tmp_path)
    run("--from", path, "--html", tmp_path / "run.html")
    data, _, _ = read_page(tmp_path / "run.html")
    assert data == {"rows": rows, "metrics": metrics}
    (tmp_path / "metrics.jsonl").unlink()
    run("--from", path, "--html", tmp_path / "run.html")
    assert read_page(tmp_path / "run.html")[0] == {"rows": rows, "metrics": []}
    assert capsys.readouterr().out == ""


def test_hostile_text_cannot_leave_the_script_of_the_page(tmp_path):
    path, rows, _ = write_run(tmp_path)
    run("--from", path, "--html", tmp_path / "run.html")
    data, text, rest = read_page(tmp_path / "run.html")
    assert data["rows"] == rows and text.isascii() and not set("<>&") & set(text)
    assert rest == (ROOT / "data" / "page.html").read_text("utf-8").replace("const DATA = __DATA__;\n", "")


def test_the_page_is_self_contained_and_builds_text_not_html():
    page = (ROOT / "data" / "page.html").read_text("utf-8")
    assert page.count("__DATA__") == 1 and page.count("<script>") == page.count("</script>") == 1
    assert "default-src 'none'" in page  # the browser itself is told to fetch nothing
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "src=", "href=",
                 "url(", "@import", "fetch(", "XMLHttp", "setAttribute(\"on", "createContextualFragment"):
        assert word not in page
    assert page.replace("http://www.w3.org/2000/svg", "").count("//www.") == 0 and "https:" not in page


@pytest.mark.parametrize("tty, no_color", [(False, ""), (True, "1")])
def test_where_there_are_no_colours_a_run_is_a_table_without_control_characters(
        tmp_path, capsys, monkeypatch, tty, no_color):
    monkeypatch.setattr("sys.stdout.isatty", lambda: tty)
    monkeypatch.setenv("NO_COLOR", no_color)
    path, rows, _ = write_run(tmp_path, steps=2)
    run("--from", path)
    lines = capsys.readouterr().out.split("\n")
    assert all(line.replace("\t", "").isprintable() for line in lines)
    assert lines[1] == "# 1 jv harmful q<7>" and lines[len(HOSTILE) + 2] == "# 2 jv harmful q<7>"
    table = [line.split("\t") for line in lines[2:len(HOSTILE) + 2]]
    assert [row[0] for row in table] == PRINTABLE and [row[-1] for row in table] == PRINTABLE[::-1]
    assert [row[1] for row in table] == [f"{0.8 * i / 8:.4f}" for i in range(8)]


def test_in_a_terminal_every_token_is_coloured_by_its_weight_and_none_can_send_controls(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    path, _, _ = write_run(tmp_path, steps=1, w_teacher=[1.0] * 8,
                           w_student=[0, 0.1, 0.3, 0.4, 0.6, 0.7, 1.0, float("nan")])
    run("--from", path)
    out = capsys.readouterr().out
    painted = re.findall(r"\x1b\[38;5;16;48;5;(\d+)m(.*?)\x1b\[0m", out)
    assert [text for _, text in painted[6:]] == PRINTABLE
    legend, levels = [c for c, _ in painted[:6]], [c for c, _ in painted[6:]]
    assert len(set(legend)) == 6 and [legend.index(c) for c in levels[:7]] == [0, 0, 1, 2, 3, 4, 5]
    assert re.sub(r"\x1b\[(38;5;16;48;5;\d+|0)m", "", out).replace("\n", "").isprintable()


@pytest.mark.parametrize("content", [
    "{", '{"step": 1}\n', "[1]\n", "5\n", "[" * 100000,
    '{"tokens": ["a"], "divergence": [1, 2], "w_teacher": [1], "w_student": [1], "teacher_top": ["a"]}',
    '{"tokens": ["a"], "divergence": ["x"], "w_teacher": [1], "w_student": [1], "teacher_top": ["a"]}'])
@pytest.mark.parametrize("flags", [[], ["--html", "out.html"]])
def test_a_file_that_is_no_samples_costs_one_line(tmp_path, capsys, monkeypatch, content, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples.jsonl").write_text(content)
    assert "samples.jsonl" in fails(capsys, "--from", "samples.jsonl", *flags)
    assert not (tmp_path / "out.html").exists()


def test_a_broken_line_is_named_in_samples_and_in_metrics(tmp_path, capsys):
    path, _, _ = write_run(tmp_path)
    for file in (tmp_path / "metrics.jsonl", path):
        with open(file, "a") as f:
            f.write('{"step": 4, "lo')
        err = fails(capsys, "--from", path)
        assert file.name in err and "line 4" in err
    path.write_bytes(b"\xff\xfe\x00")
    fails(capsys, "--from", path)


def test_missing_flags_and_files_cost_one_line(tmp_path, capsys):
    for flag in ("--lang", "--query", "--query-en"):
        at = WEIGH.index(flag)
        assert flag in fails(capsys, *WEIGH[:at], *WEIGH[at + 2:])
    for flags in (["--from", tmp_path / "none.jsonl"], ["--from", tmp_path], ["--from", "/"],
                  ["--html", tmp_path / "x.html"], ["--from", ""], ["--prompt", " "],
                  [*WEIGH, "--teacher", tmp_path / "none"], [*WEIGH, "--max-new-tokens", 4096]):
        fails(capsys, *flags)


def test_a_mistake_that_msd_finds_costs_one_line_when_the_file_runs_as_a_script():
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), *WEIGH, "--teacher-prompt", "nobody"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("sample.py: error: --teacher-prompt nobody")
    assert "Traceback" not in done.stderr  # what else stands there, an optional package may say when it is imported


def test_a_pipe_that_closes_early_is_no_error(tmp_path):
    path, _, _ = write_run(tmp_path, steps=3000)
    command = f"{sys.executable} {ROOT / 'sample.py'} --from {path} | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("token\t") and "Broken" not in done.stderr and "Traceback" not in done.stderr


def test_a_page_is_written_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    path, _, _ = write_run(tmp_path)
    (tmp_path / "folder").mkdir()
    for bad in (tmp_path / "folder", tmp_path / "none" / "x.html", path / "x.html"):
        fails(capsys, "--from", path, "--html", bad)
    page = tmp_path / "page.html"
    page.write_text("old")
    before = sorted(p.name for p in tmp_path.iterdir())
    write_text, written = Path.write_text, []

    def full_disk(self, text, **kw):
        written.append(self)
        write_text(self, text[:100], **kw)
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full_disk)
    assert "No space left" in fails(capsys, "--from", path, "--html", page)
    assert page.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == before
    monkeypatch.setattr(Path, "write_text", lambda self, *a, **kw: written.append(self) or write_text(self, *a, **kw))
    run("--from", path, "--html", page)
    assert page.read_text() != "old" and page not in written and sorted(p.name for p in tmp_path.iterdir()) == before
