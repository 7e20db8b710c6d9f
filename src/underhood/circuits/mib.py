"""Circuits and scores as the MIB benchmark's files: `.json` and `.pt`, both ways.

MIB knows decoders with heads and MLPs in every layer, and gives every query head its own keys and
values. Grouped key/value heads are spread over the query heads of their group on the way out (the
score in equal shares, so that sums stay) and summed on the way in.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from underhood.circuits.circuit import Circuit, Scores
from underhood.circuits.graph import Graph
from underhood.core.errors import FileProblem, NotOffered, UsageError
from underhood.core.model import Model

__all__ = ["read_mib", "write_mib"]


def _config(model: Model, graph: Graph) -> dict[str, Any]:
    """The `cfg` of a MIB file.

    Raises:
        NotOffered: The model has other parts than heads and MLPs.
    """
    kinds = {w.kind for w in graph.writers}
    heads = {w.heads for w in graph.writers if w.kind == "heads"}
    mixed = any(r.kind == "mixer" for r in graph.readers)
    each = len(graph.writers) == 1 + 2 * model.n_layers
    if kinds != {"input", "heads", "mlp"} or len(heads) != 1 or mixed or not each:
        raise NotOffered(
            "MIB's files have no place for this model's parts",
            given=repr(graph),
            why="they know heads with queries, keys and values, and one MLP, in every layer",
            do="make the graph with experts=False"
            if "experts" in kinds
            else "save the result of edge_attribution or circuit instead",
        )
    return {
        "n_layers": model.n_layers,
        "n_heads": heads.pop(),
        "parallel_attn_mlp": all(graph.parallel),
        "d_model": model.d_model,
    }


def _names(cfg: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Sources and destinations in MIB's order."""
    sources, destinations = ["input"], []
    for layer in range(cfg["n_layers"]):
        heads = range(cfg["n_heads"])
        sources += [f"a{layer}.h{h}" for h in heads] + [f"m{layer}"]
        destinations += [f"a{layer}.h{h}<{c}>" for c in "qkv" for h in heads] + [f"m{layer}"]
    return sources, [*destinations, "logits"]


def _spread(graph: Graph, cfg: dict[str, Any]) -> list[tuple[int, float]]:
    """For each of MIB's destinations, ours and its share of it."""
    found = []
    ours = {name: i for i, name in enumerate(graph.destinations)}
    counts = {(r.layer, r.kind): r.heads for r in graph.readers}
    for name in _names(cfg)[1]:
        if "<" not in name:
            found.append((ours[name], 1.0))
            continue
        node, _, letter = name.rstrip(">").partition("<")
        layer, head = (int(part[1:]) for part in node.split("."))
        group = cfg["n_heads"] // counts[layer, letter]
        found.append((ours[f"a{layer}.h{head // group}<{letter}>"], 1.0 / group))
    return found


def write_mib(model: Model, scores: Scores, circuit: Circuit | None, path: str | Path) -> Path:
    """Write scores, and which edges a circuit holds, as a MIB file.

    Args:
        model: The model that they are of.
        scores: The scores.
        circuit: Its edges are `in_graph`; None: none are.
        path: Ends in `.json` or `.pt`.

    Raises:
        NotOffered: MIB has no place for the model's parts.
        UsageError: Another ending, or scores of another graph.
    """
    target = Path(path)
    graph = scores.graph
    cfg = _config(model, graph)
    sources, destinations = _names(cfg)
    spread = _spread(graph, cfg)
    columns = torch.tensor([ours for ours, _ in spread])
    values = scores.values[:, columns] * torch.tensor([share for _, share in spread])
    mask = (circuit.mask if circuit else torch.zeros_like(graph.real))[:, columns]
    inside = set(circuit.nodes) if circuit else set()
    nodes = torch.tensor([name in inside for name in sources])
    real = graph.real[:, columns]
    if target.suffix == ".pt":
        torch.save({"cfg": cfg, "src_nodes": sources, "dst_nodes": destinations,
                    "edges_scores": values, "edges_in_graph": mask, "nodes_in_graph": nodes},
                   target)  # fmt: skip
        return target
    if target.suffix != ".json":
        raise UsageError("a MIB file is .json or .pt", given=str(path), do="let its name end so")
    edges = {
        f"{sources[i]}->{destinations[j]}": {
            "score": float(values[i, j]), "in_graph": bool(mask[i, j])
        }
        for i, j in real.nonzero().tolist()
    }  # fmt: skip
    held = {name: {"in_graph": name in inside} for name in sources}
    held["logits"] = {"in_graph": True}
    target.write_text(json.dumps({"cfg": cfg, "nodes": held, "edges": edges}), encoding="utf-8")
    return target


def read_mib(model: Model, path: str | Path) -> tuple[Scores, Circuit]:
    """Scores and circuit of a MIB file.

    A `.pt` file is read without running code from it. Signs are the file's own: EAP-IG's pipeline
    stores losses or metrics, as its author chose.

    Raises:
        FileProblem: No such file, not MIB's form, or made for another architecture.
        NotOffered: MIB has no place for the model's parts.
    """
    source = Path(path)
    graph = Graph.of(model)
    cfg = _config(model, graph)
    content = _load(source)
    theirs = content["cfg"]
    for key in ("n_layers", "n_heads", "parallel_attn_mlp"):
        if key in theirs and theirs[key] != cfg[key]:
            raise FileProblem(
                "this circuit was made for another architecture",
                given=f"{source.name}: {key} = {theirs[key]}",
                why=f"{model.name} has {key} = {cfg[key]}",
                do="load the model that it was made for",
            )
    names = _names(cfg)
    values = torch.zeros(len(names[0]), len(names[1]))
    mask = torch.zeros_like(values, dtype=torch.bool)
    if "edges" in content:
        rows, columns = ({n: i for i, n in enumerate(part)} for part in names)
        for name, entry in content["edges"].items():
            start, _, end = name.partition("->")
            if start not in rows or end not in columns:
                raise FileProblem(
                    "the file names an edge that its own model has not",
                    given=f"{source.name}: {name}",
                    do="export it again from MIB's tools",
                )
            values[rows[start], columns[end]] = float(entry.get("score") or 0.0)
            mask[rows[start], columns[end]] = bool(entry.get("in_graph"))
    else:
        values, mask = content["edges_scores"].float(), content["edges_in_graph"].bool()
    ours = torch.zeros(graph.real.shape)
    held = torch.zeros_like(graph.real)
    for column, (number, _) in enumerate(_spread(graph, cfg)):
        ours[:, number] += values[:, column]
        held[:, number] |= mask[:, column]
    how = {"method": "read from a file", "file": source.name}
    return Scores(graph, ours, how), Circuit(graph, held, how)


def _load(source: Path) -> dict[str, Any]:
    try:
        if source.suffix == ".pt":
            content = torch.load(source, map_location="cpu", weights_only=True)
        else:
            content = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise FileProblem(
            "this file cannot be read as a circuit",
            given=str(source),
            why=str(error).splitlines()[0][:120],
            do="give a .json or .pt file written by EAP-IG, MIB or underhood",
        ) from error
    wanted = {"cfg", "edges"} if source.suffix != ".pt" else {
        "cfg", "edges_scores", "edges_in_graph"
    }  # fmt: skip
    if not isinstance(content, dict) or not wanted <= set(content):
        raise FileProblem(
            "this is not a circuit of MIB's form",
            given=source.name,
            why=f"it lacks {', '.join(sorted(wanted - set(content)))}"
            if isinstance(content, dict)
            else "it is no table of named entries",
            do="export it with EAP-IG's to_json or to_pt",
        )
    _shape(content, source)
    return content


def _shape(content: dict[str, Any], source: Path) -> None:
    scores, mask = content.get("edges_scores"), content.get("edges_in_graph")
    if isinstance(scores, Tensor) and isinstance(mask, Tensor) and scores.shape != mask.shape:
        raise FileProblem(
            "the file's scores and mask differ in shape",
            given=f"{source.name}: {list(scores.shape)} and {list(mask.shape)}",
            do="export it again from MIB's tools",
        )
