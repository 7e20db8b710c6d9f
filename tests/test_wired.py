"""Wired organisms do their task, and exactly the edges they declare are true."""

from functools import cache

import pytest
import torch

import underhood as uh
from underhood.core.edit import Edit
from underhood.core.errors import ModelNotFound, OutOfRange, UsageError
from underhood.core.ops import patch
from underhood.organisms.wired_board import Board, Size, graph_edges
from underhood.organisms.wired_compiler import Program
from underhood.organisms.wired_models import WIRED, wired
from underhood.organisms.wired_organism import Ablation, Wired
from wired_oracle import Oracle, difference, single_edges

SITES = ("z", "q", "k", "v", "head_out", "mlp_out", "resid_pre", "resid_post")
TRUE, FALSE, SIGNED = 1e-3, 2e-5, 2e-4
"""Shares of the range: mean sizes of true and of false effects, and mean effects of true edges."""


@cache
def built(name: str) -> Wired:
    return wired(name)


@pytest.mark.parametrize("name", WIRED)
def test_every_fresh_prompt_is_answered(name: str) -> None:
    organism = built(name)
    encoded = organism.pairs(n=64, seed=3).encode(organism.model)
    clean = organism.model.run(encoded.clean).last_logits
    contrast = organism.model.run(encoded.contrast).last_logits
    assert clean.argmax(-1).tolist() == encoded.answers[:, 0].tolist()
    assert contrast.argmax(-1).tolist() == encoded.wrong[:, 0].tolist()


@pytest.mark.parametrize("name", WIRED)
def test_the_oracle_runs_the_same_model(name: str) -> None:
    organism = built(name)
    encoded = organism.pairs(n=8, seed=4).encode(organism.model)
    mine, out = Oracle(organism.model.module).forward(encoded.clean.ids)
    run = organism.model.run(encoded.clean, record=["head_out", "mlp_out"])
    torch.testing.assert_close(mine.float(), run.last_logits, atol=1e-4, rtol=1e-5)
    for layer in range(organism.model.n_layers):
        torch.testing.assert_close(out[f"m{layer}"].float() + _bias(organism, layer),
                                   run["mlp_out", layer], atol=1e-4, rtol=1e-5)  # fmt: skip
        for head in range(organism.model.n_heads):
            theirs = run["head_out", layer][:, :, head]
            torch.testing.assert_close(out[f"a{layer}.h{head}"].float(), theirs,
                                       atol=1e-4, rtol=1e-5)  # fmt: skip


def _bias(organism: Wired, layer: int) -> torch.Tensor:
    """Output biases of the MLP, which belong to no node; all are zero here."""
    names = ("mlp.c_proj.bias", "mlp.down_proj.bias", "mlp.dense_4h_to_h.bias")
    found = dict(organism.model.module.named_parameters())
    return next(p for n, p in found.items() if f".{layer}." in n and n.endswith(names))


@pytest.mark.parametrize("kind", ["resample", "zero"])
@pytest.mark.parametrize("name", WIRED)
def test_exactly_the_declared_edges_are_true(name: str, kind: Ablation) -> None:
    organism = built(name)
    encoded = organism.pairs(n=16, seed=5).encode(organism.model)
    effects = single_edges(organism.model.module, organism.edges, encoded, kind)
    assert effects.range > 5
    truth = set(organism.truth.edges[kind])
    assert effects.above(TRUE) == truth
    assert effects.above(FALSE) == truth  # nothing in between
    assert truth <= organism.truth.edges["compiled"]
    assert len(truth) < len(organism.edges) and organism.labels(kind).count(True) == len(truth)
    if kind == "resample":
        smallest = min(abs(effects.signed[e]) for e in truth)
        assert smallest > SIGNED * effects.range, "effects cancel over the prompts"


@pytest.mark.parametrize("name", ["backup", "redundant"])
def test_joint_ablation_shows_what_single_ablation_hides(name: str) -> None:
    organism = built(name)
    encoded = organism.pairs(n=24, seed=6).encode(organism.model)
    oracle = Oracle(organism.model.module)
    (clean, _), (other, values) = (
        oracle.forward(encoded.clean.ids), oracle.forward(encoded.contrast.ids),
    )  # fmt: skip
    targets = (encoded.answers, encoded.wrong)
    top, bottom = (difference(x, *targets).mean() for x in (clean, other))
    for heads, share in organism.joint.items():
        logits, _ = oracle.forward(
            encoded.clean.ids, nodes={h: values[h] for h in heads.split("+")}
        )
        moved = float((top - difference(logits, *targets).mean()) / (top - bottom))
        assert moved == pytest.approx(share, abs=0.03), heads
    singles = [share for heads, share in organism.joint.items() if "+" not in heads]
    assert max(singles) <= 0.1 < 1.0 == max(organism.joint.values())


def test_the_library_sees_the_backup_too() -> None:
    """The same joint numbers through the library's own edits."""
    organism = built("backup")
    model, encoded = organism.model, organism.pairs(n=16, seed=7).encode(organism.model)
    other = model.run(encoded.contrast, record=["z"])
    ends = [
        difference(model.run(x).last_logits, encoded.answers, encoded.wrong).mean()
        for x in (encoded.clean, encoded.contrast)
    ]

    def moved(*sites: str) -> float:
        edits = [Edit(site, patch(other)) for site in sites]
        logits = model.run(encoded.clean, edits=edits).last_logits
        change = ends[0] - difference(logits, encoded.answers, encoded.wrong).mean()
        return float(change / (ends[0] - ends[1]))

    assert moved("z.0.0") < 0.15 and abs(moved("z.1.3")) < 0.01
    assert moved("z.0.0", "z.1.3") == pytest.approx(1.0, abs=0.01)


def test_linear_effects_into_the_logits_sum_to_the_whole() -> None:
    organism = built("linear")
    encoded = organism.pairs(n=16, seed=8).encode(organism.model)
    effects = single_edges(organism.model.module, organism.edges, encoded, "resample")
    total = sum(v for e, v in effects.signed.items() if e.endswith("->logits"))
    assert total == pytest.approx(-effects.range, rel=1e-9)


def test_linear_gradients_are_exact() -> None:
    """Effect = gradient times difference, in the library's own run with `grad=True`."""
    organism = built("linear")
    model, encoded = organism.model, organism.pairs(n=16, seed=8).encode(organism.model)
    run = model.run(encoded.clean, record=["mlp_out", "z"], grad=True)
    other = model.run(encoded.contrast, record=["mlp_out", "z"])
    metric = difference(run.last_logits, encoded.answers, encoded.wrong)
    for site in ("mlp_out.0", "z.0", "z.1"):
        name, layer = site.split(".")
        value = run[name, int(layer)]
        (grad,) = torch.autograd.grad(metric.sum(), value, retain_graph=True)
        change = other[name, int(layer)] - value
        guess = (grad * change).flatten(1).sum(1)
        logits = model.run(encoded.clean, edits=Edit(site, patch(other))).last_logits
        exact = difference(logits, encoded.answers, encoded.wrong) - metric
        torch.testing.assert_close(guess, exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", WIRED)
def test_the_model_passes_its_self_check_and_offers_its_sites(name: str) -> None:
    organism = built(name)
    offered = {site.name for site in organism.model.sites()}
    assert set(SITES) <= offered
    assert [row for row in organism.model.check().rows if row.status != "ok"] == []


@pytest.mark.parametrize("name", WIRED)
def test_prompts_and_cards(name: str) -> None:
    organism = built(name)
    a, b, c = organism.pairs(n=8, seed=1), organism.pairs(n=8, seed=1), organism.pairs(n=8, seed=2)
    assert a.clean == b.clean and a.contrast == b.contrast and a.clean != c.clean
    encoded = organism.pairs(n=64).encode(organism.model)
    assert bool(encoded.clean.mask.all()), "one length, so that positions mean the same"
    assert encoded.answers.shape == encoded.wrong.shape == (64, 1)
    told = " ".join(organism.mechanism)
    declared = organism.truth.edges["resample"] | organism.truth.edges["zero"]
    assert {fact.name for fact in organism.truth.facts} == declared
    assert all(edge in told for edge in declared)
    assert len(set(organism.edges)) == len(organism.edges) and declared <= set(organism.edges)


def test_decoys_are_compiled_active_and_dead() -> None:
    organism = built("decoy")
    dead = {"input->a0.h3<v>", "a0.h3->m1", "m1->logits"}
    assert dead <= organism.truth.edges["compiled"] and not dead & organism.truth.edges["resample"]
    run = organism.model.run(organism.pairs(n=8).encode(organism.model).clean, record=["head_out"])
    heads = run["head_out", 0]
    real, decoy = heads[:, -1, 0].norm(dim=-1), heads[:, -1, 3].norm(dim=-1)
    torch.testing.assert_close(real, decoy, rtol=1e-3, atol=1e-3)


def test_known_edge_counts() -> None:
    # GPT-2 small, 12 layers of 12 heads: the 32,491 edges of the EAP papers.
    assert len(graph_edges(12, 12, 12, parallel=False)) == 32_491
    assert "a0.h0->m0" not in graph_edges(1, 2, 2, parallel=True)
    grouped = graph_edges(2, 4, 2, parallel=False)
    assert "a0.h3->a1.h3<q>" in grouped and "a0.h3->a1.h2<k>" not in grouped
    # The known sizes of the two tracr circuits under resample ablation.
    assert len(built("reverse").truth.edges["resample"]) == 2
    assert len(built("proportion").truth.edges["resample"]) == 3
    assert len(built("reverse").truth.edges["zero"]) > 2


def test_building_leaves_the_generator_alone_and_is_repeatable() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, two = wired("gqa"), wired("gqa")
    assert torch.equal(before, torch.random.get_rng_state())
    assert one.model.fingerprint == two.model.fingerprint


def test_refusals() -> None:
    with pytest.raises(ModelNotFound, match="inductoin"):
        wired("inductoin")
    with pytest.raises(OutOfRange):
        built("xor").pairs(n=-1)
    with pytest.raises(UsageError, match="no task"):
        built("xor").pairs("nor")
    with pytest.raises(UsageError, match="made in memory"):
        uh.load("wired/xor", revision="main")
    with pytest.raises(UsageError, match="do not fit"):
        Board("gpt2", ("a",), {"tok": 8}, Size(layers=1, heads=1, d_head=8))
    program = Program(("a", "b"))
    place, token = program.places, program.tokens
    for i in range(5):
        program.pick(f"p{i}", place, place, lambda q, k: 9.0 * (q == k), token)
    with pytest.raises(UsageError, match="too many heads"):
        program.compile()
