"""Options that several commands share, and the model that they name."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from underhood.cli import render
from underhood.core.errors import FileProblem, UsageError

if TYPE_CHECKING:
    from underhood.core.model import Model

__all__ = [
    "Answer", "Device", "Dtype", "Json", "ModelArgument", "ModelOption", "Output", "Precision",
    "Quiet", "Wrong", "check_output", "load_model",
]  # fmt: skip

_PANEL = "Model"
_NAMES = "a hub id, a folder, an organism, or random/FAMILY"


class Precision(StrEnum):
    """Precisions to load a model in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="NAME", rich_help_panel=_PANEL,
        help=f"The model: {_NAMES}. Default: the built-in one.",
    ),
]  # fmt: skip
ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=f"{_NAMES}. Default: the built-in one.".capitalize()),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=_PANEL, help="Where to run it: cpu, cuda, mps..."),
]
Dtype = Annotated[
    Precision | None,
    typer.Option(rich_help_panel=_PANEL, help="Precision. Default: the checkpoint's own."),
]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON document.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Save to a file; its suffix says how."),
]
Keep = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Keep finished cells of a sweep here; the same call goes on with them.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what the sweeps would take; run none of them.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")]
Answer = Annotated[
    str | None,
    typer.Option(metavar="TOKEN", help="What the model should say next (one token of its own)."),
]
Wrong = Annotated[
    str | None,
    typer.Option(metavar="TOKEN", help="What it should not say (one token of its own)."),
]


def check_output(path: Path | None, suffixes: Sequence[str]) -> None:
    """Refuse a file that could not be written, before anything is computed.

    Raises:
        UsageError: Another suffix.
        FileProblem: The folder is missing.
    """
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise UsageError(
            "no format has this suffix",
            given=f"--output {path}",
            do=f"let the file's name end in one of {', '.join(suffixes)}",
        )
    if not path.parent.is_dir():
        raise FileProblem(
            f"there is no folder {path.parent}", given=f"--output {path}", do="make it first"
        )


def load_model(
    name: str | None, device: str | None, dtype: Precision | None, *, quiet: bool = False
) -> "Model":
    """The model that the options name.

    Raises:
        ModelNotFound: No model of this name.
        UsageError: No such device here.
    """
    with render.working(f"loading {name or 'the built-in model'}", quiet=quiet):
        options: dict[str, Any] = {}
        if device is not None:
            options["device"] = _device(device)
        if dtype is not None:
            options["dtype"] = dtype.value
        import underhood

        return underhood.load(name, **options)


def _device(name: str) -> str:
    """The device's name, if there is such a device in this machine."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"there is no device {name!r} here",
            given=f"--device {name}",
            why=str(error).splitlines()[0][:160],
            do="leave --device out; `underhood doctor` lists the devices",
        ) from error
    return name
