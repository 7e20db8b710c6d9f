"""The models that a server can run: loaded by the worker, described as plain JSON.

What may be named from a page is a list: the organisms that come with the library, and what the
command line named. A page can not make the server read a folder or ask a hub.

Which methods a model offers is found by asking them. Each is called with an example, and stopped at
its first forward pass: methods refuse before that, with the reason that the page shows.
"""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from underhood.core.errors import ModelNotFound, NotOffered, UnderhoodError, nearest

if TYPE_CHECKING:
    from underhood.core.model import Model
    from underhood.core.tokenizer import Text
    from underhood.data import Pairs
    from underhood.methods.registry import Method

__all__ = ["Loaded", "Models"]

HELD = 3  # models that stay in memory
ROWS = 8  # pairs of an example, for methods that choose on some and test on others
LONGEST = 100_000  # characters that are tokenised while somebody types
EXAMPLES = (
    ("When Mary and John went to the store, John gave a drink to",
     "When Mary and John went to the store, Mary gave a drink to"),
    ("The capital of France is", "The capital of Italy is"),
)  # fmt: skip


class _Reached(BaseException):
    """A method has come to its first forward pass: it does not refuse this model."""


@dataclass(slots=True)
class Loaded:
    """A model in memory, and what is known of it.

    Attributes:
        model: It; only the worker runs it.
        facts: Class, sizes, sites, what it lacks and why, examples.
        methods: Cards of all methods; each says whether it is offered here, else why not.
        text: A tokenizer of its own for the web layer, which tokenises while the worker works.
    """

    model: "Model"
    facts: dict[str, Any]
    methods: list[dict[str, Any]] | None = None
    text: "Text | None" = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tokens(self, text: str) -> dict[str, Any]:
        """Ids and texts of a prompt's tokens, and the model's limit. Runs no model."""
        if self.text is None or self.text.tokenizer is None:
            raise NotOffered(
                "this model reads no text", given=self.model.name, do="call it from Python"
            )
        with self.lock:  # a tokenizer cannot be used twice at once
            ids = list(self.text.tokenizer(text[:LONGEST])["input_ids"]) if text else []
            strings = list(self.text.strings(ids[:2000]))
        unknown = getattr(self.text.tokenizer, "unk_token_id", None)
        return {
            "ids": ids[:2000], "strings": strings, "count": len(ids), "context": self.text.context,
            "unknown": [i for i, t in enumerate(ids[:2000]) if t == unknown],
        }  # fmt: skip


class Models:
    """Models by name.

    Args:
        first: What the command line named; None: the built-in one.
        device: Where they run.
        dtype: Their precision.
    """

    def __init__(
        self, first: str | None = None, *, device: str | None = None, dtype: str | None = None
    ) -> None:
        from underhood.loader import DEFAULT
        from underhood.organisms import organisms

        self.first = first or DEFAULT
        self.names = list(dict.fromkeys([self.first, *organisms()]))
        self.options = {k: v for k, v in (("device", device), ("dtype", dtype)) if v is not None}
        self.problems: dict[str, dict[str, Any]] = {}
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()

    def check(self, name: str | None) -> str:
        """The name of a model of the list; None is the first one.

        Raises:
            ModelNotFound: It is none of them.
        """
        name = name or self.first
        if name not in self.names:
            raise ModelNotFound(
                "this server has no such model",
                given=name[:200],
                why="a page can choose among the built-in ones and what the command line named",
                do=f"nearest: {nearest(name, self.names)}; or start `underhood serve {name[:80]}`",
            )
        return name

    def known(self, name: str | None) -> Loaded | None:
        """A model that is in memory, or None."""
        return self._loaded.get(self.check(name))

    def load(self, name: str | None) -> Loaded:
        """A model, loaded where it is not in memory yet. For the worker.

        Raises:
            ModelNotFound: See `check`, and `uh.load`.
        """
        name = self.check(name)
        if name not in self._loaded:
            import underhood

            model = underhood.load(name, **self.options)
            text = copy.copy(model.text)
            text.tokenizer = copy.deepcopy(model.tokenizer)
            self._loaded[name] = Loaded(model, describe(model, name), text=text)
        self._loaded.move_to_end(name)
        for old in list(self._loaded)[:-HELD]:
            del self._loaded[old]
        return self._loaded[name]


def describe(model: "Model", name: str) -> dict[str, Any]:
    """What a page shows of a model. Cost: four short forwards."""
    from underhood.cli import anatomy
    from underhood.view import view_of

    known = {k: v for k, v in anatomy.facts(model).items() if v is not None}
    return {
        "name": name,
        "called": model.name.rstrip("/").rpartition("/")[2] or model.name,
        "facts": known,
        "layers": model.n_layers,
        "heads": model.n_heads,
        "sites": anatomy.offered(model),
        "missing": anatomy.missing(model),
        "tree": view_of(model).to_dict(),
        "writable": sorted({s.name for s in model.sites() if s.kind.writable}),
        "examples": examples(model, name),
    }


def examples(model: "Model", name: str) -> list[dict[str, Any]]:
    """Prompts, contrasts and answers that the model can be asked, the best known first.

    `rows` has more of the same kind, the first one included.
    """
    found = []
    for texts in EXAMPLES:
        if all(_knows(model, text) for text in texts) and (answers := _answers(model, *texts)):
            found.append(_example("", [_row(*texts, *answers)]))
    for task, pairs in _tasks(name):
        columns = [pairs.clean, pairs.contrast, map(_said, pairs.answers), map(_said, pairs.wrong)]
        found.append(_example(task, [_row(*row) for row in zip(*columns, strict=True)]))
    return found


def _answers(model: "Model", prompt: str, contrast: str) -> list[str]:
    """What the model says after each; nothing where that is the same, or no text."""
    try:
        said = [int(model.run(text).last_logits[0].argmax()) for text in (prompt, contrast)]
    except (UnderhoodError, IndexError):
        return []
    return [model.token_text(i) for i in said] if said[0] != said[1] else []


def _row(prompt: str, contrast: str, answer: str = "", wrong: str = "") -> dict[str, str]:
    return {"prompt": prompt, "contrast": contrast, "answer": answer, "wrong": wrong}


def _example(task: str, rows: list[dict[str, str]]) -> dict[str, Any]:
    return {"task": task, **rows[0], "rows": rows}


def _said(answers: tuple[Any, ...]) -> str:
    """The first of several answers, where it is text."""
    return answers[0] if answers and isinstance(answers[0], str) else ""


def _knows(model: "Model", prompt: str) -> bool:
    """Whether no word of it is unknown to the vocabulary."""
    if model.tokenizer is None:
        return False
    ids = model.tokenizer(prompt)["input_ids"]
    return getattr(model.tokenizer, "unk_token_id", None) not in ids


def _tasks(name: str) -> list[tuple[str, "Pairs"]]:
    """Some pairs of each task of an organism that reads text."""
    from underhood.data import Pairs
    from underhood.organisms import organism, organisms

    if name not in organisms():
        return []
    made = organism(name)
    found = []
    for task in made.tasks:
        try:
            pairs = made.pairs(task, ROWS)
        except (UnderhoodError, TypeError):  # a task without pairs
            continue
        if isinstance(pairs, Pairs) and isinstance(pairs.clean[0], str):
            found.append((task, pairs))
    return found


def cards(model: "Model", shown: list[dict[str, Any]], tell: Callable[[int, int], None]) -> list:
    """The card of each method, and whether this model offers it.

    Args:
        model: The model.
        shown: Its examples.
        tell: Called with the methods done and all.

    Cost: no forward; each method's module is imported.
    """
    from underhood.methods.registry import find, names
    from underhood.workbench.forms import card

    listed = [n for found in names().values() for n in found]
    made = []
    for number, name in enumerate(listed):
        method = find(name)
        refused, rows = trial(model, method, shown)
        made.append(card(method) | {"refused": refused, "rows": rows})
        tell(number + 1, len(listed))
    return made


def trial(model: "Model", method: "Method", shown: list[dict[str, Any]]) -> tuple[str | None, int]:
    """Why a method refuses this model, or None; and how many rows of an example it takes."""
    from underhood.workbench.jobs import refusal

    def reached(*_: Any) -> None:
        raise _Reached

    most = max((len(example["rows"]) for example in shown), default=1)
    hook = model.module.register_forward_pre_hook(reached)
    try:
        for rows in (1, most):
            try:
                method(model, **_given(model, method, shown, rows))
            except NotOffered as error:
                told = refusal(error)
                return ". ".join(t for t in (told["what"], told["why"]) if t), 1
            except _Reached:
                return None, rows
            except (UnderhoodError, TypeError):
                continue
    finally:
        hook.remove()
    return None, 1


def _given(
    model: "Model", method: "Method", shown: list[dict[str, Any]], rows: int
) -> dict[str, Any]:
    """Examples as a method's arguments: the columns that it reads, and no others."""
    from underhood.cli.arguments import Given, data_arguments, data_flags, pairs_of
    from underhood.workbench.forms import control

    wide = [e for e in shown if len(e["rows"]) >= rows] or [_example("", [_row(*EXAMPLES[0])])]
    flags = {data_flags(p) for p in method.parameters if not p.option}
    names = ("prompt", "contrast", "answer", "wrong")
    read = names if "--prompt --vs" in flags else names[: "--prompt" in flags]

    def given(example: dict[str, Any], read: tuple[str, ...] = names, other: Any = None) -> Given:
        chosen = example["rows"][:rows]
        said = [[row[n] for row in chosen if row[n]] if n in read else [] for n in names]
        return Given(said[0], said[1], said[2], said[3], other=other)

    second = (lambda: model) if "--other" in flags else None
    found = data_arguments(method, given(wide[0], read, second))
    for option in (p for p in method.parameters if p.option):
        if control(option) == "pairs":
            found[option.name] = pairs_of(given(wide[min(1, len(wide) - 1)]))
        elif option.name == "answers":
            found["answers"] = tuple(given(wide[0]).answers)
    return found
