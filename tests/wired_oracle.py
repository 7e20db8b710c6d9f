"""Single-edge ablation written plainly: an oracle for fast engines, independent of the library.

It reads the weights of a GPT-2, Llama or GPT-NeoX whose norms do nothing, has its own forward in
float64, keeps what every node adds to the stream apart, and gives each destination its own sum of
them. Ablating an edge exchanges one addend of one destination. No hooks, no batching of edges, no
cache: one whole forward an edge.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Outputs = dict[str, Tensor]


@dataclass
class Layer:
    """Weights of one block, `[in, out]`, split by heads."""

    q: Tensor  # [head d h]
    k: Tensor  # [kv d h]
    v: Tensor
    o: Tensor  # [head h d]
    q_bias: Tensor  # [head h]
    k_bias: Tensor
    v_bias: Tensor
    o_bias: Tensor  # [d]
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor


class Oracle:
    """A hand-written forward of a model whose norms are identities in float32."""

    def __init__(self, module: nn.Module) -> None:
        config: Any = module.config
        head: Any = module.get_submodule("lm_head")
        self.family = config.model_type
        self.heads = config.num_attention_heads
        self.width = config.hidden_size
        self.act = "relu"
        self.layers = [getattr(self, self.family)(b) for b in self._blocks(module)]
        self.h = self.layers[0].q.shape[-1]
        self.kv = self.layers[0].k.shape[0]
        self.parallel = self.family == "gpt_neox"
        self.unembed = head.weight.detach().double().T

    def _blocks(self, module: Any) -> list[Any]:
        config = module.config
        if self.family == "gpt2":
            self.embed = module.transformer.wte.weight.detach().double()
            self.positions = module.transformer.wpe.weight.detach().double()
            self.act = config.activation_function
            return list(module.transformer.h)
        core = module.model if self.family == "llama" else module.gpt_neox
        embed = core.embed_tokens if self.family == "llama" else core.embed_in
        self.embed = embed.weight.detach().double()
        self.positions = None
        self.act = config.hidden_act
        self.frequencies = core.rotary_emb.inv_freq.double()
        return list(core.layers)

    def gpt2(self, block: Any) -> Layer:
        d, heads = self.width, self.heads
        weight = block.attn.c_attn.weight.detach().double().reshape(d, 3, heads, -1)
        bias = block.attn.c_attn.bias.detach().double().reshape(3, heads, -1)
        q, k, v = weight.permute(1, 2, 0, 3)
        return Layer(
            q, k, v,
            block.attn.c_proj.weight.detach().double().reshape(heads, -1, d),
            bias[0], bias[1], bias[2],
            block.attn.c_proj.bias.detach().double(),
            block.mlp.c_fc.weight.detach().double(), block.mlp.c_fc.bias.detach().double(),
            block.mlp.c_proj.weight.detach().double(), block.mlp.c_proj.bias.detach().double(),
        )  # fmt: skip

    def llama(self, block: Any) -> Layer:
        d, core = self.width, block.self_attn
        h = core.head_dim
        linears = (core.q_proj, core.k_proj, core.v_proj)
        q, k, v = (m.weight.detach().double().reshape(-1, h, d).transpose(1, 2) for m in linears)
        biases = [m.bias.detach().double().reshape(-1, h) for m in linears]
        assert not bool((block.mlp.up_proj.weight != 0).any())
        assert bool((block.mlp.up_proj.bias == 1).all())
        return Layer(
            q, k, v,
            core.o_proj.weight.detach().double().T.reshape(self.heads, h, d),
            biases[0], biases[1], biases[2],
            core.o_proj.bias.detach().double(),
            block.mlp.gate_proj.weight.detach().double().T,
            block.mlp.gate_proj.bias.detach().double(),
            block.mlp.down_proj.weight.detach().double().T,
            block.mlp.down_proj.bias.detach().double(),
        )  # fmt: skip

    def gpt_neox(self, block: Any) -> Layer:
        d, heads, core = self.width, self.heads, block.attention
        weight = core.query_key_value.weight.detach().double().reshape(heads, 3, -1, d)
        bias = core.query_key_value.bias.detach().double().reshape(heads, 3, -1)
        q, k, v = (weight[:, i].transpose(1, 2) for i in range(3))
        return Layer(
            q, k, v,
            core.dense.weight.detach().double().T.reshape(heads, -1, d),
            bias[:, 0], bias[:, 1], bias[:, 2], core.dense.bias.detach().double(),
            block.mlp.dense_h_to_4h.weight.detach().double().T,
            block.mlp.dense_h_to_4h.bias.detach().double(),
            block.mlp.dense_4h_to_h.weight.detach().double().T,
            block.mlp.dense_4h_to_h.bias.detach().double(),
        )  # fmt: skip

    # Forward -------------------------------------------------------------------------------------

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding of `[batch pos h]`, by complex numbers."""
        if self.positions is not None:
            return x
        n = len(self.frequencies)
        angle = torch.arange(x.shape[1]).double()[:, None] * self.frequencies
        turned = torch.complex(x[..., :n], x[..., n : 2 * n]) * torch.exp(1j * angle)
        return torch.cat([turned.real, turned.imag, x[..., 2 * n :]], -1)

    def forward(
        self, ids: Tensor, edits: dict[str, Tensor] | None = None,
        nodes: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Outputs]:  # fmt: skip
        """Logits of the last position, and what each node wrote.

        Args:
            ids: `[batch pos]`, without padding.
            edits: Edge -> what its destination receives from its source instead.
            nodes: Node -> what it writes instead, to everyone.
        """
        edits, nodes = edits or {}, nodes or {}
        biases = torch.zeros(self.width, dtype=torch.float64)
        start = self.embed[ids]
        if self.positions is not None:
            start = start + self.positions[: ids.shape[1]]
        out: Outputs = {"input": start} | {n: v for n, v in nodes.items() if n == "input"}

        def stream(target: str, sources: list[str]) -> Tensor:
            total = biases.expand_as(start)
            for source in sources:
                edge = f"{source}->{target}"
                total = total + (edits[edge] if edge in edits else out[source])
            return total

        for i, layer in enumerate(self.layers):
            before = list(out)
            for head in range(self.heads):
                group = head * self.kv // self.heads
                q = stream(f"a{i}.h{head}<q>", before) @ layer.q[head] + layer.q_bias[head]
                k = stream(f"a{i}.h{group}<k>", before) @ layer.k[group] + layer.k_bias[group]
                v = stream(f"a{i}.h{group}<v>", before) @ layer.v[group] + layer.v_bias[group]
                scores = self.rotate(q) @ self.rotate(k).transpose(1, 2) / self.h**0.5
                future = torch.ones(scores.shape[1:]).triu(1).bool()
                pattern = scores.masked_fill(future, -torch.inf).softmax(-1)
                name = f"a{i}.h{head}"
                out[name] = nodes[name] if name in nodes else pattern @ v @ layer.o[head]
            here = before if self.parallel else list(out)
            if not self.parallel:
                biases = biases + layer.o_bias
            hidden = stream(f"m{i}", here) @ layer.up + layer.up_bias
            hidden = hidden.relu() if self.act == "relu" else hidden
            out[f"m{i}"] = nodes[f"m{i}"] if f"m{i}" in nodes else hidden @ layer.down
            biases = biases + layer.down_bias + (layer.o_bias if self.parallel else 0)
        return stream("logits", list(out))[:, -1] @ self.unembed, out


def difference(logits: Tensor, answers: Tensor, wrong: Tensor) -> Tensor:
    """Logit of the answer minus that of the wrong answer, per row."""
    return (logits.gather(1, answers) - logits.gather(1, wrong))[:, 0]


@dataclass
class Effects:
    """Per edge the mean change and the mean absolute change of the logit difference.

    Attributes:
        signed: Mean over rows of edited minus clean.
        size: Mean over rows of its absolute value.
        range: Mean clean minus mean contrast logit difference.
    """

    signed: dict[str, float]
    size: dict[str, float]
    range: float

    def above(self, share: float) -> set[str]:
        """Edges whose mean absolute effect exceeds this share of the range."""
        return {edge for edge, size in self.size.items() if size > share * abs(self.range)}


def single_edges(module: nn.Module, edges: tuple[str, ...], encoded: Any, kind: str) -> Effects:
    """Ablate every edge by itself, with the contrast prompt's value or with zeros."""
    oracle = Oracle(module)
    clean, out = oracle.forward(encoded.clean.ids)
    contrast, other = oracle.forward(encoded.contrast.ids)
    base = difference(clean, encoded.answers, encoded.wrong)
    span = base - difference(contrast, encoded.answers, encoded.wrong)
    signed, size = {}, {}
    for edge in edges:
        source = edge.split("->")[0]
        value = other[source] if kind == "resample" else torch.zeros_like(out[source])
        logits, _ = oracle.forward(encoded.clean.ids, {edge: value})
        change = difference(logits, encoded.answers, encoded.wrong) - base
        signed[edge], size[edge] = float(change.mean()), float(change.abs().mean())
    return Effects(signed, size, float(span.mean()))
