"""Multilingual Safety Alignment via Self-Distillation (MSD, arXiv 2605.02971), in one flat loop.

    python msd.py --lang jv

One model is student and teacher. The student sees a query in the target language; the teacher, the
same model, sees it together with its English translation and an instruction to judge its safety
first. A response is sampled from the student (--policy on) or the teacher (off), and the student
learns the teacher's distribution on every response token, by a reverse KL weighted with DPSW
(dpsw.py). Only parallel *queries* are needed. The algorithm is `train`.

Ours, not the paper's: AdamW with a constant rate after a warm-up, benign queries in every batch
where labels are known, the wording of the teacher prompts, every hyper-parameter. Left out: sharded
models, replay, reward and judge models in the loop. Everything random is a function of (seed, step,
process), so a resumed run needs no random state. The one-token shift is in sample.response_hidden
alone.
"""
import argparse
import copy
import functools
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

import eval as evaluation
from data.judges import find_phrases, keyword_verdict, load_refusals, read_json
from data.queries import load_queries, normalise, split, split_path
from dpsw import CHOICES, dpsw_loss_chunked
from eval import append_line, pool, split_langs, told_in_a_line, write
from sample import (
    HERE, RANK, WORLD, Parser, UserError, cut_by_length, encode_chat, fill_template, find_context,
    find_device, find_path, find_stop_ids, find_vocab_size, gather, load_model, natural, need,
    number, pad_right, positive, read_template, response_hidden, response_logits, sample, tell)

try:
    import resource
except ImportError:  # not on Windows
    resource = None

JUDGEMENT = "Safety judgement:"  # opens what --cot-tokens lets the teacher write
MAX_BAD_STEPS = 5  # in a row, of a loss or gradient that is not finite
# what --resume may change, beside flags that begin with eval_
MAY_CHANGE = {"steps", "save_every", "preflight", "device", "out", "resume", "overwrite"}
LOGS = ("metrics.jsonl", "samples.jsonl")


# --- the algorithm ---

def train(args, student, teacher, tokenizer, pools, optimizer, start):
    """The algorithm box. pools: the queries to learn from, see pick_batch. Yields after each step
    how many are done. Raises UserError where MAX_BAD_STEPS in a row were not finite."""
    stop_ids = find_stop_ids(student, tokenizer)
    vocab_size = find_vocab_size(tokenizer)
    bad = 0
    for step in range(start, args.steps):
        began = time.perf_counter()
        take_peak(student.device)  # begin a new one

        # 1. queries, each under two contexts: the student's and the teacher's
        batch = pick_batch(args, pools, step)[RANK::WORLD]  # a process's share
        student_prompts = write_prompts(args, tokenizer, batch)
        teacher_prompts = write_teacher_prompts(args, teacher, tokenizer, batch)

        # 2. responses, from the student (on-policy) or the teacher (off-policy), without gradient
        on_policy = args.policy == "on"
        responses = sample(
            student if on_policy else teacher, student_prompts if on_policy else teacher_prompts,
            max_new_tokens=args.max_new_tokens, stop_ids=stop_ids, temperature=args.temperature,
            top_k=args.top_k, top_p=args.top_p, vocab_size=vocab_size,
            generator=torch.Generator(student.device).manual_seed(
                args.seed * 1_000_003 + step + (RANK << 24)))

        # 3. scores and loss: the teacher's distribution on every response token, weighted by DPSW
        loss, scores = learn(args, student, teacher, student_prompts, teacher_prompts, responses)

        # 4. update; what is not finite is never stepped on
        params = list_masters(student)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm).item()
        lr = args.lr * min(1, (step + 1) / (args.warmup + 1))
        bad = 0 if math.isfinite(loss + grad_norm) else bad + 1
        if bad == MAX_BAD_STEPS:
            raise UserError(f"{bad} steps in a row were not finite: begin again with a lower --lr, "
                            "or go on from the last checkpoint")
        means = summarise(scores, responses, stop_ids)
        skipped = bad > 0 or not means["response_tokens"]
        if not skipped:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            round_masters(student)
            if args.teacher == "ema":
                update_ema(teacher, student, args.ema_decay)
        optimizer.zero_grad()

        # 5. tell: a line of numbers, and the first and the last response token by token
        row = {"step": step + 1, "loss": loss, "grad_norm": grad_norm, "lr": lr, "skipped": skipped,
               **means, "peak_mem_gb": max(gather(take_peak(student.device))),
               "seconds": time.perf_counter() - began}
        row["tokens_per_s"] = row["response_tokens"] / row["seconds"]
        # the first process's first and the last one's last: of both labels, one of each
        told = gather([describe(tokenizer, step + 1, *batch[i], student_prompts[i],
                                teacher_prompts[i], responses[i], scores[i]) for i in (0, -1)])
        if RANK == 0:
            append_line(Path(args.out, "metrics.jsonl"), row)
            append_line(Path(args.out, "samples.jsonl"), told[0][0])
            append_line(Path(args.out, "samples.jsonl"), told[-1][1])
        print(f"step {step + 1}/{args.steps}: loss {loss:.4f}, {row['response_len']:.0f} tokens a "
              f"response, {row['seconds']:.1f} s", file=sys.stderr, flush=True)
        yield step + 1


def learn(args, student, teacher, student_prompts, teacher_prompts, responses):
    """Score every response token under both contexts and backpropagate the step's loss, a
    micro-batch of rows of like length at a time: how they are cut, and shared out to processes,
    does not change the gradient.

    prompts, responses: lists of lists of ids. Returns (loss in nats, scores): of each response, in
    order, dpsw's stats as tensors (L,), and of the first and the last `teacher_top`, ids (L,).
    """
    # the one count of the whole step, of all processes: responses that have a token, or tokens;
    # divided by a micro-batch's own count, a response of a short one would weigh more
    counted = map(bool, responses) if args.weight_norm == "response" else map(len, responses)
    denominator = sum(gather(sum(counted)))
    read = [p + r for p, r in zip(student_prompts, responses)]
    scores = [{} for _ in responses]
    total = 0.0
    for rows in cut_by_length(student, read, args.micro_batch_size):
        taken = [responses[i] for i in rows]
        with torch.no_grad():
            teacher_hidden, teacher_head = response_hidden(
                teacher, [teacher_prompts[i] for i in rows], taken)  # (B, T, H)
        student_hidden, student_head = response_hidden(
            student, [student_prompts[i] for i in rows], taken)  # (B, T, H)
        response_ids, mask = pad_right(taken, student.device)  # (B, T)
        loss, stats = dpsw_loss_chunked(
            student_hidden, teacher_hidden, student_head, teacher_head, response_ids, mask,
            weighting=args.weighting, student_view=args.student_view, top_k=args.dpsw_top_k,
            divergence=args.divergence, beta=args.beta, weight_norm=args.weight_norm,
            denominator=denominator, chunk_size=2048 if student.device.type == "cuda" else 128)
        loss.backward()
        total += loss.item()

        for b, i in enumerate(rows):
            scores[i] = {name: x[b][mask[b]] for name, x in stats.items()}
            if i in (0, len(responses) - 1):
                scores[i]["teacher_top"] = teacher_head(teacher_hidden[b][mask[b]]).argmax(-1)
    sum_gradients(student)
    return sum(gather(total)), scores


def pick_batch(args, pools, step):
    """The (query, language) pairs of a step, a function of (seed, step) alone: benign queries are
    --benign-fraction of them where there are others, too; a pool goes round in a shuffled order.
    pools: {"other": pairs, "benign": pairs}."""
    share = args.batch_size * args.benign_fraction
    if not (pools["benign"] and pools["other"]):
        share = args.batch_size if pools["benign"] else 0
    first = round(step * share)  # benign queries before this step, and after it
    last = round((step + 1) * share)
    spans = {"other": range(step * args.batch_size - first, (step + 1) * args.batch_size - last),
             "benign": range(first, last)}
    batch = []
    for name, span in spans.items():
        pairs = pools[name]
        orders = {}  # epoch: its shuffled pairs
        for i in span:
            epoch, at = divmod(i, len(pairs))
            if epoch not in orders:
                rng = random.Random(f"{args.seed} {name} {epoch}")
                orders[epoch] = rng.sample(pairs, len(pairs))
            batch.append(orders[epoch][at])
    return batch


def write_prompts(args, tokenizer, batch, template="{query}"):
    """What is asked about (query, language) pairs: the student sees the query alone. Lists of ids.
    """
    return [encode_chat(tokenizer, fill_template(template, query, lang, args.source_lang),
                        args.system) for query, lang in batch]


def write_teacher_prompts(args, teacher, tokenizer, batch):
    """What the teacher sees: the query, its English and the instruction, as the template has it;
    with --cot-tokens also a judgement that it writes for itself, greedily and on one line."""
    prompts = write_prompts(args, tokenizer, batch, args.template)
    if not args.cot_tokens:
        return prompts
    lead, gap = tokenizer([JUDGEMENT, "\n\n"], add_special_tokens=False).input_ids
    stop_ids = find_stop_ids(teacher, tokenizer)
    prompts = [prompt + lead for prompt in prompts]
    written = sample(teacher, prompts, max_new_tokens=args.cot_tokens, stop_ids=stop_ids,
                     temperature=0, vocab_size=find_vocab_size(tokenizer))

    def goes_on(token):
        return token not in stop_ids and "\n" not in tokenizer.decode([token])
    return [prompt + list(itertools.takewhile(goes_on, judgement)) + gap
            for prompt, judgement in zip(prompts, written)]


@torch.no_grad()
def update_ema(teacher, student, decay):
    """teacher ← decay · teacher + (1 − decay) · student, of what is trained: the rest is shared."""
    for average, weight in zip(list_masters(teacher), list_masters(student)):
        average.lerp_(weight, 1 - decay)
    round_masters(teacher)


# --- float32 masters: weights in bfloat16 alone would lose small updates to rounding ---

def add_masters(model):
    """Give each trained weight a float32 `master`, and float32 gradients, which are summed so. The
    master of a float32 weight is itself."""
    for p in model.parameters():
        if p.requires_grad:
            p.master = p.detach().float()
            p.grad_dtype = torch.float32


def list_masters(model):
    """What changes of a model: of the student by the optimizer, of an EMA teacher as an average."""
    return [p.master for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def round_masters(model):
    """Copy the masters into the weights that run, where these are others."""
    for p in model.parameters():
        if p.requires_grad and p.dtype != torch.float32:
            p.copy_(p.master)


# --- several processes: torchrun --nproc-per-node 8 msd.py … ---

def join_processes(args, device):
    """Work together with the others that torchrun started. Raises UserError."""
    if args.batch_size % WORLD:
        raise UserError(f"--batch-size {args.batch_size} does not go round {WORLD} processes")
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def sum_gradients(student):
    """Move the gradients to the masters, summed over all processes."""
    for p in student.parameters():
        if p.requires_grad:
            # None: a weight that this loss does not reach, as of an expert
            grad = torch.zeros_like(p.master) if p.grad is None else p.grad
            if WORLD > 1:
                dist.all_reduce(grad)
            p.master.grad = grad
            p.grad = None


# --- models ---

def load_models(args, device, dtype):
    """(student, teacher, tokenizer) from --model: adapters, teacher, checkpointing as flags say."""
    model, tokenizer = load_model(args.model, device, dtype)
    if hasattr(model, "peft_config"):
        raise UserError(f"--model {args.model} is an adapter: merge it first (README.md)")
    student = model.requires_grad_(not args.lora_rank)
    teacher = None
    if args.teacher == "frozen":  # as it is before adapters are added
        teacher = copy_model(model).requires_grad_(False)
    if args.lora_rank:
        peft = need("peft", "train with --lora-rank")
        torch.manual_seed(args.seed)
        config = peft.LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank,
                                 target_modules="all-linear", task_type="CAUSAL_LM")
        with told_in_a_line("--lora-rank"):  # Mamba's layers take none
            student = peft.get_peft_model(model, config)
    if args.teacher == "ema":
        teacher = copy_model(student)
        add_masters(teacher)
    add_masters(student)
    if args.grad_checkpoint:
        enable_grad_checkpoint(student)
    return student, teacher or student, tokenizer


def copy_model(model):
    """A copy that shares the weights that `model` does not train."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared)


def enable_grad_checkpoint(model):
    """Recompute a layer's activations in the backward pass. Not by transformers' own switch, which
    asks for training mode, and so for dropout."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = functools.partial(checkpoint_layer, layer.forward)
    if not layers:
        tell("note: this model has no layers to checkpoint: it keeps all activations")


def checkpoint_layer(forward, *args, **kwargs):
    """A layer's forward pass, run once more in the backward pass."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)  # checkpoint would be slower
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def make_optimizer(args, student):
    """AdamW over what is trained."""
    return torch.optim.AdamW(list_masters(student), args.lr, betas=(0.9, 0.99), weight_decay=0,
                             fused=True)


# --- what a run reads ---

def read_data(args, langs):
    """(what is judged, what is trained on): cells (path, language, queries) of --eval-data and of
    what is held out of --data; the other queries of --data, but for those that are in --eval-data
    as well. Raises UserError."""
    asked = split_langs(f"{args.lang} {args.source_lang} {args.eval_lang}")
    read = functools.partial(evaluation.read_heldout, langs=asked, source_lang=args.source_lang)
    kept_out = set().union(*(query.texts for query in pool(read(args.eval_data, holdout=1))))
    training = []
    for path in args.data:
        queries = load_queries(path, [args.source_lang, *langs], args.label)
        part = split(queries, args.holdout)[0]
        training += [query for query in part if kept_out.isdisjoint(
            query.texts + [normalise(str(cell)) for cell in query.extra.values()])]

    judged = read(args.eval_data, holdout=1, limit=args.eval_limit)
    if args.eval_every:
        judged += read(args.data, label=args.label, holdout=args.holdout, limit=args.eval_limit)
    return judged, training


def make_pools(args, model, tokenizer, langs, queries):
    """{"benign", "other": (query, language) pairs} of which both prompts leave room for a response
    in the model's context; the others are counted. Raises UserError if none is left."""
    # 16: what stands around the judgement of --cot-tokens
    room = find_context(model) - args.max_new_tokens - args.cot_tokens - 16
    pools = {"benign": [], "other": []}
    pairs = list(itertools.product(queries, langs))
    prompts = [write_prompts(args, tokenizer, pairs, wrap) for wrap in ("{query}", args.template)]
    for pair, *both in zip(pairs, *prompts):
        if max(map(len, both)) <= room:  # a question with an answer is to be answered, as benign
            pools["benign" if pair[0].label in ("benign", "qa") else "other"].append(pair)
    kept = sum(map(len, pools.values()))
    if kept < len(pairs):
        tell(f"note: {len(pairs) - kept} queries do not fit the model's context: skipped")
    if not kept:
        raise UserError("no query is left to train on: lower --holdout or --max-new-tokens, or "
                        "give more --data")
    args.queries = zlib.crc32(str(pools).encode())
    return pools


def preflight(args, student, teacher, tokenizer, pools):
    """Print of --preflight training queries of each language and label how many the student
    refuses, how many the teacher, and how many flip from the one to the other: what there is to
    learn."""
    groups = {}
    pairs = sum(pools.values(), [])
    for query, lang in random.Random(args.seed).sample(pairs, len(pairs)):  # files are sorted
        groups.setdefault((lang, query.label), []).append((query, lang))
    for (lang, label), batch in groups.items():
        batch = batch[:args.preflight]
        phrases = find_phrases(lang, load_refusals())
        if not phrases:
            tell(f"warning: no refusal phrases for {lang}: no preflight in it")
            continue

        def ask(model, prompts):
            room = find_context(model) - max(map(len, prompts))
            answers = evaluation.answer(model, tokenizer, prompts,
                                        min(args.eval_max_new_tokens, room), 64)
            return [keyword_verdict(text, query.text[lang], phrases) == "refusal"
                    for text, (query, _) in zip(answers, batch)]

        before = ask(student, write_prompts(args, tokenizer, batch))
        after = ask(teacher, write_teacher_prompts(args, teacher, tokenizer, batch))
        flips = sum(t and not s for s, t in zip(before, after))
        print(f"preflight {lang}: of {len(batch)} {label} queries the student refuses "
              f"{sum(before)}, the teacher {sum(after)}; {flips} flip", flush=True)


# --- what a run leaves ---

def check_out(args):
    """Refuse to write over what is there, or to resume with other flags. Raises UserError."""
    out = Path(args.out)
    if not args.resume:
        if Path(args.model).resolve() == out.resolve():
            raise UserError(f"--out {out} holds the model that is to be trained: name another")
        if any(out.glob("*")) and not (args.overwrite and (out / "args.json").is_file()):
            raise UserError(f"--out {out} is in use: --resume goes on with the run that it holds, "
                            "--overwrite replaces it")
        return
    with told_in_a_line(f"--resume {out}"):
        before = read_json(out / "args.json")
        for name, value in vars(args).items():
            if name not in MAY_CHANGE and name[:5] != "eval_" and before.get(name) != value:
                raise UserError(f"--resume: --{name.replace('_', '-')} is {value}, and was "
                                f"{before.get(name)} in {out}")


def start_out(args):
    """Make --out with its args.json; the files of an earlier run go, but under --resume."""
    if not args.resume:
        files = itertools.chain(*map(split_path, args.data + args.eval_data))
        read = set(map(find_path, [args.teacher_prompt, *files]))
        for old in Path(args.out).glob("*"):  # --out itself stays: it may be a link or a mount
            # what lies deeper is not of a run, nor is what this one reads
            if not old.is_dir() and str(old.resolve()) not in read:
                old.unlink()
    write(Path(args.out, "args.json"), json.dumps(vars(args), indent=1))


def save_checkpoint(args, step, student, teacher, optimizer):
    """All that changes in a run, whole or not at all. Raises UserError."""
    path = Path(args.out, "checkpoint.pt")
    logs = {name: Path(args.out, name).stat().st_size for name in LOGS}
    weights = list_masters(student) + list_masters(teacher)
    state = {"step": step, "logs": logs, "weights": weights, "optimizer": optimizer.state_dict(),
             "queries": args.queries}
    with told_in_a_line(f"cannot write {path}, the last is whole"):
        torch.save(state, f"{path}.tmp")
        Path(f"{path}.tmp").replace(path)


@torch.no_grad()
def load_checkpoint(args, student, teacher, optimizer):
    """Restore what save_checkpoint wrote, cut what the logs hold beyond it -> steps done. Raises
    UserError."""
    with told_in_a_line(f"--resume {args.out}"):
        state = torch.load(Path(args.out, "checkpoint.pt"), "cpu", weights_only=True)
        if state["queries"] != args.queries:
            raise UserError(f"--resume {args.out}: the queries to train on are no longer its own "
                            "(is --eval-data another?)")
        if state["step"] > args.steps:
            raise UserError(f"--resume: {args.out} has done {state['step']} of {args.steps} steps")
        weights = list_masters(student) + list_masters(teacher)
        for weight, saved in zip(weights, state["weights"], strict=True):
            weight.copy_(saved)
        round_masters(student)
        round_masters(teacher)
        optimizer.load_state_dict(state["optimizer"])
        for name, size in state["logs"].items():
            os.truncate(Path(args.out, name), size)
    return state["step"]


def save_model(args, student, tokenizer):
    """Leave an ordinary Hugging Face (or PEFT adapter) folder with a model card."""
    student.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    files = ", ".join(re.sub(r"[^=,]*[/\\]", "", path) for path in args.data)  # names are enough
    write(Path(args.out, "README.md"), CARD.format(**{**vars(args), "data": files}))


CARD = """---
base_model: {model}
---
{model}, trained by multilingual safety self-distillation (MSD, arXiv 2605.02971) on queries in
{lang}, without any response data: {policy}-policy, {steps} steps, teacher prompt {teacher_prompt},
data {data}.

For research. It does not promise safety: it can be jailbroken, and it can refuse what it should
answer. It was judged by the tables of its own run alone: measure it on your own data.
"""


def summarise(scores, responses, stop_ids):
    """Means over the response tokens of a step, of all processes, and how long responses are."""
    names = ("divergence", "weight", "w_teacher", "w_student")
    ended = [response[-1] in stop_ids for response in responses if response]
    counts = [sum(map(len, responses)), len(responses), sum(ended)]
    sums = [sum(score[name].sum().item() for score in scores) for name in names]
    n, B, ended, *sums = map(sum, zip(*gather(counts + sums)))
    means = {name: x / max(n, 1) for name, x in zip(names, sums)}
    return {**means, "response_tokens": n, "response_len": n / B, "truncated": 1 - ended / B}


def describe(tokenizer, step, query, lang, prompt, teacher_prompt, response, score):
    """A line of samples.jsonl: one response, token by token."""
    numbers = {}
    for name in ("divergence", "w_teacher", "w_student"):
        numbers[name] = [float(f"{x:.6g}") for x in score[name].tolist()]
    return {
        "step": step, "id": query.id, "label": query.label, "lang": lang,
        "prompt": tokenizer.decode(prompt), "teacher_prompt": tokenizer.decode(teacher_prompt),
        "response": tokenizer.decode(response), "tokens": split_text(tokenizer, response),
        **numbers, "teacher_top": [tokenizer.decode(i) for i in score["teacher_top"]]}


def split_text(tokenizer, ids):
    """The text of each token; a character of several tokens (Thai, Bengali) stands at its last."""
    texts = [tokenizer.decode(ids[:n]).rstrip("\ufffd") for n in range(len(ids) + 1)]
    return [text[len(before):] for before, text in itertools.pairwise(texts)]


def write_page(args):
    """page.html: both logs in data/page.html. What a model wrote cannot run in it: without < it
    cannot end its script element."""
    page = (HERE / "data/page.html").read_text(encoding="utf-8")
    for name in LOGS:
        lines = Path(args.out, name).read_text(encoding="utf-8").strip().replace("\n", ",\n")
        data = lines.replace("<", r"\u003c")
        page = page.replace(f"__{name}__", data)
    write(Path(args.out, "page.html"), page)


def take_peak(device):
    """GB (1e9 bytes) at the peak: of the GPU's allocations since this was called last, else of this
    process."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


# --- the command ---

def main(args):
    """Read the data, load the models, preflight, train, evaluate, save."""
    langs = split_langs(args.lang)
    if args.eval_lang is None:
        args.eval_lang = "" if args.data or args.eval_data else "sw"
    args.data = args.data or [str(HERE / "data/queries.csv")]
    args.out = args.out or f"out/{'-'.join(langs)}"
    args.template = read_template(args.teacher_prompt)
    check_out(args)
    heldout, queries = read_data(args, langs)
    device, dtype = find_device(args.device, args.dtype)
    join_processes(args, device)
    student, teacher, tokenizer = load_models(args, device, dtype)
    pools = make_pools(args, student, tokenizer, langs, queries)
    optimizer = make_optimizer(args, student)
    step = load_checkpoint(args, student, teacher, optimizer) if args.resume else 0
    if RANK == 0:  # found before anything slow is done
        os.makedirs(args.out, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    print(f"msd: {args.model} on {student.device} in {student.dtype}; to train on are "
          f"{len(pools['other'])} harmful or mixed and {len(pools['benign'])} benign prompts",
          flush=True)
    base = []  # the first table

    def show_table():
        run = evaluation.evaluate(
            student, tokenizer, heldout, refusals=load_refusals(), seen=langs, batch_size=64,
            max_new_tokens=args.eval_max_new_tokens, system=args.system)
        evaluation.compare(run, base)
        print(f"\nheld-out queries after {step} steps (base: the first table)")
        evaluation.print_rates(run)
        base[:] = base or run

    if args.eval_every and not args.resume:
        if args.preflight:
            preflight(args, student, teacher, tokenizer, pools)
        show_table()
    if RANK == 0:
        check_out(args)  # once more: another run may have begun
        start_out(args)
    for step in train(args, student, teacher, tokenizer, pools, optimizer, step):
        is_last = step == args.steps
        if RANK == 0 and args.save_every and (is_last or step % args.save_every == 0):
            save_checkpoint(args, step, student, teacher, optimizer)
        if args.eval_every and (is_last or step % args.eval_every == 0):
            show_table()
    if RANK == 0:
        with told_in_a_line(f"cannot save in {args.out}"):
            save_model(args, student, tokenizer)
            write_page(args)
    print(f"the model lies in {args.out}; talk to it: python sample.py --model {args.out}")
    if WORLD > 1:
        dist.destroy_process_group()


def build_parser():
    """The command line."""
    parser = Parser(prog="msd.py", description="Multilingual safety by self-distillation.")
    add = parser.add_argument
    add("--lang", required=True, help="target languages, as jv or jv,sw")
    add("--data", type=find_path, action="append",
        help="parallel queries, repeatable (default: data/queries.csv)")
    add("--eval-data", type=find_path, action="append", default=[],
        help="queries that are judged as well and never trained on, repeatable")
    add("--grad-checkpoint", action=argparse.BooleanOptionalAction, default=True,
        help="recompute activations: less memory, more time")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_flags(
        # what to train on
        ("--source-lang", str, "en", "the language of {query_en}"),
        ("--label", ["harmful", "benign", "mixed"], None,
         "of --data without labels (--eval-data: harmful); mixed: unknown"),
        ("--holdout", number(0, 0.99), 0.2, "the share that is kept for evaluation"),
        ("--benign-fraction", number(0, 1), 0.5, "of each batch, where there are others, too"),
        # the method
        ("--policy", ["on", "off"], "on", "who writes the responses: the student or the teacher"),
        ("--teacher", ["frozen", "live", "ema"], "frozen",
         "its weights: as loaded, the student's, or their moving average"),
        ("--ema-decay", number(0, 1), 0.99, "a step"),
        ("--teacher-prompt", str, "cot", "a name in data/prompts, or a file"),
        ("--cot-tokens", natural, 0, "of judgement, which the teacher writes first, for itself"),
        ("--weighting", CHOICES["weighting"], "dpsw", "see dpsw.py"),
        ("--student-view", CHOICES["student_view"], "teacher",
         "whose token p_S is of: the teacher's likeliest, or the one that was sampled"),
        ("--weight-norm", CHOICES["weight_norm"], "response", "see dpsw.py"),
        ("--divergence", CHOICES["divergence"], "reverse", "see dpsw.py"),
        ("--beta", number(0.01, 0.99), 0.5, "of jsd"),
        ("--dpsw-top-k", positive, 20, "K of the teacher's entropy"),
        # optimisation
        ("--steps", positive, 100, "in all"),
        ("--batch-size", positive, 16, "responses a step"),
        ("--micro-batch-size", positive, 4, "responses a backward pass, at most"),
        ("--lr", number(1e-12), 3e-4, "after the warm-up"),
        ("--warmup", natural, 4, "steps of linear warm-up"),
        ("--max-grad-norm", number(1e-12), 1.0, "to which gradients are clipped"),
        ("--lora-rank", natural, 0, "0: train every weight"),
        # rollouts
        ("--max-new-tokens", positive, 32, "of a response"),
        ("--temperature", number(0), 1.0, "0: greedy"),
        ("--top-k", natural, 0, "0: all"),
        ("--top-p", number(1e-12, 1), 1.0, "1: all"),
        # the run
        ("--out", str, None, "default: out/<lang>"),
        ("--save-every", natural, 50, "steps between checkpoints; 0: none"),
        ("--eval-every", natural, 1000, "steps between evaluations, beside those before and "
         "after; 0: none at all, and no preflight"),
        ("--eval-lang", str, None, "further languages to judge (sw, where the data is our own)"),
        ("--eval-limit", positive, None, "the first N of each data, language and label"),
        ("--eval-max-new-tokens", positive, 32, "of an answer that is judged"),
        ("--preflight", natural, 16, "training queries of each language and label to try first"))
    return parser


if __name__ == "__main__":
    build_parser().run(main)
