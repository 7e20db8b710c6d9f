"""Families: what the models of the library call their parts, and where they differ; data only.

A new family of models needs nothing, or a word in one of these tables.
"""

# Relative paths by role, in order of preference. Two models never disagree about one path's role.
NAMES: dict[str, tuple[str, ...]] = {
    "attn": (
        "self_attn", "self_attention", "layer.0.SelfAttention", "attn", "attention",
        "shared_transformer.self_attn",
    ),
    "mixer": ("linear_attn", "mamba", "mixer", "temporal_block", "mamba_decoder.mamba", "conv"),
    "cross": ("encoder_attn", "crossattention", "cross_attn", "layer.1.EncDecAttention"),
    "o_proj": ("o_proj", "out_proj", "c_proj", "dense", "proj", "wo", "o", "output.dense"),
    "q_proj": ("q_proj", "q", "query", "wq"),
    "k_proj": ("k_proj", "k", "key", "wk"),
    "v_proj": ("v_proj", "v", "value", "wv"),
    "q_norm": ("q_norm", "q_layernorm", "query_layernorm", "qk_norm"),
    "k_norm": ("k_norm", "k_layernorm", "key_layernorm", "qk_norm"),
    "ln1": (
        "input_layernorm", "ln_1", "ln_attn", "temporal_pre_norm", "layernorm_before",
        "layer_norm1", "norm1", "norm_1", "ln1", "layer.0.layer_norm", "self_attn_layer_norm",
        "norm", "mamba_decoder.input_layernorm", "operator_norm", "attention_layernorm",
        "attn_norm",
    ),
    "ln2": (
        "pre_feedforward_layernorm", "ln_2", "ln_mlp", "pre_ff_layernorm", "channel_pre_norm",
        "layernorm_after", "layer_norm2", "norm2", "norm_2", "ln2", "layer.2.layer_norm",
        "layer.1.layer_norm", "pre_mlp_layernorm", "ffn_norm", "feedforward_layernorm",
        "mlp_norm", "post_attention_layernorm", "final_layer_norm",
    ),
    "post_attn": (
        "post_self_attn_layernorm", "layer_scale1", "post_operator_norm", "post_norm1",
    ),
    "post_mlp": (
        "post_feedforward_layernorm", "post_mlp_layernorm", "layer_scale2", "post_ffn_norm",
        "post_norm2",
    ),
    "mlp": (
        "mlp", "feed_forward", "mlp_block", "ffn", "layer.2.DenseReluDense",
        "layer.1.DenseReluDense", "block_sparse_moe", "shared_mlp",
    ),
    "beside_mlp": ("shared_mlp",),
    "up": (
        "up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "wi_1", "wi", "key", "linear1",
        "intermediate.dense", "w3",
    ),
    "gate": ("gate_proj", "wi_0", "w1"),
    "fused": ("gate_up_proj", "input_linear"),
    "down": (
        "down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "wo", "value", "linear2",
        "output.dense", "w2", "output_linear",
    ),
    "router": ("gate", "router"),
    "final_norm": (
        "norm", "ln_f", "norm_f", "final_layer_norm", "final_layernorm", "final_norm", "ln_out",
        "layernorm", "layer_norm", "post_layernorm", "embedding_norm",
    ),
    "positions": (
        "wpe", "embed_positions", "position_embedding", "position_embeddings", "positions_embed",
    ),
}  # fmt: skip

# BART norms after the sub-layer and Whisper before it, under one name (GPT and GPT-2 likewise): the
# forward's order tells.
AMBIGUOUS_NORMS = ("self_attn_layer_norm", "ln_1")

# Numbers by which a block multiplies what a sub-layer adds, by the sub-layer's role.
MULTIPLIERS = {
    "attn": ("residual_multiplier", "residual_scale", "attn_out_multiplier"),
    "mixer": ("residual_multiplier", "residual_scale", "ssm_out_multiplier"),
    "mlp": ("residual_multiplier", "residual_scale"),
}
# Numbers that change what a sub-layer reads, not what it adds.
INPUT_MULTIPLIERS = ("attention_in_multiplier",)

# Sub-layers whose module adds the residual by itself: what they add is their last projection's.
ADDS_RESIDUAL = ("Bloom", "MptMLP")

# The sums that a post-norm block normalises, in order: what was added, and the norm.
POST_NORMS = (
    ("attn_out", "attention.output.LayerNorm"), ("attn_out", "self_attn_layer_norm"),
    ("cross_attn_out", "encoder_attn_layer_norm"), ("mlp_out", "output.LayerNorm"),
    ("mlp_out", "final_layer_norm"), ("attn_out", "ln_1"), ("mlp_out", "ln_2"),
)  # fmt: skip

# Children by which a block mixes several copies of the stream: its input is no residual stream.
LANES = ("altup", "attn_hc")
# Numbers that a block's forward names and that leave an evaluation pass alone, or are known.
PLAIN_NUMBERS = ("dropout", "residual_multiplier", "residual_scale")
# What a block adds beside its parts where only its code tells: GPT-NeoX Japanese has the attention
# hand its bias out.
ADDS_MORE = ("GPTNeoXJapanese",)
# T5 keeps its sub-layers in a list; in Zamba 2, `linear` leads shared attention into the mixer.
KNOWN_CHILDREN = ("layer", "linear", "pre_ln", "encoder_attn_layer_norm")
# Attentions whose heads are mixtures of experts, or differences of two patterns.
ODD_ATTENTION = ("JetMoe", "DiffLlama")
