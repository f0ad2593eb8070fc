"""Parallel queries: the same question in several languages, and no responses.

    queries = load_queries("data/queries.csv", ["en", "jv"])
    train, heldout = split(queries, 0.2)

A path is a file, or names a file per language: "en=a.jsonl,bbc=b.jsonl". A file is CSV (also with
; or |), TSV, JSONL, a JSON array, {"safety": [...]}, question<TAB>answer or a query a line.
- Wide: a column per language, <lang>, prompt_<lang> or its name; English also ALIASES.
- Long: a row per language, which a column names: LANGUAGE_COLUMNS.
- Named for its language: also one of ALIASES, a translated column, or the only one.
A text's language is never guessed. Once a file is read, a row is {column: cell}, the columns in
lower case, but for a language's, which is its code in capitals: EN, JV.
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
from dataclasses import dataclass, field
from itertools import chain

ALIASES = ["prompt", "instruction", "goal"]
BARE = "(no column name)"  # the column of texts that have none
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LINES = "\x1f"             # the delimiter of a file without one
# names of columns, with one blank around them or none; but "Yes, please" is a query
HEADER = r'(?!\w+, ) ?[\w"-]* ?(?:([\t,;|]) ?[\w"-]* ?)+'
LABEL_COLUMNS = ("label", "expected_behavior")
LANGUAGE_COLUMNS = ("language", "lang", "language_code", "lang_code", "prompt_language", "locale")
ROW_NUMBERS = ("prompt_id", "no", "id")  # unless they hold Indonesian, Norwegian
LABEL = "(?P<benign>safe.*|benign)|(?P<harmful>unsafe|harmful|refuse.*)|(?P<qa>qa)"
JSON = r'\s*[{[]\s*["{[]'  # how it begins
QUESTION_AND_ANSWER = r"[^\t]*([?？؟!.。।] ?\t|\t\W?\d)[^\t]*"  # and not two columns' names
CHAT = r"""\s*\[\s*\{.*['"](from|role)['"]\s*:"""
ROW_ID = r"\S*|\S+\s\S*\d\S*"  # as 17, q17 or row 17; a text has several words
CHOICE = r"((option|choice)[ _]?)?([a-z]|\d)"  # the name of a choice's column
# columns that hold no texts; pandas calls an index unnamed
NO_TEXT = "|".join([*LANGUAGE_COLUMNS, *LABEL_COLUMNS, "answer|choices|options|.*id|unnamed.*"])

with open(os.path.join(os.path.dirname(__file__), "prompts/languages.json")) as f:
    LANGUAGES = json.load(f)
CODES = {name.lower(): code for code, name in LANGUAGES.items()}


class UserError(ValueError):
    """Something the user can mend: the programs print it as one line and exit with code 2."""


@dataclass
class Query:
    id: str             # the file's own, else the row's number, from 1
    label: str          # harmful | benign | qa | mixed
    text: dict          # language -> query
    extra: dict         # every column of the row, its name in lower case, but a language's as EN
    texts: list         # as split() compares them: the English first, asked for or not
    answer: str = None  # of qa rows; a letter where there are choices
    choices: list = field(default_factory=list)


def load_queries(path, langs, label=None):
    """Parallel queries -> list of Query, each with a text in every one of `langs`.

    path: a file, or "en=FILE,jv=FILE". label: harmful | benign | mixed | qa, of data without
    a label column; None is harmful. UserError, of one line, for what cannot be read.
    stderr gets how many rows were read, used and skipped, and why. A question's choices and answer
    are those of the last of `langs`, where each language has its own.
    """
    path = os.fspath(path)
    if not langs or label not in (None, "harmful", "benign", "mixed", "qa"):
        raise fail(path, f"give a language or more, not {langs}, and a label that is harmful, "
                         f"benign, mixed or qa, not {label!r}")
    rows = read_parallel(path, [lang.lower() for lang in langs])
    columns = find_columns(rows)
    english = [name for name in columns if name in ALIASES]
    if english and "EN" not in columns:
        rename(path, rows, english, "en")
        columns = find_columns(rows)
    for lang in langs:
        if lang.upper() not in columns:
            raise fail(path, f"no column for language {lang}: found {', '.join(columns)[:150]}; "
                             f"call it {lang}, or give a file that is all {lang} as {lang}=FILE")
    label_column = next((name for name in LABEL_COLUMNS if name in columns), None)
    if not label and not label_column:
        if "answer" in columns:
            raise fail(path, "has answers and no label: say what its rows are, as by --label qa")
        tell(path, f"no column label or expected_behavior in {', '.join(columns)[:150]}: every row "
                   "is taken as harmful")
        label = "harmful"

    queries = []
    skipped = Counter()
    for n, row in enumerate(rows, 1):
        try:
            queries.append(read_query(row, n, langs, label, label_column))
        except (RecursionError, TypeError, ValueError) as reason:
            skipped[str(reason)[:80]] += 1
    settle_answers(path, [query for query in queries if query.choices])

    counts = f"{len(rows)} rows read, {len(queries)} used, {skipped.total()} skipped"
    if skipped:
        counts += f" ({', '.join(f'{n} {reason}' for reason, n in skipped.most_common())})"
    if not queries:
        raise fail(path, f"no usable row: {counts}")
    tell(path, counts)
    return queries


def split(queries, holdout):
    """-> (train, heldout): a share `holdout` (0 to 1) by a hash of the English text, or else the
    first. Raises ValueError."""
    if not 0 <= holdout <= 1:
        raise ValueError(f"holdout must be a fraction from 0 to 1, not {holdout}")
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
    if "\0" in text:
        raise ValueError("holds NUL bytes")
    ending = os.path.splitext(path)[1].lower()
    is_json = "json" in ending or re.match(JSON, text)
    rows = parse_json(text) if is_json else parse_table(text, ending)
    if not any(rows):
        raise ValueError("is empty, or has no rows")
    return rows


def parse_json(text):
    """JSONL, a JSON array or {"safety": [...]} -> rows."""
    load = functools.partial(json.loads, object_pairs_hook=read_object)
    try:
        rows = load(text)
    except json.JSONDecodeError as e:
        if e.msg != "Extra data":
            raise
        rows = load("[" + re.sub(r"\n\s*(?=\S)", r"\g<0>,", text) + "]")  # JSONL

    if isinstance(rows, dict):
        rows = rows.get("safety", rows)
    if not isinstance(rows, list):
        rows = [rows]
    return [read_row(row.items()) if isinstance(row, dict) else {BARE: row} for row in rows]


def read_object(pairs):
    """{name: value}. ValueError where two values have one name."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("has a duplicate column")
    return row


def read_row(pairs):
    """A row, the names of its columns in lower case."""
    return read_object([(name.strip().lower(), value) for name, value in pairs])


def find_delimiter(first, ending):
    """What is between the columns of a table, by its first line and the file's ending."""
    header = re.fullmatch(HEADER, first)
    if header:
        return header[1]
    if ending == ".csv":
        return max(",;|", key=first.count)
    return "\t" if ending == ".tsv" or "\t" in first else LINES


def parse_table(text, ending):
    """CSV, TSV or a query a line -> rows."""
    text = re.sub(r"\A[\r\n]*sep=[,;|\t][\r\n]+", "", text)  # Excel's first line
    first = re.search(r"[^\r\n]+|$", text)[0]
    delimiter = find_delimiter(first, ending)
    is_qa = delimiter == "\t" and re.fullmatch(QUESTION_AND_ANSWER, first)
    quoting = csv.QUOTE_NONE if is_qa or delimiter == LINES else csv.QUOTE_MINIMAL
    csv.field_size_limit(1 << 22)  # 128 KiB otherwise: less than a long document
    file = io.StringIO(text, newline="")
    reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True,
                        skipinitialspace=f'{delimiter} "' in first)
    try:
        lines = list(reader)
    except csv.Error as e:
        raise ValueError(f"line {reader.line_num}: {e}; check the quotes there and before") from e

    if not any(any(cells[1:]) for cells in lines):
        return [{BARE: "".join(cells)} for cells in lines]  # blank ones keep their place
    lines = [cells for cells in lines if cells]
    columns = [BARE, "answer"] if is_qa else lines.pop(0)
    rows = []
    for n, cells in enumerate(lines, 1):
        if len(cells) != len(columns):
            raise ValueError(f"row {n} has {len(cells)} cells instead of {len(columns)}")
        rows.append(read_row([pair for pair in zip(columns, cells) if pair[0].strip()]))
    return [{**row, "label": "qa"} for row in rows] if is_qa else rows


# --- rows of any shape -> wide rows

def read_parallel(path, langs):
    """A file, or a file per language -> wide rows."""
    first, *named = re.split(r"(?:^|\s*,)\s*([\w-]+)\s*=\s*", path)
    if first:
        return read_file(path, langs)
    files = dict(zip(map(str.lower, named[::2]), named[1::2]))
    if not set(langs) <= set(files) or 2 * len(files) < len(named):
        raise fail(path, f"name one file for each of {', '.join(langs)}, and none twice")

    parts = {lang: read_file(file, [lang], is_named=True) for lang, file in files.items()}
    keys = find_keys(parts)
    if len(keys) > 1:  # by the one called id, or by none
        keys = [key for key in keys if key == "id"]
    ids = [tuple(clean(row.get("id")) for row in part) for part in parts.values()]
    counts = [len(cells) for cells in ids]
    known = {cells for cells in ids if any(cells)}
    if not keys and (len(known) > 1 or len(set(counts)) > 1):
        raise fail(path, f"unmatched ids, or numbers of rows ({counts}): give each row an id that "
                         "is once in every file")
    if len(parts) > 1:
        how = f"on {keys[0]}" if keys else "by position: no one unique id is in all"
        tell(path, f"joined {how}")
    return join(parts, keys, langs[-1])


def read_file(path, langs, is_named=False):
    """A file -> wide rows, where EN is the column of English.

    is_named: the file was named for its language, langs[0].
    """
    try:
        file = os.path.expanduser(path)
        rows = list(map(dict, parse_file(file, os.stat(file).st_mtime_ns)))
    except (OSError, RecursionError, ValueError) as e:
        problem = getattr(e, "strerror", None) or e
        raise fail(path, f"{problem}; give UTF-8 CSV, TSV, JSONL or JSON") from None
    if find_columns(rows) == [BARE]:
        rows = read_header(path, rows, langs)

    columns = find_columns(rows)
    numbers = [name for name in ROW_NUMBERS
               if all(re.fullmatch(ROW_ID, clean(row.get(name))) for row in rows)]
    if is_named and columns != ["id"]:
        numbers.append("id")
    for lang in sorted({*CODES.values(), *langs}):
        own = [name for name in columns if read_code(name) == lang and name not in numbers]
        if len(own) > 1:
            own = [name for name in own if name not in ROW_NUMBERS]
        if len(own) == 1 or own and lang in [*langs, "en"]:
            rename(path, rows, own, lang)

    columns = find_columns(rows)
    language = find_language(rows, columns, langs)
    if language and not {lang.upper() for lang in langs} <= set(columns):
        return widen(path, rows, columns, langs, language)
    if is_named or len(langs) == 1 and BARE in columns:
        rename(path, rows, find_texts(columns, langs[0]), langs[0])
    return rows


def find_language(rows, columns, langs):
    """The column that names a row's language, or None. By another name than language or lang it
    counts only where rows differ in it, or it holds what is asked for."""
    for name in [name for name in LANGUAGE_COLUMNS if name in columns]:
        codes = {read_code(clean(row.get(name))) for row in rows}
        if name in LANGUAGE_COLUMNS[:2] or len(codes) > 1 or set(langs) <= codes:
            return name


def rename(path, rows, columns, lang):
    """The one column of columns gets its language's name: the code in capitals."""
    if len(columns) != 1:
        how_many = "several columns" if columns else "no column"
        names = ", ".join(columns or find_columns(rows))[:150]
        raise fail(path, f"{how_many} may be {lang}: {names}; call one {lang}, and no other")
    for row in rows:
        row[lang.upper()] = row.pop(columns[0], None)


def read_header(path, rows, langs):
    """Rows of one column: its first cell is its name, or it has none."""
    cells = [clean(row.get(BARE)) for row in rows]
    first = next(filter(None, cells), "")
    is_name = read_code(first) in {*ALIASES, *CODES.values(), *langs}
    taken = "the column's name" if is_name else "a query"
    tell(path, f"its first line, {first[:60]!r}, is taken for {taken}")
    if not is_name:
        return rows
    return [{first.lower(): row.get(BARE)} for row in rows[cells.index(first) + 1:]]


def widen(path, rows, columns, langs, language):
    """A row per language -> a row for all, joined on the one id that they share."""
    groups = {}
    for row in rows:
        groups.setdefault(read_code(clean(row.get(language))), []).append(row)
    counts = str({lang: len(group) for lang, group in groups.items()})[:150]
    tell(path, f"rows by {language}: {counts}")
    if not set(langs) <= set(groups):
        raise fail(path, f"not all of {langs} are in its column {language}, which holds {counts}")

    groups = {lang: group for lang, group in groups.items() if lang in (*langs, "en")}
    for lang, group in groups.items():  # English as well: split() goes by it
        rename(path, group, find_texts(columns, lang, "translated"), lang)
    keys = find_keys(groups)
    if len(keys) == 1:
        return join(groups, keys, langs[-1])
    if len(langs) > 1:
        raise fail(path, "its rows are joined on the one column ending in id that is unique in "
                         f"each language and the same in all: that is true of {keys}")
    return groups[langs[0]]


def find_keys(parts):
    """The columns ending in id that have the same values in every part, and no value twice."""
    first, *_ = parts.values()
    keys = []
    for column in [name for name in find_columns(first) if name.endswith("id")]:
        values = [sorted(clean(row.get(column)) for row in part) for part in parts.values()]
        distinct = sorted({*values[0]} - {""})
        if all(cells == distinct for cells in values):
            keys.append(column)
    return keys


def join(parts, keys, lang):
    """Rows of {language: rows}, joined on keys[0] or else by position, in the order of the first.
    A text is its own part's, another cell what lang's row says, or the first that says anything;
    labels that differ are none."""
    groups = {}
    for name, part in parts.items():
        for n, row in enumerate(part, 1):
            key = clean(row[keys[0]]) if keys else n
            groups.setdefault(key, {})[name] = row

    joined = []
    for key, rows in groups.items():
        row = {code.upper(): said.get(code.upper()) for code, said in rows.items()}
        for said in [rows[lang], *rows.values()]:
            for name, cell in said.items():
                if not clean(row.get(name)):
                    row[name] = cell
        for column in LABEL_COLUMNS:
            labels = [clean(said.get(column)) for said in rows.values()]
            if len({find_label(label) for label in labels if label}) > 1:
                row[column] = f"differs: {', '.join(labels)}"
        row.setdefault("id", key)
        joined.append(row)
    return joined


# --- columns

def find_columns(rows):
    """The columns of rows, in order."""
    return list(dict.fromkeys(chain(*rows)))


def read_code(name):
    """The language that a column or a language's name is of, if it is of one."""
    name = name.lower().removeprefix("prompt_")
    return CODES.get(name, name)


def find_texts(columns, lang, hint="translat"):
    """The columns that may hold the texts of a file or of rows whose language is known."""
    if lang.upper() in columns:
        return [lang.upper()]
    translated = [name for name in columns if "translated" in name]
    if len(translated) == 1 and lang != "en":
        return translated
    found = [name for name in columns if name in ALIASES or hint in name]
    return found or [name for name in columns if not re.fullmatch(NO_TEXT, name)
                     and not name.isupper()]


def clean(value):
    """A cell as text, "" for None."""
    return "" if value is None else str(value).strip()


# --- wide rows -> queries

def read_query(row, n, langs, label, label_column):
    """A row -> Query, of its own label where there is a column. ValueError with the reason if there
    is none in it."""
    if label_column:
        label = find_label(clean(row.get(label_column)))
    if not label:
        raise ValueError(f"{label_column} {row.get(label_column)!r}")
    cells = {lang: read_cell(row.get(lang.upper())) for lang in ["en", *langs]}
    missing = [lang for lang in langs if not cells[lang]]
    if missing:
        raise ValueError(f"without a text in {' and '.join(missing)}")
    text = {lang: cells[lang] for lang in langs}
    texts = [normalise(cell) for cell in cells.values() if cell]
    query = Query(clean(row.get("id")) or str(n), label, text, row, texts)
    if label == "qa":
        query.answer = read_scalar(row.get("answer"))
        query.choices = read_choices(row)
        if not query.answer:
            raise ValueError("qa without an answer")
        if not query.choices and re.fullmatch("[A-J]", query.answer):
            raise ValueError("qa whose answer is a letter, and no choices: call them choices")
    json.dumps(vars(query), ensure_ascii=False).encode()  # raises on lone surrogates
    return query


def read_cell(cell):
    """The text of a cell: a string, or a chat list's first human turn; "" if there is none."""
    if isinstance(cell, str) and re.match(CHAT, cell, re.S):
        cell = json.loads(cell)
    if isinstance(cell, list):
        turns = [turn for turn in cell if isinstance(turn, dict)
                 and turn.get("from", turn.get("role")) in ("human", "user")]
        cell = turns and turns[0].get("value", turns[0].get("content"))
    return cell if isinstance(cell, str) and cell.strip() else ""


def find_label(text):
    """harmful | benign | qa, or None."""
    match = re.fullmatch(LABEL, text.lower(), re.S)
    return match and match.lastgroup


def read_scalar(value):
    """A text or a number as text. ValueError for what holds several."""
    if isinstance(value, (list, dict)):
        raise ValueError(f"one text is needed, not {value}")
    return clean(value)


def read_choices(row):
    """A question's choices, {name: text}: of the column choices or options, or of a column each;
    [] without any."""
    value = row.get("choices") or row.get("options")
    if value and isinstance(value, str):
        value = json.loads(value)
    if value and isinstance(value, list) and isinstance(value[0], dict):
        if {"label", "text"} - set.intersection(*map(set, value)):
            raise ValueError("choices need a label and a text each")
        value = {one["label"]: one["text"] for one in value}
    if isinstance(value, list):
        value = {"text": value}
    if not isinstance(value, dict):
        value = {name[-1]: row[name] for name in row if re.fullmatch(CHOICE, name)}

    if "text" not in value:
        value = {"label": list(value), "text": list(value.values())}
    names = value.get("label", LETTERS)
    texts = value["text"]
    if len(texts) > min(len(names), len(LETTERS)):
        raise ValueError("more choices than letters or labels")
    choices = {str(name).upper(): read_scalar(text) for name, text in zip(names, texts)
               if clean(text)}
    return choices if len(choices) > 1 else []


def settle_answers(path, queries):
    """Answers -> the letters of their choices, if one reading alone fits the whole file; choices ->
    lists of their texts. In place."""
    found = []
    for query in queries:
        answer = query.answer.upper()
        texts = [text.upper() for text in query.choices.values()]
        numbers = [str(n) for n in range(len(texts) + 1)]
        readings = [list(query.choices), texts, numbers[:-1], numbers[1:]]
        found.append([LETTERS[names.index(answer)] if answer in names else None
                      for names in readings])

    possible = {letters for letters in zip(*found) if all(letters)}
    if queries and len(possible) != 1:
        bad = [query.id for query, letters in zip(queries, found) if not any(letters)]
        bad = bad or [query.id for query in queries]
        raise fail(path, f"its answers have {len(possible)} readings as letters, texts or indices "
                         f"(from 0 or 1) of their choices; give letters (see rows {bad[:3]})")
    for query, letter in zip(queries, *possible):
        query.answer = letter
        query.choices = list(query.choices.values())
