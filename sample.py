"""The sampler, and a small command to talk to a model and to see the loss.

    python sample.py --model out/jv --prompt "…"      one answer; without --prompt: a conversation of single turns
    python sample.py --weights --model out/jv --lang jv --query "…" --query-en "…"      an answer and its DPSW weights
    python sample.py --from out/jv/samples.jsonl --html out.html      a run's responses and its training curve, a page

`sample` is written by hand: ragged prompts are read end to end where that is exact, else left-padded; the KV cache
grows a token a step, and finished rows leave the batch. Between it and the command stands what every program here
needs: flags, errors, a model, a prompt.
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import signal
import sys
import tempfile
import threading
import warnings
import weakref
from pathlib import Path

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import DynamicCache, logging as transformers_logging
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data.queries import Query, read_json
from dpsw import dpsw_loss

os.environ["TIKTOKEN_CACHE_DIR"] = ""  # tiktoken caches local files by path alone: a new tokenizer would be read stale
PLAIN_TEMPLATE = "User: {text}\nAssistant:"  # for models that come without a chat template
COLUMNS = ("token", "weight", "divergence", "w_teacher", "w_student", "teacher_top")  # what is shown of a token
COLOURS = (231, 230, 223, 216, 209, 202)  # of weights from 0 to 1, in a terminal

def sample_next_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one id a row: logits (B, V) float32 -> (B,) int64. temperature 0 is greedy; top_k 0 and top_p 1 cut nothing.
    Order: temperature, top-k, renormalise, top-p, where the token that crosses p stays."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)  # (B, V)
    if not top_k and top_p == 1:
        return torch.multinomial(probs, 1, generator=generator)[:, 0]
    probs, ids = probs.topk(min(top_k or probs.shape[-1], probs.shape[-1]), dim=-1)  # (B, k), largest first
    probs = probs / probs.sum(-1, keepdim=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)  # the mass *before* a token decides
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]

def find_head(model):
    """(decoder, head): model(x).logits = head(decoder(x).last_hidden_state), scaled and capped as the model does."""
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    config, linear = model.config.get_text_config(), model.get_output_embeddings()
    scale = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)  # scale: Cohere, Granite; cap: Gemma
    def head(hidden):  # (n, H) -> (n, V)
        logits = linear(hidden) * scale if scale != 1 else linear(hidden)
        return torch.tanh(logits / cap) * cap if cap else logits
    return model.base_model, head

def count_shared(prompts):
    """How many tokens all prompts begin with, short of any one's last, which predicts a response."""
    differ = (i for i, tokens in enumerate(zip(*(p[:-1] for p in prompts))) if len({*tokens}) > 1)
    return next(differ, min(map(len, prompts)) - 1)

def attend_rows(module, query, key, value, attention_mask, layout=None, **kwargs):
    """Causal attention over packed rows, each as if it stood alone; query, key, value: (1, heads, T, D). layout (P,
    *lengths): P tokens that all rows begin with, then each one's own. Without a layout it is transformers' own. A mask
    over all pairs of tokens took a quarter of the learning part's time."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    P, at, out = layout[0], layout[0], []
    for n in layout[1:]:
        row = [torch.cat([x[:, :, :P], x[:, :, at:at + n]], 2) for x in (query, key, value)]
        y = sdpa_attention_forward(module, *row, None, **kwargs)[0]  # (1, P + n, heads, D)
        out.append(y[:, P:] if out else y)
        at += n
    return torch.cat(out, 1), None

AttentionInterface.register("rows", attend_rows)
AttentionMaskInterface.register("rows", sdpa_mask)

def run_packed(model, prompts, responses, use_cache=False):
    """Run rows of prompt + response through the decoder end to end, with restarting positions: no padding, and what all
    prompts begin with only once. A step takes 0.7 of a padded one's time (tests/bench.py step).
    Returns (the decoder's output over T tokens, how many are shared, the index past each row's last)."""
    decoder, device, P, more = find_head(model)[0], next(model.parameters()).device, 0, {}
    rows = [p + r for p, r in zip(prompts, responses)]
    if decoder.config._attn_implementation == "rows":  # a 4-D mask is handed on as it is: none is built, none is read
        P = count_shared(prompts)
        more = dict(layout=(P, *(len(row) - P for row in rows)), attention_mask=torch.ones(1, 1, 1, 1, device=device))
    ids = rows[0][:P] + [t for row in rows for t in row[P:]]  # T
    positions = [*range(P), *(i for row in rows for i in range(P, len(row)))]  # T
    out = decoder(input_ids=torch.tensor([ids], device=device), position_ids=torch.tensor([positions], device=device),
                  use_cache=use_cache, **more)
    return out, P, [P + end for end in itertools.accumulate(len(row) - P for row in rows)]

@torch.no_grad()
def is_packing_exact(model, _known=weakref.WeakKeyDictionary()):
    """Whether packed rows and hidden states give this model's own logits: tried once, on two short rows, with
    attend_rows where every layer sees all that is before it, else with transformers' own attention and its mask.
    The model is left with the attention that was exact."""
    if model not in _known:
        (decoder, head), weight, exact = find_head(model), next(model.parameters()), False
        vocab, own = model.get_input_embeddings().num_embeddings, decoder.config._attn_implementation
        rows = [[7 * i % vocab for i in row] for row in ([1, 2, 3, 4], [1, 2, 5, 6, 7, 8])]
        plain = torch.stack([model(input_ids=torch.tensor([row], device=weight.device), use_cache=False).logits[0, -1]
                             for row in rows]).float()
        ours = own == "sdpa" and decoder._supports_attention_backend and all(
            type(layer) is DynamicLayer for layer in DynamicCache(config=decoder.config).layers)  # no sliding windows
        for name in ["rows"] * ours + [own]:
            if ours:
                decoder.set_attn_implementation(name)
            out, _, ends = run_packed(model, rows, [[], []])
            if hasattr(out, "last_hidden_state") and model.get_output_embeddings() is not None:
                packed = head(out.last_hidden_state[0, [end - 1 for end in ends]]).float()  # (2, V)
                gap = (packed - plain).pow(2).mean().sqrt() / plain.std()
                exact = bool(gap <= (1e-4 if weight.dtype == torch.float32 else 5e-2))
            if exact:
                break
        _known[model] = exact
        if not exact:
            print(f"note: {type(model).__name__}: packing is not exact; a row at a time, then", file=sys.stderr)
    return _known[model]

class RoomyLayer(DynamicLayer):
    """A layer of a KV cache with room for n tokens more: each is written in place, where transformers' own layer copies
    all keys and values at every token. With the packed prompts: 1.1 to 1.8 times the tokens a second."""

    def __init__(self, keys, values, n):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.n, self.keys, self.values = n, keys, values  # (B, heads, T, D), what is filled of self.rooms
        self.batch_select_indices(slice(None))

    def batch_select_indices(self, indices):
        T, self.rooms = self.keys.shape[2], []
        for x in (self.keys[indices], self.values[indices]):
            self.rooms.append(x.new_empty(*x.shape[:2], T + self.n, x.shape[3]))
            self.rooms[-1][:, :, :T] = x
        self.keys, self.values = (room[:, :, :T] for room in self.rooms)

    def update(self, key_states, value_states, *_, **__):
        T, self.n = self.keys.shape[2], self.n - 1
        for room, new in zip(self.rooms, (key_states, value_states)):
            room[:, :, T:T + 1] = new
        self.keys, self.values = (room[:, :, :T + 1] for room in self.rooms)
        return self.keys, self.values

def prefill(model, prompts, n):
    """(the first tokens' logits (B, V), the prompts' cache, left-padded, with room for n tokens more) from packed rows;
    (None, None) where those are not exact, or not to be had: sliding windows, a model without a decoder and a head."""
    decoder, head = find_head(model) if hasattr(model, "get_output_embeddings") else (None, None)
    if not (prompts and decoder and is_packing_exact(model) and decoder.config._attn_implementation == "rows"):
        return None, None
    out, P, ends = run_packed(model, prompts, [[]] * len(prompts), use_cache=True)
    T, x, cache = max(map(len, prompts)), out.last_hidden_state[0], out.past_key_values
    at = [[0] * (T - len(p)) + [*range(P), *range(end - len(p) + P, end)] for p, end in zip(prompts, ends)]
    at = torch.tensor(at, device=x.device)  # (B, T)
    for i, layer in enumerate(cache.layers):  # (1, heads, all tokens, D) -> (B, heads, T, D)
        keys, values = (states[0][:, at].transpose(0, 1) for states in (layer.keys, layer.values))
        cache.layers[i] = RoomyLayer(keys, values, n)
    return head(x[at[:, -1]]), cache

@torch.no_grad()
def sample(model, prompts, *, max_new_tokens, stop_ids, temperature=1.0, top_k=0, top_p=1.0, generator=None,
           return_logprobs=False, vocab_size=None):
    """Sample one response a prompt, all prompts in one batch. No gradient; every module's mode is left as found.

    prompts: lists of token ids, ragged, none empty. stop_ids: end a response, and stay as its last token. generator: a
    torch.Generator on the model's device. vocab_size: ids from here on are never drawn (some logits are padded past the
    tokenizer). Returns responses, lists of at most max_new_tokens ids, or (responses, logprobs): of the ids drawn, in
    nats, untruncated, at `temperature` (1.0 when greedy). Raises ValueError for what is empty or out of range.
    """
    if not (all(prompts) and 0 <= temperature < math.inf and top_k >= 0 and 0 < top_p <= 1 and max_new_tokens >= 1):
        raise ValueError("sampling needs a token in every prompt, a finite temperature ≥ 0, top_k ≥ 0, 0 < top_p ≤ 1, "
                         f"max_new_tokens ≥ 1, not {temperature}, {top_k}, {top_p}, {max_new_tokens}")
    device, T, rows = next(model.parameters()).device, max(map(len, prompts), default=0), list(range(len(prompts)))
    responses, logprobs = [[] for _ in prompts], [[] for _ in prompts]
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=device)  # (B, T), left-padded
    positions = torch.tensor([range(len(p) - T, len(p) + max_new_tokens) for p in prompts], device=device)
    seen, positions = (positions >= 0).long(), positions.clamp(min=0)  # (B, T + max_new_tokens): all but the padding
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # no dropout; nor gradient checkpointing, which would not decode with a cache
    try:
        logits, cache = prefill(model, prompts, max_new_tokens - 1)
        while rows and (step := len(responses[rows[0]])) < max_new_tokens:  # rows[i]: the prompt that row i answers
            if logits is None:
                out = model(input_ids=ids, attention_mask=seen[:, :T + step], use_cache=True, past_key_values=cache,
                            position_ids=positions[:, T + step - ids.shape[1]:T + step], logits_to_keep=1)
                cache, logits = out.past_key_values, out.logits[:, -1]
            logits = logits.float()  # (B, V)
            token = sample_next_token(logits[:, :vocab_size], temperature, top_k, top_p, generator)  # (B,)
            for row, t in zip(rows, token.tolist()):
                responses[row].append(t)
            if return_logprobs:
                logp = (logits / (temperature or 1.0)).log_softmax(-1).gather(-1, token[:, None])[:, 0]
                for row, lp in zip(rows, logp.tolist()):
                    logprobs[row].append(lp)
            alive = [i for i, row in enumerate(rows) if responses[row][-1] not in stop_ids]
            if 0 < len(alive) < len(rows):  # finished rows leave the batch
                keep = torch.tensor(alive, device=device)
                cache.batch_select_indices(keep)
                token, seen, positions = token[keep], seen[keep], positions[keep]
            ids, rows, logits = token[:, None], [rows[i] for i in alive], None  # (B, 1)
    finally:
        for module, training in modes:
            module.training = training
    return (responses, logprobs) if return_logprobs else responses

# --- what every program here needs ---

class UserError(ValueError):
    """Something the user can mend: the programs print it as one line and exit with code 2."""

class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, `msd.py: error: …`, exact flag names, and defaults in --help."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")

    def run(self, main, argv=None):
        """Parse the command line and call main(args); what a user can mend becomes one line and exit code 2."""
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            main(self.parse_args(argv))
        except UserError as e:
            self.error(e)
        except RuntimeError as e:
            cpu = "can't allocate memory" in str(e) or "DefaultCPUAllocator" in str(e)
            if not cpu and not isinstance(e, torch.OutOfMemoryError):
                raise
            self.error("out of memory: lower --micro-batch-size, --max-new-tokens or --batch-size, or train a "
                       "--lora-rank; msd.py --plan tells beforehand")
        except BrokenPipeError:  # as in `… | head`; nor may what is still buffered fail at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

def number(low, high=math.inf, open_low=False, kind=float):
    """argparse type: a finite number in [low, high], or in (low, high] with open_low."""
    def parse(text):
        x = kind(text)
        if not low <= x <= high or x == math.inf or open_low and x == low:
            bounds = f"{'above' if open_low else 'at least'} {low}" + f" and at most {high}" * (high < math.inf)
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return x
    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse

positive, natural = number(1, kind=int), number(0, kind=int)

def add_model_flags(parser, model="data/tiny"):
    """The flags that every program here shares."""
    add = parser.add_argument
    add("--model", default=model, help="a local folder (a PEFT adapter's too) or a Hugging Face id")
    add("--trust-remote-code", action="store_true", help="run code that comes with a model; never on by itself")
    add("--device", default="auto", help="auto: a GPU where there is one")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 where a GPU has it")
    add("--seed", type=number(0, 2 ** 31, kind=int), default=0)

def find_device(name, dtype="auto"):
    """The one place where device and dtype are chosen: (torch.device, torch.dtype). Raises UserError."""
    gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(gpu if name == "auto" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"no device {name!r} on this machine; --device auto would take {gpu}") from None
    bf16 = device.type == "mps" or device.type != "cpu" and torch.cuda.is_bf16_supported()
    return device, getattr(torch, dtype if dtype != "auto" else "bfloat16" if bf16 else "float32")

def load_model(name, device, dtype, trust_remote_code=False):
    """(model in eval mode, tokenizer) from a local folder or a Hugging Face id; an adapter folder loads with its base.
    Reads safetensors only; code that comes with a model runs only under trust_remote_code. Raises UserError."""
    adapter = Path(name, "adapter_config.json").is_file()
    loader = need("peft", "load a LoRA adapter").AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        if device.type == "meta":  # shapes alone, for msd.py --plan
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            with device:
                return loader.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval(), tokenizer
        model = loader.from_pretrained(name, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as e:
        why = ("it comes with code of its own, which only --trust-remote-code runs" if "trust_remote_code" in str(e)
               else f"{type(e).__name__}: {str(e)[:200]}" if Path(name).exists()
               else "there is no such folder, and no hub model by that name could be had")
        raise UserError(f"cannot load a model from {name!r}: {why}") from None
    return model.to(device).eval(), tokenizer

def need(package, purpose):
    """Import an optional extra, or raise UserError that says how to get it."""
    try:
        return __import__(package)
    except ImportError:
        raise UserError(f"to {purpose}, pip install {package}") from None

def break_special(tokenizer, text):
    """`text` with what spells a special token (`<|im_end|>` inside a query) broken up: a query stays data."""
    for special in {*tokenizer.all_special_tokens, *map(str, tokenizer.get_added_vocab())}:
        text = text.replace(special, f"{special[0]} {special[1:]}") if len(special) > 1 else text
    return text

@contextlib.contextmanager
def time_limit(seconds):
    """TimeoutError in what takes longer. Only where SIGALRM can tell: in the main thread, and no other timer runs."""
    def stop(*_):
        raise TimeoutError(f"not done after {seconds} s")
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer") \
            or signal.getitimer(signal.ITIMER_REAL)[0] or signal.getsignal(signal.SIGALRM) is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

def encode_chat(tokenizer, text):
    """The token ids of one user turn with the header of the answer: what a model is prompted with. The template writes
    the BOS where there is one; models without a template get PLAIN_TEMPLATE and the tokenizer's own BOS."""
    turn = {"role": "user", "content": break_special(tokenizer, text)}
    if not tokenizer.chat_template:
        return tokenizer(PLAIN_TEMPLATE.format(text=turn["content"])).input_ids
    try:
        with time_limit(10):
            chat = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True,
                                                 enable_thinking=False)
    except Exception as e:  # jinja: a template is data, and may raise anything, or loop
        raise UserError(f"the model's chat template fails: {type(e).__name__}: {str(e)[:200]}") from None
    return tokenizer(chat, add_special_tokens=False).input_ids

def find_context(model):
    """The most tokens that a model takes, prompt and response together."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30

def find_stop_ids(model, tokenizer):
    """The ids that end an answer: those of the generation config and the tokenizer's own."""
    eos = model.generation_config.eos_token_id
    return sorted({*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None})

# --- the command; a row is a line of samples.jsonl ---

def chat(model, tokenizer, prompt, sampling):
    """Answer `prompt`, or what is typed, each line as one user turn, until an empty line."""
    ask = lambda: input("> " if sys.stdin.isatty() else "")
    with contextlib.suppress(EOFError):
        for text in [prompt] if prompt else iter(ask, ""):
            [response] = sample(model, [encode_chat(tokenizer, text)], **sampling)
            print(tokenizer.decode(response, skip_special_tokens=True).strip())

@torch.no_grad()
def weigh(args, student, teacher, tokenizer, sampling):
    """The student's response to --query, scored by the teacher under --query-en, as a row. Raises UserError."""
    import msd  # here, for msd.py imports this file
    query = Query(id=None, label=None, text={args.lang: args.prompt, "English": args.query_en}, extra={})
    asked = msd.write_teacher_prompt(msd.read_teacher_prompt(args.teacher_prompt), query, args.lang, "English")
    prompts = [encode_chat(tokenizer, text) for text in (args.prompt, asked)]
    if max(map(len, prompts)) + args.max_new_tokens > find_context(student):
        raise UserError(f"prompt and response do not fit the model's {find_context(student)} tokens")
    responses = sample(student, prompts[:1], **sampling)
    logits = [msd.response_logits(m, [p], responses) for m, p in zip((student, teacher), prompts)]  # two of (N, V)
    if logits[0].shape != logits[1].shape:
        raise UserError("--teacher has another vocabulary than --model")
    _, stats = dpsw_loss(*logits)
    return msd.describe(tokenizer, None, query, args.lang, *prompts, responses[0], stats, logits[1].argmax(-1))

def list_tokens(row):
    """The tokens of a row, each as its COLUMNS. Raises ValueError, TypeError or KeyError for what is no row."""
    lists = zip(*(row[name] for name in ("tokens", *COLUMNS[2:])), strict=True)
    return [(str(token), float(t) * float(s), float(d), float(t), float(s), str(top)) for token, d, t, s, top in lists]

def read_rows(path, check=dict):
    """The objects of a .jsonl file, none of which check(row) fails on. Raises UserError."""
    try:
        rows, _ = read_json(Path(path).read_text(encoding="utf-8"), by_line=True)
        for row in rows:
            check(row)
        return rows
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise UserError(f"{path}: {getattr(e, 'strerror', None) or f'{type(e).__name__}: {e}'}") from None

def write_page(path, rows, metrics):
    """data/page.html with the data in it, written whole or not at all. Raises UserError."""
    data = json.dumps({"rows": rows, "metrics": metrics})  # ASCII, and without < > & it cannot end its script element
    data = data.translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&"})
    page = Path(__file__).parent.joinpath("data", "page.html").read_text(encoding="utf-8").replace("__DATA__", data)
    try:
        with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
            Path(folder, "page.html").write_text(page, encoding="utf-8")
            Path(folder, "page.html").replace(path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from None

def print_rows(rows):
    """Every token coloured by its weight; where colours are not wanted, a table of COLUMNS, tab-separated."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR")
    visible = lambda text: "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))  # no escape sequences
    colour = lambda weight: COLOURS[sum(weight > i / len(COLOURS) for i in range(1, len(COLOURS)))]
    paint = lambda text, weight: f"\x1b[38;5;16;48;5;{colour(weight)}m{visible(text)}\x1b[0m"
    print(*COLUMNS, sep="\t") if plain else print("weight", *(paint(f" {i / 5} ", i / 5) for i in range(6)))
    for row in rows:
        print("#", *(visible(row[key]) for key in ("step", "lang", "label", "id") if row.get(key) is not None))
        for token, weight, *numbers, top in list_tokens(row):
            cells = [visible(token), *(f"{x:.4f}" for x in (weight, *numbers)), visible(top)]
            print("\t".join(cells) if plain else paint(token, weight), end="\n" if plain else "")
        print(end="" if plain else "\n\n")

def main(args):
    """Answer --prompt, or what is typed; or show the rows that --weights or --from asks for."""
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty")
    if args.weights and not (args.prompt and args.lang and args.query_en):
        raise UserError("--weights needs --lang, --query and --query-en")
    if args.html and not args.weights and args.run is None:
        raise UserError("--html needs --weights or --from")
    if args.run is not None:
        curve = Path(args.run).parent / "metrics.jsonl"
        rows, metrics = read_rows(args.run, list_tokens), read_rows(curve) if curve.is_file() else []
    else:
        load = lambda name: load_model(name, *find_device(args.device, args.dtype), args.trust_remote_code)
        model, tokenizer = load(args.model)
        sampling = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
                        top_p=args.top_p, generator=torch.Generator(model.device).manual_seed(args.seed),
                        vocab_size=len(tokenizer), stop_ids=find_stop_ids(model, tokenizer))
        if not args.weights:
            return chat(model, tokenizer, args.prompt, sampling)
        teacher = load(args.teacher)[0] if args.teacher else model
        rows, metrics = [weigh(args, model, teacher, tokenizer, sampling)], []
    write_page(args.html, rows, metrics) if args.html else print_rows(rows)

def build_parser():
    """The command line."""
    parser = Parser(prog="sample.py", description="Talk to a model: python sample.py --model out/jv --prompt '…'")
    add_model_flags(parser)
    add = parser.add_argument
    add("--prompt", "--query", help="one query; without it: interactive, an empty line ends")
    add("--max-new-tokens", type=positive, default=128)
    add("--temperature", type=number(0), default=0.0, help="0: greedy")
    add("--top-k", type=natural, default=0)
    add("--top-p", type=number(0, 1, open_low=True), default=1.0)
    add("--weights", action="store_true", help="show how DPSW weighs the answer to --query")
    add("--lang", help="of --query, as jv")
    add("--query-en", help="the query in English, for the teacher")
    add("--teacher", help="a model (default: --model)")
    add("--teacher-prompt", default="cot", help="a name in data/prompts, or a file")
    add("--from", dest="run", metavar="FILE", help="show a run's samples.jsonl")
    add("--html", metavar="FILE", help="show it as a page")
    return parser

if __name__ == "__main__":
    from sample import build_parser, main  # as msd.py imports this file: there must be one UserError
    build_parser().run(main)
