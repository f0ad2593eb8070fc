"""Promises of data/download.py: the public sets as files that data/queries.py reads, whole or not
at all. The files here are made up, of the same names and layout, and served from this machine."""
import csv
import importlib.util
import io
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data.queries import load_queries

ROOT = Path(__file__).parents[1]
SAFETY = "Jarviswang94/Multilingual_safety_benchmark/8c55b6a6cda594cd550a4921513238a2dd40eb5a"
JAIL = "DAMO-NLP-SG/multilingual-safety-for-LLMs/577ac511437e07a256130945ef312a99158a18ad"
XSTEST = "paul-rottger/exaggerated-safety/d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d"
MGSM = "google-research/url-nlp/452a21ad3dae5668c06ceeac21ff073e1e40f9be"
TOPICS = ("commonsense Crimes_And_Illegal_Activities Ethics_And_Morality Goal_Hijacking "
          "Inquiry_With_Unsafe_Opinion Insult Mental_Health Physical_Harm Privacy_And_Property "
          "Prompt_Leaking Reverse_Exposure Role_Play_Instruction Unfairness_And_Discrimination "
          "Unsafe_Instruction_Topic").split()


def write(path, rows, delimiter=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, delimiter=delimiter).writerows(rows)


def name_file(lang, topic):
    """What XSafety calls a file."""
    if lang == "en":
        ends = {"commonsense": "", "Crimes_And_Illegal_Activities": "_en"}
        return f"{topic}{ends.get(topic, '_n')}.csv"
    if lang == "bn":
        return "commonsense.csv" if topic == "commonsense" else f"{topic}_n.xlsx"
    if lang == "ru" and topic.startswith("Crimes"):
        return "Crimes_And_Illegal_Activitie.csv"
    return f"{topic}.csv"


def write_texts(path, texts, columns=1):
    """A text a row, without a header, with empty columns beside them or none."""
    if path.suffix == ".xlsx":
        openpyxl = pytest.importorskip("openpyxl", reason="no openpyxl: pip install openpyxl")
        book = openpyxl.Workbook()
        for text in texts:
            book.active.append([text])
        path.parent.mkdir(parents=True, exist_ok=True)
        book.save(path)
    else:
        write(path, [[text] + [""] * (columns - 1) for text in texts])


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(the address of a server, its folder): all four sets, made up."""
    root = tmp_path_factory.mktemp("served")
    langs = "en zh it vi ar ko th bn sw jv".split()
    write(root / JAIL / "data" / "MultiJail.csv", [
        ["id", *langs], *([i, *(f"{lang} query,\n{i}" for lang in langs)] for i in range(315))])
    write(root / XSTEST / "xstest_prompts.csv", [
        ["id", "type", "prompt"], *([i, "figure", f"How do I kill time {i}?"] for i in range(450))])
    for lang in "en es fr de ru zh ja th sw bn te".split():
        write(root / MGSM / "mgsm" / f"mgsm_{lang}.tsv",
              [[f"What is {i} and one, in {lang}?", i + 1] for i in range(250)], "\t")
    for lang in "en zh ar de fr hi ja ru sp bn".split():
        if lang == "bn" and not importlib.util.find_spec("openpyxl"):
            continue
        for topic in TOPICS:
            texts = [f"{topic} in {lang}, {i}" for i in range(200)]
            if (lang, topic) == ("ru", "Insult"):
                texts[164] = ""
            columns = 3 if (lang, topic) == ("fr", "Insult") else 1
            write_texts(root / SAFETY / lang / name_file(lang, topic), texts, columns)
    write_texts(root / SAFETY / "hi" / "commen_sense.csv", ["not this one"] * 200)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", root
    server.shutdown()


def download(base, to, *sets):
    return subprocess.run([sys.executable, ROOT / "data" / "download.py", *sets, "--to", to,
                           "--base", base], capture_output=True, text=True, timeout=60)


def test_the_four_sets_end_in_files_that_are_read(served, tmp_path):
    done = download(served[0], tmp_path, "multijail", "xstest", "xsafety", "mgsm")
    assert done.returncode == 0, done.stderr
    assert "CC-BY-4.0" in done.stdout and "https://github.com/" in done.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"MultiJail.csv", "xstest_prompts.csv", "xsafety.csv",
                     *(path.name for path in (served[1] / MGSM / "mgsm").iterdir())}
    for repository, name in ((f"{JAIL}/data", "MultiJail.csv"), (f"{MGSM}/mgsm", "mgsm_sw.tsv")):
        assert (tmp_path / name).read_bytes() == (served[1] / repository / name).read_bytes()
    assert len(load_queries(tmp_path / "MultiJail.csv", ["en", "jv"])) == 315
    assert len(load_queries(tmp_path / "mgsm_sw.tsv", ["sw"])) == 250


def test_xsafety_is_one_wide_file_joined_by_position(served, tmp_path):
    assert download(served[0], tmp_path, "xsafety").returncode == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "xsafety.csv").read_text("utf-8"))))
    assert len(rows) == 2800 and {"id", "topic", "en", "es", "ru", "hi"} <= rows[0].keys()
    assert "sp" not in rows[0]
    for row in rows:
        topic, _, at = row["en"].partition(" in en, ")
        assert row["topic"] == topic.lower()
        for lang in ("zh", "ar", "de", "fr", "hi", "ja", "es"):
            assert row[lang] == f"{topic} in {'sp' if lang == 'es' else lang}, {at}"
        blank = (topic, at) == ("Insult", "164")  # a blank row keeps its place
        assert row["ru"] == ("" if blank else f"{topic} in ru, {at}")
    assert len(load_queries(tmp_path / "xsafety.csv", ["en", "zh"], "mixed")) == 2800


def test_bengali_takes_openpyxl_or_is_left_out_with_a_word(served, tmp_path):
    done = download(served[0], tmp_path, "xsafety")
    header = (tmp_path / "xsafety.csv").read_text("utf-8").splitlines()[0].split(",")
    if importlib.util.find_spec("openpyxl"):
        assert "bn" in header
    else:
        assert "bn" not in header and "openpyxl" in done.stderr


def test_what_is_there_is_left_as_it_is(served, tmp_path):
    (tmp_path / "MultiJail.csv").write_text("mine")
    done = download(served[0], tmp_path, "multijail")
    assert done.returncode == 0 and "left as it is" in done.stdout
    assert (tmp_path / "MultiJail.csv").read_text() == "mine"


@pytest.mark.parametrize("break_it, said", [
    (lambda path: path.unlink(), "MultiJail.csv"),
    (lambda path: path.write_text("id,en,jv\n1,a,b\n"), "rows"),
    (lambda path: path.write_bytes(b"\xff\xfe\xff"), "MultiJail.csv")])
def test_what_is_missing_or_not_whole_is_one_line_and_nothing_is_written(
        served, tmp_path, break_it, said):
    path = served[1] / JAIL / "data" / "MultiJail.csv"
    kept = path.read_bytes()
    try:
        break_it(path)
        done = download(served[0], tmp_path / "to", "multijail")
    finally:
        path.write_bytes(kept)
    assert done.returncode == 2 and not [*(tmp_path / "to").iterdir()]
    assert done.stderr.startswith("download.py: error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr


@pytest.mark.parametrize("argv", [["multijail"], ["no-such-set"]])
def test_no_server_or_no_such_set_is_one_line(tmp_path, argv):
    done = download("http://127.0.0.1:9", tmp_path / "to", *argv)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("download.py: error: ")
