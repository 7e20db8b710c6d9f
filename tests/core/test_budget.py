"""Strength by effect, against the distance computed anew from bare logits."""

import pytest
import torch

import underhood as uh
from underhood.core.errors import OutOfRange, UnderhoodError

PROMPTS = ["The capital of France is", "Monday Tuesday"]


@pytest.fixture(scope="module")
def model() -> uh.Model:
    return uh.load("village")


def direction(model: uh.Model) -> uh.Edit:
    assert model.d_model is not None
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    return uh.Edit("resid_post.2", uh.add(vector))


def edits(model: uh.Model) -> list[uh.Edit]:
    return [
        direction(model),
        uh.Edit("resid_post.1", uh.scale(0.0)),
        uh.Edit("mlp_out.3", uh.zero(), -1),
    ]


def moved(model: uh.Model, edit: uh.Edit, strength: float, prompts: list[str]) -> float:
    """Mean KL of the next token, prompt by prompt, by torch's own function."""
    strong = uh.Edit(edit.site, edit.op, edit.where, strength=strength)
    found = []
    for prompt in prompts:
        with torch.no_grad():
            bare = model.module(input_ids=model.tokens(prompt).ids).logits[0, -1]
        edited = model.run(prompt, edits=strong).logits[0, -1]
        found.append(
            torch.nn.functional.kl_div(
                edited.log_softmax(-1), bare.log_softmax(-1), log_target=True, reduction="sum"
            )
        )
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("kl", [0.01, 0.3, -0.3, 2.0])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_distance_is_what_was_asked(model: uh.Model, kl: float, number: int) -> None:
    edit = edits(model)[number]
    for prompts in (PROMPTS[:1], PROMPTS):
        try:
            found = model.strength(edit, prompts, kl=kl)
        except OutOfRange:
            assert moved(model, edit, 256.0 if kl > 0 else -256.0, prompts) < abs(kl)
            continue
        assert found * kl > 0
        assert moved(model, edit, found, prompts) == pytest.approx(abs(kl), rel=0.03)


def test_none_is_none_and_too_much_is_refused(model: uh.Model) -> None:
    edit = direction(model)
    assert model.strength(edit, PROMPTS, kl=0.0) == 0
    with pytest.raises(OutOfRange, match="no strength moves"):
        model.strength(edit, PROMPTS, kl=1e4)
    with pytest.raises(OutOfRange, match="number of nats"):
        model.strength(edit, PROMPTS, kl=float("nan"))


def test_an_edit_that_waits_for_generated_tokens_has_no_strength_here(model: uh.Model) -> None:
    edit = uh.Edit("resid_post.2", uh.zero(), uh.Where(phase="generated"))
    with pytest.raises(UnderhoodError):
        model.strength(edit, PROMPTS[0], kl=0.5)
