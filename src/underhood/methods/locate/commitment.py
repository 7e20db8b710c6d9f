"""Commitment: the layer from which a wrong answer can no longer be undone, and what led there.

Two runs of aligned prompts: F says the right answer, X says the wrong one. At the last token:

    inserted(l)   the margin (right minus wrong, logits) of F with X's stream after layer l put in
    frozen(l)     the margin of X's stream after layer l plus what F's later layers wrote
    commitment    the first layer from which `inserted` stays negative: what X has gathered by then
                  suffices, whatever the rest of the prompt says
    association   the first layer from which `frozen` and the lens of X stay negative: the wrong
                  answer has been written, no later layer is needed

The two differ where the cause arrives before its consequence: X's stream may hold the distractor
in layer 0 (committed) that only layer 3 turns into the answer (associated).

Beside them the semantic trace graph (`_trace_graph`): the concepts of each layer, what supports
what, how far that support goes to the right side (contextual alignment, -1 to 1), and the two
pathways: what attention (contextual) and MLP (associative) of each layer do for the answer.

What this does not do: judge hallucinations, or find the prompts; a contrast that makes the model
say something wrong is yours to give.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from underhood.core.errors import OutOfRange
from underhood.core.head import Head
from underhood.core.model import Model
from underhood.core.provenance import describe
from underhood.data import Pairs
from underhood.methods.locate._options import at_least
from underhood.methods.locate._trace import (
    check_stop,
    first_staying,
    own_answers,
    streams,
)
from underhood.methods.locate._trace_curves import (
    RUNS,
    Ends,
    alignment_of,
    curves_of,
    ends_of,
    lenses_of,
    pathways_of,
)
from underhood.methods.locate._trace_graph import Concepts, Edges, concepts, edges
from underhood.methods.locate._trace_view import view_of
from underhood.methods.read._unembedding import head_of
from underhood.methods.registry import method
from underhood.view import Result

if TYPE_CHECKING:
    import xarray

__all__ = ["commitment"]


@method
def commitment(
    model: Model,
    pairs: Pairs,
    *,
    top: int = 5,
    graph: Literal["next", "all", "none"] = "next",
    graph_row: int = 0,
    draws: int = 3,
    seed: int = 0,
    batch_size: int | None = None,
) -> Result:
    """The layer from which a wrong answer is settled, and the graph of concepts that led to it.

    Args:
        pairs: Clean: a prompt after which the model says the right answer (run F); contrast: one of
            as many tokens after which it says a wrong one (run X). `answers` and `wrong` name them;
            without: the model's own top tokens. Several answers of a row are averaged; all of them
            are the context-consistent set, all wrong ones the distractors.
        top: Concepts per layer.
        graph: Edges to draw: to the "next" layer and the output, to "all" later layers, or "none".
        graph_row: The row whose graph is drawn.
        draws: Random directions per cell of the control.
        seed: Of these.
        batch_size: Rows of one pass; the numbers do not depend on it.

    Returns:
        Layer -1 is the stream before the first block. Over `batch`, `layer`, in logits of the
        margin (positive supports the right answer): `inserted`, `frozen`, `lens_factual`,
        `lens_hallucinating`; controls `inserted_control` (F with a random change of equal length,
        the lowest of the draws) and `shuffled` (F with another row's X stream; NaN for one row);
        `says_wrong` (the patched F's top token is a wrong answer). Over `batch`: `commitment`,
        `association` (layers; NaN if none, or in rows that are not `usable`), `commitment_control`,
        `margin_factual`, `margin_hallucinating`, `usable`. Over `batch`, `layer` (NaN at -1):
        `contextual`, `associative` (margin that F loses when X's attention or MLP output is put
        there) and their `_control`. Over `batch`: `coherence_contextual`, `coherence_associative`,
        sum over layers of the signed effects by the sum of their sizes (-1 to 1). Over `part` (the
        runs, "factual", "hallucinating"), `batch`, `layer`: `alignment` (-1 to 1) and
        `alignment_control` (95th percentile of its size for random tokens), and over `rank` too:
        `to_answer`, `to_wrong` (logits of the output that the concept supports); texts are the
        coordinate `concept`. Over `edge`: `weight` and `edge_control` (logits), coordinates
        `edge_run`, `edge_layer`, `edge_to`, `edge_source`, `edge_target` (and their `_id`).

    Raises:
        PairError: No row in which F says the right answer and X the wrong one.
        NotOffered: No unembedding, a norm that is not linear at frozen scale, or a model that
            cannot be stopped after a layer (with a graph).

    Cost: 3 forwards to read; rows per pair (L layers): L + 1 insertions, times 2 + draws with the
        controls, L + 1 frozen, 2 L (1 + draws) for the pathways, 2 L top for the concepts; and
        4 to 2 L top of one row per layer for the graph. Only the last token is edited. No backward.

    Source: adapted from "Distributional Semantics Tracing" (2025), whose definitions of the
        commitment layer and of the alignment score are not public: both are ours, and so are the
        centred unembedding directions (the paper's concepts come from patchscopes and PCA). The
        released script's importance scores are zero by a fault (its edit is commented out) and were
        not followed. Ours: `association`, all controls.

    Misleads: the last layer commits by construction; only the first layer tells. A stream inserted
        at the last token carries all that X gathered, also what has nothing to do with the answer:
        compare `shuffled`. Concepts whose unembedding rows overlap support each other by geometry
        alone; `alignment` of an answer among its own concepts is positive for that reason. The
        paper's correlation with hallucination rates is not recomputed here.

    Example:
        >>> import underhood as uh
        >>> pair = uh.Pairs.one("The capital of France is", "The capital of Norway is")
        >>> found = commitment(uh.load(), pair, graph="none")
        >>> bool(found["commitment"][0] <= found["association"][0])
        True
    """
    at_least(1, top=top, draws=draws, batch_size=batch_size)
    if not -len(pairs) <= graph_row < len(pairs):
        raise OutOfRange(
            f"there is no row {graph_row}", given=f"{len(pairs)} rows", do="leave graph_row out"
        )
    head = head_of(model)
    encoded, origin = own_answers(model, pairs.encode(model), batch_size=batch_size)
    ends = ends_of(model, encoded, batch_size)
    curves = curves_of(model, ends, draws, seed, batch_size) | lenses_of(model, ends, head)
    curves |= pathways_of(model, ends, draws, seed, batch_size)
    after = streams(model)[1:]
    found = [concepts(model, head, torch.stack([s[a] for a in after]), top) for s in ends.states]
    sides = [alignment_of(model, ends, run, found[run], seed, batch_size) for run in range(2)]
    drawn: list[Edges] = []
    if graph != "none":
        _check_stops(model, ends, head)
        row = graph_row % len(pairs)
        for tokens, own in zip(ends.tokens, found, strict=True):
            one = own.row(row)
            drawn.append(
                edges(model, tokens.row(row), one, reach=graph, seed=seed, batch_size=batch_size)
            )
    data = _dataset(model, ends, curves, found, sides, drawn)
    return Result(
        name="commitment",
        data=data,
        view=view_of(data),
        provenance=describe(
            model, rows=len(pairs), answers=origin, top=top, graph=graph, graph_row=graph_row,
            draws=draws, seed=seed,
        ),
    )  # fmt: skip


def _check_stops(model: Model, ends: Ends, head: Head) -> None:
    for layer, site in enumerate(streams(model)[1:-1]):
        stream = ends.states[0][site]
        check_stop(
            model, head, ends.tokens[0], layer, stream, do='leave the graph out: graph="none"'
        )


def _dataset(
    model: Model,
    ends: Ends,
    curves: dict[str, Tensor],
    found: list[Concepts],
    sides: list[dict[str, Tensor]],
    drawn: list[Edges],
) -> "xarray.Dataset":
    import numpy as np
    import xarray

    usable = ends.usable.numpy()
    variables: dict[str, Any] = {
        name: (("batch", "layer"), value.T.numpy()) for name, value in curves.items()
    }
    inserted = curves["inserted"] < 0
    associated = (curves["frozen"] < 0) & (curves["lens_hallucinating"] < 0)
    for name, holds in (
        ("commitment", inserted), ("association", associated),
        ("commitment_control", curves["inserted_control"] < 0),
    ):  # fmt: skip
        first = [first_staying(column) for column in holds.T.tolist()]
        layers = np.array([np.nan if at is None else at - 1.0 for at in first])
        variables[name] = ("batch", np.where(usable, layers, np.nan))
    for run, margin in zip(RUNS, ends.margin, strict=True):
        variables[f"margin_{run}"] = ("batch", margin.numpy())
    variables["usable"] = ("batch", usable)
    for name in ("contextual", "associative"):
        variables[f"coherence_{name}"] = ("batch", _coherence(curves[name]).numpy())
    blank = torch.full_like(sides[0]["alignment"][:1], torch.nan)
    for name in ("alignment", "alignment_control"):
        both = torch.stack([torch.cat([blank, side[name]]) for side in sides])
        variables[name] = (("part", "batch", "layer"), both.transpose(1, 2).numpy())
    axes = ("part", "batch", "layer", "rank")
    for name in ("to_answer", "to_wrong"):
        both = torch.stack([side[name] for side in sides])  # [run layer rank batch]
        both = torch.cat([torch.full_like(both[:, :1], torch.nan), both], 1)
        variables[name] = (axes, both.permute(0, 3, 1, 2).numpy())
    coords: dict[str, Any] = {
        "layer": list(range(-1, model.n_layers)), "part": list(RUNS),
        "rank": list(range(found[0].ids.shape[-1])), "concept": (axes, _texts(model, found)),
    }  # fmt: skip
    if drawn:
        edge, names = _edges(model, drawn)
        variables, coords = variables | edge, coords | names
    return xarray.Dataset(variables, coords=coords)


def _coherence(effect: Tensor) -> Tensor:
    """Sum over layers of the signed effects, by the sum of their sizes."""
    seen = effect.nan_to_num()
    return seen.sum(0) / seen.abs().sum(0).clamp(min=1e-12)


def _texts(model: Model, found: list[Concepts]) -> Any:
    """Texts of the concepts, `[run, batch, layer, rank]`; empty before the first block."""
    import numpy as np

    ids = torch.stack([one.ids for one in found]).transpose(1, 2)  # [run batch layer rank]
    known = {i: model.token_text(i) for i in ids.unique().tolist()}
    texts = np.vectorize(known.__getitem__, otypes=[object])(ids.numpy()).astype(str)
    return np.concatenate([np.full_like(texts[:, :, :1], ""), texts], 2)


def _edges(model: Model, drawn: list[Edges]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both graphs as one list of edges."""
    runs = [run for run, one in zip(RUNS, drawn, strict=True) for _ in one.weight]

    def joined(name: str) -> list[Any]:
        return [value for one in drawn for value in getattr(one, name)]

    values = {
        "weight": ("edge", joined("weight")),
        "edge_control": ("edge", joined("control")),
    }
    names = {
        "edge_run": ("edge", runs), "edge_layer": ("edge", joined("layer")),
        "edge_to": ("edge", joined("to")),
        "edge_source_id": ("edge", joined("source")), "edge_target_id": ("edge", joined("target")),
        "edge_source": ("edge", [model.token_text(i) for i in joined("source")]),
        "edge_target": ("edge", [model.token_text(i) for i in joined("target")]),
    }  # fmt: skip
    return values, names
