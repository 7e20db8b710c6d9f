"""A circuit with its proof: known circuits, held-out prompts, controls."""

import numpy as np
import pytest

import underhood as uh
from underhood.circuits import Circuit, Judge, Wiring
from underhood.core.errors import OutOfRange, UsageError
from underhood.data import metric_named
from underhood.methods.locate.circuit import circuit
from underhood.organisms import organism, wired


def town_pairs(model: uh.Model, task: str, n: int) -> uh.Pairs:
    return organism("village").pairs(task, n).usable(model)


@pytest.mark.parametrize("name", ["induction", "gqa", "decoy", "parallel"])
def test_the_circuit_of_a_wired_model_is_the_true_one(name):
    """At target 0.9 it holds the true edges and nothing of the decoy."""
    known = wired(name)
    found = circuit(known.model, known.pairs(n=24), by="exact", target=0.9, draws=3)
    inside = set(found["name"].values[found["in_circuit"].values])
    assert inside == set(known.truth.edges["resample"])
    assert float(found["f"]) == pytest.approx(1, abs=1e-3)
    assert abs(float(found["f_rest"])) < 0.2
    assert float(found["f_same_size"].mean()) < 0.5


def test_a_backup_is_left_out_and_the_rest_tells():
    """With the primary head cut its backup takes over: the circuit alone does not show it."""
    known = wired("backup")
    wiring = Wiring(known.model)
    judge = Judge(wiring, known.pairs(n=8).encode(known.model), metric_named("logit_diff"))
    whole = Circuit.whole(wiring.graph)
    primary, backup = (name.split("+") for name in known.joint if "+" in name).__next__()
    cut = [whole.without(primary), whole.without(backup), whole.without(primary).without(backup)]
    lost = 1 - judge.faithfulness(cut)
    assert float(lost[0]) < 0.2 and abs(float(lost[1])) < 0.05 and float(lost[2]) > 0.9


def test_it_is_judged_on_prompts_that_did_not_choose_it():
    town = uh.load("village")
    found = circuit(town, town_pairs(town, "capitals", 12), draws=4)
    assert found.provenance["held_out"] == 0.5
    assert 0.7 < float(found["f"]) < 1.2
    assert float(found["f_low"]) <= float(found["f"]) <= float(found["f_high"])
    assert float(found["f_same_size"].max()) < 0.3
    assert float(found["cmd"]) < 0.2 < float((1 - found["faithfulness_random"]).mean())
    curve = found["faithfulness"].values
    assert curve[-1] == pytest.approx(1, abs=1e-4)
    assert (found["size"].values <= np.array(found["share"].values) * 479).all()


@pytest.mark.parametrize("choose", ["greedy", "acdc"])
def test_other_ways_to_choose(choose):
    known = wired("induction")
    found = circuit(known.model, known.pairs(n=4), by="eap", choose=choose, draws=2)
    inside = set(found["name"].values[found["in_circuit"].values])
    assert set(known.truth.edges["resample"]) <= inside
    assert float(found["f"]) > 0.9


def test_a_number_of_edges_instead_of_a_target():
    known = wired("induction")
    found = circuit(known.model, known.pairs(n=4), edges=5, draws=2)
    assert int(found["in_circuit"].sum()) <= 5
    with pytest.raises(UsageError, match="pruned away"):
        circuit(known.model, known.pairs(n=4), edges=1, draws=2)


@pytest.mark.parametrize("ablation", ["mean", "mean-position", "zero"])
def test_every_ablation_has_a_circuit(ablation):
    known = wired("induction")
    found = circuit(known.model, known.pairs(n=6), by="eap", ablation=ablation, draws=2)
    assert found.provenance["ablation"] == ablation
    assert np.isfinite(float(found["f"]))


def test_bad_requests():
    known = wired("induction")
    with pytest.raises(OutOfRange):
        circuit(known.model, known.pairs(n=4), held_out=1.0)
    with pytest.raises(UsageError, match="a target is a share"):
        circuit(known.model, known.pairs(n=4), target=1.5)
