"""Small transformers models with random weights, large enough that a mistake shows in their logits."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 89
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def config(name: str):
    """The transformers config called `name`."""
    return {
        "llama": lambda: LlamaConfig(**SHAPE),
        "llama, tied head": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
        "llama, wide heads": lambda: LlamaConfig(**SHAPE, head_dim=24),
        "llama, llama3 rope": lambda: LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
        "llama, linear rope": lambda: LlamaConfig(
            **SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
        ),
        "mistral, window 6": lambda: MistralConfig(**SHAPE, sliding_window=6),
        "mistral, no window": lambda: MistralConfig(**SHAPE, sliding_window=None),
        "qwen2": lambda: Qwen2Config(**SHAPE),
        "qwen2, window 6": lambda: Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=6, max_window_layers=0),
        "gpt2": lambda: GPT2Config(
            vocab_size=VOCAB,
            n_embd=48,
            n_layer=3,
            n_head=4,
            n_positions=256,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        ),
    }[name]()


CLASSES = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "gpt2": GPT2LMHeadModel,
}


def hf_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model of that config. Weights are wide, norms and biases not trivial: attention is far from uniform."""
    torch.manual_seed(seed)
    shape = config(name)
    model = CLASSES[shape.model_type](shape).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "ln_" in key:
                parameter.normal_(1.0 if key.endswith("weight") else 0.0, 0.2)
            else:
                parameter.normal_(0.0, 0.2)
    return model
