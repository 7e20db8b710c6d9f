"""The fronts do what `run` and edits do, under the names of TransformerLens."""

from typing import Any

import pytest
import torch
from torch import Tensor

import underhood as uh
from underhood.core.errors import EditNeverFired, NotOffered, SiteNotFound, UsageError
from underhood.core.model import Model
from underhood.core.site import Site
from underhood.fronts import REFUSED, Hook

IDS = torch.tensor([[5, 9, 2, 7, 11, 3], [4, 4, 8, 1, 6, 2]])


@pytest.fixture(scope="module")
def model() -> Model:
    return uh.load("random/gpt2")


def halve(value: Tensor, hook: Hook) -> Tensor:
    return value / 2


def test_the_cache_is_the_run(model: Model) -> None:
    logits, cache = uh.run_with_cache(model, IDS)
    bare = model.module(input_ids=IDS).logits
    assert torch.equal(logits, bare)
    plain = model.run(IDS, record=["pattern.1", "resid_post.0"])
    assert torch.equal(cache["pattern", 1], plain["pattern.1"])
    assert torch.equal(cache["blocks.1.attn.hook_pattern"], plain["pattern.1"])
    assert torch.equal(cache["blocks.0.hook_resid_post"], plain["resid_post.0"])
    assert "head_out.0" not in cache and "z.0" in cache


@pytest.mark.parametrize(
    "names",
    [
        "blocks.1.hook_resid_post",
        ["resid_post.1"],
        Site("resid_post", 1),
        lambda name: name == "resid_post.1",
    ],
)
def test_every_form_of_filter(model: Model, names: object) -> None:
    _, cache = uh.run_with_cache(model, IDS, names_filter=names)  # type: ignore[arg-type]
    assert cache.sites == [Site("resid_post", 1)]


def test_a_filter_for_other_names_is_refused(model: Model) -> None:
    with pytest.raises(SiteNotFound, match="accepts no site"):
        uh.run_with_cache(model, IDS, names_filter=lambda name: name.endswith("hook_z"))


def test_options_reach_the_run(model: Model) -> None:
    _, cache = uh.run_with_cache(model, IDS, names_filter="z.0", at=-1, dtype=torch.float64)
    assert cache["z.0"].shape[1] == 1 and cache["z.0"].dtype == torch.float64


def test_a_hook_is_an_edit(model: Model) -> None:
    hooked = uh.run_with_hooks(model, IDS, fwd_hooks=[("blocks.0.hook_mlp_out", halve)])
    edited = model.run(IDS, edits=uh.Edit("mlp_out.0", uh.scale(0.5))).logits
    assert torch.equal(hooked, edited)
    assert not torch.allclose(hooked, model.run(IDS).logits)


def test_a_hook_may_work_in_place_if_it_returns(model: Model) -> None:
    def silence(z: Tensor, hook: Hook) -> Tensor:
        z[:, :, 1] = 0
        return z

    hooked = uh.run_with_hooks(model, IDS, [("z.1", silence)])
    edited = model.run(IDS, edits=uh.Edit("z.1.1", uh.zero())).logits
    assert torch.allclose(hooked, edited, atol=1e-6)


def test_a_change_that_would_be_lost_is_refused(model: Model) -> None:
    def silence(z: Tensor, hook: Hook) -> None:
        z.zero_()

    with pytest.raises(UsageError, match="returned nothing"):
        uh.run_with_hooks(model, IDS, [("z.1", silence)])


def test_looking_changes_nothing(model: Model) -> None:
    seen: dict[str, Tensor] = {}

    def look(value: Tensor, hook: Hook) -> None:
        seen[f"{hook.name} in {hook.layer()}"] = value

    logits = uh.run_with_hooks(model, IDS, [(lambda name: name.startswith("z."), look)])
    assert torch.equal(logits, model.run(IDS).logits)
    assert list(seen) == [f"z.{n} in {n}" for n in range(model.n_layers)]
    assert torch.equal(seen["z.0 in 0"], model.run(IDS, record="z.0")["z.0"])


def test_hooks_and_edits_together(model: Model) -> None:
    both = uh.run_with_hooks(model, IDS, [("z.0", halve)], edits=uh.Edit("z.1", uh.zero()))
    plan = [uh.Edit("z.0", uh.scale(0.5)), uh.Edit("z.1", uh.zero())]
    assert torch.equal(both, model.run(IDS, edits=plan).logits)


def test_the_block_leaves_nothing(model: Model) -> None:
    before = model.module(input_ids=IDS).logits
    with uh.hooks(model, [("resid_post.0", halve)]) as fired:
        inside = model.module(input_ids=IDS).logits
    assert fired[0].places == IDS.numel() and fired[0].moved == pytest.approx(0.5)
    assert torch.equal(inside, uh.run_with_hooks(model, IDS, [("resid_post.0", halve)]))
    assert torch.equal(model.module(input_ids=IDS).logits, before)


def test_a_hook_that_is_never_called(model: Model) -> None:
    with pytest.raises(EditNeverFired), uh.hooks(model, [("resid_post.0", halve)]):
        pass


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refusals(model: Model, name: str) -> None:
    given: dict[str, Any] = {name: True}
    with pytest.raises(NotOffered, match=name):
        uh.run_with_cache(model, IDS, **given)
    with pytest.raises(NotOffered, match=name):
        uh.run_with_hooks(model, IDS, [("z.0", halve)], **given)
    with pytest.raises(NotOffered, match=name), uh.hooks(model, [("z.0", halve)], **given):
        pass


def test_misspelt_arguments(model: Model) -> None:
    with pytest.raises(UsageError, match="name_filter"):
        uh.run_with_cache(model, IDS, name_filter="z")
    with pytest.raises(UsageError, match="no layer"):
        Hook(Site("embed")).layer()
