"""The paper's claims, tried in small: python tests/claims.py [--only NAME …]

Trains the model of --model once a condition and seed, one factor at a time from the defaults of
msd.py at equal steps, and prints a markdown table: means over seeds with 95 % t-intervals, on
held-out queries. Selectivity: harmful queries refused − benign ones refused. Unseen: the mean of
the languages never trained on, English left out. Drift: KL(base ‖ model) in nats a token, on the
base's own greedy answers to benign queries in English. A run that lies in --out already is not run
again.

    python tests/claims.py --answers before=base.items.jsonl recipe=1.items.jsonl,2.items.jsonl

makes a table of answers that eval.py kept, a line a condition and language: means over a condition's
runs, each run's value behind them. --half cuts the queries in two by a hash of their ids: one to
choose by, one to report. --read takes a reader's verdicts on some of these answers, and the rates
that follow from them stand beside the keyword judge's.

    python tests/claims.py --model base --drift out/a out/b --lang vi,en --dtype bfloat16

makes a table of the drift of models that are there, a line each, a column a language.
"""
import argparse
import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluation  # noqa: E402
from data.judges import load_refusals  # noqa: E402
from data.queries import load_queries, split  # noqa: E402
from sample import (  # noqa: E402
    encode_chat, find_device, find_path, find_stop_ids, find_vocab_size, load_model,
    response_logits, sample)

CONDITIONS = {  # name: (flags of msd.py, seeds)
    "default: on-policy, DPSW, reverse KL": ("", 5),
    "off-policy": ("--policy off", 3),
    "weights: teacher's alone": ("--weighting teacher", 3),
    "weights: student's alone": ("--weighting student", 3),
    "weights: none": ("--weighting none", 3),
    "weights not normalised": ("--weight-norm none", 3),
    "p_S of the sampled token": ("--student-view sampled", 3),
    "forward KL": ("--divergence forward", 3),
    "JSD": ("--divergence jsd", 3),
    "off-policy, weights: none": ("--policy off --weighting none", 3),
    "teacher prompt both": ("--teacher-prompt both", 3),
    "teacher prompt english": ("--teacher-prompt english", 3),
    "EMA teacher": ("--teacher ema", 3),
    "no benign queries": ("--benign-fraction 0", 3),
    "English queries in the batch, too": ("--lang {lang},en", 3),
}
COLUMNS = ("unsafe {lang}", "over-refusal {lang}", "selectivity {lang}", "unsafe unseen",
           "over-refusal unseen", "unsafe en", "over-refusal en", "drift en")
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, n − 1 degrees of freedom
NEW_TOKENS = 32  # of a judged answer
BATCH_SIZE = 64


def train(args, name, flags, seed):
    """The folder of one trained model."""
    flags = ["--lang", args.lang, "--model", args.model, "--seed", str(seed), "--overwrite",
             "--eval-every", "0", "--save-every", "0", *flags.format(lang=args.lang).split(),
             *args.flags.split()]
    digest = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:8]
    folder = Path(args.out, f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{seed}-{digest}")
    if not (folder / "page.html").is_file():  # what a run leaves last
        command = [sys.executable, "msd.py", "--out", str(folder.resolve()), *flags]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def load(folder, dtype="float32"):
    """(model, tokenizer)."""
    return load_model(str(folder), *find_device("cpu", dtype))


def measure(args, model, tokenizer, base, queries, answers):
    """The numbers of COLUMNS for a model. answers: the base's, see answer_benign."""
    unseen = args.unseen.split(",")
    queries = sorted(queries, key=lambda query: query.label)  # a row a label
    cells = [("", lang, queries) for lang in (args.lang, "en", *unseen)]
    found = evaluation.evaluate(model, tokenizer, cells, refusals=load_refusals(),
                                max_new_tokens=NEW_TOKENS, batch_size=BATCH_SIZE)
    unsafe = {}
    over_refusal = {}
    refused = {}
    for row, _ in found:
        if row["label"] == "harmful":
            unsafe[row["lang"]] = row["unsafe"]
            refused[row["lang"]] = row["refusal"]
        if row["label"] == "benign":
            over_refusal[row["lang"]] = row["over_refusal"]
    return [
        unsafe[args.lang],
        over_refusal[args.lang],
        refused[args.lang] - over_refusal[args.lang],
        mean(unsafe[lang] for lang in unseen),
        mean(over_refusal[lang] for lang in unseen),
        unsafe["en"],
        over_refusal["en"],
        measure_drift(base, model, answers),
    ]


def answer_benign(base, tokenizer, queries, lang):
    """Batches (prompts, greedy responses) of the base to the benign ones of `queries`: what drift
    is measured on, the same for every model."""
    prompts = [encode_chat(tokenizer, q.text[lang]) for q in queries if q.label == "benign"]
    stop_ids = find_stop_ids(base, tokenizer)
    batches = []
    for at in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[at:at + BATCH_SIZE]
        responses = sample(base, batch, max_new_tokens=NEW_TOKENS, stop_ids=stop_ids, temperature=0,
                           vocab_size=find_vocab_size(tokenizer))
        batches.append((batch, responses))
    return batches


@torch.no_grad()
def measure_drift(base, model, batches):
    """The mean KL(base ‖ model) in nats a token, on the batches of answer_benign."""
    total = 0.0
    tokens = 0
    for prompts, responses in batches:
        base_logp = response_logits(base, prompts, responses).float().log_softmax(-1)  # (N, V)
        logp = response_logits(model, prompts, responses).float().log_softmax(-1)
        total += (base_logp.exp() * (base_logp - logp)).sum().item()
        tokens += len(logp)
    return total / tokens


def compare_drift(args):
    """Print the table of --drift."""
    langs = args.lang.split(",")
    queries = split(load_queries(ROOT / "data/queries.csv", ["en", *langs]), 0.2)[1]
    base, tokenizer = load(args.model, args.dtype)
    answers = [answer_benign(base, tokenizer, queries, lang) for lang in langs]
    show("model", *(f"drift {lang}" for lang in langs))
    show(*["---"] * (1 + len(langs)))
    for name in args.drift:
        model, _ = load(name, args.dtype)
        found = [measure_drift(base, model, batches) for batches in answers]
        show(name, *map("{:.3f}".format, found))


def read_answers(path, half):
    """[(row, its items)] of a FILE.items.jsonl, of one half of the ids or of all."""
    run = evaluation.read_items(path, load_refusals())
    if half is None:
        return run
    items = [item for item in evaluation.pool(run)
             if hashlib.sha256(item["id"].encode()).digest()[0] % 2 == half]
    run = evaluation.make_rows(items, path)
    evaluation.measure(run, load_refusals())
    return run


def correct(items, readings, word):
    """The share of items that a reader would call `word`: of the keyword judge's refusals, and of
    the others, as often as of those of them that were read. None where less than half of either
    were: what runs have in common are canned answers."""
    total = 0.0
    for _, kind in itertools.groupby(sorted(items, key=is_refusal), is_refusal):
        kind = list(kind)
        read = [readings[get_text(item)] for item in kind if get_text(item) in readings]
        if 2 * len(read) < len(kind):
            return None
        total += len(kind) * read.count(word) / len(read)
    return total / len(items)


def is_refusal(item):
    return item["verdict"] in ("safe", "refusal")


def get_text(item):
    return item["lang"], item["prompt"], item["response"]


def format_runs(values):
    """The mean of a rate over runs, and each run's; "" where one is not known."""
    if not values or None in values:
        return ""
    each = ", ".join(map("{:.2f}".format, values))
    return f"{mean(values):.2f} ({each})" if len(values) > 1 else each


def compare_answers(args):
    """Print the table of --answers."""
    readings = {}
    if args.read:
        for line in Path(args.read).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            readings[get_text(row)] = row["read"]
    columns = ["condition", "language", "runs", "n", "unsafe", "over-refusal", "selectivity",
               "95 %, a run", "off-language, harmful", "off-language, benign"]
    if readings:
        columns += ["read", "agrees", "unsafe, read", "over-refusal, read", "selectivity, read"]
    show(*columns)
    show(*["---"] * len(columns))
    for named in args.answers:
        name, _, files = named.partition("=")
        runs = [read_answers(path, args.half) for path in files.split(",")]
        unsafe = []
        for lang in dict.fromkeys(row["lang"] for row, _ in runs[0]):
            cells, unsafe_here = describe_language(runs, lang, readings)
            show(name, lang, len(runs), *cells)
            if len(unsafe_here) == len(runs):  # a run may lack a language
                unsafe.append(unsafe_here)
        if len(unsafe) > 1 and None not in sum(unsafe, []):
            means = [mean(values) for values in zip(*unsafe, strict=True)]
            show(name, f"mean of {len(unsafe)}", len(runs), "", format_runs(means),
                 *[""] * (len(columns) - 5))


def find_interval(harmful, benign):
    """The 95 % interval of selectivity, of a harmful and a benign row: Newcombe's (1998)."""
    p, q = harmful["refusal"], benign["refusal"]
    low, high = evaluation.wilson(p * harmful["n"], harmful["n"])
    floor, top = evaluation.wilson(q * benign["n"], benign["n"])
    return [p - q - math.hypot(p - low, top - q), p - q + math.hypot(high - p, q - floor)]


def describe_language(runs, lang, readings):
    """(the cells of a line, the unsafe rate of each run)."""
    found = {"harmful": [], "benign": []}
    read = {("harmful", "answer"): [], ("harmful", "refusal"): [], ("benign", "refusal"): []}
    agree = []
    for run in runs:
        items = evaluation.pool(run)
        for row, _ in run:
            if row["lang"] == lang and row["label"] in found:
                found[row["label"]].append(row)
        for (label, word), shares in read.items():
            mine = [item for item in items if (item["lang"], item["label"]) == (lang, label)]
            shares.append(correct(mine, readings, word) if mine else None)
        for item in items:
            said = readings.get(get_text(item))
            if said and item["lang"] == lang:
                word = {"safe": "refusal", "unsafe": "answer"}.get(item["verdict"])
                agree.append(said == (word or item["verdict"]))

    selective = [evaluation.find_selectivity(run, lang) for run in runs]
    ends = ""
    if None not in selective:
        intervals = map(find_interval, found["harmful"], found["benign"])
        ends = evaluation.show([mean(ends) for ends in zip(*intervals)])
    unsafe = [row["unsafe"] for row in found["harmful"]]
    cells = [
        "/".join(str(rows[0]["n"]) for rows in found.values() if rows),
        format_runs(unsafe),
        format_runs([row["over_refusal"] for row in found["benign"]]),
        format_runs(selective),
        ends,
        format_runs([row["wrong_language"] for row in found["harmful"]]),
        format_runs([row["wrong_language"] for row in found["benign"]]),
    ]
    if readings:
        answered, refused, over_refused = read.values()
        known = None not in refused + over_refused
        cells += [
            len(agree),
            f"{mean(agree):.2f}" if agree else "",
            format_runs(answered),
            format_runs(over_refused),
            format_runs([p - q for p, q in zip(refused, over_refused)] if known else []),
        ]
    return cells, unsafe


def format_spread(values):
    """The mean over seeds, ± half its 95 % t-interval."""
    text = f"{mean(values):.3f}"
    n = len(values)
    if n > 1:
        text += f" ± {T_975[n] * stdev(values) / math.sqrt(n):.3f}"
    return text


def show(*cells):
    """A line of the table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def build_parser():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="data/tiny", type=find_path)
    add("--lang", default="jv")
    add("--unseen", default="sw,id,it,vi")
    add("--flags", default="", help="more flags of msd.py, for all conditions")
    add("--only", nargs="*", help="the conditions whose names begin so")
    add("--seeds", type=int, choices=range(1, 6), help="default: each condition's own number")
    add("--each", action="store_true", help="a line a seed, too")
    add("--out", default="out/claims")
    add("--answers", nargs="+", help="NAME=FILE.items.jsonl[,…] of kept answers: their table alone")
    add("--half", type=int, choices=(0, 1), help="of the queries of --answers; default: all")
    add("--drift", nargs="+", help="models whose drift from --model is measured, and no more")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of --drift")
    add("--read", help="a reader's verdicts: JSONL of lang, prompt, response, read")
    return parser


def main():
    """Train, measure, print a line a condition as it is done."""
    args = build_parser().parse_args()
    if args.answers:
        return compare_answers(args)
    if args.drift:
        return compare_drift(args)
    langs = [args.lang, "en", *args.unseen.split(",")]
    queries = split(load_queries(ROOT / "data/queries.csv", langs), 0.2)[1]
    base, tokenizer = load(args.model)
    show("condition", "seeds", *(column.format(lang=args.lang) for column in COLUMNS))
    show(*["---"] * (2 + len(COLUMNS)))
    answers = answer_benign(base, tokenizer, queries, "en")
    before = measure(args, base, tokenizer, base, queries, answers)
    show("before", "", *map("{:.3f}".format, before))
    for name, (flags, seeds) in CONDITIONS.items():
        if args.only and not name.startswith(tuple(args.only)):
            continue
        runs = []
        for seed in range(args.seeds or seeds):
            folder = train(args, name, flags, seed)
            found = measure(args, *load(folder), base, queries, answers)
            (folder / "claims.json").write_text(json.dumps(dict(zip(COLUMNS, found))))
            if args.each:
                show(f"{name}, seed {seed}", 1, *map("{:.3f}".format, found))
            runs.append(found)
        show(name, len(runs), *map(format_spread, zip(*runs)))


if __name__ == "__main__":
    main()
