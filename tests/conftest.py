"""Tiny random models of every architecture that the tests run on, a chain whose distribution is
known, and tokenizers of both kinds. Nothing is downloaded."""
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tensors are tiny here: a second thread only costs

import peft
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

transformers.utils.logging.set_verbosity_error()

BASE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
ATTENTION = {  # all read a prompt in one piece; what follows a name tells variants apart
    "Llama": {}, "Qwen2": {}, "Qwen3": {}, "Phi3": {}, "Olmo2": {}, "GPTNeoX": {},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 3.0},
    "Mixtral": {"num_local_experts": 4},
    "Llama4Text": {"num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 8},
    "Mistral": {"sliding_window": 8},
    "Mistral wide": {"sliding_window": 200},
    "Gemma2": {"sliding_window": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "Gemma3Text": {"sliding_window": 8},
    "Gemma3Text wide": {"sliding_window": 200},
    "GptOss": {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Falcon": {"alibi": True},
    "GPTNeo": {
        "num_layers": 2, "num_heads": 4, "window_size": 8,
        "attention_types": [[["global", "local"], 1]]},
}
MAMBA = {"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}
RECURRENT = {  # wholly or in part
    "Mamba": {"state_size": 8},
    "Mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 2, "chunk_size": 4},
    "Rwkv": {"attention_hidden_size": 32},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "FalconH1": {**MAMBA, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "Jamba": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1,
        "expert_layer_period": 2, "num_experts": 2, "use_mamba_kernels": False,
        "mamba_d_state": 8, "mamba_dt_rank": 4},
    "Bamba": {**MAMBA, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "GraniteMoeHybrid": {
        **MAMBA, "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8,
        "num_local_experts": 0, "shared_intermediate_size": 32},
    "RecurrentGemma": {
        "lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    "Qwen3Next": {
        **DELTA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16},
    "Qwen3_5Text": DELTA,
    "MiniMax": {"layer_types": ["linear_attention", "full_attention"]},
}
ARCHITECTURES = {**ATTENTION, **RECURRENT}
ROPES = {  # their positions change past nine tokens
    "Llama dynamic": {
        "max_position_embeddings": 9,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "Phi3 long": {
        "max_position_embeddings": 64, "original_max_position_embeddings": 9,
        "rope_parameters": {
            "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
            "rope_theta": 10000.0, "original_max_position_embeddings": 9}},
}


def build_model(name, seed=0, **extra):
    """A random model of weights so large that every token matters: a leak between rows shows."""
    settings = {**BASE, **{**ARCHITECTURES, **ROPES}.get(name, {}), **extra}
    if name == "Falcon":
        del settings["head_dim"]  # it works it out and takes no other
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name.split()[0]}Config")(**settings)
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        p.data.mul_(5 if p.dim() > 1 else 1)
    return model.eval()


def build_chain(table):
    """A model whose next logits are exactly table[last token], whatever came before; ids past the
    table are never likely, and stand for those in it."""
    table = torch.tensor(table, dtype=torch.float)
    n = len(table)
    model = build_model("Llama")
    for layer in model.model.layers:  # they add nothing, so an embedding comes through as it is
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.model.norm.weight.data.fill_((1 / 32 + model.config.rms_norm_eps) ** 0.5)
    model.model.embed_tokens.weight.data = torch.eye(n, 32).repeat(97, 1)[:97]
    model.lm_head.weight.data.fill_(-1000)
    model.lm_head.weight.data[:n, :n] = table.T
    return model


def add_adapter(model):
    """A LoRA student whose adapter is not the zero it begins as."""
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"],
                             init_lora_weights=False)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config).eval()


def build_any(name):
    """build_model, or a "LoRA" student."""
    return add_adapter(build_model("Llama")) if name == "LoRA" else build_model(name)


def generate(model, prompts, n):
    """What transformers answers greedily, a row at a time, without a stop."""
    model.generation_config.eos_token_id = None
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                             max_new_tokens=n, pad_token_id=0)
        rows.append(out[0, len(prompt):].tolist())
    return rows


@torch.no_grad()
def forward(model, prompt, response):
    """The logits (T, V) that predict a response, without padding, cache or neighbours."""
    out = model(input_ids=torch.tensor([prompt + response]), use_cache=False)
    return out.logits[0, len(prompt) - 1:-1]


def cut_half(rows):
    """(stop ids that end some of the rows early, and at most half of them; the rows so ended)."""
    stop_ids = set()
    for row in rows:
        more = {*stop_ids, row[2]}
        if 2 * sum(bool(more & set(other)) for other in rows) <= len(rows):
            stop_ids = more
    ended = []
    for row in rows:
        ends = [i + 1 for i, token in enumerate(row) if token in stop_ids]
        ended.append(row[:min(ends, default=None)])
    return stop_ids, ended


def spy(model):
    """Records the shape of the ids of every call."""
    calls = []

    def hook(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        calls.append(tuple(ids.shape))
    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}")
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}<<SYS>> {{ m.content }} <</SYS>> {% endif %}{% endfor %}")
PARTS = (
    "No, this is not safe: {% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}")
LINES = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
USER_ONLY = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}OTHER{% endif %}"
    "{% endfor %}")
TEXTS = ["what is rain? water that falls out of clouds, hi [there] and how is [the weather] here?"]


def build_tokenizer(kind="bytes", template=None, added=()):
    """A tokenizer of whole bytes or of ▁words, with the special tokens <s> </s> <|im_start|>
    <|im_end|>; `added` are not special."""
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace()
        alphabet = ["▁", "\n", *map(chr, range(33, 127))]
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False,
                                  special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", chat_template=template)
    turns = [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")]
    fast.add_tokens(turns, special_tokens=True)
    fast.add_tokens([AddedToken(text, normalized=False) for text in added])
    return fast


def apply_template(tokenizer, *turns):
    """The ids that transformers makes of [(role, content)] itself."""
    messages = [{"role": role, "content": content} for role, content in turns]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False,
                                         enable_thinking=False)


@pytest.fixture
def folder(tmp_path):
    """A model folder of a Llama whose head is tied."""
    tokenizer = build_tokenizer("bytes", CHATML)
    model = build_model("Llama", vocab_size=len(tokenizer), tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture(params=["Llama", "GPT2"])
def model(request):
    return build_model(request.param)
