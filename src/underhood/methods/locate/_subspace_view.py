"""What a search for subspaces looks like: its sentences, the layers against controls, the parts."""

from typing import TYPE_CHECKING, Any

import numpy as np

from underhood.view import View, bars, group, lines, sentences, table

if TYPE_CHECKING:
    import xarray

__all__ = ["best_layer", "headline", "report_view", "search_view"]

_KINDS = {
    "das": "learned by DAS", "boundless": "learned by boundless DAS",
    "mask": "chosen by a learned mask over the axes",
    "mask-pca": "chosen by a learned mask over principal components",
    "mean-difference": "the mean difference of the two runs",
    "pca": "the main directions of the differences",
}  # fmt: skip
_ARMS = {
    "subspace": "the subspace", "row": "its part that is read", "null": "its part that is not",
    "full": "the whole activation", "random": "random subspace", "permuted": "other pairs' labels",
}  # fmt: skip
_POSITIONS = {
    "last": "at the last token", "changed": "at the token that changes", "all": "at all tokens",
}  # fmt: skip
_BEYOND = 0.05  # of the way: what a part may move more than the whole without remark
_MOST = 0.5  # of held-out pairs: from here the subspace carries the decision, not a part of it
_CLEAR = 0.1  # of accuracy: what a subspace must be above its controls to be called found


def _at(data: "xarray.Dataset", name: str, part: str, layer: int) -> float:
    if part not in data["part"].values:
        return float("nan")
    return float(data[name].sel(layer=layer, part=part))


def best_layer(data: "xarray.Dataset") -> int:
    """The layer whose subspace is exchanged most accurately; of equals, with the larger effect."""
    mine = data.sel(part="subspace")
    rank = np.lexsort((mine["effect"].values, mine["accuracy"].values))
    return int(data["layer"].values[rank[-1]])


def headline(data: "xarray.Dataset", facts: dict[str, Any]) -> list[str]:
    """What was found and what the controls got; then the verdict of the illusion diagnostic."""
    layer = best_layer(data)
    names = dict(zip(data["layer"].values.tolist(), facts["site"], strict=True))
    mine, others = _at(data, "accuracy", "subspace", layer), _controls(data, layer)
    size = int(data["size"].sel(layer=layer))
    where = _POSITIONS.get(str(facts["positions"]), f"at position {facts['positions']}")
    found = mine >= max(value for _, value in others) + _CLEAR
    what = f"{size} of the {_width(data)} dimensions of {names[layer]} {where}"
    several = len(names)
    first = (
        f"{what}, {_KINDS[facts['kind']]}, "
        + ("do not carry" if not found else "carry" if mine >= _MOST else "carry a part of")
        + " the decision"
        + f": swapped alone, they give the contrast's answer in {mine:.0%} of"
        f" {data.sizes['batch']} held-out pairs ("
        + "; ".join(f"{name} {value:.0%}" for name, value in others)
        + f"; the whole activation {_at(data, 'accuracy', 'full', layer):.0%})."
    )
    moved, chance = (_at(data, "effect", part, layer) for part in ("subspace", "random"))
    second = (
        f"They move the logit difference {moved:.0%} of the way from clean to contrast (FLDD"
        f" {_at(data, 'fldd', 'subspace', layer):.0f} %), the strongest of {facts['draws']} random"
        f" subspaces {chance:.0%}."
    )
    says = [first, second, illusion_sentence(data, layer, facts)]
    whole = _at(data, "effect", "full", layer)
    if moved > whole + _BEYOND:
        says.append(
            f"They move more than the whole activation does ({moved:.0%} against {whole:.0%}): the"
            " place's other parts work against them, or the model does not use them, whatever the"
            " split says."
        )
    if several > 1:
        each = data["accuracy"].sel(part="subspace").values
        says.append(
            f"Layer {layer} is the best of {several}, chosen on the same held-out pairs; the mean"
            f" over layers is {each.mean():.0%}."
        )
        lured = [str(n) for n in data["layer"].values[data["illusion"].values]]
        if lured:
            says.append(f"Flagged as an illusion: layer {', '.join(lured)}.")
    return says


def _width(data: "xarray.Dataset") -> int:
    return data["basis"].shape[-1]


def _controls(data: "xarray.Dataset", layer: int) -> list[tuple[str, float]]:
    names = {
        "random": "random subspaces of equal size",
        "permuted": "learned from other pairs' labels",
    }
    found = [(text, _at(data, "accuracy", part, layer)) for part, text in names.items()]
    return [(text, value) for text, value in found if value == value]


def illusion_sentence(data: "xarray.Dataset", layer: int, facts: dict[str, Any]) -> str:
    """The verdict at one layer, with its numbers."""
    at = data["layer"].values.tolist().index(layer)
    reader, verdict = facts["readers"][at], str(data["verdict"].values[at])
    if reader.startswith("none"):
        return f"Illusion not decided: no linear read-out ({reader.removeprefix('none: ')})."
    rank, width = int(data["rank"].values[at]), _width(data)
    seen = f"{reader} sees {rank} of {width} dimensions"
    if rank >= width:
        return f"No illusion of this kind can be here: {seen}, so no direction is disconnected."
    share = float((data["null_norms"].values[at] ** 2)[: int(data["size"].values[at])].mean())
    numbers = (
        f"swapped alone, the part that is read moves {_at(data, 'effect', 'row', layer):.0%} of the"
        f" way, all of it {_at(data, 'effect', 'subspace', layer):.0%}; {share:.0%} of it is not"
        f" read ({seen})"
    )
    said = {
        "illusion": "An illusion", "cleared": "No illusion", "undecided": "Illusion not decided",
        "no effect": "No effect that could be an illusion",
    }  # fmt: skip
    return f"{said[verdict]} by the split of Makelov et al.: {numbers}."


def search_view(data: "xarray.Dataset", facts: dict[str, Any], says: list[str]) -> View:
    """Sentences, accuracy against controls, the parts, and the loss."""
    views: list[View] = [sentences(says)]
    if data.sizes["layer"] > 1:
        shown = [p for p in ("subspace", "full", "random", "permuted") if p in data["part"].values]
        views.append(lines(
            [str(n) for n in data["layer"].values],
            {_ARMS[p]: data["accuracy"].sel(part=p).values for p in shown},
            x_name="layer", y_name="interchange accuracy", span=(0, 1),
            title="Interchange accuracy by layer",
            about="Share of held-out pairs whose top token is the contrast's answer after the swap."
            f" The contrast run itself says it in {float(data['reached'].mean()):.0%}.",
        ))  # fmt: skip
    views += [_bars(data), _table(data, facts)]
    if "loss" in data:
        views.append(lines(
            [str(i) for i in range(data.sizes["step"])],
            {f"layer {n}": data["loss"].sel(layer=n).values for n in data["layer"].values},
            x_name="step", y_name="loss", title="Training",
        ))  # fmt: skip
    return group(views, title="Subspaces that carry the decision", about=_ABOUT)


_ABOUT = (
    "Training finds what suffices to change the answer, which need not be what the model uses. A"
    " direction is an illusion when its swap works only through a part that nothing reads and a"
    " part that differs in no run."
)


def report_view(data: "xarray.Dataset", facts: dict[str, Any]) -> View:
    """The diagnostic of one subspace."""
    layer = int(data["layer"].values[0])
    says = [illusion_sentence(data, layer, facts)]
    return group(
        [sentences(says), _bars(data), _table(data, facts)], title="Used, or an illusion?",
        about=_ABOUT,
    )  # fmt: skip


def _bars(data: "xarray.Dataset") -> View:
    """Effects of the parts at the best layer."""
    layer = best_layer(data)
    shown = data["effect"].sel(layer=layer)
    parts = [str(p) for p in shown["part"].values if p != "random"]
    chance = abs(_at(data, "effect", "random", layer))
    return bars(
        [_ARMS[p] for p in parts], [float(shown.sel(part=p)) for p in parts], unit="of the way",
        baseline=[(-chance, chance)] * len(parts),
        baseline_name="random subspace of equal size (strongest draw)",
        title=f"Swapped alone, layer {layer}",
        about="0: the clean run's logit difference; 1: the contrast's.",
    )  # fmt: skip


def _table(data: "xarray.Dataset", facts: dict[str, Any]) -> View:
    """One row per layer and part, and the split's numbers per layer in `about`."""
    rows = []
    for at, layer in enumerate(data["layer"].values.tolist()):
        for part in [str(p) for p in data["part"].values]:
            numbers = [
                round(_at(data, name, part, layer), 6) + 0.0  # no minus before a zero
                for name in ("accuracy", "flipped", "effect", "fldd")
            ]
            if numbers[2] == numbers[2]:
                rows.append([layer, _ARMS[part], *numbers])
        split = data.isel(layer=at)
        rows.append([layer, f"verdict: {split['verdict'].values}"
                     f"; disconnected {float(split['disconnected']):.0%} of what it reads"
                     f", dormant {float(split['dormant']):.0%} of what it writes",
                     None, None, None, None])  # fmt: skip
    columns = [
        "layer", "swapped", {"name": "accuracy", "format": ".0%"},
        {"name": "flipped", "format": ".0%"}, {"name": "of the way", "format": "+.2f"},
        {"name": "FLDD", "format": "+.1f", "unit": "%"},
    ]  # fmt: skip
    readers = "; ".join(dict.fromkeys(facts["readers"]))
    return table(
        columns, rows, title="The parts and the controls",
        about=f"Read-out that splits the subspace: {readers}. Clean logit difference"
        f" {float(data['clean'].mean()):+.3g}, contrast {float(data['contrast'].mean()):+.3g}.",
    )  # fmt: skip
