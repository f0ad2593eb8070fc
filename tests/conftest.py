"""Tiny random models of every architecture that the tests run on; nothing is downloaded."""
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

transformers.utils.logging.set_verbosity_error()
BASE = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ARCHITECTURES = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {}, "Mistral": {"sliding_window": 8}, "Phi3": {}, "Olmo2": {},
    "Gemma2": {"sliding_window": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "Gemma3Text": {"sliding_window": 8}, "Cohere": {"logit_scale": 0.25}, "Granite": {"logits_scaling": 3.0},
    "GPTNeoX": {}, "Mixtral": {"num_local_experts": 4},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
}


def build_model(name, seed=0, **extra):
    """A random model with weights large enough that every token matters: a leak between rows shows."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**BASE, **ARCHITECTURES.get(name, {}), **extra})
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        p.data.mul_(5 if p.dim() > 1 else 1)
    return model.eval()


@pytest.fixture(params=["Llama", "GPT2"])
def model(request):
    return build_model(request.param)
