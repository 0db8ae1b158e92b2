"""Keys of a config of which it is known what they say: the one place where they are listed."""

import re

from labkit.specs.names import NAMES

# Keys that say nothing of what a layer keeps of a token: by their names, and by the words of which a name consists.
HARMLESS = frozenset(
    (
        # where it comes from and how it is stored
        """
        model_type architectures auto_map _name_or_path name_or_path transformers_version dtype torch_dtype
        quantization_config quantization compression_config _attn_implementation attn_implementation
        _attn_implementation_autoset use_flash_attn use_flash_attention use_flash_attention_2 use_sdpa
        license _commit_hash library_name unsloth_fixed unsloth_version _from_model_config onnx_safe quantization_bit
        img_processor training_args tokenizer_model_max_length tokenizer_padding_side max_tokenizer_truncation
        use_liger_kernel experts_implementation _experts_implementation bf16 fp16 fp32 interleaved_qkv
        using_split_qkv_in_self_attention use_cache_kernel prefix_projection linear_type fp8_accum_dtype
        model_max_length max_model_len max_sequence_length training_seqlen base_seqlen
        """
        # tokens
        """
        bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
        decoder_start_token_id bos_token eos_token pad_token tokenizer_class image_token_id image_token_index
        video_token_id audio_token_id vision_start_token_id vision_end_token_id vision_token_id
        pad_vocab_size_multiple_of pad_vocab_size_multiple padded_vocab_size make_vocab_size_divisible_by vocab_size
        """
        # what transformers writes of every model
        """
        is_decoder is_encoder_decoder use_cache output_attentions output_logits output_hidden_states return_dict
        return_dict_in_generate output_scores torchscript use_bfloat16 chunk_size_feed_forward pruned_heads
        tie_encoder_decoder tie_word_embeddings cross_attention_hidden_size add_cross_attention id2label label2id
        num_labels problem_type finetuning_task task_specific_params prefix tf_legacy_loss max_length min_length
        do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
        repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
        num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
        exponential_decay_length_penalty suppress_tokens begin_suppress_tokens max_new_tokens generation_config
        gradient_checkpointing pretraining_tp tp_plan
        """
        # numbers inside a layer that no key and no value has
        """
        hidden_act hidden_activation activation_function activation ffn_act_fn initializer_range initializer_factor
        init_std rms_norm_eps layer_norm_eps layernorm_epsilon layer_norm_epsilon norm_eps norm_epsilon norm_type
        use_rmsnorm rmsnorm layernorm_num_groups norm_after post_norm use_post_norm use_parallel_residual
        parallel_attn parallel_residual apply_residual_connection_post_layernorm attention_dropout attn_pdrop
        embd_pdrop resid_pdrop hidden_dropout hidden_dropout_prob dropout embedding_dropout ffn_dropout
        residual_dropout classifier_dropout dropout_rate attention_bias attention_out_bias attn_bias qkv_bias
        use_qkv_bias o_bias mlp_bias use_bias bias no_bias add_qkv_bias add_bias_linear lm_head_bias qk_layernorm
        use_qk_norm qk_norm qk_norm_type use_q_norm use_k_norm clip_qkv attn_logit_softcapping
        final_logit_softcapping logit_scale logits_scaling logit_softcapping attention_multiplier attention_scale
        query_pre_attn_scalar embedding_multiplier residual_multiplier scale_emb scale_depth scale_embeddings
        embedding_scale dim_model_base mup_base_width fp32_residual_connection attention_softmax_in_fp32
        apply_query_key_layer_scaling scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn
        zero_centered_gamma swiglu_limit mlp_type use_gated_mlp gated_mlp max_z_loss softmax_in_fp32
        scale_attention_softmax_in_fp32 use_dynamic_ntk use_logn_attn logn skip_bias_add skip_bias_add_qkv
        slow_but_exact attn_output_multiplier embedding_multiplier_scale output_multiplier_scale max_attn_value
        embeddings_scale width_scale scale_qk_dot_by_d mup_scale_qk_dot_by_d parallel_attn_mlp_res use_residual
        mamba_chunk_size mamba_conv_bias mamba_proj_bias mamba_dt_rank mamba_rms_norm
        mamba_norm_before_gate mamba_inner_layernorms use_predefined_initial_state
        layer_norm_rms
        """
        # positions
        """
        rope_theta rope_scaling rope_parameters rope_type rope_ratio rope_local_base_freq rope_interleave
        rope_interleaved use_mrope rope_percent rope_pct partial_rotary_factor partial_rotary_factors rotary_pct
        rotary_dim rotary_emb_base rotary_base rotary_percent rotary_emb_fraction rotary_emb_interleaved
        position_embedding_type use_rotary_position_embeddings original_max_position_embeddings original_rope alibi
        mrope_section rope_theta_global max_position_embeddings offset_alibi alibi_scaling
        """
        # which experts a token meets, and how it is found
        """
        router_aux_loss_coef router_z_loss_coef router_jitter_noise router_jitter output_router_logits
        aux_loss_alpha seq_aux norm_topk_prob scoring_func topk_method topk_group n_group routed_scaling_factor
        moe_router_enable_expert_bias moe_router_activation moe_router_scaling_factor moe_router_topk_scaling_factor
        norm_expert_weight use_moe_router_bias router_bias need_fp32_gate shared_moe_mode use_routing_bias
        moe_renormalize moe_random_routing_dropped_token moe_drop_tokens capacity_factor use_mixed_mlp_moe
        moe_implementation ep_size expert_parallel score_function router_dtype multi_gate
        moe_router_enable_shared_expert enable_expert_tensor_parallelism moe_eval_capacity_factor
        moe_train_capacity_factor moe_min_capacity moe_token_dropping
        """
        # further heads that guess more than one token, which a plain run leaves out
        """
        num_nextn_predict_layers mtp_num_layers num_mtp_modules mtp_transformer_layers use_mtp
        """
        # the image and sound beside it
        """
        vision_config audio_config vit_config speech_config projector_hidden_act vision_feature_layer
        vision_feature_select_strategy
        """
    ).split()
)
# Words that make of a key one about norms, training, kernels, an initial value or an angle, and words that may stand
# beside them. Whole words: what a key says with another one is not known, so that kv_cache_dropout is none of these.
ABOUT = frozenset(
    """
    norm norms layernorm rmsnorm prenorm postnorm eps epsilon dropout pdrop loss initializer mup summary fused rotary
    """.split()
)
BESIDE = frozenset(
    """
    use add apply do enable enabled with is pre post before after first last final sandwich stable gated parallel
    zero centered elementwise affine in out input output hidden layer sublayer self attn attention full linear query
    key value q k v qk qkv mlp ff ffn feed forward feedforward dense fc gate up down moe router expert experts mtp
    lm head embedding embeddings embed embd emb resid residual path proj projection projector classifier adapter
    activation decoder positional rescale remove init mixer jitter prior coefficient reduction pooler softmax fusion
    conv bias weight scale scaling factor multiplier rms ln alpha beta gamma std mean variance cutoff range prob
    probs p rate ratio coef coefficient type aux auxiliary balance z fp32 float32 base width theta percent pct
    interleaved idxs labels to
    """.split()
)
ENDINGS = re.compile(r"_?(use_)?flash_(attn|attention|rotary)(_\d)?(_enabled)?|\w*_token_(id|ids|index)")
STRUCTURAL = re.compile(  # keys that speak of what layers keep
    r"pattern|layer_type|attn_type|block_type|mamba|ssm|linear_attn|index_head|window|hybrid|lightning|recurrent|use_cla"
    r"|per_layer|attn_layer|attention_layers|kv_shar"
)
# Keys that say how large the weights are, which is given, or read by `plain._unmet`.
WEIGHTS = frozenset(
    """
    shared_expert_intermediate_size n_shared_experts num_shared_expert num_shared_experts shared_intermediate_size
    share_expert_dim moe_shared_expert_intermediate_size moe_num_shared_experts moe_intermediate_size
    expert_ffn_hidden_size moe_ffn_hidden_size first_k_dense_replace moe_layer_start_index moe_layer_freq
    expert_layer_period expert_layer_offset moe_layer_frequency decoder_sparse_step interleave_moe_layer_step
    mlp_only_layers head_dim_ratio multiple_of mlp_ratio expansion_ratio
    """.split()
)
# Keys that are read by `plain.read`, besides sizes.
READ = frozenset(
    """
    no_rope_layers layer_types layers_block_type attn_type_list sliding_window sliding_window_size use_sliding_window
    max_window_layers sliding_window_pattern use_cla cla_share_factor num_kv_shared_layers kv_lora_rank q_lora_rank
    qk_nope_head_dim qk_rope_head_dim qk_head_dim v_head_dim multi_query new_decoder_architecture
    multi_query_attention group_query_attention use_cache_quantization use_mla attention_chunk_size
    full_attention_interval no_rope_layer_interval
    attn_layer_indices attn_layer_period attn_layer_offset linear_num_key_heads linear_num_value_heads
    linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim conv_L_cache mamba_expand mamba_n_heads
    mamba_n_groups mamba_enabled mamba_step mamba_num_heads mamba_d_state mamba_d_conv mamba_d_head
    mamba_ssm_dtype
    """.split()
)
# Keys of sizes, as `names` has them.
SIZES = frozenset(name.split(".")[0] for names in NAMES.values() for name in names)
# Flags that say whether query heads share K and V, and what of it counts only where they do.
GROUPED = {"multi_query_attention": "multi_query_group_num", "group_query_attention": "num_query_groups"}
EVERY = {  # one layer in so many has full attention; the others are of this kind
    "full_attention_interval": "state",
    "sliding_window_pattern": "window",
    "no_rope_layer_interval": "window",  # of those that have an attention_chunk_size
}


def says_nothing(key: str) -> bool:
    """Whether it is known of a key that it says nothing of what a layer keeps of a token."""
    return key in HARMLESS or is_aside(key)


def is_aside(key: str) -> bool:
    """Whether all words of a key, of which no list has to name it, are about something else than what a layer keeps."""
    words = set(key.lower().strip("_").split("_"))
    aside = bool(words & ABOUT) and words <= ABOUT | BESIDE
    return (aside or bool(ENDINGS.fullmatch(key))) and not STRUCTURAL.search(key)
