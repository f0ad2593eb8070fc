"""How selectivity is kept and lost: python tests/selectivity.py --model DIR --data FILE … (half an hour for six runs)

Trains a model under every --divergence × --weighting at equal steps, evaluates it on held-out queries on the way, and
prints a markdown table; --plot draws refused harmful and refused benign against steps. All flags that are not its own
go to msd.py. Selectivity: harmful queries refused − benign ones refused. The teacher's line is what there is to
transfer: the untrained model on the same held-out queries in the source language, as under --teacher-prompt english.
Runs that lie in --out are not run again.
"""
import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def train(args, rest, divergence, weighting):
    """{step: rows of eval.py} of one run, the untrained model at 0."""
    out = Path(args.out, f"{divergence}-{weighting}").resolve()
    if (out / "args.json").is_file() and json.loads((out / "args.json").read_text())["lang"] != args.lang:
        sys.exit(f"selectivity.py: {out} holds a run in another language: give another --out")
    if not (out / f"after-{args.steps}.json").is_file():
        command = [sys.executable, "msd.py", "--lang", args.lang, "--divergence", divergence, "--weighting", weighting,
                   "--steps", str(args.steps), "--eval-every", str(args.every), "--preflight", "0", "--save-every", "0",
                   "--overwrite", "--out", str(out), *rest]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    files = {0: out / "before.json", **{int(path.stem[6:]): path for path in out.glob("after-*.json")}}
    return {step: json.loads(files[step].read_text())[0] for step in sorted(files)}


def count_refused(rows, lang, label):
    """The share of a label's queries that is refused, over all files of data."""
    rows = [row for row in rows if (row["lang"], row["label"]) == (lang, label)]
    refused = sum(row["n"] * row["refusal" if label == "harmful" else "over_refusal"] for row in rows)
    return refused / max(1, sum(row["n"] for row in rows))


def draw(args, curves, ceiling):
    """A panel a label and language: refused against steps."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    fig, panels = pyplot.subplots(1, 4, figsize=(15, 3.6), sharey=True)
    for panel, (lang, label) in zip(panels, itertools.product(args.shown, ("harmful", "benign"))):
        for (divergence, weighting), runs in curves.items():
            panel.plot(list(runs), [count_refused(rows, lang, label) for rows in runs.values()], marker=".",
                       label=f"{divergence}, {weighting}", linestyle="-" if weighting == "dpsw" else "--",
                       color=dict(reverse="#c0392b", forward="#2471a3", jsd="#239b56")[divergence])
        panel.axhline(ceiling[label], color="grey", linewidth=1, linestyle=":", label="the teacher")
        panel.set(title=f"refused: {label}, {lang}", xlabel="step", ylim=(-0.03, 1.03))
    panels[0].legend(fontsize=7)
    fig.savefig(args.plot, bbox_inches="tight", dpi=110)


def main():
    """Train, tell, draw."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lang", default="it", help="the first is shown, beside English: it,en trains on both")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--divergences", default="reverse,forward,jsd")
    parser.add_argument("--weightings", default="dpsw,none")
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--out", default="out/selectivity")
    args, rest = parser.parse_known_args()
    if args.plot and not importlib.util.find_spec("matplotlib"):  # better told now than after the first run
        parser.error("to draw --plot, pip install matplotlib")
    args.shown, curves = (args.lang.split(",")[0], "en"), {}
    names = [f"{what} {lang}" for lang in args.shown for what in ("harmful", "benign", "selectivity")]
    print("| divergence, weights | step |", " | ".join(names), "|\n|" + " --- |" * 8)
    for case in itertools.product(args.divergences.split(","), args.weightings.split(",")):
        curves[case] = train(args, rest, *case)
        for step, rows in curves[case].items():
            both = [[count_refused(rows, lang, label) for label in ("harmful", "benign")] for lang in args.shown]
            cells = [f"{x:.2f}" for harmful, benign in both for x in (harmful, benign, harmful - benign)]
            print(f"| {', '.join(case)} | {step} |", " | ".join(cells), "|", flush=True)
        if args.plot:
            draw(args, curves, {label: count_refused(curves[case][0], "en", label) for label in ("harmful", "benign")})


if __name__ == "__main__":
    main()
