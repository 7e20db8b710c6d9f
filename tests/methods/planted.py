"""A llama in which a few heads do all the work, planted by hand; words of `random_models`."""

from typing import Any

import torch
from random_models import random_model

from underhood.core.model import Model
from underhood.data import Pairs


def planted(heads: list[tuple[int, int, int]], labels: dict[str, dict[int, float]]) -> Model:
    """Every head looks everywhere alike and writes nothing, but for the planted ones.

    Args:
        heads: (layer, head, channel): the head moves that channel of the embedding to the answer.
        labels: Words and their coordinates in the channels; the word after (`w10` -> `w40`) is the
            answer that points the same way.
    """
    model = random_model("llama")
    net: Any = model.module
    width = net.config.hidden_size
    channels = 1 + max(channel for _, _, channel in heads)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.0 if parameter.ndim == 2 else 1.0)
        for name, parameter in net.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
        embed, out = net.model.embed_tokens.weight, net.lm_head.weight
        embed[:, width - 1] = 4.0  # what all tokens share, so that the norms do the same to all
        make = torch.Generator().manual_seed(0)
        embed[:, width - 5 : width - 1] = 0.1 * torch.randn(len(embed), 4, generator=make)
        for word, coordinates in labels.items():
            token = model.token_id(word)
            answer = model.token_id(f"w{int(word[1:]) + 30}")
            for channel, value in coordinates.items():
                embed[token, channel] = value
                out[answer, channels + channel] = value
        for layer, head, channel in heads:
            attention = net.model.layers[layer].self_attn
            size = attention.head_dim
            group = head // attention.num_key_value_groups
            attention.v_proj.weight[group * size + channel, channel] = 10.0
            attention.o_proj.weight[channels + channel, head * size + channel] = 1.0
    return model


def pairs_of(labels: list[str], n: int, *, seed: int = 0) -> Pairs:
    """`n` prompts `filler label filler filler` with another of the labels as contrast."""
    make = torch.Generator().manual_seed(seed)

    def draw(size: int) -> int:
        return int(torch.randint(0, size, (1,), generator=make))

    rows: list[tuple[str, str, str, str]] = []
    for number in range(n):
        one = labels[number % len(labels)]
        rest = [word for word in labels if word != one]
        other = rest[draw(len(rest))]
        a, b, c = (f"w{70 + draw(20)}" for _ in range(3))
        answers = [f"w{int(word[1:]) + 30}" for word in (one, other)]
        rows.append((f"{a} {one} {b} {c}", f"{a} {other} {b} {c}", answers[0], answers[1]))
    clean, contrast, right, wrong = (list(column) for column in zip(*rows, strict=True))
    return Pairs(clean, contrast, right, wrong)
