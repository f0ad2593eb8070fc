"""What only a GPU can show, in eight minutes: python tests/gpu.py [--sections graph,speed …]

Random weights in the shapes of a 0.5B and a 7B. Every section has a try and a budget of its own and
prints JSON lines {"check", "ok", …}: ok is true, false, or null (a figure, not a judgement); with
OUT set they also go to $OUT/gpu.jsonl. `--device cpu --shapes tiny` tries the script itself: what
needs CUDA is told as skipped there, never as passed. Nothing of the card's settings is touched.
"""
import argparse
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import msd  # noqa: E402
import sample as sampler  # noqa: E402
from data.queries import load_queries  # noqa: E402
from dpsw import dpsw_loss, dpsw_loss_chunked  # noqa: E402
from sample import find_device, sample  # noqa: E402

BEGAN = time.perf_counter()
SHAPES = {  # hidden, intermediate, layers, heads, heads of keys, vocabulary, tied
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "tiny": (64, 160, 2, 4, 2, 4352, True),
}
SIZES = {  # shape of full training, of LoRA; batches; new tokens; V of the loss
    "real": ("0.5b", "7b", (1, 8, 32, 64), 64, 152_064),
    "tiny": ("tiny", "tiny", (1, 3), 6, 4352),
}


# --- telling ---

def tell(check, ok=None, **values):
    """A JSON line."""
    line = {"check": check, "ok": ok}
    for name, x in values.items():
        line[name] = float(f"{x:.4g}") if isinstance(x, float) else x
    line["at"] = round(time.perf_counter() - BEGAN, 1)
    text = json.dumps(line)
    print(text, flush=True)
    RESULTS.append(line)
    if os.environ.get("OUT"):
        with open(Path(os.environ["OUT"], "gpu.jsonl"), "a", encoding="utf-8") as f:
            f.write(text + "\n")


class Late(BaseException):
    """Past its budget: no Exception, for sample.try_ragged would take it for a model's own."""


def attempt(name, section, seconds):
    """Run a section within a budget; what it raises is a line."""
    def stop(*_):
        raise Late(f"past its {seconds:.0f} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(max(1, int(seconds)))
    try:
        section()
    except (Exception, Late) as e:  # a check that fails must not take the others with it
        tell(name, False, error=f"{type(e).__name__}: {str(e)[:300]}")
    finally:
        signal.alarm(0)
        if CUDA:
            torch.cuda.empty_cache()


def clock(f, *args, **kwargs):
    """(seconds, what f returns), the device done with before and after."""
    if CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = f(*args, **kwargs)
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


def measure(f, reps=5):
    """The median seconds of f, after one warm-up."""
    f()
    return median(clock(f)[0] for _ in range(reps))


def peak_gb():
    """GB at the peak since the last reset; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if CUDA else None


def reset_peak():
    """Begin a new peak."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()


# --- models and data ---

def build(shape, dtype=None):
    """A random model of a real shape, whose logits spread as those of a trained one."""
    H, inner, layers, heads, kv_heads, V, tied = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=H, intermediate_size=inner, num_hidden_layers=layers, vocab_size=V,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
        max_position_embeddings=32768, eos_token_id=TOKENIZER.eos_token_id)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or DTYPE).eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(3 / (0.02 * H ** 0.5))
    return model


def write_rows(B, V=4000, low=40, high=120):
    """B ragged prompts of random ids."""
    rng = random.Random(0)
    return [[rng.randrange(5, V) for _ in range(rng.randint(low, high))] for _ in range(B)]


def make_args(*flags):
    """Flags of msd.py."""
    return msd.build_parser().parse_args(["--lang", "jv", *map(str, flags)])


@contextlib.contextmanager
def without_graphs():
    """Every step of the sampler is run."""
    step = sampler.RaggedDecoder.step

    def read(self, token):
        self.token.copy_(token[:, None])
        self.read()

    sampler.RaggedDecoder.step = read
    try:
        yield
    finally:
        sampler.RaggedDecoder.step = step


def load_pair(shape, *flags):
    """(args, student, teacher) as msd.py has them, of a random model."""
    args = make_args("--device", DEVICE, *flags)
    load_model = msd.load_model
    msd.load_model = lambda *_: (build(shape), TOKENIZER)
    try:
        return args, *msd.load_models(args, DEVICE, DTYPE)[:2]
    finally:
        msd.load_model = load_model


# --- sections ---

def check_card():
    """What the card gives: bytes and bfloat16 products a second."""
    n = 2 ** 31 if CUDA else 2 ** 22
    x = torch.empty(n, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    CARD["bytes"] = 2 * n / measure(lambda: y.copy_(x))
    k = 8192 if CUDA else 256
    a = torch.randn(k, k, dtype=DTYPE, device=DEVICE)
    CARD["flops"] = 2 * k ** 3 / measure(lambda: a @ a)
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    tell("card", None, name=name, torch=torch.__version__, gb_s=CARD["bytes"] / 1e9,
         tflops=CARD["flops"] / 1e12, dtype=str(DTYPE))


def check_graph():
    """The graph's tokens are those of steps that are run; rows leave; LoRA; a capture's cost."""
    for rank in (0, 8):
        _, model, _ = load_pair(SMALL, "--lora-rank", rank)
        prompts = write_rows(6)

        def draw(stop_ids):
            generator = torch.Generator(DEVICE).manual_seed(0)
            return sample(model, prompts, max_new_tokens=NEW, stop_ids=stop_ids,
                          temperature=6.0, generator=generator)  # colder, random weights repeat

        with without_graphs():
            free = draw([])
            stops = [row[NEW // 4] for row in free[:3]]  # half of the rows: the batch shrinks
            want = draw(stops)
        same = draw([]) == free and draw(stops) == want
        lengths = sorted(map(len, want))

        decoder_token = torch.full((len(prompts),), 7, device=DEVICE)
        with torch.no_grad(), sampler.eval_mode(model):  # as sample() has it
            decoder = sampler.RaggedDecoder(model, prompts, 256)
            costs = [1e3 * clock(decoder.step, decoder_token)[0] for _ in range(4)]
        if not CUDA:
            tell(f"graph: skipped without CUDA, LoRA {rank}", None, same=same, lengths=lengths)
            continue
        is_graph = decoder.graph is not None and sampler.decodes_ragged(model, 256)
        tell(f"graph: tokens, {SMALL}, LoRA {rank}", same and is_graph, lengths=lengths)
        tell("graph: milliseconds of run, capture and replay, replay", None,
             run=costs[0], capture=costs[1], replay=costs[3])


def check_speed():
    """Tokens a second of sample() and generate, and the share of the memory's rate."""
    for shape in dict.fromkeys((SMALL, LARGE)):
        model = build(shape)
        head = model.get_input_embeddings().weight.nbytes
        weights = sum(p.nbytes for p in model.parameters())
        if not model.config.tie_word_embeddings:
            weights -= head  # rows of it are looked up
        cache = 4 * SHAPES[shape][2] * SHAPES[shape][4] * SHAPES[shape][0] // SHAPES[shape][3]
        for B in BATCHES:
            prompts = write_rows(B)
            ask = dict(max_new_tokens=NEW, stop_ids=[], temperature=0)
            sample(model, prompts, **ask)
            seconds, _ = clock(sample, model, prompts, **ask)
            T = max(map(len, prompts))
            ids = torch.tensor([[5] * (T - len(row)) + row for row in prompts], device=DEVICE)
            mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in prompts],
                                device=DEVICE)
            model.generation_config = GenerationConfig(max_new_tokens=NEW, pad_token_id=5,
                                                       eos_token_id=None)
            model.generate(input_ids=ids, attention_mask=mask)
            theirs, _ = clock(model.generate, input_ids=ids, attention_mask=mask)
            rate = B * NEW / seconds
            read = (weights + B * cache * (T + NEW)) * NEW / seconds
            tell(f"sample over generate, {shape}, batch {B}", None, tokens_s=rate,
                 ratio=theirs / seconds, share_of_memory_rate=read / CARD["bytes"])
        del model


def check_learning():
    """Learning in TFLOP/s: a token and weight, student 2 forward and 4 backward (2 under LoRA: the
    frozen weights have no gradient), teacher 2; recomputation is not counted. Then a LoRA step."""
    for shape, rank in ((SMALL, 0), (LARGE, 16)):
        reset_peak()
        args, student, teacher = load_pair(shape, "--lora-rank", rank, "--max-new-tokens", NEW)
        B = BATCHES[1]
        prompts = write_rows(B)
        context = write_rows(B, low=100, high=200)
        optimizer = msd.make_optimizer(args, student)
        sample(student, prompts, max_new_tokens=NEW, stop_ids=[])
        began, responses = clock(sample, student, prompts, max_new_tokens=NEW, stop_ids=[])
        msd.learn(args, student, teacher, prompts, context, responses)
        optimizer.zero_grad()
        seconds, (loss, _) = clock(msd.learn, args, student, teacher, prompts, context, responses)
        update = clock(optimizer.step)[0] + clock(msd.round_masters, student)[0]
        body = sum(p.numel() for name, p in student.named_parameters()
                   if "embed" not in name and "lora" not in name and "lm_head" not in name)
        mine = sum(map(len, prompts)) + B * NEW
        theirs = sum(map(len, context)) + B * NEW
        flops = body * ((4 if rank else 6) * mine + 2 * theirs)
        head = student.get_output_embeddings().weight.numel()  # it sees response tokens alone
        flops += head * B * NEW * ((4 if rank else 6) + 2)
        tell(f"learning, {shape}, LoRA {rank}, {B} rows", loss == loss, loss=loss, sampling_s=began,
             learning_s=seconds, update_s=update, tflops=flops / seconds / 1e12,
             share_of_dense=flops / seconds / CARD["flops"], peak_gb=peak_gb())
        del student, teacher, optimizer


def check_loss():
    """The chunked loss against the dense one at a large V: seconds and GB."""
    hidden = torch.randn(8, 128, 256, device=DEVICE, dtype=DTYPE, requires_grad=True)
    other = torch.randn(8, 128, 256, device=DEVICE, dtype=DTYPE)
    head = torch.nn.Linear(256, VOCAB, bias=False, device=DEVICE, dtype=DTYPE)
    found = {}
    for name in ("chunked", "dense"):
        reset_peak()

        def run():
            if name == "chunked":
                loss, _ = dpsw_loss_chunked(hidden, other, head, head, chunk_size=256)
            else:
                loss, _ = dpsw_loss(head(hidden), head(other))
            hidden.grad = None
            loss.backward()
            return loss.item()
        seconds = measure(run, 2)
        found[name] = (run(), seconds, peak_gb(), hidden.grad.flatten().float())
    close = abs(found["chunked"][0] - found["dense"][0]) <= 2e-2 * abs(found["dense"][0])
    cosine = torch.cosine_similarity(found["chunked"][3], found["dense"][3], dim=0).item()
    tell(f"loss, V {VOCAB:,}", close and cosine > 0.99, cosine=cosine,
         seconds=found["chunked"][1], dense_seconds=found["dense"][1], gb=found["chunked"][2],
         dense_gb=found["dense"][2])


def run_msd(out, *flags):
    """msd.py in this process, on data/tiny -> its weights as one vector."""
    from safetensors.torch import load_file

    args = make_args("--device", DEVICE, "--batch-size", 4, "--eval-every", 0, "--save-every", 1,
                     "--max-new-tokens", 8, "--out", out, *flags)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        msd.main(args)
    [path] = Path(out).glob("*model.safetensors")  # a model's, or an adapter's
    weights = load_file(path)
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


def check_resume():
    """Two equal runs and a resumed one, in full and under LoRA: bit for bit, or how far apart."""
    for rank in (0, 8):
        flags = ("--lora-rank", rank)
        with tempfile.TemporaryDirectory() as folder:
            first = run_msd(f"{folder}/a", "--steps", 2, *flags)
            again = run_msd(f"{folder}/b", "--steps", 2, *flags)
            run_msd(f"{folder}/c", "--steps", 1, *flags)
            resumed = run_msd(f"{folder}/c", "--steps", 2, "--resume", *flags)
        same = torch.equal(first, again) and torch.equal(first, resumed)
        tell(f"resume, LoRA {rank}", None if CUDA else same, bit_for_bit=same,
             twice=(first - again).abs().max().item(),
             resumed=(first - resumed).abs().max().item())


def check_masters():
    """A step at 1e-6 in bfloat16 goes where float32 goes: the cosine of the two updates."""
    updates = {}
    queries = load_queries(ROOT / "data" / "queries.csv", ["en", "jv"])[::65]
    batch = [(query, "jv") for query in queries]
    responses = None
    for dtype in (torch.float32, torch.bfloat16):
        args = make_args("--device", DEVICE, "--lr", 1e-6, "--warmup", 0, "--batch-size", 8)
        student, teacher, _ = msd.load_models(args, DEVICE, dtype)
        args.template = sampler.read_template("cot")
        prompts = msd.write_prompts(args, TOKENIZER, batch)
        context = msd.write_teacher_prompts(args, teacher, TOKENIZER, batch)
        responses = responses or sample(student, prompts, max_new_tokens=16, stop_ids=[])
        before = [p.detach().clone() for p in msd.list_masters(student)]
        optimizer = msd.make_optimizer(args, student)
        msd.learn(args, student, teacher, prompts, context, responses)
        optimizer.step()
        after = msd.list_masters(student)
        updates[dtype] = torch.cat([(q - p).flatten() for p, q in zip(before, after)]).detach()
    cosine = torch.cosine_similarity(*updates.values(), dim=0).item()
    tell("masters: cosine of the update with float32's", cosine >= 0.99, cosine=cosine)


def check_sdpa():
    """A decoded token's attention over a cache of grouped heads, as the sampler has it and as a
    copy for each head; and cuDNN's, which plans anew for every shape: a first and a later call."""
    attend = torch.nn.functional.scaled_dot_product_attention
    B, slots, groups, D = (16, 1024, 4, 128) if CUDA else (2, 16, 2, 8)
    heads = 7 * groups
    query = torch.randn(B, heads, 1, D, device=DEVICE, dtype=DTYPE)
    cache = torch.randn(B, groups, slots, D, device=DEVICE, dtype=DTYPE)
    mask = torch.zeros(B, 1, 1, slots, device=DEVICE, dtype=DTYPE)
    grouped, _ = sampler.attend_by_group(None, query, cache, cache, mask)
    copied = cache.repeat_interleave(7, 1)
    expected = attend(query, copied, copied, attn_mask=mask).transpose(1, 2)
    own = measure(lambda: sampler.attend_by_group(None, query, cache, cache, mask))
    theirs = measure(lambda: attend(query, cache.repeat_interleave(7, 1),
                                    cache.repeat_interleave(7, 1), attn_mask=mask))
    tell("sdpa: milliseconds of grouped heads, packed and copied",
         torch.allclose(grouped, expected, atol=2e-2), packed=1e3 * own, copied=1e3 * theirs,
         share_of_memory_rate=2 * cache.nbytes / own / CARD["bytes"])
    if not CUDA:
        tell("sdpa: cuDNN skipped without CUDA")
        return
    for allowed in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        costs = []
        for T in (97, 97, 131, 131):
            q = torch.randn(4, 8, T, 128, device=DEVICE, dtype=DTYPE)
            costs.append(1e3 * clock(attend, q, q, q, is_causal=True)[0])
        tell(f"sdpa: milliseconds, cuDNN {allowed}", None, first=costs[0], same=costs[1],
             other=costs[2], same_other=costs[3])
    torch.backends.cuda.enable_cudnn_sdp(False)


def check_plan():
    """The peak of a step's learning against `bench.py plan`, of the embedded model."""
    # run_msd's own flags
    flags = f"--device {DEVICE.type} --batch-size 4 --max-new-tokens 8 --eval-every 0"
    command = [sys.executable, str(ROOT / "tests" / "bench.py"), "plan", "--dry", "--flags", flags]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    planned = float(text.split(" GB  in all")[0].split()[-1])
    reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        run_msd(f"{folder}/a", "--steps", 2)
    tell("plan against the peak, data/tiny", None, planned_gb=planned, peak_gb=peak_gb())


SECTIONS = {  # name: (what it runs, the seconds that it may take)
    "card": (check_card, 30),
    "graph": (check_graph, 50),
    "speed": (check_speed, 120),
    "learning": (check_learning, 120),
    "loss": (check_loss, 30),
    "masters": (check_masters, 20),
    "sdpa": (check_sdpa, 20),
    "resume": (check_resume, 80),
    "plan": (check_plan, 40),
}


def main():
    """Run the sections while there is time, then sum up."""
    limit = 60 * ARGS.minutes
    skipped = []
    for name, (section, seconds) in SECTIONS.items():
        left = limit - (time.perf_counter() - BEGAN)
        if ARGS.sections and name not in ["card", *ARGS.sections.split(",")]:
            continue
        if left < 5:
            skipped.append(name)
            continue
        attempt(name, section, min(seconds, left))
    judged = [line["ok"] for line in RESULTS if line["ok"] is not None]
    passed = all(judged) if judged else None
    tell("summary", passed, judged=len(judged), passed=sum(judged), skipped=skipped)
    sys.exit(0 if all(judged) else 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", choices=SIZES, default="real")
    parser.add_argument("--sections", help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--minutes", type=float, default=8)
    ARGS = parser.parse_args()
    if unknown := {*(ARGS.sections or "card").split(",")} - {*SECTIONS}:
        parser.error(f"no section {', '.join(sorted(unknown))}")
    DEVICE, DTYPE = find_device(ARGS.device)
    CUDA = DEVICE.type == "cuda"
    SMALL, LARGE, BATCHES, NEW, VOCAB = SIZES[ARGS.shapes]
    RESULTS = []
    CARD = {}
    TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    main()
