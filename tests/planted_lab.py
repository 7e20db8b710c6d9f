"""Plain torch on a GPT-2 of transformers: what tests of planted facts read and change, by hooks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from underhood.organisms.planted_organism import Planted

Change = tuple[nn.Module, bool, Callable[[Tensor, Tensor], Tensor]]
"""A module; whether its input is changed, or else its output; the new value, from input and old."""


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


@contextmanager
def changed(changes: Iterable[Change]) -> Iterator[None]:
    """The module with some values exchanged, for as long as the block lasts."""
    with ExitStack() as stack:
        for module, before, change in changes:
            if before:

                def enter(_: Any, args: Any, change: Any = change) -> Any:
                    return (change(args[0], args[0]), *args[1:])

                handle = module.register_forward_pre_hook(enter)
            else:

                def leave(_: Any, args: Any, out: Any, change: Any = change) -> Any:
                    new = change(args[0] if args else _first(out), _first(out))
                    return (new, *out[1:]) if isinstance(out, tuple) else new

                handle = module.register_forward_hook(leave)
            stack.callback(handle.remove)
        yield


class Lab:
    """One organism, its blocks and its weights."""

    def __init__(self, organism: Planted) -> None:
        self.organism = organism
        self.module: Any = organism.model.module
        self.tokenizer: Any = organism.model.tokenizer
        self.blocks = list(self.module.transformer.h)
        self.heads = self.module.config.n_head
        self.width = self.module.config.n_embd
        self.size = self.width // self.heads
        self.embed = self.module.transformer.wte.weight.detach()
        self.unembed = self.module.lm_head.weight.detach().T

    # Prompts

    def ids(self, texts: Iterable[str]) -> Tensor:
        """Ids of texts of one length."""
        return torch.tensor(self.tokenizer(list(texts))["input_ids"])

    def token(self, word: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(word)

    def pairs(self, task: str, n: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids of clean and contrast prompts, of answers and of wrong answers."""
        pairs = self.organism.pairs(task, n, seed=9)
        answer, wrong = (
            torch.tensor([self.token(str(word)) for (word,) in some])
            for some in (pairs.answers, pairs.wrong)
        )
        return self.ids(pairs.clean), self.ids(pairs.contrast), answer, wrong

    # Running

    def logits(self, ids: Tensor, *changes: Change) -> Tensor:
        """Logits after the last word."""
        with torch.no_grad(), changed(changes):
            return self.module(input_ids=ids).logits[:, -1]

    def answers(self, ids: Tensor, *changes: Change) -> Tensor:
        return self.logits(ids, *changes).argmax(-1)

    def lost(self, task: str, *changes: Change) -> float:
        """Mean loss of the answer's logit over the wrong one's."""
        ids, _, answer, wrong = self.pairs(task)
        rows = torch.arange(len(ids))
        one, two = self.logits(ids), self.logits(ids, *changes)
        gap = (one - two)[rows, answer] - (one - two)[rows, wrong]
        return float(gap.mean())

    def lost_answer(self, task: str, *changes: Change) -> float:
        """Mean loss of the answer's logit alone."""
        ids, _, answer, _ = self.pairs(task)
        change = self.logits(ids) - self.logits(ids, *changes)
        return float(change[torch.arange(len(ids)), answer].mean())

    def turned(self, task: str, *changes: Change) -> float:
        """Share of answers that turn into the wrong one."""
        ids, _, _, wrong = self.pairs(task)
        return float((self.answers(ids, *changes) == wrong).float().mean())

    def wrong(self, task: str, *changes: Change) -> float:
        """Share of prompts whose answer is lost."""
        ids, _, answer, _ = self.pairs(task)
        return float((self.answers(ids, *changes) != answer).float().mean())

    def values(
        self, ids: Tensor, module: nn.Module, *changes: Change, before: bool = False
    ) -> Tensor:
        """What a module reads or writes."""
        found: list[Tensor] = []

        def keep(_: Tensor, value: Tensor) -> Tensor:
            found.append(value)
            return value

        self.logits(ids, *changes, (module, before, keep))
        return found[0]

    def stream(self, ids: Tensor, layer: int, *changes: Change) -> Tensor:
        """resid_post of a block."""
        return self.values(ids, self.blocks[layer], *changes)

    # Heads, from weights

    def qkv(self, ids: Tensor, layer: int) -> list[Tensor]:
        """Queries, keys and values `[prompt, head, position, size]`."""
        made = self.values(ids, self.blocks[layer].attn.c_attn)
        return [part.unflatten(-1, (self.heads, self.size)).transpose(1, 2)
                for part in made.split(self.width, -1)]  # fmt: skip

    def pattern(self, ids: Tensor, layer: int, head: int) -> Tensor:
        """Attention `[prompt, query, key]`."""
        query, key, _ = self.qkv(ids, layer)
        scores = query[:, head] @ key[:, head].transpose(1, 2) / self.size**0.5
        hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
        return scores.masked_fill(hidden, -torch.inf).softmax(-1)

    def ov(self, layer: int, head: int) -> Tensor:
        """W_V W_O `[d, d]`."""
        attention = self.blocks[layer].attn
        own = slice(head * self.size, (head + 1) * self.size)
        value = attention.c_attn.weight.detach()[:, 2 * self.width :][:, own]
        return value @ attention.c_proj.weight.detach()[own]

    # Changes

    def no_head(self, layer: int, head: int) -> Change:
        """A head that writes nothing."""
        keep = torch.ones(self.width)
        keep[head * self.size : (head + 1) * self.size] = 0.0
        return self.blocks[layer].attn.c_proj, True, lambda _, z: z * keep

    def silent(self, layer: int, neurons: Iterable[int]) -> Change:
        """Neurons that stay at zero."""
        keep = torch.ones(len(self.blocks[layer].mlp.c_proj.weight))
        keep[list(neurons)] = 0.0
        return self.blocks[layer].mlp.c_proj, True, lambda _, acts: acts * keep

    def skip(self, layer: int) -> Change:
        """A block that passes on what it reads."""
        return self.blocks[layer], False, lambda x, _: x

    def last(self, layer: int, change: Callable[[Tensor], Tensor]) -> Change:
        """The last word's stream after a block, changed."""
        return self.blocks[layer], False, lambda _, x: torch.cat([x[:, :-1], change(x[:, -1:])], 1)

    def without(self, layer: int, direction: Tensor) -> Change:
        """A unit direction projected out of the last word's stream after a block."""
        return self.last(layer, lambda x: x - (x @ direction)[..., None] * direction)

    def other_heads(self, layer: int, head: int) -> list[tuple[int, int]]:
        """All heads but one."""
        every = [(i, j) for i in range(len(self.blocks)) for j in range(self.heads)]
        return [place for place in every if place != (layer, head)]
