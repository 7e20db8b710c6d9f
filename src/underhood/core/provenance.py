"""Where a number comes from: model, weights, versions, the call."""

import hashlib
import importlib.metadata
import platform
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fingerprint", "versions"]

SAMPLE = 4096  # values read from each end of a tensor


def fingerprint(module: nn.Module) -> str:
    """A short hash of a model's weights.

    Names, shapes and dtypes of all tensors, and the first and last 4,096 values of each, so that a
    model of any size takes well under a second. Equal weights give equal fingerprints; a change in
    the middle of one large tensor alone would go unseen.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_ends(tensor))
    return digest.hexdigest()[:16]


def _ends(tensor: Tensor) -> bytes:
    if tensor.is_meta:
        return b"meta"
    flat = tensor.detach().reshape(-1)
    ends = torch.cat([flat[:SAMPLE], flat[-SAMPLE:]]).cpu().contiguous()
    return ends.view(torch.uint8).numpy().tobytes() if ends.numel() else b""


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a number."""
    found = {"python": platform.python_version()}
    for name in ("underhood", "torch", "transformers", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def describe(model: Any, **call: Any) -> dict[str, Any]:
    """Provenance of something computed with a `Model`."""
    return {
        "model": model.name,
        "weights": model.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "versions": versions(),
        **call,
    }
