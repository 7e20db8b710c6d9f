"""`explain`: the composition. Each part is a method's result; `sentences.py` puts it in words."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from underhood.core.errors import NotOffered, UsageError
from underhood.core.model import Model
from underhood.core.provenance import describe
from underhood.explanation import change as changing
from underhood.explanation import sentences as says
from underhood.explanation.question import Question, ask
from underhood.view import Result, View, group, sentences, table
from underhood.view.doc import Group
from underhood.view.files import write
from underhood.view.page import Section, page

__all__ = ["Explanation", "explain"]

SCHEMA = "explanation/1"
HEADS = 4  # how many important heads are looked at and changed
KEEP = 0.9  # share of the behaviour that the circuit shall keep
RANDOM_CIRCUITS = 10  # of the same size, as its control
WORTH = 0.03  # share of the answer that a head must restore to be called important

Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class Explanation:
    """What `explain` found.

    Attributes:
        question: Prompt, contrast, answer and wrong answer, in numbers.
        sentences: The answer in plain sentences, each with its number.
        results: The methods' results by part.
        change: What changing the important heads does; None where there are no heads.
        sections: The parts of the report, in order.
        provenance: Model, weights, versions, the call.
    """

    question: Question
    sentences: list[str] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)
    change: changing.Change | None = None
    sections: list[Section] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The sentences, for a terminal."""
        return list(self.sentences)

    def html(self) -> str:
        """The report: one self-contained page."""
        title = f"Why {says.quoted(self.question.answer)}?"
        return page(
            title, self.sections, lead=says.lead(self), provenance=self.provenance,
            python=self.provenance["call"],
        )  # fmt: skip

    def to_json(self) -> str:
        """Everything but the arrays: question, sentences, views, provenance."""
        question = self.question
        document = {
            "schema": SCHEMA,
            "prompt": question.prompt,
            "contrast": question.other,
            "contrast_was_searched": question.searched,
            "answer": question.answer,
            "wrong": question.wrong,
            "logit_difference": {"prompt": question.clean, "contrast": question.contrast},
            "sentences": self.sentences,
            "sections": [
                {
                    "id": s.id,
                    "number": s.number,
                    "title": s.title,
                    "question": s.question,
                    "answer": s.answer,
                    "folded": s.folded,
                    "views": [v.to_dict() for v in s.views],
                }
                for s in self.sections
            ],
            "provenance": self.provenance,
        }
        return json.dumps(document, ensure_ascii=False, indent=1)

    def save(self, path: str | Path) -> Path:
        """Write the report (.html) or the document (.json).

        Raises:
            UsageError: Another suffix.
        """
        place = Path(path)
        makers = {".html": self.html, ".json": self.to_json}
        if place.suffix not in makers:
            raise UsageError(
                "a report is .html or .json", given=str(place), do=f"write {place.stem}.html"
            )
        write(place, makers[place.suffix]().encode())
        return place

    @property
    def view(self) -> View:
        """The report as one view: its sentences, and its parts folded as in the page."""
        parts = [
            group(s.views, title=s.title, about=s.answer or s.question, folded=s.folded)
            for s in self.sections
        ]
        title = f"Why {says.quoted(self.question.answer)}?"
        told = sentences(says.lead(self))
        return group([told, *parts], title=title, provenance=self.provenance)

    def _repr_html_(self) -> str:
        return self.view.html(level=2)


def explain(
    model: Model,
    prompt: str,
    contrast: str | None = None,
    *,
    answer: str | None = None,
    wrong: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    finished: Callable[[Explanation], None] | None = None,
) -> Explanation:
    """Say why a model continues a prompt as it does, and show the evidence.

    Args:
        model: A model that predicts tokens from text.
        prompt: What it reads.
        contrast: A prompt of as many tokens that calls for another answer. Without one, the
            one-word change that moves the answer most is searched for; that is weaker evidence, and
            the sentences say so.
        answer: The continuation to explain, one token; default the model's own.
        wrong: What it is held against; default the model's answer to the contrast.
        seed: Of all random controls.
        progress: Called with a part's name, its number and how many there are.
        finished: Called after each part with what has been found so far, sentences included.

    Raises:
        NotOffered: The model does not predict tokens from text.
        PairError: Prompt and contrast cannot be compared.
        AnswerError: An answer that is not one token.

    Cost: on L layers, T positions and H heads about L*T + L*H forwards in batches (exact patching;
        positions before the first difference are skipped), about 100 circuits of one prompt each,
        and some thirty single forwards.

    Example:
        >>> import underhood as uh
        >>> found = uh.explain(uh.load(), "The capital of France is", "The capital of Italy is")
        >>> "Paris" in found.sentences[0]
        True
    """
    steps = ["asking", *_PARTS]

    def tell(number: int) -> None:
        if progress is not None:
            progress(steps[min(number, len(steps) - 1)], number, len(steps))

    tell(0)
    question = ask(model, prompt, contrast, answer=answer, wrong=wrong)
    call = f"model = uh.load({model.name!r})\nuh.explain(model, {prompt!r}, {question.other!r})"
    found = Explanation(question, provenance=describe(model, seed=seed, call=call))
    for number, (name, part) in enumerate(_PARTS.items(), 1):
        tell(number)
        found.sections.append(_section(name, part, model, found, seed))
        found.sentences = says.headline(found)
        if finished is not None:
            finished(found)
    tell(len(steps))
    return found


def _section(
    name: str,
    part: Callable[[Model, Explanation, int], list[View]],
    model: Model,
    found: Explanation,
    seed: int,
) -> Section:
    """One part; where model or prompt do not allow it (no attention, too short), it says why."""
    title, question = _TITLES[name]
    try:
        views = part(model, found, seed)
    except (NotOffered, UsageError) as error:
        views = [sentences([f"{error.what}. {error.why or ''}"], title="Not offered here")]
    return Section(
        id=name, number=list(_PARTS).index(name) + 1, title=title, question=question,
        answer=says.answer(found, name), views=views, folded=name not in _OPEN,
    )  # fmt: skip


def _next(model: Model, found: Explanation, seed: int) -> list[View]:
    question = found.question
    columns = [
        {"name": "rank", "format": "d"},
        "after the prompt", {"name": "probability", "format": ".1%"},
        "after the contrast", {"name": "probability there", "format": ".1%"},
    ]  # fmt: skip
    rows = [
        [i + 1, ours[0], ours[1], theirs[0], theirs[1]]
        for i, (ours, theirs) in enumerate(zip(question.top, question.contrast_top, strict=True))
    ]
    gaps = table(
        ["prompt", f"logit {question.answer!r} - {question.wrong!r}"],
        [[question.prompt, question.clean], [question.other, question.contrast]],
        title="The question in one number",
        about="The logit difference: above zero the model prefers the first word, below the"
        " second. Everything below explains the step from the second row to the first."
        + (
            " The contrast was found by search, because none was given: it is the one-word change"
            " that moves the answer most, which is weaker evidence than a contrast that you chose."
            if question.searched
            else ""
        ),
    )
    return [gaps, table(columns, rows, title="What the model says next")]


def _lens(model: Model, found: Explanation, seed: int) -> list[View]:
    from underhood.methods.read.logit_lens import logit_lens

    question = found.question
    result = logit_lens(
        model, question.prompt, answer=question.answer, wrong=question.wrong, seed=seed
    )
    found.results["lens"] = result
    # The curve of the last word is the answer to the question; the grid is where it comes from.
    return sorted(_inner(result), key=lambda view: view.kind != "lines")


def _inner(result: Result) -> list[View]:
    """The views of a result that shows several, each told how it was made."""
    if not isinstance(result.view, Group):
        return [result.view]
    made = {"python": result.view.python, "provenance": result.view.provenance}
    return [view.model_copy(update=made) for view in result.view.views]


def _writers(model: Model, found: Explanation, seed: int) -> list[View]:
    from underhood.methods.read.direct_attribution import direct_attribution

    result = direct_attribution(model, found.question.pairs, seed=seed)
    found.results["writers"] = result
    return [result.view]


def _causes(model: Model, found: Explanation, seed: int) -> list[View]:
    from underhood.methods.locate.activation_patching import activation_patching

    pairs = found.question.pairs
    grid = activation_patching(model, pairs, sites="resid_pre", seed=seed)
    found.results["causes"] = grid
    views = [grid.view]
    if any(s.name == "z" for s in model.sites()):
        heads = activation_patching(model, pairs, sites="z", positions="all", seed=seed)
        found.results["heads"] = heads
        views.append(heads.view)
    return views


def _circuit(model: Model, found: Explanation, seed: int) -> list[View]:
    from underhood.methods.locate.circuit import circuit

    result = circuit(model, found.question.pairs, target=KEEP, draws=RANDOM_CIRCUITS, seed=seed)
    found.results["circuit"] = result
    pictures = ("graph", "lines")
    views = _inner(result)
    proof = [view for view in views if view.kind not in pictures]
    shown = [view for view in views if view.kind in pictures]
    return [*shown, group(proof, folded=True, title="The proof in numbers")]


def important_heads(found: Explanation) -> list[tuple[int, int]]:
    """Heads that restore most of the answer by themselves, at most `HEADS`, best first."""
    result = found.results.get("heads")
    if result is None:
        return []
    effect, control = result.data["effect"], result.data["control"]
    ranked = []
    for i, layer in enumerate(effect.coords["layer"].values.tolist()):
        for head in range(effect.sizes["head"]):
            value = float(effect[i, head])
            noise = abs(float(control[i, head]))
            if value == value and value > max(WORTH, noise):
                ranked.append((value, (int(layer), head)))
    return [place for _, place in sorted(ranked, reverse=True)[:HEADS]]


def _kinds(model: Model, found: Explanation, seed: int) -> list[View]:
    from underhood.methods.read.attention import attention
    from underhood.methods.read.head_kinds import head_kinds

    kinds = head_kinds(model, seed=seed)
    found.results["kinds"] = kinds
    heads = important_heads(found)
    looks = attention(model, found.question.prompt)
    found.results["attention"] = looks
    shown = says.head_table(found, heads)
    patterns = says.patterns_of(looks, heads)
    return [v for v in (shown, patterns) if v is not None] + [_folded(kinds.view)]


def _folded(view: View) -> View:
    return group([view], folded=True, title="All heads, scored on repeated random words")


def _change(model: Model, found: Explanation, seed: int) -> list[View]:
    heads = important_heads(found)
    if not heads:
        return changing.nothing("No head by itself restores the answer, so none was changed.")
    found.change = changing.change(model, found.question, heads, seed=seed)
    return changing.views(found.question, found.change)


def _odd(model: Model, found: Explanation, seed: int) -> list[View]:
    from underhood.methods.read.massive_activations import massive_activations
    from underhood.methods.read.sinks import sinks

    prompts = [found.question.prompt, found.question.other]
    giants = massive_activations(model, prompts)
    found.results["giants"] = giants
    views = [giants.view]
    if any(s.name == "pattern" for s in model.sites()):
        found.results["sinks"] = sinks(model, prompts)
        views.append(found.results["sinks"].view)
    return views


_PARTS: dict[str, Callable[[Model, Explanation, int], list[View]]] = {
    "forms": _lens,
    "circuit": _circuit,
    "next": _next,
    "writers": _writers,
    "causes": _causes,
    "heads": _kinds,
    "change": _change,
    "odd": _odd,
}
"""In reading order: the picture, the proof, and then everything that led there."""

_OPEN = ("forms", "circuit")

_TITLES = {
    "forms": ("Where the answer forms", "From which layer on is the answer readable?"),
    "circuit": ("The circuit and its proof", "Which connections suffice, beyond chance?"),
    "next": ("What it says next", "What does the model say, and what is the question?"),
    "writers": ("Who writes it", "Which parts write the answer into the last token, directly?"),
    "causes": ("Who causes it", "Which activations, moved over, bring the answer with them?"),
    "heads": (
        "What the important heads do",
        "Where do they look, and of what kind are they?",
    ),
    "change": ("The change", "What does the model say when these heads are changed?"),
    "odd": ("What is odd", "Is there anything unusual inside, whatever the question?"),
}
