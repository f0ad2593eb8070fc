"""data/queries.py: what it reads, what it refuses, and that it drops nothing silently.

Every file is written here; at the end, our own queries.
"""
import json
import re
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


@pytest.fixture
def write_each(write):
    """write_each(en=content, jv=content) -> "en=PATH,jv=PATH"."""
    def write_files(**contents):
        paths = []
        for lang, content in contents.items():
            ending = "csv" if isinstance(content, str) else "json"
            paths.append(f"{lang}={write(f'{lang}.{ending}', content)}")
        return ",".join(paths)
    return write_files


@pytest.fixture(params=["a long file", "a file per language"])
def write_rows(request, write, write_each):
    """write_rows(header, en=[row, …], jv=[row, …]) -> path."""
    def write_either(header, **rows):
        if request.param == "a file per language":
            return write_each(**{lang: "\n".join([header, *rows[lang]]) for lang in rows})
        lines = [f"language,{header}"]
        for lang in rows:
            lines += [f"{lang},{row}" for row in rows[lang]]
        return write("long.csv", "\n".join(lines))
    return write_either


def texts(queries, lang):
    return [query.text[lang] for query in queries]


def ids(queries):
    return [query.id for query in queries]


def read(path, lang="en"):
    """The texts of one language."""
    return texts(load_queries(path, [lang]), lang)


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
    ("a.csv", '\n\nen,zh-cn\nhi,你\n\n"yo, you",哟\n\n'),
    ("a.csv", '"EN","prompt_ZH-CN"\r\nhi,你\r\n"yo, you",哟\r\n'),
    ("a.csv", ' en , zh-cn \nhi,你\n"yo, you",哟\n'),
    ("a.csv", 'Unnamed: 0,en,zh-cn\n0,hi,你\n1,"yo, you",哟\n'),
    ("a.tsv", "note on it\tEnglish\tzh-cn\n\thi\t你\n\tyo, you\t哟\n"),
    ("a.jsonl", '{"en": "hi", "zh-cn": "你"}\n\n {"En ": "yo, you", "zh-cn": "哟"}\n'),
    ("a.json", '[\n  {"en": "hi", "zh-cn": "你"},\n  {"en": "yo, you", "zh-cn": "哟"}\n]'),
    ("a.json", '{"safety": [{"en": "hi", "zh-cn": "你"}, {"en": "yo, you", "zh-cn": "哟"}]}'),
    ("a.jsonl", '\ufeff{"en": "hi", "zh-cn": "你"}\n{"en": "yo, you", "zh-cn": "哟"}'),
])
def test_every_format_reads_the_same_and_rows_without_id_are_numbered(write, name, content):
    queries = load_queries(write(name, content), ["en", "zh-cn"])
    assert ids(queries) == ["1", "2"]
    assert texts(queries, "en") == ["hi", "yo, you"]
    assert texts(queries, "zh-cn") == ["你", "哟"]


def test_a_line_separator_inside_a_json_string_ends_no_line(write):
    path = write("a.jsonl", [{"en": "a\u2028b\x85c"}, {"en": "d"}])
    assert read(path) == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize("header, lang, chosen", [
    ("goal,instruction,prompt,en", "en", "en"),
    ("target,Goal", "en", "Goal"),
    ("prompt_sw,prompt", "sw", "prompt_sw"),
])
def test_columns_go_by_their_aliases(write, header, lang, chosen):
    assert read(write("a.csv", f"{header}\n{header}\n"), lang) == [chosen]


@pytest.mark.parametrize("header, lang", [
    ("goal,instruction,sw", "en"), ("en,English,sw", "en"), ("prompt_sw,sw,prompt", "sw")])
def test_several_columns_of_one_language_are_refused(write, header, lang):
    assert f"may be {lang}" in error(write("a.csv", f"{header}\n{header}\n"), [lang])


@pytest.mark.parametrize("chat", [
    [{"from": "human", "value": "Hello"}, {"from": "human", "value": "no"}],
    [{"role": "system", "content": "no"}, {"role": "user", "content": "Hello"}],
])
def test_a_chat_list_is_its_first_human_turn_in_json_and_in_csv(write, chat):
    quoted = json.dumps(chat).replace('"', '""')
    assert read(write("a.jsonl", [{"en": chat}])) == ["Hello"]
    assert read(write("a.csv", f'id,en\n1,"{quoted}"\n')) == ["Hello"]


def test_text_that_only_begins_like_a_list_stays_text(write):
    plain = ["[INST] hi", "[1, 2]", '[{"a": 1}] explain this', "[{x}]"]
    assert read(write("a.jsonl", [{"en": text} for text in plain])) == plain


# --- the column `id`

@pytest.mark.parametrize("content, langs, row_id, text", [
    ("id,en\n7,hi\n", ["en"], "7", "hi"),
    ("en,id\nhi,Apa kabar\n", ["en"], "1", "hi"),
    ("en,id\nhi,Apa kabar\n", ["en", "id"], "1", "Apa kabar"),
    ("id,en,prompt_id\n7,hi,Apa kabar\n", ["en", "id"], "7", "Apa kabar"),
    ("id,Indonesian\n7,Hai\n", ["id"], "7", "Hai"),
    ("id,en\nrow 1,hi\n", ["en"], "row 1", "hi"),
])
def test_the_column_id_is_row_ids_or_indonesian(write, content, langs, row_id, text):
    [query] = load_queries(write("a.csv", content), langs)
    assert query.id == row_id
    assert query.text[langs[-1]] == text


def test_in_a_pair_of_files_the_column_id_joins(write_each):
    path = write_each(en=[{"id": "q 1", "prompt": "hi"}], id="id,prompt\nq 1,Hai\n")
    [query] = load_queries(path, ["en", "id"])
    assert query.id == "q 1"
    assert query.text == {"en": "hi", "id": "Hai"}


# --- a row per language

LONG = ("uid,prompt_id,language,prompt,label\n"
        "1,p1,English,one,safe\n"
        "2,p2,en,two,unsafe\n"
        "3,p2,Swahili,mbili,unsafe\n"
        "4,p1,SW,moja,safe\n"
        "5,p1,ru,один,safe\n")


def test_a_column_that_names_the_language_gives_rows_of_that_language_only(write, capsys):
    path = write("a.csv", LONG)
    assert read(path, "ru") == ["один"]
    assert read(path, "en") == ["one", "two"]
    assert "2 of 5 rows are in en, by language" in capsys.readouterr().err
    assert "no columns may be jv" in error(path, ["en", "jv"])


def test_long_rows_are_joined_on_the_id_that_the_languages_share(write):
    path = write("a.csv", LONG)
    queries = load_queries(path, ["sw", "en"])
    assert ids(queries) == ["p1", "p2"]
    assert texts(queries, "sw") == ["moja", "mbili"]
    assert texts(queries, "en") == ["one", "two"]
    assert [query.label for query in queries] == ["benign", "harmful"]
    assert [query.texts[0] for query in load_queries(path, ["sw"])] == ["one", "two"]


def test_long_rows_need_one_shared_id_and_no_more(write):
    one = "uid,lang,prompt\n1,en,hi\n1,sw,hujambo\n"
    assert len(load_queries(write("one.csv", one), ["en", "sw"])) == 1
    two = "id,uid,lang,prompt\n1,1,en,hi\n1,1,sw,hujambo\n"
    assert "'id', 'uid'" in error(write("two.csv", two), ["en", "sw"])
    assert "ending in id" in error(write("odd.csv", one + "2,sw,habari\n"), ["en", "sw"])


# --- a file per language

def test_a_pair_of_files_is_joined_on_the_id_that_they_share_in_any_order(write, capsys):
    en = write("en.csv", "id,prompt,label\n1,one,safe\n2,two,unsafe\n")
    bbc = write("b,c.jsonl", [{"id": 2, "prompt_bbc": "dua", "prompt": "two"},
                              {"id": 1, "prompt_bbc": "sada", "prompt": "one", "topic": "t"}])
    queries = load_queries(f"en={en}, bbc={bbc}", ["bbc", "en"])
    assert ids(queries) == ["1", "2"]
    assert texts(queries, "en") == ["one", "two"]
    assert texts(queries, "bbc") == ["sada", "dua"]
    assert [query.label for query in queries] == ["benign", "harmful"]
    assert queries[0].extra["topic"] == "t"
    assert "joined on id" in capsys.readouterr().err


@pytest.mark.parametrize("en, jv, complaint", [
    ("id,prompt\n1,A\n2,B\n", "id,prompt\n1,a\n", "[2, 1]"),
    ("id,prompt\n1,A\n2,B\n", "id,prompt\n1,a\n3,b\n", "unmatched"),
    ("id,prompt\n1,A\n1,B\n2,C\n", "id,prompt\n1,a\n2,b\n2,c\n", "unmatched"),
    ("prompt\nA\nB\n", "prompt\na\nb\nc\n", "[2, 3]"),
    ("\nB\nC\n", "a\nb\n\n", "[3, 2]"),
])
def test_files_whose_rows_do_not_match_are_an_error(write_each, en, jv, complaint):
    assert complaint in error(write_each(en=en, jv=jv), ["en", "jv"])


@pytest.mark.parametrize("jv", [
    ["siji", "loro", "telu"],
    {"safety": ["siji", [{"role": "user", "content": "loro"}], "telu"]},
    '"siji"\r\n"loro"\r\n"telu"\r\n',
])
def test_files_without_ids_are_joined_by_position_and_it_says_so(write_each, capsys, jv):
    path = write_each(en={"safety": ["one", "two", "three"]}, jv=jv)
    queries = load_queries(path, ["en", "jv"])
    assert ids(queries) == ["1", "2", "3"]
    assert texts(queries, "en") == ["one", "two", "three"]
    assert texts(queries, "jv") == ["siji", "loro", "telu"]
    assert "joined by position" in capsys.readouterr().err


def test_ids_that_are_there_twice_join_nothing(write_each):
    jv = "id,prompt\n1,siji\n1,loro\n"
    assert read(write_each(en="id,prompt\n1,one\n1,two\n", jv=jv), "jv") == ["siji", "loro"]
    assert read(write_each(jv=jv), "jv") == ["siji", "loro"]


@pytest.mark.parametrize("content", [
    "instruction,instruction_translated\nEnglish,Ciao\n",
    "prompt,prompt_it\nEnglish,Ciao\n",
    "prompt,Italian\nEnglish,Ciao\n",
    "id,query,label,options\n1,Ciao,safe,[]\n",
    "en,goal\nEnglish,Ciao\n",
    "prompt,literal_translation,language\nCiao,English,Italian\n",
    "id,lang,text\n1,it,Ciao\n",
])
def test_a_file_named_for_its_language_is_read_in_that_language(write_each, content):
    assert read(write_each(it=content), "it") == ["Ciao"]


@pytest.mark.parametrize("lang, header", [
    ("it", "prompt,translation"),
    ("it", "query,source"),
    ("en", "instruction,instruction_translated"),
])
def test_where_two_columns_may_be_the_language_both_are_named(write_each, lang, header):
    message = error(write_each(**{lang: f"{header}\nCiao,Hello\n"}), [lang])
    assert header.replace(",", ", ") in message


def test_a_file_named_for_another_language_is_not_read_for_its_english_column(write_each):
    assert "no columns may be bbc" in error(write_each(bbc="id,en\n1,hi\n"), ["bbc"])
    assert "no columns may be jv" in error(write_each(jv="sw\nHabari yako\n"), ["jv"])
    assert "no columns may be en" in error(write_each(en="language,prompt\nru,один\n"), ["en"])


def test_a_column_of_another_rows_language_gives_way_to_that_row(write_rows):
    path = write_rows("id,prompt,jv", en=["1,hi you,stale"], jv=["1,,hai"])
    assert load_queries(path, ["jv", "en"])[0].text == {"en": "hi you", "jv": "hai"}


def test_each_language_needs_one_file_and_only_one(write_each):
    path = write_each(en="id,prompt\n1,hi\n")
    assert "jv" in error(path, ["en", "jv"])
    assert "twice" in error(f"{path},{path}", ["en"])


def test_a_language_named_in_capitals_is_the_same(write):
    en = write("en.txt", "how are you\n")
    zh = write("zh.txt", "nihao\n")
    assert read(f"EN={en},zh-CN={zh}", "zh-cn") == ["nihao"]


def test_a_tilde_is_the_home_folder(write, monkeypatch, tmp_path):
    write("a.csv", "en,jv\nhi,hai\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("en=~/a.csv") == ["hi"]


# --- no header

@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "noextension"])
def test_a_query_a_line_is_read_and_its_first_line_is_no_header(write, capsys, name):
    path = write(name, "\ufeffHow do I boil an egg?\r\n\r\nWhere is the sun?\r\n")
    assert ids(load_queries(f"en={path}", ["en"])) == ["1", "3"]
    assert read(f"sw={path}", "sw") == ["How do I boil an egg?", "Where is the sun?"]
    assert "is taken for a query: 'How do I boil an egg?'" in capsys.readouterr().err


def test_lines_of_text_may_hold_commas_quotes_and_semicolons(write):
    lines = ['"Why", oh why; tell me', "Stop, or not?"]
    assert read("en=" + write("a.txt", "\n".join(lines))) == lines


@pytest.mark.parametrize("lang, first", [
    ("en", "Prompt"), ("jv", "Javanese"), ("jv", "prompt_jv"), ("bbc", "bbc"), ("id", "id")])
def test_the_name_of_a_column_is_taken_for_one_and_it_says_so(write_each, capsys, lang, first):
    assert read(write_each(**{lang: f"{first}\nA text.\n"}), lang) == ["A text."]
    assert f"is taken for the column's name: '{first}'" in capsys.readouterr().err


def test_a_first_line_is_told_of_once(write, capsys):
    assert read(write("a.txt", "bbc\nHorja\n"), "bbc") == ["Horja"]
    assert "a query" not in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["prompt,sw_prompt", "prompt,Swahili prompt"])
def test_of_several_texts_the_one_that_names_the_language_is_meant(write, columns):
    assert read("sw=" + write("a.csv", f"{columns}\nHi,Habari\n"), "sw") == ["Habari"]


def test_numbers_under_id_prompt_are_not_indonesian(write):
    assert read("id=" + write("a.csv", "id_prompt,text\n1,Apa?\n"), "id") == ["Apa?"]


def test_an_index_and_choices_are_no_texts(write):
    assert read("sw=" + write("a.csv", ",text\n0,Habari\n"), "sw") == ["Habari"]
    path = write("b.csv", "Question,A,B,C,D,Answer\nHabari?,1,2,3,4,A\n")
    assert texts(load_queries(f"sw={path}", ["sw"], "qa"), "sw") == ["Habari?"]


def test_empty_columns_and_blank_rows_do_not_move_the_rows(write_each):
    path = write_each(en='"One, two",,\nThree,,\nFour,,\n', ru='Раз\n""\nЧетыре\n')
    queries = load_queries(path, ["en", "ru"])
    assert texts(queries, "en") == ["One, two", "Four"]
    assert texts(queries, "ru") == ["Раз", "Четыре"]


def test_a_language_may_be_asked_for_in_any_case(write):
    path = write("a.csv", "en,zh-CN\nRain?,雨？\n")
    assert read(path, "zh-CN") == ["雨？"]
    assert read("zh-CN=" + write("a.txt", "雨？\n"), "zh-CN") == ["雨？"]


def test_a_file_without_a_header_is_of_one_language(write):
    path = write("a.txt", "A text.\n")
    assert read(path, "sw") == ["A text."]
    assert "en=FILE" in error(path, ["en", "sw"])


def test_header_less_mgsm_is_qa_keeps_its_first_row_and_is_joined_by_position(write):
    en = write("mgsm_en.tsv", 'Janet has 3 ducks?\t18\n"Two" bolts, how many?\t-1,080\n')
    sw = write("mgsm_sw.tsv", "Janet ana bata 3?\t18\nBolti mbili?\t-1,080\n")
    assert read(f"en={en}") == ["Janet has 3 ducks?", '"Two" bolts, how many?']
    queries = load_queries(f"en={en},sw={sw}", ["en", "sw"])
    assert texts(queries, "sw") == ["Janet ana bata 3?", "Bolti mbili?"]
    assert [query.label for query in queries] == ["qa", "qa"]
    assert [query.answer for query in queries] == ["18", "-1,080"]


@pytest.mark.parametrize("first_row", ["问题\t18", "Say yes.\tyes", "প্রশ্ন\t১৮"])
def test_a_first_row_with_a_number_or_a_sentence_is_no_header(write, first_row):
    [query] = load_queries("xx=" + write("a.tsv", first_row + "\r\n"), ["xx"])
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
                                       f"(2 {column} 'maybe', 1 {column} '')\n")


def test_label_wins_over_expected_behavior_and_both_over_the_flag(write):
    path = write("a.csv", "en,expected_behavior,label\nhi,refuse,safe\n")
    assert load_queries(path, ["en"], label="harmful")[0].label == "benign"


@pytest.mark.parametrize("flag, label", [
    (None, "harmful"), ("mixed", "mixed")])
def test_without_a_label_column_rows_are_harmful_or_what_the_flag_says(write, flag, label):
    assert load_queries(write("a.csv", "en,jv\nhi,hai\n"), ["en"], flag)[0].label == label


def test_what_was_assumed_is_said_with_the_columns_that_may_be_a_label(write, capsys):
    read(write("a.csv", "en,binary\nhi,1\n"))
    assert "every row is taken as harmful: no column label or expected_behavior in en, binary" in capsys.readouterr().err


@pytest.mark.parametrize("en, jv, label", [
    ("safe", "unsafe", None), ("harmful", "Harmful", "harmful"), ("unsafe", "refuse", "harmful"),
    ("unsafe", "", "harmful")])
def test_labels_of_several_languages_are_compared_by_what_they_mean(
        write_rows, capsys, en, jv, label):
    path = write_rows("id,prompt,label", en=[f"1,hi,{en}", "2,yo,benign"],
                      jv=[f"1,hai,{jv}", "2,halo,benign"])
    queries = load_queries(path, ["en", "jv"])
    labels = {query.id: query.label for query in queries}
    assert labels.get("1") == label
    assert labels["2"] == "benign"
    assert (f"label '{en}, {jv}'" in capsys.readouterr().err) == (label is None)


# --- questions

def ask(write, *rows):
    """What rows are read as: [(choices, answer)]."""
    rows = [{"en": "Which?", **row} for row in rows]
    queries = load_queries(write("questions.jsonl", rows), ["en"], label="qa")
    return [(query.choices, query.answer) for query in queries]


def test_answers_without_a_label_ask_for_one(write):
    path = write("a.csv", "en,answer\nWhere is Paris?,France\n")
    assert "--label qa" in error(path, ["en"])
    [query] = load_queries(path, ["en"], label="qa")
    assert (query.label, query.answer, query.choices) == ("qa", "France", [])


def test_a_qa_row_without_an_answer_is_skipped_and_one_of_0_is_not(write, capsys):
    assert ask(write, {"answer": 0}, {"answer": " "}) == [([], "0")]
    assert "1 skipped (1 qa whose answer is '', of 0 choices)" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [
    {"choices": ["red", 0, "blue"]},
    {"choices": '["red", 0, "blue"]'},
    {"A": "red", "B": 0, "C": "blue", "D": ""},
])
def test_choices_are_read_in_every_form_and_0_is_one(write, columns):
    read_as = ask(write, *({"answer": answer, **columns} for answer in "bC"))
    assert read_as == [(["red", "0", "blue"], "B"), (["red", "0", "blue"], "C")]


@pytest.mark.parametrize("row", [
    {"answer": "green", "choices": ["red", "green"]},
    {"answer": 2, "choices": ["red", "green"]},
    {"answer": "C", "choices": ["red", "green"]},
    {"answer": "A", "choices": {"text": ["red", "green"], "label": ["A", "B"]}},
    {"answer": "A"},
])
def test_a_question_whose_answer_is_no_letter_of_its_choices_is_skipped_and_told(
        write, capsys, row):
    right = {"answer": "B", "choices": ["red", "green"]}
    assert ask(write, row, right) == [(["red", "green"], "B")]
    assert "1 skipped (1 qa whose answer is" in capsys.readouterr().err


def test_an_index_of_a_choice_is_its_letter(write):
    rows = [{"en": "Which?", "label": "qa", "answer": i, "choices": ["1", "2"]} for i in (0, 1)]
    queries = load_queries(write("a.json", json.dumps(rows)), ["en"])
    assert [query.answer for query in queries] == ["A", "B"]


@pytest.mark.parametrize("langs, choices, answer", [
    (["en"], ["yes", "no"], "A"),
    (["sw"], ["hapana", "ndiyo"], "B"),
    (["sw", "en"], ["yes", "no"], "A"),
])
def test_a_question_has_the_choices_and_the_answer_of_its_language(
        write_rows, langs, choices, answer):
    path = write_rows("id,prompt,A,B,answer", en=["1,Blue?,yes,no,A"],
                      sw=["1,Bluu?,hapana,ndiyo,B"])
    [query] = load_queries(path, langs, label="qa")
    assert (query.choices, query.answer) == (choices, answer)


# --- what is skipped, what is an error, what is told

def test_rows_blank_in_an_asked_language_are_skipped_and_counted(write, capsys):
    path = write("a.csv", "id,en,jv,sw\n1,a,b,\n2,c, ,d\n3,,,\n")
    assert ids(load_queries(path, ["en", "jv"], "mixed")) == ["1"]
    assert capsys.readouterr().err == (f"{path}: 3 rows read, 1 used, 2 skipped (1 without a text "
                                       "in jv, 1 without a text in en and jv)\n")


@pytest.mark.parametrize("cell", [
    5, ["text"], [{"role": "assistant", "content": "x"}],
    "[{'role': 'user', 'content': 'a Python repr'}]", [{"role": "user", "content": 3}],
    '[{"role": "user", "content": "\\ud800"}]',
])
def test_cells_that_hold_no_human_text_are_skipped(write, capsys, cell):
    assert read(write("a.jsonl", [{"en": cell}, {"en": "ok"}])) == ["ok"]
    assert "2 rows read, 1 used, 1 skipped (1 " in capsys.readouterr().err


def test_names_within_a_cell_are_its_own_matter(write):
    assert read(write("a.jsonl", '{"en": "a", "meta": {"ID": 1, "id": 2}}')) == ["a"]


def test_a_file_is_opened_and_told_once_and_again_when_it_changed(write, capsys, monkeypatch):
    path = write("a.csv", "en,jv\nhi,hai\n")
    load_queries(path, ["en", "jv"])
    told = capsys.readouterr().err
    with monkeypatch.context() as closed:
        closed.setattr("builtins.open", None)
        [first] = load_queries(path, ["jv"])
        first.extra["jv"] = "changed"
        assert texts(load_queries(path, ["jv", "en"]), "jv") == ["hai"]
    assert told.count("1 used") == 1
    assert capsys.readouterr().err == ""
    write("a.csv", "en,jv\nhi,hai\nyo,halo\n")
    assert len(load_queries(path, ["jv"])) == 2


@pytest.mark.parametrize("name, content, complaint", [
    ("a.csv", "", "empty"),
    ("a.csv", "en,jv\n", "no rows"),
    ("a.csv", b"en\n\xff\xfe\n", "utf-8"),
    ("a.csv", "en,jv,EN\na,b,c\n", "duplicate column"),
    ("a.csv", "en,jv\na,b\na,b,c\n", "row 2 has 3 cells instead of 2"),
    ("a.csv", 'en,jv\na,"b\nc,d\n', "unexpected end"),
    ("a.csv", "en\n" + "x" * (1 << 22) + "x\n", "field larger"),
    ("a.csv", "en,label\n" + "".join(f"a,odd {n}\n" for n in range(99)), "99 skipped (1 label"),
    ("a.csv", "sv,da\na,b\n", "it has sv, da"),
    ("a.csv", ",".join(f"c{n}" for n in range(9999)) + "\n" + "," * 9998 + "x", "no column"),
    ("a.json", "", "JSON"),
    ("a.json", "null", "not iterable"),
    ("a.json", '{"Prompt": "a", "prompt": "b"}', "duplicate column"),
    ("a.json", '{"en": "a"}\n\n{"en": "b" "c"}\n', "line 3"),
    ("a.json", '[\n{"en": "a"},\n{"en" "b"}]', "line 3"),
    ("a.json", "[" * 99999, "recursion"),
    ("a.json", '{"en": "a\\ud83d"}\n', "surrogates"),
    ("a.json", '{"en": ' + "9" * 9999 + "}", "integer"),
])
def test_a_file_that_cannot_be_read_is_one_line_that_names_it(write, name, content, complaint):
    message = error(write(name, content), ["en"])
    assert complaint in message
    assert name in message


@pytest.mark.parametrize("path", [
    "en=absent.csv", ".", "", "a\0b", "x" * 9999])
def test_a_path_that_cannot_be_opened_is_one_line(path):
    error(path, ["en"])


# --- split

@pytest.fixture
def numbered(write):
    """The path of 400 queries in three languages."""
    rows = "".join(f"caffè {i},kopi {i},kahawa {i}\n" for i in range(400))
    return write("numbered.csv", "en,jv,sw\n" + rows)


def test_split_keeps_every_query_once_and_holds_out_about_the_fraction(numbered):
    queries = load_queries(numbered, ["en"])
    train, heldout = split(queries, 0.2)
    assert sorted(ids(train) + ids(heldout)) == sorted(ids(queries))
    assert 50 < len(heldout) < 110
    assert split(queries, 0) == (queries, [])
    assert split(queries, 1) == ([], queries)


def test_no_query_is_on_both_sides_in_any_language(numbered):
    first = ids(split(load_queries(numbered, ["en", "jv"]), 0.3)[1])
    for langs in (["jv"], ["sw"], ["sw", "en"]):
        assert ids(split(load_queries(numbered, langs), 0.3)[1]) == first


def test_no_query_is_on_both_sides_in_another_file_blanks_unicode_form_or_order(numbered, write):
    rows = [{"prompt": unicodedata.normalize("NFD", f" caffè \n {i} "), "id": f"n{i}"}
            for i in reversed(range(400))]
    train = split(load_queries(numbered, ["en", "jv"]), 0.3)[0]
    train_again = split(load_queries(write("again.jsonl", rows), ["en"]), 0.3)[0]
    assert sorted(ids(train_again)) == sorted(f"n{int(row_id) - 1}" for row_id in ids(train))


def test_split_is_the_same_in_every_process_and_version(numbered):
    heldout = split(load_queries(numbered, ["en"]), 0.02)[1]
    assert ids(heldout) == ["102", "184", "324", "370", "379"]


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
        assert lang == "en" or not set(asked) & set(texts(queries, "en"))


@pytest.mark.parametrize("lang, holdout", [("en", 0.2), ("en", 0.5), ("it", 0.5)])
def test_no_held_out_query_of_queries_csv_is_nearly_one_that_is_trained_on(lang, holdout):
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


def test_ids_are_no_indonesian(write):
    path = write("a.csv", "prompt_id,language,prompt\n17,en,Hello?\n17,id,Halo?\n")
    [query] = load_queries(path, ["id"])
    assert query.text["id"] == "Halo?" and query.id == "17" and query.texts[0] == "Hello?"
    spoken = write("d.csv", "en,prompt_id,no\nHello?,Apa kabar?,Hei du?\n")
    assert texts(load_queries(spoken, ["en", "id", "no"]), "id") == ["Apa kabar?"]
    assert read(spoken, "no") == ["Hei du?"]


def test_where_two_ids_are_shared_the_rows_are_joined_by_position_and_it_says_so(
        write_each, capsys):
    path = write_each(en="qid,uid,en\n1,1,Hello?\n2,2,Goodbye?\n",
                      sw="qid,uid,sw\n1,2,Habari?\n2,1,Kwaheri?\n")
    assert texts(load_queries(path, ["en", "sw"]), "sw") == ["Habari?", "Kwaheri?"]
    assert "joined by position" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["{}", "id={}"])
def test_where_a_column_holds_indonesian_english_beside_it_is_not_read_for_it(write, form):
    spoken = write("a.csv", "prompt,prompt_id\nWhat is,Apa ini ya\nGood day,Selamat pagi kawan\n")
    assert read(form.format(spoken), "id") == ["Apa ini ya", "Selamat pagi kawan"]
    long = write("b.csv", "lang,prompt,prompt_id\nid,What is,Apa ini ya\n")
    assert read(form.format(long), "id") == ["Apa ini ya"]
