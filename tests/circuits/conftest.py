"""Pairs of random prompts for tiny random models."""

from functools import cache

import pytest
import torch

import underhood as uh
from underhood.circuits.wiring import Wiring
from underhood.data import EncodedPairs, Metric, metric_named

LENGTH, SHARED = 7, 2


@cache
def _wiring(family: str) -> Wiring:
    return Wiring(uh.load(f"random/{family}"))


@cache
def _pairs(family: str, rows: int = 3, seed: int = 0) -> EncodedPairs:
    model = _wiring(family).model
    make = torch.Generator().manual_seed(seed)
    clean, contrast = torch.randint(8, 99, (2, rows, LENGTH), generator=make).unbind(0)
    contrast = torch.cat([clean[:, :SHARED], contrast[:, SHARED:]], 1)
    answers, wrong = torch.randint(8, 99, (2, rows, 1), generator=make).unbind(0)
    one, other = (model.text.of_ids(ids, None) for ids in (clean, contrast))
    return EncodedPairs(one, other, answers, wrong, [SHARED] * rows)


@pytest.fixture(scope="session")
def wiring_of():
    """A tiny random model's wiring, by family."""
    return _wiring


@pytest.fixture(scope="session")
def pairs_of():
    """Random pairs for a family: `(family, rows, seed)`."""
    return _pairs


@pytest.fixture(scope="session")
def metric() -> Metric:
    """The logit difference."""
    return metric_named("logit_diff")
