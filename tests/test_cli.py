"""Promises of the command msd.py: what a run does and leaves, how it goes on, and that a mistake
costs one line and nothing else (design.md §3). At the end, the README's commands."""
import argparse
import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import build_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as eval_program
import msd
import sample as sample_program

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames things
ROOT = Path(__file__).parents[1]
TINY = ROOT / "data" / "tiny"
THINGS = [("bicycle", "sepedhah"), ("chair", "kursi"), ("boat", "prau"), ("drum", "kendhang"),
          ("kite", "layangan"), ("pot", "kendhil")]
QUERIES = [("harmful", f"How do I take somebody's {en}?", f"Piye carane njupuk {jv} wong liya?")
           for en, jv in THINGS]
QUERIES += [("benign", f"How do I paint my {en}?", f"Piye carane ngecet {jv}ku?")
            for en, jv in THINGS]
KEYS = ("step loss divergence weight w_teacher w_student grad_norm lr response_tokens response_len "
        "truncated seconds tokens_per_s peak_mem_gb").split()
OF_THE_MACHINE = ("seconds", "tokens_per_s", "peak_mem_gb")
LISTS = ("divergence", "w_teacher", "w_student")  # a number a token


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny random model with the embedded model's tokenizer."""
    path = tmp_path_factory.mktemp("models") / "m"
    build_model("Llama", vocab_size=4096, pad_token_id=4092, bos_token_id=None, eos_token_id=4095,
                max_position_embeddings=512).save_pretrained(path)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(path)
    return path


def write_queries(path, queries=QUERIES, label=True):
    """A CSV of queries, with or without its column of labels -> its path."""
    rows = [("label", "en", "jv"), *queries]
    lines = [",".join(cells if label else cells[1:]) for cells in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


QUICK = ["--batch-size", 2, "--max-new-tokens", 4, "--eval-every", 0, "--holdout", 0, "--lr", 0.01,
         "--warmup", 0]
JUDGED = ["--eval-every", 9, "--eval-max-new-tokens", 2, "--eval-lang", "", "--preflight", 0]


def run(*argv):
    msd.build_parser().run(msd.main, list(map(str, argv)))


def list_argv(folder, data, out):
    """A command line of a moment, not evaluated."""
    return ["--lang", "jv", "--model", folder, "--data", data, "--out", out, *QUICK]


@pytest.fixture
def train(folder, tmp_path):
    """train(out, *flags, steps=2, data=…): such a run -> its folder."""
    default = write_queries(tmp_path / "q.csv")

    def start(out, *argv, steps=2, data=default):
        run(*list_argv(folder, data, tmp_path / out), "--steps", steps, *argv)
        return tmp_path / out
    return start


@pytest.fixture
def fail(train, capsys):
    """As train, of a mistake -> the one line that it costs."""
    def start(*args, code=2, **options):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train(*args, **options)
        lines = [line for line in capsys.readouterr().err.split("\n") if "msd.py: " in line]
        assert stop.value.code == code and len(lines) == 1
        assert code == 130 or lines[0].startswith("msd.py: error: ")
        return lines[0]
    return start


def read_log(out, name="metrics.jsonl"):
    lines = (out / name).read_bytes().decode().split("\n")  # U+2028 may stand in a response
    assert lines.pop() == ""
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]  # NaN is no JSON


def read_weights(out):
    name = "adapter_model" if (out / "adapter_config.json").is_file() else "model"
    return load_file(out / f"{name}.safetensors")


def are_equal(weights, others):
    return weights.keys() == others.keys() and all(
        torch.equal(weights[name], others[name]) for name in weights)


def read_files(folder):
    """What every file below a folder holds."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what a run leaves ---

def test_a_run_leaves_an_ordinary_model_folder_with_a_card(train, folder):
    out = train("o")
    AutoModelForCausalLM.from_pretrained(out)  # it loads
    tokenizer = AutoTokenizer.from_pretrained(out)
    original = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer.get_vocab() == original.get_vocab()
    assert not are_equal(read_weights(out), read_weights(folder))
    assert not [*out.glob("*.tmp"), *out.glob("*.bin")]
    kept = json.loads((out / "args.json").read_text())
    assert kept.keys() == {action.dest for action in list_flags()} | {"queries", "template"}
    card = (out / "README.md").read_text()
    for word in (str(folder), "q.csv", "jv", "not promise"):
        assert word in card


def test_the_learning_rate_that_is_told_is_that_of_every_group_of_any_optimizer(
        train, monkeypatch):
    used = []

    def make(args, student):
        first, *others = msd.list_masters(student)
        return torch.optim.SGD([{"params": [first]}, {"params": others, "lr": 9}], lr=1)

    def step(self):
        used.append([group["lr"] for group in self.param_groups])
    monkeypatch.setattr(msd, "make_optimizer", make)
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    rows = read_log(train("o", "--warmup", 3, "--lr", 0.08, steps=5))
    assert used == [[row["lr"]] * 2 for row in rows]
    assert [lr for lr, _ in used] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.08])


def test_gradients_are_clipped_and_the_norm_that_is_told_is_theirs_before(train, monkeypatch):
    norms = []

    def step(self):
        grads = [p.grad.flatten() for p in self.param_groups[0]["params"]]
        norms.append(torch.cat(grads).norm().item())
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    rows = read_log(train("o", "--max-grad-norm", 0.01))
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert min(row["grad_norm"] for row in rows) > 0.02


def test_loss_and_means_follow_from_the_token_lists_of_a_step_of_two(train):
    out = train("o", "--max-new-tokens", 7, steps=4)
    shown = read_log(out, "samples.jsonl")
    for row, first, last in zip(read_log(out), shown[::2], shown[1::2], strict=True):
        assert row.keys() == {*KEYS, "skipped"} and 0.1 < row["peak_mem_gb"] < 100
        lists = torch.tensor([first[name] + last[name] for name in LISTS])
        divergence, w_teacher, w_student = lists
        weight = w_teacher * w_student
        weighted = weight * divergence
        n = len(first["tokens"])
        assert n == len(first["teacher_top"]) and first["step"] == row["step"]
        ratio = weighted[:n].sum() / weight[:n].sum()
        loss = (ratio + weighted[n:].sum() / weight[n:].sum()) / 2
        found = [row[name] for name in (*LISTS, "weight", "loss")]
        want = [*lists.mean(1).tolist(), weight.mean().item(), loss.item()]
        assert found == pytest.approx(want, rel=2e-5)
        assert row["response_tokens"] == len(weight) == 2 * row["response_len"]
        assert row["tokens_per_s"] * row["seconds"] == pytest.approx(len(weight))


def test_samples_show_the_first_and_the_last_response_with_both_prompts(train):
    shown = read_log(train("o", "--batch-size", 4, steps=6), "samples.jsonl")
    assert [line["step"] for line in shown] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert {line["label"] for line in shown} == {"harmful", "benign"}
    for line in shown:
        label, english, target = QUERIES[int(line["id"]) - 1]
        assert (line["label"], line["lang"]) == (label, "jv")
        assert line["prompt"] == f"<|user|>{target}<|end|><|assistant|>"
        assert target in line["teacher_prompt"] and english in line["teacher_prompt"]
        for name in LISTS:
            assert all(x == float(f"{x:.6g}") for x in line[name])


def script_responses(monkeypatch, *steps):
    """Let the sampler give each step's responses, those of the last for all that follow."""
    left = list(steps)

    def give(model, prompts, **options):
        rows = left.pop(0) if len(left) > 1 else left[0]
        return [list(row) for row in rows[:len(prompts)]]
    monkeypatch.setattr(msd, "sample", give)


def test_a_response_is_truncated_where_no_stop_ends_it(train, monkeypatch):
    script_responses(monkeypatch, [[7, 8, 4095], [9], []])
    row, *_ = read_log(train("o", "--batch-size", 3))
    assert row["truncated"] == pytest.approx(2 / 3, rel=1e-4)
    assert row["response_tokens"] == 4 and row["response_len"] == pytest.approx(4 / 3, rel=1e-4)


def test_the_page_holds_both_logs_of_all_steps_and_a_response_is_data_in_it(
        train, folder, monkeypatch):
    text = "</script><img src=x onerror=alert(1)><!-- <script> 1\u20282\x853\x0c4\r\n5"
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    script_responses(monkeypatch, [ids] * 2)
    train("o", steps=1)
    out = train("o", "--resume")
    page = (out / "page.html").read_text(encoding="utf-8")
    start = page.index("{", page.index("DATA = "))
    data, end = json.JSONDecoder().raw_decode(page, start)
    assert "<" not in page[start:end]
    assert data["metrics"] == read_log(out)
    assert data["rows"] == read_log(out, "samples.jsonl")
    assert [row["response"] for row in data["rows"]] == [text] * 4


def test_a_lora_run_leaves_an_adapter_that_loads_from_any_folder(train, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    out = train("o", "--lora-rank", 2, "--model", "m")
    assert "not promise" in (out / "README.md").read_text()  # our card, not peft's
    assert not (out / "model.safetensors").exists()
    monkeypatch.chdir(out)
    ids = torch.tensor([[5, 6, 7]])
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(out)(ids).logits
    ours, tokenizer = sample_program.load_model(".", torch.device("cpu"), torch.float32)
    assert tokenizer.chat_template and torch.equal(ours(ids).logits, theirs)
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.allclose(base(ids).logits, theirs)


# --- the algorithm in a run ---

def spy_learn(monkeypatch, bad=(), what="gradient"):
    """What learn is called with, and copies of the student's weights then and of the teacher's.
    Steps `bad` are made not finite, in their loss or gradient."""
    calls = []
    learn = msd.learn

    def record(args, student, teacher, *rest):
        weights = [[p.detach().clone() for p in model.parameters()] for model in (student, teacher)]
        calls.append((student, teacher, *rest, *weights))
        loss, scores = learn(args, student, teacher, *rest)
        if len(calls) in bad and what == "loss":
            loss = float("nan")
        elif len(calls) in bad:
            msd.list_masters(student)[0].grad[0] = float("inf")
        return loss, scores
    monkeypatch.setattr(msd, "learn", record)
    return calls


def spy_sample(monkeypatch):
    """What sample is called with, its seed first, and what it gives."""
    calls = []

    def record(model, prompts, **options):
        responses = sample_program.sample(model, prompts, **options)
        calls.append((options["generator"].initial_seed(), options, model, prompts, responses))
        return responses
    monkeypatch.setattr(msd, "sample", record)
    return calls


@pytest.mark.parametrize("policy", ["on", "off"])
def test_responses_are_sampled_by_the_policys_model_and_learned_as_they_are(
        train, monkeypatch, policy):
    learned = spy_learn(monkeypatch)
    sampled = spy_sample(monkeypatch)
    train("o", "--policy", policy)
    for call, (_, _, *drawn) in zip(learned, sampled, strict=True):
        student, teacher, student_prompts, teacher_prompts, responses = call[:5]
        assert student is not teacher and student_prompts != teacher_prompts and any(responses)
        if policy == "on":
            assert drawn == [student, student_prompts, responses]
        else:
            assert drawn == [teacher, teacher_prompts, responses]


def test_the_sampler_gets_its_flags_and_noise_of_its_own_for_each_seed_and_step(
        train, monkeypatch):
    calls = spy_sample(monkeypatch)
    want = {"temperature": 0.7, "top_k": 3, "top_p": 0.5, "max_new_tokens": 5, "vocab_size": 4096}
    flags = ["--temperature", 0.7, "--top-k", 3, "--top-p", 0.5, "--max-new-tokens", 5]
    for seed in (0, 1):
        train(f"o{seed}", *flags, "--seed", seed)
    for _, options, *_ in calls:
        assert want.items() <= options.items() and 4095 in options["stop_ids"]
    assert len({seed for seed, *_ in calls}) == 4


@pytest.mark.parametrize("rank", [0, 2])
def test_an_ema_teacher_follows_after_every_step(train, monkeypatch, rank):
    calls = spy_learn(monkeypatch)
    train("o", "--teacher", "ema", "--ema-decay", 0.75, "--lora-rank", rank, steps=4)
    for (*_, before), (*_, student, after) in zip(calls, calls[1:]):
        assert not all(map(torch.equal, before, after))
        for old, new, mean in zip(before, student, after):
            torch.testing.assert_close(mean, 0.75 * old + 0.25 * new)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(train, monkeypatch, what):
    calls = spy_learn(monkeypatch, {2, 4}, what)
    rows = read_log(train("o", "--teacher", "ema", steps=5))
    assert [row["skipped"] for row in rows] == [False, True, False, True, False]
    for weights in zip(*[call[-2:] for call in calls]):  # of the student, of the teacher
        moved = [not torch.equal(old[0], new[0]) for old, new in zip(weights, weights[1:])]
        assert moved == [True, False, True, False]


def test_too_many_bad_steps_in_a_row_end_the_run(train, fail, monkeypatch):
    last = 2 + msd.MAX_BAD_STEPS
    with monkeypatch.context() as patch:
        calls = spy_learn(patch, range(3, 99))
        line = fail("o", "--save-every", 2, steps=20)
    assert f"{msd.MAX_BAD_STEPS} steps in a row" in line and len(calls) == last
    out = train("o", "--resume", steps=last - 1)  # the checkpoint stands
    assert len(read_log(out)) == last - 1


def test_a_step_whose_responses_are_all_empty_is_not_stepped_on(train, monkeypatch):
    script_responses(monkeypatch, [[7, 8], [9]])
    one = train("one", steps=1)
    script_responses(monkeypatch, [[7, 8], [9]], [[], []])  # AdamW's moments would move on
    out = train("o", steps=3)
    assert are_equal(read_weights(out), read_weights(one))
    rows = read_log(out)
    assert [row["response_tokens"] for row in rows] == [3, 0, 0]
    assert [row["loss"] for row in rows[1:]] == [0, 0]


# --- which queries are trained on, and which are judged ---

def list_ids(out):
    """The ids that samples.jsonl shows; with two a batch, all that were trained on."""
    return {line["id"] for line in read_log(out, "samples.jsonl")}


@pytest.fixture
def tables(monkeypatch):
    """The tables that are printed, each (rows, items)."""
    found = []

    def show(run):
        found.append(([row for row, _ in run], sum((items for _, items in run), [])))
    monkeypatch.setattr(msd.evaluation, "print_rates", show)
    return found


def test_held_out_queries_are_judged_and_the_others_trained_on(train, tables):
    out = train("o", *JUDGED, "--holdout", 0.5, steps=8)
    judged = {item["id"] for item in tables[-1][1]}
    assert judged and judged.isdisjoint(list_ids(out))
    assert judged | list_ids(out) == {str(n) for n in range(1, 13)}


@pytest.mark.parametrize("judged", [[], JUDGED], ids=["not judged", "judged"])
def test_eval_data_is_judged_and_never_trained_on_even_where_it_overlaps(
        train, tables, tmp_path, judged):
    extra = write_queries(tmp_path / "extra.csv", [QUERIES[0], QUERIES[1], QUERIES[7]])
    out = train("o", *judged, "--eval-limit", 1, "--eval-data", extra, steps=8)
    assert list_ids(out) == {"3", "4", "5", "6", "7", "9", "10", "11", "12"}
    if judged:
        rows, _ = tables[-1]
        assert {(row["label"], row["n"]) for row in rows} == {("harmful", 1), ("benign", 1)}


def test_eval_data_without_english_is_not_trained_on_either(train, tmp_path):
    extra = tmp_path / "jv.csv"
    extra.write_text("label,jv\n" + "".join(f"{label},{jv}\n" for label, _, jv in QUERIES[2:9]))
    assert list_ids(train("o", "--eval-data", extra, steps=6)) == {"1", "2", "10", "11", "12"}


def test_eval_data_in_a_language_that_is_judged_alone_is_not_trained_on(train, tmp_path):
    rows = [f"{label},{en},{jv},{jv} sw\n" for label, en, jv in QUERIES]
    (tmp_path / "all.csv").write_text("label,en,jv,sw\n" + "".join(rows))
    extra = tmp_path / "sw.csv"
    extra.write_text("label,sw\n" + "".join(f"{label},{jv} sw\n" for label, _, jv in QUERIES[2:9]))
    out = train("o", "--eval-data", extra, "--eval-lang", "sw", steps=6, data=tmp_path / "all.csv")
    assert list_ids(out) == {"1", "2", "10", "11", "12"}


def test_eval_data_need_not_have_every_language(train, tables, tmp_path, capsys):
    extra = tmp_path / "en.csv"
    extra.write_text("label,en\nharmful,Take it?\n")
    train("o", *JUDGED, "--eval-data", extra)
    rows, _ = tables[0]
    assert [row["lang"] for row in rows] == ["en"]
    assert "no columns may be jv" in capsys.readouterr().err


def test_a_resumed_run_does_not_judge_by_what_it_was_trained_on(train, fail, tmp_path):
    train("o")
    flags = ["--resume", "--eval-data", tmp_path / "extra.csv"]
    write_queries(flags[-1], QUERIES[3:4])
    assert "--eval-data" in fail("o", *flags, steps=3)
    write_queries(flags[-1], [("benign", "How is rain made?", "Piye udan?")])
    train("o", *flags, steps=3)


def test_mixed_queries_are_trained_on_and_not_judged_and_eval_data_is_harmful(
        train, tables, tmp_path):
    data = write_queries(tmp_path / "mixed.csv", QUERIES[2:], label=False)
    extra = write_queries(tmp_path / "extra.csv", QUERIES[:2], label=False)
    flags = ["--label", "mixed", "--holdout", 0.3, "--benign-fraction", 1, "--eval-data", extra]
    out = train("o", *JUDGED, *flags, data=data, steps=6)
    assert len(list_ids(out)) > 5
    assert {line["label"] for line in read_log(out, "samples.jsonl")} == {"mixed"}
    rows, _ = tables[-1]
    judged = {(Path(row["data"]).name, row["label"]) for row in rows}
    assert judged == {("extra.csv", "harmful")}


def test_queries_that_do_not_fit_are_skipped_and_counted_and_never_cut(train, tmp_path, capsys):
    long = ("harmful", "long " * 600, "dawa")  # the student's prompt fits, the teacher's does not
    longer = ("benign", "short", "dawa " * 600)
    data = write_queries(tmp_path / "long.csv", [*QUERIES[5:7], long, longer])
    assert list_ids(train("o", data=data, steps=4)) == {"1", "2"}
    assert "2 queries do not fit" in capsys.readouterr().err


def test_several_files_and_languages_are_trained_on_together(train, tmp_path):
    more = tmp_path / "more.csv"
    more.write_text("label,en,jv,sw\nharmful,Hi,Sugeng,Habari\n", encoding="utf-8")
    out = train("o", "--lang", "jv,sw", data=more, steps=1)
    assert {line["lang"] for line in read_log(out, "samples.jsonl")} == {"jv", "sw"}
    out = train("p", "--data", more, "--benign-fraction", 0, steps=4)
    prompts = {line["prompt"] for line in read_log(out, "samples.jsonl")}
    assert len(prompts) == 7  # six of the one file, one of the other


# --- what is told before and after ---

def script_answers(monkeypatch, student="sepedhah|kendhang", teacher="sepedhah|kursi|prau"):
    """Let the student refuse two queries, and the teacher one of these and two more, of each label
    -> the prompts that are asked."""
    asked = []

    def answer(model, tokenizer, prompts, *rest):
        said = []
        for prompt in map(tokenizer.decode, prompts):
            refused = re.search(teacher if "In English" in prompt else student, prompt)
            said.append("I can't help with that." if refused else "Here is how people do it.")
            asked.append(prompt)
        return said
    monkeypatch.setattr(msd.evaluation, "answer", answer)
    return asked


def read_preflight(text):
    """{label: [queries, refused by the student, by the teacher, flips]} of its lines."""
    found = {}
    for line in text.splitlines():
        if line.startswith("preflight jv"):
            label = re.search("harmful|benign|mixed", line)[0]
            found[label] = [int(number) for number in re.findall(r"\d+", line)]
    return found


def test_the_preflight_counts_refusals_and_flips_of_each_label(
        train, tmp_path, monkeypatch, capsys):
    script_answers(monkeypatch)
    train("o", *JUDGED, "--preflight", 9)
    told = capsys.readouterr().out
    assert read_preflight(told) == {"harmful": [6, 2, 3, 2], "benign": [6, 2, 3, 2]}
    data = write_queries(tmp_path / "plain.csv", label=False)
    train("p", *JUDGED, "--preflight", 99, "--label", "mixed", data=data)
    assert read_preflight(capsys.readouterr().out) == {"mixed": [12, 4, 6, 4]}


def test_a_query_that_leaves_little_room_is_asked_for_less_in_the_preflight(
        train, tmp_path, capsys):
    data = write_queries(tmp_path / "long.csv", [("harmful", "short", "dawa " * 150), *QUERIES[:1]])
    train("o", *JUDGED, "--preflight", 9, "--eval-max-new-tokens", 400, data=data)
    assert "preflight jv: of 2 harmful" in capsys.readouterr().out


def test_the_preflight_asks_a_sample_that_the_seed_chooses_and_both_sides_the_same(
        train, monkeypatch):
    asked = script_answers(monkeypatch)

    def draw(seed):
        asked.clear()
        train("o", *JUDGED, "--preflight", 3, "--seed", seed, "--overwrite", steps=1)
        return list(asked)
    first = draw(0)
    assert first == draw(0) != draw(1)
    assert len(first) == 12  # of each label three by the student, three by the teacher
    for student, teacher in zip(first[:3], first[3:6]):
        query = student.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")
        assert query in teacher != student


def test_a_language_without_refusal_phrases_has_no_preflight_and_a_warning(
        train, tmp_path, capsys):
    data = write_queries(tmp_path / "hi.csv")
    data.write_text(data.read_text().replace("jv", "hi"))
    train("o", *JUDGED, "--preflight", 3, "--lang", "hi,en", "--eval-max-new-tokens", 1, data=data)
    told = capsys.readouterr()
    assert "preflight en: of 3 harmful" in told.out and "preflight hi" not in told.out
    assert "warning: no refusal phrases for hi: no preflight in it" in told.err


def test_without_eval_every_nothing_is_asked_and_nothing_judged(train, monkeypatch):
    asked = script_answers(monkeypatch)
    train("o", "--preflight", 5)  # QUICK has --eval-every 0
    assert not asked


def test_tables_come_before_between_and_after(train, tables, capsys):
    train("o", *JUDGED, "--holdout", 0.4, "--eval-every", 2, "--eval-lang", "en", steps=5)
    told = re.findall(r"held-out queries after (\d)", capsys.readouterr().out)
    assert told == ["0", "2", "4", "5"]
    for rows, _ in tables:
        assert {(row["lang"], row["seen"]) for row in rows} == {("jv", True), ("en", False)}
    assert all(row["base"] is not None for row in tables[-1][0])


def test_the_preflight_and_the_tables_ask_with_the_system_turn_too(train, monkeypatch):
    asked = script_answers(monkeypatch)
    train("o", *JUDGED, "--preflight", 1, "--holdout", 0.4, "--system", "Be brief.", steps=1)
    assert len(asked) > 8 and all("Be brief." in prompt for prompt in asked)


def test_from_another_folder_it_trains_its_own_model_on_its_own_queries(
        tables, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("--lang", "jv", "--steps", 1, "--batch-size", 2, "--max-new-tokens", 4, "--preflight", 8,
        "--eval-limit", 1, "--eval-max-new-tokens", 24)
    found = read_preflight(capsys.readouterr().out)
    n, student, teacher, flips = found["harmful"]
    assert n == 8 and student <= 2 and teacher >= 6 and flips >= 5  # there is much to learn
    assert found["benign"][2] <= 2
    rows, _ = tables[-1]
    assert {row["lang"] for row in rows} == {"jv", "en", "sw"}


# --- a run goes on ---

def check_same_run(out, straight):
    """Weights and logs, but for what is of the machine."""
    assert are_equal(read_weights(out), read_weights(straight))
    for name in msd.LOGS:
        logs = [read_log(path, name) for path in (out, straight)]
        for row in sum(logs, []):
            for key in OF_THE_MACHINE:
                row.pop(key, None)
        assert logs[0] == logs[1]


@pytest.mark.parametrize("flags", [
    [], ["--lora-rank", 2],
    ["--teacher", "ema", "--ema-decay", 0.7, "--dtype", "bfloat16"],
    ["--lora-rank", 2, "--teacher", "ema", "--ema-decay", 0.7],
    ["--policy", "off", "--cot-tokens", 5]], ids=str)
def test_a_resumed_run_is_a_straight_one_bit_for_bit(train, flags):
    flags = [*flags, "--batch-size", 3, "--warmup", 3]
    straight = train("straight", *flags, steps=4)
    out = train("o", *flags, "--save-every", 1, steps=2)
    for name in msd.LOGS:  # what a kill after the checkpoint leaves
        with open(out / name, "a", encoding="utf-8") as file:
            file.write('{"step": 3, "loss": 0.1}\n{"step": 4, "lo')
    check_same_run(train("o", *flags, "--resume", steps=4), straight)


def start_process(*argv, n=0):
    """msd.py in a process of its own, or in n that torchrun starts."""
    command = [sys.executable]
    if n:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", n, "--rdzv-backend", "c10d",
                    "--rdzv-endpoint", "localhost:0"]
    command += [ROOT / "msd.py", *argv]
    # a background job of a shell ignores Ctrl-C, and so would what it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(list(map(str, command)), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def wait_for_step(process, n):
    """Read what a process says until so many steps are done."""
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith(f"step {n}/"):
            return
    raise AssertionError(said)


@pytest.mark.parametrize("sent, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_run_that_is_killed_or_interrupted_goes_on_as_if_it_were_not(
        train, folder, tmp_path, sent, code):
    argv = list_argv(folder, tmp_path / "q.csv", tmp_path / "o")
    process = start_process(*argv, "--save-every", 2, "--steps", 500)
    wait_for_step(process, 3)
    process.send_signal(sent)
    _, said = process.communicate()
    assert process.returncode == code and "Traceback" not in said
    assert code == -9 or said.strip().splitlines()[-1].startswith("msd.py: ")
    steps = torch.load(tmp_path / "o" / "checkpoint.pt", weights_only=True)["step"] + 2
    check_same_run(train("o", "--resume", steps=steps), train("straight", steps=steps))


def test_resume_does_not_go_back(train, fail):
    out = train("o", steps=3)
    before = read_files(out)
    assert "has done 3 of 2 steps" in fail("o", "--resume", steps=2)
    assert read_files(out) == before


def test_resume_may_change_what_leaves_the_training_alone(train, tables):
    straight = train("straight", steps=4)
    train("o")
    out = train("o", "--resume", *JUDGED, "--save-every", 3, "--preflight", 1, "--eval-limit", 1,
                "--eval-lang", "en", "--device", "cpu", steps=4)
    check_same_run(out, straight)
    assert len(tables) == 1  # without a base


def list_flags():
    actions = msd.build_parser()._actions
    return [action for action in actions if action.dest != "help"]


MAY_CHANGE = {"steps", "save_every", "preflight", "device", "out", "resume", "overwrite"}


def change(action, tmp_path):
    """A flag and another value than a run of this file has."""
    own = {"model": TINY, "data": tmp_path / "p.csv", "lang": "en", "source_lang": "jv",
           "teacher_prompt": "both", "system": "Be brief."}
    name = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [f"--no-{name[2:]}"]
    if action.choices:
        return [name, action.choices[-1]]
    if action.dest in own:
        return [name, own[action.dest]]
    return [name, 7 if action.type.__name__ == "int" else 0.3125]


def test_resume_refuses_any_other_change_in_one_line(train, fail, monkeypatch, tmp_path):
    write_queries(tmp_path / "p.csv")
    out = train("o")
    before = read_files(out)
    monkeypatch.setattr(msd, "load_models", lambda *args: 1 / 0)  # before anything slow is done
    for action in list_flags():
        if action.dest not in MAY_CHANGE and not action.dest.startswith("eval_"):
            line = fail("o", "--resume", *change(action, tmp_path))
            assert action.option_strings[0] in line
    assert read_files(out) == before


def test_resume_refuses_queries_or_a_prompt_that_changed(train, fail, tmp_path):
    prompt = tmp_path / "p.txt"
    prompt.write_text("{query} {query_en}")
    train("o", "--teacher-prompt", prompt)
    for file, text in ((prompt, "{query_en}"), (tmp_path / "q.csv", "label,en,jv\nharmful,a,b\n")):
        before = file.read_text()
        file.write_text(text)
        assert "--resume" in fail("o", "--teacher-prompt", prompt, "--resume", steps=3)
        file.write_text(before)
    train("o", "--teacher-prompt", prompt, "--resume", steps=3)


def test_a_run_that_moved_or_is_named_another_way_goes_on(train, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "m")
    Path("link").symlink_to(tmp_path)

    def go_on(path, out, steps, *flags):
        train("", "--model", f"{path}m/", "--out", out, *flags, data=f"{path}q.csv", steps=steps)
    go_on("", "o", 1)
    go_on("link/./", f"{tmp_path}/o/", 2, "--resume")
    shutil.move("o", "p")
    monkeypatch.chdir("p")
    go_on("../", ".", 3, "--resume")
    check_same_run(tmp_path / "p", train("straight", steps=3))


@pytest.mark.parametrize("name, size", [
    ("checkpoint.pt", None), ("checkpoint.pt", 40), ("args.json", None), ("args.json", 40),
    ("metrics.jsonl", None)])
def test_a_run_whose_files_are_gone_or_cut_short_is_one_line(train, fail, name, size):
    out = train("o")
    if size:
        os.truncate(out / name, size)
    else:
        (out / name).unlink()
    before = read_files(out)
    assert str(out) in fail("o", "--resume", steps=3)
    assert read_files(out) == before


@contextlib.contextmanager
def limit_files(size):
    """Let no file grow beyond so many bytes, as where a disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_stays(train, fail):
    checkpoint = train("o", steps=1) / "checkpoint.pt"
    before = checkpoint.read_bytes()
    with limit_files(1 << 19):
        assert "checkpoint.pt" in fail("o", "--resume")
    assert checkpoint.read_bytes() == before
    train("o", "--resume")


@pytest.mark.parametrize("size, says", [  # a log, the tokenizer's file
    (1 << 12, "too large"), (1 << 17, "cannot save in")])
def test_a_disk_that_fills_up_is_one_line(fail, size, says):
    with limit_files(size):
        assert says in fail("o", "--save-every", 0, steps=9)


# --- --out ---

def test_overwrite_leaves_what_lies_deeper_and_nothing_else_also_behind_a_link(train, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "o").symlink_to(tmp_path / "big")
    out = train("o", "--lora-rank", 2)
    (out / "merged").mkdir()
    (out / "merged" / "notes.txt").write_text("no run's")
    train("o", "--overwrite", "--save-every", 0, steps=3)
    assert len(read_log(out)) == 3 and out.is_symlink()
    assert not (out / "checkpoint.pt").exists() and not (out / "adapter_config.json").exists()
    assert (out / "merged" / "notes.txt").read_text() == "no run's"


@pytest.mark.parametrize("data", ["{}", "en={},jv={}"])
def test_overwrite_leaves_what_it_reads(train, data):
    out = train("o")
    prompt, queries = out / "p.txt", Path(write_queries(out / "mine.csv"))
    prompt.write_text("{query_en}")
    train("o", "--overwrite", "--teacher-prompt", prompt, data=data.format(queries, queries))
    assert prompt.exists() and queries.exists() and read_log(out, "samples.jsonl")


def test_what_only_the_preflight_sees_costs_no_run(train, fail, folder, tmp_path):
    before = read_files(train("o"))
    shutil.copytree(folder, tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "m")
    for out in ("o", "new"):
        flags = ["--overwrite", "--model", tmp_path / "m", *JUDGED, "--preflight", 1]
        assert "not finite" in fail(out, *flags)
    assert read_files(tmp_path / "o") == before
    train("new", steps=1)  # it is not in use


def test_the_card_names_every_file(train, tmp_path):
    for lang in ("en", "jv"):
        (tmp_path / f"{lang}.txt").write_text("How?\nWhy?\n")
    out = train("o", "--holdout", 0, data=f"en={tmp_path}/en.txt,jv={tmp_path}/jv.txt")
    assert "data en=en.txt,jv=jv.txt." in (out / "README.md").read_text()


def test_a_file_that_cannot_be_deleted_is_one_line(train, fail, monkeypatch):
    def refuse(file):
        raise PermissionError(file)
    train("o")
    monkeypatch.setattr(Path, "unlink", refuse)
    assert "error: " in fail("o", "--overwrite")


each_way = pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]], ids=str)


@each_way
@pytest.mark.parametrize("name, text", [
    ("deep/notes.txt", "mine"), ("metrics.jsonl", '{"step": 1}\n')])
def test_a_folder_that_is_no_run_is_never_deleted(fail, tmp_path, name, text, flags):
    file = tmp_path / "o" / name
    file.parent.mkdir(parents=True)
    file.write_text(text)
    before = read_files(tmp_path / "o")
    fail("o", *flags)
    assert read_files(tmp_path / "o") == before


@each_way
def test_an_out_that_is_a_file_or_cannot_be_written_is_one_line(fail, tmp_path, flags):
    (tmp_path / "o").write_text("mine")
    for out in ("o", "o/p", "/proc/msd"):
        fail(out, *flags)
    assert (tmp_path / "o").read_text() == "mine"


# --- mistakes ---

MISTAKES = [
    "--step 3", "--steps 0", "--steps x", "--micro-batch-size 0", "--lr 0",
    "--lr nan", "--lr inf", "--temperature -1", "--top-p 0", "--top-p 1.5", "--top-k -1",
    "--policy both", "--holdout 1.5", "--benign-fraction 2", "--dpsw-top-k 0", "--seed -1",
    "--resume=yes", "--dtype float8", "--device abacus", "--device cuda:99", "--device meta",
    "--lang xx", "--lang ,", "--source-lang xx", "--label qa", "--teacher-prompt nobody",
    "--teacher-prompt /", "--teacher-prompt LICENSE", "--model /nowhere", "--data /nowhere.csv",
    "--eval-data /nowhere.csv", "--resume", "--beta 0", "--beta 1",
    "--max-new-tokens 600", "more"]


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_left_behind(fail, tmp_path, flags):
    line = fail("o", *flags.split(" "))
    first = flags.partition(" ")[0].partition("=")[0]
    assert first.strip("-") in line or flags.split(" ")[-1] in line
    assert not (tmp_path / "o").exists()


def test_layers_that_take_no_adapter_are_one_line(fail, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    build_model("Mamba", vocab_size=4096).save_pretrained(tmp_path / "m")
    assert "--lora-rank" in fail("o", "--model", tmp_path / "m", "--lora-rank", 2)


def test_an_adapter_is_no_model_to_train(train, fail):
    assert "adapter" in fail("o", "--model", train("adapter", "--lora-rank", 2))


def test_a_run_in_use_is_not_written_over_nor_by_a_mistake(train, fail):
    out = train("o")
    before = read_files(out)
    line = fail("o")
    assert "in use" in line and "--resume" in line and "--overwrite" in line
    for flags in (["--steps", 0], ["--data", "/nowhere.csv"]):
        fail("o", "--overwrite", *flags)
    assert read_files(out) == before


# --- several processes ---

def finish_together(*argv, code=0):
    """A run of two processes -> what they say."""
    process = start_process(*argv, n=2)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


@pytest.mark.parametrize("flags", [
    ["--teacher", "ema", "--ema-decay", 0.5], ["--policy", "off", "--lora-rank", 4]], ids=str)
def test_two_processes_end_with_the_weights_of_one(train, folder, tmp_path, flags):
    flags = [*JUDGED, "--batch-size", 6, "--temperature", 0, "--micro-batch-size", 2, "--lr", 1e-3,
             *flags]
    one = train("one", *flags, steps=3)
    two = train("two", *flags, steps=1)
    out, err = finish_together(*list_argv(folder, tmp_path / "q.csv", two), *flags, "--steps", 3,
                               "--resume")
    assert out.count("the model lies in") == 1 and err.count("rows read") == 1
    torch.testing.assert_close(read_weights(two), read_weights(one), atol=1e-4, rtol=0)
    for row, other in zip(read_log(two), read_log(one), strict=True):
        for name in ("loss", "grad_norm", "response_tokens", "response_len"):
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6)
    shown = zip(read_log(two, "samples.jsonl"), read_log(one, "samples.jsonl"), strict=True)
    for line, other in shown:  # a step's last comes from the other process
        assert (line["step"], line["id"]) == (other["step"], other["id"])


def test_a_batch_that_does_not_go_round_is_told_once(folder, tmp_path):
    argv = list_argv(folder, write_queries(tmp_path / "q.csv"), tmp_path / "o")
    _, err = finish_together(*argv, "--batch-size", 3, code=1)
    assert err.count("msd.py: error: ") == 1
    assert "--batch-size 3 does not go round 2 processes" in err


def test_processes_draw_each_their_own_and_where_one_is_killed_the_others_end(folder, tmp_path):
    data = write_queries(tmp_path / "q.csv", QUERIES[:1])  # so both have the same prompt
    process = start_process(*list_argv(folder, data, tmp_path / "o"), "--steps", 100000,
                            "--save-every", 1, "--max-new-tokens", 8, n=2)
    wait_for_step(process, 3)
    shown = read_log(tmp_path / "o", "samples.jsonl")[:4]  # of two steps
    assert len({line["response"] for line in shown}) == 4
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert torch.load(tmp_path / "o" / "checkpoint.pt", weights_only=True)["step"] >= 1


# --- the README ---

PROGRAMS = {"msd": msd, "eval": eval_program, "sample": sample_program}
PAGES = [ROOT / "README.md", ROOT / "RESULTS.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_taken_by_its_programs_parser(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M))
    commands = re.findall(r"\b(msd|eval|sample)\.py(.*)", blocks)
    assert commands
    for name, rest in commands:
        PROGRAMS[name].build_parser().parse_args(shlex.split(rest, comments=True))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_a_page_names_is_one_of_ours(page):
    known = {"--help", "--nproc-per-node", "--no-grad-checkpoint"}
    for file in [*ROOT.glob("*.py"), *ROOT.glob("tests/[!t]*.py"), *ROOT.glob("data/**/*.py")]:
        known.update(re.findall(r'"(--[a-z][a-z-]*)"', file.read_text(encoding="utf-8")))
    text = page.read_text(encoding="utf-8")
    ours = re.sub(r"^ *(pip|hf|git|vllm|pytest)\b.*$", "", text, flags=re.M)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", ours))
    assert named and named <= known, named - known


@pytest.mark.parametrize("script", ["data/tiny/make.py", "tests/claims.py"])
def test_a_script_that_no_other_test_runs_starts(script):
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: " in done.stdout
