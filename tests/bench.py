"""Speed and memory, side by side: python tests/bench.py [SECTION …] --model DIR --data FILE     (all sections: an hour)

    sample   sample() over model.generate, greedy: equal lengths, and half of the rows done in the first quarter
    step     one on-policy step over TRL's SDFTTrainer, and over its own plain form (left-padded, all logits)
    loss     dpsw_loss_chunked over dpsw_loss, from hidden states and with gradients
    flops    the step's GFLOP/s over a matrix product's: 6 a weight and trained token, 2 a forward-only token
    cost     seconds a response token and memory, against batch and response length
    plan     what msd.py --plan says over the peak of two steps, full and LoRA
    kill     runs killed (-9) at ten random moments each, and resumed, against runs that nobody killed
    long     2,000 steps: memory and seconds a step, early and late

The sides of a ratio take turns in one run, after a warm-up each; ratios are of medians. Memory is the peak of a process
that runs nothing else (GB of 1e9 bytes, resident on a CPU; of the loss: above its inputs), warm-up included. TRL is
needed here only: pip install "trl==1.16.*", or --trl-python VENV/bin/python. The environment (OMP_NUM_THREADS,
GLIBC_TUNABLES, THP_MEM_ALLOC_ENABLE, …) holds for all sides.
"""
import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SECTIONS = ["sample", "step", "loss", "flops", "cost", "plan", "kill", "long"]
VERSIONS = "from importlib.metadata import version as v; print('TRL', v('trl'), 'transformers', v('transformers'))"
DENSE_COPIES, DENSE_LIMIT = 9, 14  # dpsw_loss peaks at about so many float32 (N, V); past so many GB it is not run


def start(args, name, python=sys.executable, **job):
    """Start run_<name> in a process of its own, a worker: for every line that it is sent, it runs a repetition."""
    command = [python, __file__, "--worker", json.dumps({**vars(args), **job, "name": name})]
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def hear(worker):
    """A worker's next message."""
    return json.loads(worker.stdout.readline() or sys.exit("bench.py: a worker failed, see above"))


def take_turns(workers, reps):
    """{name: worker} -> {name: the medians of its messages' numbers}, with `peak`, `memory` (the peak above that before
    the first repetition) and `first` (the first loss). Forwards and backwards, so that a drift cancels."""
    ready, laps = {name: hear(worker) for name, worker in workers.items()}, {name: [] for name in workers}
    for rep in range(reps + 1):
        for name in list(workers)[::1 if rep % 2 else -1]:
            print(file=workers[name].stdin, flush=True)
            laps[name].append(hear(workers[name]))
        print(f"  {rep or 'warm-up'}", {n: round(rows[-1]["seconds"], 3) for n, rows in laps.items()}, file=sys.stderr)
    for worker in workers.values():
        worker.communicate()  # ends its input, and so the worker
    return {n: {**{key: median(row[key] for row in rows[1:]) for key in rows[0]}, "first": rows[0].get("loss"),
                "peak": rows[-1]["peak"], "memory": rows[-1]["peak"] - ready[n]["peak"]} for n, rows in laps.items()}


def lap(began=0.0, **more):
    """In a worker: report the repetition that began then, wait until the next may run, and return when it begins."""
    tell({"seconds": time.perf_counter() - began, "peak": msd.peak_memory(torch.device("cpu")), **more})
    if not sys.stdin.readline():
        os._exit(0)
    return time.perf_counter()


def prepare_step(rows=8):
    """(msd.py's flags, the same queries for all sides, the teacher's template)."""
    args = msd.build_parser().parse_args(["--lang", JOB["lang"], "--model", JOB["model"], "--device", "cpu",
                                          "--max-new-tokens", str(JOB["tokens"]), "--lr", "1e-6"])
    queries = msd.load_queries(JOB["data"], [args.source_lang, args.lang])[:rows]
    return args, queries, msd.read_teacher_prompt(args.teacher_prompt)


def pad_left(rows):
    """Ragged ids -> (ids, mask), each (B, T)."""
    T = max(map(len, rows))
    ids, mask = [[0] * (T - len(r)) + r for r in rows], [[0] * (T - len(r)) + [1] * len(r) for r in rows]
    return torch.tensor(ids), torch.tensor(mask)


def learn_plainly(args, student, teacher, student_prompts, teacher_prompts, responses):
    """msd.learn in its plain form: prompts padded on the left, responses on the right, logits of every position."""
    ids, mask = (x.flip(1) for x in pad_left([r[::-1] for r in responses]))  # (B, R)

    def logits(model, prompts):
        prompt_ids, prompt_mask = pad_left(prompts)
        seen = torch.cat([prompt_mask, mask], 1)
        out = model(input_ids=torch.cat([prompt_ids, ids], 1), attention_mask=seen, use_cache=False,
                    position_ids=(seen.cumsum(1) - 1).clamp(min=0))
        return out.logits[:, prompt_ids.shape[1] - 1:-1]  # (B, R, V)
    teacher_logits = torch.no_grad()(logits)(teacher, teacher_prompts)
    (loss := dpsw_loss(logits(student, student_prompts), teacher_logits, ids, mask)[0]).backward()
    return [loss.item()]


def run_ours():
    """The box of msd.train, on the same rows every step and without stop ids: all sides write equally many tokens.
    Then, outside of the step's time, ten large matrix products: the rate that the machine has at that moment."""
    args, queries, template = prepare_step(JOB.get("rows", 8))
    student, teacher, tokenizer = msd.load_models(args, torch.device("cpu"), torch.float32)
    optimizer = msd.make_optimizer(args, [*student.parameters()])
    unembed, embed = student.get_output_embeddings().weight, student.get_input_embeddings().weight
    head, body = unembed.numel(), sum(p.numel() for p in {*student.parameters()} - {embed, unembed})
    learn, began = learn_plainly if JOB["name"] == "plain" else msd.learn, lap()
    while True:
        torch.manual_seed(0)
        prompts = msd.write_contexts(args, teacher, tokenizer, template, [(q, args.lang) for q in queries])
        responses = sample(student, prompts[0], max_new_tokens=JOB["tokens"], stop_ids=[], vocab_size=len(tokenizer))
        sampled = time.perf_counter()
        loss = learn(args, student, teacher, *prompts, responses)[0]
        learned = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds, x = time.perf_counter() - began, torch.randn(2048, 2048)
        product = timeit.timeit(lambda: x @ x, number=10)
        s, t, n = (sum(map(len, rows)) for rows in (*prompts, responses))  # tokens
        student_forward, teacher_forward = (2 * (body * (p + n) + head * n) for p in (s, t))  # FLOPs; no attention
        began = lap(seconds=seconds, sampling=sampled - began, learning=learned - sampled, product=product, loss=loss,
                    flops=4 * student_forward + teacher_forward, learn_flops=3 * student_forward + teacher_forward,
                    again=2 * body * (s + n))


def run_trl():
    """SDFTTrainer with the same rows, the same student's and teacher's prompts, and as many tokens a response."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    args, queries, template = prepare_step()
    rows = [{"prompt": [{"role": "user", "content": q.text[args.lang]}],
             "privileged_context": msd.write_teacher_prompt(template, q, args.lang, args.source_lang)} for q in queries]

    class Turns(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *_, **__):  # before the rollouts; a step lasts until the next begins
            self.began = lap(self.began)
    config = SDFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=8, num_generations=1, max_steps=10 ** 6, bf16=False,
        distillation_mode="full_logits", distillation_alpha=1.0, teacher_model_kind="base", gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False}, learning_rate=1e-6, max_grad_norm=1.0,
        max_completion_length=JOB["tokens"], generation_kwargs={"min_new_tokens": JOB["tokens"]}, use_cpu=True,
        max_prompt_length=None, shuffle_dataset=False, save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, model_init_kwargs={"dtype": "float32"})
    trainer = SDFTTrainer(model=args.model, args=config, train_dataset=Dataset.from_list(rows), callbacks=[Turns()])
    config.teacher_prompt_template = "{privileged_context}"  # the teacher's prompt is ours: the query is not repeated
    seen = [trainer.teacher_context_builder._compose_teacher_prompt(*row.values()) for row in rows]
    prompts = msd.write_contexts(args, None, trainer.processing_class, template, [(q, args.lang) for q in queries])
    theirs = [trainer._tokenize_prompts(turns) for turns in ([row["prompt"] for row in rows], seen)]
    assert theirs == [*prompts], "TRL's prompts are not ours"
    trainer.train()


def find_rate(got):
    """GFLOP/s of the ten products of run_ours."""
    return 10 * 2 * 2048 ** 3 / got["product"] / 1e9


def bench_step(args, wanted):
    """The rows of step and flops, from the same runs."""
    trl = subprocess.run([args.trl_python, "-c", VERSIONS], capture_output=True, text=True)
    names = ["ours"] + ["plain", "trl"][:1 if trl.returncode else 2] * ("step" in wanted)
    print(trl.stdout.strip() or f"no TRL in {args.trl_python}: left out, see --trl-python", file=sys.stderr)
    got = take_turns({n: start(args, n, args.trl_python if n == "trl" else sys.executable) for n in names}, args.reps)
    ours, rows = got["ours"], []
    for name, bars in (("trl", [(0.85, 0.6), (0.97, 0.85)]), ("plain", [(), ()])):
        for key, unit, bar in zip(("seconds", "peak"), ("s", "GB"), bars if name in got else []):
            note = trl.stdout.strip() if name == "trl" else f"loss {ours['first']:.7f}, {got['plain']['first']:.7f}"
            rows.append([f"step: {key}, batch 8", unit, ours[key], name, got[name][key], note, *bar])
    for case, part, flops in [("step", "seconds", "flops"), ("learning", "learning", "learn_flops")]:
        rate, achieved = find_rate(ours), ours[flops] / ours[part] / 1e9
        note = (f"{ours[part]:.2f} s of {ours['sampling']:.2f} sampling + {ours['learning']:.2f} learning + optimizer; "
                f"with recomputation {achieved * (1 + ours['again'] / ours[flops]):.1f}")
        rows += [[f"flops: {case}", "GFLOP/s", achieved, "product", rate, note, 0.55, 0.75]] * ("flops" in wanted)
    return rows


def bench_cost(args):
    """How a step grows; a process for each size, so that a peak is its own."""
    rows, lengths = [], (args.tokens // 4, args.tokens, 4 * args.tokens)
    for B, n in [(B, n) for B in args.batch for n in lengths if B * n <= 2048]:
        got = take_turns({"ours": start(args, "ours", rows=B, tokens=n)}, 1)["ours"]
        a, b, c = (got[key] / B / n for key in ("seconds", "sampling", "learning"))
        share = got["flops"] / got["seconds"] / 1e9 / find_rate(got)
        note = f"{b:.4f} sampling, {c:.4f} learning; GFLOP/s {share:.2f} of the product's; peak {got['peak']:.2f} GB"
        rows.append([f"cost: batch {B}, {n} tokens", "s a token", a, "", None, note])
    return rows


def train(args, *flags):
    """The command of a run of msd.py that evaluates nothing."""
    return [sys.executable, "msd.py", "--lang", args.lang, "--model", args.model, "--data", args.data,
            "--eval-every", "0", *flags]


def bench_plan(args):
    """What --plan says against what a run takes."""
    rows = []
    for flags in ([], ["--lora-rank", "16"]):
        with tempfile.TemporaryDirectory() as out:
            command = train(args, "--device", "cpu", "--batch-size", "8", "--steps", "2", "--max-new-tokens",
                            str(args.tokens), "--save-every", "0", "--out", f"{out}/run", *flags)
            run = lambda *more: subprocess.run([*command, *more], check=True, capture_output=True, text=True).stdout
            planned = float(re.search(r"([\d.]+) GB  in all", run("--plan"))[1])
            run()
            peak = json.loads(Path(out, "run", "metrics.jsonl").read_text().splitlines()[-1])["peak_mem_gb"]
        rows.append([f"plan: {' '.join(flags) or 'full'}, batch 8", "GB", planned, "peak", peak, ""])
    return rows


VARIANTS = {"full": [], "LoRA": ["--lora-rank", "4"], "EMA teacher": ["--teacher", "ema"], "off-policy": ["--policy", "off"],
            "CoT teacher": ["--cot-tokens", "8"]}


def bench_kill(args, kills=10):
    """Kill a run while it loads, steps or saves, resume it, and so on; then compare its weights and log with those of a
    run that nobody killed."""
    rng, rows = random.Random(0), []
    for name, flags in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            out, straight, lives = Path(folder, "killed"), Path(folder, "straight"), 0
            log, model = out / "metrics.jsonl", f"{'adapter_' * (name == 'LoRA')}model.safetensors"
            command = train(args, *flags, "--batch-size", "4", "--max-new-tokens", "6", "--save-every", "1")
            begin = lambda out, steps, *more: subprocess.Popen(
                [*command, "--out", str(out), "--steps", str(steps), *more], stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL)
            count = lambda: log.read_text().count("\n") if log.is_file() else -1
            while lives < kills:
                process = begin(out, 10 ** 6, "--resume" if (out / "checkpoint.pt").is_file() else "--overwrite")
                seen = count()
                while rng.random() < 0.99 and process.poll() is None and count() <= seen:
                    time.sleep(0.1)  # mostly: until it steps; sometimes: while it still loads
                time.sleep(rng.uniform(0, 1))
                lives += process.poll() is None
                process.kill()
                if process.wait() != -9:
                    sys.exit(f"bench.py: a resumed run ({name}) ended by itself, with exit code {process.returncode}")
            steps = json.loads(log.read_text().split("\n")[count() - 1])["step"] + 3
            for where, more in ((out, ["--resume"]), (straight, [])):
                if begin(where, steps, *more).wait():
                    sys.exit(f"bench.py: {where} ({name}) could not be finished")
            same = (straight / model).read_bytes() == (out / model).read_bytes()
            once = [json.loads(line)["step"] for line in log.read_text().splitlines()] == [*range(1, steps + 1)]
        rows.append([f"kill: -9 at random moments, {name}", "kills", lives, "", None, f"{steps} steps in all; weights "
                     f"{'equal' if same else 'DIFFER'}, bit for bit; log {'has each step once' if once else 'BROKEN'}"])
    return rows


def bench_long(args, steps=2000):
    """Whether memory and seconds a step stay as they are."""
    with tempfile.TemporaryDirectory() as folder:
        command = train(args, "--steps", str(steps), "--save-every", "100", "--out", f"{folder}/long")
        subprocess.run(command, check=True, capture_output=True)
        rows = [json.loads(line) for line in Path(folder, "long", "metrics.jsonl").read_text().splitlines()]
    quarter = steps // 4
    slope = 1e6 * (rows[-1]["peak_mem_gb"] - rows[quarter]["peak_mem_gb"]) / (steps - quarter)
    early, late = (median(row["seconds"] / row["response_tokens"] for row in part)
                   for part in (rows[quarter:2 * quarter], rows[-quarter:]))
    whole = [row["step"] for row in rows] == [*range(1, steps + 1)]
    return [[f"long: {steps} steps, after the first {quarter}", "MB a thousand steps", slope, "", None,
             f"peak {rows[-1]['peak_mem_gb']:.2f} GB; log {'whole' if whole else 'BROKEN'}"],
            ["long: last quarter", "s a token", late, "second quarter", early, ""]]


def run_chunked():
    """The loss and its gradient, from hidden states."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, JOB["N"], 64)
    teacher_weight, ids = torch.randn(JOB["V"], 64), torch.randint(JOB["V"], (JOB["N"],))
    weight = teacher_weight.clone().requires_grad_(JOB["trained"])
    head, teacher_head = (lambda h: h / 4 @ weight.T), (lambda h: h / 4 @ teacher_weight.T)
    student, began = student.requires_grad_(), lap()
    dense = lambda student, teacher, head, teacher_head, ids: dpsw_loss(head(student), teacher_head(teacher), ids)
    while True:
        student.grad = weight.grad = None
        loss, _ = (dense if JOB["name"] == "dense" else dpsw_loss_chunked)(student, teacher, head, teacher_head, ids)
        loss.backward()
        began = lap(began, loss=loss.item())


def bench_loss(args):
    """Every size in fresh processes, so that a peak is its own."""
    rows = []
    for V, N, trained in [(V, N, trained) for V in args.vocab for N in args.n for trained in (False, True)]:
        need = DENSE_COPIES * 4e-9 * N * V
        names = ["chunked", "dense"] if need <= DENSE_LIMIT else ["chunked"]
        got = take_turns({name: start(args, name, V=V, N=N, trained=trained) for name in names}, args.reps)
        ours, dense = got["chunked"], got.get("dense", {})
        note = f"loss {ours['first']:.6f}, {dense['first']:.6f}" if dense else f"dense would need about {need:.0f} GB"
        memory_bar = (1 / 8, 1 / 16) if (V, N) == (262_144, 1024) else ()
        for key, unit, bar in ("seconds", "s", (1.25, 1)), ("memory", "GB", memory_bar):
            case = f"loss: {key}, V {V:,}, N {N:,}, head {'trained' if trained else 'frozen'}"
            rows.append([case, unit, ours[key], "dense", dense.get(key), note, *bar])
    return rows


def run_sample():
    """Tells its rows: sample() and model.generate by turns, greedy."""
    model, tokenizer = load_model(JOB["model"], torch.device("cpu"), torch.float32)
    n, most, queries = JOB["tokens"], max(JOB["batch"]), msd.load_queries(JOB["data"], [JOB["lang"]])
    prompts = [encode_chat(tokenizer, q.text[JOB["lang"]]) for q in queries[:2 * most]]
    ours = lambda rows, stop: sample(model, rows, max_new_tokens=n, stop_ids=stop, temperature=0)

    def generate(rows, stop):
        model.generation_config = GenerationConfig(max_new_tokens=n, pad_token_id=0, eos_token_id=stop or None)
        ids, mask = pad_left(rows)
        out = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1]:].tolist()
        return [r[:next((i + 1 for i, t in enumerate(r) if t in stop), n)] for r in out]

    def compare(case, rows, stop, *bar):
        seconds, got = {ours: [], generate: []}, {}
        for rep in range(JOB["reps"] + 1):
            for side in (ours, generate) if rep % 2 else (generate, ours):
                began = time.perf_counter()
                got[side] = side(rows, stop)
                seconds[side].append(time.perf_counter() - began)
        same, lengths = sum(x == y for x, y in zip(*got.values())), sorted(map(len, got[ours]))
        rate, other = (sum(lengths) / median(seconds[side][1:]) for side in (ours, generate))
        note = f"same tokens in {same} of {len(rows)} rows; lengths {' '.join(map(str, lengths))}"
        tell([f"sample: batch {len(rows)}, {case}", "tokens/s", rate, "generate", other, note, *bar])
    for B in JOB["batch"]:
        compare("equal lengths", prompts[:B], [], 0.95, 1.3)
    greedy = [r for i in range(0, len(prompts), most) for r in ours(prompts[i:i + most], [])]
    # the stop id: a token that ends as many of the responses in their second eighth as it never ends
    early = lambda t: [i for i, r in enumerate(greedy) if t in r[n // 8:n // 4] and t not in r[:n // 8]]
    never = lambda t: [i for i, r in enumerate(greedy) if t not in r]
    stop = max({t for r in greedy for t in r[:n // 4]}, key=lambda t: min(len(early(t)), len(never(t))))
    for B in JOB["batch"]:
        if rows := [prompts[i] for pair in zip(early(stop)[:B // 2], never(stop)) for i in pair]:
            compare("half done in the first quarter", rows, [stop], 1.3, 1.8)
    tell(None)


def format_row(case, unit, ours, name, reference, note, bar=None, goal=None):
    """A line of the markdown table. Of rates (…/s) more is better, of seconds and GB less."""
    ratio, rate = ours / reference if reference else None, unit.endswith("/s")
    met = lambda x: ratio >= x if rate else ratio <= x
    verdict = "" if not (bar and ratio) else "goal met" if met(goal) else "bar met" if met(bar) else "MISSED"
    verdict = verdict and f"{'≥' if rate else '≤'} {bar:.3g}, {goal:.3g}: {verdict}"
    theirs = f"{name} {reference:.4g} | {ratio:.3g}" if reference else " | "
    return f"| {case} | {ours:.4g} {unit} | {theirs} | {note} | {verdict} |"


def main():
    """Run the sections, then print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, numbers = parser.add_argument, lambda text: [int(x) for x in text.split(",")]
    add("sections", nargs="*", choices=[*SECTIONS, "all"], default="all", metavar="section", help=", ".join(SECTIONS))
    add("--model", default="data/tiny")
    add("--data", default="data/queries.csv")
    add("--lang", default="jv")
    add("--trl-python", default=sys.executable, help="an interpreter with TRL and what msd.py needs")
    add("--reps", type=int, default=3, help="repetitions after the warm-up")
    add("--tokens", type=int, default=32, help="response tokens; cost takes a quarter and four times as many, too")
    add("--batch", type=numbers, default="1,8,16,64", help="of sample and cost")
    add("--vocab", type=numbers, default="49152,151936,262144", help="V of the loss")
    add("--n", type=numbers, default="256,1024,2048,4096,8192", help="tokens of the loss")
    args, rows = parser.parse_args(), []
    wanted = SECTIONS if "all" in args.sections else args.sections
    if "sample" in wanted:
        rows += iter(lambda worker=start(args, "sample"): hear(worker), None)
    rows += bench_step(args, wanted) if {"step", "flops"} & {*wanted} else []
    rows += bench_loss(args) if "loss" in wanted else []
    rows += bench_cost(args) if "cost" in wanted else []
    for name, section in (("plan", bench_plan), ("kill", bench_kill), ("long", bench_long)):
        rows += section(args) if name in wanted else []
    print("| what | ours | reference | ratio | | bar, goal |\n| --- | --- | --- | --- | --- | --- |")
    print(*(format_row(*row) for row in rows), sep="\n")
    print(f"\n{args.model}, {args.data}, {args.lang}; {os.cpu_count()} cores, float32; medians of {args.reps}")


if __name__ == "__main__" and "--worker" not in sys.argv:
    main()  # imports no torch: a child's peak begins with its parent's memory
elif __name__ == "__main__":
    JOB, pipe = json.loads(sys.argv[2]), os.fdopen(os.dup(1), "w")
    tell = lambda message: print(json.dumps(message), file=pipe, flush=True)
    os.dup2(2, 1)  # what libraries print is no message
    import torch
    from transformers import GenerationConfig
    import msd
    from dpsw import dpsw_loss, dpsw_loss_chunked
    from sample import encode_chat, load_model, sample
    run_plain, run_dense = run_ours, run_chunked
    globals()[f"run_{JOB['name']}"]()
