"""Fine-tune a few layers of a copy, at low rank, and hand back the difference.

Every matrix of the chosen blocks gets `W + left @ right` of small rank; nothing else is trained,
and the model that was loaded is not touched: the forward passes run on a copy.

    tuned = tune_layers(model, prompts, answers, layers=[3])
    tuned.delta()["model.layers.3.mlp.down_proj.weight"]      # what was added
    tuned.model(model).generate(...)                          # a new model with it
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from underhood.core.errors import NotFinite, NotOffered, OutOfRange
from underhood.core.model import Model
from underhood.core.tokens import Tokens
from underhood.methods.locate._options import at_least

__all__ = ["Tuned", "tune_layers", "tune_tokens"]


@dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning added.

    Attributes:
        factors: Per parameter, `(left, right)`; their product is added to it.
        layers: The blocks that they belong to.
        losses: Mean cross-entropy of each step's batch, nats.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    layers: tuple[int, ...]
    losses: tuple[float, ...]

    def delta(self) -> dict[str, Tensor]:
        """What is added to each parameter, in its own shape."""
        return {name: left @ right for name, (left, right) in self.factors.items()}

    def model(self, model: Model) -> Model:
        """A copy of the model with the difference added; the given one stays as it is."""
        module = copy.deepcopy(model.module)
        weights = dict(module.named_parameters())
        with torch.no_grad():
            for name, change in self.delta().items():
                weights[name].add_(change.to(weights[name]))
        return Model(module, model.tokenizer, name=f"{model.name} tuned", pad_id=model.text.pad_id)

    def sizes(self, model: Model) -> dict[int, float]:
        """Length of each layer's difference, by the length of the weights that it was added to."""
        weights = dict(model.module.named_parameters())
        found = {}
        for layer in self.layers:
            names = set(_matrices(model, [layer]))
            there = [w.detach().float().norm() for n, w in weights.items() if n in names]
            added = [w.float().norm() for n, w in self.delta().items() if n in names]
            found[layer] = float(torch.stack(added).norm() / torch.stack(there).norm())
        return found


def tune_layers(
    model: Model,
    prompts: Sequence[str],
    answers: Sequence[str],
    layers: Sequence[int],
    *,
    rank: int = 1,
    steps: int = 80,
    lr: float = 3e-3,
    rows: int = 32,
    seed: int = 0,
) -> Tuned:
    """Tune some layers of a copy to give these answers.

    Args:
        model: The model; it is not changed.
        prompts: Prompts.
        answers: What should come next, one token each.
        layers: Blocks to tune.
        rank: Of each matrix's difference.
        steps: AdamW steps.
        lr: Its learning rate.
        rows: Prompts in a step.
        seed: Of the start and of the batches.

    Raises:
        OutOfRange: A layer that the model lacks; fewer than one step, row or rank.
        NotOffered: Blocks without floating-point matrices.
        NotFinite: The loss is not a number.

    Cost: `steps` forwards and backwards of `rows` prompts, and one copy of the weights.
    """
    ids = torch.tensor([model.token_id(text) for text in answers])
    return tune_tokens(
        model, model.tokens(list(prompts)), ids, layers,
        rank=rank, steps=steps, lr=lr, rows=rows, seed=seed,
    )  # fmt: skip


def tune_tokens(
    model: Model,
    tokens: Tokens,
    answers: Int[Tensor, " batch"],
    layers: Sequence[int],
    *,
    rank: int,
    steps: int,
    lr: float,
    rows: int = 32,
    seed: int,
) -> Tuned:
    """`tune_layers`, for prompts and answers that are ids already."""
    at_least(1, rank=rank, steps=steps, rows=rows)
    for layer in layers:
        if not 0 <= layer < model.n_layers:
            raise OutOfRange(
                f"there is no layer {layer}",
                given=f"{model.n_layers} layers",
                do=f"use 0 to {model.n_layers - 1}",
            )
    worker = Model(copy.deepcopy(model.module).eval(), model.tokenizer, pad_id=model.text.pad_id)
    worker.module.requires_grad_(False)
    frozen = {name: worker.module.get_parameter(name) for name in _matrices(worker, layers)}
    factors = _start(frozen, rank, seed)
    flat = [factor for pair in factors.values() for factor in pair]
    optimizer = torch.optim.AdamW(flat, lr=lr, weight_decay=0.0)
    make, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        chosen = torch.randperm(len(tokens), generator=make)[:rows]
        logits = _logits(worker, _chosen(tokens, chosen), frozen, factors)
        loss = nn.functional.cross_entropy(logits.float(), answers[chosen].to(logits.device))
        if not bool(torch.isfinite(loss)):
            raise NotFinite("the tuning loss is not a number", given=f"lr={lr}", do="lower lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    found = {name: (a.detach(), b.detach()) for name, (a, b) in factors.items()}
    return Tuned(found, tuple(layers), tuple(losses))


def _matrices(model: Model, layers: Sequence[int]) -> list[str]:
    """Names of the matrices of some blocks."""
    blocks = model.anatomy.stacks[model.main].blocks
    paths = tuple(f"{blocks[layer].path}." for layer in layers)
    found = [
        name
        for name, p in model.module.named_parameters()
        if name.startswith(paths) and p.ndim == 2 and p.is_floating_point()
    ]
    if not found:
        raise NotOffered(
            "these layers have no matrices to tune",
            given=f"layers {list(layers)} of {model!r}",
            why="their weights are quantised, or not two-dimensional",
            do="use an edit instead: tune=0",
        )
    return found


def _start(
    frozen: dict[str, nn.Parameter], rank: int, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors whose product is zero: the left one random, the right one zero."""
    make, found = torch.Generator().manual_seed(seed), {}
    for name, weight in frozen.items():
        left = torch.randn(weight.shape[0], rank, generator=make) / weight.shape[0] ** 0.5
        right = torch.zeros(rank, weight.shape[1])
        found[name] = tuple(
            factor.to(weight.device, torch.float32).requires_grad_() for factor in (left, right)
        )
    return found


def _chosen(tokens: Tokens, rows: Int[Tensor, " n"]) -> Tokens:
    return Tokens(tokens.ids[rows], tokens.mask[rows])


def _logits(
    worker: Model,
    tokens: Tokens,
    frozen: dict[str, nn.Parameter],
    factors: dict[str, tuple[Tensor, Tensor]],
) -> Float[Tensor, "row vocab"]:
    """Logits at the last token with the factors' products added."""
    _, given = worker.batch(tokens)
    weights = {n: w + (factors[n][0] @ factors[n][1]).to(w.dtype) for n, w in frozen.items()}
    output = functional_call(worker.module, weights, (), given)
    ends = torch.tensor([a + b - 1 for a, b in zip(tokens.starts, tokens.lengths, strict=True)])
    return output.logits[torch.arange(len(ends)), ends.to(output.logits.device)]
