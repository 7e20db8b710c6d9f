"""Models that others trained and recorded: the independent truth for sites and generation."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kit import gap
from safetensors.torch import load_file
from torch import Tensor

import underhood as uh
from underhood.core.edit import Plan
from underhood.core.model import Model

Folder = Callable[[str], Path]
TOLERANCE = 1e-5

# The publisher's name -> our site, for tensors that have the site's own shape.
SAME = {
    "tok_emb": "embed", "pos_emb": "pos_embed", "x": "resid_pre.0", "ln1": "ln1.0",
    "yProj": "attn_out.0", "attnResid": "resid_mid.0", "ln2": "ln2.0", "fc": "mlp_pre.0",
    "gelu": "mlp_post.0", "mlp": "mlp_out.0", "mlpResid": "resid_post.0", "block0": "resid_post.0",
    "block1": "resid_post.1", "block2": "resid_post.2", "ln_f": "ln_final", "lm_head": "logits",
    "attSm": "pattern.0",
}  # fmt: skip
HEADS_FIRST = {"q": "q.0", "k": "k.0", "v": "v.0"}


@pytest.fixture(scope="module")
def sorter(material: Folder) -> tuple[Model, dict[str, Tensor]]:
    """The sorter and what its publisher recorded."""
    folder = material("nano-sort-gpt2")
    return uh.load(folder), load_file(folder / "recorded_activations.safetensors")


@pytest.fixture(scope="module")
def recorded(sorter: tuple[Model, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every site that we compare, recorded in one run through SDPA."""
    model, truth = sorter
    sites = [*SAME.values(), *HEADS_FIRST.values(), "scores.0", "z.0"]
    run = model.run(truth["idx"].long(), record=list(dict.fromkeys(sites)))
    return {site: run[site] for site in sites}


Both = tuple[Model, dict[str, Tensor]]


@pytest.mark.parametrize(("theirs", "site"), [*SAME.items()])
def test_recorded_sites(sorter: Both, recorded: dict[str, Tensor], theirs: str, site: str) -> None:
    truth, ours = sorter[1][theirs], recorded[site]
    assert gap(ours, truth.expand_as(ours)) < TOLERANCE


@pytest.mark.parametrize(("theirs", "site"), [*HEADS_FIRST.items()])
def test_recorded_heads(sorter: Both, recorded: dict[str, Tensor], theirs: str, site: str) -> None:
    assert gap(recorded[site], sorter[1][theirs].transpose(1, 2)) < TOLERANCE


def test_recorded_qkv(sorter: Both, recorded: dict[str, Tensor]) -> None:
    """Their fused projection is our q, k and v side by side."""
    parts = [recorded[site].flatten(2) for site in HEADS_FIRST.values()]
    assert gap(torch.cat(parts, -1), sorter[1]["qkv"]) < TOLERANCE


def test_recorded_z(sorter: Both, recorded: dict[str, Tensor]) -> None:
    assert gap(recorded["z.0"].flatten(2), sorter[1]["y"]) < TOLERANCE


def test_recorded_scores(sorter: Both, recorded: dict[str, Tensor]) -> None:
    """Visible scores agree; what they clamped to -1e30 is -inf here."""
    truth, ours = sorter[1]["att"], recorded["scores.0"]
    hidden = truth <= -1e29
    assert torch.equal(hidden, torch.isneginf(ours))
    assert gap(ours[~hidden], truth[~hidden]) < TOLERANCE


def test_recorded_probabilities(sorter: Both, recorded: dict[str, Tensor]) -> None:
    assert gap(recorded["logits"].softmax(-1), sorter[1]["probs"]) < TOLERANCE


def test_every_recorded_tensor_was_compared(sorter: Both) -> None:
    assert len(sorter[1]) == 25
    others = {"idx", "qkv", "y", "att", "probs"}
    assert set(sorter[1]) == set(SAME) | set(HEADS_FIRST) | others


def test_it_still_sorts(sorter: Both) -> None:
    """The sorter, generating through `generate`: what went in comes out in order."""
    prompts = torch.tensor([[2, 1, 0, 1, 2, 0], [0, 2, 2, 1, 0, 1]])
    made = sorter[0].generate(prompts, max_new_tokens=5, record=["resid_post"])
    assert sorter[0].generate(prompts[:1], max_new_tokens=6).ids.tolist() == [[0, 0, 1, 1, 2, 2]]
    assert made.ids.tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2]]
    assert made.run["resid_post"].shape == (3, 2, 10, 48)


@pytest.fixture(scope="module")
def stories(material: Folder) -> tuple[Model, list[int], str]:
    """The story writer, its published ids and text."""
    folder = material("stories260k-llama")
    told = json.loads((folder / "expected_greedy.json").read_text(encoding="utf-8"))
    return uh.load(folder), told["greedy_ids"], told["greedy_text"]


def test_the_whole_story(stories: tuple[Model, list[int], str]) -> None:
    model, ids, text = stories
    made = model.generate(torch.tensor([[1]]), max_new_tokens=len(ids) - 1)
    assert made.ids[0].tolist() == ids[1:]
    assert made.text[0].strip() == text.strip()


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("how", ["bare", "empty plan", "every site", "identity edits"])
def test_its_beginning(stories: tuple[Model, list[int], str], how: str, cached: bool) -> None:
    """Whatever is watched or written back, the story is the published one."""
    model, ids, _ = stories
    count = 24 if how == "every site" else 60
    asked: dict[str, object] = {}
    if how == "empty plan":
        asked = {"edits": Plan()}
    if how == "every site":
        asked = {"record": model.sites()}
    if how == "identity edits":
        names = ("resid_post", "q", "k", "v", "pattern", "z", "head_out", "mlp_post")
        asked = {"edits": [uh.Edit(name, uh.scale(1.0)) for name in names]}
    made = model.generate(
        torch.tensor([[1]]),
        max_new_tokens=count,
        use_cache=cached,
        **asked,  # type: ignore[arg-type]
    )
    assert made.ids[0].tolist() == ids[1 : count + 1]
    if how == "every site":
        assert made.run["resid_post"].shape == (5, 1, count, 64)
        assert made.run["pattern", 2].shape == (1, 8, count, count)


def test_what_is_recorded_is_what_one_pass_over_the_story_has(
    stories: tuple[Model, list[int], str],
) -> None:
    model, ids, _ = stories
    sites = [s for s in model.sites() if s.layer in (None, 0, 3)]
    made = model.generate(torch.tensor([[1]]), max_new_tokens=20, record=sites)
    whole = model.run(torch.tensor([ids[:20]]), record=sites)
    for site in sites:
        a, b = made.run[site], whole[site]
        same = torch.isneginf(a) == torch.isneginf(b)
        assert bool(same.all()), site
        assert gap(a.clamp(min=-1e4), b.clamp(min=-1e4)) < 5e-5, site
