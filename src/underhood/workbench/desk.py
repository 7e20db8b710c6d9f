"""The desk: what one server holds, and the table of what can be asked of it.

An action is a request class and a function. It runs in the worker, with the model in memory; it
tells parts of its answer through the job, and what it returns is the id of what it left on the
shelf, if anything.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from underhood.core.errors import UsageError, nearest
from underhood.workbench.asking import Asked, Short, validated
from underhood.workbench.jobs import Job, Worker, interruptible
from underhood.workbench.models import Loaded, Models, cards
from underhood.workbench.shelf import Shelf

__all__ = ["Action", "Desk", "Memory", "Work", "actions"]


class Work(Asked):
    """What every action asks: which model (None: the first one)."""

    model: Short | None = None


class Memory:
    """The last few of something that took long, for the worker."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is held under a key, made if it is not there."""
        if key not in self._held:
            self._held[key] = make()
        self._held.move_to_end(key)
        while len(self._held) > self.size:
            self._held.popitem(last=False)
        return self._held[key]


@dataclass(slots=True)
class Desk:
    """One server's models, queue and shelf.

    Attributes:
        models: The models.
        shelf: The results folder.
        worker: The thread that runs jobs.
        arms: Texts that were generated, so that moving one slider runs one column.
        judges: Circuits under edit, with what is needed to judge them.
    """

    models: Models
    shelf: Shelf
    worker: Worker = field(default_factory=Worker)
    arms: Memory = field(default_factory=lambda: Memory(32))
    judges: Memory = field(default_factory=lambda: Memory(2))

    def submit(self, said: dict[str, Any]) -> Job:
        """Queue what a page asks for: `{"do": NAME, ...}`.

        Raises:
            UsageError: No such action, or a request that does not fit it.
            ModelNotFound: Not a model of this server.
            QueueFull: Too much is waiting.
        """
        fields = dict(said)
        name = fields.pop("do", None)
        known = actions()
        if name not in known:
            raise UsageError(
                "the server can do no such thing",
                given=f"do={str(name)[:80]!r}",
                do=f"nearest: {nearest(str(name)[:80], known)}",
            )
        action = known[name]
        asked = validated(action.asks, fields)
        model = self.models.check(asked.model)

        def work(job: Job) -> None:
            if self.models.known(model) is None:
                job.progress(0, 0, f"loading {model}")
            loaded = self.models.load(model)
            job.check()
            with interruptible(loaded.model, job):
                job.result = action.run(self, job, loaded, asked)

        return self.worker.submit(Job(action.title(asked), work, model=model))


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that can be asked for.

    Attributes:
        asks: The request.
        run: Does it, and returns the id of what it kept, or None.
        about: One line for the documentation.
        title: What a job of it is called.
    """

    asks: type[Work]
    run: Callable[[Desk, Job, Loaded, Any], str | None]
    about: str
    title: Callable[[Any], str]


def actions() -> dict[str, Action]:
    """All actions by name."""
    from underhood.workbench import changing, editing, looking

    return {
        "load": Action(Work, _load, "load a model and say what it is", lambda _: "loading"),
        "methods": Action(
            Work, _methods, "say of each method whether the model offers it",
            lambda _: "asking the methods",
        ),
        "look": Action(
            looking.Look, looking.look, "next tokens, token probabilities, lens, attention",
            lambda _: "looking",
        ),
        "site": Action(
            looking.SiteAsked, looking.site, "statistics of any site, position by position",
            lambda a: f"reading {a.site}",
        ),
        "explain": Action(
            looking.Explain, looking.explain, "the main job, part by part", lambda _: "explaining"
        ),
        "method": Action(
            looking.Run, looking.method, "any registered method", lambda a: a.name
        ),
        "generate": Action(
            changing.Generate, changing.generate, "columns of text, the unedited one first",
            lambda _: "writing",
        ),
        "plan": Action(
            changing.KeepPlan, changing.keep_plan, "save a plan of edits", lambda _: "saving a plan"
        ),
        "circuit": Action(
            editing.EditCircuit, editing.edit_circuit,
            "find a circuit; drop or add nodes and edges, and judge it again",
            lambda a: "judging a circuit" if a.drop or a.add else "finding a circuit",
        ),
    }  # fmt: skip


def _load(desk: Desk, job: Job, loaded: Loaded, asked: Work) -> None:
    job.part("model", facts=loaded.facts)


def _methods(desk: Desk, job: Job, loaded: Loaded, asked: Work) -> None:
    if loaded.methods is None:
        loaded.methods = cards(loaded.model, loaded.facts["examples"], job.progress)
    job.part("methods", methods=loaded.methods)
