"""Which layers move information between which tokens, and how few of them are needed.

"windows": attention from some tokens to a target is cut in a few neighbouring layers, and the
answer is read again; what it loses there is what came that way:

    effect = (clean - cut) / (clean - contrast)

"subgraph": how long every token can wait, knowing itself only, and how few layers then suffice for
the last token to collect the others ("all for one"). States of waiting tokens are their means over
prompts of the same template that keep the token (CAMA); in the transfer layers the last token sees
the others, these see themselves (ABP); afterwards the last token is alone.

What this does not do: prompts of several templates at once; ways around a cut (use paths).
"""

from typing import TYPE_CHECKING, Any, Literal

from underhood.core.errors import OutOfRange, PairError
from underhood.core.model import Model
from underhood.core.provenance import describe
from underhood.data import EncodedPairs, Pairs, metric_named
from underhood.methods.locate._flow import one_template, places
from underhood.methods.locate._flow_search import Search, Subgraph
from underhood.methods.locate._flow_windows import Windows, windows
from underhood.methods.locate._grids import answered, words
from underhood.methods.locate._options import at_least
from underhood.methods.registry import method
from underhood.view import Result, View, graph, grid, group, lines, sentences

if TYPE_CHECKING:
    import xarray

__all__ = ["information_flow"]

_OTHER = "as many other tokens"
_DRAWN = 1000  # ways in the graph, the strongest first


@method
def information_flow(
    model: Model,
    pairs: Pairs,
    *,
    question: Literal["windows", "subgraph"] = "windows",
    width: int = 1,
    targets: Literal["last", "each"] = "last",
    groups: tuple[str, ...] = (),
    metric: str = "logit_diff",
    keep: float = 0.9,
    against: Literal["all", "wrong"] = "all",
    draw: Literal["slots", "prompts"] = "slots",
    samples: int = 50,
    control: bool = True,
    draws: int = 4,
    seed: int = 0,
    batch_size: int | None = None,
) -> Result:
    """Which layers carry information between which tokens, or the smallest part that still answers.

    Args:
        pairs: Clean and contrast prompts of one template and length. Without answers: the model's
            own top tokens.
        question: "windows" cuts attention by layer and token; "subgraph" searches for the longest
            wait and the shortest transfer.
        width: Layers in a window (windows).
        targets: Tokens that lose sight of others: the "last", or "each" (windows).
        groups: Source tokens: names of the pairs' words or positions, "4", "2-5", "2,7". Empty:
            each token by itself. For "subgraph": what the last token may see while it transfers;
            empty: all.
        metric: A name of `underhood.data.METRICS` (windows).
        keep: Share of the model's accuracy that the subgraph must keep.
        against: An answer is right when it beats "all" others, or the "wrong" answers (subgraph).
        draw: Prompts for the mean states: "slots" draws every position's token by itself from those
            that the given prompts have there; "prompts" takes the given prompts, clean and
            contrast (subgraph).
        samples: Prompts per token and position at least ("slots").
        control: Run the controls as well.
        draws: Random groups, tokens, layers per control; their mean is shown.
        seed: Of all draws.
        batch_size: Rows of one pass; the numbers do not depend on it.

    Returns:
        "windows": over `layer` (a window's first; `last` its last), `query` (target position) and
        `key` (source group): `effect` (no unit; 1 is the whole way from clean to contrast,
        positive: the answer needs this way), `sem` (its standard error over rows, NaN for one),
        `raw` (in the metric's unit), `control` (as many other tokens that the target sees, NaN
        where there are too few), `skipped` (the target does not see the group: exactly 0), and with
        `batch` the metric itself, `blocked`. A token never loses itself.
        "subgraph": over `layer` (L_wait) `wait_accuracy`, with attention open afterwards, beside
        `wait_blind` (mean whatever the token), `wait_skip` (the layers left out) and `wait_noise`
        (moved as far in random directions); over `layer` and `step` (L_transfer)
        `transfer_accuracy`, NaN where not run; the margins behind them, over `batch`, in logits;
        and numbers: `wait`, `transfer` (-1: none keeps enough), `accuracy`, `full_accuracy`,
        `without` (the whole model, its last token alone in the transfer layers), `elsewhere` (as
        many transfer layers at random), `other_tokens` (as many other visible tokens; with groups).

    Raises:
        PairError: Prompts of different length; a model that is never right; equal ends.
        UsageError: An unknown group; with draw="prompts", a token without a second prompt.
        OutOfRange: Positions outside the prompts; a window wider than the model; a bad `keep`.
        NotOffered: Layers without attention scores alone.

    Cost: windows: a row per window, target, group and pair, times 1 + draws with the control
        (equal cells once). subgraph: samples * (most tokens at a position) rows for the mean
        states, then (L + 1) rows per pair, times 4 with controls, and (L - L_wait + 1) for each
        L_wait tried. No backward.

    Source: Mamidanna et al. 2025, "All for One" (CAMA, ABP, the search), adapted: no public code
        was found; drawing slots by themselves, the controls, and trying smaller waits when no
        transfer suffices are ours. Cut attention: Geva et al. 2023, "Dissecting recall of factual
        associations".

    Misleads: attention cut in one window may be made up for in another: wide windows show more. A
        token also reaches the target through tokens in between. The first token is often a sink;
        cutting it disturbs every head. Slots drawn by themselves break what the words of a template
        owe each other (a repeated name): use draw="prompts" there. A first token that is not the
        same in all prompts is no sink, and is hidden like others.

    Example:
        >>> import underhood as uh
        >>> pair = uh.Pairs.one("The capital of France is", "The capital of Norway is")
        >>> found = information_flow(uh.load(), pair, control=False)
        >>> int(found["effect"].sel(query=5, key="4").argmax("layer")) < 3
        True
    """
    _check(width, draws, samples, batch_size, keep)
    encoded = pairs.encode(model)
    ids, sink = one_template(encoded)
    named = places(groups, pairs, ids.shape[1])
    measure = metric_named(metric)
    encoded, origin = answered(model, encoded, measure, batch_size)
    drawn = draws if control else 0
    if question == "windows":
        size = ids.shape[1]
        spots = tuple(range(1, size)) if targets == "each" else (size - 1,)
        named = named or {str(i): (i,) for i in range(size)}
        asked = Windows(width, spots, named, sink, measure, drawn, seed, batch_size)
        data, how, passes = windows(model, encoded, asked)
        view = _windows_view(data, words(encoded, pairs), bool(groups))
    else:
        data, how, passes = _subgraph(model, encoded, ids, Subgraph(
            tuple(sorted({p for g in named.values() for p in g})) if groups else None,
            keep, against, draw, samples, sink, drawn, seed, batch_size,
        ))  # fmt: skip
        view = _subgraph_view(data, keep)
    return Result(
        name="information_flow",
        data=data,
        view=view,
        provenance=describe(
            model, question=question, width=width, targets=targets, groups=list(groups),
            metric=metric, keep=keep, against=against, draw=draw, samples=samples, draws=drawn,
            seed=seed, rows=len(pairs), answers=origin, how=how, passes=passes,
        ),
    )  # fmt: skip


def _check(width: int, draws: int, samples: int, batch_size: int | None, keep: float) -> None:
    at_least(1, width=width, draws=draws, samples=samples, batch_size=batch_size)
    if not 0 < keep <= 1:
        raise OutOfRange("a share to keep lies above 0, up to 1", given=keep, do="e.g. keep=0.9")


def _subgraph(
    model: Model, encoded: EncodedPairs, ids: Any, asked: Subgraph
) -> tuple["xarray.Dataset", str, int]:
    if asked.against == "wrong" and not bool((encoded.wrong >= 0).any(1).all()):
        raise PairError(
            "some pairs have no wrong answers to compare with",
            given="against='wrong'",
            do="give wrong answers, or against='all'",
        )
    search = Search(model, encoded, ids, asked)
    data = search.run()
    return data, search.how, search.passes


# Views -------------------------------------------------------------------------------------------


def _windows_view(data: "xarray.Dataset", tokens: list[str], grouped: bool) -> View:
    rows = [
        str(a) if a == b else f"{a}-{b}"
        for a, b in zip(data["layer"].values, data["last"].values, strict=True)
    ]
    names = [str(key) for key in data["key"].values]
    cols = names if grouped else [tokens[int(key)] for key in names]
    targets = [int(q) for q in data["query"].values]
    views = []
    for i, target in enumerate(targets):
        layout: dict[str, Any] = {
            "rows": rows, "cols": cols, "row_name": "layers", "col_name": "group" if grouped else
            "pos", "unit": "of the way",
        }  # fmt: skip
        control = None
        if "control" in data:
            control = grid(
                data["control"].values[:, i], **layout, title=f"Control: {_OTHER}",
                about="The mean of random groups of equal size that the target sees.",
            )  # fmt: skip
        views.append(
            grid(
                data["effect"].values[:, i], **layout, control=control,
                title=f"What {tokens[target].strip()!r} loses when attention to a token is cut",
                about=_windows_about(data),
            )
        )  # fmt: skip
    if len(views) == 1:
        return views[0]
    return group([_flow_graph(data, tokens, grouped), *views], title="Information flow")


def _flow_graph(data: "xarray.Dataset", tokens: list[str], grouped: bool) -> View:
    """All ways at once: from the token that is hidden to the one that loses it, layer by layer."""
    import numpy as np

    effect, ends = data["effect"].values, data["last"].values + 1  # [layer query key]
    layers, queries = (data[name].values.tolist() for name in ("layer", "query"))
    names = [str(key) for key in data["key"].values]
    order = np.argsort(-np.abs(np.nan_to_num(effect)), axis=None)[:_DRAWN]
    total = int((np.nan_to_num(effect) != 0).sum())
    nodes: dict[str, dict[str, Any]] = {}
    edges = []
    for layer, q, k in zip(*np.unravel_index(order, effect.shape), strict=True):
        weight = float(effect[layer, q, k])
        if not weight or weight != weight:
            continue
        target = queries[q]
        source = names[k] if grouped else int(names[k])
        rows = (source, float(layers[layer])), (target, float(ends[layer]))
        for place, y in rows:
            known = isinstance(place, int)
            nodes[f"{place}@{y:g}"] = {
                "id": f"{place}@{y:g}", "label": tokens[place] if known else str(place), "y": y,
                "x": float(place) if known else -1.0 - names.index(str(place)),
                "at": {"layer": int(y), "pos": place} if known else {},
            }  # fmt: skip
        words = [tokens[p] if isinstance(p, int) else p for p, _ in rows]
        name = f"{words[0]} to {words[1]}, layer {layers[layer]}"
        edges.append((*(f"{place}@{y:g}" for place, y in rows), weight, True, name))
    return graph(
        list(nodes.values()), edges, unit="of the way", total=total,
        x_labels=None if grouped else tokens, x_name="group, then token" if grouped else "pos",
        title="Which token tells which, and where",
        about="A line: attention along it was cut in the layers that it crosses, and so much of the"
        " answer was lost (blue) or gained (red).",
    )  # fmt: skip


def _windows_about(data: "xarray.Dataset") -> str:
    clean, contrast = float(data["clean"].mean()), float(data["contrast"].mean())
    ends = f"clean {clean:+.3g}, contrast {contrast:+.3g} {data.attrs['unit']}"
    return (
        f"0 = the clean run as it is, 1 = its answer lost to the contrast's"
        f" ({data.attrs['metric']}: {ends}). A token never loses itself."
    )


def _subgraph_view(data: "xarray.Dataset", keep: float) -> View:
    wait, transfer = int(data["wait"]), int(data["transfer"])
    full = float(data["full_accuracy"])
    if wait < 0:
        told = [f"No wait and transfer keep {keep:.0%} of the model's accuracy of {full:.2f}."]
    else:
        told = [
            f"All tokens can wait for {_count(wait)}, knowing themselves only, and"
            f" {_count(transfer)} of transfer then do: accuracy {float(data['accuracy']):.2f} of"
            f" {full:.2f}.",
            f"With the last token alone in these layers, and nothing else changed, the model's"
            f" accuracy is {float(data['without']):.2f}.",
        ]
        for name, what in (
            ("elsewhere", "As many transfer layers at random places"),
            ("other_tokens", "As many other visible tokens"),
        ):
            if float(data[name]) == float(data[name]):
                told.append(f"{what}: accuracy {float(data[name]):.2f}.")
    waits = {"mean given the token": data["wait_accuracy"]}
    if bool(data["wait_blind"].notnull().any()):
        waits |= {
            "mean whatever the token": data["wait_blind"], "layers skipped": data["wait_skip"],
            "random directions": data["wait_noise"],
        }  # fmt: skip
    points = [str(n) for n in data["layer"].values]
    views: list[View] = [
        sentences(told, title="All for one"),
        lines(
            points, waits, x_name="L_wait (layers)", y_name="accuracy", span=(0.0, 1.0),
            title="How long the tokens can wait", about="Attention is open afterwards.",
        ),
    ]  # fmt: skip
    run = [n for n in range(len(points)) if bool(data["transfer_accuracy"][n].notnull().any())]
    if run:
        curves = {f"L_wait {n}": data["transfer_accuracy"].values[n] for n in run}
        views.append(
            lines(
                points, curves, x_name="L_transfer (layers)", y_name="accuracy", span=(0.0, 1.0),
                title="How few layers must transfer",
                about="The last token sees the others in these layers only, and they themselves.",
            )
        )  # fmt: skip
    return group(views, title="Information flow: all for one")


def _count(layers: int) -> str:
    return f"{layers} layer" + "s" * (layers != 1)
