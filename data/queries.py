"""Parallel queries: the same question in several languages, and no responses.

    queries = load_queries("data/queries.csv", ["en", "jv"])
    train, heldout = split(queries, 0.2)

A path is one file with a column per language (CSV, TSV, JSONL, a JSON array or {"safety": [...]}), or names a file per
language, "en=a.jsonl,bbc=b.jsonl", joined on `id` ({"safety": ...} and MGSM's header-less TSV: by position).
English is the column en|prompt|instruction|goal, another language <lang>|prompt_<lang>; in a file that was named for
its language also prompt|instruction|goal. A cell is a string or a chat list, of which the first human turn is taken.
A column `id` may be row ids or Indonesian. It is Indonesian if any value has a space in it, or if `id` is asked for as
a language and some value has no digit. Else, and beside a column `prompt_id`, and where files are joined: row ids.
"""
import csv
import hashlib
import io
import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass

BARE = "(no column name)"  # the column of texts that have none: of {"safety": ["...", ...]} and header-less files

@dataclass
class Query:
    id: str             # from the column `id`, else the row's number, from 1
    label: str          # harmful | benign | qa
    text: dict          # language -> query
    extra: dict         # every other column of the row, as it was read: topic, choices, ...
    answer: str = None  # of qa rows
    key: str = ""       # what split() hashes: the English text, asked for or not, else the first text

def one_line(text, limit=400):
    """Any text as one printable line of about `limit` characters at most: what is too long loses its middle."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    return text if len(text) <= limit else text[:limit // 2] + "…" + text[-(limit // 2):]

def fail(path, problem):
    """The ValueError for a file, its message one bounded line."""
    return ValueError(one_line(f"{one_line(path, 120)}: {problem}"))

# --- file -> rows (dicts)

def read_json(text, by_line):
    """JSONL, a JSON array or {"safety": [...]} -> (rows, whether it was the last of these)."""
    rows = []  # not splitlines(), which also splits at U+2028 inside a string
    for n, part in enumerate(text.split("\n") if by_line else [text], 1):
        try:
            rows += [json.loads(part)] if part.strip() else []
            json.dumps(rows[-1:], ensure_ascii=False).encode()  # raises on lone surrogates: JSON can spell them
        except (RecursionError, ValueError) as e:
            raise ValueError(f"line {n - 1 + getattr(e, 'lineno', 1)}: broken JSON: {getattr(e, 'msg', e)}") from None
    rows = rows[0] if len(rows) == 1 and isinstance(rows[0], list) else rows
    safety = len(rows) == 1 and isinstance(rows[0], dict) and isinstance(rows[0].get("safety"), list)
    if safety:
        rows = [{BARE: row} if isinstance(row, (str, list)) else row for row in rows[0]["safety"]]
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {n} is no JSON object but {one_line(json.dumps(row), 40)}")
    return rows, safety

def read_table(text, delimiter, header=None):
    """CSV or TSV -> rows. A file without a header is given one, and quotes in it mean nothing."""
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 22))  # 128 KiB otherwise: less than a long document
    quoting = csv.QUOTE_NONE if header else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as e:
        raise ValueError(f"line {reader.line_num}: {e} (check the quotes there and before)") from None
    header = header or [cell.strip() for cell in lines.pop(0)[1]]
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise ValueError(f"duplicate column {one_line(repr(twice[0]), 60)} in the header")
    for line, cells in lines:
        if len(cells) != len(header):
            raise ValueError(f"line {line}: {len(cells)} cells instead of {len(header)} (check its quotes)")
    return [dict(zip(header, cells)) for _, cells in lines]

def read_rows(path):
    """A file of any format -> (rows, whether they are known by position rather than by `id`)."""
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig", newline="") as f:
            text, ext = f.read(), os.path.splitext(path)[1].lower()
        if "\0" in text or not text.strip():
            raise ValueError("holds NUL bytes" if "\0" in text else "is empty")
        lines = [line.strip("\r ") for line in text.split("\n") if line.strip()]
        if ext in (".json", ".jsonl", ".ndjson") or (ext not in (".csv", ".tsv") and lines[0][0] in "{["):
            by_line = ext in (".jsonl", ".ndjson") or (len(lines) > 1 and lines[0][-1] == "}")
            rows, positional = read_json(text, by_line and lines[0][0] != "[")
        else:  # header-less question<TAB>answer: no column's name ends like a sentence, or starts with a digit
            tab = ext == ".tsv" or ("\t" in lines[0] and "," not in lines[0])
            positional = tab and bool(re.fullmatch(r"[^\t]*([?？؟!.。।] ?\t|\t\W?\d)[^\t]*", lines[0]))
            rows = read_table(text, "\t" if tab else ",", [BARE, "answer"] if positional else None)
            rows = [{**row, "label": "qa"} for row in rows] if positional else rows
        if not rows:
            raise ValueError("has no rows")
    except (OSError, ValueError) as e:
        raise fail(path, f"{getattr(e, 'strerror', None) or e}; give UTF-8 CSV, TSV, JSONL or JSON queries") from None
    return rows, positional

# --- rows -> records: (row id, cell of each language, every other column)

def read_records(path, langs, joined=False):
    """One file -> (records, by position or not). `joined`: the file was named for its language, langs[0]."""
    rows, positional = read_rows(path)
    found = dict.fromkeys(name for row in rows for name in row)
    ids = ["" if row.get("id") is None else str(row["id"]).strip() for row in rows]
    indonesian = not joined and "prompt_id" not in found and any(
        re.search(r"\s", i) or ("id" in langs and re.fullmatch(r"\D+", i)) for i in ids)
    names = {}
    for lang in langs if joined else [*langs, "en"]:  # English also where it is not asked for: split() goes by it
        names[lang] = [f"prompt_{lang}"] if lang == "id" and not indonesian else [lang, f"prompt_{lang}"]
        names[lang] += ["prompt", "instruction", "goal"] * (joined or lang == "en")
    for lang in langs:
        if not {*names[lang], *[BARE] * (len(langs) == 1)} & set(found):  # BARE: in one language only
            raise fail(path, f"no column for language {lang}: wanted {' or '.join(names[lang])}, found "
                             f"{one_line(', '.join(found), 150)}; a file that is all {lang} is given as {lang}=FILE")
    names[langs[0]].append(BARE)
    return [("" if indonesian else i, {lang: next((row.pop(name) for name in names[lang] if name in row), None)
                                       for lang in names}, row) for i, row in zip(ids, rows)], positional

def join_files(files):
    """{language: path} -> records, joined on `id` or by position. ValueError on unmatched or duplicate ids."""
    merged, one = {}, one_line(next(iter(files.values())), 120)
    for lang, path in files.items():
        records, positional = read_records(path, [lang], joined=True)
        keys = [n if positional else i for n, (i, _, _) in enumerate(records, 1)]
        if bad := [key for key, count in Counter(keys).items() if count > 1 or key == ""]:
            raise fail(path, f"{'duplicate' if bad[0] else 'missing'} id {one_line(bad[0], 40)}; files are joined on a "
                             "column id, so give every row its own")
        if merged and (odd := sorted(merged.keys() ^ set(keys), key=str)):
            raise fail(path, f"unmatched with {one} at {'position' if positional else 'id'} {one_line(odd[0], 40)} "
                             f"({len(keys)} rows against {len(merged)}); give both files the same rows")
        for key, (i, cells, extra) in zip(keys, records):
            _, all_cells, all_extra = merged.setdefault(key, (i, {}, {}))
            all_cells.update(cells)
            all_extra.update({**extra, **all_extra})  # a column of both files: the first file's stays
    return list(merged.values())

# --- records -> queries

def read_cell(cell):
    """The text of a cell, a string or a chat list (its first human turn): "" where blank, None where unreadable."""
    try:
        if isinstance(cell, str) and re.match(r"""\s*\[\s*\{.*['"](from|role)['"]\s*:""", cell, re.S):  # as CSV has it
            cell = json.loads(cell)
            json.dumps(cell, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    if isinstance(cell, list):
        turns = [t for t in cell if isinstance(t, dict) and t.get("from", t.get("role")) in ("human", "user")]
        cell = turns[0].get("value", turns[0].get("content")) if turns else 0
    return (cell if cell.strip() else "") if isinstance(cell, str) else None

def read_label(value):
    """harmful | benign | qa for a value of a label column, None for a value that is none of ours."""
    labels = {"benign": "safe.*|benign", "harmful": "unsafe|harmful|refuse.*", "qa": "qa"}
    return next((label for label in labels if re.fullmatch(labels[label], str(value).strip().lower(), re.S)), None)

def load_queries(path, langs, label=None):
    """Parallel queries -> list of Query, each with a text in every one of `langs`. ValueError if that cannot be had.
    path: a file, or "en=FILE,jv=FILE". label: of data without a label column; None is harmful.
    stderr gets a line per file: how many rows were read, used and skipped, and why."""
    path, default = os.fspath(path), read_label("harmful" if label is None else label)
    langs = [lang for lang in dict.fromkeys(lang.strip() for lang in langs) if lang]
    if not langs or not default:
        raise ValueError("no language was asked for; name one or more, such as en and jv" if default else
                         f"label {one_line(repr(label), 60)} is unknown; use harmful or benign")
    pairs = [re.fullmatch(r"\s*([\w-]+)\s*=(.*)", part, re.S) for part in re.split(r",(?=\s*[\w-]+\s*=)", path)]
    if all(pairs) and not os.path.exists(path):
        files = {pair[1]: pair[2].strip() for pair in pairs}
        if len(files) < len(pairs) or not set(langs) <= set(files):
            raise fail(path, f"language named twice, or not at all; name one file for each of {', '.join(langs)}")
        records = join_files(files)
    else:
        files, (records, _) = {"": path}, read_records(path, langs)
    queries, skipped, columns = [], Counter(), ("label", "expected_behavior")
    labelled = any(name in extra for _, _, extra in records for name in columns)
    for n, (i, cells, extra) in enumerate(records, 1):
        text = {lang: read_cell("" if cell is None else cell) for lang, cell in cells.items()}
        column = next((name for name in columns if name in extra), "label")
        row_label = read_label(extra.get(column)) if labelled else default
        answer = None if row_label != "qa" or extra.get("answer") is None else str(extra["answer"]).strip()
        if missing := [lang for lang in langs if not text[lang]]:
            skipped[" and ".join(f"{'unreadable' if text[lang] is None else 'blank'} {lang}" for lang in missing)] += 1
        elif row_label is None:
            skipped[f"{column} {one_line(repr(extra.get(column)), 40)}"] += 1
        elif row_label == "qa" and not answer:
            skipped["qa without an answer"] += 1
        else:
            key = text.get("en") or next(t for t in text.values() if t)
            queries.append(Query(i or str(n), row_label, {lang: text[lang] for lang in langs}, extra, answer, key))
    why = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
    counts = f"{len(records)} rows read, {len(queries)} used, {skipped.total()} skipped" + f" ({why})" * bool(why)
    if not queries:
        raise fail(path, f"no usable row: {counts}")
    print(*(one_line(f"{one_line(name, 120)}: {counts}") for name in files.values()), sep="\n", file=sys.stderr)
    return queries

def split(queries, holdout):
    """-> (train, heldout): a share `holdout` (0 to 1) by a hash of the English text, so the same in every run."""
    if not 0 <= holdout <= 1:
        raise ValueError(f"holdout must be a fraction from 0 to 1, not {holdout}")
    train, heldout = [], []
    for q in queries:
        text = q.key or q.text.get("en") or next(iter(q.text.values()))
        digest = hashlib.sha256(b"queries" + " ".join(text.split()).encode()).digest()  # the salt evens the labels out
        (heldout if int.from_bytes(digest[:6], "big") / 2**48 < holdout else train).append(q)
    return train, heldout
