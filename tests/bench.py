"""Speed and memory, side by side: python tests/bench.py [SECTION …] --model DIR --data FILE

    sample   sample() over model.generate, greedy: equal lengths, and half of the rows done in the
             first quarter
    step     one on-policy step with gradient checkpointing over TRL's SDFTTrainer
    loss     dpsw_loss_chunked over dpsw_loss, from hidden states and with gradients
    plan     the GB that a run with these --flags of msd.py needs, from shapes alone; then that over
             the peak of two steps (not with --dry)
    kill     runs killed (-9) at random moments, and resumed, against runs that nobody killed
    long     2,000 steps: memory and seconds a step, early and late
    processes  a step of two processes of one thread each (torchrun) over that of one

The sides of a ratio take turns in one run, after a warm-up each; ratios are of medians. Memory is
the peak of a process that runs nothing else (GB of 1e9 bytes, resident; of the loss: above its
inputs), warm-up included. TRL is needed for `step` alone: pip install "trl==1.16.*", or
--trl-python VENV/bin/python. The environment (OMP_NUM_THREADS, …) holds for all sides. Nothing else
should run.
"""
import argparse
import itertools
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
IS_WORKER = "--worker" in sys.argv

if IS_WORKER:  # its parent imports no torch: a child's peak begins with its parent's memory
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    import msd
    from data.queries import load_queries
    from dpsw import dpsw_loss, dpsw_loss_chunked
    from sample import (cut_by_length, encode_chat, fill_template, find_device, load_model,
                        read_template, sample)

FIND_TRL = "from importlib.metadata import version; print('TRL', version('trl'))"
EVAL_ROWS = 64  # that msd.py answers at a time


# --- sides that take turns, each a process of its own ---

def start(args, name, python=sys.executable, **job):
    """Start run_<name> as a worker: it tells its peak, then runs a repetition for every line that
    it is sent."""
    job = {**vars(args), **job, "name": name}
    env = dict(os.environ)
    if name == "trl":
        env.setdefault("THP_MEM_ALLOC_ENABLE", "0")  # sample.py turns it on, TRL does not
    return subprocess.Popen([python, __file__, "--worker", json.dumps(job)], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)


def hear(worker):
    """A worker's next message."""
    line = worker.stdout.readline()
    if not line:
        sys.exit("bench.py: a worker failed, see above")
    return json.loads(line)


def take_turns(workers, reps):
    """{name: worker} -> {name: the medians of its messages, see summarise}. Forwards and backwards,
    so that a drift cancels."""
    ready = {name: hear(worker)["peak"] for name, worker in workers.items()}
    laps = {name: [] for name in workers}
    for rep in range(reps + 1):
        names = list(workers)
        if rep % 2:
            names.reverse()
        for name in names:
            print(file=workers[name].stdin, flush=True)
            laps[name].append(hear(workers[name]))
        seconds = {name: round(told[-1]["seconds"], 3) for name, told in laps.items()}
        print(" ", rep or "warm-up", seconds, "load", os.getloadavg()[0], file=sys.stderr)
    for worker in workers.values():
        worker.communicate()  # ends its input, and so the worker
    return {name: summarise(told, ready[name]) for name, told in laps.items()}


def summarise(laps, ready):
    """The medians after the warm-up, the peak, and `memory`, the peak above that at the start."""
    found = {}
    for key in laps[0]:
        found[key] = median(lap[key] for lap in laps[1:])
    found["peak"] = laps[-1]["peak"]
    found["memory"] = found["peak"] - ready
    return found


def read_clock():
    """In a worker: seconds, of the wall's clock or of this process on any core."""
    return time.process_time() if JOB["clock"] == "cpu" else time.perf_counter()


def tell(message):
    """In a worker: send the parent something."""
    print(json.dumps(message), file=PIPE, flush=True)


def lap(began=0.0, **more):
    """In a worker: report the repetition that began then, wait until the next may run, and return
    when it begins."""
    seconds = read_clock() - began
    tell({"seconds": seconds, "peak": msd.take_peak(torch.device("cpu")), **more})
    if not sys.stdin.readline():
        os._exit(0)
    return read_clock()


# --- sample ---

def bench_sample(args):
    """Rows, as run_sample tells them."""
    worker = start(args, "sample")
    rows = []
    while row := hear(worker):
        rows.append(row)
    return rows


def run_sample():
    """Tell rows: sample() and model.generate by turns, greedy, on the same prompts."""
    model, tokenizer = load_model(JOB["model"], *find_device("cpu"))
    n = JOB["tokens"]
    most = max(JOB["batch"])
    queries = load_queries(JOB["data"], [JOB["lang"]])[:8 * most]
    prompts = [encode_chat(tokenizer, query.text[JOB["lang"]]) for query in queries]

    def ours(rows, stop_ids):
        return sample(model, rows, max_new_tokens=n, stop_ids=stop_ids, temperature=0)

    def generate(rows, stop_ids):
        model.generation_config = GenerationConfig(
            max_new_tokens=n, pad_token_id=0, eos_token_id=stop_ids or None)
        ids, mask = pad_left(rows)
        out = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1]:]
        return [cut(row, stop_ids) for row in out.tolist()]

    for B in JOB["batch"]:
        tell(compare("equal lengths", prompts[:B], [], ours, generate, bar=[1.2, 1.6]))
    free = []  # a batch at a time: memory
    for at in range(0, len(prompts), most):
        free += ours(prompts[at:at + most], [])
    stop, early, never = find_stop(free, n)
    for B in JOB["batch"]:
        pairs = list(zip(early, never))[:B // 2]
        rows = [prompts[i] for i in itertools.chain(*pairs)]
        if rows:
            case = "half done in the first quarter"
            tell(compare(case, rows, [stop], ours, generate, bar=[1.6, 2.2]))
    tell(None)


def compare(case, rows, stop_ids, ours, generate, bar):
    """A row: tokens a second of both samplers, by turns after a warm-up each."""
    seconds = {ours: [], generate: []}
    written = {}
    sides = [ours, generate]
    for _ in range(JOB["reps"] + 1):
        sides.reverse()
        for side in sides:
            began = read_clock()
            written[side] = side(rows, stop_ids)
            seconds[side].append(read_clock() - began)
    lengths = sorted(map(len, written[ours]))
    same = sum(x == y for x, y in zip(written[ours], written[generate]))
    rate = {side: sum(lengths) / median(seconds[side][1:]) for side in sides}
    note = f"same tokens in {same} of {len(rows)} rows; lengths {' '.join(map(str, lengths))}"
    return make_row(f"sample: batch {len(rows)}, {case}", "tokens/s", rate[ours],
                    "generate", rate[generate], note, bar)


def pad_left(rows):
    """Ragged ids -> (ids, mask), each (B, T)."""
    T = max(map(len, rows))
    ids = [[0] * (T - len(row)) + row for row in rows]
    mask = [[0] * (T - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def cut(row, stop_ids):
    """A response up to its first stop id."""
    for i, token in enumerate(row):
        if token in stop_ids:
            return row[:i + 1]
    return row


def find_stop(responses, n):
    """(token, the responses that it first ends in their second eighth, those that it never ends):
    the token for which the fewer of both are most."""
    found = {}
    for token in set().union(*(response[:n // 4] for response in responses)):
        first = [cut(response, [token]) for response in responses]
        early = [i for i, row in enumerate(first) if n // 8 < len(row) <= n // 4]
        never = [i for i, response in enumerate(responses) if token not in response]
        found[token] = (token, early, never)
    return max(found.values(), key=lambda one: min(len(one[1]), len(one[2])))


# --- step ---

def bench_step(args):
    """Rows of time and of memory."""
    trl = subprocess.run([args.trl_python, "-c", FIND_TRL], capture_output=True, text=True)
    workers = {"ours": start(args, "step")}
    if trl.returncode:
        print(f"no TRL in {args.trl_python}: left out, see --trl-python", file=sys.stderr)
    else:
        workers["trl"] = start(args, "trl", args.trl_python)
    got = take_turns(workers, args.reps)
    ours = got["ours"]
    trl = got.get("trl", {})
    parts = ", ".join(f"{name} {ours[name]:.2f} s" for name in ("sampling", "learning", "update"))
    rows = []
    for key, unit, note, bar in (("seconds", "s", parts, [0.8, 0.65]),
                                 ("peak", "GB", "", [0.97, 0.85])):
        case = f"step: batch 8, {args.tokens} tokens, {key}"
        rows.append(make_row(case, unit, ours[key], "TRL", trl.get(key), note, bar))
    return rows


def prepare_step():
    """(msd.py's flags, the same queries for both sides)."""
    args = msd.build_parser().parse_args([
        "--lang", JOB["lang"], "--model", JOB["model"], "--device", "cpu", "--lr", "1e-6",
        "--max-new-tokens", str(JOB["tokens"]), *shlex.split(JOB["flags"])])
    queries = load_queries(JOB["data"], [args.source_lang, args.lang])[:8]
    args.template = read_template(args.teacher_prompt)
    return args, queries


def run_step():
    """The box of msd.train, on the same rows every step and without stop ids: both sides write
    equally many tokens."""
    args, queries = prepare_step()
    student, teacher, tokenizer = msd.load_models(args, *find_device("cpu"))
    optimizer = msd.make_optimizer(args, student)
    batch = [(query, args.lang) for query in queries]
    began = lap()
    while True:
        student_prompts = msd.write_prompts(args, tokenizer, batch)
        teacher_prompts = msd.write_teacher_prompts(args, teacher, tokenizer, batch)
        responses = sample(student, student_prompts, max_new_tokens=args.max_new_tokens,
                           stop_ids=[], vocab_size=len(tokenizer))
        sampled = read_clock()
        msd.learn(args, student, teacher, student_prompts, teacher_prompts, responses)
        learned = read_clock()
        torch.nn.utils.clip_grad_norm_(msd.list_masters(student), args.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        updated = read_clock()
        began = lap(began, sampling=sampled - began, learning=learned - sampled,
                    update=updated - learned)


def run_trl():
    """SDFTTrainer with the same rows, as many at a time, the same student's and teacher's prompts,
    and as many tokens a response."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    args, queries = prepare_step()
    assert 8 % args.micro_batch_size == 0, "--micro-batch-size must divide 8"
    rows = []
    for query in queries:
        context = fill_template(args.template, query, args.lang, args.source_lang)
        turn = {"role": "user", "content": query.text[args.lang]}
        rows.append({"prompt": [turn], "privileged_context": context})

    class Turns(TrainerCallback):
        """Before the rollouts: a step lasts until the next begins."""
        began = 0.0

        def on_step_begin(self, *_, **__):
            self.began = lap(self.began)

    config = SDFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=8 // args.micro_batch_size, num_generations=1,
        max_steps=10 ** 6, learning_rate=args.lr, max_grad_norm=args.max_grad_norm,
        distillation_mode="full_logits", distillation_alpha=1.0, teacher_model_kind="base",
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        max_completion_length=JOB["tokens"], generation_kwargs={"min_new_tokens": JOB["tokens"]},
        max_prompt_length=None, shuffle_dataset=False, save_strategy="no", logging_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, bf16=False,
        model_init_kwargs={"dtype": "float32"})
    trainer = SDFTTrainer(model=args.model, args=config, train_dataset=Dataset.from_list(rows),
                          callbacks=[Turns()])
    config.teacher_prompt_template = "{privileged_context}"  # ours: the query is not repeated

    tokenizer = trainer.processing_class
    batch = [(query, args.lang) for query in queries]
    seen = [trainer.teacher_context_builder._compose_teacher_prompt(*row.values()) for row in rows]
    theirs = [trainer._tokenize_prompts([row["prompt"] for row in rows]),
              trainer._tokenize_prompts(seen)]
    assert theirs == [msd.write_prompts(args, tokenizer, batch),
                      msd.write_teacher_prompts(args, None, tokenizer, batch)]
    trainer.train()


# --- loss ---

def bench_loss(args):
    """Rows of time and of memory, every size in fresh processes, so that a peak is its own."""
    rows = []
    for V, trained in itertools.product(args.vocab, (False, True)):
        sides = ("chunked", "dense")
        workers = {name: start(args, "loss", side=name, V=V, trained=trained) for name in sides}
        got = take_turns(workers, args.reps)
        chunked = got["chunked"]
        dense = got["dense"]
        case = f"V {V:,}, head {'trained' if trained else 'frozen'}"
        note = f"loss {chunked['loss']:.6f}, {dense['loss']:.6f}"
        for key, unit, bar in (("seconds", "s", [1, 0.5]), ("memory", "GB", [1 / 8, 1 / 12])):
            rows.append(make_row(f"loss: {case}, {key}", unit, chunked[key], "dense", dense[key],
                                 note, bar if V > 200_000 else None))
    return rows


def run_loss():
    """The loss of 8 responses × 128 tokens and its gradient, from hidden states."""
    torch.manual_seed(0)
    student = torch.randn(8, 128, 64, requires_grad=True)
    teacher = torch.randn(8, 128, 64)
    ids = torch.randint(JOB["V"], (8, 128))
    head = torch.nn.Linear(64, JOB["V"], bias=False).requires_grad_(JOB["trained"])
    teacher_head = torch.nn.Linear(64, JOB["V"], bias=False).requires_grad_(False)
    began = lap()
    while True:
        student.grad = None
        head.weight.grad = None
        if JOB["side"] == "chunked":
            loss, _ = dpsw_loss_chunked(student, teacher, head, teacher_head, ids)
        else:
            loss, _ = dpsw_loss(head(student), teacher_head(teacher), ids)
        loss.backward()
        began = lap(began, loss=loss.item())


# --- plan ---

def bench_plan(args):
    """Print what is planned; rows: that over the peak of a run."""
    rows = []
    for flags in [args.flags] if args.flags else ["", "--lora-rank 16"]:
        command = shlex.split(flags)
        worker = start(args, "plan", argv=make_flags(args, *command))
        parts = hear(worker)
        worker.wait()
        planned = sum(parts.values())
        print(f"\n{args.model} {' '.join(command)}")
        for name, gb in parts.items():
            print(f"{gb:9.2f} GB  {name}")
        print(f"{planned:9.2f} GB  in all", flush=True)
        if not args.dry:
            peak = measure_run(args, *command)
            note = "with the evaluations before and after"
            rows.append(make_row(f"plan: {flags or 'full'}", "GB", planned, "peak", peak, note))
    return rows


def make_flags(args, *flags):
    """Flags of msd.py for a run on --lang and --data."""
    return ["--lang", args.lang, "--model", args.model, "--data", args.data, "--eval-lang", "",
            "--overwrite", *flags]


def measure_run(args, *flags):
    """The peak of two steps, in GB of 1e9 bytes: of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["--steps", "2", "--save-every", "0", "--out", f"{folder}/run", *flags]
        process = subprocess.Popen([sys.executable, str(ROOT / "msd.py"),
                                    *make_flags(args, *command)], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("bench.py: a run failed, see above")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def load_meta(name, device, dtype):
    """As sample.load_model, but a model without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), dtype=dtype)
    return model, AutoTokenizer.from_pretrained(name)


def run_plan():
    """Tell {part: GB}, from a model without weights (meta device) and the prompts of the first
    steps. Of a run's phases the largest counts."""
    args = msd.build_parser().parse_args(JOB["argv"])
    on_gpu = args.device not in ("auto", "cpu")
    dtype = torch.bfloat16 if on_gpu and args.dtype == "auto" else torch.float32
    if args.dtype != "auto":
        dtype = getattr(torch, args.dtype)
    msd.load_model = load_meta
    student, teacher, tokenizer = msd.load_models(args, torch.device("meta"), dtype)

    own = {id(p) for p in student.parameters()}
    trained = msd.list_masters(student)
    parts = {
        "weights": count_gb(student.parameters()),
        "float32 masters": count_gb(
            p.master for p in student.parameters() if p.requires_grad and p.dtype != p.master.dtype),
        "gradients": count_gb(trained),
        "AdamW's moments": 2 * count_gb(trained),
        "the teacher's own weights": count_gb(p for p in teacher.parameters() if id(p) not in own),
        "the teacher's float32 averages": count_gb(
            p.master for p in teacher.parameters()
            if teacher is not student and p.requires_grad and p.dtype != p.master.dtype),
    }
    phases = plan_phases(args, student, tokenizer, on_gpu)
    largest = max(phases, key=phases.get)
    parts[f"the largest phase, {largest}"] = phases[largest]
    if not on_gpu:
        parts["Python and its libraries"] = 0.5
    tell(parts)


def count_gb(parameters):
    """GB (1e9 bytes) of weights."""
    return sum(p.nbytes for p in parameters) / 1e9


def plan_phases(args, model, tokenizer, on_gpu):
    """{phase of a run: the GB that it needs beside the weights}."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    H = config.hidden_size
    V = config.vocab_size
    L = config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * H
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    kv = 2 * L * kv_heads * (getattr(config, "head_dim", None) or H // heads)  # numbers a token
    b = model.dtype.itemsize / 1e9  # GB a number
    width = 16 * H + 6 * inner  # numbers that a layer keeps of a token
    n = args.max_new_tokens

    prompts = plan_prompts(args, model, tokenizer)
    pad = max(count_padded(model, rows, args.micro_batch_size, n) for rows in prompts["student"])
    longest = {who: max(map(len, sum(rows, []))) for who, rows in prompts.items()}
    judged = longest["student"] + args.eval_max_new_tokens
    asked = longest["teacher"] + args.eval_max_new_tokens
    slots = args.batch_size * (max(longest.values()) + args.cot_tokens + n)

    kept = b * L * pad * (H if args.grad_checkpoint else width)
    layers = 1 if on_gpu else 0.4 * L  # recomputed at a time; glibc keeps what earlier ones freed
    head = 0 if args.lora_rank else 2 * b * H * V  # its gradients
    chunk_size = 2048 if on_gpu else 128  # tokens, see learn
    chunk = max(n, min(chunk_size, args.micro_batch_size * n)) * V  # logits
    phases = {
        "rollouts (KV cache)": b * kv * slots,
        "backward (activations)": kept + b * pad * width * layers,
        "loss (activations, a chunk of logits)": kept + 36e-9 * chunk + head,
    }
    if args.eval_every:
        slots = max(EVAL_ROWS * judged, min(EVAL_ROWS, args.preflight) * asked)
        logits = EVAL_ROWS * V * (b + 4e-9)
        phases["evaluation (KV cache and logits of 64 rows)"] = b * kv * slots + logits
    return phases


def plan_prompts(args, model, tokenizer):
    """{"student", "teacher": the prompts of each of the first steps, lists of ids}."""
    args.cot_tokens, cot_tokens = 0, args.cot_tokens  # nothing can be written without weights
    args.template = read_template(args.teacher_prompt)
    langs = msd.evaluation.split_langs(args.lang)
    queries = []
    for path in args.data:
        queries += load_queries(path, [args.source_lang, *langs], args.label)
    pools = msd.make_pools(args, model, tokenizer, langs, queries)
    prompts = {"student": [], "teacher": []}
    for step in range(8):
        batch = msd.pick_batch(args, pools, step)
        prompts["student"].append(msd.write_prompts(args, tokenizer, batch))
        prompts["teacher"].append(
            msd.write_teacher_prompts(args, None, tokenizer, batch))
    args.cot_tokens = cot_tokens
    return prompts


def count_padded(model, prompts, size, n):
    """The tokens of the largest micro-batch, padding included."""
    rows = [prompt + [0] * n for prompt in prompts]
    return max(len(batch) * len(rows[batch[-1]]) for batch in cut_by_length(model, rows, size))


# --- kill ---

VARIANTS = {
    "full": [],
    "LoRA": ["--lora-rank", "4"],
    "EMA teacher": ["--teacher", "ema"],
    "off-policy": ["--policy", "off"],
    "CoT teacher": ["--cot-tokens", "8"],
}


def bench_kill(args):
    """Rows: of each variant, whether a run killed --kills times, and resumed, ends in the weights
    and the log of a run that nobody killed."""
    rng = random.Random(0)
    rows = []
    for name, flags in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            killed = Path(folder, "killed")
            straight = Path(folder, "straight")
            lives = 0
            while lives < args.kills:
                lives += kill_once(args, flags, killed, rng)
            steps = len(read_steps(killed)) + 3
            finish(args, flags, killed, steps)
            finish(args, flags, straight, steps)
            model = "adapter_model.safetensors" if name == "LoRA" else "model.safetensors"
            same = (killed / model).read_bytes() == (straight / model).read_bytes()
            once = read_steps(killed) == list(range(1, steps + 1))
        note = (f"{steps} steps; weights {'equal bit for bit' if same else 'DIFFER'}; "
                f"log {'has each step once' if once else 'BROKEN'}")
        rows.append(make_row(f"kill: {name}", "kills", lives, note=note))
        print(format_row(rows[-1]), file=sys.stderr)
    return rows


def begin(args, flags, out, steps):
    """Start a run of msd.py, or go on with it."""
    resume = ["--resume"] if (out / "checkpoint.pt").is_file() else ["--overwrite"]
    command = ["--lang", args.lang, "--model", args.model, "--data", args.data, *flags,
               "--batch-size", "4", "--max-new-tokens", "6", "--eval-every", "0",
               "--save-every", "1", "--steps", str(steps), "--out", str(out)]
    return subprocess.Popen([sys.executable, str(ROOT / "msd.py"), *command, *resume],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_once(args, flags, out, rng):
    """Kill -9 a run: mostly a moment after its first new step, sometimes while it still loads."""
    process = begin(args, flags, out, 10 ** 6)
    before = len(read_steps(out))
    is_late = rng.random() < 0.8
    while is_late and process.poll() is None and len(read_steps(out)) <= before:
        time.sleep(0.1)
    time.sleep(rng.uniform(0, 1))
    process.kill()
    if process.wait() != -9:
        sys.exit(f"bench.py: a run ended by itself, with exit code {process.returncode}: {out}")
    return 1


def finish(args, flags, out, steps):
    """Run until that many steps are done."""
    if begin(args, flags, out, steps).wait():
        sys.exit(f"bench.py: {out} could not be finished")


def read_steps(out):
    """The steps in a run's log; a line that is cut off is none."""
    log = out / "metrics.jsonl"
    if not log.is_file():
        return []
    whole = log.read_text().split("\n")[:-1]
    return [json.loads(line)["step"] for line in whole]


# --- long ---

def bench_long(args):
    """Rows: whether memory and seconds a step stay as they are."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "long")
        command = make_flags(args, "--eval-every", "0", "--save-every", "100",
                             "--steps", str(args.steps), "--out", str(out),
                             *shlex.split(args.flags))
        subprocess.run([sys.executable, str(ROOT / "msd.py"), *command], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    quarter = args.steps // 4

    def measure_speed(part):
        return median(row["seconds"] / row["response_tokens"] for row in part)

    grown = 1000 * (rows[-1]["peak_mem_gb"] - rows[quarter]["peak_mem_gb"])
    slope = 1000 * grown / (args.steps - quarter)
    note = f"peak {rows[-1]['peak_mem_gb']:.2f} GB"
    if [row["step"] for row in rows] != list(range(1, args.steps + 1)):
        note += "; log BROKEN"
    return [
        make_row(f"long: {args.steps} steps, after the first {quarter}", "MB a thousand steps",
                 slope, note=note),
        make_row("long: last quarter", "s a token", measure_speed(rows[-quarter:]),
                 "second quarter", measure_speed(rows[quarter:2 * quarter]))]


# --- processes ---

def bench_processes(args):
    """A row: seconds a step of two processes of one thread each over those of one."""
    seconds = {}
    for n in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            command = make_flags(args, "--eval-every", "0", "--save-every", "0", "--batch-size",
                                 str(args.batch[0]), "--max-new-tokens", str(args.tokens),
                                 "--steps", str(args.reps + 1), "--out", f"{folder}/run",
                                 *shlex.split(args.flags))
            start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n)]
            subprocess.run([*start, str(ROOT / "msd.py"), *command], check=True,
                           stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
            lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        seconds[n] = median(json.loads(line)["seconds"] for line in lines[1:])
    return [make_row(f"processes: batch {args.batch[0]}, two of one thread", "s", seconds[2],
                     "one of one thread", seconds[1], bar=[0.8, 0.65])]


# --- the table ---

def make_row(case, unit, ours, name="", reference=None, note="", bar=None):
    """A row: ours over the reference called `name`; bar: [bar, goal] of the ratio."""
    return {"case": case, "unit": unit, "ours": ours, "name": name, "reference": reference,
            "note": note, "bar": bar}


def format_row(row):
    """A line of the markdown table. Of rates (…/s) more is better, of seconds and GB less."""
    cells = [row["case"], f"{row['ours']:.4g} {row['unit']}", "", "", row["note"], ""]
    if row["reference"]:
        ratio = row["ours"] / row["reference"]
        cells[2] = f"{row['name']} {row['reference']:.4g}"
        cells[3] = f"{ratio:.3g}"
        if row["bar"]:
            cells[5] = judge_ratio(ratio, *row["bar"], more=row["unit"].endswith("/s"))
    return f"| {' | '.join(cells)} |"


def judge_ratio(ratio, bar, goal, more):
    """Whether a ratio meets its bar and its goal, as text."""
    verdict = "MISSED"
    for name, limit in (("bar", bar), ("goal", goal)):
        if (ratio >= limit) if more else (ratio <= limit):
            verdict = f"{name} met"
    return f"{'≥' if more else '≤'} {bar:.3g}, {goal:.3g}: {verdict}"


SECTIONS = {
    "sample": bench_sample,
    "step": bench_step,
    "loss": bench_loss,
    "plan": bench_plan,
    "kill": bench_kill,
    "long": bench_long,
    "processes": bench_processes,
}


def main():
    """Run the sections, then print one table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument

    def numbers(text):
        return [int(x) for x in text.split(",")]

    add("sections", nargs="*", choices=[*SECTIONS, "all"], default="all", metavar="section",
        help=", ".join(SECTIONS))
    add("--model", default="data/tiny")
    add("--data", default="data/queries.csv")
    add("--lang", default="jv")
    add("--clock", choices=["wall", "cpu"], default="wall",
        help="cpu: the process's own seconds, for a machine that is not free")
    add("--reps", type=int, default=3, help="repetitions after the warm-up")
    add("--tokens", type=int, default=32,
        help="response tokens of sample, step and processes")
    add("--batch", type=numbers, default="16", help="of sample and processes: 1,16,64")
    add("--vocab", type=numbers, default="49152,262144", help="V of the loss")
    add("--trl-python", default=sys.executable,
        help="an interpreter with TRL and what msd.py needs")
    add("--flags", default="", help="of step, plan, processes and long: more flags of msd.py")
    add("--dry", action="store_true", help="of plan: run nothing")
    add("--kills", type=int, default=10, help="of kill, each variant")
    add("--steps", type=int, default=2000, help="of long")
    args = parser.parse_args()
    rows = []
    for name, bench in SECTIONS.items():
        if name in args.sections or "all" in args.sections:
            rows += bench(args)
    print("\n| what | ours | reference | ratio | | bar, goal |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(format_row(row))
    print(f"\n{args.model}, {args.data}, {args.lang}; {os.cpu_count()} cores, float32; medians of "
          f"{args.reps}, {args.clock} clock; load {os.getloadavg()[0]:.2f}")


if __name__ == "__main__" and IS_WORKER:
    JOB = json.loads(sys.argv[2])
    PIPE = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no message
    globals()[f"run_{JOB['name']}"]()
elif __name__ == "__main__":
    main()
