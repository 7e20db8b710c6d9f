"""`underhood doctor`: whether this machine is ready, one line per question."""

import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import typer

from underhood.cli import options, render

__all__ = ["doctor", "examine"]

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def doctor(json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Check versions, devices, folders and a tiny model from end to end. Exit code 1 on failure."""
    with render.working("examining this machine", quiet=quiet):
        rows = examine()
    if json:
        render.document([dict(zip(("what", "status", "found"), r, strict=True)) for r in rows])
    else:
        render.table(("what", "status", "found"), rows)
    if any(status == "failed" for _, status, _ in rows):
        raise typer.Exit(1)


def examine() -> list[tuple[str, str, str]]:
    """(question, "ok" | "failed" | "absent", what was found) for every question."""
    rows = []
    for name, ask in QUESTIONS.items():
        try:
            found = ask()
        except Exception as error:  # whatever breaks here is the finding
            first = (str(error).splitlines() or [""])[0]
            rows.append((name, "failed", f"{type(error).__name__}: {first}"))
        else:
            rows.append((name, "absent" if found.startswith("none") else "ok", found))
    return rows


def _versions() -> str:
    from underhood.core.provenance import versions

    return ", ".join(f"{name} {version}" for name, version in versions().items())


def _system() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"


def _threads() -> str:
    import torch

    return f"{torch.get_num_threads()} for one operation (OMP_NUM_THREADS sets it)"


def _accelerators() -> str:
    import torch

    found = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return ", ".join(found) or "none; models run on the CPU"


def _cache() -> str:
    from huggingface_hub import constants

    folder = constants.HF_HUB_CACHE
    models = len(list(Path(folder).glob("models--*")))
    offline = " (offline)" if constants.HF_HUB_OFFLINE else ""
    return f"{models} models in {folder}{offline}"


def _browser() -> str:
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    return found or "none; only the tests of the reports need a Chromium"


def _built_in() -> str:
    import underhood

    model = underhood.load()
    run = model.run("Mary gave a drink to")
    return f"{model!r}, {run.logits.shape[-1]} words"


def _self_test() -> str:
    """Record, edit and generate on a tiny random model."""
    import torch

    import underhood
    from underhood.core.edit import Edit
    from underhood.core.ops import zero

    model = underhood.load("random/llama")
    ids = torch.tensor([[3, 4, 5, 6]])
    bare = model.run(ids, record="z.1")
    edited = model.run(ids, edits=Edit("z.1", zero()))
    written = model.generate(ids, max_new_tokens=4, edits=Edit("z.1", zero()))
    moved = float((edited.logits - bare.logits).abs().max())
    if not moved > 0 or not bare["z.1"].isfinite().all():
        raise ArithmeticError("an edit moved nothing, or a recording is not finite")
    return (
        f"recorded, edited (logits moved by {moved:.2g}), generated {written.ids.shape[1]} tokens"
    )


QUESTIONS: dict[str, Callable[[], str]] = {
    "versions": _versions,
    "system": _system,
    "threads": _threads,
    "accelerators": _accelerators,
    "model cache": _cache,
    "browser": _browser,
    "built-in model": _built_in,
    "self-test": _self_test,
}
