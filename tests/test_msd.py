"""The promises of msd.py: alignment, packing, normalisation, teachers, prompts (design.md §4)."""
import copy
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES, build_model

import msd
from dpsw import dpsw_loss
from msd import learn, make_teacher, pick_batch, response_hidden, response_logits, update_ema, write_teacher_prompt
from sample import sample

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [21]]
OTHER_PROMPTS = [[30, 31, 32, 33, 34, 35], [36, 37], [38, 39, 40]]
RESPONSES = [[41, 42, 43, 2], [44], [45, 46, 47, 48, 49, 50, 51, 52, 53, 2]]


def args(**changed):
    return Namespace(**{**dict(weighting="dpsw", student_view="teacher", divergence="reverse", dpsw_top_k=20, beta=0.5,
                               weight_norm="none", micro_batch_size=None), **changed})


def alone(model, prompt, response):
    """The definition: this row, un-padded, on its own; logits at position t predict token t + 1."""
    return model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1:len(prompt) + len(response) - 1]


@pytest.mark.parametrize("shared", [[], list(range(60, 72))], ids=["", "a shared beginning longer than a window"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_row_of_a_packed_batch_equals_its_own_forward_in_logits_and_gradient(name, shared):
    model, reference, prompts = build_model(name), build_model(name), [shared + p for p in PROMPTS]
    msd.enable_grad_checkpoint(model)
    logits = response_logits(model, prompts, RESPONSES)
    expected = torch.cat([alone(reference, p, r) for p, r in zip(prompts, RESPONSES)])
    assert logits.shape == (15, 97)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    for (n, p), q in zip(model.named_parameters(), reference.parameters()):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4, msg=lambda m: f"{n}: {m}")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_fast_path_is_taken_and_its_head_gives_the_models_own_logits(name):
    model, prompts, seen = build_model(name), [[60, 61, 62] + p for p in PROMPTS], []
    assert msd.is_packing_exact(model)
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    hidden, head = response_hidden(model, prompts, RESPONSES)
    shared = 0 if name in ("Gemma2", "Gemma3Text", "Mistral") else 2 * 3  # with windows: packed under a mask
    assert hidden.shape == (15, 32) and seen == [(1, sum(map(len, prompts + RESPONSES)) - shared)]
    torch.testing.assert_close(head(hidden), torch.cat([alone(model, p, r) for p, r in zip(prompts, RESPONSES)]),
                               atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompts, shared", [([[5, 6, 7], [5, 6, 8]], 2), ([[5, 6], [5, 6, 7]], 1), ([[5], [5]], 0),
                                             ([[5, 6, 7]], 2), ([[5, 6], [7, 6]], 0)])
def test_a_shared_beginning_never_holds_a_prompts_last_token(prompts, shared):
    assert msd.count_shared(prompts) == shared


@pytest.mark.parametrize("name, extra", [("Phimoe", {}), ("Qwen2Moe", dict(use_sliding_window=True, max_window_layers=0))])
def test_a_window_that_only_the_mask_knows_is_kept(name, extra):
    model = build_model(name, sliding_window=8, num_experts=2, num_local_experts=2, moe_intermediate_size=32,
                        shared_expert_intermediate_size=32, num_experts_per_tok=1, **extra)
    long = [prompt * 6 for prompt in PROMPTS]  # longer than the window
    torch.testing.assert_close(response_logits(model, long, RESPONSES),
                               torch.cat([alone(model, p, r) for p, r in zip(long, RESPONSES)]), atol=1e-4, rtol=1e-4)


def test_a_model_that_loses_the_layout_on_the_way_is_packed_under_a_mask():
    model = build_model("Llama")
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, _f=forward, layout=None, **kw: _f(*a, **kw)
    assert msd.is_packing_exact(model) and model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(response_logits(model, PROMPTS, RESPONSES),
                               torch.cat([alone(model, p, r) for p, r in zip(PROMPTS, RESPONSES)]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("breaks", ["positions", "logits"])
def test_where_packing_is_not_exact_rows_are_scored_one_at_a_time_and_it_is_said_once(breaks, capsys):
    model = build_model("Llama")
    broken = model if breaks == "logits" else model.model
    inner = broken.forward

    def forward(**kw):  # a model whose logits are not its head's, or one that ignores restarting positions
        kw.pop("position_ids", None) if breaks == "positions" else None
        out = inner(**kw)
        return SimpleNamespace(logits=out.logits * 2) if breaks == "logits" else out
    broken.forward = forward
    for _ in range(2):
        logits = response_logits(model, PROMPTS, RESPONSES)
    expected = torch.cat([alone(model, p, r) for p, r in zip(PROMPTS, RESPONSES)])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not msd.is_packing_exact(model) and capsys.readouterr().err.count("note:") == 1


def test_the_same_prompt_and_weights_on_both_sides_give_divergence_exactly_zero(model):
    loss, stats, _ = learn(args(weighting="none"), model, make_teacher(model), PROMPTS, PROMPTS, RESPONSES)
    assert loss == 0 and (stats["divergence"] == 0).all()


def test_prompts_of_different_length_line_up_on_the_response(model):
    teacher = make_teacher(model)
    loss, stats, _ = learn(args(), model, teacher, PROMPTS, OTHER_PROMPTS, RESPONSES)
    at = 0
    for p, o, r in zip(PROMPTS, OTHER_PROMPTS, RESPONSES):
        _, expected = dpsw_loss(alone(model, p, r), alone(teacher, o, r))
        torch.testing.assert_close(stats["divergence"][at:at + len(r)], expected["divergence"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(stats["weight"][at:at + len(r)], expected["weight"], atol=1e-4, rtol=1e-4)
        at += len(r)
    assert at == len(stats["weight"])


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def plain_gradient(model, teacher, weight_norm):
    """The definition in a loop over rows, dense, differentiated at once."""
    total, count = 0.0, 0.0
    for p, o, r in zip(PROMPTS, OTHER_PROMPTS, RESPONSES):
        loss, stats = dpsw_loss(alone(model, p, r), alone(teacher, o, r), torch.tensor(r), denominator=1)
        total, count = total + loss, count + (len(r) if weight_norm == "none" else stats["weight"].sum())
    (total / count).backward()
    return (total / count).item(), gradient(model)


@pytest.mark.parametrize("weight_norm", ["none", "mean"])
@pytest.mark.parametrize("size", [None, 1, 2])
def test_micro_batches_packing_and_chunks_leave_loss_and_gradient_unchanged(model, size, weight_norm):
    reference, teacher = copy.deepcopy(model), make_teacher(model)
    expected, expected_gradient = plain_gradient(reference, teacher, weight_norm)
    loss, _, _ = learn(args(micro_batch_size=size, weight_norm=weight_norm), model, teacher, PROMPTS, OTHER_PROMPTS, RESPONSES)
    assert loss == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(gradient(model), expected_gradient, atol=1e-5, rtol=1e-4)


def test_responses_without_a_token_give_loss_zero_and_no_nan(model):
    loss, stats, tops = learn(args(), model, make_teacher(model), PROMPTS, OTHER_PROMPTS, [[], [], []])
    assert loss == 0 and not gradient(model).any() and stats["weight"].numel() == 0
    some, _, _ = learn(args(), model, make_teacher(model), PROMPTS, OTHER_PROMPTS, [[], RESPONSES[0], []])
    assert some > 0 and gradient(model).isfinite().all()


def test_the_first_stop_token_is_in_the_loss_and_nothing_after_it():
    model = build_model("Llama")
    prompts = [[5, 6, 7], [8, 9, 10]]
    free = sample(model, prompts, max_new_tokens=12, stop_ids=[], temperature=0)
    stop = free[0][3]  # make the fourth token a stop id, which is also the id that padding would use
    model.config.pad_token_id = stop
    responses = sample(model, prompts, max_new_tokens=12, stop_ids=[stop, 96], temperature=0)
    first = free[0].index(stop)
    assert responses[0] == free[0][:first + 1]
    _, stats, _ = learn(args(), model, make_teacher(model), prompts, prompts, responses)
    assert len(stats["weight"]) == sum(map(len, responses))
    assert response_logits(model, prompts, responses)[first].argmax() == stop


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_log_probabilities_are_those_of_the_training_forward(model, temperature):
    responses, logprobs = sample(model, PROMPTS, max_new_tokens=12, stop_ids=[2], temperature=temperature,
                                 generator=torch.Generator().manual_seed(0), return_logprobs=True)
    logp = (response_logits(model, PROMPTS, responses) / temperature).log_softmax(-1)
    ids = torch.tensor([t for r in responses for t in r])
    torch.testing.assert_close(logp.gather(-1, ids[:, None])[:, 0], torch.tensor([x for row in logprobs for x in row]),
                               atol=1e-4, rtol=0)


def test_no_dropout_reaches_the_loss_under_gradient_checkpointing():
    model = build_model("GPT2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    teacher, plain = make_teacher(model), copy.deepcopy(model)
    msd.enable_grad_checkpoint(model)
    a, _, _ = learn(args(), model, teacher, PROMPTS, OTHER_PROMPTS, RESPONSES)
    b, _, _ = learn(args(), plain, teacher, PROMPTS, OTHER_PROMPTS, RESPONSES)
    assert a == pytest.approx(b, abs=1e-6)
    torch.testing.assert_close(gradient(model), gradient(plain), atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_recomputes_the_layers_and_the_sampler_still_decodes_with_its_cache():
    model = build_model("Llama")
    msd.enable_grad_checkpoint(model)
    layer, calls = model.model.layers[0].self_attn, []
    layer.register_forward_hook(lambda *_: calls.append(1))
    learn(args(), model, make_teacher(model), PROMPTS, OTHER_PROMPTS, RESPONSES)
    assert len(calls) >= 2  # once forward, once again in the backward pass
    widths = []
    model.model.register_forward_pre_hook(lambda _, a, kw: widths.append(kw["input_ids"].shape[1]), with_kwargs=True)
    sample(model, PROMPTS, max_new_tokens=4, stop_ids=[], temperature=0)
    assert widths[1:] == [1, 1, 1]


# --- teachers -----------------------------------------------------------------------------------------------------------

def take_steps(student, teacher, k=3):
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(k):
        learn(args(), student, teacher, PROMPTS, OTHER_PROMPTS, RESPONSES)
        optimizer.step()
        optimizer.zero_grad()


def test_a_frozen_teacher_is_bit_equal_after_steps_and_takes_no_gradient(model):
    teacher = make_teacher(model)
    before = response_logits(teacher, OTHER_PROMPTS, RESPONSES).clone()
    take_steps(model, teacher)
    assert torch.equal(before, response_logits(teacher, OTHER_PROMPTS, RESPONSES))
    assert not torch.equal(before, response_logits(model, OTHER_PROMPTS, RESPONSES))
    assert all(p.grad is None for p in teacher.parameters())


def lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


def test_under_lora_the_frozen_teacher_shares_every_weight_and_never_sees_the_adapters():
    model = build_model("Llama")
    teacher = make_teacher(model.requires_grad_(False))
    before = response_logits(teacher, OTHER_PROMPTS, RESPONSES).clone()
    student = lora(model)
    shared = {p.data_ptr() for p in student.parameters()}
    assert all(p.data_ptr() in shared for p in teacher.parameters())
    take_steps(student, teacher)
    assert torch.equal(before, response_logits(teacher, OTHER_PROMPTS, RESPONSES))
    assert not torch.equal(before, response_logits(student, OTHER_PROMPTS, RESPONSES))
    with pytest.raises(Exception):  # a failing teacher leaves the student's adapters on
        response_logits(teacher, [[10 ** 6]], [[1]])
    assert not torch.equal(before, response_logits(student, OTHER_PROMPTS, RESPONSES))


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind, follows", [("frozen", False), ("ema", False), ("live", True)])
def test_the_flags_give_the_teacher_that_they_name(kind, follows, rank):
    flags = msd.build_parser().parse_args(["--lang", "jv", "--model", str(msd.PROMPTS.parent / "tiny"), "--teacher", kind,
                                           "--lora-rank", str(rank)])
    student, teacher, _ = msd.load_models(flags, torch.device("cpu"), torch.float32)
    before = response_logits(teacher, OTHER_PROMPTS, RESPONSES).detach().clone()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.01 * p.requires_grad)
    assert torch.equal(before, response_logits(teacher, OTHER_PROMPTS, RESPONSES)) != follows


def test_an_ema_teacher_follows_the_formula_and_under_lora_copies_the_adapters_only():
    student = lora(build_model("Llama").requires_grad_(False))
    teacher = make_teacher(student)
    own = {p.data_ptr() for p in teacher.parameters()} - {p.data_ptr() for p in student.parameters()}
    trained = [p for p in student.parameters() if p.requires_grad]
    assert len(own) == len(trained)
    before = [p.detach().clone() for p in trained]
    take_steps(student, teacher, k=1)
    update_ema(teacher, student, 0.75)
    now = [p for p, q in zip(teacher.parameters(), student.parameters()) if q.requires_grad]
    for old, new, mean in zip(before, trained, now):
        torch.testing.assert_close(mean, 0.75 * old + 0.25 * new)


# --- prompts and data ---------------------------------------------------------------------------------------------------

def query(i, label="harmful"):
    return SimpleNamespace(id=str(i), label=label, text={"en": f"english {i}", "jv": f"jawa {i}", "sw": f"swahili {i}"})


def test_teacher_prompts_are_filled_once_and_a_query_that_spells_a_slot_stays_as_it_is():
    q = SimpleNamespace(text={"en": "what is {language} {query}?", "jv": "apa {query_en}?"})
    assert write_teacher_prompt("{query} | {query_en} | {language} {x}", q, "jv", "en") == \
        "apa {query_en}? | what is {language} {query}? | Javanese {x}"


@pytest.mark.parametrize("name", ["english", "please", "cot", "cot-both"])
def test_the_named_teacher_prompts_hold_what_they_promise(name):
    text = write_teacher_prompt(msd.read_teacher_prompt(name), query(1), "jv", "en")
    assert "english 1" in text and ("jawa 1" in text) == (name == "cot-both")
    assert (text == "english 1") == (name == "english")
    assert ("Javanese" in text and "judge" in text) == name.startswith("cot")


def test_the_preflight_asks_a_random_sample_that_the_seed_chooses(monkeypatch):
    queries, asked = [query(i, label) for label in ("harmful", "benign") for i in range(50)], []
    monkeypatch.setattr(msd, "write_contexts", lambda args, teacher, tokenizer, template, batch: (batch, batch))
    monkeypatch.setattr(msd.evaluation, "judge_prompts", lambda model, tokenizer, prompts, *_, **__:
                        asked.append(prompts) or [("", "answer")] * len(prompts))
    for seed in (0, 0, 1):
        msd.preflight(SimpleNamespace(preflight=10, seed=seed), *[None] * 4, queries, "jv", {})
    first, second, other = [[q.id for q, _ in batch] for batch in asked[::2]]
    assert first == second != other and len(set(first[:10])) == len(set(first[10:])) == 10
    assert [q.label for q, _ in asked[0]] == ["harmful"] * 10 + ["benign"] * 10
    assert first[:10] != [q.id for q in queries[:10]] and asked[0] == asked[1]  # student and teacher: the same queries


def test_batches_hold_the_benign_fraction_and_every_query_once_an_epoch():
    harmful, benign = [query(i) for i in range(6)], [query(i, "benign") for i in range(4)]
    a = Namespace(batch_size=5, benign_fraction=0.4, seed=1)
    seen = [pick_batch(harmful, benign, ["jv", "sw"], a, step) for step in range(4)]
    assert all([q.label for q, _ in batch] == ["harmful"] * 3 + ["benign"] * 2 for batch in seen)
    assert len({(q.id, lang) for batch in seen for q, lang in batch[:3]}) == 12  # 6 queries x 2 languages
    assert seen[2] == pick_batch(harmful, benign, ["jv", "sw"], a, 2)  # a function of (seed, step)
    assert seen[2] != pick_batch(harmful, benign, ["jv", "sw"], Namespace(**{**vars(a), "seed": 2}), 2)
    assert {q.label for q, _ in pick_batch(harmful, [], ["jv"], a, 0)} == {"harmful"}
