"""A tiny random model of every type that transformers generates text with, and what each does with a labkit cache.

python -m tests.every_type        a line for each type that is not served alike, and the counts
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from labkit.cache import Cache
from labkit.hf import wrap
from labkit.hf.model import DummyLayer

TEXT = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VISION = sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(TEXT))
VOCAB, PAD, WINDOW = 61, 0, 6
LARGEST = 10_000_000  # parameters: a model above this is not tiny
TOKENS, NEW = 9, 5  # of a prompt, and generated: more than the window
# Logits of two layers: some 3,000 float32 products and sums each, and what wide weights make of their rounding.
BOUND = 3_000 * torch.finfo(torch.float32).eps

HIDES_BY_CACHE = {"moshi"}
"""Types whose masks show what their own cache lets go: wrap(cache) does what transformers does with a cache of all."""

UNTRIED = {
    "blt": "makes its cache from a number of layers that its config does not have",
    "dots3_note": "checks the sizes of its vision and audio towers against each other",
    "dots3_note_text": "heads of its sliding layers are set layer by layer: not tiny",
    "gemma3n": "its vision tower needs timm, which is not installed",
    "gemma4_assistant": "reads the K and V of another model",
    "gemma4_unified_assistant": "reads the K and V of another model",
    "musicgen": "generates sound, from a text encoder's states",
    "musicgen_melody": "generates sound, from a text encoder's states",
    "xlstm": "a recurrent model, whose sizes depend on each other",
    "zamba2": "a hybrid, whose sizes depend on each other",
}
"""Types of `TEXT` that no tiny model is made of here, with the reason."""

# What configs call a size, and a small value for it.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "attention_hidden_size", "lru_width"), 32),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_query_groups", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head", "attention_head_size", "d_head", "kv_channels"), 8),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "dim_ff", "dff"), 48),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size", "d_inner"), 48),
    **dict.fromkeys(("feed_forward_size",), 48),
    **dict.fromkeys(("max_position_embeddings", "max_target_positions", "max_source_positions"), 64),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("sliding_window_size", "window_size", "local_attention"), WINDOW),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "router_hidden_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts"), 1),
    # Attention to latent vectors, and indexers that choose keys.
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
    **{"qk_head_dim": 12, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4, "o_lora_rank": 8, "rotary_dim": 4},
    # States.
    **{"mamba_d_state": 6, "mamba_dt_rank": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 8},
    **{"mamba_d_ssm": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
    **{"linear_value_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 4, "state_size": 6, "ssm_state_size": 6},
    **{"time_step_rank": 4, "chunk_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "num_heads": 4},
    **{"mamba_n_groups": 1, "n_groups": 1},
    # What some types have besides.
    **{"hidden_size_per_layer_input": 8, "laurel_rank": 8, "shape_embed_dim": 8, "shape_vocab_size": VOCAB},
    **{"pronunciation_embed_dim": 8, "pronunciation_vocab_size": VOCAB, "encoder_layers": 2, "decoder_layers": 2},
    **{"num_encoder_layers": 2, "num_decoder_layers": 2, "hc_lowrank": 8, "d_rel": 8},
    **{"rel_extent": 32, "gated_norm_rank": 8, "adapter_rank": 8, "prompt_mid_dim": 8},
    # Vision towers.
    **{"image_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 32, "out_hidden_size": 32},
}
IDS: dict[str, Any] = {
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id", "forced_bos_token_id", "begin_suppress_tokens"), None),
    **{"pad_token_id": PAD, "bos_token_id": 1, "decoder_start_token_id": 1, "sep_token_id": 2, "cls_token_id": 1},
}
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
ATTENTION = ("full_attention", "sliding_attention")
# What shrinking alone gets wrong, by type.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in ATTENTION}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_hidden_layers": 6, "num_kv_shared_layers": 2, "intermediate_size": [48] * 6,
        "activation_sparsity_pattern": [0.0] * 6, "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None, "H_cycles": 1, "L_cycles": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "nemotron": {"num_key_value_heads": 2},
    **{f"{kind}_text": {"rope_parameters": MROPE} for kind in ("qwen2_vl", "qwen2_5_vl", "glm4v", "glm4v_moe")},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"mamba_headdim": 8, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "head_dim": 4}  # where K and V are made of a latent vector, heads are not grouped


def tiny_config(kind: str, **changes: Any) -> PretrainedConfig:
    """The config that the type has by default, every size that is known made small, one layer of each kind kept."""
    return _shrunk(CONFIG_MAPPING[kind], **OWN.get(kind, {}), **changes)


def _shrunk(cls: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    default = cls()
    stated = default.to_dict()
    real = {name: alias for alias, name in cls.attribute_map.items()}
    said: dict[str, Any] = {}
    for key, value in stated.items():
        for sizes in (SIZES, IDS):
            for name in (key, real.get(key)):
                if name in sizes and (value is not None or name == "head_dim" or sizes is IDS):
                    said[key] = sizes[name]
    if said.get("kv_lora_rank"):
        said |= {key: value for key, value in LATENT.items() if key in said}
    said |= _layers(stated, real)
    for key in cls.sub_configs:
        sub = getattr(default, key, None)
        if isinstance(sub, PretrainedConfig):
            kind = sub.model_type
            said[key] = _shrunk(type(sub), **OWN.get(kind, {}))
    return cls(**said | changes)


def _layers(stated: dict[str, Any], real: dict[str, str]) -> dict[str, Any]:
    """Two layers, or one of each kind; what is said of each layer is said of those that are kept."""
    names = [key for key in stated if "num_hidden_layers" in (key, real.get(key)) or key == "num_layers"]
    if not names or not isinstance(layers := stated[names[0]], int):
        return {}
    lists = {key: value for key, value in stated.items() if isinstance(value, list) and len(value) == layers > 2}
    kinds = lists.get("layer_types") or lists.get("layers_block_type") or lists.get("mlp_layer_types")
    kept = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values()) if kinds else []
    if len(kept) < 2:
        kept = [0, layers - 1] if layers > 1 else [0]
    return {names[0]: len(kept)} | {key: [value[index] for index in kept] for key, value in lists.items()}


def tiny_model(kind: str, **changes: Any) -> PreTrainedModel:
    """A float32 model of that type. Weights are wide: attention is far from uniform, and a mistake in it shows.

    Raises ValueError when what shrinking leaves is not tiny.
    """
    config = tiny_config(kind, **changes)
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "is_decoder", None) is False:
            part.is_decoder = True
    auto = AutoModelForCausalLM if kind in TEXT else AutoModelForImageTextToText
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if parameters > LARGEST:
        raise ValueError(f"{parameters:,} parameters")
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, 0.2)
    return model


def prompts(model: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Token ids and attention_mask, both `[2, TOKENS]`, of a batch without padding and of one with."""
    vocab = min(VOCAB, model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(3, vocab - 1, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"unpadded": (ids, torch.ones_like(ids)), "padded": (ids.masked_fill(mask == 0, PAD), mask)}


def generate(model: PreTrainedModel, ids: Tensor, mask: Tensor, past: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens `[2, TOKENS + NEW]` and logits `[NEW, 2, vocab_size]`."""
    options = {} if past is None else {"past_key_values": past}
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return made.sequences, torch.stack(made.logits)


def own_cache(model: PreTrainedModel) -> DynamicCache | None:
    """The cache that transformers makes for the model; None where generate() makes another, or takes none."""
    takes = model._supports_default_dynamic_cache() and "past_key_values" in model.forward.__code__.co_varnames
    return DynamicCache(config=model.config.get_text_config(decoder=True)) if takes else None


def num_layers(model: PreTrainedModel) -> int:
    """Layers that keep something of their own."""
    if (own := own_cache(model)) is None:
        return model.config.get_text_config(decoder=True).num_hidden_layers
    return sum(type(layer) is not DummyLayer for layer in own.layers)


def verdict(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], bound: float) -> str:
    """ "equal", or how far off."""
    apart = (got[1] - expected[1]).abs().max().item()
    if torch.equal(got[0], expected[0]) and apart <= bound * max(1.0, expected[1].abs().max().item()):
        return "equal"
    return f"wrong: {apart:.2g} of {expected[1].abs().max().item():.2g}"


def outcomes(kind: str) -> dict[str, str]:
    """What generate() of a tiny model of that type does with a labkit cache: "equal" to what it does with its own,
    "ran" (where K and V are quantized), "refused: " and the reason, or else what went wrong. And whether its padding is
    "seen" in the logits, or "ignored".
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_model(kind)
        batches = prompts(model)
        expected = {name: generate(model, *batch, own_cache(model)) for name, batch in batches.items()}
        layers = num_layers(model)
        blind = generate(model, batches["padded"][0], batches["unpadded"][1], own_cache(model))
        found = {"padding": "ignored" if torch.equal(blind[1], expected["padded"][1]) else "seen"}

        def tried(past: Callable[[], Any], batch: str, judge: Callable[..., str]) -> str:
            try:
                return judge(generate(model, *batches[batch], past()), expected[batch])
            except ValueError as refused:
                return f"refused: {refused}"
            except Exception as error:
                return f"failed: {type(error).__name__}: {error}"

        def near(got: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> str:
            if (said := verdict(got, own, BOUND)) == "equal" or kind not in HIDES_BY_CACHE:
                return said
            return verdict(got, generate(model, *batches[batch], DynamicCache()), BOUND)

        def ran(got: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> str:
            return "ran" if bool(got[1].isfinite().all()) else "wrong: not finite"

        def exact(got: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> str:
            return verdict(got, own, 0.0)

        def quantized() -> Cache:
            return Cache.quantized(layers, 8, group_size=8, residual_length=2)

        for batch in batches:
            found[f"wrap(cache), {batch}"] = tried(lambda: wrap(Cache.growing(layers)), batch, near)
            found[f"wrap(cache, model), {batch}"] = tried(lambda: wrap(Cache.growing(layers), model), batch, near)
            found[f"wrap(int8), {batch}"] = tried(lambda: wrap(quantized()), batch, ran)
            found[f"wrap(int8, model), {batch}"] = tried(lambda: wrap(quantized(), model), batch, ran)
            found[f"afterwards, {batch}"] = tried(lambda: own_cache(model), batch, exact)
        return found


def wrong(found: dict[str, str]) -> dict[str, str]:
    """What of `outcomes` may not be."""
    right = ("seen", "ignored", "equal", "ran", "refused: ")
    return {
        how: what
        for how, what in found.items()
        if not what.startswith(right) or (how.startswith("afterwards") and what != "equal")
    }


def main(kinds: list[str]) -> None:
    """Print what is not "equal" or "ran", and the counts."""
    counts: Counter[tuple[str, str]] = Counter()
    for kind in kinds:
        try:
            found = outcomes(kind)
        except Exception as error:
            print(f"{kind}: not tried: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        for how, what in found.items():
            counts[how, what.split(":")[0]] += 1
            if ":" in what and "unpadded" in how:
                print(f"{kind}: {how}: {what}")
    for (how, what), count in sorted(counts.items()):
        print(f"{count:4d} {how}: {what}")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # tiny models on a busy machine: threads would wait for each other
    main(sys.argv[1:] or TEXT + VISION)
