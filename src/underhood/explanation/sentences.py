"""From numbers to plain sentences. Every sentence holds the numbers that it is made of."""

import math
from typing import TYPE_CHECKING, Any

from underhood.core.names import part_name
from underhood.view import Result, View, table
from underhood.view import heads as heads_view

if TYPE_CHECKING:
    from underhood.explanation.explain import Explanation

__all__ = ["answer", "head_table", "headline", "lead", "patterns_of", "quoted"]

LOOKS = {
    "previous": "it looks at the word before",
    "duplicate": "it looks at an earlier copy of the word",
    "induction": "it looks at what followed an earlier copy of the word",
    "lagged": "it looks a fixed number of words back",
    "shifted": "it looks beside an earlier copy of the word",
    "successor": "it moves a word to the next in its series",
}
SETTLED = 0.5  # probability from which the answer counts as readable


def quoted(text: str) -> str:
    """A token in quotation marks, without the space that many tokens begin with."""
    return f"“{text.strip() or text}”"


def percent(value: float) -> str:
    """A share as a percentage with as many digits as say something; never rounded to 0 or 100."""
    share = 100 * value
    if 99.9 < share < 100:
        return "over 99.9 %"
    if 0 < share < 0.1:
        return "under 0.1 %"
    return f"{share:.1f} %" if abs(share) < 10 or 99 < share < 100 else f"{share:.0f} %"


def share(value: float) -> str:
    """A faithfulness as a percentage: may be above 1 or below 0, and is often near either."""
    return f"{round(100 * value) + 0:d} %".replace("-", "\N{MINUS SIGN}")


def signed(value: float) -> str:
    """A number with its sign, two digits, and a true minus."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def odds(logits: float) -> str:
    """A logit difference as odds: `3.2 to 1`, `1 to 45`."""
    ratio = math.exp(min(abs(logits), 50.0))
    words = f"{ratio:.1f}" if ratio < 10 else f"{float(f'{ratio:.2g}'):,.0f}"
    return f"{words} to 1" if logits >= 0 else f"1 to {words}"


def listed(items: list[str]) -> str:
    """Words as an enumeration."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def headline(found: "Explanation") -> list[str]:
    """The answer in plain sentences, in the order of the report."""
    told = [*lead(found), *(answer(found, name) for name in _ANSWERS)]
    return [line for line in told if line]


def lead(found: "Explanation") -> list[str]:
    """What the report opens with: what the model says, and the question."""
    return [_says(found), _asks(found)]


def answer(found: "Explanation", part: str) -> str:
    """The answer of one part of the report; empty where it has none."""
    make = _ANSWERS.get(part)
    return make(found) if make is not None else ""


def _says(found: "Explanation") -> str:
    question = found.question
    model = found.provenance["model"].rstrip("/").rpartition("/")[2]
    share = dict(question.top).get(question.answer)
    tail = f"with probability {percent(share)}" if share is not None else "among others"
    verb = "says" if question.top[0][0] == question.answer else "is asked about"
    return f"After {quoted(question.prompt)}, {model} {verb} {quoted(question.answer)} {tail}."


def _asks(found: "Explanation") -> str:
    question = found.question
    line = (
        f"It prefers {quoted(question.answer)} to {quoted(question.wrong)} by"
        f" {signed(question.clean)} logits ({odds(question.clean)}); after {quoted(question.other)}"
        f" the difference is {signed(question.contrast)} ({odds(question.contrast)})."
    )
    if question.contrast > 0:
        line += " The contrast does not turn the answer around, so the shares below are rough."
    if question.searched:
        line += (
            " That contrast was found by search, since none was given: weaker evidence than one"
            " of your own."
        )
    return line


def _forms(found: "Explanation") -> str:
    lens = found.results.get("lens")
    if lens is None:
        return ""
    last = lens.data["target_prob"].values[:, -1]
    layers = lens.data["layer"].values
    readable = [int(n) for n, p in zip(layers, last, strict=True) if p > SETTLED]
    total = len(layers) - 1
    if not readable:
        return f"At the last word the answer never becomes the likely reading ({total} layers)."
    at = readable[0]
    before = [float(p) for n, p in zip(layers, last, strict=True) if n < at]
    where = "in the embedding already" if at < 0 else f"after layer {at} of 0 to {total - 1}"
    step = f", up from {percent(before[-1])} one layer earlier" if before else ""
    share = float(last[list(layers).index(at)])
    return f"At the last word the answer becomes readable {where} ({percent(share)}{step})."


def _writers(found: "Explanation") -> str:
    result = found.results.get("writers")
    if result is None:
        return ""
    parts = result.data["contribution"]
    ranked = sorted(
        zip(parts["node"].values.tolist(), parts.values.tolist(), strict=True),
        key=lambda item: -abs(item[1]),
    )
    top = listed([f"{node} ({signed(value)})" for node, value in ranked[:3]])
    return (
        f"Written directly by {top} (a3.h0 is head 0 of layer 3, m3 its MLP), of"
        f" {len(ranked)} parts that sum to"
        f" {signed(float(result.data['total']))}; the model's own difference is"
        f" {signed(float(result.data['logit_diff']))}."
    )


def _causes(found: "Explanation") -> str:
    result = found.results.get("causes")
    if result is None:
        return ""
    effect, control = result.data["effect"], result.data["control"]
    words = result.data["token"].values.tolist()
    layers = effect["layer"].values.tolist()
    best = [int(row.argmax()) for row in effect.values]
    runs: list[list[Any]] = []
    for layer, place, row in zip(layers, best, effect.values, strict=True):
        if runs and runs[-1][2] == place:
            runs[-1][1] = layer
            runs[-1][3] = min(runs[-1][3], float(row[place]))
        else:
            runs.append([layer, layer, place, float(row[place])])
    told = [
        f"{'on' if i == 0 else 'then on'} {quoted(words[place])} (position {place})"
        f" {_span(first, last)} (moved over, it brings back {_least(share, first != last)})"
        for i, (first, last, place, share) in enumerate(runs[:3])
    ]
    noise = max((abs(float(control[i, p])) for i, p in enumerate(best)), default=float("nan"))
    return (
        f"The answer hangs {', '.join(told)}; random changes of the same size bring back at most"
        f" {percent(noise)}."
    )


def _least(share: float, several: bool) -> str:
    told = percent(share)
    return f"{'at least ' if several and not told.startswith('over') else ''}{told} of it"


def _span(first: int, last: int) -> str:
    if first == last:
        return f"on entering layer {first}"
    return f"on entering layers {first} to {last}"


def _circuit(found: "Explanation") -> str:
    result = found.results.get("circuit")
    if result is None:
        return ""
    data = result.data
    inside, total = int(data["in_circuit"].sum()), data.sizes["edge"]
    kept, rest = float(data["f"]), float(data["f_rest"])
    chance = float(data["f_same_size"].max())
    return (
        f"{inside} of the {total:,} connections between its parts ({percent(inside / total)}) keep"
        f" {share(kept)} of that difference by themselves; random circuits of the same size keep at"
        f" most {share(chance)}, and all other connections together {share(rest)}."
    )


def _heads(found: "Explanation") -> str:
    from underhood.explanation.explain import important_heads

    result, heads = found.results.get("heads"), important_heads(found)
    if result is None:
        return ""
    if not heads:
        return "No single head brings the answer back by itself."
    effect, control = result.data["effect"], result.data["control"]
    kinds = _kinds(found)
    row = {layer: i for i, layer in enumerate(effect["layer"].values.tolist())}
    told = [
        f"{part_name('head', *place)} brings back {percent(float(effect[row[place[0]], place[1]]))}"
        + (f" ({LOOKS[kinds[place]]})" if kinds.get(place) in LOOKS else "")
        for place in heads
    ]
    noise = max(abs(float(control[row[layer], head])) for layer, head in heads)
    return (
        f"Of the heads, each moved over by itself, {listed(told)}; a random change of the same"
        f" size at most {percent(noise)}."
    )


def _kinds(found: "Explanation") -> dict[tuple[int, int], str]:
    result = found.results.get("kinds")
    if result is None:
        return {}
    kind = result.data["kind"]
    layers = kind["layer"].values.tolist()
    return {
        (int(layer), head): str(kind.values[i, head])
        for i, layer in enumerate(layers)
        for head in range(kind.sizes["head"])
    }


def _changes(found: "Explanation") -> str:
    change = found.change
    if change is None:
        return ""
    question = found.question
    names = listed([part_name("head", *place) for place in change.heads])
    says = change.top[0]
    line = (
        f"Giving {names} {'its' if len(change.heads) == 1 else 'their'} values from the contrast"
        f" moves the difference from {signed(question.clean)} to {signed(change.after)}: the model"
        f" now says {quoted(says[0])} ({percent(says[1])})"
    )
    if not change.random:
        return line + "; there are too few other heads for a random control."
    count = len(change.heads)
    return line + (
        f"; the same done to {count} random head{'s' if count > 1 else ''} leaves it at"
        f" {signed(change.random_mean)} on average."
    )


def _odd(found: "Explanation") -> str:
    told = []
    giants, sinks = found.results.get("giants"), found.results.get("sinks")
    if giants is not None:
        count = int(giants.data.attrs["count"])
        top = float(giants.data["ratio"].max())
        told.append(
            f"{count} massive activations" if count
            else f"no massive activations (the largest value is {top:.0f} times the median)"
        )  # fmt: skip
    if sinks is not None:
        values = sinks.data["sink"].values
        resting = int((values > 0.9).sum())
        told.append(f"{resting} of {values.size} heads rest on the first token (over 90 %)")
    return f"Odd or not: {'; '.join(told)}." if told else ""


_ANSWERS = {
    "forms": _forms,
    "circuit": _circuit,
    "writers": _writers,
    "causes": _causes,
    "heads": _heads,
    "change": _changes,
    "odd": _odd,
}


def head_table(found: "Explanation", heads: list[tuple[int, int]]) -> View | None:
    """The important heads with what they restore, write, and score."""
    effects, kinds = found.results.get("heads"), found.results.get("kinds")
    if not heads or effects is None or kinds is None:
        return None
    writers = found.results.get("writers")
    row = {layer: i for i, layer in enumerate(effects.data["layer"].values.tolist())}
    kind_row = {layer: i for i, layer in enumerate(kinds.data["layer"].values.tolist())}
    names = [n for n in ("previous", "duplicate", "induction") if n in kinds.data]
    rows = []
    for layer, head in heads:
        i, k = row[layer], kind_row[layer]
        writes = _written(writers, layer, head)
        scores = [float(kinds.data[n][k, head]) for n in names]
        verdict = _kinds(found).get((layer, head), "") or "-"
        restores = (float(effects.data[name][i, head]) for name in ("effect", "control"))
        rows.append([part_name("head", layer, head), *restores, writes, *scores, verdict])
    controls = [float(kinds.data[f"{n}_control"].mean()) for n in names]
    return table(
        ["head", "restores", "random change", "writes (logits)", *names, "kind"],
        rows,
        title="The important heads",
        about="Restores: share of the answer that its value alone brings back (1 = all). Writes:"
        " its direct contribution. The scores are mean attention on repeated random words: to the"
        " word before, to the same word earlier, to the word after that.",
        control=table(
            ["score", "chance"],
            [[n, c] for n, c in zip(names, controls, strict=True)],
            title="Control: the scores without a repeat, or of uniform attention",
        ),
    )


def _written(result: Result | None, layer: int, head: int) -> float | None:
    if result is None:
        return None
    nodes = result.data["contribution"]["node"].values.tolist()
    name = part_name("head", layer, head)
    return float(result.data["contribution"][nodes.index(name)]) if name in nodes else None


def patterns_of(looks: Result, heads: list[tuple[int, int]]) -> View | None:
    """Attention patterns of some heads."""
    if not heads:
        return None
    data = looks.data
    rows = {layer: i for i, layer in enumerate(data["layer"].values.tolist())}
    words = [str(w) for w in data["query_token"].values.ravel()[: data.sizes["query"]]]
    chosen = {
        part_name("head", layer, head): data["pattern"].values[rows[layer], head]
        for layer, head in heads
    }
    about = "Rows are the words that look, columns the words they look at."
    return heads_view(words, chosen, title="Where they look", about=about)
