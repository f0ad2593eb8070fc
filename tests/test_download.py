"""data/download.py: files of the sets' names and layout, made up here, come from this machine."""
import contextlib
import csv
import functools
import io
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

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
    """The 200 queries of a file of XSafety."""
    return [f'query {n}, a "{topic}" in {folder}' for n in range(1, 201)]


@functools.cache
def build_files():
    """{path: bytes} of the four sets, with XSafety's oddities."""
    queries = [[n, "made up", "['None']", f"query {n}", f"{n} zh", f"{n} jv"] for n in range(315)]
    queries[0][3] = "a query\nof two lines"
    queries.insert(0, ["id", "source", "tags", "en", "zh", "jv"])
    prompts = [[n, f"prompt {n}", "none", "safe"] for n in range(1, 451)]
    files = {MULTIJAIL: b"\xef\xbb\xbf" + write_csv(queries),
             XSTEST: write_csv([["id", "prompt", "type", "label"], *prompts])}
    for lang in MGSM_LANGS:  # no header, and a quote is a character like others
        sums = [f'"{n} and {n} in {lang}?\t{2 * n}\n' for n in range(250)]
        files[f"{MGSM}{lang}.tsv"] = "".join(sums).encode()

    tables = {"hi/commen_sense.csv": [["a draft"]] * 200}
    for folder, names in NAMES.items():
        for topic, name in zip(TOPICS, names):
            tables[f"{folder}/{name}"] = [[f" {text} "] for text in write_queries(topic, folder)]
    goals = tables["de/Goal_Hijacking.csv"]
    tables["de/Goal_Hijacking.csv"] = [[*row, "", ""] for row in [*goals, [""]]]
    tables["fr/Insult.csv"] += [[], []]
    tables["ru/Insult.csv"][164] = [" "]
    for name, rows in tables.items():
        files[XSAFETY + name] = write_csv(rows)
    return files


class Handler(BaseHTTPRequestHandler):
    """Serves server.files; one that ends in `cut` is said to be longer than it is."""

    def do_GET(self):
        self.server.asked.append(self.path)
        data = self.server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        size = 10**6 if data.endswith(b"cut") else len(data)
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve():
    """A server of `files`; `asked` is what it was asked for."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as site:
        site.files = dict(build_files())
        site.asked = []
        site.base = f"http://127.0.0.1:{site.server_port}"
        threading.Thread(target=site.serve_forever, args=[0.01], daemon=True).start()
        yield site
        site.shutdown()


@pytest.fixture
def site():
    with serve() as site:
        yield site


def run(base, folder, *sets, python=(sys.executable, "-IS")):
    """The command, where nothing is installed -> (exit code, stdout, stderr)."""
    command = [*python, SCRIPT, *sets, "--to", folder, "--base", base]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "no_proxy": "*"})
    return done.returncode, done.stdout, done.stderr


def fail(*args, **options):
    """The line of a run that must end in exit code 2."""
    code, _, err = run(*args, **options)
    assert code == 2
    assert re.fullmatch(r"download\.py: error: .*\n", err)
    return err


def read_xsafety(folder):
    """{column: its cells} of xsafety.csv."""
    with open(folder / "xsafety.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {column: [row[column] for row in rows] for column in rows[0]}


def build_column(folder):
    """What a language's column of XSafety must hold."""
    return sum((write_queries(topic, folder) for topic in TOPICS), [])


# --- a run of all four

@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """(folder, stdout, stderr) of a run without openpyxl."""
    folder = tmp_path_factory.mktemp("public") / "made/here"
    with serve() as site:
        code, out, err = run(site.base, folder, "multijail", "xstest", "xsafety", "mgsm")
    assert code == 0
    return folder, out, err


def test_a_file_for_each_set_and_language_is_written_as_it_is(fetched):
    folder, _, _ = fetched
    paths = [MULTIJAIL, XSTEST, *(f"{MGSM}{lang}.tsv" for lang in MGSM_LANGS)]
    for path in paths:
        assert (folder / Path(path).name).read_bytes() == build_files()[path]
    assert len(list(folder.iterdir())) == len([*paths, "xsafety.csv"])


def test_prints_the_licence_and_the_source_of_each_set(fetched):
    _, out, _ = fetched
    for name, licence, path in [("multijail", "MIT", MULTIJAIL), ("xstest", "CC-BY-4.0", XSTEST),
                                ("xsafety", "research", XSAFETY), ("mgsm", "CC-BY-4.0", MGSM)]:
        owner, repository, commit = path.split("/")[1:4]
        url = f"https://github.com/{owner}/{repository}/tree/{commit}"
        assert re.search(f"^{name}: .*{licence}.*{url}$", out, re.MULTILINE)


def test_xsafety_becomes_one_table_joined_by_position_without_its_oddities(fetched):
    folder, _, _ = fetched
    table = read_xsafety(folder)
    assert list(table) == "id topic en zh ar de fr hi ja ru es".split()
    assert table["id"] == [str(n) for n in range(1, 2801)]
    assert table["topic"][199:201] == ["commonsense", "crimes_and_illegal_activities"]
    for lang in "en zh ar de fr hi ja".split():
        assert table[lang] == build_column(lang)
    assert table["es"] == build_column("sp")
    russian = build_column("ru")
    russian[1164] = ""  # a blank row keeps its place
    assert table["ru"] == russian


def test_bengali_is_left_out_with_a_word_where_openpyxl_is_missing(fetched):
    _, _, err = fetched
    assert re.fullmatch(".* bn .* openpyxl\n", err)


def test_bengali_is_read_from_its_spreadsheets(site, tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for cell in [" one ", None, *range(3, 201)]:
        book.active.append([cell, None])
    book.active["B205"] = ""  # blank rows at the end
    file = io.BytesIO()
    book.save(file)
    for name in NAMES["bn"][1:]:
        site.files[f"{XSAFETY}bn/{name}"] = file.getvalue()

    code, _, err = run(site.base, tmp_path, "xsafety", python=[sys.executable])
    assert (code, err) == (0, "")
    table = read_xsafety(tmp_path)
    assert list(table) == "id topic en zh ar bn de fr hi ja ru es".split()
    expected = ["one", "", *map(str, range(3, 201))]
    assert table["bn"] == write_queries("commonsense", "bn") + 13 * expected


# --- what is there

def test_what_is_there_is_left_and_not_asked_for(site, tmp_path):
    files = [tmp_path / name for name in ("MultiJail.csv", "xsafety.csv", "mgsm_en.tsv")]
    for file in files:
        file.write_text("mine")
    code, out, err = run(site.base, tmp_path, "multijail", "xsafety", "mgsm")
    assert (code, err) == (0, "")
    for file in files:
        assert file.read_text() == "mine"
        assert f"{file}: is there, and left as it is" in out
    assert site.asked == [f"{MGSM}{lang}.tsv" for lang in MGSM_LANGS[1:]]


# --- what can go wrong

@pytest.mark.parametrize("name, path, count", [
    ("multijail", MULTIJAIL, 315),
    ("xsafety", XSAFETY + "zh/commonsense.csv", 200)])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_count_is_a_line_and_nothing_is_written(site, tmp_path, name, path, count, change):
    lines = site.files[path].splitlines(keepends=True)
    site.files[path] = b"".join(lines[:-1] if change < 0 else [*lines, lines[-1]])
    line = fail(site.base, tmp_path, name)
    assert f"{path}: {count + change} rows instead of {count}" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, path, data", [
    ("mgsm", f"{MGSM}en.tsv", None),
    ("xsafety", XSAFETY + "en/Crimes_And_Illegal_Activities_en.csv", None),
    ("xstest", XSTEST, b"id,prompt\r\n1,cut"),
    ("xstest", XSTEST, b"\xff\xfe\x00")])
def test_what_is_not_there_or_not_the_file_is_a_line_with_its_url(
        site, tmp_path, name, path, data):
    site.files[path] = data
    assert site.base + path in fail(site.base, tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_a_dead_server_is_a_line(tmp_path):
    base = "http://127.0.0.1:1"
    assert base + MULTIJAIL in fail(base, tmp_path, "multijail")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_half_written(site, tmp_path):
    few_bytes = ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", sys.executable]
    assert "too large" in fail(site.base, tmp_path, "multijail", python=few_bytes)
    assert not list(tmp_path.iterdir())


def test_what_came_before_an_error_stays_and_the_next_run_goes_on(site, tmp_path):
    french = f"{MGSM}fr.tsv"
    kept = site.files.pop(french)
    fail(site.base, tmp_path, "mgsm")
    site.files[french] = kept
    site.asked.clear()
    assert run(site.base, tmp_path, "mgsm")[0] == 0
    assert site.asked == [f"{MGSM}{lang}.tsv" for lang in MGSM_LANGS[2:]]
