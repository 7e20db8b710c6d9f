"""Information flow against explicit 4-D masks given to the modules, and planted answers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from torch import Tensor

import underhood as uh
from underhood.core.edit import Edit
from underhood.core.errors import NotOffered, OutOfRange, PairError, UsageError
from underhood.core.model import Model
from underhood.core.ops import attend
from underhood.core.tokens import Where
from underhood.data import Pairs
from underhood.methods.locate import _flow_search, _flow_windows
from underhood.methods.locate._flow import Look, margin
from underhood.methods.locate.information_flow import information_flow
from underhood.organisms.town_words import CAPITALS
from underhood.view import View

FAMILIES = ["gpt2", "llama"]


@pytest.fixture(scope="module")
def town() -> Model:
    return uh.load("village")


def own_pairs(model: Model, *, others: tuple[str, str] = ("w21", "w20")) -> Pairs:
    """All of 2 x 2 prompts of one template; the answers are what the model says."""
    firsts, seconds = ("w20", "w21"), ("w40", "w41")
    clean = [f"w9 {a} w12 {b} w13" for a in firsts for b in seconds]
    contrast = [f"w9 {a} w12 {b} w13" for a in others for b in seconds]
    tops = model.run(clean).last_logits.topk(2).indices.tolist()
    return Pairs(clean, contrast, [t[0] for t in tops], [t[1] for t in tops])


def random_pair() -> Pairs:
    return Pairs.one(
        "w20 w31 w12 w40 w55 w9", "w20 w31 w18 w40 w56 w9", "w30", "w33",
    )  # fmt: skip


# The oracle: 4-D masks and hidden states given to the Hugging Face modules ----------------------


def blocks_of(model: Model) -> Any:
    net: Any = model.module
    return net.transformer.h if hasattr(net, "transformer") else net.model.layers


def plain(
    model: Model,
    ids: Tensor,
    masks: dict[int, Tensor],
    states: tuple[int, Tensor] | None = None,
) -> Tensor:
    """Last logits, with masks [query, key] by layer, and a stream written before a layer."""
    blocks, handles = blocks_of(model), []
    causal = torch.tril(torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool))
    for layer, mask in masks.items():
        low = torch.finfo(torch.float32).min
        four = torch.where(mask & causal, 0.0, low)[None, None].expand(len(ids), 1, -1, -1)
        attention = (
            blocks[layer].attn if hasattr(blocks[layer], "attn") else blocks[layer].self_attn
        )

        def masked(_m: Any, args: Any, kwargs: Any, four: Tensor = four) -> Any:
            return args, kwargs | {"attention_mask": four}

        handles.append(attention.register_forward_pre_hook(masked, with_kwargs=True))
    if states is not None and states[0] < len(blocks):
        handles.append(
            blocks[states[0]].register_forward_pre_hook(
                lambda _m, args: (states[1].to(args[0].dtype), *args[1:])
            )
        )
    try:
        with torch.no_grad():
            return model.module(input_ids=ids).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()


def streams_of(model: Model, ids: Tensor) -> list[Tensor]:
    """The hidden state before each layer."""
    kept: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda _m, args: kept.append(args[0].clone()))
        for block in blocks_of(model)
    ]
    with torch.no_grad():
        model.module(input_ids=ids)
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize(("family", "width"), [("gpt2", 2), ("llama", 1)])
def test_windows_equal_explicit_masks(family: str, width: int) -> None:
    model = random_model(family)
    pair = random_pair()
    found = information_flow(model, pair, width=width, targets="each", draws=2)
    encoded = pair.encode(model)
    right, wrong = int(encoded.answers[0, 0]), int(encoded.wrong[0, 0])

    def diff(ids: Tensor, masks: dict[int, Tensor]) -> float:
        logits = plain(model, ids, masks)[0]
        return float(logits[right] - logits[wrong])

    clean, contrast = diff(encoded.clean.ids, {}), diff(encoded.contrast.ids, {})
    size, strongest = encoded.clean.ids.shape[1], 0.0
    for start in range(model.n_layers - width + 1):
        for target in range(1, size):
            for key in range(size):
                mask = torch.ones(size, size, dtype=torch.bool)
                mask[target, key] = key == target
                now = diff(encoded.clean.ids, {start + i: mask for i in range(width)})
                expected = (clean - now) / (clean - contrast)
                mine = float(found["effect"].sel(layer=start, query=target, key=str(key)))
                assert abs(mine - expected) < 1e-4
                assert mine == 0 if key >= target else True
                strongest = max(strongest, abs(expected))
    assert strongest > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_equal_explicit_masks(family: str) -> None:
    model = random_model(family)
    pairs = own_pairs(model, others=("w55", "w56"))
    found = information_flow(model, pairs, groups=("1,3", "0-2"), control=False)
    encoded = pairs.encode(model)
    whole = plain(model, encoded.clean.ids, {})
    rows = torch.arange(4)
    for layer in range(model.n_layers):
        for name, spots in (("1,3", [1, 3]), ("0-2", [0, 1, 2])):
            mask = torch.ones(5, 5, dtype=torch.bool)
            mask[4, spots] = False
            logits = plain(model, encoded.clean.ids, {layer: mask})
            now = logits[rows, encoded.answers[:, 0]] - logits[rows, encoded.wrong[:, 0]]
            mine = found["blocked"].sel(layer=layer, query=4, key=name).values
            assert np.abs(mine - now.numpy()).max() < 1e-4
            lost = whole[rows, encoded.answers[:, 0]] - whole[rows, encoded.wrong[:, 0]] - now
            raw = float(found["raw"].sel(layer=layer, query=4, key=name))
            assert abs(raw - float(lost.mean())) < 1e-4
    assert "control" not in found.data


@pytest.mark.parametrize("see", [None, [1]])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_subgraph_equals_explicit_masks_and_means(
    family: str, see: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def every(self: Any, _waits: Tensor, table: Tensor) -> tuple[None, None]:
        for wait in range(self.model.n_layers):
            counts = range(self.model.n_layers - wait + 1)
            table[wait, : len(counts)] = self.transfers(wait, self.asked.see, counts)
        return None, None

    monkeypatch.setattr(_flow_search.Search, "_found", every)
    model = random_model(family)
    pairs = own_pairs(model)
    encoded = pairs.encode(model)
    found = information_flow(
        model, pairs, question="subgraph", draw="prompts", control=False,
        groups=() if see is None else ("1",),
    )  # fmt: skip
    ids = encoded.clean.ids  # all four prompts of the template; the contrasts are the same four
    streams = streams_of(model, ids)
    alone = torch.eye(5, dtype=torch.bool)
    alone[:, 0] = True  # the first token is the same everywhere
    transfer = alone.clone()
    transfer[4, : 5 if see is None else 0] = True
    transfer[4, see or []] = True
    checked = 0
    for wait in range(model.n_layers):
        same = ids[:, None] == ids[None]  # [row, other, pos]
        mean = (same[..., None] * streams[wait][None]).sum(1) / same.sum(1)[..., None]
        logits = plain(model, ids, {}, (wait, mean))
        mine = found["wait_margin"].sel(layer=wait).values
        assert np.abs(mine - margin(logits, encoded.answers, None).numpy()).max() < 1e-4
        for count in range(model.n_layers - wait + 1):
            mine = found["transfer_margin"].sel(layer=wait, step=count).values
            masks = {
                n: transfer if n < wait + count else alone for n in range(wait, model.n_layers)
            }
            logits = plain(model, ids, masks, (wait, mean) if wait else None)
            assert np.abs(mine - margin(logits, encoded.answers, None).numpy()).max() < 1e-4
            checked += 1
    assert checked == sum(range(2, model.n_layers + 2))
    assert int(found["wait"]) == -1 and "No wait" in str(found.view.to_json())


# What must hold exactly --------------------------------------------------------------------------


def test_no_wait_and_open_masks_are_the_model(town: Model) -> None:
    found = information_flow(town, capitals(6), question="subgraph", samples=5, draws=1)
    assert np.abs(found["wait_margin"].sel(layer=0).values - found["margin"].values).max() < 1e-4
    open_ = torch.ones(6, 6, dtype=torch.bool)
    tokens = town.tokens(list(capitals(2).clean))
    edits = [Edit(f"scores.{n}", Look(open_)) for n in range(town.n_layers)]
    whole, looked = town.run(tokens).logits, town.run(tokens, edits=edits).logits
    assert float((whole - looked).abs().max()) < 1e-4


def test_look_is_attend(town: Model) -> None:
    """On prompts of different length, padded on either side."""
    prompts = ["The capital of France is", "The capital city of Norway is"]
    visible = torch.ones(7, 7, dtype=torch.bool)
    visible[4, [1, 2]] = False
    for padding in ("left", "right"):
        tokens = town.tokens(prompts, padding=padding)
        look = town.run(tokens, edits=Edit("scores.1", Look(visible))).last_logits
        told = Edit("scores.1", attend(block=(1, 2)), Where(4))
        assert float((look - town.run(tokens, edits=told).last_logits).abs().max()) < 1e-5
        assert float((look - town.run(tokens).last_logits).abs().max()) > 1e-3


def test_the_batch_size_does_not_matter(town: Model) -> None:
    pairs = capitals(3)
    options: dict[str, Any] = {"question": "subgraph", "samples": 4, "draws": 1}
    whole = information_flow(town, pairs, **options)
    for size in (1, 2):
        part = information_flow(town, pairs, batch_size=size, **options)
        for name in whole.data.data_vars:
            same = np.allclose(part[str(name)], whole[str(name)], atol=1e-4, equal_nan=True)
            assert same, name
    cut = information_flow(town, pairs, draws=1)
    part = information_flow(town, pairs, draws=1, batch_size=2)
    for name in ("effect", "sem", "control", "blocked"):
        assert np.allclose(part[name], cut[name], atol=2e-5, equal_nan=True), name
    for row, pair in enumerate(pairs):
        alone = information_flow(town, pair, control=False)
        mine = cut["blocked"].values[..., row]
        assert np.allclose(mine, alone["blocked"].values[..., 0], atol=1e-4)


@pytest.mark.usefixtures("always_share")
def test_sharing_does_not_matter(town: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Callable[[], Any], list[str]]] = [
        (lambda: information_flow(town, capitals(2), draws=1), ["effect", "control"]),
        (
            lambda: information_flow(
                town, capitals(3), question="subgraph", samples=4, draws=1, against="wrong"
            ),
            ["wait_margin", "transfer_margin"],
        ),
    ]
    shared = [call() for call, _ in calls]
    for module in (_flow_windows, _flow_search):
        original = module.sweep
        monkeypatch.setattr(module, "sweep", lambda *a, f=original, **k: f(*a, **k, share=False))
    for (call, names), first in zip(calls, shared, strict=True):
        again = call()
        assert "shared prefix" in first.provenance["how"] and "plain" in again.provenance["how"]
        for name in names:
            assert np.allclose(first[name], again[name], atol=1e-4, equal_nan=True), name


# Known answers -----------------------------------------------------------------------------------


def capitals(n: int) -> Pairs:
    chosen = CAPITALS[:n] if n > 1 else CAPITALS[:2]
    return Pairs(
        [f"The capital of {country} is" for country, _ in chosen],
        [f"The capital of {country} is" for country, _ in (*chosen[1:], chosen[0])],
        [city for _, city in chosen],
        [city for _, city in (*chosen[1:], chosen[0])],
    )


@pytest.mark.parametrize(("family", "planted"), [("gpt2", 1), ("llama", 0), ("llama", 2)])
def test_the_search_finds_the_one_layer_that_attends(family: str, planted: int) -> None:
    """A model whose attention is dead but in one layer: tokens wait until there, one transfers."""
    model = random_model(family)
    with torch.no_grad():
        for layer, block in enumerate(blocks_of(model)):
            out = block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj
            out.weight.mul_(30.0 if layer == planted else 0.0)
            if getattr(out, "bias", None) is not None:
                out.bias.zero_()
    words = [f"w{i}" for i in range(20, 90)]
    prompts = [f"w9 {word} w12 w13" for word in words]
    first: dict[int, str] = {}  # one prompt for each thing that the model says
    for prompt, said in zip(
        prompts, model.run(prompts).last_logits.argmax(-1).tolist(), strict=True
    ):
        first.setdefault(said, prompt)
    answers, clean = list(first)[:6], list(first.values())[:6]
    assert len(clean) > 2
    pairs = Pairs(clean, [*clean[1:], clean[0]], answers, [*answers[1:], answers[0]])
    found = information_flow(model, pairs, question="subgraph", samples=6, draws=2)
    assert (int(found["wait"]), int(found["transfer"])) == (planted, 1)
    assert float(found["accuracy"]) == 1 and float(found["without"]) < 0.7
    assert (found["wait_accuracy"].values[: planted + 1] == 1).all()
    assert (found["wait_accuracy"].values[planted + 1 :] <= 1 / len(clean)).all()
    # What the last token need not see may be hidden, which shifts its attention to the rest.
    seen = information_flow(
        model, pairs, question="subgraph", samples=6, groups=("1",), keep=0.3, draws=1
    )
    if (family, planted) == ("llama", 0):
        assert (int(seen["wait"]), int(seen["transfer"])) == (planted, 1)
        assert float(seen["other_tokens"]) < float(seen["accuracy"])
    cut = information_flow(model, pairs, control=False)["effect"].sel(query=3)
    dead = [n for n in range(model.n_layers) if n != planted]
    assert np.abs(cut.values[dead]).max() < 1e-5
    assert abs(float(cut.sel(layer=planted, key="1"))) > 0.2


def test_the_country_reaches_the_last_token_in_the_first_layer(town: Model) -> None:
    pairs = capitals(8)
    found = information_flow(town, pairs)
    effect, control = found["effect"].sel(query=5), found["control"].sel(query=5)
    layer, key = divmod(int(effect.values.argmax()), effect.sizes["key"])
    assert layer == 0 and found["key"].values[key] in ("3", "4")
    assert float(effect.sel(layer=0, key="4")) > 0.3
    assert np.abs(effect.values[1:]).max() < 0.1
    # Other tokens by chance: of, or those that carry nothing.
    assert float(control.sel(layer=0, key="4")) < float(effect.sel(layer=0, key="4"))
    graph = information_flow(town, pairs, question="subgraph", samples=10)
    assert (int(graph["wait"]), int(graph["transfer"])) == (0, 1)
    assert float(graph["accuracy"]) >= 0.9 and float(graph["full_accuracy"]) == 1
    assert float(graph["without"]) < 0.2 and float(graph["elsewhere"]) < 0.9
    # As far moved in random directions, nothing is lost: it is the country that waiting hides.
    assert graph["wait_accuracy"].values[1] < 0.2 < 0.8 < graph["wait_noise"].values[1]


# What comes back ---------------------------------------------------------------------------------


def test_results_and_views(town: Model, tmp_path: Any) -> None:
    pairs = capitals(4)
    cut = information_flow(town, pairs, width=2, draws=1)
    assert cut.view.kind == "grid" and cut.view.control is not None
    assert cut["last"].values.tolist() == [1, 2, 3]
    each = information_flow(town, pairs, targets="each", control=False)
    assert each.view.kind == "group" and each["effect"].sizes["query"] == 5
    graph = information_flow(town, pairs, question="subgraph", samples=4)
    assert graph.view.kind == "group"
    for found in (cut, each, graph):
        assert View.from_json(found.view.to_json()) == found.view
    loaded = type(graph).load(graph.save(tmp_path / "flow.json"))
    assert loaded.data.equals(graph.data)
    named = Pairs(
        list(pairs.clean), list(pairs.contrast), list(pairs.answers), list(pairs.wrong),
        word_positions={"country": 4},
    )  # fmt: skip
    words = information_flow(town, named, groups=("country",), control=False)
    assert words["key"].values.tolist() == ["country"]
    same = float(each["effect"].sel(layer=0, query=5, key="4"))
    assert abs(float(words["effect"][0, 0, 0]) - same) < 1e-5
    again = information_flow(town, pairs, width=2, draws=1)
    assert np.array_equal(cut["control"], again["control"], equal_nan=True)


def test_refusals(town: Model) -> None:
    pairs = capitals(3)
    with pytest.raises(UsageError, match="no group of tokens"):
        information_flow(town, pairs, groups=("countri",))
    with pytest.raises(OutOfRange, match="names position 9"):
        information_flow(town, pairs, groups=("9",))
    with pytest.raises(UsageError, match="no other prompt"):
        two = Pairs.one("The capital of France is", "The capital of Norway is", "Paris", "Oslo")
        information_flow(town, two, question="subgraph", draw="prompts")
    with pytest.raises(PairError, match="one template"):
        clean = ["The capital of France is", "The capital city of France is"]
        other = ["The capital of Norway is", "The capital city of Norway is"]
        information_flow(town, Pairs(clean, other, ["Paris"] * 2, ["Oslo"] * 2))
    with pytest.raises(PairError, match="right in none"):
        wrong = Pairs.one("The capital of France is", "The capital of Norway is", "Oslo", "Paris")
        information_flow(town, wrong, question="subgraph")
    with pytest.raises(PairError, match="no wrong answers"):
        bare = Pairs("The capital of France is", "The capital of Norway is", "Paris")
        information_flow(town, bare, question="subgraph", against="wrong", metric="logit")
    with pytest.raises(OutOfRange, match="as many layers"):
        information_flow(town, pairs, width=9)
    with pytest.raises(OutOfRange, match="share to keep"):
        information_flow(town, pairs, keep=0.0)
    with pytest.raises(NotOffered):
        information_flow(random_model("mamba"), random_pair())
