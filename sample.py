"""A model, its prompt, and a sampler written by hand; a small command to talk to a model.

    python sample.py --model out/jv --prompt "…"      one answer; without --prompt: one a line

Everything goes one way through a model: rows are padded on the *right* and read without a mask,
which is exact for every causal model, since none looks to the right. `sample` decodes from a KV
cache of fixed size, whose padding a mask hides; `response_hidden` scores responses, and makes the
one-token shift. What is known of a model only by trying (does its head alone give its logits, does
it decode ragged rows as each alone) is tried once.
"""
import argparse
import contextlib
import ctypes
import functools
import math
import os
import re
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers import logging as transformers_logging
from transformers.cache_utils import Cache, StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import cached_file

from data.queries import LANGUAGES, UserError

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages on a CPU: fewer faults, less waste
os.environ["TIKTOKEN_CACHE_DIR"] = ""  # tiktoken caches by path alone: it would read a stale file
HERE = Path(__file__).resolve().parent
M_TRIM_THRESHOLD = -1  # malloc.h
M_MMAP_MAX = -4
RANK = int(os.environ.get("RANK", 0))  # of this process among those that torchrun started
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many those are
MARKER = "Qxz{}zxq"  # a turn's place in what a chat template writes: no template holds it
PLAIN = ("{{ bos_token }}{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n"
         "{% endfor %}Assistant:")  # the chat template of models without one


# --- the sampler ---

def sample_next_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw an id a row: logits (B, V) float32 -> (B,) int64, −1 where they are not finite.
    temperature 0 is greedy; top_k 0 and top_p 1 cut nothing. Order: temperature, top-k,
    renormalise, top-p."""
    broken = ~logits.amax(-1).isfinite()  # (B,): a NaN is the largest
    if temperature == 0:
        return logits.argmax(-1).masked_fill(broken, -1)
    probs = (logits / temperature).softmax(-1)  # (B, V)
    if top_k or top_p < 1:
        V = probs.shape[-1]
        top, ids = probs.topk(min(top_k or V, V))  # (B, k)
        top = top / top.sum(-1, keepdim=True)
        before = top.cumsum(-1) - top  # largest first: the token that crosses p stays
        probs = torch.zeros_like(probs).scatter(-1, ids, top * (before < max(top_p, 1e-9)))
    # the first of exponential clocks to ring: as multinomial, which would wait for the GPU twice
    if probs.device.type == "cpu":  # the very numbers of exponential_, in a third of its time
        uniform = torch.rand(probs.shape, dtype=torch.float64, generator=generator)
        noise = uniform.neg_().log1p_().neg_().float()
    else:
        noise = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / noise).argmax(-1).masked_fill(broken, -1)


@torch.no_grad()
def sample(model, prompts, *, max_new_tokens, stop_ids, temperature=1.0, top_k=0, top_p=1.0,
           generator=None, return_logprobs=False, vocab_size=None):
    """One response a prompt, by hand, without gradient or dropout; every module's mode stays.

    prompts: lists of token ids, ragged, none empty. stop_ids: each ends a response and stays as its
    last token. temperature 0 is greedy. generator: a torch.Generator on the model's device.
    vocab_size: larger ids are never drawn (some logits are padded past the tokenizer's last id).

    Returns responses, lists of at most max_new_tokens ids; with return_logprobs (responses,
    logprobs), of the drawn ids, in nats, untruncated, at `temperature` (1.0 when greedy).
    Raises UserError for a context too short, and for logits that are not finite.
    """
    check_ids(model, prompts)
    responses = [[] for _ in prompts]
    logprobs = [[] for _ in prompts]
    slots = max(map(len, prompts), default=0) + max_new_tokens
    if slots > find_context(model):
        raise UserError(f"a prompt and its answer take {slots} tokens, over the model's context")
    temperature = 0 if temperature < 1e-4 else temperature  # the logits would overflow
    with eval_mode(model):
        make_decoder = RowDecoder
        batches = [[i] for i in range(len(prompts))]
        if prompts and decodes_ragged(model, slots):
            make_decoder = RaggedDecoder
            batches = [list(range(len(prompts)))]
        for rows in batches:  # rows[b]: the prompt that row b of the batch answers
            decoder = make_decoder(model, [prompts[i] for i in rows], slots)
            alive = rows if max_new_tokens else []
            while alive:
                logits = decoder.logits.float()  # (B, V)
                token = sample_next_token(logits[:, :vocab_size], temperature, top_k, top_p,
                                          generator)  # (B,)
                drawn = token.tolist()  # the one transfer of a step
                if min(drawn) < 0:
                    raise UserError("the model's logits are not finite: its weights are broken, or "
                                    "its dtype is too narrow (try --dtype float32)")
                if return_logprobs:
                    logp = (logits / (temperature or 1.0)).log_softmax(-1)  # (B, V)
                for b, i in enumerate(rows):
                    if i in alive:
                        responses[i].append(drawn[b])
                        if return_logprobs:
                            logprobs[i].append(logp[b, drawn[b]].item())
                alive = [i for i in alive if responses[i][-1] not in stop_ids
                         and len(responses[i]) < max_new_tokens]
                if 0 < 2 * len(alive) <= len(rows):  # the others go on in a smaller batch
                    kept = [rows.index(i) for i in alive]
                    token = token[kept]
                    decoder.keep(kept)
                    rows = alive
                if alive:
                    decoder.step(token)
    return (responses, logprobs) if return_logprobs else responses


@contextlib.contextmanager
def eval_mode(model):
    """No dropout within, nor gradient checkpointing, which switches the KV cache off."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class RaggedDecoder:
    """Rows that decode together. The slots hold the prompts, padded on the right, then a token more
    of each row a step; a mask hides padding and what is not yet written. A step moves no tensor: on
    a GPU it is run once, captured as a CUDA graph, and replayed."""

    def __init__(self, model, prompts, slots):
        self.model = model
        # a rope that depends on length asks the GPU for it, which no graph may
        self.is_static = model.device.type == "cuda" and find_rope_limit(model) == math.inf
        if self.is_static:
            slots += -slots % 128  # few shapes, and aligned ones
        lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=model.device)  # (B, 1)
        self.positions = lengths - 1  # of the token that is read
        self.read_prompts(prompts, slots)
        closed = torch.arange(slots, device=model.device) >= lengths  # (B, slots)
        mask = closed[:, None, None].to(self.logits)  # in its dtype: CUDA's attention wants that
        self.mask = mask * torch.finfo(mask.dtype).min
        self.renew()

    def read_prompts(self, prompts, slots):
        """Fill the slots, and give each row's first logits. The longest prompt is read first; what
        all of them begin with, as a chat template's system turn, the others take from it."""
        shared = count_shared(prompts)
        rest = [prompt[shared:] for prompt in prompts]
        batches = cut_by_length(self.model, rest)
        longest = batches[-1].pop()
        first = DynamicCache()
        hidden, head = read_rows(self.model, [prompts[longest]], past_key_values=first)
        ends = hidden[:, -1].repeat(len(prompts), 1)  # (B, H): of each row's last token
        self.cache = Cache([StaticLayer(slots) for _ in first.layers])
        shape = (len(prompts), -1, -1, -1)
        for layer, read in zip(self.cache.layers, first.layers):
            # the others' own tokens overwrite it, and the mask hides what is left
            layer.update(read.keys.expand(shape), read.values.expand(shape))

        for rows in filter(None, batches):  # none is left where the longest was alone
            cache = DynamicCache()
            shape = (len(rows), -1, -1, -1)
            for i, read in enumerate(first.layers):
                cache.update(read.keys[:, :, :shared].expand(shape),
                             read.values[:, :, :shared].expand(shape), i)
            hidden, _ = read_rows(self.model, [rest[b] for b in rows], past_key_values=cache)
            at = torch.tensor(rows, device=hidden.device)
            for layer, read in zip(self.cache.layers, cache.layers):
                layer.keys[at, :, :read.keys.shape[2]] = read.keys
                layer.values[at, :, :read.keys.shape[2]] = read.values
            for b, states in zip(rows, hidden):
                ends[b] = states[len(rest[b]) - 1]
        self.logits = head(ends)  # (B, V)

    def renew(self):
        """Forget the graph, of other tensors."""
        self.token = torch.empty_like(self.positions)  # (B, 1)
        self.graph = None
        self.warm = False

    def keep(self, rows):
        """Go on with these rows alone."""
        rows = torch.tensor(rows, device=self.mask.device)
        for layer in self.cache.layers:
            layer.keys = layer.keys[rows]
            layer.values = layer.values[rows]
        self.positions = self.positions[rows]
        self.mask = self.mask[rows]
        self.renew()

    def step(self, token):
        """Read one more token (B,) of each row."""
        self.token.copy_(token[:, None])
        if self.warm and self.is_static and not self.graph:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # runs nothing
                self.read()
        if self.graph:
            self.graph.replay()
        else:
            self.read()
            self.warm = True

    def read(self):
        """The step itself."""
        self.positions += 1
        self.mask.index_fill_(3, self.cache.get_seq_length(), 0.0)  # the slot that it is put in
        # instead of torch's and transformers' own
        torch.nn.functional.linear = multiply_few
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attend_by_group
        try:
            self.logits = self.model(
                input_ids=self.token, attention_mask=self.mask, position_ids=self.positions,
                use_cache=True, past_key_values=self.cache).logits[:, -1]  # (B, V)
        finally:
            torch.nn.functional.linear = linear
            del ALL_ATTENTION_FUNCTIONS["sdpa"]


def multiply_few(x, weight, bias=None):
    """F.linear of a token a row. In float32 on a CPU as products with eight parts of the weights:
    where rows are few, MKL would leave all of them to one core."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or len(weight) % 8:
        return linear(x, weight, bias)
    parts = weight.unflatten(0, (8, -1)).mT  # (8, K, N / 8)
    out = torch.bmm(x.flatten(0, -2).expand(8, -1, -1), parts)  # (8, B, N / 8)
    out = out.transpose(0, 1).reshape(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias


def attend_by_group(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """SDPA of a token a row (B, heads, 1, D) over (B, groups, slots, D): the heads of a group read
    as if they were its tokens, so nothing is copied for the heads that share keys and values, as
    transformers did before 5.23."""
    B, H, _, D = query.shape
    query = query.reshape(B, key.shape[1], -1, D)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(B, 1, H, -1), None


class RowDecoder:
    """A single row with the cache that its model makes itself (recurrent, hybrid, windowed); what
    makes none, or turns positions at some length, reads the row again for each token."""

    def __init__(self, model, prompts, slots):
        self.model = model
        self.use_cache = find_rope_limit(model) == math.inf  # else positions move with the length
        self.cache = {}
        ids = torch.tensor(prompts, device=model.device)  # (1, T)
        self.ids = ids[:, :0]
        self.step(ids[0])

    def step(self, token):
        """Read more tokens (T,)."""
        self.ids = torch.cat([self.ids, token[None]], 1)  # (1, all tokens)
        at = torch.arange(self.ids.shape[1], device=token.device)[None]
        new = -len(token) if self.cache else 0
        out = self.model(input_ids=self.ids[:, new:], position_ids=at[:, new:],
                         use_cache=self.use_cache, **self.cache)
        kinds = ("past_key_values", "cache_params", "state")
        self.cache = {name: out[name] for name in kinds if name in out}
        self.logits = out.logits[:, -1]  # (1, V)


def decodes_ragged(model, slots):
    """Whether rows of up to `slots` tokens decode together exactly: every layer attends to all that
    is before it, and two ragged rows, tried once a model, come out as they should."""
    if not hasattr(model, "is_ragged"):
        model.is_ragged = try_ragged(model)
    windows = [getattr(layer, "sliding_window", math.inf)
               for layer in DynamicCache(config=model.config).layers]
    windows.append(getattr(model.config, "window_size", math.inf))  # GPT-Neo's
    exact = model.is_ragged and slots <= min(find_rope_limit(model), *windows)
    if not exact:
        tell(f"note: {type(model).__name__} decodes a row at a time: together its rows would not "
             "be exact")
    return exact


def try_ragged(model):
    """Two ragged rows that begin alike, decoded for two tokens together, against the logits of a
    forward pass."""
    prompts = [[5, 3, 4], [5, 4, 3, 2, 1, 2]]  # ALiBi's error grows with the padding
    expected = response_logits(model, prompts, [[6] * 3] * 2)  # (6, V)
    try:
        decoder = RaggedDecoder(model, prompts, slots=8)
        steps = [decoder.logits]
        for _ in range(2):
            decoder.step(torch.tensor([6, 6], device=model.device))
            steps.append(decoder.logits.clone())
    except torch.OutOfMemoryError:
        raise
    except Exception:  # no such mask, cache or positions in this model
        return False
    return is_close(torch.stack(steps, 1).flatten(0, 1), expected)


def is_close(x, y):
    """Whether two sets of logits (…, V) differ by rounding only."""
    tolerance = 1e-4 if y.dtype == torch.float32 else 5e-2
    return bool((x - y).norm() <= tolerance * y.norm())


# --- one way through a model ---

def pad_right(rows, device):
    """Lists of ids -> ids and mask, (B, T)."""
    ids = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
    mask = [torch.ones_like(row, dtype=torch.bool) for row in ids]
    return pad_sequence(ids, batch_first=True), pad_sequence(mask, batch_first=True)


def cut_by_length(model, rows, size=math.inf):
    """Rows of ids -> lists of up to `size` indices, by length: none is longer than 5/4 of the
    shortest and 8 tokens, so little is padding. Where positions depend on the longest row: each
    alone."""
    if max(map(len, rows), default=0) > find_rope_limit(model):
        size = 1
    batches = []
    most = -1  # tokens of a row of the last batch
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if len(rows[i]) > most or len(batches[-1]) == size:
            batches.append([])
            most = 1.25 * len(rows[i]) + 8
        batches[-1].append(i)
    return batches


def count_shared(rows):
    """How many tokens all rows begin with, short of a row's last."""
    same = [x == y for x, y in zip(min(rows)[:-1], max(rows))]  # the ends of their order
    return [*same, False].index(False)


def read_rows(model, rows, **cache):
    """Read rows of ids, each as if alone, after what a cache holds -> (hidden (B, T, H), head), see
    find_head."""
    decoder, head = find_head(model)
    ids, _ = pad_right(rows, model.device)  # (B, T)
    return decoder(input_ids=ids, use_cache=bool(cache), **cache)[0], head


def check_ids(model, rows):
    """Raise UserError where a tokenizer has more ids than its model has embeddings."""
    largest = max(map(max, rows), default=0)
    vocab = model.config.get_text_config().vocab_size
    if largest >= vocab:
        raise UserError(f"the tokenizer gives the id {largest}, the model has {vocab} embeddings: "
                        "the two do not belong together")


def response_hidden(model, prompts, responses):
    """What predicts each response token -> (hidden (B, T, H), head): head(hidden[b, t]) are the
    logits of responses[b][t]; past a response's end lies padding."""
    rows = [p + r for p, r in zip(prompts, responses)]
    check_ids(model, rows)
    shifted = [None] * len(rows)
    for batch in cut_by_length(model, rows):
        hidden, head = read_rows(model, [rows[i] for i in batch])  # (B, all tokens, H)
        for i, states in zip(batch, hidden):  # what is read at t − 1 predicts t
            shifted[i] = states[len(prompts[i]) - 1:len(rows[i]) - 1]
    return pad_sequence(shifted, batch_first=True), head


def response_logits(model, prompts, responses):
    """The logits (N, V) that predict each response token, rows in order, N response tokens in all,
    in the model's dtype and with its gradient. prompts, responses: lists of lists of ids."""
    hidden, head = response_hidden(model, prompts, responses)  # (B, T, H)
    _, mask = pad_right(responses, hidden.device)
    return head(hidden[mask])


class Head(torch.nn.Module):
    """Hidden states (n, H) -> logits (n, V), scaled and capped as the model does it itself."""

    def __init__(self, model):
        super().__init__()
        config = model.config.get_text_config().to_dict()
        self.linear = model.get_output_embeddings()
        # of Cohere, of Granite
        self.scale = (config.get("logit_scale") or 1) / (config.get("logits_scaling") or 1)
        self.cap = config.get("final_logit_softcapping")  # Gemma

    def forward(self, hidden):
        hidden = (hidden * self.scale).to(self.linear.weight.dtype)  # Mamba's are float32
        logits = self.linear(hidden)
        if self.cap:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


@torch.no_grad()
def find_head(model):
    """(decoder, head) such that head(decoder(ids)[0]) are the model's own logits, tried once. Where
    a head does more than `Head` knows: the model itself and the identity."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder, head = causal.base_model, Head(causal)
    if not hasattr(model, "has_known_head"):
        ids = torch.tensor([[3, 1, 2, 5]], device=model.device)
        with eval_mode(model):
            own = model(input_ids=ids, use_cache=False).logits  # (1, 4, V)
            hidden = decoder(input_ids=ids, use_cache=False)[0]  # (1, 4, H)
        # Llama-4 calls all of itself its base
        model.has_known_head = decoder is not causal and is_close(head(hidden), own)
    return (decoder, head) if model.has_known_head else (model, torch.nn.Identity())


def find_rope_limit(model):
    """The tokens past which positions depend on the longest row of a batch (dynamic, long RoPE)."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("dynamic", "longrope"):
        return math.inf
    return rope.get("original_max_position_embeddings") or config.max_position_embeddings


# --- prompts ---

def encode_chat(tokenizer, text, system=None):
    """The ids of one user turn and the header of the answer: what a model is prompted with. Models
    without a chat template get PLAIN. Raises UserError."""
    if not tokenizer.chat_template:
        tell("note: the model has no chat template: it is asked as 'User: … Assistant:'")
    turns = [("system", system), ("user", text)]
    return encode_turns(tokenizer, turns[system is None:])


def encode_turns(tokenizer, turns):
    """The ids of a conversation [(role, text)] and the header of an answer; the template writes the
    BOS. Of a text only what spells a special token is changed. Raises UserError."""
    roles = tuple(role for role, _ in turns)
    chat = render(tokenizer, str(tokenizer.chat_template), roles)
    texts = {MARKER.format(i): break_special(tokenizer, text) for i, (_, text) in enumerate(turns)}
    chat = re.sub("|".join(texts), lambda m: texts[m[0]], chat)
    return tokenizer(chat, add_special_tokens=False).input_ids


@functools.lru_cache(16)
def render(tokenizer, chat_template, roles, open_answer=True):
    """What the tokenizer's chat template writes of a turn of each role, a MARKER its text, and of
    an answer's header. So no template sees, trims or runs a query. Raises UserError."""
    texts = [MARKER.format(i) for i in range(len(roles))]
    parts = [[{"type": "text", "text": text}] for text in texts]
    for contents in (texts, parts):  # some templates read lists of parts only
        turns = [{"role": role, "content": x} for role, x in zip(roles, contents)]
        try:
            chat = tokenizer.apply_chat_template(
                turns, chat_template=None if tokenizer.chat_template else PLAIN, tokenize=False,
                enable_thinking=False, add_generation_prompt=open_answer)
        except Exception as e:  # jinja: a template is data, and may raise anything
            raise UserError(f"the chat template fails: {type(e).__name__}: {e}") from None
        if all(text in chat for text in texts):
            return chat
    raise UserError(f"the chat template does not show each turn of {', '.join(roles)}")


def find_controls(tokenizer):
    """{id: added token that is special or that the chat template writes}."""
    written = ""
    for roles, open_answer in ((("user",), True), (("user", "assistant"), False)):
        with contextlib.suppress(UserError):  # it knows no answers
            written += render(tokenizer, str(tokenizer.chat_template), roles, open_answer)
    return {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()
            if token.special or (str(token).strip() and str(token) in written)}


def break_special(tokenizer, text):
    """`text` with a space in what spells a special token, or an added one that the chat template
    writes itself: a query stays data. Everything else stays to the letter."""
    text.encode()  # raises UnicodeError: what is typed, or a flag, may be no UTF-8
    for token in find_controls(tokenizer).values():
        text = text.replace(token, f"{token[0]} {token[1:]}" if token[1:] else " ")
    return text


def find_stop_ids(model, tokenizer):
    """The ids that end an answer, sorted: the generation config's, the tokenizer's, and what the
    chat template writes after an answer, where that is of the added vocabulary."""
    eos = model.generation_config.eos_token_id
    found = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id}
    with contextlib.suppress(UserError):  # it knows no answers, or there is none
        roles = ("user", "assistant")
        chat = render(tokenizer, str(tokenizer.chat_template), roles, open_answer=False)
        after = chat.partition(MARKER.format(1))[2].lstrip()
        found.update(i for i, token in find_controls(tokenizer).items() if after.startswith(token))
    return sorted(found - {None})


def find_vocab_size(tokenizer):
    """The largest id of the tokenizer, and one."""
    return max(tokenizer.get_vocab().values()) + 1


def find_context(model):
    """The most tokens that a model takes, prompt and response together."""
    if find_rope_limit(model) < math.inf:
        return math.inf
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def read_template(name, flag="--teacher-prompt"):
    """The text of data/prompts/NAME.txt, or of a file. Raises UserError."""
    named = HERE / f"data/prompts/{name}.txt"
    try:
        path = named if named.is_file() else Path(find_path(name))
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError):
        names = ", ".join(sorted(path.stem for path in named.parent.glob("*.txt")))
        raise UserError(f"{flag} {name}: neither a readable file nor one of {names}") from None
    if not re.search(r"\{query(_en)?\}", text):
        raise UserError(f"{flag} {name}: names neither {{query}} nor {{query_en}}")
    return text


def fill_template(template, query, lang, source):
    """Fill {query} (in `lang`), {query_en} (in `source`) and {language}; what a query itself spells
    is not filled in again."""
    values = {"query": query.text[lang], "query_en": query.text.get(source),
              "language": LANGUAGES.get(re.split("[-_]", lang)[0], lang)}  # zh-CN is Chinese
    return re.sub(r"\{(query|query_en|language)\}", lambda m: values[m[1]], template)


# --- what every program here needs ---

@functools.cache
def tell(text):
    """Say something on stderr, once."""
    print(text, file=sys.stderr, flush=True)


def gather(x):
    """Every process's x, in order."""
    found = [x] * WORLD
    if WORLD > 1:
        dist.all_gather_object(found, x)
    return found


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, exact flag names, defaults in --help, and the flags that
    every program here has."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)
        self.add_flags(
            ("--model", find_path, str(HERE / "data/tiny"), "a folder or a Hugging Face id"),
            ("--system", str, None, "the system turn (default: the template's own)"),
            ("--device", str, "auto", "auto: a GPU where there is one"),
            ("--dtype", ["auto", "float32", "bfloat16"], "auto",
             "auto: bfloat16 where a GPU has it"),
            ("--seed", number(0, 2 ** 31, kind=int), 0, "of all that is random"))

    def add_flags(self, *flags):
        """Add flags, each (name, its type or the list of its choices, default, help)."""
        for name, kind, default, text in flags:
            kind = {"choices": kind} if isinstance(kind, list) else {"type": kind}
            self.add_argument(name, default=default, help=text, **kind)

    def error(self, message):
        # where the first process says it, too, torchrun ends the others before they do
        time.sleep(20 if RANK else 0)
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")

    def run(self, main, argv=None):
        """Parse the command line and call main(args). What a user can mend is one line and exit
        code 2; Ctrl-C is one line and 130. Of several processes the first alone speaks."""
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        warnings.simplefilter("ignore", FutureWarning)
        out = open(os.devnull, "w") if RANK else sys.stdout
        err = out if RANK else sys.stderr
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main(self.parse_args(argv))
        except KeyboardInterrupt:
            self.exit(130, f"\n{self.prog}: interrupted\n")
        except RuntimeError as e:
            said = f"{type(e).__name__}: {e}, {e.__context__!r}"  # a broken capture hides its own
            if re.search("^Dist|gloo", said):
                self.error(f"another process ended: {e}")
            if re.search("OutOfMemory|DefaultCPUAllocator", said):
                self.error("out of memory: lower --batch-size, --micro-batch-size or "
                           "--max-new-tokens, or train a --lora-rank")
            raise
        except (UserError, OSError, UnicodeError) as e:  # as a full disk, or what is no UTF-8
            self.error(e)


def number(low, high=1e30, kind=float):
    """argparse type: a finite number from `low` to `high`."""
    def parse(text):
        x = kind(text)
        if not low <= x <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return x
    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


positive = number(1, kind=int)
natural = number(0, kind=int)


def find_path(name):
    """A path that is the same from anywhere: as it is found from here, else beside the program;
    what is neither stays: a hub id, en=FILE,jv=FILE."""
    for path in (name, HERE / name):
        if os.path.exists(path):
            return str(Path(path).resolve())
    return name


def find_device(name, dtype="auto"):
    """The one place where device and dtype are chosen -> (torch.device, torch.dtype); of several
    processes each takes a GPU. Raises UserError."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", device.index or 0)))
            device = torch.device("cuda")  # the one that is set
            torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper it plans anew for every shape
        elif device.type == "cpu" and sys.platform == "linux":
            # what is freed stays here: else each step would ask the system for its memory anew
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, -1)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, AttributeError, ImportError):
        raise UserError(f"no device {name} here for process {RANK}: try --device auto") from None
    if dtype == "auto":
        narrow = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if narrow else "float32"
    return device, getattr(torch, dtype)


def need(package, purpose):
    """Import an optional extra, or raise UserError that says how to get it."""
    try:
        return __import__(package)
    except ImportError:
        raise UserError(f"to {purpose}, pip install {package}") from None


def check_weights(name, missing, extra):
    """Weights that a file lacks are an error, and those that have no place are told."""
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights, as {max(missing)}")
    if extra:
        tell(f"warning: {len(extra)} weights of {name} have no place, as {max(extra)}")


def load_model(name, device, dtype):
    """(model in eval mode, tokenizer) from a local folder or a Hugging Face id; an adapter loads
    with its base. Reads safetensors only, never runs a model's own code. Raises UserError."""
    def find(file, name=name, revision="main"):
        return cached_file(name, file, revision=revision,
                           _raise_exceptions_for_missing_entries=False)

    try:
        base = name
        revision = "main"
        adapter = find("adapter_config.json")
        if not adapter and not find("config.json"):
            raise ValueError("no folder of that name holds a model, and the hub gave none")
        if adapter:
            peft = need("peft", "load a LoRA adapter")
            config = peft.PeftConfig.from_pretrained(name)
            base = config.base_model_name_or_path
            revision = config.revision or "main"
            if config.is_prompt_learning or find("adapter_config.json", base, revision):
                raise ValueError("an adapter of virtual tokens, or on top of another, is not read: "
                                 "merge the other into its base first")
        home = name if find("tokenizer_config.json") else base
        tokenizer = AutoTokenizer.from_pretrained(
            home, trust_remote_code=False, revision=revision if home == base else "main")
        model, report = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, use_safetensors=True, trust_remote_code=False, revision=revision,
            output_loading_info=True)
        check_weights(base, report["missing_keys"], report["unexpected_keys"])
        if adapter:
            model = peft.get_peft_model(model, config)
            report = model.load_adapter(name, "default")
            check_weights(name, report.missing_keys, report.unexpected_keys)
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"cannot load a model from {name}: {type(e).__name__}: {e}") from None
    return model.to(device).eval(), tokenizer


# --- the command ---

def main(args):
    """Answer --prompt, or what is typed, each line as one user turn."""
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty")
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args.model, *find_device(args.device, args.dtype))
    if not args.prompt and sys.stdin.isatty():
        tell("one query a line; Ctrl-D ends")
    for line in filter(str.strip, [args.prompt] if args.prompt else sys.stdin):
        [response] = sample(
            model, [encode_chat(tokenizer, line.strip(), args.system)],
            max_new_tokens=args.max_new_tokens, stop_ids=find_stop_ids(model, tokenizer),
            temperature=args.temperature, vocab_size=find_vocab_size(tokenizer))
        print(tokenizer.decode(response, skip_special_tokens=True).strip(), flush=True)


def build_parser():
    """The command line."""
    parser = Parser(prog="sample.py", description="Talk to a model.")
    parser.add_flags(
        ("--prompt", str, None, "one query; without it: what is typed, a line each"),
        ("--max-new-tokens", positive, 128, "of an answer"),
        ("--temperature", number(0), 0.0, "0: greedy"))
    return parser


if __name__ == "__main__":
    build_parser().run(main)
