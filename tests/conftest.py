"""What every test shares: no network, and the test material."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Before anything imports huggingface_hub, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import material as _material


@pytest.fixture(scope="session")
def material() -> Callable[[str], Path]:
    """Gives the path of one part of the test material, or skips the test."""
    return _material.material
