"""Pattern and scores beside a fused kernel: as the eager model has them, and nothing switched."""

from typing import Any

import pytest
import torch
from kit import gap, inputs, model, one, padded, rows, twin
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import underhood as uh
from underhood.core.edit import Edit
from underhood.core.errors import UsageError
from underhood.core.head import norm_form
from underhood.core.model import Model
from underhood.core.tokens import Tokens

FAMILIES = (
    "gpt2",
    "llama",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "t5",
    "bert",
    "opt",
    "whisper",
)
PROMPT = rows(9)[0]


def given(family: str) -> Any:
    """A batch with left padding where the family takes it."""
    if family in ("t5", "whisper"):
        return inputs(family)
    return padded(rows(9, 5, 7), "left" if family != "bert" else "right")


def sites(m: Model, name: str) -> list[str]:
    return [str(s) for s in m.sites() if s.name.removeprefix("cross_") == name]


def real(family: str, value: torch.Tensor) -> torch.Tensor:
    """Queries that are real tokens; padding may attend to nothing or to itself."""
    batch = given(family)
    if isinstance(batch, Tokens) and value.shape[2] == batch.mask.shape[1]:
        return value.transpose(1, 2)[batch.mask]
    return value


class Calls(TorchFunctionMode):
    """Counts fused attention calls and softmaxes over keys."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.fused += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["pattern", "scores"])
def test_as_the_eager_model_has_them(family: str, name: str) -> None:
    m, eager = model(family), twin(family)
    config = m.config.to_dict()  # type: ignore[union-attr]
    asked = sites(m, name)
    assert asked
    run, plain = m.run(given(family), record=asked), eager.run(given(family), record=asked)
    for site in asked:
        a, b = real(family, run[site]), real(family, plain[site])
        if name == "scores":
            assert torch.equal(torch.isneginf(a), torch.isneginf(b)), site
            a, b = a.clamp(min=-1e4), b.clamp(min=-1e4)
        # T5 does not divide its scores: they are in the hundreds, and noise grows with them.
        noise = 5 if family == "t5" else 1
        assert gap(a, b) < noise * (1e-5 if name == "scores" else 1e-6), site
    assert m.config.to_dict() == config  # type: ignore[union-attr]
    assert torch.equal(run.logits, m.run(given(family)).logits)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "bert"])
def test_at_some_positions_only(family: str) -> None:
    """Query rows that are cut at the tap are those of the whole."""
    m, batch = model(family), given(family)
    whole = m.run(batch, record=["pattern.1"]).aligned("pattern.1")
    run = m.run(batch, record=["pattern.1"], at=[1, -1])
    assert run["pattern.1"].shape[2] == 2
    assert isinstance(batch, Tokens)
    for i, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
        mine = run["pattern.1"][i, :, :, start : start + length]
        assert gap(mine, whole[i][:, [1, length - 1], :length]) < 1e-6


def mix(h: torch.Tensor) -> torch.Tensor:
    """Another pattern with rows that sum to one."""
    return 0.5 * h + 0.5 * h.flip(1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["pattern", "scores"])
def test_an_edit_is_that_of_the_eager_model(family: str, name: str) -> None:
    m, eager = model(family), twin(family)
    prefix = f"{m.main}." if m.main else ""
    if name == "pattern":
        edit = Edit(f"{prefix}pattern.1", uh.call(mix))
    else:
        edit = Edit(f"{prefix}scores.1", uh.attend(block=1), -1)
    ours, theirs = m.run(given(family), edits=edit), eager.run(given(family), edits=edit)
    bare = m.run(given(family))
    batch = given(family)
    keep = batch.mask if isinstance(batch, Tokens) else torch.ones(ours.logits.shape[:2]).bool()
    assert gap(ours.logits[keep], theirs.logits[keep]) < 1e-5
    assert gap(ours.logits[keep], bare.logits[keep]) > 1e-4


def test_an_edited_pattern_is_what_z_is_made_of() -> None:
    m = model("llama")
    run = m.run(
        one(PROMPT), edits=Edit("pattern.1", uh.call(mix)), record=["pattern.1", "v.1", "z.1"]
    )
    bare = m.run(one(PROMPT), record=["pattern.1"])
    assert gap(run["pattern.1"], mix(bare["pattern.1"])) < 1e-6
    values = run["v.1"].transpose(1, 2).repeat_interleave(2, 1)
    assert gap((run["pattern.1"] @ values).transpose(1, 2), run["z.1"]) < 1e-5


@pytest.mark.parametrize(
    ("edits", "record", "fused"),
    [
        ([], [], 3),
        ([], ["pattern"], 3),
        ([Edit("pattern.1", uh.scale(0.5))], [], 2),
        ([Edit("scores.1", uh.attend(block=0), -1)], ["pattern.0"], 2),
        ([Edit("z.1", uh.scale(0.5))], ["q", "k", "v"], 3),
    ],
)
def test_only_an_edited_layer_leaves_the_fused_kernel(
    edits: list[Edit], record: list[str], fused: int
) -> None:
    m = model("llama")
    with Calls() as calls:
        m.run(one(PROMPT), edits=edits, record=record)
    assert calls.fused == fused


def test_what_the_mask_hid_stays_hidden() -> None:
    """An edit of scores cannot let a query see the future or padding."""
    m, batch = model("llama"), padded(rows(9, 5), "left")
    edit = Edit("scores.1", uh.set_to(3.0))
    run = m.run(batch, edits=edit, record=["pattern.1"])
    future = torch.ones(9, 9).triu(1).bool()
    assert not bool(run["pattern.1"][0][:, future].any())
    assert not bool(run["pattern.1"][1][:, 4:][:, future[4:]].any())
    assert not bool(run["pattern.1"][1][:, 4:, :4].any())
    row = run["pattern.1"][1, 0, -1]
    assert gap(row[4:], torch.full((5,), 0.2)) < 1e-6  # all equal among what is visible


def test_cached_patterns_name_absolute_keys() -> None:
    """Under a cache, also one that forgets (sliding window), key k is the token at position k."""
    for family in ("llama", "mistral", "gemma3"):
        m = model(family)
        made = m.generate(
            one(PROMPT), max_new_tokens=5, min_new_tokens=5, record=["pattern", "scores"]
        )
        full = torch.cat([one(PROMPT), made.ids[:, :-1]], 1)
        again = m.run(full, record=["pattern", "scores"])
        assert gap(made.run["pattern"], again["pattern"]) < 1e-5, family
        a, b = made.run["scores"], again["scores"]
        assert torch.equal(torch.isneginf(a), torch.isneginf(b)), family
        assert gap(a.clamp(min=-1e4), b.clamp(min=-1e4)) < 1e-4, family


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "olmo", "opt", "mamba"])
def test_scale_is_what_the_norm_divides_by(family: str) -> None:
    """`ln1_scale`: gain * centred input / scale + bias is the norm's own output."""
    m = uh.load(f"random/{family}")
    ids = torch.randint(5, 99, (2, 7))
    run = m.run(ids, record=["resid_pre", "ln1", "ln1_scale", "ln_final_scale"])
    assert run.axes("ln1_scale.0") == ("batch", "pos")
    for layer in range(m.n_layers):
        x = run["resid_pre", layer].double()
        norm = m.module.get_submodule(m.anatomy.stacks[m.main].blocks[layer].points["ln1"].path)
        form = norm_form(norm, x.shape[-1])
        scale = run["ln1_scale", layer].double()[..., None]
        made = form.linear(x, scale) + form.bias
        assert gap(made.float(), run["ln1", layer]) < 1e-5
        assert gap(x.var(-1, correction=0) if form.centred else x.pow(2).mean(-1),
                   scale[..., 0] ** 2 - form.eps) < 1e-4  # fmt: skip
    with pytest.raises(UsageError, match="can be read"):
        uh.Edit("ln1_scale.0", uh.zero())


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("t5", "whisper")])
def test_scores_from_the_same_stream_are_equal(family: str) -> None:
    """Given the same stream, a layer's scores beside a fused kernel are the eager layer's.

    Run freely the two models' streams drift apart, because their kernels round differently.
    """
    m, eager = model(family), twin(family)
    run = m.run(given(family), record=["resid_pre", "scores"])
    for layer in range(m.n_layers):
        edit = Edit(f"resid_pre.{layer}", uh.patch(run))
        other = eager.run(given(family), edits=edit, record=f"scores.{layer}")
        a, b = (real(family, r["scores", layer]).clamp(min=-1e4) for r in (run, other))
        assert gap(a, b) < 1e-6, layer
