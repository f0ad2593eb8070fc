"""Promises of sample.py, on tiny random Hugging Face models and on chains whose distribution is known."""
import math

import pytest
import torch
from transformers import Gemma2Config, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers import Gemma2ForCausalLM, MistralForCausalLM

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
    """A list that gets (input shape, training mode, grad mode) of every forward of the model."""
    calls = []

    def hook(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        calls.append((tuple(ids.shape), module.training, torch.is_grad_enabled()))
    model.register_forward_pre_hook(hook, with_kwargs=True)
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
    model.register_forward_pre_hook(fail)
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


# ---- work ----

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
