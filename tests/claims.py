"""The paper's claims, tried in small: python tests/claims.py [--only NAME …]      (half an hour on two cores)

Trains the model of --model once a condition and seed, one factor at a time from the defaults of msd.py at equal steps,
and prints a markdown table: means over seeds with 95 % t-intervals, on held-out queries. Selectivity: harmful queries
refused − benign ones refused. Unseen: the mean of the languages never trained on, English left out. Drift: KL(before ‖
after) in nats a token, on the untrained model's own greedy answers to benign queries in English. A run that lies in
--out already is not run again.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluation  # noqa: E402
from data.queries import load_queries, split  # noqa: E402
from sample import load_model  # noqa: E402

CONDITIONS = {  # name: (flags of msd.py, seeds)
    "default: on-policy, DPSW, reverse KL": ("", 5),
    "off-policy": ("--policy off", 3),
    "weights: teacher's alone": ("--weighting teacher", 3),
    "weights: student's alone": ("--weighting student", 3),
    "weights: none": ("--weighting none", 3),
    "p_S of the sampled token": ("--student-view sampled", 3),
    "weights normalised to mean 1": ("--weight-norm mean", 3),
    "forward KL": ("--divergence forward", 3),
    "JSD": ("--divergence jsd", 3),
    "off-policy, weights: none": ("--policy off --weighting none", 3),
    "no benign queries": ("--benign-fraction 0", 3),
    "EMA teacher": ("--teacher ema", 3),
    "English queries in the batch, too": ("--lang {t},en", 3),
    "Adafactor": ("--optimizer adafactor --lr 0.01", 3),
}
COLUMNS = ["unsafe {t}", "over-refusal {t}", "selectivity {t}", "unsafe unseen", "over-refusal unseen", "unsafe en",
           "over-refusal en", "drift en"]
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for n seeds: n − 1 degrees of freedom


def train(args, name, flags, seed):
    """The folder of one trained model."""
    out = Path(args.out, f"{''.join(c if c.isalnum() else '-' for c in name)}-{seed}")
    if not (out / "config.json").is_file():
        command = [sys.executable, "msd.py", "--lang", args.lang, "--model", args.model, "--seed", str(seed), "--out",
                   str(out), "--overwrite", "--eval-every", "0", "--save-every", "0",
                   *flags.format(t=args.lang).split(), *args.flags.split()]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out


def measure(args, langs, model, tokenizer, base, queries):
    """The numbers of COLUMNS for a model."""
    rows, _ = evaluation.evaluate(model, tokenizer, queries, langs, seen=[args.lang], max_new_tokens=32, batch_size=64,
                                  refusals=evaluation.load_refusals())
    rate = {(row["lang"], row["label"]): row[evaluation.MAIN_RATE[row["label"]]] for row in rows}
    refused = {row["lang"]: row["refusal"] for row in rows if row["label"] == "harmful"}
    unseen = [mean(rate[lang, label] for lang in args.unseen.split(",")) for label in ("harmful", "benign")]
    drift = evaluation.measure_drift(base, model, tokenizer, queries, "en", 32, 64)
    harmful, benign = rate[args.lang, "harmful"], rate[args.lang, "benign"]
    return [harmful, benign, refused[args.lang] - benign, *unseen, rate["en", "harmful"], rate["en", "benign"], drift]


def main():
    """Train, measure, print a line a condition as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="data/tiny")
    parser.add_argument("--lang", default="jv")
    parser.add_argument("--unseen", default="sw,id,it,vi")
    parser.add_argument("--flags", default="", help="more flags of msd.py, for all conditions")
    parser.add_argument("--only", nargs="*", help="the conditions whose names begin so")
    parser.add_argument("--seeds", type=int, help="default: each condition's own number")
    parser.add_argument("--each", action="store_true", help="a line a seed, too")
    parser.add_argument("--out", default="out/claims")
    args = parser.parse_args()
    langs = [args.lang, "en", *args.unseen.split(",")]
    queries = split(load_queries(ROOT / "data/queries.csv", langs), 0.2)[1]
    load = lambda folder: load_model(str(folder), torch.device("cpu"), torch.float32)
    base, tokenizer = load(ROOT / args.model)
    show = lambda name, n, cells: print(f"| {name} | {n} |", " | ".join(cells), "|", flush=True)
    show("condition", "seeds", [c.format(t=args.lang) for c in COLUMNS])
    show("---", "---", ["---"] * len(COLUMNS))
    show("before", "", [f"{x:.3f}" for x in measure(args, langs, base, tokenizer, base, queries)])
    for name, (flags, seeds) in CONDITIONS.items():
        if args.only and not name.startswith(tuple(args.only)):
            continue
        folders = [train(args, name, flags, seed) for seed in range(args.seeds or seeds)]
        runs = [measure(args, langs, *load(folder), base, queries) for folder in folders]
        Path(args.out, "claims.jsonl").open("a").write(json.dumps({"name": name, "flags": flags, "runs": runs}) + "\n")
        for seed, run in enumerate(runs if args.each else []):
            show(f"{name}, seed {seed}", 1, [f"{x:.3f}" for x in run])
        spread = lambda xs: f" ± {T_975[len(xs)] * stdev(xs) / len(xs) ** 0.5:.3f}" if len(xs) > 1 else ""
        show(name, len(runs), [f"{mean(xs):.3f}{spread(xs)}" for xs in zip(*runs)])


if __name__ == "__main__":
    main()
