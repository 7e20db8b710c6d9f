"""Numbers and pictures of trained masks."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from underhood.circuits.masks import Trained
from underhood.data import Metric
from underhood.methods.graph_view import circuit_graph
from underhood.methods.locate._mask_circuits import Compared, node_sizes
from underhood.view import View, bars, group, lines, sentences, table

if TYPE_CHECKING:
    import xarray

__all__ = ["circuit_data", "circuit_view", "percent", "training_data", "training_view"]

_SHOWN = 40  # parts listed
_POINTS = 60  # points of a drawn curve


def percent(share: float | Tensor) -> str:
    """A share without a minus before a zero."""
    return f"{round(float(share), 2) + 0.0:.0%}"


# Training ----------------------------------------------------------------------------------------


def training_data(trained: Trained) -> dict[str, Any]:
    """Curves over `step`."""
    return {name: ("step", values) for name, values in trained.history.items()}


def training_view(trained: Trained, unit: str) -> View:
    """Loss and what is kept, by step."""
    history, total = trained.history, trained.steps
    some = sorted({round(i * (total - 1) / (_POINTS - 1)) for i in range(_POINTS)})
    names = {"share": "kept", "undecided": "undecided"}
    shares = {label: [history[name][i] for i in some] for name, label in names.items()}
    if "asked" in history:
        shares["asked for"] = [1 - history["asked"][i] for i in some]
    steps = [str(i + 1) for i in some]
    return group(
        [
            lines(steps, shares, x_name="step", y_name="share of the parts", title="Sparsity"),
            lines(
                steps, {"loss": [history["loss"][i] for i in some]}, x_name="step",
                y_name=f"loss ({unit})", title="Loss of the step's draw",
            ),
        ],
        title="Training", folded=True,
    )  # fmt: skip


# Edges and nodes ---------------------------------------------------------------------------------


def circuit_data(found: Compared) -> "xarray.Dataset":
    """The result's numbers."""
    import xarray

    graph, trained = found.scores.graph, found.found.trained
    edges = found.level == "edge"
    score = found.scores.values[graph.real] if edges else node_sizes(found.scores)
    kept = found.found.circuit.mask[graph.real] if edges else trained.kept
    data: dict[str, Any] = {
        "mask": (found.level, trained.values.numpy()),
        "in_circuit": (found.level, kept.numpy()),
        "eap_ig": (found.level, score.numpy()),
        "f_random": ("random", found.f_random.numpy()),
        **training_data(trained),
    }
    scalars = {
        "f": found.f, "f_low": found.interval[0], "f_high": found.interval[1],
        "f_eap_ig": found.f_rival, "f_rest": found.f_rest, "f_train": found.f_train,
        "kl": found.kl[0], "kl_eap_ig": found.kl[1], "kl_random": found.kl[2],
        "size": found.size, "size_eap_ig": found.needed,
    }  # fmt: skip
    coords: dict[str, Any] = {"node": list(graph.sources[1:])}
    if edges:
        names = [graph.edge(u, v) for u, v in graph.real.nonzero().tolist()]
        coords = {"name": ("edge", names)}
    return xarray.Dataset(data | {k: ((), v) for k, v in scalars.items()}, coords=coords)


def circuit_view(found: Compared, metric: Metric, ablation: str) -> View:
    """The claim, its controls, and the parts."""
    return group(
        [
            sentences(_statements(found, metric), title="What the mask keeps"),
            _compared_view(found, ablation),
            circuit_graph(
                found.found.circuit, found.scores, unit=metric.unit, title="The circuit",
                facts={"faithfulness": round(found.f, 3), f"{found.level}s kept": found.size},
                about="Lines: the edges that the mask keeps, by EAP-IG score.",
            ),
            _parts_view(found, metric),
            training_view(found.found.trained, "nats"),
        ],
        title="Masks",
    )  # fmt: skip


def _statements(found: Compared, metric: Metric) -> list[str]:
    n, total, what = found.size, found.total, found.level
    low, high = found.interval
    span = "" if low != low else f" (95% over prompts: {low:.0%} to {high:.0%})"
    text = [
        f"The trained mask keeps {n} of the {total} {what}s ({n / total:.1%}) and"
        f" {percent(found.f)} of what the contrast changes in {metric.name}{span}.",
        f"As many {what}s keep {percent(found.f_rival)} when EAP-IG's scores choose them, and"
        f" {percent(found.f_random.mean())} at random (at most {percent(found.f_random.max())}).",
        f"On the prompts of training EAP-IG needs {found.needed} {what}s to keep as much"
        f" ({percent(found.f_train)}).",
        f"KL from the whole model: {found.kl[0]:.3g} nats; EAP-IG's {found.kl[1]:.3g}, random"
        f" {found.kl[2]:.3g}.",
        f"Everything else keeps {percent(found.f_rest)} without it.",
    ]
    prompts = "prompt" if found.judged == 1 else f"{found.judged} prompts"
    text.append(
        f"Judged on {prompts} that took no part in training."
        if found.held_out
        else f"Trained and judged on the same {prompts}: on others it may keep less."
    )
    if what == "edge":
        text[-1] += f" The circuit passes through {len(found.found.circuit.nodes)} nodes."
    return text


def _compared_view(found: Compared, ablation: str) -> View:
    low, high = float(found.f_random.min()), float(found.f_random.max())
    return bars(
        ["trained mask", "EAP-IG, same size", "everything else"],
        [found.f, found.f_rival, found.f_rest],
        baseline=[(low, high)] * 3,
        baseline_name="random circuits of the same size",
        unit="faithfulness",
        title="How much is kept",
        about=f"1: as the whole model; 0: as with everything cut ({ablation} ablation).",
    )


def _parts_view(found: Compared, metric: Metric) -> View:
    graph, trained = found.scores.graph, found.found.trained
    if found.level == "edge":
        names = [graph.edge(u, v) for u, v in graph.real.nonzero().tolist()]
        score, inside = found.scores.values[graph.real], found.found.circuit.mask[graph.real]
    else:
        names, score = list(graph.sources[1:]), node_sizes(found.scores)
        inside = trained.kept
    order = torch.where(inside, trained.rank, -torch.inf).argsort(descending=True, stable=True)
    rows = [
        [names[i], float(trained.values[i]), float(score[i])]
        for i in order[: min(_SHOWN, int(inside.sum()))].tolist()
    ]
    columns = [
        {"name": found.level}, {"name": "mask", "format": ".3f"},
        {"name": "EAP-IG", "unit": metric.unit, "format": "+.3f"},
    ]  # fmt: skip
    title = f"What is kept, firmest first ({len(rows)} of {int(inside.sum())})"
    return table(columns, rows, title=title)
