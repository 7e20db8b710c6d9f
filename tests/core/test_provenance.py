"""The fingerprint of a model's weights sees every value, wherever it is kept and however."""

import pytest
import torch
from torch import nn

import underhood as uh
from underhood.core.provenance import WORDS, fingerprint


class Box(nn.Module):
    """A module that holds one tensor."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.held = nn.Buffer(value)


def big(dtype: torch.dtype = torch.float32, n: int = 5 * 2 * WORDS + 3) -> torch.Tensor:
    """Some rows of the table, and a rest that fills none."""
    make = torch.Generator().manual_seed(0)
    return (torch.randn(n, generator=make) * 50).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8])
def test_one_value_anywhere_is_seen(dtype):
    value = big(dtype, 5 * 8 * WORDS + 3)
    seen = {fingerprint(Box(value))}
    places = (0, 1, 4097, len(value) // 2, len(value) - 4097, len(value) - 1)
    for place in places:
        other = value.clone()
        other[place] += 1
        seen.add(fingerprint(Box(other)))
    assert len(seen) == 1 + len(places)


def test_values_that_change_places_are_seen():
    value = big()
    seen = {fingerprint(Box(value))}
    # The same sum; the same row; the same column; words, halves of words, and whole rows swapped.
    for a, b, n in (
        (9000, 9001, 1),
        (9000, 9002, 2),
        (9000, 9000 + 2 * WORDS, 2),
        (0, 2 * WORDS, 2 * WORDS),
    ):
        other = value.clone()
        other[a : a + n], other[b : b + n] = value[b : b + n], value[a : a + n]
        seen.add(fingerprint(Box(other)))
    assert len(seen) == 5


def test_equal_weights_are_equal_however_they_lie():
    value = big()
    padded = torch.cat([torch.zeros(1), value])[1:]  # starts in the middle of a word
    square = value[: 2 * WORDS * 4].view(4, -1)
    assert fingerprint(Box(padded)) == fingerprint(Box(value))
    assert fingerprint(Box(square.T.contiguous().T)) == fingerprint(Box(square))
    assert fingerprint(Box(square)) != fingerprint(Box(square.T))
    assert fingerprint(Box(torch.empty(0))) != fingerprint(Box(torch.empty(1, device="meta")))


def test_a_change_in_the_middle_of_a_model_is_seen():
    model = uh.load()
    before = fingerprint(model.module)
    name, weight = max(model.module.named_parameters(), key=lambda row: row[1].numel())
    middle = weight.detach().view(-1)[weight.numel() // 2 : weight.numel() // 2 + 1]
    kept = middle.clone()
    middle += 1e-3
    assert fingerprint(model.module) != before, name
    middle.copy_(kept)
    assert fingerprint(model.module) == before
