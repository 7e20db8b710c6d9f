"""What sets each family of `tiny` apart: config values, model class, kind of inputs.

Only data lives here. A family is one row of `FAMILY_TABLE`; nothing else needs to change for a new
one, unless its inputs are of a new kind.
"""

from typing import Any

from underhood.organisms.tiny_families_more import MORE_FAMILIES

VOCAB = 99
FIRST_WORD = 8  # ids below are kept for special tokens
IMAGE_TOKEN = 3
IMAGE_TOKENS = 4  # tokens per image in the vision-language families
VIDEO_TOKEN, VISION_START, VISION_END = 4, 5, 6

# A default reaches a config only if the config's class has a field (or an alias) of that name: a
# stray `num_key_value_heads` on GPT-2, say, would mislead code that inspects the config.
DEFAULTS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "image_size": 12,
    "patch_size": 4,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_TEXT: dict[str, Any] = {
    **_TOWER,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: dict[str, Any] = {**_TOWER, "image_size": 12, "patch_size": 4}

# family -> (what differs from the defaults, model class in transformers, kind of inputs)
FAMILY_TABLE: dict[str, tuple[dict[str, Any], str, str]] = {
    "gpt2": ({"n_inner": 48}, "GPT2LMHeadModel", "causal"),
    "gpt_neox": (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "GPTNeoXForCausalLM",
        "causal",
    ),
    "gptj": ({"rotary_dim": 4, "n_inner": 48}, "GPTJForCausalLM", "causal"),
    "gpt_neo": (
        {
            "attention_types": [[["global", "local"], 1], [["global"], 1]],
            "window_size": 4,
        },
        "GPTNeoForCausalLM",
        "causal",
    ),
    "bloom": ({}, "BloomForCausalLM", "causal"),
    "falcon": ({"ffn_hidden_size": 48}, "FalconForCausalLM", "causal"),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, "OPTForCausalLM", "causal"),
    "codegen": ({"rotary_dim": 4, "n_inner": 48}, "CodeGenForCausalLM", "causal"),
    "mpt": ({"max_seq_len": 64}, "MptForCausalLM", "causal"),
    "llama": ({}, "LlamaForCausalLM", "causal"),
    "mistral": ({"sliding_window": 4}, "MistralForCausalLM", "causal"),
    "mixtral": ({}, "MixtralForCausalLM", "causal"),
    "qwen2": ({}, "Qwen2ForCausalLM", "causal"),
    "qwen3": ({"head_dim": 16}, "Qwen3ForCausalLM", "causal"),
    "qwen2_moe": ({}, "Qwen2MoeForCausalLM", "causal"),
    "qwen3_moe": ({"head_dim": 16, "mlp_only_layers": [0]}, "Qwen3MoeForCausalLM", "causal"),
    "qwen3_next": (
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
            "mlp_only_layers": [0],
        },
        "Qwen3NextForCausalLM",
        "causal",
    ),
    "gemma": ({"head_dim": 16}, "GemmaForCausalLM", "causal"),
    "gemma2": (
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 12,
            "sliding_window": 4,
            # The caps of the released models would not be felt by logits of size one.
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        "Gemma2ForCausalLM",
        "causal",
    ),
    "gemma3": (
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 12,
            "sliding_window": 4,
            "layer_types": _ALTERNATING,
        },
        "Gemma3ForCausalLM",
        "causal",
    ),
    "gpt_oss": (
        {
            "head_dim": 16,
            "sliding_window": 4,
            "layer_types": _ALTERNATING,
            "max_position_embeddings": 131072,  # what its yarn rope expects
        },
        "GptOssForCausalLM",
        "causal",
    ),
    "deepseek_v3": (
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 20,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 10,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        "DeepseekV3ForCausalLM",
        "causal",
    ),
    "olmo": ({"clip_qkv": 2.0}, "OlmoForCausalLM", "causal"),
    "olmo2": ({}, "Olmo2ForCausalLM", "causal"),
    "olmoe": ({}, "OlmoeForCausalLM", "causal"),
    "phi": ({}, "PhiForCausalLM", "causal"),
    "phi3": ({}, "Phi3ForCausalLM", "causal"),
    "stablelm": ({"qk_layernorm": True}, "StableLmForCausalLM", "causal"),
    "starcoder2": ({"sliding_window": 4}, "Starcoder2ForCausalLM", "causal"),
    "cohere": ({"logit_scale": 0.8, "use_qk_norm": True}, "CohereForCausalLM", "causal"),
    "granite": (
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.5,
            "residual_multiplier": 0.6,
            "logits_scaling": 0.8,
        },
        "GraniteForCausalLM",
        "causal",
    ),
    "glm4": ({"head_dim": 16}, "Glm4ForCausalLM", "causal"),
    "smollm3": ({"no_rope_layers": [1, 0, 1]}, "SmolLM3ForCausalLM", "causal"),
    "nemotron": ({}, "NemotronForCausalLM", "causal"),
    "persimmon": ({}, "PersimmonForCausalLM", "causal"),
    "mamba": ({"state_size": 8, "time_step_rank": 4}, "MambaForCausalLM", "causal"),
    "mamba2": (
        {"num_heads": 8, "state_size": 8, "n_groups": 2, "chunk_size": 4},
        "Mamba2ForCausalLM",
        "causal",
    ),
    "jamba": (
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 0,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
        "JambaForCausalLM",
        "causal",
    ),
    "bamba": (
        {
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 2,
            "mamba_d_state": 8,
            "mamba_chunk_size": 4,
        },
        "BambaForCausalLM",
        "causal",
    ),
    "zamba2": (
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "num_key_value_heads": 4,
            "head_dim": 16,  # attention reads the state and the embeddings side by side
            "n_mamba_heads": 8,
            "mamba_ngroups": 2,
            "mamba_d_state": 8,
            "chunk_size": 4,
            "adapter_rank": 4,
            "use_mem_rope": True,
        },
        "Zamba2ForCausalLM",
        "causal",
    ),
    "rwkv": ({}, "RwkvForCausalLM", "causal"),
    "recurrent_gemma": (
        {"attention_window_size": 4, "intermediate_size": 96, "logits_soft_cap": 3.0},
        "RecurrentGemmaForCausalLM",
        "causal",
    ),
    **MORE_FAMILIES,
    "bert": ({}, "BertForMaskedLM", "masked"),
    "roberta": ({}, "RobertaForMaskedLM", "masked"),
    "t5": (
        {"d_ff": 48, "num_decoder_layers": 3, "decoder_start_token_id": 1},
        "T5ForConditionalGeneration",
        "seq2seq",
    ),
    "bart": ({}, "BartForConditionalGeneration", "seq2seq"),
    "vit": ({"num_labels": 7}, "ViTForImageClassification", "image"),
    "dinov2": ({"mlp_ratio": 2, "num_labels": 7}, "Dinov2ForImageClassification", "image"),
    "clip": (
        {"projection_dim": 24, "text_config": _TEXT, "vision_config": _VISION},
        "CLIPModel",
        "image_text",
    ),
    "siglip": ({"text_config": _TEXT, "vision_config": _VISION}, "SiglipModel", "image_text"),
    "llava": (
        {
            "text_config": {"model_type": "llama", **_TEXT, "num_key_value_heads": 2},
            "vision_config": {"model_type": "clip_vision_model", **_VISION, "image_size": 8},
            "image_token_index": IMAGE_TOKEN,
            "image_seq_length": IMAGE_TOKENS,
        },
        "LlavaForConditionalGeneration",
        "vlm",
    ),
    "qwen2_vl": (
        {
            "text_config": {
                **_TEXT,
                "num_key_value_heads": 2,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [1, 1, 2],
                },
            },
            "vision_config": {
                "depth": 3,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": VIDEO_TOKEN,
            "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
        },
        "Qwen2VLForConditionalGeneration",
        "vlm",
    ),
    "whisper": (
        {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 64},
        "WhisperForConditionalGeneration",
        "speech",
    ),
    "plain_mlp": ({}, "PlainMLP", "plain"),
    "plain_resnet": ({}, "PlainResNet", "plain"),
    "plain_lstm": ({}, "PlainLSTM", "plain"),
}
