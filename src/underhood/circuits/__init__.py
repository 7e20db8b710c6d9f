"""Circuits: the graph of a model's parts, what its edges are worth, and what is left without them.

graph = Graph.of(model)                     who writes to the stream, who reads it
wiring = Wiring(model, graph)               the model, with edges that can be cut
scores = edge_scores(wiring, pairs, metric) one number per edge: estimates or exact effects
judge = Judge(wiring, pairs, metric)        how much a circuit keeps
circuit, f = judge.search(scores, 0.9)      the smallest one found that keeps enough
"""

from underhood.circuits.ablation import ABLATIONS, Ablation
from underhood.circuits.acdc import acdc, acdc_scores
from underhood.circuits.circuit import Circuit, Scores, combine
from underhood.circuits.exact import edge_effects
from underhood.circuits.faithfulness import MIB_SIZES, Curve, Judge, random_circuits
from underhood.circuits.graph import Graph
from underhood.circuits.mib import read_mib, write_mib
from underhood.circuits.score import METHODS, edge_scores
from underhood.circuits.wiring import Wiring, Writes

__all__ = [
    "ABLATIONS",
    "METHODS",
    "MIB_SIZES",
    "Ablation",
    "Circuit",
    "Curve",
    "Graph",
    "Judge",
    "Scores",
    "Wiring",
    "Writes",
    "acdc",
    "acdc_scores",
    "combine",
    "edge_effects",
    "edge_scores",
    "random_circuits",
    "read_mib",
    "write_mib",
]
