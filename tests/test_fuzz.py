"""Bad input by the hundred: a right answer, or one line and exit code 2. FUZZ=1000 pytest -q -s tests/test_fuzz.py tries
so many inputs a test, and says how they ended."""
import csv
import math
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import build_model
from hypothesis import HealthCheck, given, settings, strategies as st

import eval as eval_program
import msd
import sample as sample_program
from data.queries import load_queries
from dpsw import dpsw_loss, dpsw_loss_chunked
from sample import sample, sample_next_token

ROOT, ENDED = Path(__file__).parents[1], Counter()
fuzz = lambda n: settings(max_examples=int(os.environ.get("FUZZ", n)), deadline=None, derandomize=True, database=None,
                          suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def tell():
    yield
    print("", f"{sum(ENDED.values())} inputs", *(f"{name}: {n}" for name, n in sorted(ENDED.items())), sep="\n")


def is_one_line(message):
    return message.strip() and len(message) < 1000 and "\n" not in message.strip() and "Traceback" not in message


# --- data ---

@fuzz(60)
@given(content=st.one_of(st.binary(max_size=300), st.text(max_size=200).map(str.encode)),
       head=st.sampled_from([b"", b"label,en,jv\n", b'{"en": "x", "jv": "y"}\n', b"\xef\xbb\xbf", b"[", b"en\tjv\n",
                             b"label,en,jv\nharmful,x,y\nharmful,x,", b"en,jv\nx,", b"en\tjv\nx\ty\nx\t", b"en,jv\nx,y\n"]),
       ext=st.sampled_from(["csv", "tsv", "json", "jsonl", "txt"]))
def test_any_bytes_are_queries_or_one_line(tmp_path_factory, content, head, ext):
    path = tmp_path_factory.getbasetemp() / f"bytes.{ext}"
    path.write_bytes(head + content)
    try:
        queries = load_queries(path, ["en", "jv"])
        assert queries and all(q.text["en"].strip() and q.text["jv"].strip() for q in queries)
        ENDED["load_queries, bytes: read"] += 1
    except ValueError as e:
        assert is_one_line(str(e))
        ENDED["load_queries, bytes: refused in one line"] += 1


CELLS = st.one_of(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30), st.sampled_from(
    ["", " ", "<|im_end|>", "\u202eright to left", "a,b\tc", '"', "'", "\u2028", "=1+1", "[{'from': 'human'}]", "x" * 5000]))


@fuzz(60)
@given(rows=st.lists(st.tuples(st.sampled_from(["harmful", "benign", "safe", "unsafe", "?", ""]), CELLS, CELLS), min_size=1,
                     max_size=6), delimiter=st.sampled_from([",", "\t"]))
def test_any_table_that_csv_can_write_is_read_cell_for_cell(tmp_path_factory, rows, delimiter):
    path = tmp_path_factory.getbasetemp() / f"table.{'csv' if delimiter == ',' else 'tsv'}"
    with open(path, "w", encoding="utf-8", newline="") as f:
        csv.writer(f, delimiter=delimiter).writerows([("label", "en", "jv"), *rows])
    labels = {"harmful": "harmful", "unsafe": "harmful", "benign": "benign", "safe": "benign"}
    expected = [(labels[label], en, jv) for label, en, jv in rows if label in labels and en.strip() and jv.strip()
                and not en.startswith("[{") and not jv.startswith("[{")]
    try:
        assert [(q.label, q.text["en"], q.text["jv"]) for q in load_queries(path, ["en", "jv"])] == expected
        ENDED["load_queries, tables: read"] += 1
    except ValueError as e:
        assert is_one_line(str(e)) and not expected
        ENDED["load_queries, tables: refused in one line"] += 1


HOSTILE = {
    "a cell of 10 MB": b"label,en,jv\nharmful," + b"x" * 10_000_000 + b",y\n",
    "100,000 columns of one name": b",".join([b"c"] * 100_000) + b"\n1\n",
    "100,000 columns": b"label,en,jv," + b",".join(b"c%d" % i for i in range(100_000)) + b"\nharmful,a,b" + b"," * 100_000,
    "nested 100,000 deep": b'{"en": ' + b"[" * 100_000,
    "mixed encodings": b"label,en,jv\nharmful,\xff\xfe,\x80\n",
    "NUL bytes": b"label,en,jv\nharmful,a\0,b\n"}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused_in_one_line_or_read(tmp_path, content):
    (tmp_path / "q.csv").write_bytes(content)
    try:
        assert [(q.text["en"], q.text["jv"]) for q in load_queries(tmp_path / "q.csv", ["en", "jv"])] == [("a", "b")]
    except ValueError as e:
        assert is_one_line(str(e))


# --- tensors ---

NUMBERS = st.one_of(st.floats(-30, 30), st.sampled_from([0.0, 1e4, -1e4, -math.inf]))


@fuzz(150)
@given(N=st.integers(0, 4), V=st.integers(1, 9), data=st.data(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), weighting=st.sampled_from(
           ["dpsw", "teacher", "student", "none"]), view=st.sampled_from(["teacher", "sampled"]),
       divergence=st.sampled_from(["reverse", "forward", "jsd"]), beta=st.sampled_from([0.0, 0.3, 1.0]), k=st.integers(1, 12),
       temperature=st.sampled_from([1.0, 0.3, 7.0]), norm=st.sampled_from(["none", "mean"]))
def test_any_logits_give_the_definition_and_no_nan(N, V, data, dtype, weighting, view, divergence, beta, k, temperature, norm):
    logits = lambda: torch.tensor(data.draw(st.lists(st.lists(NUMBERS, min_size=V, max_size=V), min_size=N, max_size=N)),
                                  dtype=dtype).reshape(N, V)
    student, teacher = logits(), logits()
    for x in (student, teacher):
        x[x.isneginf().all(-1)] = 0  # a row that allows nothing is no distribution
    ids = torch.tensor(data.draw(st.lists(st.integers(0, V - 1), min_size=N, max_size=N)), dtype=torch.long)
    options = dict(weighting=weighting, student_view=view, top_k=k, divergence=divergence, beta=beta, temperature=temperature)
    student.requires_grad_()
    loss, stats = dpsw_loss(student, teacher, ids, weight_norm=norm, **options)
    loss.backward()
    assert not loss.isnan() and not student.grad.isnan().any() and not any(x.isnan().any() for x in stats.values())
    assert all((0 <= stats[name]).all() and (stats[name] <= 1).all() for name in ("weight", "w_teacher", "w_student"))
    same = lambda hidden: hidden
    chunked, _ = dpsw_loss_chunked(student.detach(), teacher, same, same, ids, chunk_size=2, weight_norm=norm, **options)
    torch.testing.assert_close(chunked, loss.detach(), rtol=1e-4, atol=1e-5)
    p, q = ((x.detach().float().double() / temperature).softmax(-1) for x in (student, teacher))
    ratio = lambda a, b: torch.where(a > 0, a * (a / b).log(), 0.0).sum(-1)
    m = beta * q + (1 - beta) * p
    d = {"reverse": ratio(p, q), "forward": ratio(q, p), "jsd": beta * ratio(q, m) + (1 - beta) * ratio(p, m)}[divergence]
    fine = (d.isfinite() & (d < 1e3)).numpy()  # past it the ratio of two probabilities leaves float64
    torch.testing.assert_close(stats["divergence"][fine].double(), d[fine], rtol=1e-3, atol=1e-4)
    ENDED["dpsw_loss: the definition, no NaN"] += 1


@fuzz(150)
@given(rows=st.lists(st.lists(NUMBERS, min_size=7, max_size=7), min_size=1, max_size=4),
       temperature=st.sampled_from([0, 1e-3, 1, 50]), top_k=st.integers(0, 9), top_p=st.sampled_from([1e-6, 0.5, 0.999, 1.0]))
def test_any_logits_give_a_token_that_the_cuts_allow(rows, temperature, top_k, top_p):
    logits = torch.tensor(rows)
    logits[logits.isneginf().all(-1)] = 0
    token = sample_next_token(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0))
    chosen = logits.gather(1, token[:, None])[:, 0]
    assert chosen.isfinite().all() and ((logits > chosen[:, None] + 1e-4).sum(-1) < (top_k or 7)).all()
    assert temperature or (chosen == logits.max(-1).values).all()  # (1e-4: a tie of probabilities is none of logits)
    ENDED["sample_next_token: a token that the cuts allow"] += 1


@fuzz(60)
@given(prompts=st.lists(st.one_of(st.lists(st.integers(0, 96), min_size=1, max_size=9),
                                  st.sampled_from([[], [5], [5, 6], [5] * 9])), max_size=5), n=st.sampled_from([1, 2, 3, 4, 5, 5, 5, 0, -1]),
       temperature=st.sampled_from([0, 0, 1, 1, 0.1, 9, -1, math.nan, math.inf]), top_k=st.integers(-1, 99),
       top_p=st.sampled_from([1, 1, 1, 0.9, 0.5, 1e-9, 0, 2]),
       stop_ids=st.lists(st.integers(0, 96), max_size=40))
def test_any_prompts_are_answered_or_refused(llama, prompts, n, temperature, top_k, top_p, stop_ids):
    try:
        got = sample(llama, prompts, max_new_tokens=n, temperature=temperature, top_k=top_k, top_p=top_p, stop_ids=stop_ids)
        assert len(got) == len(prompts)
        for response in got:
            assert len(response) == n or (0 < len(response) < n and response[-1] in stop_ids)
            assert not {*response[:-1]} & {*stop_ids} and all(0 <= t < 97 for t in response)
        ENDED["sample: answered"] += 1
    except ValueError as e:
        assert is_one_line(str(e))
        ENDED["sample: refused in one line"] += 1


@pytest.fixture(scope="module")
def llama():
    return build_model("Llama")


# --- flags ---

FLAGS = [(program, action) for program in (msd, eval_program, sample_program) for action in program.build_parser()._actions
         if action.option_strings and action.dest not in ("help",)]
VALUES = st.one_of(st.sampled_from(["", " ", "0", "1", "2", "-1", "nan", "inf", "1e400", "9" * 30, "auto", "cpu", "jv",
                                    "en,jv", ",", "--", "/dev/null", "/", "\x1b[31m", "jv=/dev/null", "none", "on",
                                    "float32", "data/tiny", "💥"]),
                   st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12), st.integers(-3, 99).map(str),
                   st.floats().map(str))


@fuzz(60)
@given(flag=st.sampled_from(FLAGS), value=VALUES)
def test_any_value_of_any_flag_is_taken_or_costs_one_line(tmp_path_factory, flag, value):
    program, action = flag
    out = tmp_path_factory.mktemp("flags")
    base = {msd: ["--lang", "jv", "--batch-size", "2", "--max-new-tokens", "2", "--steps", "1", "--eval-limit", "1",
                  "--preflight", "1", "--out", str(out / "o"), "--plan"],
            eval_program: ["--lang", "jv", "--limit", "1", "--max-new-tokens", "2"],
            sample_program: ["--prompt", "Piye?", "--lang", "jv", "--query-en", "How?", "--max-new-tokens", "2"]}[program]
    argv = [*base, action.option_strings[-1] + f"={value}" * (action.nargs != 0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        for name in ("data", "eval.py"):  # what relative paths find in a clone
            (out / name).symlink_to(ROOT / name)
        patch.setattr("sys.stdin", open(os.devnull))
        patch.setattr("sys.stderr", err := open(out / "err", "w+", encoding="utf-8"))
        patch.setattr("sys.stdout", open(os.devnull, "w"))
        try:
            program.build_parser().run(program.main, argv)
            ENDED[f"{program.__name__}.py, flags: ran"] += 1
        except SystemExit as stop:
            err.seek(0)
            told = [x for x in err.read().split("\n") if x and "rows read" not in x and "note:" not in x]
            if stop.code == 0:
                return
            assert stop.code == 2 and len(told) == 1 and is_one_line(told[0])
            assert f"{program.__name__}.py: error:" in told[0]
            ENDED[f"{program.__name__}.py, flags: one line and exit code 2"] += 1
