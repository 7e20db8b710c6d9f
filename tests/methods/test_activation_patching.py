"""Activation patching against hooks written by hand, and against what must hold exactly."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from torch import Tensor, nn

import underhood as uh
from underhood.core.edit import Edit
from underhood.core.errors import NotOffered, OutOfRange, PairError, SiteNotFound, UsageError
from underhood.core.model import Model
from underhood.core.ops import patch
from underhood.core.site import Site
from underhood.core.tokens import Where
from underhood.data import Pairs
from underhood.methods.locate._places import Place, cells_of
from underhood.methods.locate.activation_patching import activation_patching
from underhood.organisms import organism
from underhood.view import View

CLEAN, CONTRAST = "w20 w31 w12 w40 w55 w9", "w20 w31 w18 w40 w56 w9"


@pytest.fixture(scope="module")
def town() -> Model:
    return uh.load()


def random_pair() -> Pairs:
    return Pairs.one(CLEAN, CONTRAST, "w30", "w33")


def town_pairs(n: int, seed: int = 0) -> Pairs:
    return organism("town").pairs("indirect_object", n, seed)


# The oracle: torch hooks on the Hugging Face modules, and nothing of underhood -------------------


def _module(model: Model, layer: int, site: str) -> nn.Module:
    net: Any = model.module
    if hasattr(net, "transformer"):
        block = net.transformer.h[layer]
        return {"resid_pre": block, "z": block.attn.c_proj, "mlp_out": block.mlp}[site]
    block = net.model.layers[layer]
    return {"resid_pre": block, "z": block.self_attn.o_proj, "mlp_out": block.mlp}[site]


def _hooked(
    model: Model, ids: Tensor, layer: int, site: str, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """Logits at the last token, with one module's input (or output) passed through `change`."""
    module = _module(model, layer, site)
    if site == "mlp_out":
        handle = module.register_forward_hook(lambda *call: change(call[2]))
    else:
        handle = module.register_forward_pre_hook(lambda _m, args: (change(args[0]), *args[1:]))
    try:
        with torch.no_grad():
            return model.module(input_ids=ids).logits[0, -1]
    finally:
        handle.remove()


def naive(model: Model, pairs: Pairs, site: str, direction: str, *, heads: int = 0) -> np.ndarray:
    """Effects `[layer, pos]`, or `[layer, head, pos]` with heads."""
    encoded = pairs.encode(model)
    clean, contrast = encoded.clean.ids, encoded.contrast.ids
    right, wrong = int(encoded.answers[0, 0]), int(encoded.wrong[0, 0])
    base, other = (contrast, clean) if direction == "denoise" else (clean, contrast)

    def diff(logits: Tensor) -> float:
        return float(logits[right] - logits[wrong])

    with torch.no_grad():
        start, end = (diff(model.module(input_ids=i).logits[0, -1]) for i in (base, other))
    rows = []
    for layer in range(model.n_layers):
        kept: list[Tensor] = []

        def keep(h: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(h.clone())
            return h

        _hooked(model, other, layer, site, keep)
        cells = []
        for head in range(max(heads, 1)):
            for pos in range(base.shape[1]):
                width = kept[0].shape[-1] // max(heads, 1)
                part = slice(head * width, (head + 1) * width)

                def write(
                    h: Tensor, pos: int = pos, part: slice = part, kept: list[Tensor] = kept
                ) -> Tensor:
                    h = h.clone()
                    h[0, pos, part] = kept[0][0, pos, part]
                    return h

                cells.append(
                    (diff(_hooked(model, base, layer, site, write)) - start) / (end - start)
                )
        rows.append(np.array(cells).reshape(max(heads, 1), -1))
    grid = np.stack(rows)
    return grid if heads else grid[:, 0]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site", ["resid_pre", "mlp_out"])
def test_it_equals_hooks_written_by_hand(family: str, direction: Any, site: str) -> None:
    model = random_model(family)
    found = activation_patching(
        model, random_pair(), sites=site, direction=direction, control=False
    )
    expected = naive(model, random_pair(), site, direction)
    assert np.abs(expected).max() > 0.05
    assert np.abs(found["effect"].values - expected).max() < 1e-4
    # The prompts first differ at position 2: earlier cells were not run, and rightly so.
    assert found["skipped"].values[:, :2].all() and not found["effect"].values[:, :2].any()
    assert not found["skipped"].values[1:, 2:].any()
    assert np.abs(expected[:, :2]).max() < 1e-6


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_heads_equal_hooks_written_by_hand(family: str) -> None:
    model = random_model(family)
    expected = naive(model, random_pair(), "z", "noise", heads=model.n_heads)
    options: dict[str, Any] = {"sites": "z", "direction": "noise", "control": False}
    each = activation_patching(model, random_pair(), **options)
    assert each["effect"].dims == ("layer", "head", "pos")
    assert np.abs(each["effect"].values - expected).max() < 1e-4
    last = activation_patching(model, random_pair(), positions="last", **options)
    assert last["effect"].dims == ("layer", "head")
    assert np.abs(last["effect"].values - expected[:, :, -1]).max() < 1e-4
    assert np.abs(expected[:, :, -1]).max() > 0.01


def test_all_positions_of_a_head_at_once() -> None:
    model = random_model("llama")
    found = activation_patching(model, random_pair(), sites="z", positions="all", control=False)
    encoded = random_pair().encode(model)
    clean = model.run(encoded.clean, record="z")
    right, wrong = int(encoded.answers[0, 0]), int(encoded.wrong[0, 0])

    def diff(edits: list[Edit]) -> float:
        logits = model.run(encoded.contrast, edits=edits).last_logits[0]
        return float(logits[right] - logits[wrong])

    start = diff([])
    end = float(clean.last_logits[0, right] - clean.last_logits[0, wrong])
    for layer in range(model.n_layers):
        for head in range(model.n_heads):
            edit = Edit(f"z.{layer}.{head}", patch(clean))
            expected = (diff([edit]) - start) / (end - start)
            assert abs(float(found["effect"][layer, head]) - expected) < 1e-4


# What must hold exactly --------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "mistral", "gemma3"])
def test_the_whole_stream_is_the_whole_effect(family: str, direction: Any) -> None:
    model = random_model(family)
    found = activation_patching(
        model, random_pair(), direction=direction, positions="all", control=False
    )
    assert np.abs(found["effect"].values - 1).max() < 1e-4


def test_clean_into_clean_changes_nothing(town: Model) -> None:
    """Two prompts that agree up to their last token: everything before it is the same run."""
    pair = Pairs.one("The capital of France is", "The capital of France was", "Paris", "Rome")
    found = activation_patching(town, pair, direction="noise")
    before = found["effect"].values[:, :-1]
    assert found["skipped"].values[:, :-1].all() and not before.any()
    assert not found["control"].values[:, :-1].any()
    assert (found["patched"].values[:, :-1, 0] == found["clean"].values[0]).all()
    clean = town.run(pair.encode(town).clean, record="resid_pre")
    again = town.run(pair.clean[0], edits=Edit("resid_pre", patch(clean))).logits
    assert torch.equal(again, clean.logits)


def test_a_model_that_looks_ahead_skips_nothing_that_differs() -> None:
    """Skipping is measured: earlier positions of a bidirectional model do differ."""
    model = random_model("bert")
    found = activation_patching(model, random_pair(), control=False)
    assert found["skipped"].values[0, :2].all()
    assert not found["skipped"].values[1:].any()
    assert np.abs(found["effect"].values[1:, :2]).max() > 1e-4


def test_the_batch_size_does_not_matter(town: Model) -> None:
    pairs = town_pairs(5)
    options: dict[str, Any] = {"direction": "noise", "value": "mean", "positions": "last"}
    whole = activation_patching(town, pairs, **options)
    assert np.abs(whole["effect"]).max() > 0.1 and np.abs(whole["control"]).max() > 0.01
    for size in (1, 2, 7):
        part = activation_patching(town, pairs, batch_size=size, **options)
        for name in ("effect", "sem", "control", "patched"):
            assert np.allclose(part[name], whole[name], atol=2e-5, equal_nan=True), name


# Known answers -----------------------------------------------------------------------------------


def test_the_answer_moves_from_the_name_to_the_last_token(town: Model) -> None:
    """In the IOI task of the town only the second name differs; the last token must learn it."""
    pairs = Pairs.one(
        "When Kate and Paul went to the office, Kate lent a gift to",
        "When Kate and Paul went to the office, Paul lent a gift to",
        "Paul", "Kate",
    )  # fmt: skip
    for direction in ("denoise", "noise"):
        found = activation_patching(town, pairs, direction=direction)
        effect, control = found["effect"].values, found["control"].values
        words = [str(w).strip() for w in found["token"].values]
        name = next(i for i, word in enumerate(words) if "→" in word)
        sign = "Kate→Paul"
        assert words[name] == sign and words[-1] == "to"
        assert abs(effect[0, name] - 1) < 1e-4  # all that differs at the input
        assert effect[0, -1] == 0 and effect[-1, -1] > 0.4
        assert effect[-1, name] < effect[0, name] - 0.3
        assert np.abs(control[-1, -1]) < effect[-1, -1]
        assert found["clean"].item() > 0 > found["contrast"].item()


def test_pairs_of_different_length(town: Model) -> None:
    pairs = town_pairs(8)
    lengths = pairs.encode(town).clean.lengths
    assert len(set(lengths)) > 1
    whole = activation_patching(town, pairs, control=False)
    for row, pair in enumerate(pairs):
        alone = activation_patching(town, pair, control=False)
        mine = whole["patched"].values[..., row]
        assert np.allclose(mine[:, : lengths[row]], alone["patched"].values[..., 0], atol=1e-4)
        assert np.isnan(mine[:, lengths[row] :]).all()
        assert abs(whole["clean"].values[row] - alone["clean"].item()) < 1e-4
    patched, contrast = whole["patched"].values, whole["contrast"].values
    moved, way = patched - contrast, whole["clean"].values - contrast
    here = ~np.isnan(patched)
    expected = np.nanmean(moved, -1) / np.array(
        [[way[cell].mean() for cell in layer] for layer in here]
    )
    assert np.allclose(whole["effect"].values, expected, atol=1e-9)
    assert (whole["rows"].values == here.sum(-1)).all()
    assert whole["rows"].values[0, -1] == lengths.count(max(lengths))
    late = activation_patching(town, pairs, positions="last", control=False)
    assert late["effect"].values[-1] > 0.5 and 0 < late["sem"].values[-1] < 0.2
    # The standard error of a ratio of means, against resampling the rows.
    mine = activation_patching(town, pairs, sites="attn_out", positions="last", control=False)
    moved = mine["patched"].values - mine["contrast"].values
    ways = mine["clean"].values - mine["contrast"].values
    drawn = np.random.default_rng(0).integers(0, 8, (4000, 8))
    spread = (moved[:, drawn].sum(-1) / ways[drawn].sum(-1)).std(1)
    assert (spread > 1e-6).all()
    assert np.allclose(mine["sem"].values, spread, rtol=0.4)


def test_the_answers_may_be_the_models_own(town: Model) -> None:
    given = town_pairs(2)
    bare = Pairs(list(given.clean), list(given.contrast))
    own = activation_patching(town, bare, positions="last", control=False)
    told = activation_patching(town, given, positions="last", control=False)
    assert own.provenance["answers"] == "the model's own top tokens"
    says = [town.run(list(p)).last_logits.argmax(-1) for p in (given.clean, given.contrast)]
    assert [town.token_text(int(i)).strip() for i in says[0]] == [a[0] for a in given.answers]
    assert np.allclose(own["effect"], told["effect"], atol=1e-6)


@pytest.mark.parametrize("metric", ["logit", "prob", "log_prob", "kl", "prob_diff"])
def test_other_metrics_have_the_same_ends(town: Model, metric: str) -> None:
    pair = town_pairs(1)
    found = activation_patching(town, pair, metric=metric, positions="all", control=False)
    assert np.abs(found["effect"].values - 1).max() < 1e-4
    assert found["clean"].item() > found["contrast"].item()


def test_zero_and_mean(town: Model) -> None:
    pair = town_pairs(1)
    encoded = pair.encode(town)
    runs = [town.run(t, record="mlp_out") for t in (encoded.clean, encoded.contrast)]
    mean = torch.cat([r["mlp_out", 1][0, 1:] for r in runs]).mean(0)
    right, wrong = int(encoded.answers[0, 0]), int(encoded.wrong[0, 0])
    ends = [float(r.last_logits[0, right] - r.last_logits[0, wrong]) for r in runs]
    options: dict[str, Any] = {"sites": "mlp_out", "direction": "noise", "control": False}
    for name, op in (("mean", uh.set_to(mean)), ("zero", uh.zero())):
        options["value"] = name
        found = activation_patching(town, pair, **options)
        assert not found["skipped"].any()
        after = town.run(encoded.clean, edits=Edit("mlp_out.1", op, Where(-1))).last_logits[0]
        expected = (ends[0] - float(after[right] - after[wrong])) / (ends[0] - ends[1])
        assert abs(float(found["effect"][1, -1]) - expected) < 1e-5


# The control -------------------------------------------------------------------------------------


def test_the_control_changes_as_much(town: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    import underhood.methods.locate._block as inside

    seen: list[Any] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(original(*args, **kwargs))
        return seen[-1]

    original = inside.sweep
    monkeypatch.setattr(inside, "sweep", watched)
    found = activation_patching(town, town_pairs(1), draws=3, seed=1)
    assert len(seen) == 4
    for control in seen[1:]:
        assert torch.allclose(control.moved, seen[0].moved, rtol=1e-4)
        assert not torch.allclose(control.values, seen[0].values, rtol=1e-2)
    again = activation_patching(town, town_pairs(1), draws=3, seed=1)
    assert (found["control"] == again["control"]).all()
    other = activation_patching(town, town_pairs(1), draws=3, seed=2)
    assert not np.allclose(found["control"], other["control"])


# What comes back ---------------------------------------------------------------------------------


def test_result_and_view(town: Model, tmp_path: Any) -> None:
    found = activation_patching(town, town_pairs(1))
    assert found.view.kind == "grid" and found.view.control is not None
    assert "1 = the clean run's answer restored" in found.view.about
    assert "exactly 0, not run" in found.view.about
    assert found.provenance["direction"] == "denoise"
    assert View.from_json(found.view.to_json()) == found.view
    loaded = type(found).load(found.save(tmp_path / "grid.json"))
    assert loaded.data.equals(found.data)
    heads = activation_patching(town, town_pairs(1), sites="z", positions="last", control=False)
    assert heads.view.kind == "grid" and heads.view.control is None
    assert "control" not in heads.data
    both = activation_patching(town, town_pairs(1), sites=("attn_out", "mlp_out"), positions="last")
    assert both["effect"].dims == ("site", "layer") and both.view.kind == "group"
    one = activation_patching(town, town_pairs(1), sites="mlp_out", positions="last")
    assert np.allclose(both["effect"].sel(site="mlp_out"), one["effect"], atol=1e-6)
    assert one.view.kind == "bars"
    assert np.allclose(one["raw"], one["effect"] * float(one["clean"][0] - one["contrast"][0]))


# Other units, other values -----------------------------------------------------------------------


def edited(model: Model, pairs: Pairs, edits: Edit | list[Edit]) -> float:
    """Share of the clean run's logit difference that is lost to some edits."""
    encoded = pairs.encode(model)
    right, wrong = int(encoded.answers[0, 0]), int(encoded.wrong[0, 0])
    found = [
        model.run(tokens, edits=changes).last_logits[0]
        for tokens, changes in ((encoded.clean, edits), (encoded.clean, []), (encoded.contrast, []))
    ]
    after, clean, contrast = (float(logits[right] - logits[wrong]) for logits in found)
    return (clean - after) / (clean - contrast)


def test_neurons_and_positions_by_number() -> None:
    model = random_model("llama")
    found = activation_patching(
        model, random_pair(), sites="mlp_post", units=(1, 4), positions=(3, 5), direction="noise"
    )
    assert found["effect"].dims == ("layer", "neuron", "pos")
    assert found["pos"].values.tolist() == [3, 5] and found["neuron"].values.tolist() == [1, 4]
    other = model.run(random_pair().encode(model).contrast, record="mlp_post")
    own = model.run(random_pair().encode(model).clean, record="mlp_post")
    seen = 0.0
    for layer in range(model.n_layers):
        for neuron in (1, 4):
            for pos in (3, 5):
                whole = own["mlp_post", layer].clone()
                whole[0, pos, neuron] = other["mlp_post", layer][0, pos, neuron]
                expected = edited(
                    model, random_pair(), Edit(f"mlp_post.{layer}", patch(whole), Where(pos))
                )
                mine = float(found["effect"].sel(layer=layer, neuron=neuron, pos=pos))
                assert abs(mine - expected) < 1e-4
                seen = max(seen, abs(expected))
    assert seen > 1e-3
    # A single number has two directions only; the control's lie among all neurons.
    assert (found["control"].values != 0).any()
    whole = activation_patching(model, random_pair(), sites="z", units="whole", control=False)
    assert whole["effect"].dims == ("layer", "pos")


def test_experts_by_number() -> None:
    """An expert's share is exchanged where the edited run chose it, and nowhere else."""
    model = random_model("mixtral")
    found = activation_patching(
        model, random_pair(), sites="expert_out", units="each", direction="noise", control=False
    )
    assert found["effect"].dims == ("layer", "expert", "pos")
    encoded = random_pair().encode(model)
    runs = [
        model.run(tokens, record=["expert_out", "router_index"])
        for tokens in (encoded.clean, encoded.contrast)
    ]

    def share(run: Any, layer: int, expert: int, pos: int) -> Tensor:
        hit = run["router_index", layer][0, pos] == expert
        return (run["expert_out", layer][0, pos] * hit[:, None]).sum(0)

    for layer in range(model.n_layers):
        for expert in found["expert"].values.tolist():
            for pos in (3, 5):
                cell = found.data.sel(layer=layer, expert=expert, pos=pos)
                if not bool((runs[0]["router_index", layer][0, pos] == expert).any()):
                    assert bool(cell["skipped"]) and float(cell["effect"]) == 0
                    continue
                own, other = (share(run, layer, expert, pos) for run in runs)
                edit = Edit(f"mlp_out.{layer}", uh.add(other - own), Where(pos))
                assert abs(float(cell["effect"]) - edited(model, random_pair(), edit)) < 1e-4
    assert np.abs(found["effect"].values).max() > 0.01 and found["skipped"].values.any()
    routed = activation_patching(
        model, random_pair(), sites="router_logits", direction="noise", control=False
    )
    logits = model.run(encoded.contrast, record="router_logits")
    edit = Edit("router_logits.1", patch(logits), Where(5))
    assert abs(float(routed["effect"][1, 5]) - edited(model, random_pair(), edit)) < 1e-4


def test_the_strongest_units() -> None:
    from underhood.methods.locate.attribution_patching import attribution_patching

    model = random_model("gpt2")
    found = activation_patching(
        model, random_pair(), sites="mlp_post", units="top", top=6, positions="last", control=False
    )
    every = attribution_patching(
        model, random_pair(), sites="mlp_post", units="each", positions="last", verify=0
    )
    size = np.abs(every["raw"].values).ravel()
    width = every.data.sizes["neuron"]
    best = {divmod(int(i), width) for i in np.argsort(size)[-6:]}
    here = {
        (int(found["layer"][i]), int(found["neuron"][j]))
        for i, j in zip(*np.nonzero(np.isfinite(found["effect"].values)), strict=True)
    }
    assert here == best and found.view.kind == "bars"


def test_means_of_positions_and_learned_constants(town: Model) -> None:
    drawn = organism("town").pairs("indirect_object", 12)
    lengths = town.tokens(list(drawn.clean)).lengths
    pairs = drawn[[i for i, length in enumerate(lengths) if length == lengths[0]][:3]]
    assert len(pairs) > 1
    encoded = pairs.encode(town)
    options: dict[str, Any] = {
        "sites": "mlp_out", "direction": "noise", "positions": "last", "control": False
    }  # fmt: skip
    found = activation_patching(town, pairs, value="mean-position", **options)
    runs = [town.run(t, record="mlp_out.1") for t in (encoded.clean, encoded.contrast)]
    mean = torch.cat([r["mlp_out", 1][:, -1] for r in runs]).mean(0)
    after = town.run(encoded.clean, edits=Edit("mlp_out.1", uh.set_to(mean), Where(-1)))
    rows = torch.arange(len(pairs))
    right, wrong = encoded.answers[:, 0], encoded.wrong[:, 0]
    diff = after.last_logits[rows, right] - after.last_logits[rows, wrong]
    assert np.allclose(found["patched"].values[1], diff.detach().numpy(), atol=1e-4)
    by_blocks = activation_patching(town, pairs, value="mean-position", batch_size=1, **options)
    assert np.allclose(by_blocks["effect"], found["effect"], atol=1e-5)
    with pytest.raises(PairError, match="equal structure"):
        activation_patching(town, town_pairs(8), value="mean-position", **options)
    kept = {"metric": "kl", **options}
    mean_loss = activation_patching(town, pairs, value="mean", **kept)["effect"].values
    best = activation_patching(town, pairs, value="optimal", steps=60, rate=0.03, **kept)
    assert (best["effect"].values <= mean_loss + 1e-6).all()
    assert best["effect"].values.sum() < 0.7 * mean_loss.sum() and mean_loss.max() > 1e-3


def test_a_constant_may_be_learned_to_the_end(town: Model) -> None:
    """One prompt, the last layer's stream: the best constant is what the clean run holds."""
    found = {
        value: activation_patching(
            town, town_pairs(1), sites="resid_post", direction="noise", positions="last",
            metric="kl", value=value, steps=150, rate=0.05, control=False,
        )["effect"].values[-1]
        for value in ("mean", "optimal")
    }  # fmt: skip
    assert found["mean"] > 0.2 and 0 <= found["optimal"] < 0.03 * found["mean"]


def test_refusals(town: Model) -> None:
    pair = town_pairs(1)
    with pytest.raises(UsageError, match="denoising writes"):
        activation_patching(town, pair, value="zero")
    with pytest.raises(UsageError, match="over layers"):
        activation_patching(town, pair, sites="z.1.2")
    with pytest.raises(UsageError, match="over layers"):
        activation_patching(town, pair, sites="embed")
    with pytest.raises(UsageError, match="no vector per position"):
        activation_patching(town, pair, sites="pattern")
    with pytest.raises(UsageError, match="into one grid"):
        activation_patching(town, pair, sites=("z", "mlp_out"))
    with pytest.raises(SiteNotFound):
        activation_patching(town, pair, sites="resid_prae")
    with pytest.raises(UsageError, match="no vector per position"):
        activation_patching(town, pair, sites="expert_out")
    with pytest.raises(NotOffered):
        activation_patching(town, pair, sites="router_logits")
    with pytest.raises(OutOfRange):
        activation_patching(town, pair, draws=0)
    with pytest.raises(UsageError, match="has no units"):
        activation_patching(random_model("mamba"), random_pair(), sites="ssm_B", units="each")
    with pytest.raises(OutOfRange, match="no neuron 9999"):
        activation_patching(town, pair, sites="mlp_post", units=(9999,))
    with pytest.raises(OutOfRange, match="position 99"):
        activation_patching(town, pair, positions=(99,))
    with pytest.raises(UsageError, match="has 150,000 cells") as refused:
        cells_of([Place(Site("mlp_post", 0), tuple(range(3000)))], "each", 50)
    assert "attribution_patching" in str(refused.value)
    alike = Pairs.one(
        "When Kate and Paul went to the office, Kate lent a gift to",
        "When Kate and Paul went to the school, Kate lent a gift to",
    )
    with pytest.raises(PairError, match="says the same"):
        activation_patching(town, alike)
    with pytest.raises(PairError, match="does not tell"):
        activation_patching(town, alike.with_answers("Paul"), metric="rank")
