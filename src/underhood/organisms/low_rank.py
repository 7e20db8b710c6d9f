"""Low-rank additions to the linear layers of a model's blocks: W + B A (LoRA, Hu et al., 2021)."""

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["add", "merge", "save"]


class _Added(nn.Module):
    """A weight plus `up @ down`; nothing is added at first."""

    def __init__(self, weight: Float[Tensor, "out in"], rank: int) -> None:
        super().__init__()
        out, size = weight.shape
        self.up = nn.Parameter(torch.zeros(out, rank))
        self.down = nn.Parameter(torch.randn(rank, size) * size**-0.5)

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The weight that the layer uses."""
        return weight + self.up @ self.down


def add(module: nn.Module, rank: int) -> None:
    """Freeze a module and give each linear layer of its blocks a trainable addition."""
    module.requires_grad_(False)
    for _, layer in list(_layers(module)):
        parametrize.register_parametrization(layer, "weight", _Added(layer.weight, rank))


def save(module: nn.Module, path: Path) -> None:
    """Write the additions alone, in float16, by the names of their layers."""
    kept = {}
    for name, part in module.named_modules():
        if isinstance(part, _Added):
            layer = name.removesuffix(".parametrizations.weight.0")
            kept[f"{layer}.up"], kept[f"{layer}.down"] = part.up.detach(), part.down.detach()
    save_file({name: value.half().contiguous() for name, value in kept.items()}, path)


def merge(module: nn.Module, path: Path) -> None:
    """Add what `save` wrote to the weights of a plain module."""
    kept = load_file(path)
    with torch.no_grad():
        for name, layer in _layers(module):
            more = kept[f"{name}.up"].float() @ kept[f"{name}.down"].float()
            layer.weight += more.to(layer.weight)


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers but the unembedding, which lies outside of the blocks."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) and "." in name:
            yield name, part
