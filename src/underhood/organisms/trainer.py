"""The one trainer of all organisms: seeded, resumable, and it writes the folder and the card."""

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from underhood.core.errors import FileProblem, OutOfRange
from underhood.organisms.base import LOG, PROMPTS, STEPS, Trained
from underhood.organisms.card import Card

__all__ = ["CHECKPOINT", "Run", "train"]

_log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
# Steps between checkpoints, and between lines of the log.
_EVERY, _LOGGED = 200, 20
# Fraction of the peak learning rate that the cosine ends at.
_FLOOR = 0.02


def train(
    what: Trained,
    *,
    out: Path,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
) -> Card:
    """Train an organism, measure it on held-out prompts, and write its folder and card.

    A run that was stopped goes on from `out/checkpoint.pt` and ends with the same weights as one
    that was not.

    Args:
        what: The organism.
        out: Folder to write; made when missing.
        steps: Optimizer steps; by default the recipe's.
        seed: Seeds the weights and the examples.
        resume: Continue from a checkpoint when there is one; otherwise start afresh.
        progress: Show a bar on stderr, if that is a terminal.

    Raises:
        FileProblem: The checkpoint belongs to another recipe, seed or number of steps.
        OutOfRange: No steps.
    """
    run = Run(what, out=out, steps=steps, seed=seed, resume=resume)
    run.advance(progress=progress)
    return run.finish()


class Run:
    """One training run.

    Everything random is drawn from (seed, step), and the checkpoint holds both, so it need not
    hold the state of a generator: step n draws the same whether or not the run was interrupted.
    """

    def __init__(
        self,
        what: Trained,
        *,
        out: Path,
        steps: int | None = None,
        seed: int = 0,
        resume: bool = True,
    ) -> None:
        self.organism = what
        self.out = Path(out)
        self.steps = what.recipe.steps if steps is None else steps
        if self.steps < 1:
            raise OutOfRange("Training needs a step.", given=self.steps, do="Use steps >= 1.")
        self.seed, self.step, self.seconds = seed, 0, 0.0
        self.losses: list[tuple[int, float]] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = what.fresh()
        # What a fine-tuning recipe froze is neither stepped nor decayed.
        moving = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            moving, betas=what.recipe.betas, weight_decay=what.recipe.decay
        )
        self.out.mkdir(parents=True, exist_ok=True)
        if resume and self.checkpoint.exists():
            self._load()

    @property
    def checkpoint(self) -> Path:
        """Where the unfinished run is kept."""
        return self.out / CHECKPOINT

    def advance(self, until: int | None = None, *, progress: bool = False) -> None:
        """Train up to step `until` (default: all of them), on one thread.

        A checkpoint is kept at the end and every 200 steps; not on Ctrl-C, which may come in the
        middle of a step, when some weights have moved and others have not.
        """
        last = self.steps if until is None else min(until, self.steps)
        shown = progress and sys.stderr.isatty()
        self.model.train()
        self._keep()
        with _one_thread(), _bar() if shown else nullcontext() as bar:
            if bar is not None:
                bar.add_task(self.organism.name, total=self.steps, loss="")
            while self.step < last:
                loss = self._one()
                self._keep()
                if self.step % _LOGGED == 0:
                    self.losses.append((self.step, loss))
                if self.step % _EVERY == 0:
                    self.save()
                    _log.info("step %d loss %.3f %.0f s", self.step, loss, self.seconds)
                if bar is not None:
                    bar.update(bar.task_ids[0], completed=self.step, loss=f"{loss:.3f}")
        self.save()

    def finish(self, prompts: int = PROMPTS) -> Card:
        """Write the folder, and the card measured on so many prompts per task from what it holds.

        Beside them `training.csv`: the loss of every twentieth step, in nats.

        Removes the checkpoint.
        """
        from underhood.core.loading import no_bars

        what = self.organism
        self.model.eval()
        with no_bars():
            what.save(self.model, self.out)
        lines = [f"{step},{loss:.4f}" for step, loss in self.losses]
        (self.out / LOG).write_text("\n".join(["step,loss", *lines]) + "\n", encoding="utf-8")
        for path in self.out.rglob("*.safetensors"):
            # It is written for its owner only, and would be packaged so.
            path.chmod(0o644)
        loaded = what.load(self.out)
        card = Card(
            name=what.name,
            summary=what.summary,
            parameters=sum(p.numel() for p in self.model.parameters()),
            architecture=what.about(self.model),
            recipe=asdict(what.recipe) | {"steps": self.steps, "seed": self.seed},
            seconds=round(self.seconds, 1),
            tasks=what.measure(loaded, prompts),
            facts=list(what.establish(loaded)),
            limits=list(what.limits),
            reproduce=[
                f"underhood organisms build {what.name}",
                f"underhood organisms check {what.name} --n {prompts}",
            ],
        )
        card.save(self.out)
        self.checkpoint.unlink(missing_ok=True)
        return Card.load(self.out)

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(
            {
                "what": self._identity(),
                "step": self.step,
                "seconds": self.seconds,
                "losses": self.losses,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
            partial,
        )
        partial.replace(self.checkpoint)

    def _load(self) -> None:
        try:
            kept: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
            same, losses = kept["what"] == self._identity(), kept["losses"]
        except Exception as error:  # torch raises many kinds for a damaged file
            raise FileProblem(
                "The checkpoint cannot be read.",
                given=self.checkpoint,
                why=str(error).splitlines()[0] if str(error) else type(error).__name__,
                do="Delete it, or train with resume=False.",
            ) from error
        if not same:
            raise FileProblem(
                "The checkpoint is of another run.",
                given=self.checkpoint,
                why="its organism, recipe, seed or number of steps differ from what was asked.",
                do="Use the same arguments, another folder, or resume=False.",
            )
        self.step, self.seconds, self.losses = kept["step"], kept["seconds"], losses
        self.model.load_state_dict(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])

    def _identity(self) -> str:
        return repr((self.organism.identity(), self.steps, self.seed))

    def _one(self) -> float:
        """One optimizer step; returns the loss."""
        start = time.process_time()
        # The same draws whether or not the run was interrupted.
        rng = Random(f"{self.seed}:{self.step}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad()
        total = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Random(f"torch:{self.seed}:{self.step}").getrandbits(32))
            for loss in self.organism.losses(self.model, rng, self.step, self.steps):
                loss.backward()
                total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.seconds += time.process_time() - start
        return total

    def rate(self) -> float:
        """Learning rate: linear warm-up, a cosine that goes down slowly, linear cool-down."""
        recipe = self.organism.recipe
        warm = min(1.0, (self.step + 1) / max(1, recipe.warmup))
        curve = 0.5 * (1 + math.cos(math.pi * self.step / (recipe.stretch * self.steps)))
        last = recipe.cooldown * self.steps
        cool = min(1.0, (self.steps - self.step) / last) if last else 1.0
        return recipe.lr * warm * cool * (_FLOOR + (1 - _FLOOR) * curve)

    def _keep(self) -> None:
        """Write the weights of this step, if the recipe asks for it, in float16."""
        from safetensors.torch import save_file

        if self.step not in self.organism.recipe.keep:
            return
        path = self.out / STEPS / f"{self.step}.safetensors"
        path.parent.mkdir(exist_ok=True)
        state = self.model.state_dict()
        save_file({key: value.half().contiguous() for key, value in state.items()}, path)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums of several threads depend on their number; models this small gain nothing by them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
