"""The sampler, and a small command to talk to a model.

    python sample.py --model out/jv --prompt "…"        one answer;  without --prompt: a conversation of single turns

`sample` is written by hand: ragged prompts are left-padded once, the KV cache grows a token a step, and finished rows
leave the batch. The rest of this file is what every program here needs of Hugging Face: a device, a model with its
tokenizer, a rendered prompt.
"""
import argparse
import math
import os
import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

os.environ["TIKTOKEN_CACHE_DIR"] = ""  # tiktoken caches local files by path alone: a new tokenizer would be read stale
PLAIN_TEMPLATE = "User: {text}\nAssistant:"  # for models that come without a chat template


def sample_next_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one id a row: logits (B, V) float32 -> (B,) int64. temperature 0 is greedy; top_k 0 and top_p 1 cut nothing.

    Order: temperature, top-k, renormalise, top-p, where the token that crosses p stays.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs, ids = (logits / temperature).softmax(-1), None  # (B, V)
    if top_k or top_p < 1:
        probs, ids = probs.topk(min(top_k or probs.shape[-1], probs.shape[-1]), dim=-1)  # (B, k), largest first
        probs = probs / probs.sum(-1, keepdim=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)  # the mass *before* a token decides
    choice = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)


@torch.no_grad()
def sample(model, prompts, *, max_new_tokens, stop_ids, temperature=1.0, top_k=0, top_p=1.0, generator=None,
           return_logprobs=False, vocab_size=None):
    """Sample one response a prompt, all prompts in one batch.

    prompts: list of lists of token ids, ragged, none empty. stop_ids: ids that end a response (kept as its last token).
    generator: a torch.Generator on the model's device. vocab_size: ids from here on are never drawn (models whose
    logits are padded past the tokenizer). Returns responses, a list of lists of ids of at most max_new_tokens, or (responses,
    logprobs), logprobs a list of lists of floats: log-probabilities in nats of the drawn tokens under the untruncated
    distribution at `temperature` (1.0 when greedy). No gradient; the modules' training modes are left as found, dropout
    is off meanwhile. Raises ValueError for an empty prompt or parameters out of range.
    """
    if not (math.isfinite(temperature) and temperature >= 0 and 0 < top_p <= 1 and top_k >= 0 and max_new_tokens >= 1):
        raise ValueError("sampling needs a finite temperature ≥ 0, 0 < top_p ≤ 1, top_k ≥ 0, max_new_tokens ≥ 1, "
                         f"not {temperature}, {top_p}, {top_k}, {max_new_tokens}")
    if not all(prompts):
        raise ValueError("a prompt without tokens")
    responses, logprobs = [[] for _ in prompts], [[] for _ in prompts]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # also switches gradient checkpointing off, which would not decode with a cache
    try:
        if prompts:
            _decode(model, prompts, responses, logprobs, max_new_tokens, set(stop_ids), temperature, vocab_size,
                    lambda logits: sample_next_token(logits, temperature, top_k, top_p, generator))
    finally:
        for module, training in modes:
            module.training = training
    return (responses, logprobs) if return_logprobs else responses


def _decode(model, prompts, responses, logprobs, max_new_tokens, stop_ids, temperature, vocab_size, draw):
    """The decoding loop: appends to `responses` and `logprobs` in place."""
    device, rows = next(model.parameters()).device, list(range(len(prompts)))  # rows[i]: the prompt that row i answers
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=device)  # (B, T), left-padded
    column = torch.arange(T + max_new_tokens, device=device)
    seen = (column >= T - lengths[:, None]).long()  # (B, T + max_new_tokens): all but the padding
    positions = (column[:T] - (T - lengths[:, None])).clamp(min=0)  # (B, T)
    cache = None
    for step in range(max_new_tokens):
        out = model(input_ids=ids, attention_mask=seen[:, :T + step], position_ids=positions, past_key_values=cache,
                    use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1].float()  # (B, V)
        allowed = logits if vocab_size is None else logits[:, :vocab_size]
        token = draw(allowed)  # (B,)
        logp = (logits / (temperature or 1.0)).log_softmax(-1).gather(-1, token[:, None])[:, 0]
        alive = []
        for i, (row, t, lp) in enumerate(zip(rows, token.tolist(), logp.tolist())):
            responses[row].append(t)
            logprobs[row].append(lp)
            if t not in stop_ids:
                alive.append(i)
        if not alive:
            break
        if len(alive) < len(rows):  # finished rows leave the batch
            keep, rows = torch.tensor(alive, device=device), [rows[i] for i in alive]
            cache.batch_select_indices(keep)
            token, seen, lengths = token[keep], seen[keep], lengths[keep]
        ids, positions = token[:, None], (lengths + step)[:, None]  # (B, 1), (B, 1)


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
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
        try:
            main(self.parse_args(argv))
        except UserError as e:
            self.error(e)


def positive(text):
    """argparse type: an integer ≥ 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def natural(text):
    """argparse type: an integer ≥ 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must not be negative: {text}")
    return int(text)


def number(low, high=math.inf, open_low=False):
    """argparse type: a finite float in [low, high], or (low, high] with open_low."""
    def parse(text):
        x = float(text)
        if not (math.isfinite(x) and low <= x <= high and not (open_low and x == low)):
            raise argparse.ArgumentTypeError(f"must be a number {'above' if open_low else 'from'} {low}"
                                             + (f" up to {high}" if high < math.inf else "") + f", not {text}")
        return x
    parse.__name__ = "number"
    return parse


def add_model_flags(parser, model="data/tiny"):
    """The flags that every program here shares."""
    parser.add_argument("--model", default=model, help="a local folder (a PEFT adapter's too) or a Hugging Face id")
    parser.add_argument("--device", default="auto", help="auto: a GPU where there is one")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="auto: float32 on a CPU, bfloat16 where the GPU has it")
    parser.add_argument("--seed", type=int, default=0)


def find_device(name, dtype="auto"):
    """The one place where device and dtype are chosen: (torch.device, torch.dtype). Raises UserError."""
    gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(gpu if name == "auto" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"no device {name!r} on this machine; --device auto would take {gpu}") from None
    if dtype == "auto":
        bf16 = device.type == "mps" or device.type != "cpu" and torch.cuda.is_bf16_supported()
        dtype = "bfloat16" if bf16 else "float32"
    return device, getattr(torch, dtype)


def load_model(name, device, dtype):
    """(model in eval mode, tokenizer) from a local folder or a Hugging Face id; an adapter folder loads with its base.
    Reads safetensors only and runs no remote code. Raises UserError."""
    adapter = Path(name, "adapter_config.json").is_file()
    try:
        if adapter:
            peft = need("peft", "load a LoRA adapter")
            base = peft.PeftConfig.from_pretrained(name).base_model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(name)
        if device.type == "meta":  # shapes alone, for msd.py --plan
            with device:
                return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), dtype=dtype).eval(), tokenizer
        model = AutoModelForCausalLM.from_pretrained(base if adapter else name, dtype=dtype, use_safetensors=True)
        model = peft.PeftModel.from_pretrained(model, name) if adapter else model
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as e:
        hint = "" if Path(name).exists() else ": there is no such folder, and no hub model by that name could be had"
        raise UserError(f"cannot load a model from {name!r}{hint or f': {type(e).__name__}: {str(e)[:200]}'}") from None
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


def encode_chat(tokenizer, text):
    """The token ids of one user turn with the header of the answer: what a model is prompted with. The template writes
    the BOS where there is one; models without a template get PLAIN_TEMPLATE and the tokenizer's own BOS."""
    text = break_special(tokenizer, text)
    if not tokenizer.chat_template:
        return tokenizer(PLAIN_TEMPLATE.format(text=text)).input_ids
    try:
        turn = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                             add_generation_prompt=True, enable_thinking=False)
    except Exception as e:  # jinja: a template is data, and may raise anything
        raise UserError(f"the model's chat template fails: {type(e).__name__}: {str(e)[:200]}") from None
    return tokenizer(turn, add_special_tokens=False).input_ids


def find_context(model):
    """The most tokens that a model takes, prompt and response together."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def find_stop_ids(model, tokenizer):
    """The ids that end an answer: those of the generation config and the tokenizer's own."""
    eos = model.generation_config.eos_token_id
    return sorted({*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None})


def answer(model, tokenizer, texts, **sampling):
    """Responses (strings) to `texts`, each as one user turn, by `sample` with `sampling`'s keywords."""
    responses = sample(model, [encode_chat(tokenizer, t) for t in texts], stop_ids=find_stop_ids(model, tokenizer),
                       vocab_size=len(tokenizer), **sampling)
    return [tokenizer.decode(r, skip_special_tokens=True).strip() for r in responses]


def main(args):
    """Answer --prompt, or what is typed."""
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty")
    model, tokenizer = load_model(args.model, *find_device(args.device, args.dtype))
    generator = torch.Generator(model.device).manual_seed(args.seed)
    ask = lambda: input("> " if sys.stdin.isatty() else "")
    turns = [args.prompt] if args.prompt is not None else iter(ask, "")  # an empty line ends
    try:
        for text in turns:
            print(*answer(model, tokenizer, [text], max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                          top_k=args.top_k, top_p=args.top_p, generator=generator))
    except EOFError:
        pass


def build_parser():
    """The command line."""
    parser = Parser(prog="sample.py", description="Talk to a model: python sample.py --model out/jv --prompt '…'")
    add_model_flags(parser)
    parser.add_argument("--prompt", help="one query; without it: interactive, an empty line ends")
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    parser.add_argument("--temperature", type=number(0), default=0.0, help="0: greedy")
    parser.add_argument("--top-k", type=natural, default=0)
    parser.add_argument("--top-p", type=number(0, 1, open_low=True), default=1.0)
    return parser


if __name__ == "__main__":
    build_parser().run(main)
