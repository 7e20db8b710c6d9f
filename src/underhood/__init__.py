"""underhood: see inside a neural network, find what causes a behaviour, and change it.

    import underhood as uh
    model = uh.load()                                   # the built-in model, or uh.load("gpt2")
    run = model.run("The capital of France is", record=["resid_post", "pattern.1"])
    model.run("The capital of France is", edits=uh.Edit("z.1.2", uh.zero()))
    uh.read.logit_lens(model, "The capital of France is").show()

Names are loaded when they are first used, so importing the package costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from underhood import circuits, organisms, view
    from underhood.core.edit import Edit, Gate, Plan, Schedule
    from underhood.core.errors import UnderhoodError
    from underhood.core.model import Model
    from underhood.core.ops import (
        add,
        affine,
        attend,
        call,
        clamp_feature,
        mean,
        patch,
        project_out,
        route,
        scale,
        set_to,
        swap_subspace,
        zero,
    )
    from underhood.core.run import Generation, Run
    from underhood.core.site import Site
    from underhood.core.tokens import Tokens, Where
    from underhood.data import Pairs
    from underhood.explanation import Explanation, explain
    from underhood.fronts import hooks, run_with_cache, run_with_hooks
    from underhood.loader import load
    from underhood.methods import compare, decompose, develop, locate, read, steer, vision
    from underhood.organisms import organism
    from underhood.view import Result, View

_WHERE = {
    "Edit": "core.edit", "Gate": "core.edit", "Plan": "core.edit", "Schedule": "core.edit",
    "UnderhoodError": "core.errors", "Model": "core.model", "Generation": "core.run",
    "Run": "core.run", "Site": "core.site", "Tokens": "core.tokens", "Where": "core.tokens",
    **dict.fromkeys(
        ("add", "affine", "attend", "call", "clamp_feature", "mean", "patch", "project_out",
         "route", "scale", "set_to", "swap_subspace", "zero"), "core.ops"),
    "Pairs": "data", "Explanation": "explanation", "explain": "explanation", "load": "loader",
    **dict.fromkeys(("hooks", "run_with_cache", "run_with_hooks"), "fronts"),
    **dict.fromkeys(
        ("compare", "decompose", "develop", "locate", "read", "steer", "vision"), "methods"),
    "Result": "view", "View": "view", "organism": "organisms",
}  # fmt: skip

_PACKAGES = ("circuits", "organisms", "view")

__all__ = [
    "Edit", "Explanation", "Gate", "Generation", "Model", "Pairs", "Plan", "Result", "Run",
    "Schedule", "Site", "Tokens", "UnderhoodError", "View", "Where", "add", "affine", "attend",
    "call", "circuits", "clamp_feature", "compare", "decompose", "develop", "explain", "hooks",
    "load", "locate", "mean", "organism", "organisms", "patch", "project_out", "read", "route",
    "run_with_cache", "run_with_hooks", "scale", "set_to", "steer", "swap_subspace", "view",
    "vision", "zero",
]  # fmt: skip

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"underhood.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'underhood' has no attribute {name!r}")
    module = importlib.import_module(f"underhood.{_WHERE[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
