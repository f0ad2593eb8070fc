"""data/download.py: files of the sets' names and layout, made up here, come from this machine."""
import contextlib
import csv
import functools
import io
import runpy
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data.queries import load_queries

SCRIPT = Path(__file__).parents[1] / "data/download.py"
MULTIJAIL = ("/DAMO-NLP-SG/multilingual-safety-for-LLMs/577ac511437e07a256130945ef312a99158a18ad"
             "/data/MultiJail.csv")
XSTEST = ("/paul-rottger/exaggerated-safety/d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d"
          "/xstest_prompts.csv")
MGSM = "/google-research/url-nlp/452a21ad3dae5668c06ceeac21ff073e1e40f9be/mgsm/mgsm_"
XSAFETY = "/Jarviswang94/Multilingual_safety_benchmark/8c55b6a6cda594cd550a4921513238a2dd40eb5a/"
MGSM_LANGS = "en es fr de ru zh ja th sw bn te".split()
TOPICS = [
    "commonsense", "Crimes_And_Illegal_Activities", "Ethics_And_Morality", "Goal_Hijacking",
    "Inquiry_With_Unsafe_Opinion", "Insult", "Mental_Health", "Physical_Harm",
    "Privacy_And_Property", "Prompt_Leaking", "Reverse_Exposure", "Role_Play_Instruction",
    "Unfairness_And_Discrimination", "Unsafe_Instruction_Topic",
]
# as the repository's folders list them
PLAIN = [topic + ".csv" for topic in TOPICS]
NAMES = {
    "en": ["commonsense.csv", "Crimes_And_Illegal_Activities_en.csv",
           *(topic + "_n.csv" for topic in TOPICS[2:])],
    "bn": ["commonsense.csv", *(topic + "_n.xlsx" for topic in TOPICS[1:])],
    "ru": ["commonsense.csv", "Crimes_And_Illegal_Activitie.csv", *PLAIN[2:]],
    **{folder: PLAIN for folder in ["zh", "ar", "de", "fr", "hi", "ja", "sp"]},
}


# --- what is served

def write_csv(rows):
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    return file.getvalue().encode()


def write_queries(topic, folder):
    """A file of XSafety, without a header; its texts have commas, quotes and spaces around."""
    return write_csv([f' query {n}, a "{topic}" in {folder} '] for n in range(1, 201))


def read_query(n, topic, folder):
    """What row n of such a file must come out as."""
    return f'query {n}, a "{topic}" in {folder}'


@functools.cache
def build_files():
    """{path: bytes} of the four sets, with XSafety's oddities."""
    columns = ["id", "source", "tags", "en", "zh", "jv"]
    rows = [[n, "made up", "['None']", f"query {n}\nof two lines", f"{n} zh", f"{n} jv"]
            for n in range(315)]
    prompts = [[n, f"prompt {n}", "none", "safe"] for n in range(1, 451)]
    files = {MULTIJAIL: b"\xef\xbb\xbf" + write_csv([columns, *rows]),
             XSTEST: write_csv([["id", "prompt", "type", "label"], *prompts])}
    for lang in MGSM_LANGS:  # no header, and a quote is a character like others
        sums = [f'"{n} and {n} in {lang}?\t{2 * n}\n' for n in range(250)]
        files[f"{MGSM}{lang}.tsv"] = "".join(sums).encode()
    for folder, names in NAMES.items():
        for topic, name in zip(TOPICS, names):
            files[XSAFETY + f"{folder}/{name}"] = write_queries(topic, folder)

    files[XSAFETY + "hi/commen_sense.csv"] = write_queries("draft", "hi")
    insults = files[XSAFETY + "ru/Insult.csv"].split(b"\r\n")
    insults[164] = b" "
    files[XSAFETY + "ru/Insult.csv"] = b"\n".join(insults)
    goals = files[XSAFETY + "de/Goal_Hijacking.csv"]
    files[XSAFETY + "de/Goal_Hijacking.csv"] = goals.replace(b"\r\n", b",,\r\n") + b",,\r\n"
    files[XSAFETY + "fr/Insult.csv"] += b"\r\n\r\n"
    return files


class Site:
    """A server of `files`, and the paths it was asked for. A pair is (the size it tells, bytes)."""

    def __init__(self):
        self.files = dict(build_files())
        self.asked = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.asked.append(self.path)
                data = site.files.get(self.path)
                if data is None:
                    self.send_error(404)
                    return
                size, data = data if isinstance(data, tuple) else (len(data), data)
                self.send_response(200)
                self.send_header("Content-Length", str(size))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server.server_port}"
        serve = self.server.serve_forever
        threading.Thread(target=serve, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site():
    with contextlib.closing(Site()) as site:
        yield site


def run(base, folder, *sets, has_openpyxl=False):
    """The command in this process -> (exit code, stdout, stderr)."""
    out = io.StringIO()
    err = io.StringIO()
    code = 0
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        argv = ["download.py", *sets, "--to", str(folder), "--base", base]
        patch.setattr(sys, "argv", argv)
        patch.setenv("no_proxy", "*")
        if not has_openpyxl:
            patch.setitem(sys.modules, "openpyxl", None)
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()


def fail(*args):
    """The line of a run that must end in exit code 2."""
    code, _, err = run(*args)
    assert code == 2
    assert err.startswith("download.py: error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    return err


def read_xsafety(folder):
    with open(folder / "xsafety.csv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


# --- a run of all four

@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """(site, folder, stdout, stderr) of a run without openpyxl."""
    folder = tmp_path_factory.mktemp("public") / "made/here"
    with contextlib.closing(Site()) as site:
        code, out, err = run(site.base, folder, "multijail", "xstest", "xsafety", "mgsm")
    assert code == 0
    return site, folder, out, err


def test_writes_a_file_for_each_set_and_language_and_nothing_else(fetched):
    _, folder, _, _ = fetched
    names = {"MultiJail.csv", "xstest_prompts.csv", "xsafety.csv"}
    names.update(f"mgsm_{lang}.tsv" for lang in MGSM_LANGS)
    assert {file.name for file in folder.iterdir()} == names


def test_files_but_xsafety_are_written_as_they_are(fetched):
    site, folder, _, _ = fetched
    for path in [MULTIJAIL, XSTEST, *(f"{MGSM}{lang}.tsv" for lang in MGSM_LANGS)]:
        assert (folder / Path(path).name).read_bytes() == site.files[path]


def test_prints_the_licence_and_the_source_of_each_set(fetched):
    _, _, out, _ = fetched
    for name, licence, path in [("multijail", "MIT", MULTIJAIL), ("xstest", "CC-BY-4.0", XSTEST),
                                ("xsafety", "research", XSAFETY), ("mgsm", "CC-BY-4.0", MGSM)]:
        owner, repository, commit = path.split("/")[1:4]
        line = next(line for line in out.splitlines() if line.startswith(f"{name}: "))
        assert licence in line
        assert f"https://github.com/{owner}/{repository}/tree/{commit}" in line


def test_xsafety_becomes_one_table_joined_by_position(fetched):
    _, folder, _, _ = fetched
    rows = read_xsafety(folder)
    assert list(rows[0]) == "id topic en zh ar de fr hi ja ru es".split()
    assert [row["id"] for row in rows] == [str(n) for n in range(1, 2801)]
    for i, topic in enumerate(TOPICS):
        for n in (1, 2, 200):
            row = rows[200 * i + n - 1]
            assert row["topic"] == topic.lower()
            for lang in "en zh ar de fr hi ja ru".split():
                assert row[lang] == read_query(n, topic, lang)
            assert row["es"] == read_query(n, topic, "sp")


def test_a_blank_row_keeps_its_place(fetched):
    _, folder, _, _ = fetched
    row, after = read_xsafety(folder)[1164:1166]
    assert (row["id"], row["topic"], row["ru"]) == ("1165", "insult", "")
    assert row["en"] == read_query(165, "Insult", "en")
    assert after["ru"] == read_query(166, "Insult", "ru")


def test_empty_columns_and_blank_rows_at_the_end_are_ignored(fetched):
    _, folder, _, _ = fetched
    rows = read_xsafety(folder)
    for start, topic, lang in [(600, "Goal_Hijacking", "de"), (1000, "Insult", "fr")]:
        expected = [read_query(n, topic, lang) for n in range(1, 201)]
        assert [row[lang] for row in rows[start:start + 200]] == expected


def test_hindi_commonsense_is_not_the_draft(fetched):
    site, folder, _, _ = fetched
    assert read_xsafety(folder)[4]["hi"] == read_query(5, "commonsense", "hi")
    assert XSAFETY + "hi/commen_sense.csv" not in site.asked


def test_bengali_is_left_out_with_a_word_where_openpyxl_is_missing(fetched):
    site, _, _, err = fetched
    assert "bn" in err and "openpyxl" in err
    assert err.count("\n") == 1
    assert not any(path.startswith(XSAFETY + "bn") for path in site.asked)


def test_queries_reads_what_was_written(fetched):
    _, folder, _, _ = fetched
    queries = load_queries(folder / "xsafety.csv", ["en", "es"], label="mixed")
    assert len(queries) == 2800
    assert queries[2].text["es"] == read_query(3, "commonsense", "sp")
    assert {query.label for query in queries} == {"mixed"}
    russian = load_queries(folder / "xsafety.csv", ["en", "ru"], label="mixed")
    assert "1165" not in [query.id for query in russian] and len(russian) == 2799
    assert len(load_queries(folder / "MultiJail.csv", ["en", "jv"], label="harmful")) == 315
    assert len(load_queries(folder / "mgsm_sw.tsv", ["sw"])) == 250


def test_bengali_is_read_from_its_spreadsheets(site, tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    for topic, name in zip(TOPICS[1:], NAMES["bn"][1:]):
        book = openpyxl.Workbook()
        for n in range(1, 201):
            book.active.append([f" {read_query(n, topic, 'bn')} ", None])
        book.active["A3"] = None
        book.active["A4"] = 17
        book.active["B205"] = ""  # blank rows at the end
        file = io.BytesIO()
        book.save(file)
        site.files[XSAFETY + f"bn/{name}"] = file.getvalue()

    code, _, err = run(site.base, tmp_path, "xsafety", has_openpyxl=True)
    assert (code, err) == (0, "")
    rows = read_xsafety(tmp_path)
    assert list(rows[0]) == "id topic en zh ar bn de fr hi ja ru es".split()
    assert len(rows) == 2800
    assert rows[199]["bn"] == read_query(200, "commonsense", "bn")
    assert [row["bn"] for row in rows[1002:1004]] == ["", "17"]
    assert rows[1199]["bn"] == read_query(200, "Insult", "bn")


# --- what is there

def test_what_is_there_is_left_and_not_asked_for(site, tmp_path):
    for name in ["MultiJail.csv", "xsafety.csv", "mgsm_en.tsv"]:
        (tmp_path / name).write_text("mine")
    code, out, err = run(site.base, tmp_path, "multijail", "xsafety", "mgsm")
    assert (code, err) == (0, "")
    for name in ["MultiJail.csv", "xsafety.csv", "mgsm_en.tsv"]:
        assert (tmp_path / name).read_text() == "mine"
        assert f"{tmp_path / name}: is there, and left as it is" in out
    assert site.asked == [f"{MGSM}{lang}.tsv" for lang in MGSM_LANGS[1:]]


def test_a_set_named_twice_is_fetched_once(site, tmp_path):
    assert run(site.base, tmp_path, "xstest", "xstest")[0] == 0
    assert site.asked == [XSTEST]


# --- what can go wrong

@pytest.mark.parametrize("name, path, count", [
    ("multijail", MULTIJAIL, 315), ("xstest", XSTEST, 450), ("mgsm", f"{MGSM}en.tsv", 250),
    ("xsafety", XSAFETY + "zh/commonsense.csv", 200)])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_count_is_a_line_and_nothing_is_written(site, tmp_path, name, path, count, change):
    if name == "multijail":  # its cells hold newlines
        row = b'9,a,b,"c\nd",e,f\r\n'
        site.files[path] = site.files[path].partition(b"\r\n")[0] + b"\r\n" + row * (count + change)
    else:
        lines = site.files[path].splitlines(keepends=True)
        site.files[path] = b"".join(lines[:-1] if change < 0 else lines + lines[-1:])
    line = fail(site.base, tmp_path, name)
    assert f"{path}: {count + change} rows instead of {count}" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, path", [
    ("multijail", MULTIJAIL), ("mgsm", f"{MGSM}en.tsv"),
    ("xsafety", XSAFETY + "en/Crimes_And_Illegal_Activities_en.csv")])
def test_a_missing_file_is_a_line_with_its_url(site, tmp_path, name, path):
    del site.files[path]
    line = fail(site.base, tmp_path, name)
    assert f"{site.base}{path}" in line and "404" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", [
    (10**6, b"id,prompt\r\n1,a cut connection"), b"<html>a login</html>", b"", b"\xff\xfe\x00"])
def test_what_is_not_the_file_is_a_line(site, tmp_path, data):
    site.files[XSTEST] = data
    assert site.base + XSTEST in fail(site.base, tmp_path, "xstest")
    assert not list(tmp_path.iterdir())


def test_a_dead_server_is_a_line(tmp_path):
    with contextlib.closing(Site()) as site:
        base = site.base
    assert base + MULTIJAIL in fail(base, tmp_path, "multijail", "xsafety")
    assert "unknown url type" in fail("nowhere", tmp_path, "multijail")
    assert not list(tmp_path.iterdir())


def test_an_unknown_set_is_a_line_that_names_those_there_are(site, tmp_path):
    line = fail(site.base, tmp_path, "multijail", "multijial")
    assert "'multijial'" in line and "xsafety" in line
    assert not site.asked


def test_a_folder_that_cannot_be_is_a_line(site, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in fail(site.base, tmp_path / "file", "xstest")


def test_a_full_disk_leaves_nothing_half_written(site, tmp_path, monkeypatch):
    write = Path.write_bytes

    def write_half(path, data):
        write(path, data[:len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    assert "No space left" in fail(site.base, tmp_path, "multijail")
    assert not list(tmp_path.iterdir())


def test_what_came_before_an_error_stays_and_the_next_run_goes_on(site, tmp_path):
    kept = site.files.pop(f"{MGSM}fr.tsv")
    fail(site.base, tmp_path, "mgsm")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mgsm_en.tsv", "mgsm_es.tsv"]
    site.files[f"{MGSM}fr.tsv"] = kept
    site.asked.clear()
    assert run(site.base, tmp_path, "mgsm")[0] == 0
    assert site.asked == [f"{MGSM}{lang}.tsv" for lang in MGSM_LANGS[2:]]
