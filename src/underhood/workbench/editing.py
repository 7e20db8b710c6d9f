"""Jobs that edit a circuit: find one, drop or add nodes and edges, and judge what is left.

The circuit that was found stays; a request says only what is different from it. So a page's address
holds a handful of names, and the same address gives the same circuit. Every circuit is judged with
its controls: random circuits of its size, and everything but the circuit.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from underhood.core.errors import SiteNotFound, nearest
from underhood.view import View
from underhood.workbench.asking import Prompt, Short
from underhood.workbench.desk import Desk, Work
from underhood.workbench.jobs import Job
from underhood.workbench.models import Loaded

if TYPE_CHECKING:
    from underhood.circuits import Circuit, Judge, Scores
    from underhood.core.model import Model

__all__ = ["EditCircuit", "edit_circuit"]

RANDOM = 5  # circuits of the same size, for control
LISTED = 60  # edges left out that are offered, strongest first
Names = Annotated[list[Short], Field(max_length=2000)]


class EditCircuit(Work):
    """Find the circuit of a pair, without some of its nodes and edges, and with other edges."""

    prompt: Prompt
    contrast: Prompt | None = None
    answer: Short | None = None
    wrong: Short | None = None
    by: Literal["eap", "eap-ig", "eap-ig-activations"] = "eap-ig"
    target: Annotated[float, Field(gt=0, le=1)] = 0.9
    drop: Names = []
    add: Names = []
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


@dataclass(slots=True)
class _Case:
    """A question, the circuit found for it, and who judges."""

    judge: "Judge"
    scores: "Scores"
    found: "Circuit"
    said: dict[str, Any]


def edit_circuit(desk: Desk, job: Job, loaded: Loaded, asked: EditCircuit) -> None:
    """The circuit with its changes, its picture, and its numbers."""
    from underhood.circuits import random_circuits

    start = asked.model_dump(exclude={"drop", "add", "seed", "model"})
    key = (loaded.facts["name"], *start.items())
    case = desk.judges.get(key, lambda: _case(loaded.model, job, asked))
    circuit = _changed(case.found, asked)
    job.progress(1, 2, "judging")
    same = random_circuits(circuit, RANDOM, seed=asked.seed)
    f = case.judge.faithfulness([circuit, circuit.complement(), case.found, *same]).tolist()
    inside = set(circuit.edges)
    out = [name for name, _ in case.scores.strongest(case.scores.graph.n_edges)
           if name not in inside]  # fmt: skip
    job.part(
        "circuit", **case.said, edges=circuit.edges, nodes=circuit.nodes,
        found=len(case.found), total=circuit.graph.n_edges, f=f[0], rest=f[1], f_found=f[2],
        random=f[3:], offered=out[:LISTED], view=_view(circuit, case, f).to_dict(),
    )  # fmt: skip


def _case(model: "Model", job: Job, asked: EditCircuit) -> _Case:
    """The question put, edges scored, and the smallest circuit that keeps the target."""
    from underhood.circuits import Graph, Judge, Wiring, edge_scores
    from underhood.data import metric_named
    from underhood.explanation.question import ask

    job.progress(0, 2, "finding the circuit")
    question = ask(
        model, asked.prompt, asked.contrast or None, answer=asked.answer or None,
        wrong=asked.wrong or None,
    )  # fmt: skip
    pairs, metric = question.pairs.encode(model), metric_named("logit_diff")
    wiring = Wiring(model, Graph.of(model))
    scores = edge_scores(wiring, pairs, metric, method=asked.by)
    judge = Judge(wiring, pairs, metric)
    found, _ = judge.search(scores, asked.target)
    said = {"contrast": question.other, "answer": question.answer, "wrong": question.wrong,
            "searched": question.searched, "unit": metric.unit}  # fmt: skip
    return _Case(judge, scores, found, said)


def _changed(found: "Circuit", asked: EditCircuit) -> "Circuit":
    """The circuit with what was asked for added, then dropped; then without loose ends."""
    from underhood.circuits import Circuit

    circuit, graph = found, found.graph
    if asked.add:
        circuit = circuit | Circuit.of(graph, asked.add)
    edges = [name for name in asked.drop if "->" in name]
    for node in (name for name in asked.drop if "->" not in name):
        if node not in graph.sources:
            raise SiteNotFound(
                f"this model's graph has no node {node!r}",
                given=node, do=f"nearest: {nearest(node, graph.sources)}",
            )  # fmt: skip
        circuit = circuit.without(node)
    if edges:
        circuit = circuit & Circuit.of(graph, edges).complement()
    return circuit.pruned()


def _view(circuit: "Circuit", case: _Case, f: list[float]) -> View:
    """The circuit as a graph, with its proof below the title: pictures are saved with both."""
    from underhood.methods.graph_view import graph_view

    inside = set(circuit.edges)
    ranked = case.scores.strongest(circuit.graph.n_edges)
    return graph_view(
        circuit.graph,
        [edge for edge in ranked if edge[0] in inside],
        unit=case.said["unit"],
        title="The circuit",
        about="Each row is a layer. Blue edges support the answer, red ones work against it. By"
        f" itself it keeps {round(100 * f[0])} % of the difference, everything else"
        f" {round(100 * f[1])} %, random circuits of its size at most {round(100 * max(f[3:]))} %.",
    )  # fmt: skip
