"""Exact ablation finds the parts that were wired in, and says honestly when it finds none."""

import pytest
import torch

from underhood.core.errors import OutOfRange, SiteNotFound, UsageError
from underhood.organisms.establish import DRAWS, Trial, choose, effect, establish, parts, site_of
from underhood.organisms.wired_models import wired


@pytest.mark.parametrize("name", ["previous_token", "induction", "gqa"])
def test_the_wired_heads_are_found_and_no_others_matter(name: str) -> None:
    organism = wired(name)
    model = organism.load()
    true = sorted({edge.split("->")[0] for edge in organism.truth.edges["zero"]} - {"input"})
    fact = establish(
        organism, model, "found", name, says="{parts} do it.", among=parts(model, "heads"), n=60
    )
    assert list(fact.parts) == true and fact.says == f"{' and '.join(true)} do it."
    assert fact.effect is not None and fact.effect > 0.7
    assert fact.control == 0.0 and "by 0.00 (at most 0.00)" in fact.how


def test_heads_that_do_the_same_are_found_together() -> None:
    """Each alone costs nothing, both all: the greedy search has to find the pair."""
    organism = wired("redundant")
    model, (task,) = organism.load(), organism.tasks
    trial = Trial(organism, model, task, 60, by="zero")
    found = choose(trial, parts(model, "heads"))
    assert len(found) > 1
    assert trial.lost(found).accuracy >= 0.5
    assert max(trial.lost([part]).accuracy for part in found) < 0.5


@pytest.mark.parametrize("by", ["mean", "zero"])
def test_an_ablation_is_the_one_done_by_hand(by: str) -> None:
    """The same accuracy and nats from a plain hook on the output projection of the module."""
    organism = wired("induction")
    model = organism.load()
    trial = Trial(organism, model, "induction", 20, by=by)  # pyright: ignore[reportArgumentType]
    found = trial.score(trial.edits(["a1.h1"]))
    module, ids = model.module, trial.tokens.ids
    projection = module.transformer.h[1].attn.c_proj
    width = projection.weight.shape[0] // 4
    mine = slice(width, 2 * width)
    seen: list[torch.Tensor] = []
    watch = projection.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        module(input_ids=ids)
    watch.remove()
    value = seen[0][:, 1:, mine].mean((0, 1)) if by == "mean" else torch.zeros(width)

    def ablate(_: object, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        changed = given[0].clone()
        changed[..., mine] = value
        return (changed,)

    hook = projection.register_forward_pre_hook(ablate)
    with torch.no_grad():
        logits = module(input_ids=ids).logits[:, -1]
    hook.remove()
    right = trial.answers[:, 0]
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == right).float().mean()))
    nats = logits.log_softmax(1).gather(1, right[:, None]).mean()
    assert found.log_prob == pytest.approx(float(nats), abs=1e-5)


def test_controls_are_other_parts_and_all_different() -> None:
    organism = wired("induction")
    model = organism.load()
    trial = Trial(organism, model, "induction", 10)
    heads = parts(model, "heads")
    assert heads == tuple(f"a{layer}.h{head}" for layer in range(2) for head in range(4))
    three = effect(trial, heads[:3], heads, name="x", says="y")
    assert "control: 10 random sets of 3 others" in three.how  # all there are: 5 choose 3
    one = effect(trial, ["m0"], [*heads, *(f"m0.n{i}" for i in range(16))], name="x", says="y")
    assert f"control: {DRAWS} random sets of 1 others" in one.how


def test_refusals() -> None:
    organism = wired("induction")
    model = organism.load()
    trial = Trial(organism, model, "induction", 10)
    heads = parts(model, "heads")
    with pytest.raises(OutOfRange, match="no control"):
        effect(trial, heads[:5], heads, name="x", says="y")
    with pytest.raises(UsageError, match="does not cost 0.5"):
        choose(trial, ("a0.h0", "a0.h1", "a1.h0", "a1.h3"))
    with pytest.raises(SiteNotFound):
        site_of("a1.e2")
    assert [str(site_of(part)) for part in ("a1", "m0", "a1.h2", "m0.n3", "m1.e3", "ssm_x.1")] == [
        "attn_out.1", "mlp_out.0", "z.1.2", "mlp_post.0.3", "expert_out.1.3", "ssm_x.1",
    ]  # fmt: skip
    assert not parts(model, "experts") and parts(model, "mixers") == ("a0", "a1")
