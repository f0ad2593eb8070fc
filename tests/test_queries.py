"""data/queries.py: what it reads, what it refuses, and that it drops nothing silently.

Every file is written here; at the end, our own queries.
"""
import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from data.queries import load_queries, split

ROOT = Path(__file__).parents[1]


@pytest.fixture
def write(tmp_path):
    """write(name, content) -> path. str is written as UTF-8, a list as JSONL, a dict as JSON."""
    def write_file(name, content):
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        if isinstance(content, dict):
            content = json.dumps(content)
        if isinstance(content, str):
            content = content.encode()
        path = tmp_path / name
        path.write_bytes(content)
        return str(path)
    return write_file


def texts(queries, lang):
    return [query.text[lang] for query in queries]


def ids(queries):
    return [query.id for query in queries]


def error(path, langs, **keywords):
    """The message of the ValueError that loading must raise: one bounded line, printable."""
    with pytest.raises(ValueError) as e:
        load_queries(path, langs, **keywords)
    message = str(e.value)
    assert 10 < len(message) <= 402
    assert message.isprintable()
    return message


# --- formats

MULTIJAIL = ("\ufeffid,source,tags,en,zh,jv\r\n"
             "0,web,\"['Hate', 'Violence']\",How, 你,Piye\r\n"
             "1,mail,['Hate'],\"Two\nlines, and a \"\"quote\"\"\",二,\"Loro\r\nlarik\"\r\n")


def test_reads_multijail_with_bom_crlf_and_newlines_in_cells(write):
    first, second = load_queries(write("MultiJail.csv", MULTIJAIL), ["en", "jv"])
    assert (first.id, first.label) == ("0", "harmful")
    assert first.text == {"en": "How", "jv": "Piye"}
    assert first.extra["tags"] == "['Hate', 'Violence']"
    assert second.text == {"en": 'Two\nlines, and a "quote"', "jv": "Loro\r\nlarik"}


@pytest.mark.parametrize("name, content", [
    ("a.csv", "en,zh-cn\nhi,你\n\nyo,哟\n"),
    ("a.csv", "en;zh-cn\nhi;你\nyo;哟\n"),
    ("a.csv", '"EN","ZH-CN"\nhi,你\nyo,哟\n'),
    ("a.csv", "English,prompt_zh-cn\nhi,你\nyo,哟\n"),
    ("a.tsv", "note on it\tEnglish\tzh-cn\n\thi\t你\n\tyo\t哟\n"),
    ("a.tsv", "en\tzh-cn\nhi\t你\nyo\t哟\n"),
    ("a.txt", "en\tzh-cn\r\nhi\t你\r\nyo\t哟\r\n"),
    ("a.jsonl", '{"en": "hi", "zh-cn": "你"}\n\n {"En ": "yo", "zh-cn": "哟"}\n'),
    ("a.json", '{"en": "hi", "zh-cn": "你"}\r\n{"en": "yo", "zh-cn": "哟"}\r\n'),
    ("a.json", '[\n  {"en": "hi", "zh-cn": "你"},\n  {"en": "yo", "zh-cn": "哟"}\n]'),
    ("a.json", '{"safety": [{"en": "hi", "zh-cn": "你"}, {"en": "yo", "zh-cn": "哟"}]}'),
    ("noextension", '\ufeff{"en": "hi", "zh-cn": "你"}\n{"en": "yo", "zh-cn": "哟"}'),
    ("noextension", "en,zh-cn\nhi,你\nyo,哟"),
])
def test_every_format_reads_the_same_and_rows_without_id_are_numbered(write, name, content):
    queries = load_queries(write(name, content), ["en", "zh-cn"])
    assert ids(queries) == ["1", "2"]
    assert [query.text for query in queries] == [{"en": "hi", "zh-cn": "你"},
                                                 {"en": "yo", "zh-cn": "哟"}]


def test_a_line_separator_inside_a_json_string_ends_no_line(write):
    path = write("a.jsonl", [{"en": "a\u2028b\x85c"}, {"en": "d"}])
    assert texts(load_queries(path, ["en"]), "en") == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize("columns, lang, chosen", [
    (["goal", "instruction", "prompt", "en"], "en", "en"),
    (["target", "Goal"], "en", "Goal"),
    (["prompt_sw", "prompt"], "sw", "prompt_sw"),
    (["goal", "instruction", "sw"], "en", None),
    (["en", "English", "sw"], "en", None),
    (["prompt_sw", "sw", "prompt"], "sw", None),
])
def test_columns_go_by_their_aliases_and_two_readings_are_refused(write, columns, lang, chosen):
    cells = ",".join(f"the {name}" for name in columns)
    path = write("a.csv", ",".join(columns) + "\n" + cells + "\n")
    if chosen:
        assert load_queries(path, [lang])[0].text == {lang: f"the {chosen}"}
        return
    with pytest.raises(ValueError, match=f"{columns[0].lower()}, .* may be {lang}"):
        load_queries(path, [lang])


CHATS = [
    [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "no"}],
    [{"role": "system", "content": "no"}, {"role": "user", "content": "Hello"}],
]


@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_list_is_its_first_human_turn_in_json_and_in_csv(write, chat):
    quoted = json.dumps(chat).replace('"', '""')
    for path in (write("a.jsonl", [{"en": chat}]), write("a.csv", f'id,en\n1,"{quoted}"\n')):
        assert texts(load_queries(path, ["en"]), "en") == ["Hello"]


def test_text_that_only_begins_like_a_list_stays_text(write):
    plain = ["[INST] hi", "[1, 2]", '[{"a": 1}] explain this', "[{x}]"]
    path = write("a.jsonl", [{"en": text} for text in plain])
    assert texts(load_queries(path, ["en"]), "en") == plain


# --- the column `id`

@pytest.mark.parametrize("content, langs, row_ids, text", [
    ("id,en\n7,hi\n8,yo\n", ["en"], ["7", "8"], None),
    ("en,id\nhi,Apa kabar\nyo,Halo\n", ["en"], ["1", "2"], None),
    ("en,id\nhi,Apa kabar\nyo,Halo\n", ["en", "id"], ["1", "2"], ["Apa kabar", "Halo"]),
    ("en,id\nhi,Hai\nyo,Halo\n", ["id"], ["1", "2"], ["Hai", "Halo"]),
    ("id,en,prompt_id\n7,hi,Hai\n8,yo,Halo\n", ["en", "id"], ["7", "8"], ["Hai", "Halo"]),
    ("id,Indonesian\n7,Hai\n8,Halo\n", ["id"], ["7", "8"], ["Hai", "Halo"]),
])
def test_the_column_id_is_row_ids_or_indonesian(write, content, langs, row_ids, text):
    queries = load_queries(write("a.csv", content), langs)
    assert ids(queries) == row_ids
    assert text is None or texts(queries, "id") == text


def test_row_ids_are_never_taken_for_indonesian(write):
    assert "language id" in error(write("a.csv", "id,en\nq1,hi\nq2,yo\n"), ["en", "id"])
    path = write("b.csv", "id,en\nrow 1,hi\nrow 2,yo\n")
    assert "language id" in error(path, ["en", "id"])
    assert ids(load_queries(path, ["en"])) == ["row 1", "row 2"]


def test_the_id_that_joins_rows_of_several_languages_is_the_query_s(write):
    path = write("a.csv", "question_id,lang,prompt\nx,en,hi\ny,en,yo\ny,jv,Yo\nx,jv,Hai\n")
    queries = load_queries(path, ["en", "jv"])
    assert [(q.id, q.text["jv"]) for q in queries] == [("x", "Hai"), ("y", "Yo")]


def test_in_a_pair_of_files_the_column_id_always_joins(write):
    en = write("en.csv", "id,prompt\na,hi\n")
    indonesian = write("id.csv", "id,prompt\na,Hai\n")
    query, = load_queries(f"en={en},id={indonesian}", ["en", "id"])
    assert (query.id, query.text) == ("a", {"en": "hi", "id": "Hai"})


# --- a row per language

LONG = [
    {"uid": 1, "prompt_id": "p1", "language": "English", "prompt": "one", "label": "safe"},
    {"uid": 2, "prompt_id": "p2", "language": "en", "prompt": "two", "label": "unsafe"},
    {"uid": 3, "prompt_id": "p2", "language": "Swahili", "prompt": "mbili", "label": "unsafe"},
    {"uid": 4, "prompt_id": "p1", "language": "SW", "prompt": "moja", "label": "safe"},
    {"uid": 5, "prompt_id": "p1", "language": "ru", "prompt": "один", "label": "safe"},
]


def test_a_column_that_names_the_language_gives_rows_of_that_language_only(write, capsys):
    path = write("a.jsonl", LONG)
    assert texts(load_queries(path, ["ru"]), "ru") == ["один"]
    assert texts(load_queries(path, ["en"]), "en") == ["one", "two"]
    assert "language: {'en': 2, 'sw': 2, 'ru': 1}" in capsys.readouterr().err


def test_long_rows_are_joined_on_the_id_that_the_languages_share(write):
    path = write("a.jsonl", LONG)
    queries = load_queries(path, ["sw", "en"])
    assert [query.text for query in queries] == [{"sw": "moja", "en": "one"},
                                                 {"sw": "mbili", "en": "two"}]
    assert [query.label for query in queries] == ["benign", "harmful"]
    assert [query.key for query in load_queries(path, ["sw"])] == ["one", "two"]


def test_long_rows_need_one_shared_id_and_no_more(write):
    one = "uid,lang,prompt\n1,en,hi\n1,sw,hujambo\n"
    assert len(load_queries(write("one.csv", one), ["en", "sw"])) == 1
    two = "id,uid,lang,prompt\n1,1,en,hi\n1,1,sw,hujambo\n"
    assert "'id', 'uid'" in error(write("two.csv", two), ["en", "sw"])
    assert "ending in id" in error(write("odd.csv", one + "2,sw,habari\n"), ["en", "sw"])


def test_a_language_that_the_column_does_not_hold_is_an_error_that_says_what_it_holds(write):
    message = error(write("a.jsonl", LONG), ["en", "jv"])
    assert "jv" in message and "ru" in message


# --- a file per language

def test_a_pair_of_files_is_joined_on_id_in_any_order(write, capsys):
    en = write("en.csv", "id,prompt,label\n1,one,safe\n2,two,unsafe\n")
    bbc = write("b,c.jsonl", [{"id": 2, "prompt_bbc": "dua", "prompt": "two"},
                              {"id": 1, "prompt_bbc": "sada", "prompt": "one", "topic": "t"}])
    queries = load_queries(f"en={en}, bbc={bbc}", ["bbc", "en"])
    assert texts(queries, "en") == ["one", "two"]
    assert texts(queries, "bbc") == ["sada", "dua"]
    assert [query.label for query in queries] == ["benign", "harmful"]
    assert (ids(queries), queries[0].extra["topic"]) == (["1", "2"], "t")
    assert "joined on id" in capsys.readouterr().err


@pytest.mark.parametrize("rows, complaint", [
    ([{"id": 1, "prompt": "a"}], "[2, 1]"),
    ([{"id": 1, "prompt": "a"}, {"id": 3, "prompt": "b"}], "unmatched"),
    ([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}], "[2, 3]"),
])
def test_files_whose_rows_do_not_match_are_an_error(write, rows, complaint):
    good = write("a.jsonl", [{"id": 1, "prompt": "A"}, {"id": 2, "prompt": "B"}])
    assert complaint in error(f"en={good},jv={write('b.jsonl', rows)}", ["en", "jv"])


@pytest.mark.parametrize("jv", [
    ["siji", "loro", "telu"],
    [{"jv": "siji"}, {"jv": "loro"}, {"jv": "telu"}],
    {"safety": ["siji", [{"role": "user", "content": "loro"}], {"prompt": "telu"}]},
    {"safety": [{"prompt": "siji"}, {"prompt": "loro"}, {"prompt": "telu"}]},
    '"siji"\r\n"loro"\r\n"telu"\r\n',
])
def test_files_without_ids_are_joined_by_position_and_it_says_so(write, capsys, jv):
    en = write("en.json", {"safety": ["one", "two", "three"]})
    name = "jv.csv" if isinstance(jv, str) else "jv.json"
    queries = load_queries(f"en={en},jv={write(name, jv)}", ["en", "jv"])
    assert ids(queries) == ["1", "2", "3"]
    assert texts(queries, "en") == ["one", "two", "three"]
    assert texts(queries, "jv") == ["siji", "loro", "telu"]
    assert "joined by position" in capsys.readouterr().err


@pytest.mark.parametrize("line", ['{"Prompt": "a", "prompt": "b", "jv": "c"}', '{"en": "a", "en": "b"}'])
def test_a_name_that_a_json_row_holds_twice_is_refused(write, line):
    assert "duplicate" in error(write("a.jsonl", line), ["en"])


def test_names_within_a_cell_are_its_own_matter(write):
    path = write("a.jsonl", [{"en": "a", "meta": {"ID": 1, "id": 2}}])
    assert texts(load_queries(path, ["en"]), "en") == ["a"]


def test_a_query_and_its_other_unicode_form_are_on_one_side_of_the_split(write):
    lines = ["en,it"]
    for i in range(60):
        text = f"Come preparo un caffè numero {i}?"
        for form in ("NFC", "NFD"):
            lines.append(f"{unicodedata.normalize(form, text)},{text}")
    parts = split(load_queries(write("a.csv", "\n".join(lines)), ["en", "it"]), 0.5)
    train, heldout = [{query.text["it"] for query in part} for part in parts]
    assert train and heldout and not train & heldout


def test_a_file_of_one_language_needs_no_ids(write):
    path = write("a.jsonl", [{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}])
    assert texts(load_queries(f"jv={path}", ["jv"]), "jv") == ["a", "b"]


@pytest.mark.parametrize("row, chosen", [
    ({"instruction": "English", "instruction_translated": "Halo"}, "instruction_translated"),
    ({"prompt": "English", "prompt_it": "Ciao"}, "prompt_it"),
    ({"prompt": "English", "Italian": "Ciao"}, "italian"),
    ({"id": 1, "query": "Ciao", "label": "safe"}, "query"),
    ({"en": "English", "goal": "Ciao"}, "goal"),
    ({"prompt": "Ciao", "literal_translation": "English", "language": "Italian"}, "prompt"),
    ({"id": 1, "lang": "it", "text": "Ciao"}, "text"),
])
def test_a_file_named_for_its_language_is_read_in_that_language(write, row, chosen):
    query, = load_queries(f"it={write('a.jsonl', [row])}", ["it"])
    assert query.text["it"] == {name.lower(): cell for name, cell in row.items()}[chosen]


@pytest.mark.parametrize("lang, row", [
    ("it", {"prompt": "English", "translation": "Ciao"}),
    ("it", {"prompt": "Ciao", "goal": "English"}),
    ("it", {"query": "Ciao", "source": "English"}),
    ("en", {"instruction": "Ciao", "instruction_translated": "English"}),
])
def test_where_two_columns_may_be_the_language_both_are_named(write, lang, row):
    message = error(f"{lang}={write('a.jsonl', [row])}", [lang])
    assert all(name in message for name in row)


def test_a_file_named_for_another_language_is_not_read_for_its_english_column(write):
    assert "en" in error(f"bbc={write('b.csv', 'id,en' + chr(10) + '1,hi')}", ["bbc"])
    assert "ru" in error(f"en={write('b.jsonl', LONG[-1:])}", ["en"])


def test_a_column_of_another_files_language_gives_way_to_that_file(write):
    jv = write("jv.csv", "en,prompt\nstale,hai\n")
    assert load_queries(f"jv={jv},en={write('en.txt', 'hi you')}", ["en"])[0].text["en"] == "hi you"


def test_each_language_needs_one_file_and_only_one(write):
    path = write("a.csv", "id,prompt\n1,hi\n")
    assert "jv" in error(f"en={path}", ["en", "jv"])
    assert "twice" in error(f"en={path},en={path}", ["en"])


def test_a_tilde_is_the_home_folder(write, monkeypatch, tmp_path):
    write("a.csv", "en,jv\nhi,hai\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts(load_queries("en=~/a.csv", ["en"]), "en") == ["hi"]


def test_a_path_that_exists_is_a_path_whatever_it_looks_like(write, monkeypatch, tmp_path):
    write("en=a.csv", "en,jv\nhi,hai\n")
    monkeypatch.chdir(tmp_path)
    assert texts(load_queries("en=a.csv", ["en"]), "en") == ["hi"]


# --- no header

@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "noextension"])
def test_a_query_a_line_is_read_and_its_first_line_is_no_header(write, capsys, name):
    path = write(name, "\ufeffHow do I boil an egg?\r\n\r\nWhere is the sun?\r\n")
    assert ids(load_queries(path, ["en"])) == ["1", "3"]
    assert texts(load_queries(f"sw={path}", ["sw"]), "sw")[0] == "How do I boil an egg?"
    assert "'How do I boil an egg?', is taken for a query" in capsys.readouterr().err


def test_lines_of_text_may_hold_commas_quotes_and_semicolons(write):
    lines = ['"Why", oh why; tell me', "Stop, or not?"]
    assert texts(load_queries(write("a.txt", "\n".join(lines)), ["en"]), "en") == lines


@pytest.mark.parametrize("lang, first", [("en", "Prompt"), ("en", "goal"), ("jv", "Javanese"),
                                         ("jv", "prompt_jv"), ("bbc", "bbc"), ("id", "id")])
def test_the_name_of_a_column_is_taken_for_one_and_it_says_so(write, capsys, lang, first):
    path = write("a.csv", f"{first}\nA text.\n")
    assert texts(load_queries(f"{lang}={path}", [lang]), lang) == ["A text."]
    assert f"'{first}', is taken for the column's name" in capsys.readouterr().err


def test_a_header_that_names_another_language_is_an_error(write):
    assert "sw" in error(f"jv={write('a.csv', 'sw' + chr(10) + 'Habari yako')}", ["jv"])


def test_empty_columns_and_blank_rows_do_not_move_the_rows(write):
    en = write("en.csv", '"One, two",,\nThree,,\nFour,,\n')
    ru = write("ru.csv", 'Раз\n""\nЧетыре\n')
    queries = load_queries(f"en={en},ru={ru}", ["en", "ru"])
    assert texts(queries, "en") == ["One, two", "Four"]
    assert texts(queries, "ru") == ["Раз", "Четыре"]


def test_a_file_without_a_header_is_of_one_language(write):
    assert "en=FILE" in error(write("a.txt", "A text.\n"), ["en", "sw"])


MGSM_EN = 'Janet has 3 ducks?\t18\n"Two" bolts, how many?\t-1,080\n'
MGSM_SW = "Janet ana bata 3?\t18\nBolti mbili?\t-1,080\n"


def test_header_less_mgsm_is_qa_and_keeps_its_first_row(write):
    queries = load_queries(write("mgsm_en.tsv", MGSM_EN), ["en"])
    assert [query.label for query in queries] == ["qa", "qa"]
    assert texts(queries, "en") == ["Janet has 3 ducks?", '"Two" bolts, how many?']
    assert [query.answer for query in queries] == ["18", "-1,080"]


def test_mgsm_in_several_languages_is_joined_by_position(write):
    path = f"en={write('mgsm_en.tsv', MGSM_EN)},sw={write('mgsm_sw.tsv', MGSM_SW)}"
    queries = load_queries(path, ["en", "sw"])
    assert texts(queries, "sw") == ["Janet ana bata 3?", "Bolti mbili?"]
    assert queries[1].answer == "-1,080"


@pytest.mark.parametrize("first_row", ["问题\t18", "Say yes.\tyes", "প্রশ্ন\t১৮"])
def test_a_first_row_with_a_number_or_a_sentence_is_no_header(write, first_row):
    query, = load_queries(write("a.tsv", first_row + "\r\n"), ["xx"])
    assert [query.text["xx"], query.answer] == first_row.split("\t")


# --- labels

@pytest.mark.parametrize("column", ["label", "Expected_Behavior"])
def test_labels_are_read_in_any_case_and_others_are_skipped_counted_and_named(
        write, capsys, column):
    values = ["safe", "SAFE_homonym", "Benign ", "unsafe", "Refuse_all", "maybe", "maybe", None]
    path = write("a.jsonl", [{"en": "x", column: value} for value in values])
    labels = [query.label for query in load_queries(path, ["en"], label="mixed")]
    assert labels == ["benign"] * 3 + ["harmful"] * 2
    column = column.lower()
    assert capsys.readouterr().err == (f"{path}: 8 rows read, 5 used, 3 skipped "
                                       f"(2 {column} 'maybe', 1 {column} None)\n")


def test_label_wins_over_expected_behavior_and_both_over_the_flag(write):
    path = write("a.csv", "en,expected_behavior,label\nhi,refuse,safe\n")
    assert load_queries(path, ["en"], label="harmful")[0].label == "benign"


@pytest.mark.parametrize("flag, label", [(None, "harmful"), ("benign", "benign"),
                                         ("mixed", "mixed"), ("harmful", "harmful")])
def test_without_a_label_column_rows_are_harmful_or_what_the_flag_says(write, flag, label):
    assert load_queries(write("a.csv", "en,jv\nhi,hai\n"), ["en"], flag)[0].label == label


def test_what_was_assumed_is_said_with_the_columns_that_may_be_a_label(write, capsys):
    rows = [{"en": f"text {n}", "note": f"n{n}", "binary": n % 2, "expected": "refuse"}
            for n in range(4)]
    load_queries(write("a.jsonl", rows), ["en"])
    told = capsys.readouterr().err
    assert "harmful" in told and "['binary', 'expected']" in told


# --- questions

def test_answers_without_a_label_ask_for_one(write):
    path = write("a.csv", "en,answer\nWhere is Paris?,France\n")
    assert "--label qa" in error(path, ["en"])
    query, = load_queries(path, ["en"], label="qa")
    assert (query.label, query.answer, query.choices) == ("qa", "France", [])


def test_a_qa_row_without_an_answer_is_skipped_and_one_of_0_is_not(write, capsys):
    path = write("a.jsonl", [{"en": "One?", "answer": 0}, {"en": "Two?", "answer": " "}])
    assert load_queries(path, ["en"], label="qa")[0].answer == "0"
    assert "1 skipped (1 qa without an answer)" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [
    {"choices": ["red", 0, "blue"]},
    {"choices": '["red", 0, "blue"]'},
    {"choices": {"text": ["red", 0, "blue"], "label": ["A", "B", "C"]}},
    {"choices": {"text": ["red", 0, "blue"], "label": ["1", "2", "3"]}},
    {"choices": {"A": "red", "B": 0, "C": "blue"}},
    {"A": "red", "B": 0, "C": "blue", "D": ""},
    {"option_a": "red", "option_b": 0, "option_c": "blue", "option_d": None},
    {"Option 1": "red", "Option 2": 0, "Option 3": "blue"},
])
def test_choices_are_read_in_every_form_and_0_is_one(write, columns):
    gold = ["2", "3"] if "1" in str(columns) else ["B", "C"]
    rows = [{"en": "Which?", "answer": answer, **columns} for answer in gold]
    for query, letter in zip(load_queries(write("a.jsonl", rows), ["en"], label="qa"), "BC"):
        assert (query.choices, query.answer) == (["red", "0", "blue"], letter)


@pytest.mark.parametrize("choices", [
    {f"x{i}": f"word {i}" for i in range(40)}, [f"word {i}" for i in range(40)],
    {"label": [f"x{i}" for i in range(40)], "text": [f"word {i}" for i in range(40)]},
    [{"label": f"x{i}", "text": f"word {i}"} for i in range(40)]],
    ids=["names", "list", "lists", "objects"])
def test_more_choices_than_letters_are_skipped_and_told(write, choices):
    rows = [{"en": "Which?", "answer": "x30", "choices": choices},
            {"en": "Why?", "answer": "B", "choices": ["red", "green"]}]
    [query] = load_queries(write("choices.jsonl", rows), ["en"], label="qa")
    assert query.answer == "B"


def ask(write, answers, choices=("red", "green", "blue")):
    """The letters that answers to questions of the same choices are read as."""
    rows = [{"en": "Which?", "answer": answer, "choices": list(choices)} for answer in answers]
    queries = load_queries(write("choices.jsonl", rows), ["en"], label="qa")
    return "".join(query.answer for query in queries)


@pytest.mark.parametrize("answers, letters", [
    (["b", "C"], "BC"),
    (["green", "Blue"], "BC"),
    ([0, 1, 2], "ABC"),
    (["1", "2", "3"], "ABC"),
])
def test_an_answer_is_a_letter_a_text_or_an_index(write, answers, letters):
    assert ask(write, answers) == letters


@pytest.mark.parametrize("answers, choices", [
    ([1, 2], ["red", "green", "blue"]),
    ([1], ["2", "1", "0"]),
    (["A"], ["B", "C", "A"]),
])
def test_answers_with_two_readings_are_refused_and_it_says_how_to_give_them(
        write, answers, choices):
    with pytest.raises(ValueError, match="2 readings .* give letters"):
        ask(write, answers, choices)


def test_an_answer_that_is_no_choice_is_refused_with_its_row(write):
    with pytest.raises(ValueError, match="rows .'2'"):
        ask(write, ["A", "E", "B"])


# --- what is skipped, what is an error, what is told

def test_rows_blank_in_an_asked_language_are_skipped_and_counted(write, capsys):
    path = write("a.csv", "id,en,jv,sw\n1,a,b,\n2,c, ,d\n3,,,\n")
    assert ids(load_queries(path, ["en", "jv"], "mixed")) == ["1"]
    assert capsys.readouterr().err == (f"{path}: 3 rows read, 1 used, 2 skipped (1 without a text "
                                       "in jv, 1 without a text in en and jv)\n")


@pytest.mark.parametrize("cell", [
    5, float("nan"), True, {"a": "b"}, [], ["text"], [{"role": "assistant", "content": "x"}],
    "[{'role': 'user', 'content': 'a Python repr'}]", [{"role": "user", "content": 3}],
    '[{"role": "user", "content": "\\ud800"}]',
])
def test_cells_that_hold_no_human_text_are_skipped(write, capsys, cell):
    path = write("a.jsonl", [{"en": cell}, {"en": "ok"}])
    assert texts(load_queries(path, ["en"]), "en") == ["ok"]
    assert "2 rows read, 1 used, 1 skipped (1 " in capsys.readouterr().err


def test_a_file_is_opened_and_told_once_and_again_when_it_changed(write, capsys, monkeypatch):
    path = write("a.csv", "en,jv\nhi,hai\n")
    load_queries(path, ["en", "jv"])
    told = capsys.readouterr().err
    with monkeypatch.context() as closed:
        closed.setattr("builtins.open", None)
        first, = load_queries(path, ["jv"])
        first.extra["jv"] = first.text["jv"] = "changed"
        assert texts(load_queries(path, ["jv", "en"]), "jv") == ["hai"]
    assert told.count("1 used") == 1
    assert capsys.readouterr().err == ""
    write("a.csv", "en,jv\nhi,hai\nyo,halo\n")
    assert len(load_queries(path, ["jv"])) == 2


@pytest.mark.parametrize("name, content, complaint", [
    ("a.csv", "", "empty"),
    ("a.csv", "\ufeff \n", "no usable row"),
    ("a.csv", "id,en\n1,\n2, \n", "2 skipped (2 without a text in en)"),
    ("a.csv", "en,jv\n\0,b\n", "NUL"),
    ("a.json", "", "JSON"),
    ("a.csv", "en,jv\n", "no rows"),
    ("a.json", "[]", "no rows"),
    ("a.csv", b"en\n\xff\xfe\n", "utf-8"),
    ("a.csv", "en,jv,en\na,b,c\n", "duplicate column"),
    ("a.csv", "en,jv,EN\na,b,c\n", "duplicate column"),
    ("a.csv", "en,jv\na,b\na,b,c\n", "row 2 has 3 cells instead of 2"),
    ("a.csv", "en,jv\nb\na,b\n", "row 1 has 1 cells"),
    ("a.csv", 'en,jv\na,"b\nc,d\n', "line 3: unexpected end"),
    ("a.csv", "en\n" + "x" * (1 << 22) + "x\n", "line 2: field larger"),
    ("a.csv", "sv,da\na,b\n", "language en: found sv, da"),
    ("a.csv", ",".join(f"c{n}" for n in range(9999)) + "\n" + "," * 9998 + "x", "no column"),
    ("a.jsonl", '{"en": "a"}\n\n{"en": "b" "c"}\n', "line 3"),
    ("a.json", '{"en": "a"}\n{"en": "b"}\n\nno\n', "line 4"),
    ("a.json", '[\n{"en": "a"},\n{"en" "b"}]', "line 3"),
    ("a.json", "null", "1 skipped (1 without a text in en)"),
    ("a.json", "[" * 99999, "recursion"),
    ("a.jsonl", '{"en": "a\\ud83d"}\n', "surrogates"),
    ("a.jsonl", '{"en": ' + "9" * 9999 + "}", "integer"),
])
def test_a_file_that_cannot_be_read_is_one_line_that_names_it(write, name, content, complaint):
    message = error(write(name, content), ["en"])
    assert complaint in message and name in message


@pytest.mark.parametrize("path", ["absent.csv", "en=absent.csv", ".", "", "a\0b", "a\nb",
                                  "x" * 9999, "en="])
def test_a_path_that_cannot_be_opened_is_one_line(path):
    error(path, ["en"])


def test_long_cells_are_read(write):
    path = write("a.csv", "en,jv\n" + "x" * 300_000 + ",y\n")
    assert len(load_queries(path, ["en"])[0].text["en"]) == 300_000


def test_a_language_must_be_asked_for_and_a_label_be_known(write):
    path = write("a.csv", "en,jv\nhi,hai\n")
    assert "language" in error(path, [])
    assert "'odd'" in error(path, ["en"], label="odd")


def test_a_language_the_file_does_not_have_is_named_with_the_columns_found(write):
    message = error(write("a.csv", "id,prompt,jv\n1,a,b\n"), ["xx"])
    assert "language xx" in message and "prompt, jv" in message and "xx=FILE" in message


# --- split

def numbered(write, n=400):
    rows = "".join(f"query {i},pitakon {i},swali {i}\n" for i in range(n))
    return write("n.csv", "en,jv,sw\n" + rows)


def test_split_keeps_every_query_once_and_holds_out_about_the_fraction(write):
    queries = load_queries(numbered(write), ["en"])
    train, heldout = split(queries, 0.2)
    assert sorted(ids(train) + ids(heldout)) == sorted(ids(queries))
    assert 50 < len(heldout) < 110


def test_split_at_0_and_1_is_nothing_and_everything(write):
    queries = load_queries(numbered(write), ["en"])
    assert split(queries, 0) == (queries, [])
    assert split(queries, 1) == ([], queries)


@pytest.mark.parametrize("holdout", [-0.1, 1.1, float("nan")])
def test_split_refuses_what_is_no_fraction(holdout):
    with pytest.raises(ValueError, match="holdout"):
        split([], holdout)


def test_no_query_is_on_both_sides_in_any_language(write):
    path = numbered(write)
    first, *others = [ids(split(load_queries(path, langs), 0.3)[1])
                      for langs in (["en", "jv"], ["jv"], ["sw"], ["sw", "en"])]
    assert first
    assert others == [first] * 3


def test_split_is_the_same_in_another_file_with_other_whitespace_rows_and_columns(write):
    queries = load_queries(numbered(write), ["en", "jv"])
    rows = [{"prompt": f" query \n {i} ", "id": f"n{i}"} for i in reversed(range(0, 400, 3))]
    again = load_queries(write("again.jsonl", rows), ["en"])
    held = set(texts(split(queries, 0.3)[1], "en"))
    held_again = {" ".join(text.split()) for text in texts(split(again, 0.3)[1], "en")}
    assert held_again == held & {f"query {i}" for i in range(0, 400, 3)} != set()


def test_split_does_not_depend_on_the_hash_seed_of_python(write):
    path = numbered(write)
    code = ("import sys; from data.queries import *\n"
            "print([q.id for q in split(load_queries(sys.argv[1], ['en']), 0.3)[1]])")
    heldout = ids(split(load_queries(path, ["en"]), 0.3)[1])
    for seed in "12":
        run = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True,
                             text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        assert run.stdout == f"{heldout}\n"


# --- our own queries

OURS = {"queries.csv": ["en", "jv", "sw", "id", "it", "vi"],
        "tiny/extra.csv": ["en", "jv", "sw", "it"]}


def load_ours(name, langs=None):
    return load_queries(ROOT / "data" / name, langs or OURS[name])


@pytest.mark.parametrize("name", OURS)
def test_our_queries_are_whole_distinct_and_as_often_benign_as_harmful(name):
    queries = load_ours(name)
    labels = [query.label for query in queries]
    assert len(queries) > 500
    assert abs(labels.count("harmful") / len(queries) - 0.5) < 0.01
    for lang in OURS[name]:
        asked = texts(queries, lang)
        assert len(set(asked)) == len(asked)
        assert all(len(text) > 10 for text in asked)
        assert lang == "en" or not set(asked) & set(texts(queries, "en"))


@pytest.mark.parametrize("lang", ["en", "it"])
@pytest.mark.parametrize("holdout", [0.2, 0.5])
def test_no_held_out_query_of_queries_csv_is_nearly_one_that_is_trained_on(holdout, lang):
    def find_words(queries):
        return [set(re.findall(r"\w+", text.lower())) for text in texts(queries, lang)]
    train, heldout = split(load_ours("queries.csv"), holdout)
    trained = find_words(train + split(load_ours("tiny/extra.csv"), holdout)[0])
    for words in find_words(heldout):
        assert max(len(words & other) / len(words | other) for other in trained) <= 2 / 3


def test_our_sums_hold_the_same_numbers_in_every_language_and_their_answers_follow():
    langs = OURS["queries.csv"]
    sums = load_ours("sums.csv", langs)
    assert len(set(texts(sums, "en"))) == len(sums) == 100
    for query in sums:
        asked = [[int(x) for x in re.findall(r"\d+", query.text[lang])] for lang in langs]
        assert query.label == "qa"
        assert all(sorted(numbers) == sorted(asked[0]) for numbers in asked)
        a, b, c = [*asked[0], 0][:3]
        answers = {a - b + c, a + b - c} if c else {a + b, a - b, a * b, a / b, 2 * a + b}
        assert int(query.answer) in answers - set(asked[0])  # an echo is no answer


@pytest.mark.parametrize("text", [
    "en|jv\nHello, you|Halo, kowe\n", "sep=;\nen;jv\nHello, you;Halo, kowe\n",
    "sep=,\r\nen,jv\r\n\"Hello, you\",\"Halo, kowe\"\r\n", " en , jv \n\"Hello, you\",\"Halo, kowe\"\n",
    ";en;jv\n0;Hello, you;Halo, kowe\n", ",en,jv\n0,\"Hello, you\",\"Halo, kowe\"\n",
    "Unnamed: 0,en,jv\n0,\"Hello, you\",\"Halo, kowe\"\n"])
def test_tables_as_spreadsheets_write_them(tmp_path, text):
    path = tmp_path / "q.csv"
    path.write_text(text, encoding="utf-8", newline="")
    [query] = load_queries(path, ["en", "jv"], "harmful")
    assert query.text == {"en": "Hello, you", "jv": "Halo, kowe"}


def test_ids_that_are_twice_and_differ_between_files_are_not_joined_by_position(tmp_path, capsys):
    rows = {"en": ["1", "1", "2"], "jv": ["1", "2", "2"], "sw": ["1", "1", "2"]}
    for lang, ids in rows.items():
        lines = [f'{{"id": "{i}", "prompt": "{lang} {n}"}}' for n, i in enumerate(ids)]
        (tmp_path / f"{lang}.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="unmatched"):
        load_queries(f"en={tmp_path}/en.jsonl,jv={tmp_path}/jv.jsonl", ["en", "jv"], "harmful")
    found = load_queries(f"en={tmp_path}/en.jsonl,sw={tmp_path}/sw.jsonl", ["en", "sw"], "harmful")
    assert [query.text["sw"] for query in found] == ["sw 0", "sw 1", "sw 2"]
    assert "by position" in capsys.readouterr().err


# --- questions in several languages

QUESTIONS = {"en": ("Is it blue?", "yes", "no", "A"), "sw": ("Je ni bluu?", "hapana", "ndiyo", "B")}


def write_questions(write, form):
    """A question in two languages, each with its own choices and answer -> a path."""
    rows = [{"language": lang, "id": "1", "prompt": text, "A": a, "B": b, "answer": answer}
            for lang, (text, a, b, answer) in QUESTIONS.items()]
    if form == "long":
        return write("long.jsonl", rows)
    return ",".join(f"{row['language']}={write(row['language'] + '.jsonl', [row])}" for row in rows)


@pytest.mark.parametrize("form", ["long", "files"])
@pytest.mark.parametrize("langs", [["sw"], ["en"], ["sw", "en"]], ids=str)
def test_a_question_has_the_choices_and_the_answer_of_its_language(write, form, langs):
    [query] = load_queries(write_questions(write, form), langs, label="qa")
    text, *choices, answer = QUESTIONS[langs[-1]]
    assert (query.text[langs[-1]], query.choices, query.answer) == (text, choices, answer)


@pytest.mark.parametrize("form", ["long", "files"])
@pytest.mark.parametrize("langs", [["en", "jv"], ["jv", "en"]], ids=str)
def test_labels_that_differ_between_languages_are_neither(write, capsys, form, langs):
    rows = [{"language": lang, "id": i, "prompt": f"{lang} {i}", "label": label}
            for i, labels in enumerate(["harmful benign", "benign benign"])
            for lang, label in zip(["en", "jv"], labels.split())]
    files = [f"{lang}=" + write(f"{lang}.jsonl", [row for row in rows if row["language"] == lang])
             for lang in ("en", "jv")]
    path = write("long.jsonl", rows) if form == "long" else ",".join(files)
    [query] = load_queries(path, langs)
    assert (query.id, query.label) == ("1", "benign")
    assert "label 'differs: harmful, benign'" in capsys.readouterr().err


@pytest.mark.parametrize("labels, label", [
    (("safe", "unsafe"), None), (("refuse", "safe"), None), (("harmful", "Harmful"), "harmful"),
    (("unsafe", "refuse"), "harmful"), (("safe", "odd"), None)])
def test_labels_are_compared_by_what_they_mean(write, labels, label):
    rows = [{"id": 1, "prompt": "hi", "label": labels[0]}, {"id": 2, "prompt": "a", "label": "qa"}]
    en = write("en.jsonl", [{**row, "answer": "2"} for row in rows])
    jv = write("jv.jsonl", [{**rows[0], "label": labels[1]}, rows[1]])
    queries = load_queries(f"en={en},jv={jv}", ["en", "jv"])
    assert {query.id: query.label for query in queries}.get("1") == label


@pytest.mark.parametrize("form", ["long", "files"])
def test_an_answer_that_one_language_alone_has_is_the_querys(write, form):
    rows = [{"language": lang, "id": "1", "prompt": f"2 + 2 ({lang})", "answer": answer}
            for lang, answer in (("en", "4"), ("sw", ""))]
    files = [f"{row['language']}=" + write(f"{row['language']}.jsonl", [row]) for row in rows]
    path = write("long.jsonl", rows) if form == "long" else ",".join(files)
    [query] = load_queries(path, ["sw"], label="qa")
    assert query.answer == "4"


def test_a_language_named_in_capitals_is_the_same(write):
    en, zh = write("en.txt", "how are you\n"), write("zh.txt", "nihao\n")
    assert texts(load_queries(f"EN={en},zh-CN={zh}", ["zh-cn"]), "zh-cn") == ["nihao"]


def test_a_header_behind_blank_lines_is_a_header(write):
    for name in ("a.csv", "a.txt"):
        assert texts(load_queries(write(name, "\nprompt\nhi\nyo\n"), ["en"]), "en") == ["hi", "yo"]


def test_a_label_that_one_language_alone_has_is_the_querys(write):
    en = write("en.jsonl", [{"id": 1, "prompt": "hi", "label": "benign"}])
    jv = write("jv.jsonl", [{"id": 1, "prompt": "hai", "label": ""}])
    [query] = load_queries(f"en={en},jv={jv}", ["jv", "en"])
    assert query.label == "benign"


def test_blank_lines_at_opposite_ends_do_not_shift_what_is_joined_by_position(write):
    en = write("en.txt", "\nq2\nq3\n")
    jv = write("jv.txt", "t1\nt2\n\n")
    assert "numbers of rows ([3, 2])" in error(f"en={en},jv={jv}", ["en", "jv"])
    assert texts(load_queries(write("a.csv", "\n\nen,jv\nhi,hai\n\n"), ["jv"]), "jv") == ["hai"]


def test_letters_as_answers_without_choices_are_refused(write):
    rows = [{"en": "Which?", "candidates": ["red", "blue"], "answer": "B"}]
    assert "no choices" in error(write("a.jsonl", rows), ["en"], label="qa")


def test_a_file_of_a_language_may_hold_options(write):
    row = {"question": "Which?", "options": ["red", "blue"], "answer": "B"}
    [query] = load_queries("jv=" + write("a.jsonl", [row]), ["jv"], label="qa")
    assert (query.text["jv"], query.choices) == ("Which?", ["red", "blue"])


@pytest.mark.parametrize("choices", [
    {"choices": [{"label": "A", "text": "red"}, {"label": "B", "text": "blue"}]},
    {"options": ["red", "blue"]},
    {"options": {"A": "red", "B": "blue"}},
])
def test_choices_as_objects_or_as_options_are_read(write, choices):
    rows = [{"en": "Which?", "answer": "B", **choices}]
    [query] = load_queries(write("a.jsonl", rows), ["en"], label="qa")
    assert (query.choices, query.answer) == (["red", "blue"], "B")


@pytest.mark.parametrize("row", [
    {"answer": "B", "choices": [["A", "red"], ["B", "blue"]]},
    {"answer": "blue", "choices": [{"text": "red"}, {"text": "blue"}]},
    {"answer": ["red", "blue"]},
], ids=str)
def test_a_question_whose_choices_or_answer_are_not_understood_is_skipped_and_told(
        write, capsys, row):
    rows = [{"en": "Which?", **row}, {"en": "Where?", "answer": "Paris"}]
    [query] = load_queries(write("a.jsonl", rows), ["en"], label="qa")
    assert query.answer == "Paris" and "1 skipped" in capsys.readouterr().err


def test_ids_are_no_indonesian_and_row_numbers_no_norwegian(write):
    path = write("a.csv", "prompt_id,language,prompt\n17,en,Hello?\n17,id,Halo?\n")
    [query] = load_queries(path, ["id"])
    assert query.text == {"id": "Halo?"} and query.id == "17" and query.key == "Hello?"
    assert "no column for language id" in error(
        write("b.csv", "prompt_id,en\na1,Hello?\n"), ["en", "id"])
    numbered = write("c.csv", "No,en,nb\n1,Hello?,Hei?\n")
    assert "no column for language no" in error(numbered, ["en", "no"])
    spoken = write("d.csv", "en,prompt_id,no\nHello?,Apa kabar?,Hei du?\n")
    assert texts(load_queries(spoken, ["en", "id", "no"]), "id") == ["Apa kabar?"]
    assert texts(load_queries(spoken, ["no"]), "no") == ["Hei du?"]


@pytest.mark.parametrize("name", ["prompt_id", "qid", "uuid"])
def test_a_file_a_language_is_joined_on_the_id_that_they_share_whatever_it_is_called(
        write, capsys, name):
    english = write("en.csv", f"{name},en\n1,Hello?\n2,Goodbye?\n")
    swahili = write("sw.csv", f"{name},sw\n2,Kwaheri?\n1,Habari?\n")
    queries = load_queries(f"en={english},sw={swahili}", ["en", "sw"])
    assert texts(queries, "sw") == ["Habari?", "Kwaheri?"] and ids(queries) == ["1", "2"]
    assert f"joined on {name}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["language_code", "lang_code", "locale", "prompt_language"])
def test_a_column_of_languages_is_known_by_its_other_names(write, name):
    path = write("a.csv", f"prompt,{name},row_id\nHello?,en,1\nHabari?,sw,1\n")
    assert texts(load_queries(path, ["en"]), "en") == ["Hello?"]
    assert texts(load_queries(path, ["sw"]), "sw") == ["Habari?"]
