"""Bad input by the hundred: every one ends in a right answer or in one line. FUZZ=400 pytest -q -s
tests/test_fuzz.py tries so many inputs a test, and says how they ended."""
import csv
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import build_model
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import eval as eval_program
import msd
import sample as sample_program
from data.queries import load_queries
from dpsw import dpsw_loss, dpsw_loss_chunked
from sample import UserError, encode_chat, sample, sample_next_token

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames things
ROOT = Path(__file__).parents[1]
ENDED = Counter()


def fuzz(n):
    """How many inputs a test tries: FUZZ, or n."""
    return settings(max_examples=int(os.environ.get("FUZZ", n)), deadline=None, derandomize=True,
                    database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def tell():
    yield
    print(f"\n{ENDED.total()} inputs")
    for name, n in sorted(ENDED.items()):
        print(f"{name}: {n}")


def is_one_line(error):
    message = str(error).strip()
    return message and len(message) < 1000 and message.isprintable() and "Traceback" not in message


# --- files ---

HEADS = [b"", b"label,en,jv\n", b'{"en": "x", "jv": "y"}\n', b"\xef\xbb\xbf", b"[", b"en\tjv\n",
         b"label,en,jv\nharmful,x,y\nharmful,x,", b"en,jv\nx,", b"en\tjv\nx\ty\nx\t",
         b"id,language,prompt\n1,en,x\n1,jv,y\n", b'{"safety": [', b"en,jv\nx,y\n"]


@fuzz(60)
@given(content=st.binary(max_size=300) | st.text(max_size=200).map(str.encode),
       head=st.sampled_from(HEADS), ending=st.sampled_from(["csv", "tsv", "json", "jsonl", "txt"]),
       langs=st.sampled_from([["en", "jv"], ["en"], ["jv"]]))
def test_any_bytes_are_queries_or_one_line(tmp_path_factory, content, head, ending, langs):
    path = tmp_path_factory.getbasetemp() / f"bytes.{ending}"
    path.write_bytes(head + content)
    try:
        queries = load_queries(path, langs)
    except ValueError as error:
        assert is_one_line(error)
        ENDED["a file of any bytes: one line"] += 1
        return
    assert queries
    assert all(query.text[lang].strip() for query in queries for lang in langs)
    ENDED["a file of any bytes: read"] += 1


WORDS = ["", " ", "<|im_end|>", "\u202eright to left", "a,b\tc", '"', "'", "\u2028", "=1+1",
         "[{'from': 'human'}]", "x" * 5000]
CELLS = st.sampled_from(WORDS) | st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
LABELS = {"harmful": "harmful", "unsafe": "harmful", "benign": "benign", "safe": "benign"}


@fuzz(60)
@given(rows=st.lists(st.tuples(st.sampled_from([*LABELS, "?", ""]), CELLS, CELLS), min_size=1,
                     max_size=6), delimiter=st.sampled_from([",", "\t"]))
def test_any_table_that_csv_can_write_is_read_cell_for_cell(tmp_path_factory, rows, delimiter):
    path = tmp_path_factory.getbasetemp() / ("table.csv" if delimiter == "," else "table.tsv")
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("label", "en", "jv"), *rows])
    want = [(LABELS[label], en, jv) for label, en, jv in rows
            if label in LABELS and en.strip() and jv.strip()
            and not en.startswith("[{") and not jv.startswith("[{")]
    try:
        queries = load_queries(path, ["en", "jv"])
    except ValueError as error:
        assert is_one_line(error) and not want
        ENDED["a table: one line"] += 1
        return
    assert [(query.label, query.text["en"], query.text["jv"]) for query in queries] == want
    ENDED["a table: read"] += 1


VALUES_OF_JSON = (
    CELLS | st.none() | st.booleans() | st.integers() | st.floats() | st.lists(CELLS, max_size=3)
    | st.dictionaries(CELLS, CELLS, max_size=2))
CHATS = st.sampled_from([[{"from": "human", "value": "hi"}], [{"role": "user", "content": "hi"}],
                         [{"role": "system", "content": "hi"}], "How?"])
SOME = st.sampled_from(["label", "id", "answer", "choices", "lang", "prompt", "A", "B"])


@fuzz(60)
@given(rows=st.lists(st.builds(
    lambda texts, rest: {**rest, **texts},
    st.fixed_dictionaries({"en": CHATS | VALUES_OF_JSON, "jv": CHATS | VALUES_OF_JSON}),
    st.dictionaries(SOME, VALUES_OF_JSON, max_size=2)), max_size=4))
def test_any_json_is_queries_or_one_line(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    try:
        queries = load_queries(path, ["en", "jv"])
    except ValueError as error:
        assert is_one_line(error)
        ENDED["any JSON: one line"] += 1
        return
    assert all(type(query.text[lang]) is str for query in queries for lang in ("en", "jv"))
    ENDED["any JSON: read"] += 1


MANY = b",".join(b"c%d" % i for i in range(100_000))
HOSTILE = {
    "a cell of 10 MB": b"label,en,jv\nharmful," + b"x" * 10_000_000 + b",y\n",
    "100,000 columns of one name": b",".join([b"c"] * 100_000) + b"\n1\n",
    "100,000 columns": b"label,en,jv," + MANY + b"\nharmful,a,b" + b"," * 100_000,
    "nested 100,000 deep": b'{"en": ' + b"[" * 100_000,
    "mixed encodings": b"label,en,jv\nharmful,\xff\xfe,\x80\n",
    "NUL bytes": b"label,en,jv\nharmful,a\0,b\n",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_read_or_one_line(tmp_path, content):
    (tmp_path / "q.csv").write_bytes(content)
    try:
        [query] = load_queries(tmp_path / "q.csv", ["en", "jv"])
    except ValueError as error:
        assert is_one_line(error)
        return
    assert (query.text["en"][:1], query.text["jv"]) in (("a", "b"), ("x", "y"))


# --- the loss ---

NUMBERS = st.floats(-30, 30) | st.sampled_from([0.0, 1e4, -1e4, -math.inf])


def draw_logits(data, B, T, V):
    """Any logits (B, T, V); a token of which nothing is allowed is no distribution."""
    numbers = data.draw(st.lists(NUMBERS, min_size=B * T * V, max_size=B * T * V))
    logits = torch.tensor(numbers, dtype=torch.float64).reshape(B, T, V)
    logits[logits.isneginf().all(-1)] = 0
    return logits


def diverge_plainly(p, q, divergence, beta):
    """The definition, in float64: p the student's probabilities, q the teacher's."""
    def kl(a, b):
        return torch.where(a > 0, a * (a / b).log(), 0.0).sum(-1)
    if divergence == "jsd":
        mix = beta * q + (1 - beta) * p
        return beta * kl(q, mix) + (1 - beta) * kl(p, mix)
    return kl(p, q) if divergence == "reverse" else kl(q, p)


@fuzz(100)
@given(B=st.integers(1, 3), T=st.integers(0, 3), V=st.integers(1, 9), data=st.data(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
       options=st.fixed_dictionaries({
           "weighting": st.sampled_from(["dpsw", "teacher", "student", "none"]),
           "student_view": st.sampled_from(["teacher", "sampled"]),
           "divergence": st.sampled_from(["reverse", "forward", "jsd"]),
           "beta": st.sampled_from([0.01, 0.3, 0.9]), "top_k": st.integers(1, 12),
           "temperature": st.sampled_from([1.0, 0.3, 7.0]),
           "weight_norm": st.sampled_from(["response", "none"])}))
def test_any_logits_give_the_definition_and_no_nan(B, T, V, data, dtype, options):
    student = draw_logits(data, B, T, V).to(dtype)
    teacher = draw_logits(data, B, T, V).to(dtype)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, V - 1), min_size=B * T, max_size=B * T)),
                       dtype=torch.long).reshape(B, T)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T)),
                        dtype=torch.bool).reshape(B, T)
    student.requires_grad_()
    loss, stats = dpsw_loss(student, teacher, ids, mask, **options)
    loss.backward()
    for x in (loss, student.grad, *stats.values()):
        assert not x.isnan().any()
    for name in ("weight", "w_teacher", "w_student"):
        assert ((0 <= stats[name]) & (stats[name] <= 1)).all()

    same = torch.nn.Identity()
    chunked, _ = dpsw_loss_chunked(student.detach(), teacher, same, same, ids, mask, chunk_size=2,
                                   **options)
    torch.testing.assert_close(chunked, loss.detach(), rtol=1e-4, atol=1e-5)

    p, q = [(x.detach().float().double() / options["temperature"]).softmax(-1)
            for x in (student, teacher)]
    want = diverge_plainly(p, q, options["divergence"], options["beta"])  # (B, T)
    fine = want.isfinite() & (want < 1e3) & mask  # past it float64 has no ratio of the two
    torch.testing.assert_close(stats["divergence"][fine].double(), want[fine], rtol=1e-3, atol=1e-4)
    if (fine == mask).all():
        weight = stats["weight"].double() * mask
        total = 0.0
        for w, d in zip(weight, want):
            if options["weight_norm"] == "none":
                total += (w * d.nan_to_num())[w > 0].sum()
            elif w.sum() > 0:
                total += (w * d.nan_to_num())[w > 0].sum() / w.sum()
        count = mask.sum() if options["weight_norm"] == "none" else mask.any(-1).sum()
        torch.testing.assert_close(loss.double(), torch.as_tensor(total / max(1, count)).double(),
                                   rtol=2e-3, atol=1e-3)
    ENDED["the loss: its definition, no NaN"] += 1


# --- the sampler ---

@fuzz(100)
@given(rows=st.lists(st.lists(NUMBERS, min_size=7, max_size=7), min_size=1, max_size=4),
       temperature=st.sampled_from([0, 1e-3, 1, 50]), top_k=st.integers(0, 9),
       top_p=st.sampled_from([1e-6, 0.5, 0.999, 1.0]))
def test_any_logits_give_a_token_that_the_cuts_allow(rows, temperature, top_k, top_p):
    logits = torch.tensor(rows)
    logits[logits.isneginf().all(-1)] = 0
    generator = torch.Generator().manual_seed(0)
    token = sample_next_token(logits, temperature, top_k, top_p, generator)
    chosen = logits.gather(1, token[:, None])  # (B, 1)
    assert chosen.isfinite().all()
    likelier = (logits > chosen + 1e-4).sum(-1)  # 1e-4: a tie of probabilities is none of logits
    assert (likelier < (top_k or 7)).all()
    if temperature == 0:
        assert (chosen[:, 0] == logits.amax(-1)).all()
    ENDED["a draw: a token that the cuts allow"] += 1


@pytest.fixture(scope="module")
def llama():
    return build_model("Llama")


PROMPTS = st.lists(st.integers(0, 96), min_size=1, max_size=9) | st.sampled_from(
    [[], [5], [5, 6], [5] * 9])


@fuzz(60)
@given(prompts=st.lists(PROMPTS, max_size=5), n=st.sampled_from([1, 2, 3, 4, 5, 5, 5, 0, -1]),
       temperature=st.sampled_from([0, 0, 1, 1, 0.1, 9, 1e-39, -1, math.nan, math.inf]),
       top_k=st.integers(-1, 99), top_p=st.sampled_from([1, 1, 1, 0.9, 0.5, 1e-9, 0, 2]),
       stop_ids=st.lists(st.integers(0, 96), max_size=40))
def test_any_prompts_are_answered_or_one_line(llama, prompts, n, stop_ids, **how):
    try:
        got, logprobs = sample(llama, prompts, max_new_tokens=n, stop_ids=stop_ids,
                               return_logprobs=True, **how)
    except ValueError as error:
        assert is_one_line(error)
        ENDED["sample: one line"] += 1
        return
    assert [*map(len, got)] == [*map(len, logprobs)] and len(got) == len(prompts)
    for response in got:
        stopped = response[-1] in stop_ids
        assert len(response) == n or (len(response) < n and stopped)
        assert not {*response[:-1]} & {*stop_ids} and all(0 <= token < 97 for token in response)
    assert all(logprob <= 1e-6 for row in logprobs for logprob in row)
    ENDED["sample: answered"] += 1


# --- chat templates and tokenizers ---

TURN = "{{% for m in messages %}}{open}{{{{ m.role }}}}{mid}{content}{close}{{% endfor %}}{answer}"
CONTENT = {
    "text": "{{ m.content }}",
    "stripped": "{{ m.content | trim }}",
    "parts": "{% for part in m.content %}{{ part.text }}{% endfor %}",
    "either": "{% if m.content is string %}{{ m.content }}{% else %}"
              "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}",
    "hidden": "no content",
    "raises": "{{ raise_exception('no such turn') }}",
}
MARKS = ["", " ", "\n", "<s>", "</s>", "<|im_start|>", "<|im_end|>\n", "[INST] ", " [/INST]",
         "<think>\n\n</think>\n\n", "{{ bos_token }}", "{{ eos_token }}"]
PIECES = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<think>",
          "</think>", "  ", "\n\n", "\n", "<table>", "a", "rain", " ", "{{ x }}", "é", "💧"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=6),
    min_size=1, max_size=6).map("".join)


@st.composite
def templates(draw):
    """(a chat template or none, what it makes of a content)."""
    if draw(st.integers(0, 5)) == 0:
        return None, None
    kind = draw(st.sampled_from([*CONTENT]))
    marks = {name: draw(st.sampled_from(MARKS)) for name in ("open", "mid", "close")}
    answer = draw(st.sampled_from(MARKS))
    answer = f"{{% if add_generation_prompt %}}{answer}{{% endif %}}"
    start = draw(st.sampled_from(["", "", "{{ bos_token }}"]))
    return start + TURN.format(content=CONTENT[kind], answer=answer, **marks), kind


@st.composite
def tokenizers(draw):
    """Byte-level BPE with any added tokens, special or not, and any BOS and EOS that it adds."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=draw(st.booleans()))
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=draw(st.integers(260, 300)), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"])
    bare.train_from_iterator(["rain and rain, what is the rain?"], trainer)
    single = draw(st.sampled_from(["$A", "<s> $A", "$A </s>", "<s> $A </s>"]))
    bare.post_processor = TemplateProcessing(single=single, special_tokens=[
        ("<s>", bare.token_to_id("<s>")), ("</s>", bare.token_to_id("</s>"))])
    names = {name: token for name, token in (("bos_token", "<s>"), ("eos_token", "</s>"))
             if draw(st.booleans())}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, **names)
    added = draw(st.lists(st.sampled_from(PIECES[3:13]), unique=True))
    for text in added:
        special = bool(text.strip()) and draw(st.booleans())
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)],
                             special_tokens=special)
    return tokenizer


def list_special(tokenizer):
    """{id: text} of the special tokens."""
    return {i: token.content for i, token in tokenizer.added_tokens_decoder.items()
            if token.special}


def apply(tokenizer, system, query, as_parts):
    """What transformers makes of it itself; None where its template fails."""
    turns = [("system", system)] if system else []
    messages = []
    for role, text in [*turns, ("user", query)]:
        content = [{"type": "text", "text": text}] if as_parts else text
        messages.append({"role": role, "content": content})
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                             return_dict=False, enable_thinking=False)
    except Exception:  # a template may raise anything
        return None


@fuzz(120)
@given(tokenizer=tokenizers(), template=templates(), query=TEXTS,
       plain=st.text("rain?", min_size=1),
       system=st.none() | st.sampled_from(["Be brief.", "</s><|im_end|>"]))
def test_any_template_and_tokenizer_equal_the_reference_or_one_line(
        tokenizer, template, query, plain, system):
    tokenizer.chat_template, kind = template
    special = list_special(tokenizer)

    def count(text):
        found = encode_chat(tokenizer, text, system)
        assert found and all(type(i) is int for i in found)
        return found, Counter(i for i in found if i in special)
    try:
        ids, controls = count(query)
    except UserError as error:
        assert is_one_line(error) and kind in ("hidden", "raises")
        ENDED["a chat template: one line"] += 1
        return
    assert kind not in ("hidden", "raises")
    assert controls == count(plain)[1]  # a query spells none
    spelled = [token.content for token in tokenizer.added_tokens_decoder.values()]
    written = tokenizer.chat_template or "User: \nAssistant:"
    text = query + (system or "")
    if tokenizer.chat_template and not any(
            token in text and (token in special.values() or token in written) for token in spelled):
        assert ids == apply(tokenizer, system, query, as_parts=kind == "parts")
        ENDED["a chat template: the reference"] += 1
    else:
        squeezed = "".join(tokenizer.decode(ids).split())
        assert "".join(query.split()) in squeezed  # a space more, and nothing less
        ENDED["a chat template: a query that stays data"] += 1


# --- flags ---

PROGRAMS = [msd, eval_program, sample_program]
FLAGS = [(program, action) for program in PROGRAMS for action in program.build_parser()._actions
         if action.dest != "help"]
VALUES = st.sampled_from(
    ["", " ", "0", "1", "2", "-1", "nan", "inf", "1e400", "9" * 30, "auto", "cpu", "jv", "en,jv",
     ",", "-", "/dev/null", "/", "\x1b[31m", "jv=/dev/null", "none", "on", "float32", "💥",
     "data/tiny"]) | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12) | (
    st.integers(-3, 99).map(str)) | st.floats().map(str)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with a tiny model and a few queries -> (it, the flags of a moment by program)."""
    path = tmp_path_factory.mktemp("clone")
    build_model("Llama", vocab_size=4096, pad_token_id=4092, bos_token_id=None, eos_token_id=4095,
                max_position_embeddings=1024).save_pretrained(path / "m")
    AutoTokenizer.from_pretrained(ROOT / "data" / "tiny").save_pretrained(path / "m")
    (path / "q.csv").write_text("label,en,jv\nharmful,How?,Piye?\nbenign,Why?,Kena apa?\n"
                                "harmful,Where?,Ing endi?\nbenign,Who?,Sapa?\n", encoding="utf-8")
    (path / "data").symlink_to(ROOT / "data")
    argv = {
        msd: ["--lang", "jv", "--model", "m", "--data", "q.csv", "--batch-size", "2",
              "--steps", "1", "--max-new-tokens", "2", "--eval-every", "0", "--holdout", "0",
              "--overwrite", "--out", "o"],
        eval_program: ["--lang", "jv", "--model", "m", "--data", "q.csv", "--split", "all",
                       "--max-new-tokens", "2"],
        sample_program: ["--model", "m", "--prompt", "Piye?", "--max-new-tokens", "2"]}
    return path, argv


@fuzz(60)
@given(flag=st.sampled_from(FLAGS), value=VALUES)
def test_any_value_of_any_flag_is_taken_or_costs_one_line(clone, flag, value):
    path, argv = clone
    program, action = flag
    assume(not (action.dest == "out" and value.startswith("/")))
    given_flag = action.option_strings[0]
    if action.nargs != 0:
        given_flag += f"={value}"
    name = f"{program.__name__}.py"
    shutil.rmtree(path / "o", ignore_errors=True)  # an input does not know the one before it
    with pytest.MonkeyPatch.context() as patch, open(path / "err", "w+", encoding="utf-8") as err:
        patch.chdir(path)
        patch.setattr("sys.stdin", open(os.devnull))
        patch.setattr("sys.stderr", err)
        patch.setattr("sys.stdout", open(os.devnull, "w"))
        try:
            program.build_parser().run(program.main, [*argv[program], given_flag])
            ENDED[f"{name}, a flag: ran"] += 1
        except SystemExit as stop:
            err.seek(0)
            told = [line for line in err.read().split("\n") if f"{name}: " in line]
            assert stop.code == 2 and len(told) == 1 and len(told[0]) < 1000
            assert told[0].startswith(f"{name}: error: ")
            ENDED[f"{name}, a flag: one line"] += 1
