"""From a board to a Hugging Face model: weights copied into the family's own layout.

The model is the library's own class with its own forward (GPT2LMHeadModel, LlamaForCausalLM,
GPTNeoXForCausalLM). Its norms are RMSNorms that divide by the root of `mean(x^2) + 2^40` and
multiply by 2^20: as long as `mean(x^2)` is below 2^16, `mean(x^2) + 2^40` is 2^40 in float32 and
the norm is the identity, bit for bit. So the stream is a plain sum, and every site of a norm still
exists. GPT-2 and GPT-NeoX have LayerNorms of their own, which `from_pretrained` would put back.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underhood.core.loading import from_module
from underhood.core.model import Model
from underhood.organisms.wired_board import ROPE_BASE, ROTARY, Board
from underhood.organisms.words import SPECIAL, whole_words

__all__ = ["build"]

_FACTOR = 2.0**20


def build(board: Board, name: str) -> Model:
    """A loaded model with a tokenizer of whole words, `<bos>` first. Cost: milliseconds."""
    make = {"gpt2": _gpt2, "llama": _llama, "gpt_neox": _neox}[board.family]
    # Fresh models draw random weights; the caller's generator is none of their business.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        module = make(board)
    return from_module(
        module.float().eval(), whole_words(board.vocab, board.size.context), name=f"wired/{name}"
    )


def _special(board: Board) -> dict[str, Any]:
    """Config values that all families share."""
    return {
        "vocab_size": len(board.vocab),
        "pad_token_id": SPECIAL.index("<pad>"),
        "bos_token_id": SPECIAL.index("<bos>"),
        "eos_token_id": SPECIAL.index("<eos>"),
        "tie_word_embeddings": False,
    }


def _joined(weights: Float[Tensor, "head d h"]) -> Float[Tensor, "d features"]:
    """Heads side by side: [head d h] -> [d head*h]."""
    return weights.transpose(0, 1).flatten(1)


def _norm(board: Board) -> nn.RMSNorm:
    """A norm that is the identity in float32; see the module's docstring."""
    norm = nn.RMSNorm(board.width, eps=_FACTOR**2)
    norm.weight.fill_(_FACTOR)
    return norm


def _gpt2(board: Board) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = board.size
    module: Any = GPT2LMHeadModel(
        GPT2Config(
            n_positions=size.context,
            n_embd=board.width,
            n_layer=size.layers,
            n_head=size.heads,
            n_inner=size.neurons,
            activation_function=size.activation,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            **_special(board),
        )
    )
    core = module.transformer
    core.wte.weight.copy_(board.embed)
    core.wpe.weight.copy_(board.positions)
    for i, block in enumerate(core.h):
        block.ln_1, block.ln_2 = _norm(board), _norm(board)
        # Conv1D keeps [in, out].
        parts = [_joined(w[i]) for w in (board.q, board.k, board.v)]
        block.attn.c_attn.weight.copy_(torch.cat(parts, 1))
        biases = [b[i].flatten() for b in (board.q_bias, board.k_bias, board.v_bias)]
        block.attn.c_attn.bias.copy_(torch.cat(biases))
        block.attn.c_proj.weight.copy_(board.o[i].flatten(0, 1))
        block.attn.c_proj.bias.zero_()
        block.mlp.c_fc.weight.copy_(board.mlp_in[i])
        block.mlp.c_fc.bias.copy_(board.mlp_bias[i])
        block.mlp.c_proj.weight.copy_(board.mlp_out[i])
        block.mlp.c_proj.bias.zero_()
    core.ln_f = _norm(board)
    module.lm_head.weight.copy_(board.unembed.T)
    return module


def _llama(board: Board) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = board.size
    module: Any = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=board.width,
            intermediate_size=size.neurons,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=board.kv_heads,
            head_dim=size.d_head,
            max_position_embeddings=size.context,
            hidden_act=size.activation,
            rms_norm_eps=_FACTOR**2,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE["llama"]},
            **_special(board),
        )
    )
    core = module.model
    core.embed_tokens.weight.copy_(board.embed)
    for i, block in enumerate(core.layers):
        block.input_layernorm.weight.fill_(_FACTOR)
        block.post_attention_layernorm.weight.fill_(_FACTOR)
        attention = block.self_attn
        for name, weight, bias in (
            ("q_proj", board.q, board.q_bias),
            ("k_proj", board.k, board.k_bias),
            ("v_proj", board.v, board.v_bias),
        ):
            linear = getattr(attention, name)
            linear.weight.copy_(_joined(weight[i]).T)
            linear.bias.copy_(bias[i].flatten())
        attention.o_proj.weight.copy_(board.o[i].flatten(0, 1).T)
        attention.o_proj.bias.zero_()
        # The gate alone computes; the other factor is constantly one.
        block.mlp.gate_proj.weight.copy_(board.mlp_in[i].T)
        block.mlp.gate_proj.bias.copy_(board.mlp_bias[i])
        block.mlp.up_proj.weight.zero_()
        block.mlp.up_proj.bias.fill_(1.0)
        block.mlp.down_proj.weight.copy_(board.mlp_out[i].T)
        block.mlp.down_proj.bias.zero_()
    core.norm.weight.fill_(_FACTOR)
    module.lm_head.weight.copy_(board.unembed.T)
    return module


def _neox(board: Board) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    size = board.size
    module: Any = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=board.width,
            intermediate_size=size.neurons,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=size.context,
            hidden_act=size.activation,
            use_parallel_residual=True,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": ROPE_BASE["gpt_neox"],
                "partial_rotary_factor": ROTARY / size.d_head,
            },
            **_special(board),
        )
    )
    core = module.gpt_neox
    core.embed_in.weight.copy_(board.embed)
    for i, block in enumerate(core.layers):
        block.input_layernorm, block.post_attention_layernorm = _norm(board), _norm(board)
        # Rows run head by head, and within a head q, k, v: [head 3*h d].
        fused = torch.cat([w[i] for w in (board.q, board.k, board.v)], 2).transpose(1, 2)
        block.attention.query_key_value.weight.copy_(fused.flatten(0, 1))
        biases = torch.cat([b[i] for b in (board.q_bias, board.k_bias, board.v_bias)], 1)
        block.attention.query_key_value.bias.copy_(biases.flatten())
        block.attention.dense.weight.copy_(board.o[i].flatten(0, 1).T)
        block.attention.dense.bias.zero_()
        block.mlp.dense_h_to_4h.weight.copy_(board.mlp_in[i].T)
        block.mlp.dense_h_to_4h.bias.copy_(board.mlp_bias[i])
        block.mlp.dense_4h_to_h.weight.copy_(board.mlp_out[i].T)
        block.mlp.dense_4h_to_h.bias.zero_()
    core.final_layer_norm = _norm(board)
    module.lm_head.weight.copy_(board.unembed.T)
    return module
