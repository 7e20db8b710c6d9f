"""A sweep equals the loop of single runs; edits on some rows leave the others alone."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import underhood as uh
from underhood.core.edit import Edit, Gate, Plan
from underhood.core.errors import (
    EditNeverFired,
    NotFinite,
    OutOfRange,
    ShapeMismatch,
    UsageError,
)
from underhood.core.growing import groups, why_not
from underhood.core.model import Model
from underhood.core.site import Site
from underhood.core.sweep import rows_per_pass, sweep
from underhood.core.tokens import Tokens, Where

pytestmark = pytest.mark.usefixtures("always_share")

ENGINE = ["gpt2", "llama", "mistral", "gemma2", "gemma3", "qwen3", "gpt_neox", "olmo2", "mixtral"]
FAMILIES = ("gpt2", "llama", "gemma3", "mixtral", "mistral")
NAMES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "v", "pattern")


def batch(model: Model, lengths: Sequence[int], seed: int = 0) -> Tokens:
    """Random ids, padded on the right."""
    make = torch.Generator().manual_seed(seed)
    vocab = model.config.vocab_size  # type: ignore[union-attr]
    ids = torch.randint(3, vocab, (len(lengths), max(lengths)), generator=make)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return Tokens(ids.where(mask, torch.zeros_like(ids)), mask)


def half(logits: Tensor) -> Tensor:
    """A reading that depends on every logit, on the scale of one logit."""
    weight = torch.linspace(-1, 1, logits.shape[1], dtype=torch.float64)
    return logits.double() @ (weight / weight.norm())


def naive(model: Model, tokens: Tokens, cells: Sequence[Edit | Plan]) -> Tensor:
    return torch.stack([half(model.run(tokens, edits=cell).last_logits) for cell in cells])


def random_cells(model: Model, tokens: Tokens, seed: int = 0, n: int = 24) -> list[Edit | Plan]:
    """Patches, steering, ablations at random sites and positions; some cells hold two edits."""
    draw, make = random.Random(seed), torch.Generator().manual_seed(seed)
    names = [name for name in NAMES if model.offers(name)]
    other = model.run(batch(model, tokens.lengths, seed=seed + 1), record=names)
    cells: list[Edit | Plan] = []
    for number in range(n):
        site = draw.choice(model.resolve(names[number % len(names)]))
        unit = draw.randrange(2) if site.kind.unit == "head" and draw.random() < 0.5 else None
        site = Site(site.name, site.layer, unit)
        shortest = min(tokens.lengths)
        where = draw.choice([Where(draw.randrange(shortest)), Where(-1), Where(), Where(0, rows=0)])
        values = other.aligned(site)
        if site.name == "pattern":
            cells.append(Edit(site, uh.patch(values), where))
            continue
        vector = torch.randn(values.shape[-1], generator=make)
        op = draw.choice([uh.patch(values), uh.zero(), uh.add(vector), uh.patch(values[:1])])
        edit = Edit(site, op, where, strength=draw.choice([1.0, 0.5]))
        two = Plan([edit, Edit(f"resid_post.{model.n_layers - 1}", uh.scale(1.5), -1)])
        cells.append(draw.choice([edit, two]))
    return cells


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_equals_the_loop(family: str) -> None:
    """Plainly batched, and with a shared prefix."""
    model = uh.load(f"random/{family}")
    tokens = batch(model, [9, 9, 9])
    cells = random_cells(model, tokens)
    expected = naive(model, tokens, cells)
    assert expected.std(0).min() > 1e-3  # the cells do different things
    for share, how in ((False, "plain batching"), (True, "shared prefix")):
        found = sweep(model, tokens, cells, half, share=share)
        assert (found.values - expected).abs().max() < 1e-5
        assert how in found.how
        assert share or found.passes == 2  # 21 cells of 3 rows a pass


@pytest.mark.parametrize("family", ENGINE)
def test_the_engine_is_exact(family: str) -> None:
    """Every writable site of every layer, early, middle and late: shared = one by one."""
    model = uh.load(f"random/{family}")
    tokens = batch(model, [12])
    other = batch(model, [12], 1)
    other.ids[0, :4] = tokens.ids[0, :4]  # a common prefix, as in real pairs
    names = [n for n in ("resid_pre", "resid_mid", "attn_out", "mlp_out", "z", "k", "v", "pattern")
             if model.offers(n)]  # fmt: skip
    source = model.run(other, record=names)
    cells = [Edit(s, uh.patch(source), p) for s in source.sites for p in (4, 8, 11)]
    assert why_not(model, [model.plan(c, lengths=[12], generating=False) for c in cells]) is None
    found = sweep(model, tokens, cells, half, batch_size=16)
    assert "shared prefix" in found.how
    assert (found.values - naive(model, tokens, cells)).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["mamba", "jamba", "bloom", "deepseek_v3", "rwkv"])
def test_what_cannot_be_shared_is_batched_plainly(family: str) -> None:
    model = uh.load(f"random/{family}")
    tokens = batch(model, [7])
    cells = [Edit(f"resid_post.{i}", uh.scale(0.5), p) for i in (0, 1) for p in (1, 5)]
    found = sweep(model, tokens, cells, half)
    assert "plain batching" in found.how and "(" in found.how
    assert (found.values - naive(model, tokens, cells)).abs().max() < 1e-4


def test_groups_cover_every_cell_once_and_respect_the_cap() -> None:
    model = uh.load("random/gpt2")
    edits = [Edit(f"resid_pre.{i}", uh.zero(), p) for i in range(3) for p in range(12)]
    plans = [model.plan(e, lengths=[12], generating=False) for e in edits]
    found = groups(plans, 12, 3, 5)
    assert sorted(c for g in found for c in g) == list(range(36))
    assert max(map(len, found)) <= 5


def test_a_family_that_couples_rows_falls_back() -> None:
    """A model whose rows see each other is noticed by its unedited row, and batched plainly."""
    model = uh.load("random/gpt2")
    block = model.module.get_submodule("transformer.h.1")
    handle = block.register_forward_hook(lambda m, a, out: out + 0.1 * out.mean(0, keepdim=True))
    try:
        tokens = batch(model, [6])
        cells = [Edit("resid_pre.1", uh.scale(2.0), p) for p in (2, 4)]
        found = sweep(model, tokens, cells, half)
        assert "beside a bare pass" in found.how
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_prompts_of_different_length_and_any_batch_size(family: str, size: int) -> None:
    model = uh.load(f"random/{family}")
    tokens = batch(model, [5, 9, 7])
    cells = random_cells(model, tokens, seed=3, n=10)
    expected = naive(model, tokens, cells)
    for share in (True, False):
        found = sweep(model, tokens, cells, half, batch_size=size, share=share)
        assert (found.values - expected).abs().max() < 1e-5
        assert share or found.passes >= 10 * 3 / size


def test_left_padding() -> None:
    model = uh.load("random/llama")
    right = batch(model, [5, 8])
    left = Tokens(right.ids.clone(), right.mask.clone())
    left.ids[0], left.mask[0] = right.ids[0].roll(3), right.mask[0].roll(3)
    cells = random_cells(model, right, seed=5, n=8)
    found = sweep(model, left, cells, half)
    assert (found.values - naive(model, right, cells)).abs().max() < 1e-5


def test_values_may_belong_to_the_named_rows() -> None:
    model = uh.load("random/gpt2")
    tokens = batch(model, [6, 6, 6])
    values = model.run(batch(model, [6, 6, 6], 1), record="resid_pre.1")["resid_pre", 1]
    whole = Edit("resid_pre.1", uh.patch(values), Where(2, rows=(0, 2)))
    own = Edit("resid_pre.1", uh.patch(values[[0, 2]]), Where(2, rows=(0, 2)))
    expected = naive(model, tokens, [whole])
    bare = half(model.run(tokens).last_logits)
    for size in (1, 2, 64):
        found = sweep(model, tokens, [whole, own], half, batch_size=size).values
        assert (found - expected).abs().max() < 1e-5
        assert (found[:, 1] - bare[1]).abs().max() < 1e-5
    assert (expected[0, [0, 2]] - bare[[0, 2]]).abs().min() > 1e-4


def test_the_logits_themselves_can_be_edited() -> None:
    model = uh.load("random/gpt2")
    tokens = batch(model, [4, 6])
    vocab = model.config.vocab_size  # type: ignore[union-attr]
    cells = [Edit("logits", uh.add(torch.arange(vocab).float()), -1)]
    found = sweep(model, tokens, cells, half).values
    assert (found - naive(model, tokens, cells)).abs().max() < 1e-4


def test_progress_and_how_much_each_cell_moved() -> None:
    model = uh.load("random/gpt2")
    tokens = batch(model, [6])
    cells = [Edit("resid_post.0", uh.scale(factor), 2) for factor in (1.0, 1.5, 3.0)]
    seen: list[tuple[int, int]] = []
    found = sweep(
        model, tokens, cells, half, batch_size=2, progress=lambda *state: seen.append(state)
    )
    assert seen == [(2, 3), (3, 3)]
    assert torch.allclose(found.moved, torch.tensor([0.0, 0.5, 2.0]), atol=1e-6)


def test_an_edit_that_never_fires_is_named() -> None:
    model = uh.load("random/gpt2")
    tokens = batch(model, [6, 6])
    absent = int(set(range(3, 90)).difference(tokens.ids.flatten().tolist()).pop())
    good = Edit("z.0.1", uh.zero())
    never = Edit("z.0.1", uh.zero(), Where(tokens=absent))
    with pytest.raises(EditNeverFired, match="cell 1"):
        sweep(model, tokens, [good, never, good], half)


def test_a_token_condition_may_hold_in_some_prompts_only() -> None:
    model = uh.load("random/gpt2")
    tokens = batch(model, [6, 6])
    token = next(int(t) for t in tokens.ids[1] if int(t) not in tokens.ids[0].tolist())
    cell = Edit("resid_pre.1", uh.zero(), Where(tokens=token))
    for size in (1, 64):
        found = sweep(model, tokens, [cell], half, batch_size=size).values
        assert (found - naive(model, tokens, [cell])).abs().max() < 1e-5


def test_refusals() -> None:
    model = uh.load("random/gpt2")
    tokens = batch(model, [6])
    cell = Edit("z.0.1", uh.zero())
    with pytest.raises(UsageError, match="needs cells"):
        sweep(model, tokens, [], half)
    with pytest.raises(UsageError, match="holds no edit"):
        sweep(model, tokens, [cell, Plan()], half)
    with pytest.raises(OutOfRange):
        sweep(model, tokens, [cell], half, batch_size=0)
    with pytest.raises(OutOfRange):
        sweep(model, tokens, [Edit("z.0.1", uh.zero(), 6)], half)
    with pytest.raises(ShapeMismatch, match="one number per row"):
        sweep(model, tokens, [cell], lambda logits: logits)
    with pytest.raises(NotFinite, match="not finite"):
        bad = Edit("resid_post.2", uh.scale(float("nan")))
        sweep(model, tokens, [cell, bad], half)
    with pytest.raises(NotFinite, match="reading"):
        sweep(model, tokens, [cell], lambda logits: logits[:, 0] * float("inf"))


def test_default_rows_keep_a_pass_small() -> None:
    assert rows_per_pass(16) == 64
    assert rows_per_pass(1024) == 8
    assert rows_per_pass(100_000) == 1


# Edits on some rows, in a plain run ---------------------------------------------------------------


@pytest.mark.parametrize("site", ["resid_pre.1", "z.1", "z.1.0", "pattern.1", "mlp_out.0"])
def test_other_rows_stay_bit_for_bit(site: str) -> None:
    model = uh.load("random/llama")
    tokens = batch(model, [7, 7, 7])
    place = Site.parse(site)
    bare = model.run(tokens, record=str(place.whole))
    run = model.run(tokens, record=str(place.whole), edits=Edit(site, uh.zero(), Where(rows=1)))
    before, after = bare[place], run[place]
    assert not after[1].any() and before[1].any()
    assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_several_row_edits_equal_one_run_each() -> None:
    model = uh.load("random/gpt2")
    tokens = batch(model, [7, 5, 7])
    values = model.run(batch(model, [7, 5, 7], 1), record="resid_pre.1")["resid_pre", 1]
    edits = [
        Edit("resid_pre.1", uh.patch(values), Where(3, rows=0)),
        Edit("resid_pre.1", uh.scale(2.0), Where(-1)),
        Edit("resid_pre.1", uh.add(values), Where(2, rows=-1)),
        Edit("resid_pre.1", uh.zero(), Where(4, rows=(1, 0)), strength=0.5),
    ]
    together = model.run(tokens, edits=edits).last_logits
    by_hand = model.run(tokens, record="resid_pre.1")["resid_pre", 1].clone()
    by_hand[0, 3] = values[0, 3]
    by_hand[[0, 1, 2], [6, 4, 6]] *= 2
    by_hand[2, 2] += values[2, 2]
    by_hand[[0, 1], 4] *= 0.5
    expected = model.run(tokens, edits=Edit("resid_pre.1", uh.patch(by_hand))).last_logits
    assert torch.allclose(together, expected, atol=1e-5)


def test_row_edits_keep_gradients_and_the_model() -> None:
    model = uh.load("random/gpt2")
    tokens = batch(model, [5, 5])
    vector = torch.zeros(model.d_model or 0, requires_grad=True)
    edits = [Edit("resid_pre.1", uh.add(vector), Where(2, rows=r)) for r in (0, 1)]
    model.run(tokens, edits=edits[:1], grad=True).logits[0].sum().backward()
    one = vector.grad
    assert one is not None and one.abs().max() > 0
    vector.grad = None
    model.run(tokens, edits=edits[:1], grad=True).logits[1].sum().backward()
    assert vector.grad is not None and not vector.grad.any()
    vector.grad = None
    model.run(tokens, edits=edits, grad=True).logits[0].sum().backward()
    assert vector.grad is not None and torch.allclose(vector.grad, one, atol=1e-6)


def test_a_gate_reads_its_own_rows() -> None:
    model = uh.load("random/gpt2")
    tokens = batch(model, [6, 6])
    bare = model.run(tokens, record=["resid_pre.0", "resid_post.1"])
    direction = torch.randn(model.d_model or 0, generator=torch.Generator().manual_seed(1))
    gate = Gate(Site.parse("resid_pre.0"), direction)
    opened = gate.open(bare["resid_pre", 0])
    assert opened[1].any() and not opened[1].all() and not torch.equal(opened[0], opened[1])
    edit = Edit("resid_post.1", uh.zero(), Where(rows=1), gate=gate)
    after = model.run(tokens, record="resid_post.1", edits=edit)["resid_post", 1]
    assert torch.equal(~after[1].any(-1), opened[1])
    assert torch.equal(after[0], bare["resid_post", 1][0])


def test_one_expert_in_some_rows() -> None:
    model = uh.load("random/mixtral")
    tokens = batch(model, [8, 8])
    bare = model.run(tokens, record=["expert_out.1", "router_index.1"])
    chosen = bare["router_index", 1] == 0
    assert chosen[1].any()
    edit = Edit("expert_out.1.0", uh.zero(), Where(rows=1))
    after = model.run(tokens, record="expert_out.1", edits=edit)["expert_out", 1]
    assert torch.equal(after[0], bare["expert_out", 1][0])
    assert not after[1][chosen[1]].any()
    assert torch.equal(after[1][~chosen[1]], bare["expert_out", 1][1][~chosen[1]])


def test_a_site_without_rows_of_its_own_is_refused() -> None:
    model = uh.load("random/gpt2")
    with pytest.raises(ShapeMismatch, match="cannot be told apart"):
        model.run(batch(model, [6, 6]), edits=Edit("pos_embed", uh.zero(), Where(rows=1)))
