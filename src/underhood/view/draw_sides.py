"""Side by side: the arms of a steering bench, and two models or runs with their difference."""

from underhood.view.colour import limits_of
from underhood.view.doc import Arm, Bench, Column, Diff, Grid, Table, Text, Texts, Tokens
from underhood.view.draw_grid import grid
from underhood.view.draw_words import table, texts, tokens
from underhood.view.markup import Html, join, tag
from underhood.view.number import show
from underhood.view.rescale import rescaled


def bench(view: Bench) -> Html:
    """The prompt, the texts of all arms, and what else the changes did."""
    prompt = tag("p", tag("span", "prompt", cls="uh-badge"), tag("span", view.prompt), cls="uh-ask")
    how = tag("p", f"Tokens are chosen by: {view.decoding}.", cls="uh-note")
    columns = [as_text(arm, view.unit) for arm in view.arms]
    parts = [prompt, how, texts(Texts(columns=columns))]
    effects = effects_table(view)
    if effects.rows:
        parts.append(table(effects))
    return join(parts)


def as_text(arm: Arm, unit: str) -> Text:
    """An arm as a column of text, its strength in the note."""
    parts = [strength_text(arm, unit), arm.note]
    note = "; ".join(part for part in parts if part)
    return Text(label=arm.label, tokens=arm.tokens, values=arm.values, note=note)


def strength_text(arm: Arm, unit: str) -> str:
    """`strength +2.00 residual norms`, or `unedited`."""
    if arm.strength is None:
        return "unedited"
    return f"strength {show(arm.strength, 2)} {unit}".rstrip()


def effects_table(view: Bench) -> Table:
    """Side effects: one row per arm, one column per effect."""
    names = list(view.arms[0].effects) if view.arms else []
    columns = [Column(name="arm"), Column(name="strength", unit=view.unit, format="+.2f")]
    columns += [Column(name=name) for name in names]
    rows = [[arm.label, arm.strength, *arm.effects.values()] for arm in view.arms]
    return Table(title="side effects", columns=columns, rows=rows if names else [])


def diff(view: Diff) -> Html:
    """A and B on one scale, then A - B on its own."""
    a, b = shared(view)
    sides = [_side(a, a.title or "A"), _side(b, b.title or "B")]
    wide = isinstance(a, Tokens) or len(a.cols) > 8
    pair = tag("div", *sides, cls="uh-pair uh-stacked" if wide else "uh-pair")
    return join([pair, _side(view.delta, view.delta.title)])


def shared(view: Diff) -> tuple[Grid | Tokens, Grid | Tokens]:
    """A and B with one limit, that of the larger."""
    both = (view.a, view.b)
    high = max(limits_of(side.values or [], side.scale, side.limit).high for side in both)
    a, b = (side.model_copy(update={"limit": high}) for side in both)
    return a, b


def _side(view: Grid | Tokens, name: str) -> Html:
    drawn = rescaled(view)
    picture = grid(drawn) if isinstance(drawn, Grid) else tokens(drawn)
    return tag("div", tag("p", name, cls="uh-label"), picture, cls="uh-side")
