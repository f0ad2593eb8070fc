"""Parallel queries: the same question in several languages, and no responses.

    queries = load_queries("data/queries.csv", ["en", "jv"])
    train, heldout = split(queries, 0.2)

A path is a file, or names a file per language: "en=a.jsonl,bbc=b.jsonl". A file is what its ending
says: .csv, .tsv (or question<TAB>answer), .jsonl, .json (an array, {"safety": [...]}), else a query
a line.
- Wide: a column per language, <lang>, prompt_<lang> or its name; English also ALIASES.
- Long: a row per language, which the column language or lang names.
- Named for its language: also one of ALIASES, a translated column, or the only one.
- Without column names: of the one language that is asked for, or named.
A text's language is never guessed. Once a file is read, a row is {column: cell}, the columns in
lower case.
"""
import csv
import functools
import hashlib
import io
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import chain, takewhile

ALIASES = ["prompt", "instruction", "goal"]
BARE = "(no column name)"  # the column of texts that have none
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LINES = "\x1f"             # the delimiter of a file without one
LABEL_COLUMNS = ("label", "expected_behavior")
ROW_IDS = ("id", "prompt_id", "id_prompt")  # unless they hold Indonesian
TRANSLATED = ".*translated.*|translation"
LABEL = "(?P<benign>safe.*|benign)|(?P<harmful>unsafe|harmful|refuse.*)|(?P<qa>qa)"
# of a first line that does not name two columns
QUESTION_AND_ANSWER = r"\s*[^\t\n]*([?？؟!.。।] ?\t|\t\W?\d)[^\t\n]*(\n|\Z)"
CHAT = r"""\s*\[\s*\{.*['"](from|role)['"]\s*:"""
ROW_ID = r"\S*|\S+\s\S*\d\S*"  # as 17, q17 or row 17; a text has several words
# columns that hold no texts: a choice, an index, which pandas calls unnamed or nothing …
NO_TEXT = "language|lang|label|expected_behavior|answer|choices|options|.*id|unnamed.*|[a-j]?"

with open(os.path.join(os.path.dirname(__file__), "prompts/languages.json")) as f:
    LANGUAGES = json.load(f)
CODES = {name.lower(): code for code, name in LANGUAGES.items()}


class UserError(ValueError):
    """Something the user can mend: the programs print it as one line and exit with code 2."""


@dataclass
class Query:
    id: str             # the file's own, else the row's number, from 1
    label: str          # harmful | benign | qa | mixed
    text: dict          # language -> query, English among them where the data has it
    extra: dict         # every column of the row, its name in lower case
    texts: list         # as split() compares them: the English first
    answer: str = None  # of qa rows; a letter where there are choices
    choices: list = ()


def load_queries(path, langs, label=None):
    """Parallel queries -> list of Query, each with a text in every one of `langs`.

    path: a file, or "en=FILE,jv=FILE". label: harmful | benign | mixed | qa, of data without
    a label column; None is harmful. UserError, of one line, for what cannot be read.
    stderr gets how many rows were read, used and skipped, and why. A question's choices and answer
    are those of the last of `langs`, where each language has its own.
    """
    path = os.fspath(path)
    parts, key = read_parts(path, langs)
    joined = {}  # what joins them: {language: its cell and its row}
    for lang, part in parts.items():
        for n, (cell, row) in enumerate(part, 1):
            joined.setdefault(clean(row[key]) if key else n, {})[lang] = cell, row

    columns = list(dict.fromkeys(chain(*(row for _, row in chain(*parts.values())))))
    label_column = next((name for name in LABEL_COLUMNS if name in columns), None)
    if not label and not label_column:
        if "answer" in columns:
            raise fail(path, "has answers and no label: say what its rows are, as by --label qa")
        tell(path, f"every row is taken as harmful: no column label or expected_behavior in "
                   f"{', '.join(columns)}")
        label = "harmful"

    queries = []
    skipped = Counter()
    for name, cells in joined.items():
        try:
            queries.append(read_query(str(name), cells, langs, label, label_column))
        except (AttributeError, TypeError, ValueError) as reason:
            skipped[str(reason)] += 1

    counts = f"{len(joined)} rows read, {len(queries)} used, {skipped.total()} skipped"
    if skipped:
        counts += f" ({', '.join(f'{n} {reason}' for reason, n in skipped.most_common())})"
    if not queries:
        raise fail(path, f"no usable row: {counts}")
    tell(path, counts)
    return queries


def split(queries, holdout):
    """-> (train, heldout): a share `holdout` (0 to 1) by a hash of the English text, or else the
    first."""
    parts = [], []
    for query in queries:
        digest = hashlib.sha256(b"queries" + query.texts[0].encode()).digest()
        is_heldout = int.from_bytes(digest[:6], "big") / 2**48 < holdout
        parts[is_heldout].append(query)
    return parts


def normalise(text):
    """What is the same query: in NFC, with single blanks."""
    return " ".join(unicodedata.normalize("NFC", text).split())


# --- what is told

def fail(path, problem):
    """The error for a file, its message one printable line of at most 400 characters."""
    line = f"{path[-120:]}: {problem}"[:400]
    return UserError("".join(c if c.isprintable() else " " for c in line))


@functools.cache
def tell(path, what):
    """A line on stderr, once in a process: a file is loaded for one language after another."""
    print(fail(path, what), file=sys.stderr)


# --- a file -> rows: {column: cell}

@functools.lru_cache(maxsize=16)
def parse_file(path, modified):
    """A file of any format -> rows, which nobody changes. modified: its time, in ns."""
    with open(path, encoding="utf-8-sig", newline="") as f:
        text = f.read().rstrip("\r\n")
    ending = os.path.splitext(path)[1].lower()
    delimiter = {".csv": ",", ".tsv": "\t"}.get(ending, LINES)
    rows = parse_json(text) if "json" in ending else parse_table(text, delimiter)
    if not any(rows):
        raise ValueError("is empty, or has no rows")
    return rows


def parse_json(text):
    """JSONL, a JSON array or {"safety": [...]} -> rows."""
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as e:
        if e.msg != "Extra data":
            raise
        rows = json.loads("[" + re.sub(r"\n\s*(?=\S)", r"\g<0>,", text) + "]")  # JSONL

    if isinstance(rows, dict):
        rows = rows.get("safety", [rows])
    named = [row if isinstance(row, dict) else {BARE: row} for row in rows]
    return [read_row(row, row.values()) for row in named]


def read_row(columns, cells):
    """A row, the names of its columns in lower case. ValueError where two are one."""
    row = {name.strip().lower(): cell for name, cell in zip(columns, cells)}
    if len(row) < len(columns):
        raise ValueError("has a duplicate column")
    return row


def parse_table(text, delimiter):
    """CSV, TSV or a query a line -> rows."""
    is_qa = delimiter == "\t" and re.match(QUESTION_AND_ANSWER, text)
    quoting = csv.QUOTE_NONE if is_qa or delimiter == LINES else csv.QUOTE_MINIMAL
    file = io.StringIO(text, newline="")
    lines = list(csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True))
    if not any(any(cells[1:]) for cells in lines):
        return [{BARE: "".join(cells)} for cells in lines]  # blank ones keep their place
    lines = [cells for cells in lines if cells]
    columns = [BARE, "answer"] if is_qa else lines.pop(0)
    rows = []
    for n, cells in enumerate(lines, 1):
        if len(cells) != len(columns):
            raise ValueError(f"row {n} has {len(cells)} cells instead of {len(columns)}")
        rows.append(read_row(columns, cells))
    return [{**row, "label": "qa"} for row in rows] if is_qa else rows


# --- rows of any shape -> the texts of each language

def split_path(path):
    """"en=FILE,jv=FILE" -> ["", en, FILE, jv, FILE]; what names no language -> [FILE]."""
    return re.split(r"(?:^|\s*,)\s*([\w-]+)\s*=\s*", path)


def read_parts(path, langs):
    """({language: [(its cell, its row), …]} of a file, or of a file per language; the column that
    joins them, None by position). English is among them where there is any."""
    first, *named = split_path(path)
    files = dict(zip(map(str.lower, named[::2]), named[1::2]))
    lower = list(map(str.lower, langs))
    if "" in named or 2 * len(files) < len(named) or not first and not set(lower) <= set(files):
        raise fail(path, f"name one file for each of {', '.join(langs)}, and none twice")
    parts = {}
    for lang in dict.fromkeys(["en", *langs]):
        if file := files.get(lang.lower(), first):
            part = take_texts(file, lang.lower(), lower, is_own=not first)
            if part:
                parts[lang] = part

    row = parts[langs[0]][0][1]
    keys = [name for name in row if name.endswith("id") and is_key(parts, name)]
    if first and find_language(row):
        if len(keys) == 1:
            return parts, keys[0]
        if len(langs) == 1:
            return {lang: parts[lang] for lang in langs}, None
        raise fail(path, "its rows are joined on the one column ending in id that is unique in "
                         f"each language and the same in all: that is true of {keys}")
    key = "id" if "id" in keys else None
    ids = {tuple(clean(row.get("id")) for _, row in part) for part in parts.values()}
    if not key and (len(set(map(len, ids))) > 1 or sum(map(any, ids)) > 1):
        raise fail(path, f"unmatched ids, or numbers of rows ({[*map(len, parts.values())]}): give "
                         "each row an id that is once in every file")
    if len(files) > 1:
        tell(path, f"joined {'on id' if key else 'by position: no unique id is in all'}")
    return parts, key


def take_texts(path, lang, langs, is_own):
    """[(cell, row), …] of the one column of a file that holds lang's texts, of the rows in it where
    a column names them. is_own: all of the file is in it. None is an error for one of `langs`, as
    several are."""
    rows = read_file(path, langs)
    is_own = is_own or BARE in rows[0] and langs == [lang]
    if language := find_language(rows[0]):
        is_own = True
        n = len(rows)
        rows = [row for row in rows if read_code(clean(row.get(language))) == lang]
        tell(path, f"{len(rows)} of {n} rows are in {lang}, by {language}")

    columns = list(dict.fromkeys(chain(*rows)))
    found = [name for name in columns if read_code(name) == lang and name not in ROW_IDS]
    if not found and (is_own or lang == "en"):
        found = [name for name in columns
                 if name in ALIASES or is_own and re.fullmatch(TRANSLATED, name)]
    if not found and is_own:
        found = [name for name in columns
                 if not re.fullmatch(NO_TEXT, name) and read_code(name) not in CODES.values()]
    if len(found) > 1 and is_own and lang != "en":
        found = [name for name in found if "translated" in name] or found
    if len(found) > 1 or lang in langs and not found:
        raise fail(path, f"{len(found) or 'no'} columns may be {lang}: call one {lang}, and no "
                         f"other, or give a file that is all {lang} as {lang}=FILE; it has "
                         f"{', '.join(found or columns)}")
    return [(row.get(found[0]), row) for row in rows] if found else []


def read_file(path, langs):
    """A file -> rows. A column of ROW_IDS of texts, of Indonesian, gets its name in capitals.
    """
    try:
        file = os.path.expanduser(path)
        rows = list(map(dict, parse_file(file, os.stat(file).st_mtime_ns)))
    except (OSError, RecursionError, TypeError, ValueError, csv.Error) as e:
        raise fail(path, f"{e}; give UTF-8 CSV, TSV, JSONL or JSON") from None
    if BARE in rows[0]:  # the first cell is the column's name, or it has none
        first = clean(rows[0][BARE])
        is_name = len(rows) > 1 and read_code(first) in (*ALIASES, *CODES.values(), *langs)
        taken = "the column's name" if is_name else "a query"
        tell(path, f"its first line is taken for {taken}: {first!r}")
        if is_name:
            rows = [{first.lower(): row[BARE]} for row in rows[1:]]
    for name in ROW_IDS:
        if not all(re.fullmatch(ROW_ID, clean(row.get(name))) for row in rows):
            for row in rows:
                row[name.upper()] = row.pop(name, None)
    return rows


def is_key(parts, column):
    """Whether a column has the same values in every part, and none twice."""
    values = [sorted(clean(row.get(column)) for _, row in part) for part in parts.values()]
    return all(cells == sorted({*values[0]} - {""}) for cells in values)


# --- columns

def find_language(row):
    """The column that names a row's language, or None."""
    return next((name for name in ("language", "lang") if name in row), None)


def read_code(name):
    """The language that a column or a language's name is of, if it is of one."""
    name = re.sub("^prompt[_ ]|[_ ]prompt$", "", name.lower())
    return CODES.get(name, name)


def clean(value):
    """A cell as text, "" for None."""
    return "" if value is None else str(value).strip()


# --- cells -> queries

def read_query(name, cells, langs, label, label_column):
    """{language: (its cell, its row)} -> Query, of its own label where there is a column.
    ValueError with the reason if there is none in it."""
    text = {lang: read_cell(cell) for lang, (cell, _) in cells.items()}
    rows = [row for _, row in cells.values()]
    if label_column:
        labels = [clean(row.get(label_column)) for row in rows]
        found = {find_label(said) for said in labels if said}
        if len(found) != 1 or None in found:
            raise ValueError(f"{label_column} {', '.join(dict.fromkeys(labels))!r}")
        [label] = found
    if missing := [lang for lang in langs if not text[lang]]:
        raise ValueError(f"without a text in {' and '.join(missing)}")

    extra = {}
    for row in [*rows, cells[langs[-1]][1]]:  # a cell that is blank gives way
        extra.update((column, cell) for column, cell in row.items() if clean(cell))
    texts = [normalise(each) for each in text.values() if each]
    query = Query(clean(extra.get("id")) or name, label, text, extra, texts)
    if label == "qa":
        query.answer, query.choices = read_question(extra)
    json.dumps(vars(query), ensure_ascii=False).encode()  # raises on lone surrogates
    return query


def read_cell(cell):
    """The text of a cell: a string, or a chat list's first human turn; "" if there is none."""
    if isinstance(cell, str) and re.match(CHAT, cell, re.S):
        cell = json.loads(cell)
    if isinstance(cell, list):
        turns = [turn for turn in cell if turn.get("from", turn.get("role")) in ("human", "user")]
        cell = turns and turns[0].get("value", turns[0].get("content"))
    return cell if isinstance(cell, str) and cell.strip() else ""


def find_label(text):
    """harmful | benign | qa, or None."""
    match = re.fullmatch(LABEL, text.lower(), re.S)
    return match and match.lastgroup


def read_question(row):
    """(answer, choices) of a question; choices: the list in its column choices, or its columns A,
    B, …; [] without any. Of choices the answer is a letter, or JSON has it as an index, from 0.
    ValueError for what is neither."""
    choices = row.get("choices") or [row[name] for name in takewhile(row.__contains__, LETTERS)]
    if isinstance(choices, str):
        choices = json.loads(choices)
    answer, *texts = [clean(cell) for cell in [row.get("answer"), *choices]]
    if texts and isinstance(row.get("answer"), int):
        answer = LETTERS[row["answer"]:][:1]
    is_letter = answer.lower() in list(LETTERS[:len(texts) or 10])
    if not answer or is_letter != bool(texts) or not isinstance(choices, list):
        raise ValueError(f"qa whose answer is {answer!r}, of {len(texts)} choices")
    return answer.upper() if texts else answer, texts
