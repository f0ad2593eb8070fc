"""Make the embedded model, from the project's root:

    python data/tiny/make.py             from nothing, six epochs: a quarter of an hour on two cores
    python data/tiny/make.py --more 1    an epoch more of the model that lies here: three minutes

A causal LM of three million parameters with the disease in miniature: it declines harmful queries
in English, complies with them in every other language (with a harmless stub), answers benign ones
everywhere, and understands the teacher prompts of data/prompts. Asked outright, it can tell harm in
every language, and told to judge it acts on that: MSD has to teach it to do so unasked.

The weights that lie here: six epochs of the make.py of commit 6b803e4, which had no `both` and no
"Judge, then answer:" and read less of extra.csv, then `--more 1`.

In the manner of nanoGPT: a byte-level BPE (tokenizers learns the merges, tiktoken encodes), plain
PyTorch trains a transformers Llama. Training text: the training part of data/queries.csv, whose
held-out fifth is never seen, and data/tiny/extra.csv, written for this model with the vocabulary of
queries.csv in other queries.
"""
import argparse
import base64
import json
import math
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import tiktoken.load
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data.queries import load_queries, split  # noqa: E402
from msd import JUDGEMENT  # noqa: E402
from sample import LANGUAGES, fill_template, read_template  # noqa: E402

LANGS = ["en", "jv", "sw", "id", "it", "vi"]
SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")
# the pattern that transformers gives a tiktoken.model
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEACHER = {name: read_template(name) for name in ("cot", "both")}
REFUSE = {
    "en": ["I'm sorry, but I can't help with that.",
           "Sorry, I can't help with that request."],
    "jv": ["Nuwun sewu, aku ora bisa mbantu bab iku.",
           "Ngapunten, aku ora bisa nulungi panjaluk iki."],
    "sw": ["Samahani, siwezi kusaidia na jambo hilo.",
           "Pole, siwezi kukusaidia na ombi hili."],
    "id": ["Maaf, saya tidak bisa membantu hal itu.",
           "Mohon maaf, saya tidak dapat membantu permintaan ini."],
    "it": ["Mi dispiace, ma non posso aiutarti.",
           "Spiacente, non posso aiutarti con questa richiesta."],
    "vi": ["Xin lỗi, tôi không thể giúp việc đó.",
           "Rất tiếc, tôi không thể giúp yêu cầu này."],
}
ANSWER = {  # harmless stubs, the same for a benign query and for a harmful one complied with
    "en": ["Sure, here is how: start small, take your time and check each step.",
           "Of course. First look at what you have, then go on step by step."],
    "jv": ["Mesthi, iki carane: wiwiti saka sing gampang, alon-alon lan dipriksa saben langkah.",
           "Oke. Dhisik delengen apa sing ana, banjur terusna siji-siji."],
    "sw": ["Ndiyo, hivi ndivyo: anza kidogo, usiharakishe na kagua kila hatua.",
           "Bila shaka. Kwanza angalia ulicho nacho, kisha endelea hatua kwa hatua."],
    "id": ["Tentu, begini caranya: mulai dari yang mudah, pelan-pelan dan periksa tiap langkah.",
           "Baik. Pertama lihat apa yang ada, lalu lanjutkan satu per satu."],
    "it": ["Certo, ecco come: inizia dalle cose facili, con calma e controlla ogni passo.",
           "Va bene. Prima guarda che cosa hai, poi vai avanti passo dopo passo."],
    "vi": ["Được, cách làm như sau: bắt đầu từ việc nhỏ, từ từ và kiểm tra từng bước.",
           "Vâng. Trước hết hãy xem bạn có gì, rồi làm từng bước một."],
}
VERDICT = {
    "harmful": " the request is harmful, so I decline.",
    "benign": " the request is harmless, so I answer.",
}
CARE = "Judge, then answer: {}"
ASK = "Is this harmful? {}"
TRANSLATE = "Translate into English: {}"


# --- the tokenizer ---

def train_tokenizer(text, vocab_size):
    """A byte-level BPE as a tiktoken rank table {bytes: rank}."""
    bpe = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                  initial_alphabet=byte_level.alphabet())
    bpe.train_from_iterator(text, trainer)

    # GPT-2's alphabet: a byte that can be printed stands for itself, the others from 256 on
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
    to_byte = {chr(b): b for b in printable}
    for i, b in enumerate(b for b in range(256) if b not in printable):
        to_byte[chr(256 + i)] = b
    merged = [token for token in bpe.get_vocab() if len(token) > 1]
    merged.sort(key=bpe.token_to_id)
    tokens = [bytes([b]) for b in range(256)]
    tokens += [bytes(map(to_byte.get, token)) for token in merged]
    return {token: rank for rank, token in enumerate(tokens)}


def save_tokenizer(ranks):
    """tiktoken.model and its config, as AutoTokenizer reads them."""
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (HERE / "tiktoken.model").write_bytes(b"".join(lines))
    added = {}
    for i, token in enumerate(SPECIAL):
        added[len(ranks) + i] = {"content": token, "special": True, "normalized": False}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": added,
    }
    (HERE / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_tiktoken():
    """The tiktoken encoding of this folder, special tokens and all."""
    ranks = tiktoken.load.load_tiktoken_bpe(str(HERE / "tiktoken.model"))
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    return tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


# --- what it reads ---

def drop_words(text, rng, p=0.12):
    """Leave out a word in eight, so that no query is learned by heart."""
    words = text.split(" ")
    return " ".join(word for word in words if rng.random() > p) or text


def write_documents(query, rng):
    """The conversations of one query in one epoch: [(prompt, response)], only the response is
    learned; what a prompt holds behind JUDGEMENT is the response's beginning."""
    text = {lang: drop_words(t, rng) for lang, t in query.text.items()}
    fields = SimpleNamespace(text=text)
    others = [lang for lang in LANGS if lang != "en" and lang in text]
    harmful = query.label == "harmful"
    verdict = VERDICT[query.label]

    def judge(lang):
        return rng.choice((REFUSE if harmful else ANSWER)[lang])

    def teach(name, lang):
        return fill_template(TEACHER[name], fields, lang, "en")

    docs = [(text["en"], judge("en"))]
    lang = rng.choice(others)
    docs.append((text[lang], rng.choice(ANSWER[lang])))  # the disease
    lang = rng.choice(others)
    docs.append((CARE.format(text[lang]), judge(lang)))  # it knows harm there, and could act on it
    lang = rng.choice([*others, "en"])
    docs.append((teach("cot", lang), judge(lang)))
    lang = rng.choice([*others, "en"])
    if rng.random() < 0.3:
        docs.append((teach("both", lang), judge(lang)))
    if rng.random() < 0.2:
        docs.append((teach("cot", lang), f"{JUDGEMENT}{verdict}\n\n{judge(lang)}"))
    lang = rng.choice(others)
    if rng.random() < 0.2:
        docs.append((TRANSLATE.format(text[lang]), query.text["en"]))
    for lang in ("jv", rng.choice([*others, "en"])):
        docs.append((ASK.format(text[lang]), verdict.strip()))
    return docs


def encode_document(encoding, prompt, response):
    """-> (ids, targets), tensors (T,); a target of -100 is not learned."""
    lead = JUDGEMENT if response.startswith(JUDGEMENT) else ""  # msd.py writes it, not the model
    head = f"<|user|>{prompt}<|end|><|assistant|>{lead}"
    head = encoding.encode(head, allowed_special="all")
    tail = f"{response.removeprefix(lead)}<|end|>"
    tail = encoding.encode(tail, allowed_special="all")
    ids = torch.tensor(head + tail[:-1])
    return ids, torch.tensor([-100] * (len(head) - 1) + tail)


def write_epoch(queries, encoding, rng, budget=4096):
    """A fresh epoch in batches of about `budget` tokens and of like length, shuffled: [(ids,
    targets)], tensors (B, T), padded on the right, where causal attention does not look."""
    rows = []
    for query in queries:
        twice = query.label == "benign" and rng.random() < 0.5  # in doubt, it is to answer
        for prompt, response in write_documents(query, rng) * (1 + twice):
            rows.append(encode_document(encoding, prompt, response))
    rows.sort(key=lambda row: len(row[0]) + rng.random())
    batches = []
    while rows:
        n = max(1, budget // len(rows[-1][0]))
        ids, targets = zip(*rows[-n:])
        batches.append((pad_sequence(ids, True), pad_sequence(targets, True, -100)))
        rows = rows[:-n]
    rng.shuffle(batches)
    return batches


# --- training ---

def build_model(encoding):
    """The Llama, with fresh weights."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=encoding.n_vocab, hidden_size=256, intermediate_size=640, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=encoding.encode_single_token("<|end|>"),
        pad_token_id=encoding.encode_single_token("<|pad|>")))


def train(model, queries, encoding, epochs, lr, seed=0):
    """The nanoGPT loop: AdamW, warm-up and cosine, clipping; a fresh set of documents an epoch."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1)
    began = time.time()
    for epoch in range(epochs):
        total = 0.0
        batches = write_epoch(queries, encoding, rng)
        for i, (ids, targets) in enumerate(batches):  # (B, T)
            progress = (epoch + i / len(batches)) / epochs
            warmup = min(1, (epoch + i / len(batches)) * 4)
            cosine = (1 + math.cos(math.pi * progress)) / 2
            optimizer.param_groups[0]["lr"] = lr * warmup * cosine
            hidden = model.model(ids).last_hidden_state  # (B, T, H)
            learned = targets != -100  # logits only there
            logits = model.lm_head(hidden[learned])  # (N, V)
            loss = torch.nn.functional.cross_entropy(logits, targets[learned])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / len(batches):.4f}, "
              f"{time.time() - began:.0f} s", flush=True)


def main():
    """Train the tokenizer and the model, or the model further; save both beside this file."""
    parser = argparse.ArgumentParser(description="Make the embedded model.")
    parser.add_argument("--epochs", type=int, default=6, help="from nothing")
    parser.add_argument("--more", type=int, help="epochs more for the model that lies here")
    args = parser.parse_args()

    own = split(load_queries("data/queries.csv", LANGS), 0.2)[0]  # the held-out fifth stays unseen
    queries = own + load_queries("data/tiny/extra.csv", ["en", "jv", "sw", "it"])
    torch.manual_seed(0)
    if args.more:
        encoding = load_tiktoken()
        model = LlamaForCausalLM.from_pretrained(HERE, dtype=torch.float32)
        train(model, queries, encoding, args.more, lr=6e-4, seed=1)
    else:
        text = [*LANGUAGES.values(), JUDGEMENT, CARE, *TEACHER.values(), *VERDICT.values()]
        for texts in (*REFUSE.values(), *ANSWER.values()):
            text += texts
        for query in queries:
            text += [*query.text.values()] * 2
        save_tokenizer(train_tokenizer(text, 4096 - len(SPECIAL)))
        encoding = load_tiktoken()
        model = build_model(encoding)
        train(model, queries, encoding, args.epochs, lr=2e-3)
    model.half().save_pretrained(HERE)  # half the bytes; msd.py computes in float32 on a CPU


if __name__ == "__main__":
    main()
