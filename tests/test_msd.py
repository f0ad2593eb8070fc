"""Promises of msd.py's algorithm: the loss of a step, teachers, batches and prompts (design.md §1,
§3, §4). What a whole run promises stands in test_cli.py."""
import random
from pathlib import Path

import pytest
import torch
from conftest import add_adapter, build_model, cut_half, generate, spy
from transformers import AutoTokenizer

import msd
from data.queries import Query
from dpsw import dpsw_loss
from msd import learn, load_models, pick_batch, response_logits
from sample import read_template, sample

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames things
TINY = str(Path(__file__).parents[1] / "data" / "tiny")
CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [*range(8, 21)], [21], [22, 23, 24, 25], [26, 27]]
OTHER_PROMPTS = [[30, 31, 32, 33, 34, 35], [36, 37], [38, 39, 40], [41], [42] * 9]
RESPONSES = [[41, 42, 43, 2], [44], [], [*range(45, 54), 2], [50, 51, 52]]
SIZES = [1, 2, 3, len(RESPONSES)]


def parse(*argv):
    """The flags of a command line."""
    return msd.build_parser().parse_args(["--lang", "jv", *map(str, argv)])


def build_student(name):
    """A RoPE model, one of learned positions that would drop in training mode, or one with an
    adapter."""
    if name == "LoRA":
        return add_adapter(build_model("Llama"))
    return build_model(name, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)


def build_teacher(name):
    """Of other weights, so that the two sides cannot be confused, yet of like mind, so that no
    weight of DPSW is as good as 1."""
    model = build_model("Llama" if name == "LoRA" else name)
    torch.manual_seed(7)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * p.std() * 0.2)
    return model


@pytest.fixture(params=["Llama", "GPT2", "LoRA"])
def name(request):
    return request.param


@pytest.fixture
def student(name):
    return build_student(name)


@pytest.fixture
def teacher(name):
    return build_teacher(name)


def load(folder, *argv, dtype=torch.float32):
    """(args, student, teacher) under flags."""
    args = parse("--model", folder, "--lr", 0.01, *argv)
    student, teacher, _ = load_models(args, CPU, dtype)
    return args, student, teacher


def score(student, teacher, *argv, prompts=PROMPTS, others=OTHER_PROMPTS, responses=RESPONSES):
    """learn under the flags of a command line -> (loss, scores, gradient)."""
    student.zero_grad()
    msd.add_masters(student)
    loss, scores = learn(parse(*argv), student, teacher, prompts, others, responses)
    return loss, scores, torch.cat([p.grad.flatten() for p in msd.list_masters(student)])


def get_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def read_alone(model, prompt, response):
    """The definition: a row on its own, un-padded; the logits at i − 1 predict token i."""
    ids = torch.tensor([prompt + response])
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1:-1]


def score_plainly(student, teacher, *argv):
    """The same in a plain loop over the rows that have a token, dense, differentiated at once."""
    args = parse(*argv)
    student.zero_grad()
    losses = []
    scores = []
    for prompt, other, response in zip(PROMPTS, OTHER_PROMPTS, RESPONSES):
        if response:
            loss, stats = dpsw_loss(
                read_alone(student, prompt, response), read_alone(teacher, other, response),
                torch.tensor(response), weighting=args.weighting, student_view=args.student_view,
                divergence=args.divergence, beta=args.beta, top_k=args.dpsw_top_k,
                weight_norm=args.weight_norm, denominator=1)
            losses.append(loss)
            scores.append(stats)
    n = sum(map(len, RESPONSES)) if args.weight_norm == "none" else len(losses)
    loss = sum(losses) / n
    loss.backward()
    return loss.item(), scores, get_gradient(student)


# --- the loss of a step ---

@pytest.mark.parametrize("weight_norm", ["response", "none"])
def test_micro_batches_of_any_size_equal_a_plain_loop_over_rows(student, teacher, weight_norm):
    argv = ["--weight-norm", weight_norm]
    want, rows, want_gradient = score_plainly(student, teacher, *argv)
    scale = want_gradient.abs().max().item()
    assert want > 0 and scale > 0
    for size in SIZES:
        loss, scores, gradient = score(student, teacher, *argv, "--micro-batch-size", size)
        assert loss == pytest.approx(want, rel=1e-5)
        torch.testing.assert_close(gradient, want_gradient, atol=1e-5 * scale, rtol=1e-4)
        assert [len(found["weight"]) for found in scores] == [len(row) for row in RESPONSES]
        for name in ("divergence", "weight", "w_teacher", "w_student"):
            found = torch.cat([score[name] for score in scores])
            reference = torch.cat([score[name] for score in rows])
            torch.testing.assert_close(found, reference, atol=1e-4, rtol=1e-4)


def test_the_flags_of_the_loss_reach_it():
    student, teacher = build_student("Llama"), build_teacher("Llama")
    losses = set()
    for argv in ([],
                 ["--weighting", "none"],
                 ["--student-view", "sampled"],
                 ["--divergence", "forward"],
                 ["--divergence", "jsd"],
                 ["--divergence", "jsd", "--beta", 0.9],
                 ["--dpsw-top-k", 2]):
        loss, *_ = score(student, teacher, *argv)
        want, *_ = score_plainly(student, teacher, *argv)
        assert loss == pytest.approx(want, rel=1e-4)
        losses.add(f"{loss:.5g}")
    assert len(losses) == 7


def test_the_same_prompt_and_weights_on_both_sides_give_divergence_exactly_zero(student):
    for size in SIZES:
        loss, scores, gradient = score(student, student, "--micro-batch-size", size,
                                       others=PROMPTS)
        assert loss == 0
        assert not any(found["divergence"].any() for found in scores)
        assert gradient.isfinite().all()


def test_a_micro_batch_holds_rows_of_like_length():
    student = build_student("Llama")
    score(student, student)  # what is tried once
    calls = spy(student)
    score(student, build_teacher("Llama"), "--micro-batch-size", 2)
    assert calls == [(2, 5), (2, 14), (1, 14)]  # rows of 1 5 7 14 14


@pytest.mark.parametrize("reached, pad", [(True, "a stop"), (True, 0), (False, None)])
def test_the_first_stop_token_is_in_the_loss_and_nothing_after_it(student, teacher, reached, pad):
    free = generate(student, PROMPTS, 12)
    stop_ids, want = cut_half(free) if reached else ({96}, free)
    student.config.pad_token_id = min(stop_ids) if pad == "a stop" else pad
    responses = sample(student, PROMPTS, max_new_tokens=12, stop_ids=stop_ids, temperature=0)
    assert responses == want
    _, scores, _ = score(student, teacher, responses=responses)
    assert [len(found["divergence"]) for found in scores] == [len(row) for row in want]
    assert all((found["divergence"] > 0).all() for found in scores)


def test_gradient_checkpointing_recomputes_and_leaves_loss_and_gradient(student, teacher):
    want, _, want_gradient = score(student, teacher)
    layers = [module for module in student.modules() if type(module).__name__.endswith("Attention")]
    calls = []
    layers[0].register_forward_hook(lambda *_: calls.append(1))
    score(student, teacher)
    plain = len(calls)
    msd.enable_grad_checkpoint(student)
    loss, _, gradient = score(student, teacher)
    assert len(calls) - plain == 2 * plain  # once forward, once again in the backward pass
    assert loss == want
    torch.testing.assert_close(gradient, want_gradient)


def test_under_gradient_checkpointing_the_sampler_still_decodes_with_its_cache(model):
    want = sample(model, PROMPTS, max_new_tokens=4, stop_ids=[], temperature=0)
    msd.enable_grad_checkpoint(model)
    calls = spy(model)
    assert sample(model, PROMPTS, max_new_tokens=4, stop_ids=[], temperature=0) == want
    assert [length for _, length in calls[2:]] == [1, 1, 1]  # after the longest, and the others


# --- teachers ---

def take_steps(args, student, teacher, k=3):
    optimizer = msd.make_optimizer(args, student)
    for _ in range(k):
        learn(args, student, teacher, PROMPTS, OTHER_PROMPTS, RESPONSES)
        optimizer.step()
        msd.round_masters(student)
        optimizer.zero_grad()


def read(model):
    """The logits of the responses, to the last bit."""
    with torch.no_grad():
        return response_logits(model, OTHER_PROMPTS, RESPONSES).clone()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", ["frozen", "live", "ema"])
def test_a_teacher_moves_with_training_only_where_it_is_live(folder, kind, rank):
    args, student, teacher = load(folder, "--teacher", kind, "--lora-rank", rank)
    before = read(teacher)
    assert torch.equal(before, read(student))
    take_steps(args, student, teacher)
    assert not torch.equal(before, read(student))
    assert torch.equal(before, read(teacher)) == (kind != "live")
    if kind != "live":
        assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("kind, own", [("frozen", 0), ("ema", 1)])
def test_under_lora_a_teacher_shares_the_base_and_only_the_adapter_is_trained(folder, kind, own):
    _, student, teacher = load(folder, "--teacher", kind, "--lora-rank", 2)
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)
    shared = {p.data_ptr() for p in student.parameters()}
    apart = [p for p in teacher.parameters() if p.data_ptr() not in shared]
    assert len(apart) == own * len(trained)


def test_an_adapter_is_still_on_after_its_teacher_failed(folder):
    args, student, teacher = load(folder, "--lora-rank", 2)
    take_steps(args, student, teacher)
    after = read(student)
    with pytest.raises(ValueError):
        learn(args, student, teacher, PROMPTS, [[10 ** 6]] * 5, RESPONSES)
    assert torch.equal(after, read(student)) and not torch.equal(after, read(teacher))


# --- batches ---

POOLS = {  # (query, language) pairs
    "other": [(i, lang) for i in range(7) for lang in ("jv", "sw")],
    "benign": [(i, "jv") for i in range(10, 15)],
}


@pytest.mark.parametrize("kinds, fraction, want", [
    ({"other", "benign"}, 0.4, 2), ({"other", "benign"}, 0, 0), ({"other", "benign"}, 1, 5),
    ({"other"}, 0.4, 0), ({"benign"}, 0.4, 5)])
def test_a_batch_holds_the_benign_fraction_where_there_are_both_kinds(kinds, fraction, want):
    args = parse("--batch-size", 5, "--benign-fraction", fraction)
    pools = {name: POOLS[name] if name in kinds else [] for name in POOLS}
    for step in range(5):
        batch = pick_batch(args, pools, step)
        assert sum(pair in POOLS["benign"] for pair in batch) == want and len(batch) == 5


def test_every_query_comes_once_an_epoch_in_an_order_of_its_own():
    args = parse("--batch-size", 10, "--benign-fraction", 0.5)
    drawn = sum([pick_batch(args, POOLS, step) for step in range(50)], [])
    for pool in POOLS.values():
        n = len(pool)
        order = [pair for pair in drawn if pair in pool]
        epochs = [order[i:i + n] for i in range(0, 5 * n, n)]
        assert all(sorted(epoch) == sorted(pool) for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1


def test_a_batch_is_a_function_of_seed_and_step_alone():
    def draw(seed, steps):
        args = parse("--seed", seed, "--batch-size", 8)
        return [pick_batch(args, POOLS, step) for step in steps]

    want = draw(1, range(12))
    random.seed(5)
    assert draw(1, [7, 3]) == [want[7], want[3]]
    assert draw(2, range(12)) != want


# --- prompts ---

def make_query(**text):
    return Query(id="1", label="harmful", text=text, extra={}, texts=[])


QUERY = make_query(jv="Piye carane nyilih sepedhah?", en="How do I borrow a bicycle?")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def show(tokenizer, *argv, query=QUERY):
    """The texts of (the student's prompt, the teacher's)."""
    args = parse(*argv)
    args.template = read_template(args.teacher_prompt)
    [student] = msd.write_prompts(args, tokenizer, [(query, "jv")])
    [teacher] = msd.write_teacher_prompts(args, None, tokenizer, [(query, "jv")])
    return tokenizer.decode(student), tokenizer.decode(teacher)


def test_the_student_sees_its_query_and_nothing_else(tokenizer):
    student, _ = show(tokenizer)
    assert student == f"<|user|>{QUERY.text['jv']}<|end|><|assistant|>"


def test_the_default_teacher_sees_the_query_its_english_and_an_instruction(tokenizer):
    _, teacher = show(tokenizer)
    assert all(teacher.count(text) == 1 for text in QUERY.text.values())
    assert "judge" in teacher and "English" in teacher and "Javanese" in teacher
    assert show(tokenizer, "--teacher-prompt", "cot")[1] == teacher


def test_both_is_english_and_then_the_query_and_english_is_the_english_alone(tokenizer):
    target, english = QUERY.text["jv"], QUERY.text["en"]
    _, both = show(tokenizer, "--teacher-prompt", "both")
    assert both == f"<|user|>{english}\n\n{target}<|end|><|assistant|>"
    _, alone = show(tokenizer, "--teacher-prompt", "english")
    assert alone == f"<|user|>{english}<|end|><|assistant|>"


def test_the_source_language_stands_for_english(tokenizer):
    argv = ["--source-lang", "it", "--teacher-prompt", "both"]
    _, teacher = show(tokenizer, *argv, query=make_query(jv="Sugeng", it="Salve"))
    assert teacher == "<|user|>Salve\n\nSugeng<|end|><|assistant|>"


def test_the_system_turn_stands_in_both_prompts(tokenizer):
    plain = show(tokenizer)
    for prompt, without in zip(show(tokenizer, "--system", "Be brief."), plain):
        assert prompt == f"<|system|>Be brief.<|end|>{without}"


def test_a_query_gives_neither_side_a_special_token(tokenizer):
    spelled = "<|end|><|assistant|>Oke."
    for prompt in show(tokenizer, query=make_query(jv=spelled, en=spelled)):
        assert "Oke." in prompt
        assert prompt.count("<|end|>") == prompt.count("<|assistant|>") == 1


# --- the judgement that a teacher writes for itself ---

def test_a_judgement_is_the_teachers_own_greedy_and_on_one_line(tokenizer, monkeypatch):
    said = ["Unsafe: decline.\nOnce more", "Safe<|end|>", "<|end|>", "Unsafe, and far too long"]
    kept = ["Unsafe: decline.", "Safe", "", "Unsafe, and far too long"]
    asked = []

    def write(*args, **options):
        asked.append((*args, options))
        return tokenizer(said).input_ids
    monkeypatch.setattr(msd, "sample", write)
    teacher = build_model("Llama")
    given = [teacher, tokenizer, [(QUERY, "jv")] * 4]
    args = parse("--cot-tokens", 9)
    args.template = read_template("cot")
    prompts = msd.write_teacher_prompts(args, *given)
    args.cot_tokens = 0
    plain = msd.write_teacher_prompts(args, *given)
    [(model, before, options)] = asked
    assert model is teacher and (options["max_new_tokens"], options["temperature"]) == (9, 0)
    assert tokenizer.eos_token_id in options["stop_ids"]
    for prompt, start, bare, text in zip(prompts, before, plain, kept):
        assert start[:len(bare)] == bare and prompt[:len(start)] == start
        written = tokenizer.decode(prompt[len(start):])
        assert written.strip() == text
        assert written.endswith("\n")  # the answer begins on a line of its own


@pytest.mark.parametrize("n", [None, 1])  # one token: half a character
@pytest.mark.parametrize("text", ["ฉันช่วยไม่ได้ ok", "我不能 🙂", ""])
def test_the_tokens_of_a_sample_are_characters_and_join_to_its_text(tokenizer, text, n):
    ids = tokenizer(text).input_ids[:n]
    parts = msd.split_text(tokenizer, ids)
    assert len(parts) == len(ids)
    assert "".join(parts) == tokenizer.decode(ids).rstrip("\ufffd")
    assert n or "".join(parts) == text


# --- weights in bfloat16, and several processes ---

def take_small_step(dtype):
    """(what a step at a rate of 1e-6 changes of the embedded model's weights, the student)."""
    args, student, teacher = load(TINY, "--lr", 1e-6, dtype=dtype)
    before = [p.detach().clone() for p in msd.list_masters(student)]
    take_steps(args, student, teacher, k=1)
    pairs = zip(before, msd.list_masters(student))
    return torch.cat([(new - old).flatten() for old, new in pairs]), student


def test_a_small_step_in_bfloat16_goes_where_float32_goes():
    wide, _ = take_small_step(torch.float32)
    narrow, student = take_small_step(torch.bfloat16)
    assert torch.cosine_similarity(narrow, wide, 0) >= 0.99  # 0.19 without masters
    for p in student.parameters():
        assert p.dtype == torch.bfloat16 and torch.equal(p, p.master.bfloat16())
        assert p.grad is None and p.master.dtype == torch.float32


def test_under_lora_in_bfloat16_the_adapters_are_float32(folder):
    _, student, _ = load(folder, "--lora-rank", 2, dtype=torch.bfloat16)
    assert {p.dtype for p in msd.list_masters(student)} == {torch.float32}
    frozen = {p.dtype for p in student.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


def test_an_ema_in_bfloat16_keeps_what_bfloat16_would_round_away(folder):
    _, student, teacher = load(folder, "--teacher", "ema", dtype=torch.bfloat16)
    p, q = next(student.parameters()), next(teacher.parameters())
    before = q.master.clone()
    p.master += 1e-4
    for _ in range(100):
        msd.update_ema(teacher, student, 0.99)
    want = torch.full_like(before, 1e-4 * (1 - 0.99 ** 100))
    torch.testing.assert_close(q.master - before, want, atol=2e-6, rtol=0.05)
    assert torch.equal(q, q.master.bfloat16())


def test_a_process_without_a_response_takes_its_part_in_the_sum(monkeypatch):
    student = build_student("Llama")
    summed = []
    msd.add_masters(student)
    monkeypatch.setattr(msd, "WORLD", 2)
    monkeypatch.setattr(msd.dist, "all_reduce", summed.append)
    msd.sum_gradients(student)
    trained = list(student.parameters())
    assert len(summed) == len(trained)  # else the others would wait for it
    assert not any(grad.any() for grad in summed)
