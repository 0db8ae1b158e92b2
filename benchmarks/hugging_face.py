"""The other side of a comparison: our weights inside transformers' own model."""

from __future__ import annotations

from typing import Any

import torch

from labkit.llama import Llama, hf_names


def as_hugging_face(model: Llama, attention: str = "sdpa") -> Any:
    """transformers' Llama with the same weights, in the same dtype on the same device. RuntimeError if any do not fit.

    attention: its `attn_implementation`. Its rotary frequencies stay in float32, as they do when it loads a model.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = model.spec
    config = LlamaConfig(  # type: ignore[call-arg]
        vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers, num_attention_heads=spec.num_heads, num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim, max_position_embeddings=spec.max_seq_len, rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta}, tie_word_embeddings=spec.tied_head,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, attn_implementation=attention,
    )  # fmt: skip
    with torch.device(model.device):
        theirs: Any = LlamaForCausalLM(config)
        theirs = theirs.to(model.dtype).eval()
    theirs.model.rotary_emb.to(torch.float32)
    there = dict(theirs.named_parameters())
    sources = {name: hf_names(name) for name, _ in model.named_parameters()}
    if apart := {source for names in sources.values() for source in names} ^ set(there):
        raise RuntimeError(f"weights do not fit transformers' model: {sorted(apart)}")
    with torch.no_grad():
        for name, ours in model.named_parameters():
            parts = ours.split([len(there[source]) for source in sources[name]])
            for source, part in zip(sources[name], parts, strict=True):
                there[source].copy_(part)
    return theirs
