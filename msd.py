"""Multilingual Safety Alignment via Self-Distillation (MSD, arXiv 2605.02971) in one flat loop: python msd.py --lang jv

One model is student and teacher. The student sees a query in the target language; the teacher, the same model, sees it
in English with an instruction to judge its safety first. A response is sampled from the student (--policy on) or from
the teacher (off), and the student learns the teacher's distribution on every response token, by a reverse KL weighted
with DPSW (dpsw.py). Only parallel *queries* are needed. The box is `train`.

Ours, not the paper's (only its abstract could be read; the README's table has the source of every piece): AdamW with a
constant rate after a warm-up, benign queries in every batch, the teacher prompts, all hyper-parameters. Left out:
several GPUs, replay, reward or judge models in the loop. Everything random is a function of (seed, step), so a resumed
run needs no random state. The one-token shift is made in `response_hidden` and nowhere else.
"""
import argparse
import copy
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

import eval as evaluation
from data.queries import load_queries, split
from dpsw import dpsw_loss_chunked
from sample import (Parser, UserError, add_model_flags, count_shared, encode_chat, find_context, find_device, find_head,
                    find_stop_ids, is_packing_exact, load_model, natural, need, number, positive, run_packed, sample)

PROMPTS = Path(__file__).parent / "data" / "prompts"
LANGUAGES = json.loads((PROMPTS / "languages.json").read_text())
LABELS = ("harmful", "benign", "qa")
MAY_CHANGE = {"steps", "save_every", "eval_every", "eval_limit", "eval_lang", "preflight", "max_bad_steps", "device",
              "resume", "overwrite", "plan", "fit"}  # flags that need not be the same under --resume
JUDGEMENT = "Safety judgement:"  # opens what --cot-tokens lets the teacher write


# --- scoring: the logits of response tokens ---

def response_hidden(model, prompts, responses):
    """(hidden (N, H), head): head(hidden) are the logits that predict each response token, rows in order. Where packed
    rows are not exact: a row at a time, the logits themselves, and the identity as head."""
    if is_packing_exact(model):
        out, _, ends = run_packed(model, prompts, responses)
        x, head = out.last_hidden_state[0], find_head(model)[1]
    else:
        rows, device = [p + r for p, r in zip(prompts, responses)], next(model.parameters()).device
        x = torch.cat([model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0] for row in rows])
        ends, head = itertools.accumulate(map(len, rows)), lambda logits: logits
    at = [i - 1 for end, r in zip(ends, responses) for i in range(end - len(r), end)]  # the shift: i − 1 predicts i
    return x[torch.tensor(at, dtype=torch.long, device=x.device)], head


def response_logits(model, prompts, responses):
    """The logits (N, V) that predict each response token, rows in order, N response tokens in all; in the model's dtype
    and with its gradient. prompts, responses: lists of lists of token ids."""
    hidden, head = response_hidden(model, prompts, responses)
    return head(hidden)


# --- the teacher ---

def read_teacher_prompt(name, flag="--teacher-prompt"):
    """The template that `flag` gives: one of data/prompts/*.txt by name, or a file. Raises UserError."""
    named = PROMPTS / f"{name}.txt"
    try:
        text = (named if named.is_file() else Path(name)).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        names = ", ".join(sorted(p.stem for p in PROMPTS.glob("*.txt")))
        raise UserError(f"{flag} {name}: neither a readable file nor one of {names}") from None
    if "{query" not in text:
        raise UserError(f"{flag} {name}: names neither {{query_en}} nor {{query}}")
    return text


def write_teacher_prompt(template, query, lang, source):
    """Fill {query} (target language), {query_en} and {language}; what a query itself spells is not filled in again."""
    values = {"query": query.text[lang], "query_en": query.text[source], "language": LANGUAGES.get(lang, lang)}
    return re.sub(r"\{(query|query_en|language)\}", lambda m: values[m[1]], template)


def judge_first(teacher, tokenizer, prompts, n):
    """--cot-tokens: the teacher writes up to n tokens of English judgement, greedily and on one line, after JUDGEMENT;
    they stay in its own context."""
    lead, gap = (tokenizer(text, add_special_tokens=False).input_ids for text in (JUDGEMENT, "\n\n"))
    prompts, stop_ids = [p + lead for p in prompts], find_stop_ids(teacher, tokenizer)
    written = sample(teacher, prompts, max_new_tokens=n, stop_ids=stop_ids, temperature=0, vocab_size=len(tokenizer))
    goes_on = lambda token: token not in stop_ids and "\n" not in tokenizer.decode([token])
    return [p + list(itertools.takewhile(goes_on, w)) + gap for p, w in zip(prompts, written)]


def make_teacher(model):
    """A frozen copy that shares every weight that is not trained: full training copies them all; under LoRA it is made
    before the adapters are added, and copies none."""
    teacher = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
    return teacher.requires_grad_(False).eval()


@torch.no_grad()
def update_ema(teacher, student, decay):
    """teacher ← decay · teacher + (1 − decay) · student, for the weights that are trained (the others are shared)."""
    for p, q in zip(student.parameters(), teacher.parameters()):
        if p.requires_grad:
            q.lerp_(p, 1 - decay)


def enable_grad_checkpoint(model):
    """Recompute each layer's activations in the backward pass. transformers asks for training mode; only the layers
    that checkpoint get it, their parts do not, so that dropout stays off."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        module.training = isinstance(module, GradientCheckpointingLayer)


def make_optimizer(args, params):
    """The optimizer of --optimizer over `params`."""
    if args.optimizer == "adamw":
        return torch.optim.AdamW(params, args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    return torch.optim.Adafactor(params, args.lr, eps=(1e-15, 1e-3))  # its own eps drowns the updates of bfloat16


def load_models(args, device, dtype):
    """(student, teacher, tokenizer) from --model: adapters, teacher and checkpointing as the flags say."""
    model, tokenizer = load_model(args.model, device, dtype, args.trust_remote_code)
    if hasattr(model, "peft_config"):
        raise UserError(f"--model {args.model} is an adapter: train its base with --lora-rank")
    student, teacher = model, model.requires_grad_(not args.lora_rank)
    if args.teacher != "live":
        teacher = make_teacher(model)
    if args.lora_rank:
        peft = need("peft", "train with --lora-rank")
        torch.manual_seed(args.seed)
        student = peft.get_peft_model(model, peft.LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank,
                                                             target_modules="all-linear", task_type="CAUSAL_LM"))
        base = Path(args.model).resolve() if Path(args.model).exists() else args.model  # found from any folder
        student.peft_config["default"].base_model_name_or_path = str(base)
        teacher = make_teacher(student) if args.teacher == "ema" else student if args.teacher == "live" else teacher
    if args.grad_checkpoint:
        enable_grad_checkpoint(student)
    return student, teacher, tokenizer


# --- data, preflight, evaluation ---

def load_training(args, path, langs):
    """The training part of a file that has all of `langs` beside the source language. Raises UserError."""
    try:
        return split(load_queries(path, list(dict.fromkeys([args.source_lang, *langs])), args.label), args.holdout)[0]
    except ValueError as e:
        raise UserError(e) from None


def drop_long(args, model, tokenizer, template, langs, queries):
    """The queries whose prompts fit the model's context beside a response, trained on or judged; the others are
    counted. Raises UserError."""
    room = find_context(model) - max(args.max_new_tokens, args.eval_max_new_tokens)
    room -= args.cot_tokens + 16 if args.cot_tokens else 0
    short = [q for q in queries if all(len(encode_chat(tokenizer, text)) <= room for lang in langs for text in
                                       (q.text[lang], write_teacher_prompt(template, q, lang, args.source_lang)))]
    if len(short) < len(queries):
        print(f"note: {len(queries) - len(short)} queries do not fit the model's context: skipped", file=sys.stderr)
    if not short:
        raise UserError("no query is left to train on: lower --holdout, --max-new-tokens or --eval-max-new-tokens, or "
                        "give more --data")
    return short


def pick_batch(harmful, others, langs, args, step):
    """The (query, lang) pairs of a step, a function of (seed, step) alone: each label goes round its shuffled pool."""
    n = round(args.batch_size * args.benign_fraction) if harmful and others else 0 if harmful else args.batch_size
    batch = []
    for name, pool, k in (("harmful", harmful, args.batch_size - n), ("others", others, n)):
        pairs = [(query, lang) for query in pool for lang in langs]
        for i in range(step * k, (step + 1) * k):
            epoch, at = divmod(i, len(pairs))
            batch.append(random.Random(f"{args.seed} {name} {epoch}").sample(pairs, len(pairs))[at])
    return batch


def write_contexts(args, teacher, tokenizer, template, batch):
    """The two prompts of every (query, lang): the student's in the target language, the teacher's in English. Ids."""
    student_prompts = [encode_chat(tokenizer, query.text[lang]) for query, lang in batch]
    teacher_prompts = [encode_chat(tokenizer, write_teacher_prompt(template, query, lang, args.source_lang))
                       for query, lang in batch]
    if args.cot_tokens and batch:
        teacher_prompts = judge_first(teacher, tokenizer, teacher_prompts, args.cot_tokens)
    return student_prompts, teacher_prompts


def preflight(args, student, teacher, tokenizer, template, queries, lang, judging):
    """Print how often student and teacher refuse --preflight training queries of each label: what will be transferred.
    The teacher's selectivity (refused harmful − refused benign) is the ceiling."""
    shuffled = random.Random(args.seed).sample(queries, len(queries))  # a file may be sorted by topic
    batch = [(q, lang) for label in LABELS[:2] for q in [q for q in shuffled if q.label == label][:args.preflight]]
    contexts = write_contexts(args, teacher, tokenizer, template, batch)
    for who, model, prompts in zip(("student", "teacher"), (student, teacher), contexts):
        verdicts = evaluation.judge_prompts(model, tokenizer, prompts, [q.text[lang] for q, _ in batch],
                                            [lang] * len(batch), **judging)
        refused = [[verdict == "refusal" for (q, _), (_, verdict) in zip(batch, verdicts) if q.label == label]
                   for label in LABELS[:2]]
        harmful, benign = (sum(x) / max(len(x), 1) for x in refused)
        told = " and ".join(f"{sum(x)}/{len(x)} {label}" for x, label in zip(refused, LABELS))
        print(f"preflight {lang}: the {who} refuses {told} queries, selectivity {harmful - benign:.2f}", flush=True)
    if benign > 0.1:
        print("warning: the teacher refuses benign queries, and the student is about to learn that as well; another "
              "--teacher-prompt may not", file=sys.stderr)


def find_heldout(args, langs):
    """[(path, lang, held-out queries)] to evaluate on: the trained languages, the source, and --eval-lang."""
    asked = [*langs, args.source_lang, *args.eval_lang.replace(",", " ").split()]
    return evaluation.read_data(argparse.Namespace(**{**vars(args), "lang": ",".join(dict.fromkeys(asked)),
                                                      "split": "holdout", "wrap": None,
                                                      "limit": args.eval_limit or None}))


def evaluate(model, tokenizer, heldout, langs, judging):
    """(rows, items) of eval.py on what find_heldout found."""
    results = [evaluation.evaluate(model, tokenizer, queries, [lang], seen=langs, data=path, **judging)
               for path, lang, queries in heldout]
    return [row for rows, _ in results for row in rows], [item for _, items in results for item in items]


# --- what a run leaves behind ---

def prepare_out(args):
    """Make --out, or refuse: never write over another run or through a link, never resume with other flags."""
    out, now = Path(args.out), vars(args)
    try:
        if links := [str(p) for p in (out, *out.glob("*")) if p.is_symlink()]:
            raise UserError(f"--out {out}: {links[0]} is a symbolic link, which is not followed")
        if args.resume:
            if not Path(out, "checkpoint.pt").is_file():
                raise UserError(f"--resume: there is no checkpoint in {out}")
            before = json.loads(Path(out, "args.json").read_text())
            if changed := [f"--{k.replace('_', '-')} {before[k]} -> {now[k]}" for k in now
                           if k in before and k not in MAY_CHANGE and before[k] != now[k]]:
                raise UserError(f"--resume with other flags than {out}/args.json: {'; '.join(changed)}")
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            if not args.overwrite:
                raise UserError(f"{out} is in use: --resume goes on with it, --overwrite replaces it")
            if not Path(out, "args.json").is_file():
                raise UserError(f"--overwrite replaces runs, and {out} is none (it holds no args.json)")
            shutil.rmtree(out)
        evaluation.write(out / "args.json", json.dumps(now, indent=1))
    except (OSError, json.JSONDecodeError) as e:
        raise UserError(f"cannot use --out {out}: {e}") from None


def list_state(args, student, teacher):
    """The weights that a run changes: the trained ones, then an EMA teacher's averages of them."""
    models = (student, teacher) if args.teacher == "ema" else (student,)
    return [q for model in models for p, q in zip(student.parameters(), model.parameters()) if p.requires_grad]


def save_checkpoint(args, step, student, teacher, optimizer):
    """All that a resumed run needs, complete or absent: written beside, flushed, renamed. Raises UserError."""
    path, state = Path(args.out, "checkpoint.pt"), list_state(args, student, teacher)
    try:
        with open(f"{path}.tmp", "wb") as f:
            torch.save({"step": step, "weights": state, "optimizer": optimizer.state_dict()}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as e:  # torch's writer makes a RuntimeError of a full disk
        raise UserError(f"cannot write {path}: {str(e)[:200]}; the checkpoint before it is whole: --resume") from None


@torch.no_grad()
def load_checkpoint(args, student, teacher, optimizer):
    """Restore what save_checkpoint wrote and drop what the logs hold beyond it; returns the number of steps done."""
    state = torch.load(Path(args.out, "checkpoint.pt"), map_location=student.device, weights_only=True)
    for p, saved in zip(list_state(args, student, teacher), state["weights"], strict=True):
        p.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    for path in (Path(args.out, "metrics.jsonl"), Path(args.out, "samples.jsonl")):
        steps = [(re.match(r'\{"step": (\d+),.*\}$', line), line) for line in path.read_text("utf-8").split("\n")]
        evaluation.write(path, "".join(f"{line}\n" for m, line in steps if m and int(m[1]) <= state["step"]))
    return state["step"]


def save_model(args, student, tokenizer):
    """Leave the model as an ordinary Hugging Face (or PEFT adapter) folder, file by file complete or absent."""
    beside = Path(args.out, "saving")
    student.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    for path in beside.iterdir():
        path.replace(Path(args.out, path.name))
    beside.rmdir()


def describe(tokenizer, step, query, lang, prompt, teacher_prompt, response, stats, teacher_top):
    """A line of samples.jsonl: one response, token by token."""
    numbers = {k: [round(x, 4) for x in stats[k].tolist()] for k in ("divergence", "w_teacher", "w_student")}
    each = lambda ids: [tokenizer.decode([t]) for t in ids]
    return {"step": step, "id": query.id, "label": query.label, "lang": lang, "prompt": tokenizer.decode(prompt),
            "teacher_prompt": tokenizer.decode(teacher_prompt), "response": tokenizer.decode(response),
            "tokens": each(response), **numbers, "teacher_top": each(teacher_top.tolist())}


def find_memory(device):
    """GB (1e9 bytes) that a device has: its own, or the machine's."""
    if hasattr(getattr(torch, device.type), "mem_get_info"):
        return getattr(torch, device.type).mem_get_info(device)[1] / 1e9
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def peak_memory(device):
    """GB (1e9 bytes) at the peak: of the GPU's allocations, or of this process on a CPU."""
    if device.type == "cpu" or not hasattr(getattr(torch, device.type), "max_memory_allocated"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    return getattr(torch, device.type).max_memory_allocated() / 1e9


def plan(args, device, student, teacher, tokenizer, template, pools, langs):
    """--plan: print the GB (1e9 bytes) that these flags need, from models without weights (meta device) and the prompts
    of the first steps, and one pair of prompts. Of a step's phases the largest counts. tests/bench.py plan checks."""
    config, b = student.config.get_text_config(), student.dtype.itemsize / 1e9  # GB a number
    L, H, V, heads = config.num_hidden_layers, config.hidden_size, config.vocab_size, config.num_attention_heads
    width = 16 * H + 6 * (getattr(config, "intermediate_size", None) or 4 * H)  # numbers a layer keeps of a token
    kv = 2 * (getattr(config, "num_key_value_heads", None) or heads) * (getattr(config, "head_dim", None) or H // heads)
    size, n, args.cot_tokens = args.micro_batch_size or args.batch_size, args.max_new_tokens + args.cot_tokens, 0
    batches = [write_contexts(args, None, tokenizer, template, pick_batch(*pools, langs, args, i)) for i in range(8)]
    packed = lambda rows: sum(len(p) + n for p in rows) - (len(rows) - 1) * count_shared(rows)  # tokens
    T = max(packed(rows[i:i + size]) for rows, _ in batches for i in range(0, len(rows), size))
    cached = max(len(rows) * (max(map(len, rows)) + n) for both in batches for rows in both)
    own, trained = {id(p) for p in student.parameters()}, [p for p in student.parameters() if p.requires_grad]
    gb, kept = lambda ps: sum(p.nbytes for p in ps) / 1e9, b * L * T * (H if args.grad_checkpoint else width)
    layers = 0.4 * L if device.type == "cpu" else 1  # recomputed at a time; glibc keeps what earlier ones freed
    phases = {"rollouts: the KV cache": b * L * kv * cached, "backward: activations": kept + b * T * width * layers,
              "loss: activations, a chunk of logits, the head's gradients":
              kept + 36e-9 * 128 * V + 2 * b * H * V * (not args.lora_rank)}
    largest = max(phases, key=phases.get)
    parts = {"weights": gb(student.parameters()), "gradients": gb(trained),
             f"{args.optimizer}'s moments": 2 * gb(trained) * (args.optimizer == "adamw"),
             "the teacher's own weights": gb(p for p in teacher.parameters() if id(p) not in own),
             f"the largest phase of a step, {largest}": phases[largest]}
    parts["Python and its libraries"] = 0.5 if device.type == "cpu" else 0
    room, total = args.fit or find_memory(device), sum(parts.values())
    print(*(f"{value:8.2f} GB  {name}" for name, value in parts.items()), sep="\n")
    print(f"{total:8.2f} GB  in all: {'fits' if total <= room else 'does not fit'} the {room:.3g} GB of "
          f"{'--fit' if args.fit else device}")
    for name, prompts in zip(("student", "teacher"), batches[0]):
        print(f"\nthe {name} reads: {tokenizer.decode(prompts[0])}")


# --- the algorithm ---

def learn(args, student, teacher, student_prompts, teacher_prompts, responses):
    """Score every response token under both contexts and backpropagate the loss of the whole step, one micro-batch at a
    time: how it is cut does not change the gradient. Returns (loss, stats (N,) each, the teacher's top tokens along the
    first and the last response)."""
    options = dict(weighting=args.weighting, student_view=args.student_view, divergence=args.divergence,
                   top_k=args.dpsw_top_k, beta=args.beta)
    n, size, loss, parts = max(1, sum(map(len, responses))), args.micro_batch_size or len(responses), 0.0, []
    tops = []
    for i in range(0, len(responses), size):
        s, t, r = (x[i:i + size] for x in (student_prompts, teacher_prompts, responses))
        with torch.no_grad():
            teacher_hidden, teacher_head = response_hidden(teacher, t, r)  # (n, H)
            tops = tops or [teacher_head(teacher_hidden[:len(r[0])]).argmax(-1)]
        student_hidden, student_head = response_hidden(student, s, r)  # (n, H)
        ids = torch.tensor([token for row in r for token in row], device=student_hidden.device)  # (n,)
        part, stats = dpsw_loss_chunked(student_hidden, teacher_hidden, student_head, teacher_head, ids,
                                        denominator=n if args.weight_norm == "none" else 1, **options)
        part.backward()
        loss, parts = loss + part.item(), parts + [stats]
    tops += [teacher_head(teacher_hidden[len(teacher_hidden) - len(r[-1]):]).argmax(-1)]
    stats = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if args.weight_norm == "mean":  # the sum of the weights is known only now
        total = stats["weight"].sum().clamp(min=1e-30).item()
        loss /= total
        for p in student.parameters():
            p.grad = p.grad / total if p.grad is not None else None
    return loss, stats, tops


def train(args, student, teacher, tokenizer, template, pools, langs, optimizer, start):
    """The algorithm box. pools: (harmful, other) queries. Yields after each step (steps done, bad ones in a row)."""
    params, bad = [p for p in student.parameters() if p.requires_grad], 0
    generator, stop_ids = torch.Generator(student.device), find_stop_ids(student, tokenizer)
    metrics, samples = (open(Path(args.out, f"{name}.jsonl"), "a", encoding="utf-8") for name in ("metrics", "samples"))
    for step in (bar := tqdm(range(start, args.steps), initial=start, total=args.steps, desc="msd", smoothing=0)):
        began = time.perf_counter()
        # 1. queries, each under two contexts: the student's in the target language, the teacher's in English
        batch = pick_batch(*pools, langs, args, step)
        student_prompts, teacher_prompts = write_contexts(args, teacher, tokenizer, template, batch)
        # 2. responses, from the student (on-policy) or from the teacher (off-policy); not differentiated through
        policy, prompts = (student, student_prompts) if args.policy == "on" else (teacher, teacher_prompts)
        responses = sample(policy, prompts, max_new_tokens=args.max_new_tokens, stop_ids=stop_ids, top_k=args.top_k,
                           temperature=args.temperature, top_p=args.top_p, vocab_size=len(tokenizer),
                           generator=generator.manual_seed(args.seed * 1_000_003 + step))
        # 3. the student learns the teacher's distribution on every response token, weighted by DPSW
        loss, stats, tops = learn(args, student, teacher, student_prompts, teacher_prompts, responses)
        # 4. clip, warm up, update; what is not finite is never stepped on
        grad_norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm).item()
        lr = args.lr * min(1, (step + 1) / (args.warmup + 1))
        n, bad = sum(map(len, responses)), 0 if math.isfinite(loss + grad_norm) else bad + 1
        if n and not bad:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            if args.teacher == "ema":
                update_ema(teacher, student, args.ema_decay)
        optimizer.zero_grad(set_to_none=True)
        # 5. tell
        seconds, mean = time.perf_counter() - began, {name: x.sum().item() / max(n, 1) for name, x in stats.items()}
        truncated = sum(r[-1:] == [] or r[-1] not in stop_ids for r in responses) / len(batch)
        row = {"step": step + 1, "loss": loss, **mean, "grad_norm": grad_norm, "lr": lr, "response_tokens": n,
               "response_len": n / len(batch), "truncated": truncated, "skipped": bool(bad), "seconds": seconds,
               "tokens_per_s": n / seconds, "peak_mem_gb": peak_memory(student.device)}
        first, last = len(responses[0]), n - len(responses[-1])
        shown = [describe(tokenizer, step + 1, *batch[i], student_prompts[i], teacher_prompts[i], responses[i],
                          {name: x[at] for name, x in stats.items()}, top)
                 for i, at, top in zip((0, -1), (slice(first), slice(last, n)), tops)]  # one harmful, one benign
        for file, line in ((metrics, row), *((samples, line) for line in shown)):
            print(json.dumps(line, ensure_ascii=False), file=file, flush=True)
        bar.set_postfix_str(f"loss {loss:.4f}, kl {mean['divergence']:.3f}, {n / len(batch):.0f} tokens a response"
                            + ", skipped: not finite" * bool(bad) + ", nothing to learn from" * (n == 0))
        yield step + 1, bad


def main(args):
    """Read the data, load the models, preflight, train, evaluate, save."""
    langs = list(dict.fromkeys(args.lang.replace(",", " ").split()))
    if not langs:
        raise UserError("--lang names no language")
    args.eval_lang = args.eval_lang if args.eval_lang is not None else "" if args.data else "sw"
    args.data, args.out = args.data or ["data/queries.csv"], args.out or f"out/{'-'.join(langs)}"
    args.eval_max_new_tokens = args.eval_max_new_tokens or max(32, args.max_new_tokens)
    template, refusals = read_teacher_prompt(args.teacher_prompt), evaluation.load_refusals()
    queries = [query for path in args.data for query in load_training(args, path, langs)]
    device, dtype = find_device(args.device, args.dtype)
    student, teacher, tokenizer = load_models(args, torch.device("meta") if args.plan else device, dtype)
    queries = drop_long(args, student, tokenizer, template, langs, queries)
    pools = [[q for q in queries if (q.label == "harmful") == harmful] for harmful in (True, False)]
    if args.plan:
        return plan(args, device, student, teacher, tokenizer, template, pools, langs)
    params = [p for p in student.parameters() if p.requires_grad]
    optimizer = make_optimizer(args, params)
    heldout = find_heldout(args, langs) if args.eval_every and args.holdout else []
    prepare_out(args)
    step = load_checkpoint(args, student, teacher, optimizer) if args.resume else 0
    print(f"msd: {args.model} on {student.device} in {student.dtype}, {sum(p.numel() for p in params):,} weights "
          f"trained on {len(pools[0])} harmful and {len(pools[1])} other queries in {', '.join(langs)}; "
          f"{args.policy}-policy, {args.teacher} teacher under '{args.teacher_prompt}'", flush=True)

    judging = dict(refusals=refusals, max_new_tokens=args.eval_max_new_tokens, batch_size=64)
    before = Path(args.out, "before.json")
    if args.eval_every and not (args.resume and before.is_file()):
        for lang in langs if args.preflight else []:
            preflight(args, student, teacher, tokenizer, template, queries, lang, judging)
        evaluation.write(before, json.dumps(evaluate(student, tokenizer, heldout, langs, judging)))

    def show_table(step):
        rows, items = evaluate(student, tokenizer, heldout, langs, judging)
        base = json.loads(before.read_text())
        tests = evaluation.compare(rows, items, *base)
        evaluation.write(Path(args.out, f"after-{step}.json"), json.dumps((rows, items)))
        print(f"\nheld-out queries before (base) and after {step} steps")
        print(evaluation.format_table(rows, tests))
        print(evaluation.format_selectivity(evaluation.measure_selectivity(rows, base[0])), end="", flush=True)

    interrupted = []  # Ctrl-C once: finish the step and save; twice: leave
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if interrupted else interrupted.append(True))
    for step, bad in train(args, student, teacher, tokenizer, template, pools, langs, optimizer, step):
        stop = interrupted or bad >= args.max_bad_steps
        if stop or args.save_every and (step % args.save_every == 0 or step == args.steps):
            save_checkpoint(args, step, student, teacher, optimizer)
        if interrupted:
            print(f"\ninterrupted after step {step}: --resume goes on", file=sys.stderr)
            sys.exit(130)
        if stop:
            save_model(args, student, tokenizer)
            raise UserError(f"{bad} steps in a row were not finite; lower --lr; the last good weights: {args.out}")
        if heldout and step % args.eval_every == 0 and step < args.steps:
            show_table(step)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    save_model(args, student, tokenizer)
    if heldout:
        show_table(step)
    print(f"the model lies in {args.out}; talk to it: python sample.py --model {args.out} --prompt '…'")


def build_parser():
    """The command line."""
    parser = Parser(prog="msd.py", description="Multilingual safety by self-distillation: python msd.py --lang jv")
    add = parser.add_argument
    # what to train on
    add("--lang", required=True, help="target languages, as jv or jv,sw")
    add("--source-lang", default="en", help="the language the teacher reads")
    add("--data", action="append", help="a file of parallel queries, repeatable (default: data/queries.csv)")
    add("--label", choices=["harmful", "benign"], help="of data without a label column")
    add("--holdout", type=number(0, 0.99), default=0.2, help="fraction kept for evaluation")
    add("--benign-fraction", type=number(0, 1), default=0.5, help="of each batch, where the data has any")
    add_model_flags(parser)
    # the method
    add("--policy", choices=["on", "off"], default="on", help="who writes the responses: the student or the teacher")
    add("--teacher", choices=["frozen", "live", "ema"], default="frozen", help="weights at the start, now, or averaged")
    add("--ema-decay", type=number(0, 1), default=0.99)
    add("--teacher-prompt", default="cot", help="a name in data/prompts, or a file with {query} {query_en} {language}")
    add("--cot-tokens", type=natural, default=0, help="tokens of judgement the teacher writes first, for itself")
    add("--weighting", choices=["dpsw", "teacher", "student", "none"], default="dpsw")
    add("--student-view", choices=["teacher", "sampled"], default="teacher", help="whose token p_S is of")
    add("--weight-norm", choices=["none", "mean"], default="none")
    add("--divergence", choices=["reverse", "forward", "jsd"], default="reverse")
    add("--beta", type=number(0, 1), default=0.5, help="of jsd")
    add("--dpsw-top-k", type=positive, default=20, help="K of the teacher's entropy")
    # optimisation
    add("--steps", type=positive, default=100)
    add("--batch-size", type=positive, default=16, help="responses a step")
    add("--micro-batch-size", type=positive, help="responses a backward pass (default: all)")
    add("--optimizer", choices=["adamw", "adafactor"], default="adamw",
        help="adafactor keeps next to no moments; its --lr is relative to a weight's size: try 30 times adamw's")
    add("--lr", type=number(0, open_low=True), default=3e-4)
    add("--warmup", type=natural, default=4, help="steps of linear warm-up")
    add("--max-grad-norm", type=number(0, open_low=True), default=1.0)
    add("--max-bad-steps", type=positive, default=5, help="give up after so many non-finite steps in a row")
    add("--grad-checkpoint", action=argparse.BooleanOptionalAction, default=True)
    add("--lora-rank", type=natural, default=0, help="0: train every weight")
    # rollouts
    add("--max-new-tokens", type=positive, default=32)
    add("--temperature", type=number(0), default=1.0)
    add("--top-k", type=natural, default=0)
    add("--top-p", type=number(0, 1, open_low=True), default=1.0)
    # the run
    add("--plan", action="store_true", help="say what the run would need, and end")
    add("--fit", type=number(0, open_low=True), help="GB of memory to plan for (default: the device's)")
    add("--out", help="default: out/<lang>")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--save-every", type=natural, default=50, help="steps between checkpoints; 0: none")
    add("--eval-every", type=natural, default=10 ** 9, help="steps between evaluations; 0: none, and no preflight")
    add("--eval-lang", help="further languages to evaluate, never trained on (default: sw, where --data is our own)")
    add("--eval-limit", type=natural, default=0, help="first N held-out queries of each data, language, label; 0: all")
    add("--eval-max-new-tokens", type=positive, help="of judged answers (default: --max-new-tokens, at least 32)")
    add("--preflight", type=natural, default=16, help="training queries of each label to try the teacher on first")
    return parser


if __name__ == "__main__":
    build_parser().run(main)
