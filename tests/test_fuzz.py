"""Bad input by the hundred: every one ends in a right answer or in one line.

FUZZ=400 pytest -q tests/test_fuzz.py tries so many inputs a test.
"""
import csv
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import apply_template, build_tokenizer
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import eval as eval_program
import msd
import sample as sample_program
from data.queries import load_queries
from sample import UserError, encode_chat

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames things
UTF8 = st.characters(codec="utf-8", exclude_characters="\0")

fuzz = settings(max_examples=int(os.environ.get("FUZZ", 60)), deadline=None, derandomize=True,
                database=None, suppress_health_check=list(HealthCheck))


def is_one_line(error):
    message = str(error).strip()
    return message and len(message) < 1000 and message.isprintable() and "Traceback" not in message


# --- files ---

def load(path, langs):
    """The queries of a file, or none where it is refused in one line."""
    try:
        queries = load_queries(path, langs)
    except ValueError as error:
        assert is_one_line(error)
        return []
    assert queries
    for query in queries:
        assert all(query.text[lang].strip() for lang in langs)
    return queries


HEADS = [
    b"",
    b"\xef\xbb\xbf",
    b"label,en,jv\nharmful,x,y\nharmful,x,",
    b"en,jv\nx,y\n",
    b"en\tjv\nx\ty\nx\t",
    b"id,language,prompt\n1,en,x\n1,jv,y\n",
    b'{"en": "x", "jv": "y"}\n',
    b'{"safety": [',
    b"[",
]


@fuzz
@given(
    content=st.binary(max_size=300) | st.text(max_size=200).map(str.encode),
    head=st.sampled_from(HEADS),
    ending=st.sampled_from(["csv", "tsv", "json", "txt"]),
    langs=st.sampled_from([["en", "jv"], ["en"], ["jv"]]))
def test_any_bytes_are_queries_or_one_line(tmp_path, content, head, ending, langs):
    path = tmp_path / f"bytes.{ending}"
    path.write_bytes(head + content)
    load(path, langs)


WORDS = ["", " ", "<|im_end|>", "\u202eright to left", "a,b\tc", '"', "'", "\u2028", "=1+1",
         "[{'from': 'human'}]", "x" * 5000]
CELLS = st.sampled_from(WORDS) | st.text(UTF8, max_size=30)
LABELS = {"harmful": "harmful", "safe": "benign"}


@fuzz
@given(
    rows=st.lists(st.tuples(st.sampled_from([*LABELS, "?", ""]), CELLS, CELLS), max_size=6),
    delimiter=st.sampled_from([",", "\t"]))
def test_any_table_that_csv_can_write_is_read_cell_for_cell(tmp_path, rows, delimiter):
    path = tmp_path / ("table.csv" if delimiter == "," else "table.tsv")
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("label", "en", "jv"), *rows])
    want = [(LABELS[label], en, jv) for label, en, jv in rows
            if label in LABELS and en.strip() and jv.strip()
            and not en.startswith("[{") and not jv.startswith("[{")]
    queries = load(path, ["en", "jv"])
    assert [(query.label, query.text["en"], query.text["jv"]) for query in queries] == want


LISTS = st.lists(CELLS, max_size=3) | st.dictionaries(CELLS, CELLS, max_size=2)
VALUES = CELLS | LISTS | st.none() | st.floats()
CHATS = st.sampled_from([
    [{"from": "human", "value": "hi"}],
    [{"role": "user", "content": "hi"}],
    "How?",
])
JSON_ROWS = st.fixed_dictionaries(
    {"en": CHATS | VALUES, "jv": CHATS | VALUES, "label": st.sampled_from([*LABELS, "qa", None])},
    optional={name: VALUES for name in ("id", "answer", "choices", "A", "B")})


@fuzz
@given(rows=st.lists(JSON_ROWS, max_size=4))
def test_any_json_is_queries_or_one_line(tmp_path, rows):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    load(path, ["en", "jv"])


# --- chat templates and tokenizers ---

CONTENT = {
    "text": "{{ m.content }}",
    "stripped": "{{ m.content | trim }}",
    "parts": "{% for part in m.content %}{{ part.text }}{% endfor %}",
    "either": "{% if m.content is string %}{{ m.content }}{% else %}"
              "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}",
    "hidden": "no content",
    "raises": "{{ raise_exception('no such turn') }}",
}
MARKS = [
    "", " ", "\n", "<s>", "<|im_start|>", "<|im_end|>\n", "[INST] ", " [/INST]",
    "<think>\n\n</think>\n\n", "{{ bos_token }}", "{{ eos_token }}",
]
ADDED = ["[INST]", "[/INST]", "<think>", "</think>", "  ", "\n\n", "\n", "<table>"]
PIECES = [*ADDED, "<s>", "</s>", "<|im_start|>", "<|im_end|>", "a", "rain", " ", "{{ x }}", "\0"]
TEXTS = st.lists(st.sampled_from(PIECES) | UTF8, min_size=1, max_size=9).map("".join)


@st.composite
def templates(draw):
    """(a chat template, what it makes of a content), or of None both."""
    kind = draw(st.sampled_from([*CONTENT, None]))
    if kind is None:
        return None, None
    start, opening, middle, closing, answer = draw(st.tuples(*[st.sampled_from(MARKS)] * 5))
    turn = opening + "{{ m.role }}" + middle + CONTENT[kind] + closing
    answer = "{% if add_generation_prompt %}" + answer + "{% endif %}"
    return start + "{% for m in messages %}" + turn + "{% endfor %}" + answer, kind


@st.composite
def tokenizers(draw):
    """Byte-level BPE with any added tokens, special or not, and any BOS and EOS that it adds."""
    tokenizer = build_tokenizer()
    ends = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    bare = tokenizer.backend_tokenizer
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=draw(st.booleans()))
    bare.post_processor = TemplateProcessing(
        single=draw(st.sampled_from(["$A", "<s> $A", "$A </s>", "<s> $A </s>"])),
        special_tokens=ends)
    for name in ("bos_token", "eos_token"):
        if draw(st.booleans()):
            setattr(tokenizer, name, None)
    for text in draw(st.lists(st.sampled_from(ADDED), unique=True)):
        special = bool(text.strip()) and draw(st.booleans())
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)],
                             special_tokens=special)
    return tokenizer


@fuzz
@given(
    tokenizer=tokenizers(),
    template=templates(),
    query=TEXTS,
    plain=st.text("rain?", min_size=1),
    system=st.sampled_from([None, "", "Be brief.", "</s>"]))
def test_any_template_and_tokenizer_equal_the_reference_or_one_line(
        tokenizer, template, query, plain, system):
    tokenizer.chat_template, kind = template
    added = tokenizer.added_tokens_decoder
    try:
        ids = encode_chat(tokenizer, query, system)
    except UserError as error:
        assert is_one_line(error) and kind in ("hidden", "raises")
        return
    assert kind not in ("hidden", "raises")

    def find_special(ids):
        return [i for i in ids if i in added and added[i].special]
    assert find_special(ids) == find_special(encode_chat(tokenizer, plain, system))
    spelled = [token for token in added.values() if token.content in (system or "") + query]
    if not kind or any(token.special or token.content in template[0] for token in spelled):
        squeezed = "".join(tokenizer.decode(ids).split())
        assert "".join(query.split()) in squeezed  # a space more, and nothing less
        return
    turns = [("system", system), ("user", query)]
    if kind == "parts":
        turns = [(role, [{"type": "text", "text": text}]) for role, text in turns]
    assert ids == apply_template(tokenizer, *turns[system is None:])


# --- flags ---

PROGRAMS = {
    msd: "--lang jv --data q.csv --batch-size 2 --steps 1 --max-new-tokens 2 --eval-every 0 "
         "--holdout 0 --overwrite --out o",
    eval_program: "--lang jv --data q.csv --split all --max-new-tokens 2",
    sample_program: "--prompt Piye? --max-new-tokens 2",
}
FLAGS = []
for program in PROGRAMS:
    FLAGS += [(program, action) for action in program.build_parser()._actions[1:]]  # 0: --help
STRINGS = st.sampled_from([
    "", " ", "0", "1", "17", "-1", "1e400", "9" * 30, "auto", "cpu", "jv", "en,jv", ",", "-",
    "/dev/null", "/", "\x1b[31m", "jv=/dev/null", "none", "float32", "💥", "data/tiny",
])


@fuzz
@given(
    flag=st.sampled_from(FLAGS),
    value=STRINGS | st.text(UTF8, max_size=12) | st.floats().map(str))
def test_any_value_of_any_flag_is_taken_or_costs_one_line(
        tmp_path, monkeypatch, capsys, flag, value):
    program, action = flag
    assume(not (action.dest == "out" and value.startswith("/")))
    argument = action.option_strings[0]
    if action.nargs != 0:
        argument += f"={value}"
    name = f"{program.__name__}.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    shutil.rmtree("o", ignore_errors=True)  # an input does not know the one before it
    Path("q.csv").write_text("label,en,jv\nharmful,How?,Piye?\nbenign,Why?,Kena apa?\n")
    capsys.readouterr()
    try:
        program.build_parser().run(program.main, [*PROGRAMS[program].split(), argument])
    except SystemExit as stop:
        told = [line for line in capsys.readouterr().err.split("\n") if f"{name}: " in line]
        assert stop.code == 2 and len(told) == 1 and len(told[0]) < 1000
        assert told[0].startswith(f"{name}: error: ")
