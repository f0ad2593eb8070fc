"""Get public query sets: python data/download.py multijail xstest xsafety mgsm --to data/public"""
import argparse
import csv
import io
import sys
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

MGSM = [f"mgsm/mgsm_{lang}.tsv" for lang in "en es fr de ru zh ja th sw bn te".split()]
SETS = {"multijail": ("DAMO-NLP-SG/multilingual-safety-for-LLMs", "MIT",
                      "577ac511437e07a256130945ef312a99158a18ad", 315, ["data/MultiJail.csv"]),
        "xstest": ("paul-rottger/exaggerated-safety", "CC-BY-4.0",
                   "d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d", 450, ["xstest_prompts.csv"]),
        "xsafety": ("Jarviswang94/Multilingual_safety_benchmark", "Apache-2.0, for research only",
                    "8c55b6a6cda594cd550a4921513238a2dd40eb5a", 2800, ["xsafety.csv"]),
        "mgsm": ("google-research/url-nlp", "CC-BY-4.0",
                 "452a21ad3dae5668c06ceeac21ff073e1e40f9be", 250, MGSM)}
TOPICS = """commonsense Crimes_And_Illegal_Activities Ethics_And_Morality Goal_Hijacking
    Inquiry_With_Unsafe_Opinion Insult Mental_Health Physical_Harm Privacy_And_Property
    Prompt_Leaking Reverse_Exposure Role_Play_Instruction Unfairness_And_Discrimination
    Unsafe_Instruction_Topic""".split()
LANGS = "en zh ar bn de fr hi ja ru sp".split()
ENDINGS = {"en": "_n.csv", "bn": "_n.xlsx"}  # of XSafety's files; in other languages .csv
RENAMED = {"en/Crimes_And_Illegal_Activities_n.csv": "en/Crimes_And_Illegal_Activities_en.csv",
           "ru/Crimes_And_Illegal_Activities.csv": "ru/Crimes_And_Illegal_Activitie.csv"}


def fetch(url, count):
    """A file -> (its bytes, its first column: a blank row is "", a header none), or ValueError."""
    try:
        data = urlopen(url, timeout=60).read()
        if url.endswith(".xlsx"):
            import openpyxl  # for XSafety's Bengali alone
            rows = openpyxl.load_workbook(io.BytesIO(data)).active.values
        else:
            quoting = csv.QUOTE_NONE if url.endswith(".tsv") else csv.QUOTE_MINIMAL
            rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), quoting=quoting)
        texts = [str(row[0] or "").strip() if row else "" for row in rows if row[:1] != ["id"]]
    except (HTTPException, OSError, ValueError, csv.Error) as e:
        raise ValueError(f"{url}: {e}") from None
    if len(texts) < count or any(texts[count:]):
        raise ValueError(f"{url}: {len(texts)} rows instead of {count}")
    return data, texts[:count]


def build_xsafety(url):
    """XSafety -> a CSV as bytes: id, topic and a column per language, rows joined by position."""
    langs = [lang for lang in LANGS if lang != "bn" or find_spec("openpyxl")]
    table = [["id", "topic", *langs[:-1], "es"]]  # which is sp there
    for topic in TOPICS:
        endings = {} if topic == "commonsense" else ENDINGS
        paths = [f"{lang}/{topic}{endings.get(lang, '.csv')}" for lang in langs]
        columns = [fetch(f"{url}/{RENAMED.get(path, path)}", 200)[1] for path in paths]
        table += [[i, topic.lower(), *texts] for i, texts in enumerate(zip(*columns), len(table))]
    if "bn" not in langs:
        print("xsafety.csv: bn is left out, it takes pip install openpyxl", file=sys.stderr)
    file = io.StringIO(newline="")
    csv.writer(file).writerows(table)
    return file.getvalue().encode()


def main(args):
    """Fetch what is not there, and write each file whole or not at all."""
    args.to.mkdir(parents=True, exist_ok=True)
    for name in args.sets:
        repository, licence, commit, count, paths = SETS[name]
        print(f"{name}: {count} rows, {licence}, https://github.com/{repository}/tree/{commit}")
        url = f"{args.base}/{repository}/{commit}"
        for path in paths:
            file = args.to / Path(path).name
            print(f"{file}: {'is there, and left as it is' if file.exists() else 'is fetched'}")
            if not file.exists():
                data = build_xsafety(url) if name == "xsafety" else fetch(f"{url}/{path}", count)[0]
                with TemporaryDirectory(dir=args.to) as part:
                    Path(part, file.name).write_bytes(data)
                    Path(part, file.name).replace(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__)
    parser.add_argument("sets", nargs="+", choices=SETS)
    parser.add_argument("--to", type=Path, default="data/public")
    parser.add_argument("--base", default="https://raw.githubusercontent.com")
    try:
        main(parser.parse_args())
    except (OSError, ValueError) as e:
        parser.error(e)
