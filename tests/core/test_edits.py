"""Edits: every op against its formula, units, gates, schedules, reports, gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import gap, inputs, model, one, padded, rows, vector
from torch import Tensor

import underhood as uh
from underhood.core.edit import Edit, Gate, Plan, Schedule
from underhood.core.errors import EditNeverFired, NotOffered, OutOfRange, ShapeMismatch, UsageError
from underhood.core.ops import Op
from underhood.core.tokens import Where

D = 32
PROMPT = rows(9)[0]
SITE = "resid_post.1"


def after(edit: Edit | list[Edit], family: str = "llama") -> tuple[Tensor, Tensor]:
    """The site's activation without and with edits."""
    site = edit.site if isinstance(edit, Edit) else edit[-1].site
    m = model(family)
    before = m.run(one(PROMPT), record=site)[site]
    return before, m.run(one(PROMPT), record=site, edits=edit)[site]


def unit(v: Tensor) -> Tensor:
    return v / v.norm()


V, W = vector(D), vector(D, 1)
BASIS = torch.linalg.qr(torch.stack([V, W]).T)[0].T
MATRIX = torch.randn(D, D, generator=torch.Generator().manual_seed(2))
OTHER = rows(9, seed=5)[0]


def other_run() -> Any:
    return model("llama").run(one(OTHER), record=[SITE])


FORMULAS: dict[str, tuple[Callable[[], Op], Callable[[Tensor], Tensor]]] = {
    "zero": (uh.zero, lambda h: h * 0),
    "set": (lambda: uh.set_to(V), lambda h: V.expand_as(h)),
    "set a number": (lambda: uh.set_to(1.5), lambda h: torch.full_like(h, 1.5)),
    "mean": (lambda: uh.mean(W), lambda h: W.expand_as(h)),
    "patch": (lambda: uh.patch(other_run()), lambda h: other_run()[SITE]),
    "patch a tensor": (lambda: uh.patch(other_run()[SITE]), lambda h: other_run()[SITE]),
    "add": (lambda: uh.add(V), lambda h: h + V),
    "scale": (lambda: uh.scale(-0.5), lambda h: -0.5 * h),
    "project out": (lambda: uh.project_out(V), lambda h: h - (h @ unit(V))[..., None] * unit(V)),
    "project out two": (
        lambda: uh.project_out(torch.stack([V, W])), lambda h: h - h @ BASIS.T @ BASIS),
    "swap subspace": (
        lambda: uh.swap_subspace(torch.stack([V, W]), other_run()),
        lambda h: h + (other_run()[SITE] - h) @ BASIS.T @ BASIS),
    "affine vector": (lambda: uh.affine(V, W), lambda h: h * V + W),
    "affine matrix": (lambda: uh.affine(MATRIX, W), lambda h: h @ MATRIX + W),
    "clamp feature": (
        lambda: uh.clamp_feature(encoder=V, decoder=W, bias=0.3, value=2.0),
        lambda h: h + (2.0 - torch.relu(h @ V + 0.3))[..., None] * W),
    "call": (lambda: uh.call(torch.tanh), torch.tanh),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FORMULAS])
@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_ops_are_their_formulas(name: str, strength: float) -> None:
    make, formula = FORMULAS[name]
    before, edited = after(Edit(SITE, make(), strength=strength))
    expected = before + strength * (formula(before) - before)
    assert gap(edited, expected) < 2e-5
    assert gap(edited, before) > 1e-2  # it did something


@pytest.mark.parametrize("name", [*FORMULAS])
def test_ops_act_at_their_positions_only(name: str) -> None:
    make, formula = FORMULAS[name]
    before, edited = after(Edit(SITE, make(), [2, -1]))
    expected = before.clone()
    expected[:, [2, 8]] = formula(before)[:, [2, 8]]
    assert gap(edited, expected) < 2e-5
    untouched = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(edited[:, untouched], before[:, untouched])


def test_units_of_add() -> None:
    m = model("llama")
    sigma = m.sigma(SITE, one(PROMPT))
    before, edited = after(Edit(SITE, uh.add(5 * V), strength=2.0, unit="sigma", sigma=sigma))
    assert gap(edited, before + 2.0 * sigma * unit(V)) < 2e-5
    rest = before[0, 1:]
    assert sigma == pytest.approx(float((rest - rest.mean(0)).pow(2).sum(-1).mean().sqrt()), 1e-5)
    before, edited = after(Edit(SITE, uh.add(5 * V), strength=0.5, unit="norm"))
    assert gap(edited, before + 0.5 * before.norm(dim=-1, keepdim=True) * unit(V)) < 2e-5


def test_sigma_leaves_first_tokens_and_padding_out() -> None:
    m = model("llama")
    prompts = rows(4, 9)
    kept = [m.run(one(p), record=SITE)[SITE][0, 1:] for p in prompts]
    flat = torch.cat(kept)
    expected = float((flat - flat.mean(0)).pow(2).sum(-1).mean().sqrt())
    for side in ("left", "right"):
        assert m.sigma(SITE, padded(prompts, side)) == pytest.approx(expected, rel=1e-4)


def test_a_later_edit_sees_what_an_earlier_one_left() -> None:
    before, edited = after([Edit(SITE, uh.add(V)), Edit(SITE, uh.scale(2.0), 3)])
    expected = before + V
    expected[:, 3] *= 2
    assert gap(edited, expected) < 2e-5


@pytest.mark.parametrize("site", ["z.1.2", "q.0.1", "v.1.0", "mlp_post.1.5", "resid_mid.1.3"])
def test_a_unit_is_edited_alone(site: str) -> None:
    m = model("llama")
    place = uh.Site.parse(site)
    run = m.run(one(PROMPT), record=[place.whole], edits=Edit(site, uh.zero()))
    bare = m.run(one(PROMPT), record=[place.whole])
    axis = place.kind.axes.index(place.kind.unit or "")
    assert not bool(run[site].any()) and bool(bare[site].any())
    others = [i for i in range(bare[place.whole].shape[axis]) if i != place.unit]
    others = torch.tensor(others)
    assert torch.equal(
        run[place.whole].index_select(axis, others), bare[place.whole].index_select(axis, others)
    )
    assert not torch.equal(run.logits, bare.logits)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mixtral", "opt"])
def test_resid_mid_is_the_stream_after_attention(family: str) -> None:
    """Editing it equals adding to what attention writes: both reach the skip connection."""
    m = model(family)
    mid = m.run(one(PROMPT), edits=Edit("resid_mid.1", uh.add(V), 4)).logits
    out = m.run(one(PROMPT), edits=Edit("attn_out.1", uh.add(V), 4)).logits
    assert gap(mid, out) < 1e-4
    assert gap(mid, m.run(one(PROMPT)).logits) > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "granite", "t5", "whisper"])
def test_head_out_equals_z(family: str) -> None:
    """Removing what a head writes is removing its z."""
    m = model(family)
    prefix = f"{m.main}." if m.main else ""
    given = inputs(family)
    edited = m.run(given, edits=Edit(f"{prefix}head_out.1.2", uh.zero(), 3))
    quiet = m.run(given, edits=Edit(f"{prefix}z.1.2", uh.zero(), 3))
    assert gap(edited.logits, quiet.logits) < 1e-4
    assert gap(edited.logits, m.run(given).logits) > 1e-3


def test_attn_out_is_the_sum_of_heads() -> None:
    m = model("llama")
    each = [Edit(f"head_out.1.{h}", uh.zero()) for h in range(4)]
    assert gap(
        m.run(one(PROMPT), edits=each).logits,
        m.run(one(PROMPT), edits=Edit("attn_out.1", uh.zero())).logits,
    ) < 1e-4  # fmt: skip


def test_a_layered_name_means_every_layer() -> None:
    m = model("llama")
    run = m.run(one(PROMPT), edits=Edit("attn_out", uh.zero()), record=["attn_out"])
    assert not bool(run["attn_out"].any()) and len(run.fired) == 3
    source = m.run(one(OTHER), record=["resid_post"])
    run = m.run(one(PROMPT), edits=Edit("resid_post", uh.patch(source), 4), record=["resid_post"])
    assert torch.equal(run["resid_post"][:, :, 4], source["resid_post"][:, :, 4])


# Reports -----------------------------------------------------------------------------------------


def test_the_report_counts_places_and_movement() -> None:
    m = model("llama")
    batch = padded(rows(4, 9), "left")
    edits = [
        Edit(SITE, uh.zero(), [0, -1]),
        Edit(SITE, uh.scale(1.5), Where([1, 2], rows=1)),
        Edit("z.0.1", uh.zero()),
    ]
    run = m.run(batch, edits=edits, record=["z.0"])
    assert [f.places for f in run.fired] == [4, 2, 4 + 9]
    assert [f.edit for f in run.fired] == edits
    assert run.fired[0].moved == pytest.approx(1.0)
    assert run.fired[1].moved == pytest.approx(0.5, rel=1e-5)
    before, after_ = (
        m.run(one(PROMPT), record=SITE),
        m.run(one(PROMPT), edits=Edit(SITE, uh.add(V))),
    )
    h = before[SITE]
    assert after_.fired[0].moved == pytest.approx(float((9**0.5) * V.norm() / h.norm()), rel=1e-4)


def test_an_edit_that_never_fires_is_an_error() -> None:
    m = model("llama")
    with pytest.raises(EditNeverFired, match="acted nowhere"):
        m.run(one(PROMPT), edits=Edit(SITE, uh.zero(), Where(tokens=7)))
    shut = Gate("resid_post.0", V, threshold=1e9)
    with pytest.raises(EditNeverFired):
        m.run(one(PROMPT), edits=Edit(SITE, uh.zero(), gate=shut))
    with pytest.raises(EditNeverFired), m.edited(Edit(SITE, uh.zero(), 30)):
        m.module(one(PROMPT))  # type: ignore[operator]


@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba", "mixtral", "t5", "vit", "plain_mlp"])
def test_an_empty_plan_is_no_plan(family: str) -> None:
    m, given = model(family), inputs(family)
    given = next(iter(given.values())) if family == "plain_mlp" else given
    with torch.no_grad():
        if isinstance(given, Tensor):
            bare = m.module(given)
        else:
            plain = {"use_cache": False} if "use_cache" in m.forward_names else {}
            bare = m.module(**given, **plain)
    run = m.run(given, edits=Plan())
    theirs = bare if isinstance(bare, Tensor) else bare.logits
    ours = run.output if isinstance(bare, Tensor) else run.logits
    assert torch.equal(ours, theirs)


# Gates and schedules -----------------------------------------------------------------------------


@pytest.mark.parametrize("above", [True, False])
def test_a_gate_of_this_pass(above: bool) -> None:
    m = model("llama")
    seen = m.run(one(PROMPT), record=["resid_post.0", SITE])
    reading = seen["resid_post.0"] @ W
    middle = float(reading.median())
    gate = Gate("resid_post.0", W, threshold=middle, above=above)
    run = m.run(one(PROMPT), edits=Edit(SITE, uh.zero(), gate=gate), record=SITE)
    opened = reading > middle if above else reading < middle
    assert 0 < int(opened.sum()) < 9
    assert run.fired[0].places == int(opened.sum())
    assert torch.equal(run[SITE], torch.where(opened[..., None], 0.0, seen[SITE]))


def test_a_gate_on_one_head() -> None:
    """A gate reads one vector per position: one head's, never all heads at once."""
    m = model("llama")
    direction = vector(8)
    reading = m.run(one(PROMPT), record=["z.0.2"])["z.0.2"] @ direction
    middle = float(reading.median())
    gate = Gate("z.0.2", direction, threshold=middle)
    run = m.run(one(PROMPT), edits=Edit(SITE, uh.zero(), gate=gate), record=SITE)
    opened = reading[0] > middle
    assert run.fired[0].places == int(opened.sum()) > 0
    assert torch.equal(run[SITE][0].any(-1), ~opened)
    no_vectors = ("z.0", "pattern.0", "pattern.0.1", "resid_post", "router_index.0", "module:x")
    for wrong in no_vectors:
        with pytest.raises(UsageError) as caught:
            Gate(wrong, direction)
        assert caught.value.do


def test_a_gate_must_run_first() -> None:
    m = model("llama")
    for later in ("resid_post.2", SITE):
        with pytest.raises(UsageError, match="gate"):
            m.run(one(PROMPT), edits=Edit(SITE, uh.zero(), gate=Gate(later, W)))
    with pytest.raises(ShapeMismatch, match="gate"):
        m.run(one(PROMPT), edits=Edit(SITE, uh.zero(), gate=Gate("resid_post.0", vector(7))))


def test_a_gate_on_the_position_before() -> None:
    """With lag 1, in cached generation: open where the previous position's reading is high."""
    m = model("llama")
    direction = vector(D, 7)
    gate = Gate("resid_post.2", direction, threshold=0.0, lag=1)
    push = Edit("resid_post.0", uh.add(V), gate=gate)
    made = m.generate(
        one(PROMPT),
        max_new_tokens=8,
        min_new_tokens=8,
        edits=push,
        record=["resid_post.2", "resid_post.0"],
    )
    last = made.run["resid_post.2"][0] @ direction  # every position that was run
    opened = [i for i in range(9, 16) if float(last[i - 1]) > 0]
    assert made.fired[0].places == len(opened)
    assert 0 < len(opened) < 7, "choose another seed: the gate never changed"
    full = torch.cat([one(PROMPT), made.ids[:, :-1]], 1)
    again = m.run(full, edits=Edit("resid_post.0", uh.add(V), opened), record=["resid_post.0"])
    assert gap(made.run["resid_post.0"], again["resid_post.0"]) < 1e-4


def test_a_schedule_fades() -> None:
    m = model("llama")
    fade = Edit(SITE, uh.add(V), schedule=Schedule(((0, 1.0), (2, 0.5), (6, 0.0))))
    made = m.generate(
        one(PROMPT), max_new_tokens=8, min_new_tokens=8, edits=fade, record=["resid_post.1"]
    )
    factors = [1.0] * 9 + [1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0]
    steps = [Edit(SITE, uh.add(V), i, strength=f) for i, f in enumerate(factors)]
    full = torch.cat([one(PROMPT), made.ids[:, :-1]], 1)
    assert gap(made.run[SITE], m.run(full, edits=steps, record=[SITE])[SITE]) < 1e-4


def test_schedule_lines() -> None:
    line = Schedule(((2, 1.0), (4, 3.0)))
    assert line.factor(torch.tensor([0, 2, 3, 4, 9])).tolist() == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert Schedule(((3, 0.5),)).factor(torch.tensor([0, 3, 9])).tolist() == [0.5] * 3
    for wrong in ((), ((3, 1.0), (1, 0.0))):
        with pytest.raises(UsageError, match="schedule"):
            Schedule(wrong)


# Experts -----------------------------------------------------------------------------------------

MOE = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe")


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("how", ["forbid", "force"])
def test_routes_are_obeyed_or_refused(family: str, how: str) -> None:
    m = model(family)
    layer = 2
    bare = m.run(one(PROMPT), record=[f"router_index.{layer}"])[f"router_index.{layer}"]
    chosen = bare.flatten().bincount(minlength=m.size(uh.Site("expert_out", layer), "expert") or 4)
    expert = int(chosen.argmax() if how == "forbid" else chosen.argmin())
    edit = Edit(
        f"router_logits.{layer}",
        uh.route(forbid=expert) if how == "forbid" else uh.route(force=expert),
    )
    try:
        run = m.run(one(PROMPT), edits=edit, record=[f"router_index.{layer}"])
    except (EditNeverFired, NotOffered) as refusal:
        assert "expert_out" in (refusal.do or "")
        return
    now = run[f"router_index.{layer}"]
    hit = (now == expert).any(-1)
    assert not bool(hit.any()) if how == "forbid" else bool(hit.all())
    assert not torch.equal(now.sort(-1).values, bare.sort(-1).values)


def test_a_route_at_some_positions() -> None:
    m = model("mixtral")
    bare = m.run(one(PROMPT), record=["router_index.1"])["router_index.1"]
    expert = int(bare[0, 4, 0])
    edit = Edit("router_logits.1", uh.route(forbid=expert), 4)
    now = m.run(one(PROMPT), edits=edit, record=["router_index.1"])["router_index.1"]
    assert expert not in now[0, 4].tolist()
    others = [i for i in range(9) if i != 4]
    assert torch.equal(now[:, others], bare[:, others])


def test_shifted_routes() -> None:
    m = model("mixtral")
    edit = Edit("router_logits.1", uh.route(shift={2: 1.5}))
    bare = m.run(one(PROMPT), record=["router_logits.1"])["router_logits.1"]
    now = m.run(one(PROMPT), edits=edit, record=["router_logits.1"])["router_logits.1"]
    assert gap(now, bare + torch.tensor([0, 0, 1.5, 0])) < 1e-6
    with pytest.raises(ShapeMismatch, match="no expert 4"):
        m.run(one(PROMPT), edits=Edit("router_logits.1", uh.route(forbid=4)))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_one_expert_silenced(family: str) -> None:
    """What is left is the sum of the other slots; nothing else in the layer changes."""
    m, layer = model(family), 2
    out, index = f"expert_out.{layer}", f"router_index.{layer}"
    bare = m.run(one(PROMPT), record=[out, index, f"mlp_out.{layer}"])
    expert = int(bare[index].flatten().mode().values)
    quiet = Edit(f"{out}.{expert}", uh.zero())
    run = m.run(one(PROMPT), edits=quiet, record=[out, f"mlp_out.{layer}", f"{out}.{expert}"])
    gone = torch.where((bare[index] == expert)[..., None], bare[out], 0)
    assert gap(run[out], bare[out] - gone) < 1e-5
    assert gap(run[f"mlp_out.{layer}"], bare[f"mlp_out.{layer}"] - gone.sum(-2)) < 1e-4
    assert not bool(run[f"{out}.{expert}"].any()) and bool(gone.any())


def test_one_expert_of_a_recording() -> None:
    """An expert's share can be asked for alone; from a whole recording it cannot be cut."""
    m = model("mixtral")
    run = m.run(one(PROMPT), record=["expert_out.1", "expert_out.1.3", "router_index.1"])
    mine = torch.where((run["router_index.1"] == 3)[..., None], run["expert_out.1"], 0).sum(-2)
    assert torch.equal(run["expert_out.1.3"], mine)
    assert run.axes("expert_out.1.3") == ("batch", "pos", "d_model")
    assert "expert_out.1.2" not in run
    with pytest.raises(UsageError, match="not recorded"):
        run["expert_out.1.2"]


# Attention ---------------------------------------------------------------------------------------


def test_attend_hides_keys() -> None:
    m = model("llama")
    edit = Edit("scores.1", uh.attend(block=(0, 3)), -1)
    run = m.run(one(PROMPT), edits=edit, record=["pattern.1"])
    bare = m.run(one(PROMPT), record=["pattern.1"])
    row = bare["pattern.1"][:, :, -1].clone()
    row[..., [0, 3]] = 0
    assert gap(run["pattern.1"][:, :, -1], row / row.sum(-1, keepdim=True)) < 1e-5
    assert torch.equal(run["pattern.1"][:, :, :-1], bare["pattern.1"][:, :, :-1])
    only = m.run(one(PROMPT), edits=Edit("scores.1.2", uh.attend(only=5), 6), record=["pattern.1"])
    assert only["pattern.1"][0, 2, 6, 5] == 1.0
    assert torch.equal(only["pattern.1"][:, [0, 1, 3]], bare["pattern.1"][:, [0, 1, 3]])


def test_attend_names_keys_that_exist() -> None:
    m = model("llama")
    with pytest.raises(OutOfRange):
        uh.attend(block=-1)
    with pytest.raises(OutOfRange):
        uh.attend(only=(2, -3))
    with pytest.raises(OutOfRange, match="at position 9"):
        m.run(one(PROMPT), edits=Edit("scores.1", uh.attend(block=9)))
    with pytest.raises(UsageError, match="hides nothing"):
        uh.attend()
    with pytest.raises(UsageError, match="nothing"):
        uh.route()
    with pytest.raises(EditNeverFired, match="no query anything"):
        m.run(one(PROMPT), edits=Edit("scores.1", uh.attend(only=())))


# Gradients ---------------------------------------------------------------------------------------

LEARNED: dict[str, Callable[[Tensor], Op]] = {
    "add": uh.add,
    "set": uh.set_to,
    "affine": lambda v: uh.affine(v, 0.3 * v),
    "clamp": lambda v: uh.clamp_feature(encoder=v, decoder=v * 0.5, value=1.0),
    "project out": uh.project_out,
    "swap subspace": lambda v: uh.swap_subspace(v, torch.full((1, 9, D), 0.7, dtype=v.dtype)),
}


@pytest.fixture(scope="module")
def precise() -> Any:
    """A float64 GPT-2, for finite differences."""
    from underhood.organisms.tiny import tiny

    return uh.load(tiny("gpt2").module.double())


@pytest.mark.parametrize("name", [*LEARNED])
@pytest.mark.parametrize("site", ["resid_mid.1", "resid_post.0"])
def test_gradients_reach_an_edits_vector(precise: Any, name: str, site: str) -> None:
    start = vector(D, 3).double()

    def loss(v: Tensor) -> Tensor:
        edit = Edit(site, LEARNED[name](v), [2, 5], strength=0.8)
        run = precise.run(one(PROMPT), edits=edit, grad=True)
        return run.logits[0, -1, 17] - run.logits[0, -1, 40]

    v = start.clone().requires_grad_()
    loss(v).backward()
    assert v.grad is not None
    step = 1e-5
    for i in (0, 7, 31):
        e = torch.zeros(D, dtype=torch.float64)
        e[i] = step
        with torch.no_grad():
            slope = (loss(start + e) - loss(start - e)) / (2 * step)
        assert float(v.grad[i]) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)


def test_gradients_reach_recordings(precise: Any) -> None:
    run = precise.run(one(PROMPT), record=["resid_post.0", "z.1"], grad=True)
    run.logits[0, -1, 3].backward(inputs=[run["resid_post.0"], run["z.1"]])
    assert run["resid_post.0"].grad is not None and run["z.1"].grad.abs().sum() > 0


def test_directions_must_be_independent() -> None:
    for wrong in (torch.stack([V, 3 * V]), torch.zeros(D), torch.randn(D + 1, D),
                  torch.stack([V, 0.3 * V + 1e-9 * W])):  # fmt: skip
        with pytest.raises(ShapeMismatch, match="dependent"):
            uh.project_out(wrong)
    basis = uh.project_out(torch.stack([V, W]).double()).basis  # type: ignore[attr-defined]
    assert gap(basis @ basis.T, torch.eye(2, dtype=torch.float64)) < 1e-12
