"""Path patching against frozen hooks written by hand, and against a mechanism that is known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from torch import Tensor, nn

import underhood as uh
from underhood.core.errors import NotOffered, OutOfRange, UsageError
from underhood.core.model import Model
from underhood.data import Pairs
from underhood.methods.locate import _paths as inside
from underhood.methods.locate.activation_patching import activation_patching
from underhood.methods.locate.path_patching import path_patching
from underhood.organisms import organism
from underhood.view import View

CLEAN, CONTRAST = "w20 w31 w12 w40 w55 w9", "w20 w31 w18 w40 w56 w9"
ZERO = {("embed", "q"), ("embed", "mlp_in")}
Key = tuple[str, int]
Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def town() -> Model:
    return uh.load("village")


def random_pair() -> Pairs:
    return Pairs.one(CLEAN, CONTRAST, "w30", "w33")


# The oracle: torch hooks on the Hugging Face modules, and nothing of underhood -------------------


class Plain:
    """A model whose parts can be kept and changed: z, q, k, v, mlp (output), mlp_in, embed."""

    def __init__(self, model: Model) -> None:
        self.net: Any = model.module
        self.gpt = hasattr(self.net, "transformer")
        self.blocks = self.net.transformer.h if self.gpt else self.net.model.layers
        config = self.net.config
        self.heads = config.num_attention_heads
        self.groups = self.heads // (getattr(config, "num_key_value_heads", None) or self.heads)

    def module(self, kind: str, layer: int) -> tuple[nn.Module, str]:
        if kind == "embed":
            return (self.net.transformer.wte if self.gpt else self.net.model.embed_tokens), "out"
        block = self.blocks[layer]
        if kind in ("mlp", "mlp_in"):
            return block.mlp, "in" if kind == "mlp_in" else "out"
        attention = block.attn if self.gpt else block.self_attn
        if kind == "z":
            names = ("c_proj", "o_proj", "dense")
            return next(getattr(attention, n) for n in names if hasattr(attention, n)), "in"
        return (attention.c_attn if self.gpt else getattr(attention, f"{kind}_proj")), "out"

    def part(self, kind: str, value: Tensor, head: int | None) -> Tensor:
        """The place of a head in what a module gives, as a view."""
        if self.gpt and kind in ("q", "k", "v"):
            value = value.chunk(3, -1)["qkv".index(kind)]
        if head is None:
            return value
        count = self.heads // self.groups if kind in ("k", "v") else self.heads
        return value.unflatten(-1, (count, -1))[:, :, head]

    def run(self, ids: Tensor, changes: dict[Key, Change], keep: set[Key]) -> dict[Any, Tensor]:
        kept: dict[Any, Tensor] = {}
        handles = []
        for key in {*changes, *keep}:
            module, side = self.module(*key)

            def touch(value: Tensor, key: Key = key) -> Tensor:
                value = changes[key](value.clone()) if key in changes else value
                kept[key] = value.clone()
                return value

            def before(_m: nn.Module, args: Any, touch: Change = touch) -> Any:
                return (touch(args[0]), *args[1:])

            def after(_m: nn.Module, _args: Any, out: Tensor, touch: Change = touch) -> Any:
                return touch(out)

            if side == "in":
                hook = module.register_forward_pre_hook(before)
            else:
                hook = module.register_forward_hook(after)
            handles.append(hook)
        try:
            with torch.no_grad():
                kept["logits"] = self.net(input_ids=ids).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        return kept


def brute(
    model: Model, sender: tuple[str, int, int | None], receiver: Any, paths: str, *, pos: Any = None
) -> float:
    """The effect of one path, by the three runs of Wang et al."""
    plain = Plain(model)
    encoded = random_pair().encode(model)
    layers = range(len(plain.blocks))
    frozen = {("z", i) for i in layers} | ({("mlp", i) for i in layers} - {("", 0)})
    kind, layer, head = sender
    source = (kind, layer)
    clean = plain.run(encoded.clean.ids, {}, frozen | {source})
    other = plain.run(encoded.contrast.ids, {}, frozen | {source})
    changes: dict[Key, Change] = {}
    for key in frozen:
        if paths == "all" or (paths == "mlps" and key[0] == "mlp"):
            continue
        changes[key] = lambda _v, key=key: clean[key].clone()
    spot = slice(None) if pos is None else pos

    def exchange(value: Tensor) -> Tensor:
        value = changed_before(value)
        plain.part(kind, value, head)[:, spot] = plain.part(kind, other[source], head)[:, spot]
        return value

    changed_before = changes.get(source, lambda v: v)
    inputs = set() if receiver == "logits" else {(receiver[0], receiver[1])}
    first = plain.run(encoded.clean.ids, {**changes, source: exchange}, inputs)
    if receiver == "logits":
        final = first["logits"]
    else:
        name, place, unit = receiver

        def write(value: Tensor) -> Tensor:
            plain.part(name, value, unit)[:] = plain.part(name, first[name, place], unit)
            return value

        final = plain.run(encoded.clean.ids, {(name, place): write}, set())["logits"]
    right, wrong = int(encoded.answers[0, 0]), int(encoded.wrong[0, 0])
    start, end, now = (
        float(x[right] - x[wrong]) for x in (clean["logits"], other["logits"], final)
    )
    return (start - now) / (start - end)


def all_senders(model: Model) -> list[tuple[str, tuple[str, int, int | None]]]:
    found: list[tuple[str, tuple[str, int, int | None]]] = [("input", ("embed", 0, None))]
    for layer in range(model.n_layers):
        found += [(f"a{layer}.h{h}", ("z", layer, h)) for h in range(model.n_heads)]
        found.append((f"m{layer}", ("mlp", layer, None)))
    return found


@pytest.mark.parametrize("paths", ["direct", "mlps", "all"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("receiver", ["logits", "q.2.1", "k.2.1", "v.2.0", "mlp_in.1"])
def test_it_equals_frozen_hooks_written_by_hand(family: str, receiver: str, paths: Any) -> None:
    model = random_model(family)
    name, *numbers = receiver.split(".")
    theirs = receiver if name == "logits" else (name, *map(int, numbers), *[None])[:3]
    found = path_patching(model, random_pair(), receivers=receiver, paths=paths, control=False)
    for sender, key in all_senders(model):
        expected = brute(model, key, theirs, paths)
        assert abs(float(found["effect"].sel(node=sender)) - expected) < 1e-4, sender
    assert float(np.abs(found["effect"]).max()) > 1e-3


@pytest.mark.parametrize("family", ["phi", "gemma2", "mixtral", "qwen3", "cohere"])
@pytest.mark.parametrize("receiver", ["logits", "v.1.1", "mlp_in.2"])
def test_other_blocks(family: str, receiver: str) -> None:
    """Parallel blocks, norms behind the parts, experts, normalised queries."""
    model = random_model(family)
    name, *numbers = receiver.split(".")
    theirs = receiver if name == "logits" else (name, *map(int, numbers), *[None])[:3]
    found = path_patching(model, random_pair(), receivers=receiver, control=False)
    for sender, key in all_senders(model)[:-1:2]:
        expected = brute(model, key, theirs, "direct")
        assert abs(float(found["effect"].sel(node=sender)) - expected) < 1e-4, sender


def test_each_position() -> None:
    model = random_model("llama")
    found = path_patching(
        model, random_pair(), receivers="v.1", senders=("z.0", "embed"), positions="each",
        control=False,
    )  # fmt: skip
    assert found["effect"].dims == ("node", "pos")
    assert found["skipped"].values[:, :2].all() and not found["effect"].values[:, :2].any()
    for pos in (2, 3, 5):
        for sender, key in (("a0.h2", ("z", 0, 2)), ("input", ("embed", 0, None))):
            expected = brute(model, key, ("v", 1, None), "direct", pos=pos)
            assert abs(float(found["effect"].sel(node=sender, pos=pos)) - expected) < 1e-4
    # The last token's values are seen by the last token alone: where it is the only receiver
    # position, the sender's earlier positions bring it nothing by direct paths.
    last = path_patching(
        model, random_pair(), receivers="v.1", senders="z.0", positions="each", receiver_pos=-1,
        control=False,
    )  # fmt: skip
    assert not last["effect"].values[:, :-1].any() and last["skipped"].values[:, :-1].all()
    assert np.abs(last["effect"].values[:, -1]).max() > 1e-5


# What must hold exactly --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_what_comes_after_the_receiver_is_zero(family: str) -> None:
    model = random_model(family)
    found = path_patching(model, random_pair(), receivers="mlp_in.1")
    upstream = found["upstream"].values
    after = found["effect"].values[~upstream], found["control"].values[~upstream]
    assert not np.any(after) and found["skipped"].values[~upstream].all()
    assert found["effect"].values[upstream].any()
    names = set(found["node"].values[upstream])
    # A parallel block's MLP does not read the heads beside it.
    assert ("a1.h0" in names) == (family == "gpt2")
    assert "m1" not in names and "m0" in names
    with pytest.raises(UsageError, match="no path"):
        path_patching(model, random_pair(), receivers="q.1.0", senders=("z.1", "mlp_out.2"))


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_all_paths_from_the_input_are_the_whole_effect(family: str, direction: Any) -> None:
    model = random_model(family)
    options: dict[str, Any] = {"paths": "all", "direction": direction, "control": False}
    found = path_patching(model, random_pair(), senders=("embed", "z.2", "mlp_out.1"), **options)
    assert abs(float(found["effect"].sel(node="input")) - 1) < 1e-5
    heads = activation_patching(
        model, random_pair(), sites="z", positions="all", direction=direction, control=False
    )
    assert np.allclose(found["effect"].values[2:], heads["effect"].values[2], atol=1e-5)


def test_the_direct_effects_on_the_logits_add_up_when_the_norm_is_held(town: Model) -> None:
    """Linear arrival is direct attribution: parts add up, and equal a product with the head."""
    pair = town_pairs("indirect_object", 1)
    line = path_patching(town, pair, arrival="linear", control=False)
    encoded = pair.encode(town)
    stream = f"resid_post.{town.n_layers - 1}"
    clean, other = (
        town.run(t, record=stream)[stream][0, -1] for t in (encoded.clean, encoded.contrast)
    )
    head: Any = town.module
    unembed = head.lm_head.weight.detach()
    right, wrong = int(encoded.answers[0, 0]), int(encoded.wrong[0, 0])
    scale = (clean.pow(2).mean() + head.config.rms_norm_eps).sqrt()
    moved = (clean - other) / scale * head.model.norm.weight.detach()
    expected = float(moved @ (unembed[right] - unembed[wrong]))
    assert abs(float(line["raw"].sum()) - expected) < 1e-3 * abs(expected)
    exact = path_patching(town, pair, control=False)
    assert np.abs(exact["effect"].values - line["effect"].values).max() < 0.15
    assert exact["effect"].values.argmax() == line["effect"].values.argmax()


@pytest.mark.parametrize("name", ["q", "v", "mlp_in"])
@pytest.mark.parametrize("sender", [("z", 0, 2), ("mlp", 1, None), ("embed", 0, None)])
def test_the_closed_form_is_one_product(name: str, sender: tuple[str, int, int | None]) -> None:
    """What arrives is the sender's write, over the clean stream's length, through the weights."""
    model = random_model("llama")
    net: Any = model.module
    plain, encoded = Plain(model), random_pair().encode(model)
    kind, layer, head = sender
    block, eps = net.model.layers[2], net.config.rms_norm_eps
    norm = block.input_layernorm if name != "mlp_in" else block.post_attention_layernorm
    streams: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _m, args: streams.append(args[0]))
    keys = {(kind, layer)}
    clean, other = (plain.run(t.ids, {}, keys) for t in (encoded.clean, encoded.contrast))
    handle.remove()
    delta = plain.part(kind, other[kind, layer] - clean[kind, layer], head)
    if head is not None:
        weight = net.model.layers[layer].self_attn.o_proj.weight
        delta = delta @ weight.unflatten(1, (plain.heads, -1))[:, head].T
    scale = (streams[0].pow(2).mean(-1, keepdim=True) + eps).sqrt()
    moved = (delta / scale * norm.weight).detach()

    def write(value: Tensor) -> Tensor:
        if name == "mlp_in":
            return value + moved
        return value + moved @ getattr(block.self_attn, f"{name}_proj").weight.T

    logits = [clean["logits"], other["logits"]]
    logits.append(plain.run(encoded.clean.ids, {(name, 2): write}, set())["logits"])
    right, wrong = int(encoded.answers[0, 0]), int(encoded.wrong[0, 0])
    start, end, now = (float(x[right] - x[wrong]) for x in logits)
    options: dict[str, Any] = {"receivers": f"{name}.2", "control": False}
    found = path_patching(model, random_pair(), arrival="linear", **options)
    node = {"z": f"a{layer}.h{head}", "mlp": f"m{layer}", "embed": "input"}[kind]
    mine = float(found["effect"].sel(node=node))
    assert abs(mine - (start - now) / (start - end)) < 1e-4
    exact = path_patching(model, random_pair(), **options)
    # The norm's share; but the input's change does not reach the last token of the last layer.
    assert abs(float(exact["effect"].sel(node=node)) - mine) > 1e-5 or (kind, name) in ZERO


def test_the_batch_size_does_not_matter(town: Model) -> None:
    pairs = town_pairs("indirect_object", 4)[[0, 2, 3]]
    assert len(set(pairs.encode(town).clean.lengths)) > 1
    options: dict[str, Any] = {"receivers": ("q.2", "v.2"), "senders": ("z.1", "embed"), "draws": 1}
    whole = path_patching(town, pairs, **options)
    assert np.abs(whole["effect"]).max() > 0.01 and np.abs(whole["control"]).max() > 1e-4
    for size in (1, 2):
        part = path_patching(town, pairs, batch_size=size, **options)
        for name in ("effect", "sem", "raw", "control", "patched"):
            assert np.allclose(part[name], whole[name], atol=3e-5, equal_nan=True), name
    for row, pair in enumerate(pairs):
        alone = path_patching(town, pair, control=False, **options)
        assert np.allclose(
            whole["patched"].values[:, row], alone["patched"].values[:, 0], atol=1e-4
        )


@pytest.mark.usefixtures("always_share")
def test_sharing_does_not_matter(town: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = town_pairs("indirect_object", 1)
    options: dict[str, Any] = {"receivers": "k.2", "senders": "z.1", "control": False}
    shared = path_patching(town, pair, **options)
    original = inside.sweep
    monkeypatch.setattr(inside, "sweep", lambda *a, **k: original(*a, **k, share=False))
    plain = path_patching(town, pair, **options)
    assert "shared prefix" in shared.provenance["how"] and "plain" in plain.provenance["how"]
    assert np.abs(shared["effect"].values - plain["effect"].values).max() < 1e-5


def test_the_control_changes_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = inside._Block._random

    def watched(self: Any, draw: int) -> Any:
        seen.append((self, original(self, draw)))
        return seen[-1][1]

    monkeypatch.setattr(inside._Block, "_random", watched)
    path_patching(random_model("llama"), random_pair(), draws=2)
    assert len(seen) == 2
    for block, random in seen:
        for site, value in random.items():
            before = block.base.aligned(site)
            moved, meant = ((x - before).norm(dim=-1) for x in (value, block.source[site]))
            assert torch.allclose(moved, meant, rtol=1e-3, atol=1e-5)
            assert not torch.allclose(value, block.source[site], atol=1e-3)


# Known answers -----------------------------------------------------------------------------------


def town_pairs(task: str, n: int, seed: int = 0) -> Pairs:
    return organism("village").pairs(task, n, seed)


def test_the_two_paths_of_induction(town: Model) -> None:
    """In the village, a block-1 head looks at the word after the one to be copied.

    It finds it by what a head looking two words back wrote there (its keys), and reads what a head
    looking one word back wrote there (its values). The attention patterns name those two heads.
    """
    drawn = organism("village").pairs("induction", 40)
    at = next(i for i, text in enumerate(drawn.clean) if 8 <= len(text.split()) <= 14)
    copied, clean = drawn[at], drawn.clean[at]
    pattern = town.run(clean, record="pattern.0")["pattern.0"][0]
    back = [
        int(np.argmax([float(head.diagonal(-k)[2:].mean()) for head in pattern])) for k in (1, 2)
    ]
    options: dict[str, Any] = {"senders": ("embed", "z.0", "mlp_out.0"), "receiver_pos": None}
    values = path_patching(town, copied, receivers="v.1", **options)
    assert str(values["effect"].idxmax().item()) == f"a0.h{back[0]}"
    won = values["effect"].sel(node=f"a0.h{back[0]}")
    assert float(won) > 0.2
    assert float(won) > 5 * np.sort(values["effect"].values)[-2]
    assert float(won) > 3 * float(abs(values["control"].sel(node=won["node"])))
    # The other contrast: the word before the copied one is another, so nothing is found.
    words = clean.split()
    words[words.index(words[-1])] = "Wednesday"
    found = Pairs(clean, " ".join(words), copied.answers[0][0], copied.wrong[0][0])
    keys = path_patching(town, found, receivers="k.1", **options)
    assert str(keys["effect"].idxmax().item()) == f"a0.h{back[1]}"
    assert float(keys["effect"].max()) > 5 * np.sort(keys["effect"].values)[-2]
    assert back[0] != back[1]


def test_scores(town: Model) -> None:
    pair = town_pairs("capitals", 1)
    found = path_patching(town, pair, metric="prob", score="relative", receivers="v.3")
    start = found["clean"].values[0]
    lost = start - found["patched"].values[:, 0]
    assert np.allclose(found["raw"].values, lost, atol=1e-9)
    assert np.allclose(found["relative"].values, lost / start, atol=1e-9)
    assert np.allclose(found["effect"], lost / (start - found["contrast"].values[0]), atol=1e-9)
    assert "relative" not in path_patching(town, pair, receivers="v.3", control=False).data
    back = path_patching(town, pair, receivers="v.3", direction="denoise", control=False)
    gained = back["patched"].values[:, 0] - back["contrast"].values[0]
    assert np.allclose(back["raw"].values, gained, atol=1e-9)


# What comes back ---------------------------------------------------------------------------------


def test_result_and_view(town: Model, tmp_path: Any) -> None:
    pair = town_pairs("capitals", 1)
    found = path_patching(town, pair, receivers="v.3", draws=3, seed=1)
    assert found.view.kind == "grid" and found.view.control is not None
    assert "come after every receiver" in found.view.about
    assert View.from_json(found.view.to_json()) == found.view
    loaded = type(found).load(found.save(tmp_path / "paths.json"))
    assert loaded.data.equals(found.data)
    again = path_patching(town, pair, receivers="v.3", draws=3, seed=1)
    assert (found["control"] == again["control"]).all()
    other = path_patching(town, pair, receivers="v.3", draws=3, seed=2)
    assert not np.allclose(found["control"], other["control"])
    each = path_patching(town, pair, receivers="v.3", senders="z.2", positions="each")
    assert each.view.kind == "grid" and each["effect"].dims == ("node", "pos")
    assert path_patching(town, pair, senders=("mlp_out", "embed")).view.kind == "bars"


def test_refusals(town: Model) -> None:
    pair = town_pairs("capitals", 1)
    for bad in ("resid_pre.1", "z.1.1", "logits.3"):
        with pytest.raises(UsageError, match="does not receive"):
            path_patching(town, pair, receivers=bad)
    with pytest.raises(UsageError, match="does not send"):
        path_patching(town, pair, senders="attn_out.1")
    with pytest.raises(UsageError, match="stand alone"):
        path_patching(town, pair, receivers=("logits", "q.1.1"))
    with pytest.raises(UsageError, match="straight line"):
        path_patching(town, pair, arrival="linear", paths="all")
    with pytest.raises(UsageError, match="probability"):
        path_patching(town, pair, score="relative")
    with pytest.raises(OutOfRange, match="no position"):
        path_patching(town, pair, receivers="q.1", receiver_pos=99)
    with pytest.raises(OutOfRange):
        path_patching(town, pair, receivers="q.9")
    with pytest.raises(OutOfRange):
        path_patching(town, pair, draws=0)
    with pytest.raises(NotOffered, match="a norm stands"):
        path_patching(random_model("gemma2"), random_pair(), arrival="linear", receivers="q.2")
    with pytest.raises(NotOffered):
        path_patching(random_model("bert"), random_pair(), arrival="linear", receivers="q.2")
    with pytest.raises(NotOffered):
        path_patching(random_model("falcon"), random_pair(), receivers="q.2")
