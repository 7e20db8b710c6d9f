"""How prior layers look: which layer brings the prior, and what the remedies gain."""

from typing import TYPE_CHECKING, Any

from underhood.view import View, bars, grid, group, lines, sentences, table

if TYPE_CHECKING:
    import xarray

__all__ = ["view_of"]

_REMEDIES = {
    "": "as it is",
    "_edited": "components edited",
    "_random": "random components edited",
    "_instructed": "instructed",
    "_tuned": "layers tuned",
    "_tuned_random": "other layers tuned",
}


def view_of(data: "xarray.Dataset", origin: str) -> View:
    """Sentences, correlation and margin over layers, what each layer and component does, remedies.

    Args:
        data: The result's numbers.
        origin: Where the prior comes from.
    """
    import numpy as np

    labels = ["embed", *map(str, data["layer"].values[1:])]
    curves = lines(
        labels,
        {
            "wrong items": data["correlation"],
            "all items": data["correlation_all"],
            "priors permuted, 95th percentile": data["correlation_control"],
        },
        x_name="layer",
        y_name="Spearman",
        span=(-1, 1),
        title="The wrong token and its prior",
        about="Rank correlation of its lens log-probability and its log prior, over items.",
    )
    quarters = data["quartile"].values
    margins = {
        f"{name} answers": data["margin"].values[quarters == number].mean(0)
        for number, name in enumerate(data["part"].values)
        if (quarters == number).any()
    }
    margin = lines(
        labels,
        margins,
        x_name="layer",
        y_name="right minus favoured, logits",
        title="Right answer against the prior's favourite",
        about="Positive early and negative at the end: known, then overwritten.",
    )
    chance = data["carried_control"].values[1:].tolist()
    carried = bars(
        [f"layer {layer}" for layer in data["layer"].values[1:]],
        data["carried"].values[1:],
        unit="logits per nat",
        baseline=[(-c, c) for c in chance],
        baseline_name="priors permuted over answers, 95 %",
        title="What each layer adds to the prior",
    )
    layout: dict[str, Any] = {
        "rows": data["site"].values,
        "cols": labels[1:],
        "row_name": "output of",
        "col_name": "layer",
        "unit": "logits",
    }
    marks = [(int(r), int(c)) for r, c in np.argwhere(data["edited"].values[:, 1:])]
    parts = grid(
        data["effect"].values[:, 1:],
        **layout,
        marks=marks,
        title="What each component does for the right answer",
        about="Margin lost without it; negative works for the prior. Outlined: edited below.",
        control=grid(
            data["effect_control"].values[:, 1:], **layout, title="Random change of equal length"
        ),
    )
    views = [sentences(_said(data, origin)), curves, margin, carried, parts, _remedies(data)]
    return group(views, title="Prior layers")


def _said(data: "xarray.Dataset", origin: str) -> list[str]:
    carried = data["carried"].values[1:]
    best = int(carried.argmax())
    control = float(data["carried_control"].values[best + 1])
    return [
        f"{float(data['correct'].mean()):.0%} of {data.sizes['batch']} items are right;"
        f" {float(data['overwritten'].mean()):.0%} are known half-way and then overwritten"
        f" (prior: {origin}).",
        f"Layer {best} adds most to the prior: {carried[best]:+.2f} logits per nat"
        f" (permuted priors: {control:.2f}).",
    ]


def _remedies(data: "xarray.Dataset") -> View:
    rows: list[list[Any]] = []
    weights = data["rows"].values
    for suffix, text in _REMEDIES.items():
        if f"accuracy{suffix}" not in data:
            continue
        shares = data[f"accuracy{suffix}"].values
        whole = float((shares * weights)[weights > 0].sum() / max(weights.sum(), 1))
        cells = [None if share != share else float(share) for share in shares]
        link = float(data[f"error_prior{suffix}"])
        rows.append([text, whole, *cells, None if link != link else link])
    columns: list[Any] = ["", {"name": "right", "format": ".0%"}]
    columns += [{"name": str(name), "format": ".0%"} for name in data["part"].values]
    columns.append({"name": "wrong and prior", "unit": "Spearman", "format": "+.2f"})
    return table(
        columns,
        rows,
        title="Remedies, on answers that nothing was chosen by",
        about="By the prior of the right answer. Last column: without a prior it is near 0.",
    )
