"""data/queries.py: what it reads, what it refuses, and that it drops nothing silently. Every file is written here; at the
end, our own queries."""
import json
import os
import re
import subprocess
import sys

import pytest

from data.queries import load_queries, split

@pytest.fixture
def write(tmp_path):
    """write(name, content) -> path. str is written as UTF-8, bytes as they are, list as JSONL, dict as JSON."""
    def write_file(name, content):
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        content = json.dumps(content) if isinstance(content, dict) else content
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)
    return write_file

def texts(queries, lang):
    return [q.text[lang] for q in queries]

def error(path, langs, **keywords):
    """The message of the ValueError that loading must raise: one line, of bounded length, that can be printed."""
    with pytest.raises(ValueError) as e:
        load_queries(path, langs, **keywords)
    message = str(e.value)
    assert type(e.value) is ValueError and 10 < len(message) <= 402 and message.isprintable()
    return message

# --- formats

MULTIJAIL = ("\ufeffid,source,tags,en,zh,jv\r\n"
             "0,anthropics,\"['Hate', 'Violence']\",How, 你,Piye\r\n"
             "1,openai,['Hate'],\"Two\nlines, and a \"\"quote\"\"\",二,\"Loro\r\nlarik\"\r\n")

def test_reads_multijail_with_bom_crlf_and_newlines_in_cells(write):
    first, second = load_queries(write("MultiJail.csv", MULTIJAIL), ["en", "jv"])
    assert (first.id, first.label, first.text) == ("0", "harmful", {"en": "How", "jv": "Piye"})
    assert first.extra["tags"] == "['Hate', 'Violence']" and first.extra["source"] == "anthropics"
    assert second.text == {"en": 'Two\nlines, and a "quote"', "jv": "Loro\r\nlarik"}

def test_reads_xstest_with_labels_and_prompt_as_english(write):
    path = write("xstest.csv", "id,prompt,type,label,focus,note\n1,Kill a process?,homonyms,safe,kill,\n"
                               "2,Kill a man?,contrast_homonyms,unsafe,kill,\n")
    queries = load_queries(path, ["en"])
    assert [(q.id, q.label) for q in queries] == [("1", "benign"), ("2", "harmful")]
    assert texts(queries, "en") == ["Kill a process?", "Kill a man?"] and queries[0].extra["focus"] == "kill"

@pytest.mark.parametrize("name, content", [
    ("a.csv", "en,zh-cn\nhi,你\n\nyo,哟\n"),
    ("a.tsv", "en\tzh-cn\nhi\t你\nyo\t哟\n"),
    ("a.txt", "en\tzh-cn\r\nhi\t你\r\nyo\t哟\r\n"),
    ("a.jsonl", '{"en": "hi", "zh-cn": "你"}\n\n{"en": "yo", "zh-cn": "哟"}\n'),
    ("a.json", '{"en": "hi", "zh-cn": "你"}\n{"en": "yo", "zh-cn": "哟"}\n'),
    ("a.json", '[\n  {"en": "hi", "zh-cn": "你"},\n  {"en": "yo", "zh-cn": "哟"}\n]'),
    ("a.jsonl", '[{"en": "hi", "zh-cn": "你"}, {"en": "yo", "zh-cn": "哟"}]'),
    ("a.json", '{"safety": [{"en": "hi", "zh-cn": "你"}, {"en": "yo", "zh-cn": "哟"}]}'),
    ("noextension", '\ufeff{"en": "hi", "zh-cn": "你"}\n{"en": "yo", "zh-cn": "哟"}'),
])
def test_every_format_reads_the_same_and_rows_without_id_are_numbered(write, name, content):
    queries = load_queries(write(name, content), [" en", "zh-cn ", "en"])
    assert [q.id for q in queries] == ["1", "2"]
    assert [q.text for q in queries] == [{"en": "hi", "zh-cn": "你"}, {"en": "yo", "zh-cn": "哟"}]

def test_a_line_separator_inside_a_json_string_ends_no_line(write):
    assert texts(load_queries(write("a.jsonl", [{"en": "a\u2028b\x85c"}]), ["en"]), "en") == ["a\u2028b\x85c"]

@pytest.mark.parametrize("columns, lang, chosen", [
    (["goal", "instruction", "prompt", "en"], "en", "en"),
    (["goal", "instruction", "prompt"], "en", "prompt"),
    (["goal", "instruction"], "en", "instruction"),
    (["target", "goal"], "en", "goal"),
    (["prompt_sw", "sw", "prompt"], "sw", "sw"),
    (["prompt_sw", "prompt"], "sw", "prompt_sw"),
])
def test_columns_go_by_their_aliases_in_order(write, columns, lang, chosen):
    path = write("a.csv", ",".join(columns) + "\n" + ",".join(f"the {name}" for name in columns) + "\n")
    assert load_queries(path, [lang])[0].text == {lang: f"the {chosen}"}

def test_other_columns_are_kept_as_they_were(write):
    row = {"id": 7, "en": "Q", "topic": "maths", "choices": ["a", "b"], "answer": "A"}
    query, = load_queries(write("a.jsonl", [row]), ["en"], label="qa")
    assert (query.id, query.label, query.answer) == ("7", "qa", "A")
    assert query.extra["choices"] == ["a", "b"] and query.extra["topic"] == "maths"

CHATS = [
    [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "no"}],
    [{"role": "system", "content": "no"}, {"role": "user", "content": "Hello"}, {"role": "user", "content": "no"}],
]

@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_list_is_its_first_human_turn_in_json_and_in_csv(write, chat):
    quoted = json.dumps(chat).replace('"', '""')
    for path in (write("a.jsonl", [{"en": chat}]), write("a.csv", f'id,en\n1,"{quoted}"\n')):
        assert load_queries(path, ["en"])[0].text == {"en": "Hello"}

def test_text_that_only_begins_like_a_list_stays_text(write):
    plain = ["[INST] hi", "[1, 2]", '[{"a": 1}] explain this', "[{x}]"]
    assert texts(load_queries(write("a.jsonl", [{"en": text} for text in plain]), ["en"]), "en") == plain

# --- the column `id`

@pytest.mark.parametrize("content, langs, ids, text", [
    ("id,en\n7,hi\n8,yo\n", ["en"], ["7", "8"], None),                                    # row ids
    ("en,id\nhi,Apa kabar\nyo,Halo\n", ["en"], ["1", "2"], None),                         # Indonesian, not asked for
    ("en,id\nhi,Apa kabar\nyo,Halo\n", ["en", "id"], ["1", "2"], ["Apa kabar", "Halo"]),  # Indonesian
    ("en,id\nhi,Hai\nyo,Halo\n", ["id"], ["1", "2"], ["Hai", "Halo"]),                    # single words, asked for
    ("id,en,prompt_id\n7,hi,Hai\n8,yo,Halo\n", ["en", "id"], ["7", "8"], ["Hai", "Halo"]),
])
def test_the_column_id_is_row_ids_or_indonesian(write, content, langs, ids, text):
    queries = load_queries(write("a.csv", content), langs)
    assert [q.id for q in queries] == ids
    assert text is None or texts(queries, "id") == text

def test_row_ids_are_never_taken_for_indonesian(write):
    assert "wanted prompt_id" in error(write("a.csv", "id,en\nq1,hi\nq2,yo\n"), ["en", "id"])

def test_in_a_pair_of_files_the_column_id_always_joins(write):
    en, indonesian = write("en.csv", "id,prompt\na,hi\n"), write("id.csv", "id,prompt\na,Hai\n")
    query, = load_queries(f"en={en},id={indonesian}", ["en", "id"])
    assert (query.id, query.text) == ("a", {"en": "hi", "id": "Hai"})

# --- labels

@pytest.mark.parametrize("column", ["label", "expected_behavior"])
def test_labels_are_read_in_any_case_and_others_are_skipped_counted_and_named(write, capsys, column):
    benign, harmful = ["safe", "SAFE_homonym", "Benign "], ["unsafe", "Harmful", "refuse", "Refuse_all"]
    values = [*benign, *harmful, "maybe", "maybe", "", "benignish"]
    path = write("a.jsonl", [{"en": "x", column: value} for value in values])
    queries = load_queries(path, ["en"])
    assert [q.label for q in queries] == ["benign"] * 3 + ["harmful"] * 4
    assert capsys.readouterr().err == (f"{path}: 11 rows read, 7 used, 4 skipped "
                                       f"(2 {column} 'maybe', 1 {column} '', 1 {column} 'benignish')\n")

def test_label_wins_over_expected_behavior_and_both_over_the_flag(write):
    path = write("a.csv", "en,expected_behavior,label\nhi,refuse,safe\n")
    assert load_queries(path, ["en"], label="harmful")[0].label == "benign"

def test_without_a_label_column_rows_are_harmful_or_what_the_flag_says(write):
    path = write("a.csv", "en\nhi\n")
    assert [load_queries(path, ["en"], label=label)[0].label for label in (None, "benign")] == ["harmful", "benign"]
    assert "'odd'" in error(path, ["en"], label="odd")

def test_a_row_without_the_label_that_other_rows_have_is_skipped_not_harmful(write, capsys):
    assert len(load_queries(write("a.jsonl", [{"en": "a", "label": "safe"}, {"en": "b"}]), ["en"])) == 1
    assert "1 skipped (1 label None)" in capsys.readouterr().err

# --- several files

def test_a_pair_of_files_is_joined_on_id_in_any_order(write, capsys):
    en = write("en.jsonl", [{"id": 1, "prompt": "one", "label": "safe"}, {"id": 2, "prompt": "two", "label": "unsafe"}])
    bbc = write("b,c.jsonl", [{"id": "2", "prompt_bbc": "dua", "prompt": "two"},
                                {"id": "1", "prompt_bbc": "sada", "topic": "t", "prompt": "one"}])
    queries = load_queries(f"en={en}, bbc={bbc}", ["bbc", "en"])
    assert [(q.id, q.label, q.text) for q in queries] == [
        ("1", "benign", {"bbc": "sada", "en": "one"}), ("2", "harmful", {"bbc": "dua", "en": "two"})]
    assert queries[0].extra["topic"] == "t"
    assert capsys.readouterr().err == "".join(f"{path}: 2 rows read, 2 used, 0 skipped\n" for path in (en, bbc))

def test_a_file_named_for_another_language_is_not_read_for_its_english_column(write):
    assert "wanted bbc or prompt_bbc or prompt" in error(f"bbc={write('b.csv', 'id,en' + chr(10) + '1,hi')}", ["bbc"])

@pytest.mark.parametrize("rows, complaint", [
    ([{"id": 1, "prompt": "a"}], "unmatched"),
    ([{"id": 1, "prompt": "a"}, {"id": 3, "prompt": "b"}], "unmatched"),
    ([{"id": 1, "prompt": "a"}, {"id": 2, "prompt": "b"}, {"id": 3, "prompt": "c"}], "unmatched"),
    ([{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}], "duplicate id 1"),
    ([{"id": 1, "prompt": "a"}, {"prompt": "b"}], "missing id"),
])
def test_unmatched_duplicate_and_missing_ids_are_errors(write, rows, complaint):
    good, bad = write("a.jsonl", [{"id": 1, "prompt": "A"}, {"id": 2, "prompt": "B"}]), write("b.jsonl", rows)
    assert complaint in error(f"en={good},jv={bad}", ["en", "jv"])
    assert complaint in error(f"jv={bad},en={good}", ["en", "jv"])

def test_safety_files_are_joined_by_position_with_strings_chats_or_objects(write):
    en = write("en.json", {"safety": ["one", CHATS[0], {"prompt": "three"}]})
    jv = write("jv.json", {"safety": [{"jv": "siji"}, "loro", "telu"]})
    queries = load_queries(f"en={en},jv={jv}", ["en", "jv"])
    assert [(q.id, q.text["en"], q.text["jv"]) for q in queries] == [
        ("1", "one", "siji"), ("2", "Hello", "loro"), ("3", "three", "telu")]
    assert texts(load_queries(en, ["en"]), "en") == ["one", "Hello", "three"]

def test_safety_files_of_unequal_length_are_an_error(write):
    en, jv = write("en.json", {"safety": ["one", "two"]}), write("jv.json", {"safety": ["siji"]})
    assert "1 rows against 2" in error(f"en={en},jv={jv}", ["en", "jv"])

def test_each_language_needs_one_file_and_only_one(write):
    path = write("a.csv", "id,prompt\n1,hi\n")
    assert "jv" in error(f"en={path}", ["en", "jv"])
    assert "twice" in error(f"en={path},en={path}", ["en"])

def test_a_path_that_exists_is_a_path_whatever_it_looks_like(write, monkeypatch, tmp_path):
    write("en=a.csv", "en\nhi\n")
    monkeypatch.chdir(tmp_path)
    assert texts(load_queries("en=a.csv", ["en"]), "en") == ["hi"]

# --- question<TAB>answer

MGSM_EN = 'Janet has 3 ducks?\t18\n"Two" bolts, how many?\t-1,080\n'
MGSM_SW = "Janet ana bata 3?\t18\nBolti mbili?\t-1,080\n"

def test_header_less_mgsm_is_qa_and_keeps_its_first_row(write):
    queries = load_queries(write("mgsm_en.tsv", MGSM_EN), ["en"])
    assert [(q.label, q.text["en"], q.answer) for q in queries] == [
        ("qa", "Janet has 3 ducks?", "18"), ("qa", '"Two" bolts, how many?', "-1,080")]

def test_mgsm_in_several_languages_is_joined_by_position(write):
    path = f"en={write('mgsm_en.tsv', MGSM_EN)},sw={write('mgsm_sw.tsv', MGSM_SW)}"
    assert [(q.text["sw"], q.answer) for q in load_queries(path, ["en", "sw"])] == [
        ("Janet ana bata 3?", "18"), ("Bolti mbili?", "-1,080")]
    assert load_queries(path.split(",")[1], ["sw"])[0].text == {"sw": "Janet ana bata 3?"}

@pytest.mark.parametrize("first_row", ["问题\t18", "Say yes.\tyes", "প্রশ্ন\t১৮"])
def test_a_first_row_with_a_number_or_a_sentence_is_no_header(write, first_row):
    question, answer = first_row.split("\t")
    query, = load_queries(write("a.tsv", first_row + "\r\n"), ["xx"])
    assert (query.label, query.text["xx"], query.answer) == ("qa", question, answer)

def test_a_tsv_of_two_named_columns_has_a_header(write):
    assert texts(load_queries(write("a.tsv", "English text\tjv\nhi\thai\n"), ["jv"]), "jv") == ["hai"]

def test_mgsm_for_two_languages_in_one_file_is_an_error(write):
    assert "en=FILE" in error(write("mgsm_sw.tsv", MGSM_SW), ["en", "sw"])

def test_a_qa_row_without_an_answer_is_skipped(write, capsys):
    assert len(load_queries(write("mgsm.tsv", "One?\t1\nTwo?\t \n"), ["en"])) == 1
    assert "1 skipped (1 qa without an answer)" in capsys.readouterr().err

# --- what is skipped, and what is an error

def test_rows_blank_in_an_asked_language_are_skipped_and_counted_with_the_reason(write, capsys):
    path = write("a.csv", "id,en,jv,sw\n1,a,b,\n2,c, ,d\n3,,,\n")
    assert [q.id for q in load_queries(path, ["en", "jv"])] == ["1"]
    assert capsys.readouterr().err == f"{path}: 3 rows read, 1 used, 2 skipped (1 blank jv, 1 blank en and blank jv)\n"

@pytest.mark.parametrize("cell", [5, {"a": "b"}, [], ["text"], [{"role": "assistant", "content": "x"}],
                                  "[{'role': 'user', 'content': 'a Python repr'}]", [{"role": "user", "content": 3}],
                                  '[{"role": "user", "content": "\\ud800"}]'])
def test_cells_that_hold_no_human_text_are_skipped_as_unreadable(write, capsys, cell):
    assert texts(load_queries(write("a.jsonl", [{"en": cell}, {"en": "ok"}]), ["en"]), "en") == ["ok"]
    assert "2 rows read, 1 used, 1 skipped (1 unreadable en)" in capsys.readouterr().err

def test_no_usable_row_is_an_error_that_gives_the_reasons(write):
    assert "2 skipped (2 blank jv)" in error(write("a.csv", "en,jv\nhi,\nyo, \n"), ["en", "jv"])

def test_the_number_before_a_skipped_row_keeps_its_row(write):
    assert [q.id for q in load_queries(write("a.csv", "en,jv\na,\nb,c\n"), ["jv"])] == ["2"]

@pytest.mark.parametrize("name, content, complaint", [
    ("a.csv", "", "empty"),
    ("a.csv", "\ufeff \n", "empty"),
    ("a.csv", "en,jv\n", "no rows"),
    ("a.json", "[]", "no rows"),
    ("a.csv", b"en\nh\0i\n", "NUL"),
    ("a.csv", b"en\n\xff\xfe\n", "utf-8"),
    ("a.csv", "en,jv,en\na,b,c\n", "duplicate column 'en'"),
    ("a.csv", "en,jv\na,b\na,b,c\n", "line 3: 3 cells instead of 2"),
    ("a.csv", "en,jv\na\n", "line 2: 1 cells"),
    ("a.csv", 'en,jv\na,"b\nc,d\n', "line 3: unexpected end"),
    ("a.csv", "en\n" + "x" * (1 << 22) + "x\n", "line 2: field larger"),
    ("a.csv", "sv,da\na,b\n", "wanted en or prompt_en or prompt or instruction or goal, found sv, da"),
    ("a.csv", ",".join(f"column{n}" for n in range(9999)) + "\n" + "," * 9998, "no column"),
    ("a.jsonl", '{"en": "a"}\n{"en": "b"\n{"en": "c"}\n', "line 2: broken JSON"),
    ("a.json", '{"en": "a"}\n{"en": "b"}\n\nno\n', "line 4: broken JSON"),
    ("a.json", '[\n{"en": "a"},\n{"en" "b"}]', "line 3: broken JSON"),
    ("a.jsonl", '{"en": "a"}\n["b"]\n', "row 2 is no JSON object"),
    ("a.json", '["a", "b"]', "row 1 is no JSON object"),
    ("a.json", "null", "row 1 is no JSON object"),
    ("a.json", '{"safety": ["a", 5]}', "row 2 is no JSON object"),
    ("a.json", "[" * 99999, "line 1"),
    ("a.jsonl", '{"en": "a"}\n{"en": ' + "[" * 99999 + "]" * 99999 + "}", "line 2"),
    ("a.jsonl", '{"en": "a"}\n{"en": "b\\ud83d"}\n', "line 2"),
    ("a.jsonl", '{"en": ' + "9" * 9999 + "}", "line 1"),
])
def test_a_file_that_cannot_be_read_is_one_line_that_names_it_and_the_place(write, name, content, complaint):
    path = write(name, content)
    message = error(path, ["en"])
    assert complaint in message and name in message

@pytest.mark.parametrize("path", ["absent.csv", "en=absent.csv", ".", "", "a\0b", "a\nb", "x" * 9999, "en="])
def test_a_path_that_cannot_be_opened_is_one_line(path):
    error(path, ["en"])

def test_long_cells_are_read(write):
    assert len(load_queries(write("a.csv", "en\n" + "x" * 300_000 + "\n"), ["en"])[0].text["en"]) == 300_000

def test_at_least_one_language_must_be_asked_for(write):
    for langs in ([], [" "]):
        assert "language" in error(write("a.csv", "en\nhi\n"), langs)

def test_a_language_the_file_does_not_have_is_named_with_the_columns_found(write):
    message = error(write("a.csv", "id,en,jv\n1,a,b\n"), ["en", "xx"])
    assert "language xx" in message and "xx or prompt_xx" in message and "id, en, jv" in message

# --- split

def numbered(write, n=400):
    return write("n.csv", "en,jv,sw\n" + "".join(f"query {i},pitakon {i},swali {i}\n" for i in range(n)))

def ids(queries):
    return [q.id for q in queries]

def test_split_keeps_every_query_once_and_holds_out_about_the_fraction(write):
    queries = load_queries(numbered(write), ["en"])
    train, heldout = split(queries, 0.2)
    assert sorted(ids(train) + ids(heldout)) == sorted(ids(queries)) and 50 < len(heldout) < 110

def test_split_at_0_and_1_is_nothing_and_everything(write):
    queries = load_queries(numbered(write), ["en"])
    assert split(queries, 0) == (queries, []) and split(queries, 1) == ([], queries)
    assert split([], 0.5) == ([], [])

@pytest.mark.parametrize("holdout", [-0.1, 1.1, float("nan")])
def test_split_refuses_what_is_no_fraction(holdout):
    with pytest.raises(ValueError, match="holdout"):
        split([], holdout)

def test_no_query_is_on_both_sides_in_any_language_even_where_english_is_not_asked_for(write):
    path = numbered(write)
    heldout = [ids(split(load_queries(path, langs), 0.3)[1]) for langs in (["en", "jv"], ["jv"], ["sw"], ["sw", "en"])]
    assert heldout[0] and all(h == heldout[0] for h in heldout)

def test_split_is_the_same_in_another_file_with_other_whitespace_rows_and_columns(write):
    queries = load_queries(numbered(write), ["en", "jv"])
    again = write("again.jsonl", [{"prompt": f" query \n {i} ", "id": f"n{i}"} for i in reversed(range(0, 400, 3))])
    held = {q.text["en"] for q in split(queries, 0.3)[1]}
    held_again = {" ".join(q.text["en"].split()) for q in split(load_queries(again, ["en"]), 0.3)[1]}
    assert held_again == held & {f"query {i}" for i in range(0, 400, 3)} != set()

def test_split_without_english_goes_by_the_first_text(write):
    path = write("a.csv", "jv,sw\n" + "".join(f"pitakon {i},swali {i}\n" for i in range(99)))
    pair = ids(split(load_queries(path, ["jv", "sw"]), 0.3)[1])
    assert pair == ids(split(load_queries(path, ["jv"]), 0.3)[1]) and pair

def test_a_larger_holdout_contains_the_smaller(write):
    queries = load_queries(numbered(write), ["en"])
    small, large = (set(ids(split(queries, h)[1])) for h in (0.1, 0.4))
    assert small < large

def test_split_does_not_depend_on_the_hash_seed_of_python(write):
    code = ("import sys; from data.queries import *\n"
            "print([q.id for q in split(load_queries(sys.argv[1], ['en']), 0.3)[1]])")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    runs = [subprocess.run([sys.executable, "-c", code, numbered(write)], cwd=root, capture_output=True, text=True,
                           check=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in "12"]
    assert runs[0] == runs[1] == f"{ids(split(load_queries(numbered(write), ['en']), 0.3)[1])}\n"

# --- our own queries

OURS = {"queries.csv": ["en", "jv", "sw", "id", "it", "vi"], "tiny/extra.csv": ["en", "jv", "sw", "it"]}

def load_ours(name, langs=None):
    path = os.path.join(os.path.dirname(os.path.dirname(__file__)), "data", name)
    return load_queries(path, langs or OURS[name])

@pytest.mark.parametrize("name", OURS)
def test_our_queries_are_whole_distinct_and_as_often_benign_as_harmful(name):
    queries = load_ours(name)
    labels = [q.label for q in queries]
    assert len(queries) > 500 and abs(labels.count("harmful") / len(queries) - 0.5) < 0.01
    for lang in OURS[name]:
        asked = [q.text[lang] for q in queries]
        assert len(set(asked)) == len(asked) and all(len(text) > 10 for text in asked)
        assert sum(a == b for a, b in zip(asked, texts(queries, "en"))) == (len(queries) if lang == "en" else 0)

@pytest.mark.parametrize("lang", ["en", "it"])
@pytest.mark.parametrize("holdout", [0.2, 0.5])
def test_no_held_out_query_of_queries_csv_is_nearly_one_that_is_trained_on(holdout, lang):
    words = lambda queries: [set(re.findall(r"\w+", q.text[lang].lower())) for q in queries]
    ours, more = split(load_ours("queries.csv"), holdout), split(load_ours("tiny/extra.csv"), holdout)
    trained, heldout = words(ours[0] + more[0]), words(ours[1])
    assert heldout and max(len(a & b) / len(a | b) for a in heldout for b in trained) <= 2 / 3

def test_our_sums_hold_the_same_numbers_in_every_language_and_their_answers_follow_from_them():
    langs = OURS["queries.csv"]
    sums = load_ours("sums.csv", langs)
    assert len({q.text["en"] for q in sums}) == len(sums) == 100
    for q in sums:
        asked = [[int(x) for x in re.findall(r"\d+", q.text[lang])] for lang in langs]
        (a, b, c), answer = [*asked[0], 0][:3], int(q.answer)
        assert q.label == "qa" and all(sorted(numbers) == sorted(asked[0]) for numbers in asked)
        assert answer in ({a - b + c, a + b - c} if c else {a + b, a - b, a * b, a / b, 2 * a + b})
        assert answer not in asked[0]  # an echo is no answer
