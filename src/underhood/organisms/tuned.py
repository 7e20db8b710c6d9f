"""Organisms that were another one before: fine-tuned from its weights, whole or in low rank.

Of a low-rank one only what was added is kept on disk; loaded, it is a model as plain as any other.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from underhood.organisms.base import PROMPTS, SEED
from underhood.organisms.card import Fact
from underhood.organisms.language import Language

if TYPE_CHECKING:
    from torch import nn

    from underhood.core.model import Model

__all__ = ["Tuned", "differences"]

ADAPTER = "adapter.safetensors"


@dataclass(frozen=True)
class Tuned(Language):
    """A language model that starts from another organism's weights.

    Attributes:
        start: That organism; its words and sizes are this one's.
        rank: Of what is added to each linear layer of the blocks; 0: all weights move.
    """

    start: str = ""
    rank: int = 0

    @property
    def origin(self) -> Language:
        """The organism that it was."""
        from underhood.organisms import organism

        return cast(Language, organism(self.start))

    def fresh(self) -> "nn.Module":
        """The origin's module, in float32; frozen but for what a low-rank one adds."""
        module = self.origin.load().module
        if self.rank:
            from underhood.organisms.low_rank import add

            add(module, self.rank)
        return module

    def save(self, module: "nn.Module", folder: Path) -> None:
        """As `Language.save`; of a low-rank one only what was added."""
        if not self.rank:
            return super().save(module, folder)
        from underhood.organisms.low_rank import save

        return save(module, folder / ADAPTER)

    def load(
        self, folder: Path | None = None, *, step: int | None = None, **options: Any
    ) -> "Model":
        """As `Language.load`."""
        if not self.rank:
            return super().load(folder, step=step, **options)
        from underhood.organisms.low_rank import merge

        where = folder or self.folder
        if not (where / ADAPTER).exists():
            raise self.missing(where)
        model = self.origin.load(step=step, **options)
        merge(model.module, where / ADAPTER)
        model.name = self.name
        return model

    def about(self, module: Any) -> dict[str, Any]:
        """As `Language.about`, and what it was."""
        added = {"rank": self.rank} if self.rank else {}
        return super().about(module) | {"was": self.start} | added

    def identity(self) -> str:
        """As `Language.identity`, and what it was."""
        return repr((super().identity(), self.start, self.rank))


def differences(what: Language, model: "Model") -> tuple[Fact, ...]:
    """What tuning taught: its accuracy on each task, beside its origin's on the same prompts."""
    assert isinstance(what, Tuned)
    before = what.origin.load()
    new = [task for task in what.tasks if task not in what.origin.tasks]
    after, control = (what.measure(m, PROMPTS, SEED, tasks=new) for m in (model, before))
    return tuple(
        Fact(
            name=task,
            says=f"Learned in tuning: {what.tasks[task]}.",
            task=task,
            effect=after[task]["accuracy"],
            control=control[task]["accuracy"],
            unit="accuracy",
            how=f"on {PROMPTS} held-out prompts; control: {what.start}, before tuning",
        )
        for task in new
    )
