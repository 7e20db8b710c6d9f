"""What every test shares: no network, one thread, quick type checks, and the test material."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

# Before anything imports huggingface_hub, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import material as _material

# Tests run side by side, one process a core; threads would only get in each other's way.
torch.set_num_threads(1)

_jaxtyped = jaxtyping.jaxtyped


@functools.wraps(_jaxtyped)
def _named_functions_only(*args: Any, **options: Any) -> Any:
    """`jaxtyped` that leaves functions inside functions alone.

    The import hook decorates each function every time it is defined. Our hooks and wrappers are
    defined anew in every forward, and building a checker takes milliseconds: most of the test time
    went there.
    """
    decorate = _jaxtyped(*args, **options)
    if args:
        return decorate
    return lambda f: f if "<locals>" in getattr(f, "__qualname__", "") else decorate(f)


jaxtyping.jaxtyped = _named_functions_only  # type: ignore[assignment]


@pytest.fixture(scope="session")
def material() -> Callable[[str], Path]:
    """Gives the path of one part of the test material, or skips the test."""
    return _material.material


@pytest.fixture
def always_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps share prefixes also where whole rows would be quicker: the engine is tested."""
    monkeypatch.setattr("underhood.core.sweep.pays", lambda *_: True)
