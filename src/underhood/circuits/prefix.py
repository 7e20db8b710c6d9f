"""Columns that both prompts of every pair begin with: run once, their keys and values kept.

There the two runs hold the same, so that nothing they write differs and every score is 0. Passes
over the later columns continue from the cache.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from underhood.core.growing import why_not
from underhood.core.model import Model
from underhood.core.tokens import Tokens
from underhood.data import EncodedPairs

__all__ = ["Prefix"]


class Prefix:
    """The keys and values of the first columns of some pairs.

    Args:
        model: The model.
        pairs: The pairs, of one length.
        start: How many columns both prompts of each pair have in common.

    Attributes:
        pairs: The pairs without these columns.
    """

    def __init__(self, model: Model, pairs: EncodedPairs, start: int) -> None:
        ids = pairs.clean.ids
        given = {"input_ids": ids[:, :start].to(model.device), "use_cache": True}
        with torch.no_grad():
            self._cache: Any = model.run(given | {"logits_to_keep": 1}).output.past_key_values
        more = ids.shape[1] - start
        self._cache.layers = [
            _Roomy(layer, more) if type(layer) is DynamicLayer else layer
            for layer in self._cache.layers
        ]
        sides = [Tokens(t.ids[:, start:], t.mask[:, start:]) for t in (pairs.clean, pairs.contrast)]
        first = [n - start for n in pairs.first_difference]
        self.pairs = EncodedPairs(sides[0], sides[1], pairs.answers, pairs.wrong, first)

    @staticmethod
    def columns(model: Model, pairs: EncodedPairs) -> int:
        """How many columns can be left to a cache; 0 where the model or the padding forbids it."""
        if not bool(pairs.clean.mask.all()) or why_not(model, []) is not None:
            return 0
        return min(*pairs.first_difference, pairs.clean.ids.shape[1] - 1)

    def cache(self) -> Any:
        """A cache for one pass. What it adds is lost in the next: one pass after the other."""
        new = copy.copy(self._cache)
        new.layers = [copy.copy(layer) for layer in self._cache.layers]
        return new


class _Roomy(DynamicLayer):
    """Keys and values with room for those of one pass, which are written beside them.

    Joined anew in each pass, they would be held twice, and as long as the pass's graph.
    """

    def __init__(self, layer: DynamicLayer, more: int) -> None:
        super().__init__()
        vars(self).update(vars(layer))
        self.start, self.rooms = layer.get_seq_length(), []
        for value in (layer.keys, layer.values):
            assert value is not None
            room = value.new_empty(*value.shape[:2], self.start + more, value.shape[-1])
            room[:, :, : self.start] = value
            self.rooms.append(room)
        self.keys, self.values = (room[:, :, : self.start] for room in self.rooms)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all columns."""
        keys, values = (room.detach() for room in self.rooms)
        keys[:, :, self.start :] = key_states
        values[:, :, self.start :] = value_states
        self.keys, self.values = keys, values
        return keys, values
