"""What training made in the classifiers, measured on held-out pictures beside a control.

Everything is exact: pictures are drawn again with one attribute changed, and parts are replaced by
their mean over training pictures while the model runs. Channels of a convolution are written
`module:PATH[channel]`.
"""

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from underhood.core.edit import Edit
from underhood.core.ops import call
from underhood.organisms.card import Fact
from underhood.organisms.sight.classifier import Classifier, answers, attacked, collect
from underhood.organisms.sight.pictures import COLOURS, Pictures

if TYPE_CHECKING:
    from torch import Tensor

    from underhood.core.model import Model

__all__ = ["STEM", "channels", "glances", "heads", "turns", "weakness"]

STEM = "module:resnet.embedder"
"""The first layer of the convolutional networks, with its pooling: 16 channels, 8 x 8 places."""

_N, _SEED = 250, 2
# Random sets of parts that an ablation is held against.
_CONTROLS = 20
# By how much more of its attention a head that looks at the shape spends there than elsewhere.
_MORE = 0.25
_CHOSEN = (
    "chosen one after the other by what doing so costs on training pictures; measured on "
    f"{_N} held-out pictures; control: mean of {_CONTROLS} random sets of {{k}} others"
)


def turns(organism: Classifier, model: "Model") -> tuple[Fact, ...]:
    """How often the answer turns when the texture alone, or the shape alone, is changed."""
    cases = organism.cases("shapes", _N, _SEED)
    rng = Random(f"{organism.name}:turns")
    labels = [case.label for case in cases]

    def said(attribute: str | None) -> "Tensor":
        views: list[Any] = []
        for case in cases:
            view: Any = case.view
            other: Any = case.contrast
            now = view.attributes
            if attribute == "colour":
                view = view.but(colour=rng.choice([c for c in COLOURS if c != now["colour"]]))
            elif attribute is not None:
                view = view.but(**{attribute: other.attributes[attribute]})
            views.append(view)
        return answers(model.module, collect(views, labels, organism.classes).pixels)

    before = said(None)
    share = {name: _mean(said(name) != before) for name in ("texture", "shape", "colour")}
    return tuple(
        Fact(
            name=f"{cue} turns the answer",
            says=f"Where shape and texture say the same, changing the {cue} alone to that of "
            "another class turns the answer.",
            parts=(),
            task="shapes",
            effect=share[cue],
            control=share["colour"],
            unit="share of answers that turn",
            how=f"{_N} held-out pictures, each drawn again with another {cue}; control: with "
            "another colour",
        )
        for cue in ("texture", "shape")
    )


def weakness(organism: Classifier, model: "Model") -> Fact:
    """What is lost under attack."""
    kind = organism.kind("robust")
    assert kind.attack is not None
    seen = organism.prompts("robust", _N, _SEED)
    noisy, worst = attacked(kind.attack, model.module, seen, _SEED)
    clean = _mean(answers(model.module, seen.pixels) == seen.labels)
    lost = [clean - _mean(answers(model.module, x) == seen.labels) for x in (worst, noisy)]
    return Fact(
        name="weak under attack",
        says=f"Changes of at most {kind.attack.size} per pixel value, made to mislead it, cost it "
        "this share of its accuracy.",
        task="robust",
        effect=round(lost[0], 4),
        control=round(lost[1], 4),
        unit="accuracy lost",
        how=f"projected gradient descent, {kind.attack.steps} steps, on {_N} held-out pictures; "
        "control: as large a change of random sign",
    )


def channels(
    organism: Classifier, model: "Model", task: str, cue: Literal["label", "rival"], k: int
) -> Fact:
    """The channels of the first layer that naming the classes of a cue depends on."""
    before, after = _drawn(organism, task)
    made = model.run(before.inputs, record=STEM)[STEM]
    middle = made.mean((0, 2, 3))

    def right(seen: Pictures, cut: list[int]) -> float:
        def flatten(h: "Tensor") -> "Tensor":
            h = h.clone()
            h[:, cut] = middle[cut, None, None]
            return h

        edits = Edit(STEM, call(flatten)) if cut else ()
        return _mean(model.run(seen.inputs, edits=edits).logits.argmax(-1) == _cue(seen, cue))

    chosen, effect, control = _ablate(list(range(made.shape[1])), k, right, before, after)
    word = {"label": "the label", "rival": "the texture's class"}[cue]
    return Fact(
        name="channels that decide",
        says=f"Without these {k} of {made.shape[1]} channels of the first layer, {word} is named "
        "less often.",
        parts=tuple(f"{STEM}[{channel}]" for channel in sorted(chosen)),
        task=task,
        effect=effect,
        control=control,
        unit=f"share of answers for {word} that is lost",
        how=f"each set everywhere to its mean over training pictures; {_CHOSEN.format(k=k)}",
    )


def heads(organism: Classifier, model: "Model", task: str, k: int) -> Fact:
    """The heads of a vision transformer that its answers depend on."""
    before, after = _drawn(organism, task)
    run = model.run(before.inputs, record="z")
    middle = {layer: run["z", layer].mean(0) for layer in range(model.n_layers)}
    every = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]

    def right(seen: Pictures, cut: list[tuple[int, int]]) -> float:
        edits = [Edit(f"z.{layer}.{head}", _becomes(middle[layer][:, head])) for layer, head in cut]
        return _mean(model.run(seen.inputs, edits=edits).logits.argmax(-1) == seen.labels)

    chosen, effect, control = _ablate(every, k, right, before, after)
    return Fact(
        name="heads that decide",
        says=f"Without these {k} of {len(every)} heads it tells the classes apart less often.",
        parts=tuple(f"a{layer}.h{head}" for layer, head in sorted(chosen)),
        task=task,
        effect=effect,
        control=control,
        unit="accuracy lost",
        how="their outputs set to their means over training pictures, position by position; "
        + _CHOSEN.format(k=k),
    )


def glances(organism: Classifier, model: "Model", task: str) -> Fact:
    """The heads whose first position, which is read out, looks at the patches of the shape."""
    seen = organism.prompts(task, _N, _SEED)
    assert seen.masks is not None
    run = model.run(seen.inputs, record="pattern")
    size = organism.sizes["patch_size"]
    cover = seen.masks.float().unfold(1, size, size).unfold(2, size, size).mean((3, 4)).flatten(1)
    # The masks of other pictures: as large, elsewhere.
    wrong = cover.roll(1, 0)
    on, off = {}, {}
    for layer in range(model.n_layers):
        glance = run["pattern", layer][:, :, 0, 1:]
        for head in range(model.n_heads):
            on[layer, head] = _mean((glance[:, head] * cover).sum(-1))
            off[layer, head] = _mean((glance[:, head] * wrong).sum(-1))
    chosen = [head for head in on if on[head] > off[head] + _MORE]
    return Fact(
        name="heads that look at the shape",
        says="The class token's attention in these heads goes where the shape is.",
        parts=tuple(f"a{layer}.h{head}" for layer, head in chosen),
        task=task,
        effect=round(sum(on[head] for head in chosen) / max(1, len(chosen)), 4),
        control=round(sum(off[head] for head in chosen) / max(1, len(chosen)), 4),
        unit="share of attention",
        how=f"attention from the class token, weighted by how much of each patch the shape covers, "
        f"mean over {_N} held-out pictures; control: the shape's place in another picture; listed "
        f"are all heads whose attention there is greater by {_MORE}",
    )


def _drawn(organism: Classifier, task: str) -> tuple[Pictures, Pictures]:
    """Pictures to choose parts on, and held-out ones to measure on."""
    return organism.prompts(task, _N, _SEED, "train"), organism.prompts(task, _N, _SEED)


def _ablate(
    every: list[Any],
    k: int,
    right: Callable[[Pictures, list[Any]], float],
    before: Pictures,
    after: Pictures,
) -> tuple[list[Any], float, float]:
    """Parts chosen one after the other, what cutting them costs, and what random others cost."""
    chosen: list[Any] = []
    for _ in range(k):
        left = [part for part in every if part not in chosen]
        chosen.append(min(left, key=lambda part: right(before, [*chosen, part])))
    whole, rng = right(after, []), Random("controls")
    others = [part for part in every if part not in chosen]
    random = [whole - right(after, rng.sample(others, k)) for _ in range(_CONTROLS)]
    effect = whole - right(after, chosen)
    return chosen, round(effect, 4), round(sum(random) / _CONTROLS, 4)


def _becomes(value: "Tensor") -> Any:
    """The op that puts one value into every row."""

    def put(h: "Tensor") -> "Tensor":
        return value.to(h).expand_as(h)

    return call(put)


def _cue(seen: Pictures, cue: str) -> "Tensor":
    classes = seen.labels if cue == "label" else seen.rivals
    assert classes is not None
    return classes


def _mean(values: "Tensor") -> float:
    return round(values.float().mean().item(), 4)
