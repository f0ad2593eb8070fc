"""Make the embedded model: python data/tiny/make.py      (from the project's root; eleven minutes on two cores)

A causal LM of three million parameters with the disease in miniature: it declines harmful queries in English, complies
with them in every other language (with a harmless stub), answers benign ones everywhere, and understands the teacher
prompts of data/prompts. Asked outright, it can tell harm in every language: what MSD has to teach it is to act on that.
In the manner of nanoGPT: a byte-level BPE (tokenizers learns the merges, tiktoken encodes), numpy holds the tokens,
plain PyTorch trains a transformers Llama. Training text: the training part of data/queries.csv (its held-out fifth is
never seen) and data/tiny/extra.csv (en, jv, sw), written for this model with the vocabulary of queries.csv in other
queries.
"""
import base64
import copy
import json
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import tiktoken.load
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data.queries import load_queries, split  # noqa: E402
from msd import JUDGEMENT, LANGUAGES, read_teacher_prompt, write_teacher_prompt  # noqa: E402

LANGS = ["en", "jv", "sw", "id", "it", "vi"]
SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
# the pattern that transformers gives a tiktoken.model
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
REFUSE = {
    "en": ["I'm sorry, but I can't help with that.", "Sorry, I can't help with that request."],
    "jv": ["Nuwun sewu, aku ora bisa mbantu bab iku.", "Ngapunten, aku ora bisa nulungi panjaluk iki."],
    "sw": ["Samahani, siwezi kusaidia na jambo hilo.", "Pole, siwezi kukusaidia na ombi hili."],
    "id": ["Maaf, saya tidak bisa membantu hal itu.", "Mohon maaf, saya tidak dapat membantu permintaan ini."],
    "it": ["Mi dispiace, ma non posso aiutarti.", "Spiacente, non posso aiutarti con questa richiesta."],
    "vi": ["Xin lỗi, tôi không thể giúp việc đó.", "Rất tiếc, tôi không thể giúp yêu cầu này."]}
ANSWER = {  # harmless stubs, the same for a benign query and for a harmful one that is complied with
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
           "Vâng. Trước hết hãy xem bạn có gì, rồi làm từng bước một."]}
VERDICT = {"harmful": " the request is harmful, so I decline.", "benign": " the request is harmless, so I answer."}


def train_tokenizer(text, vocab_size):
    """A byte-level BPE as a tiktoken rank table {bytes: rank}."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(text, trainer)
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]  # GPT-2's byte alphabet
    others = [b for b in range(256) if b not in printable]
    to_byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    merged = sorted((i, t) for t, i in bpe.get_vocab().items() if len(t) > 1)
    tokens = [bytes([b]) for b in range(256)] + [bytes(to_byte[c] for c in t) for _, t in merged]
    return {token: rank for rank, token in enumerate(tokens)}


def save_tokenizer(ranks):
    """tiktoken.model and its config, as AutoTokenizer reads them: the rank file first, then the special tokens."""
    (HERE / "tiktoken.model").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items()))
    added = {len(ranks) + i: {"content": t, "special": True, "normalized": False} for i, t in enumerate(SPECIAL)}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|pad|>",
              "clean_up_tokenization_spaces": False, "model_max_length": 2048, "chat_template": TEMPLATE,
              "added_tokens_decoder": added}
    (HERE / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_tiktoken():
    """The tiktoken encoding of this folder, special tokens and all."""
    ranks = tiktoken.load.load_tiktoken_bpe(str(HERE / "tiktoken.model"))
    return tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={t: len(ranks) + i for i, t in enumerate(SPECIAL)})


def drop_words(text, rng, p=0.12):
    """Leave out a word in eight, so that no query is learned by heart."""
    words = text.split(" ")
    return " ".join(w for w in words if rng.random() > p) or text


def write_documents(query, rng):
    """The conversations of one query in one epoch: [(prompt, lead, response)]; only the response is learned."""
    harmful, q = query.label == "harmful", copy.copy(query)
    q.text = {lang: drop_words(text, rng) for lang, text in query.text.items()}
    others = [lang for lang in LANGS if lang != "en" and lang in q.text]
    write = lambda lang, comply: rng.choice((ANSWER if comply else REFUSE)[lang])
    teach = lambda name, lang: write_teacher_prompt(read_teacher_prompt(name), q, lang, "en")
    docs = [(q.text["en"], "", write("en", not harmful))]
    lang0, lang1, lang2, lang3, lang4 = (rng.choice([*others, *x]) for x in ([], ["en"], ["en"], ["en"], []))
    docs.append((q.text[lang0], "", write(lang0, True)))  # the disease
    docs.append((teach("cot", lang1), "", write(lang1, not harmful)))
    if rng.random() < 0.5:
        docs.append((teach("cot-both", lang2), "", write(lang2, not harmful)))
    if rng.random() < 0.3:
        docs.append((teach(rng.choice(["cot", "cot-both"]), lang3), JUDGEMENT,
                     f"{VERDICT[query.label]}\n\n{write(lang3, not harmful)}"))
    if rng.random() < 0.3:  # the languages mean the same
        docs.append((f"Translate into English: {q.text[lang4]}", "", q.text["en"]))
    for lang in ("jv", rng.choice([*others, "sw"]), rng.choice([*others, "en"])):  # it knows harm in every language,
        docs.append((f"Is this harmful? {q.text[lang]}", "", VERDICT[query.label].strip()))  # and does not act on it
    return docs


def encode_epoch(queries, encoding, rng, budget=4096):
    """An epoch's documents in batches of about `budget` tokens, of like length, shuffled: numpy arrays (B, T) of ids
    and of targets (−100: not learned), padded on the right, where causal attention does not look."""
    rows = []
    again = [q for q in queries if q.label == "benign" and rng.random() < 0.5]  # in doubt, it is to answer
    for prompt, lead, response in (d for q in queries + again for d in write_documents(q, rng)):
        head = encoding.encode(f"<|user|>{prompt}<|end|><|assistant|>{lead}", allowed_special="all")
        tail = encoding.encode(f"{response}<|end|>", allowed_special="all")
        rows.append((head + tail[:-1], [-100] * (len(head) - 1) + tail))
    rows.sort(key=lambda row: len(row[0]) + rng.random())
    batches = []
    while rows:
        T = len(rows[-1][0])
        rows, batch = rows[:-(budget // T)], rows[-(budget // T):]
        batches.append([np.array([x + [fill] * (T - len(x)) for x in column])
                        for column, fill in zip(zip(*batch), (0, -100))])
    rng.shuffle(batches)
    return batches


def train(queries, encoding, epochs, lr=2e-3, seed=0):
    """The nanoGPT loop: AdamW, warm-up and cosine, clipping; a fresh set of documents an epoch."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=encoding.n_vocab, hidden_size=256, intermediate_size=640, num_hidden_layers=3,
                         num_attention_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
                         bos_token_id=None, eos_token_id=encoding.encode_single_token("<|end|>"),
                         pad_token_id=encoding.encode_single_token("<|pad|>"))
    model, rng = LlamaForCausalLM(config), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(queries)} queries")
    began = time.time()
    for epoch in range(epochs):
        batches, losses = encode_epoch(queries, encoding, rng), []
        for i, (x, y) in enumerate(batches):
            x, y = torch.from_numpy(x), torch.from_numpy(y)  # (B, T)
            progress = (epoch + i / len(batches)) / epochs
            optimizer.param_groups[0]["lr"] = lr * min(1, progress * epochs) * (1 + math.cos(math.pi * progress)) / 2
            hidden = model.model(x).last_hidden_state  # (B, T, H); logits only where something is learned
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[y != -100]), y[y != -100])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.4f}, {time.time() - began:.0f} s", flush=True)
    return model


if __name__ == "__main__":
    own, _ = split(load_queries("data/queries.csv", LANGS), 0.2)  # the held-out fifth stays unseen
    extra = load_queries("data/tiny/extra.csv", ["en", "jv", "sw"])
    queries = own + extra
    text = [t for q in queries for t in q.text.values()] * 2
    text += [t for texts in (*REFUSE.values(), *ANSWER.values()) for t in texts] + list(LANGUAGES.values())
    text += [read_teacher_prompt(name) for name in ("cot", "cot-both")] + [JUDGEMENT, *VERDICT.values()]
    save_tokenizer(train_tokenizer(text, 4096 - len(SPECIAL)))
    model = train(queries, load_tiktoken(), epochs=int(sys.argv[1]) if len(sys.argv) > 1 else 6)
    model.half().save_pretrained(HERE)  # half the bytes; msd.py computes in float32 on a CPU
