"""Any sweep equals the loop of single runs: random models, sites, places, ops and batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import kit
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import underhood as uh
from underhood.core.edit import Edit, Plan
from underhood.core.model import Model
from underhood.core.site import Site
from underhood.core.sweep import sweep
from underhood.core.tokens import Tokens, Where

pytestmark = pytest.mark.usefixtures("always_share")

ENGINE = ("gpt2", "llama", "mistral", "gemma2", "gemma3", "qwen3", "gpt_neox", "olmo2", "mixtral")
PLAIN = ("bloom", "mamba", "deepseek_v3")
VECTORS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "ln1")
HEADS = ("z", "q", "k", "v", "q_rot", "head_out")
NAMES = (*VECTORS, *HEADS, "pattern", "scores", "mlp_post", "expert_out", "router_logits")
TOLERANCE = 1e-4


Spec = tuple[str, int, int | None, str, int | None, tuple[int, ...] | None]
"""Site, layer, unit, op, position and rows of one edit."""


@dataclass(frozen=True)
class Case:
    """A sweep to be tried, as hypothesis shows it when it fails."""

    family: str
    lengths: tuple[int, ...]
    left: bool
    cells: tuple[tuple[Spec, ...], ...]
    size: int
    columns: tuple[int, ...] | None
    share: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    family = draw(st.sampled_from(ENGINE + PLAIN))
    model = kit.model(family)
    lengths = tuple(draw(st.lists(st.integers(2, 9), min_size=1, max_size=3)))
    if draw(st.booleans()):
        lengths = (lengths[0],) * len(lengths)
    offered = sorted({s.name for s in model.sites()} & set(NAMES))

    def edit() -> Spec:
        name = draw(st.sampled_from(offered))
        site = draw(st.sampled_from(model.resolve(name)))
        unit = None
        if site.kind.unit in ("head", "neuron", "expert") and draw(st.booleans()):
            count = model.size(site, site.kind.unit) or 2
            unit = draw(st.integers(0, count - 1))
        op = draw(st.sampled_from(("zero", "scale", "patch", "own", "add")))
        pos = draw(st.one_of(st.none(), st.integers(-1, min(lengths) - 1)))
        rows = draw(st.one_of(
            st.none(), st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True)
        ))  # fmt: skip
        return name, site.layer or 0, unit, op, pos, None if rows is None else tuple(sorted(rows))

    cells = tuple(
        tuple(edit() for _ in range(draw(st.integers(1, 2))))
        for _ in range(draw(st.integers(1, 5)))
    )
    columns = draw(st.one_of(
        st.none(), st.lists(st.integers(0, 98), min_size=1, max_size=4, unique=True)
    ))  # fmt: skip
    return Case(
        family, lengths, draw(st.booleans()) and family != "mamba", cells,
        draw(st.sampled_from((1, 2, 5, 64))), None if columns is None else tuple(columns),
        draw(st.sampled_from((True, True, True, False))),
    )  # fmt: skip


def reading(logits: Tensor) -> Tensor:
    """Depends on every logit, on the scale of one."""
    weight = torch.linspace(-1, 2, logits.shape[1], dtype=torch.float64)
    return logits.double() @ (weight / weight.norm())


def built(model: Model, case: Case, tokens: Tokens) -> list[Plan]:
    """The cells as plans; what is patched comes from another run, for all rows or for the named."""
    other = kit.padded(kit.rows(*case.lengths, seed=7), "left" if case.left else "right")
    names = sorted({name for cell in case.cells for name, *_ in cell})
    run = model.run(other, record=names)

    def made(
        name: str, layer: int, unit: int | None, op: str, pos: int | None,
        rows: Sequence[int] | None,
    ) -> Edit:  # fmt: skip
        whole = Site(name, layer)
        values = run.aligned(whole)
        place = Site(name, layer, unit)
        if unit is not None and whole.kind.unit in whole.kind.axes:
            values = values.select(whole.kind.axes.index(whole.kind.unit or ""), unit)
        where = Where(pos, rows=rows)
        if name == "expert_out" and unit is not None:
            return Edit(place, uh.zero() if op != "scale" else uh.scale(1.7), where)
        if op in ("patch", "own") and "key" not in whole.kind.axes:
            own = values[list(rows)] if op == "own" and rows is not None else values
            return Edit(place, uh.patch(own), where, strength=1.0 if op == "own" else 0.5)
        if op == "add" and unit is None and "key" not in whole.kind.axes:
            return Edit(place, uh.add(kit.vector(values.shape[-1], layer)), where)
        # All heads but not the bias at zero leave a residue of rounding, which a norm may magnify.
        residue = name == "head_out" and unit is None
        if op == "zero" and name not in ("scores", "router_logits") and not residue:
            return Edit(place, uh.zero(), where)
        return Edit(place, uh.scale(1.7), where)

    return [Plan([made(*edit) for edit in cell]) for cell in case.cells]


@pytest.mark.filterwarnings("ignore")
@settings(
    max_examples=30, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(cases())
def test_any_sweep_equals_the_loop(case: Case) -> None:
    model = kit.model(case.family)
    tokens = kit.padded(kit.rows(*case.lengths), "left" if case.left else "right")
    cells = built(model, case, tokens)
    columns = None if case.columns is None else torch.tensor(case.columns)
    pick = slice(None) if columns is None else columns
    expected = torch.stack(
        [reading(model.run(tokens, edits=cell).last_logits[:, pick]) for cell in cells]
    )
    found = sweep(
        model, tokens, cells, reading, batch_size=case.size, share=case.share, columns=columns
    )
    assert (found.values - expected).abs().max() < TOLERANCE, found.how
    if case.family in PLAIN or not case.share:
        assert "plain batching" in found.how


# Cells that methods will make: neurons, experts, features ---------------------------------------


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mixtral"])
def test_neurons_experts_and_features(family: str, share: bool) -> None:
    model = kit.model(family)
    tokens, other = (kit.padded(kit.rows(7, 5, seed=s)) for s in (1, 2))
    width = model.d_model or 0
    feature = uh.clamp_feature(
        encoder=kit.vector(width, 1), decoder=kit.vector(width, 2), bias=0.1, value=3.0
    )
    run = model.run(other, record="resid_post.1")
    cells: list[Edit] = [Edit("resid_post.1", feature, p) for p in (3, 4)]
    cells += [Edit("resid_post.1.3", uh.patch(run["resid_post", 1][..., 3]), 4)]
    cells += [Edit("resid_post.0", uh.affine(torch.eye(width) * 2, torch.ones(width)), 3)]
    cells += (neurons if model.offers("mlp_post") else experts)(model, tokens, other)
    expected = torch.stack([reading(model.run(tokens, edits=c).last_logits) for c in cells])
    bare = reading(model.run(tokens).last_logits)
    assert ((expected - bare).abs().max(1).values > 1e-5).all()
    for size in (3, 64):
        found = sweep(model, tokens, cells, reading, batch_size=size, share=share)
        gaps = (found.values - expected).abs().max(1).values
        assert gaps.max() < TOLERANCE, cells[int(gaps.argmax())]
        assert ("shared prefix" if share else "plain batching") in found.how


def neurons(model: Model, tokens: Tokens, other: Tokens) -> list[Edit]:
    run = model.run(other, record="mlp_post")
    one = run["mlp_post", 1][..., 5]
    return [
        Edit("mlp_post.1.5", uh.zero()),
        Edit("mlp_post.1.5", uh.patch(one), 3),
        Edit("mlp_post.1.5", uh.patch(one[1:]), Where(3, rows=1)),
        Edit("mlp_post.1.5", uh.patch(run), 4),
        Edit("mlp_post.0", uh.patch(run), -1),
        Edit("mlp_post.1.0", uh.set_to(2.0), 3),
        Edit("mlp_post.1.9", uh.scale(-3.0)),
    ]


def experts(model: Model, tokens: Tokens, other: Tokens) -> list[Edit]:
    chosen = model.run(tokens, record="router_index.1")["router_index", 1][0, 3]
    here = int(chosen[0])
    found = [Edit("router_logits.1", uh.route(forbid=(here,)))]
    for name in ("expert_post", "expert_out"):
        whole = model.run(other, record=f"{name}.1")[name, 1]
        each = torch.randn(2, 1, 1, whole.shape[-1], generator=torch.Generator().manual_seed(4))
        found += [
            Edit(f"{name}.1.{here}", uh.zero()),
            Edit(f"{name}.1.{here}", uh.scale(2.0), Where(rows=0)),
            Edit(f"{name}.1.{here}", uh.set_to(each)),  # one vector for each prompt
            Edit(f"{name}.1", uh.zero(), 3),
            Edit(f"{name}.1", uh.patch(whole), 3),
        ]
    return found
