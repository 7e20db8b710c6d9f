"""Methods that know circuits, with a mixture's experts and routers as nodes of their own."""

import pytest
import torch
from random_models import random_model

import underhood as uh
from underhood.circuits import Circuit, Graph, Judge, Wiring, acdc
from underhood.circuits.masks import Recipe, circuit_masks
from underhood.core.errors import NotOffered, UsageError
from underhood.data import metric_named
from underhood.methods.locate.circuit import circuit
from underhood.methods.locate.circuit_overlap import circuit_overlap
from underhood.methods.locate.edge_attribution import edge_attribution, scores_of
from underhood.methods.locate.masks import masks
from underhood.organisms import Language, organism
from underhood.organisms.guild import TRADES

FAMILIES = ("mixtral", "qwen2_moe")  # the second has a shared expert
SHARED = {"mixtral": 0, "qwen2_moe": 1}


@pytest.fixture(scope="module", params=FAMILIES)
def mixture(request: pytest.FixtureRequest) -> uh.Model:
    return random_model(request.param)


def pairs_of(seed: int, rows: int = 2) -> uh.Pairs:
    """Prompts of six random words; contrast and answers likewise."""
    make = torch.Generator().manual_seed(seed)
    draw = torch.randint(8, 99, (2, rows, 6), generator=make).tolist()
    clean, contrast = ([" ".join(f"w{i}" for i in row) for row in side] for side in draw)
    said = [(f"w{8 + i}", f"w{40 + i}") for i in range(rows)]
    return uh.Pairs(clean, contrast, [[a] for a, _ in said], [[b] for _, b in said])


def test_edges_of_experts_are_scored_and_cut_for_real(mixture: uh.Model) -> None:
    """Four experts, perhaps a shared one, and a router in each of three layers."""
    found = edge_attribution(
        mixture, pairs_of(0), by="eap", experts=True, verify_top=3, metric="logit_diff"
    )
    names = set(map(str, found["source"].values))
    experts = {n for n in names if ".e" in n}
    shared = {n for n in names if n.endswith(".s")}
    assert len(experts) == 3 * 4 and len(shared) == 3 * SHARED[mixture.name.split("/")[1]]
    assert {n for n in map(str, found["destination"].values) if "router" in n} == {
        f"m{layer}<router>" for layer in range(3)
    }
    cut = found["exact"].values[found["verified"].values > 0]
    assert len(cut) == 6 and abs(cut).max() > 1e-4
    assert found.provenance["experts"] is True
    whole = edge_attribution(mixture, pairs_of(0), by="eap", verify_top=0)
    assert not any(".e" in str(n) for n in whole["source"].values)
    wiring = Wiring(mixture, Graph.of(mixture, experts=True))
    again = scores_of(wiring, found)
    assert again.how["experts"] is True and again.strongest(1)[0][0] in set(found["name"].values)


def test_a_circuit_of_experts_is_proven(mixture: uh.Model) -> None:
    found = circuit(mixture, pairs_of(1), by="eap", edges=150, experts=True, draws=2)
    inside = [str(n) for n, m in zip(found["name"].values, found["in_circuit"].values, strict=True)
              if m]  # fmt: skip
    assert any(".e" in name for name in inside)
    assert any(".e" in str(node) for node in found["node"].values)
    assert bool(torch.tensor(found["faithfulness"].values)[-1].isclose(torch.tensor(1.0).double()))
    assert found.provenance["experts"] is True


def test_how_tells_of_experts_and_routing() -> None:
    mixture = random_model("mixtral")
    metric, pairs = metric_named("logit_diff"), pairs_of(2).encode(mixture)
    for experts, freeze in ((False, False), (True, False), (True, True)):
        wiring = Wiring(mixture, Graph.of(mixture, experts=experts), freeze_routing=freeze)
        judge = Judge(wiring, pairs, metric)
        few = Circuit(wiring.graph, torch.zeros(wiring.graph.real.shape).bool())
        how = acdc(judge, 10.0, start=few).how
        assert how["experts"] is experts and how["freeze_routing"] is freeze
        assert how["ablation"] == "resample" and how["prompts"] == 2
        trained = circuit_masks(wiring, pairs, metric, Recipe(steps=1), level="node")
        assert all(trained.circuit.how[name] == how[name] for name in ("experts", "freeze_routing"))


def test_overlap_counts_experts_among_nodes(mixture: uh.Model) -> None:
    found = circuit_overlap(
        mixture, pairs_of(3), other=pairs_of(4), by="eap", edges=60, experts=True, repair=0, draws=2
    )
    nodes = len(Graph.of(mixture, experts=True).sources) - 1
    assert int(found["total"].sel(part="nodes")) == nodes == found["use"].sizes["node"]
    assert found.provenance["experts"] is True


def test_masks_keep_experts(mixture: uh.Model) -> None:
    found = masks(mixture, pairs_of(5), level="node", experts=True, steps=4, lam=0.1, draws=2)
    names = [str(n) for n in found["node"].values]
    assert sum(".e" in n for n in names) == 12 and len(found["mask"]) == len(names)
    assert found.provenance["experts"] is True
    with pytest.raises(UsageError, match="`experts` has no meaning"):
        masks(mixture, pairs_of(5), level="head", experts=True)


def test_dense_models_have_no_experts() -> None:
    with pytest.raises(NotOffered, match="no experts"):
        edge_attribution(random_model("llama"), pairs_of(0), by="eap", experts=True)


@pytest.mark.parametrize("trade", TRADES)
def test_the_experts_of_a_trade_are_found(trade: str) -> None:
    """`guild`: what routing says of a trade, edges say too, and the circuit rests on them."""
    guild = organism("guild")
    assert isinstance(guild, Language)
    model, own = guild.load(), guild.truth[f"routing of {trade}"].parts
    drawn = guild.pairs(trade, 48, 11)
    sides = zip(drawn.clean, drawn.contrast, strict=True)
    within = [i for i, side in enumerate(sides) if all(trade in str(text) for text in side)]
    assert len(within) >= 8
    kept = ([side[i] for i in within] for side in (drawn.clean, drawn.contrast))
    said = ([side[i] for i in within] for side in (drawn.answers or [], drawn.wrong or []))
    pairs = uh.Pairs(*kept, *said)
    found = edge_attribution(model, pairs, by="eap", experts=True, verify_top=0)
    sums: dict[str, float] = {}
    for name, score in zip(found["source"].values, abs(found["score"].values), strict=True):
        if ".e" in str(name):
            sums[str(name)] = sums.get(str(name), 0.0) + float(score)
    share = sum(sums[name] for name in own) / sum(sums.values())
    assert share > 0.9 > 0.4 > len(own) / len(sums)
    cut = circuit(model, pairs, by="eap", experts=True, draws=2)
    held = zip(cut["name"].values, cut["score"].values, cut["in_circuit"].values, strict=True)
    starts = [(str(name).split("->")[0], abs(float(score))) for name, score, inside in held
              if inside]  # fmt: skip
    theirs = sum(score for name, score in starts if name in own)
    assert theirs > 0.9 * sum(score for name, score in starts if ".e" in name) > 0
    assert float(cut["f"]) > 0.7
