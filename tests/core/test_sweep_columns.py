"""Only the logits that are read: the same numbers as from all of them, and less work."""

import kit
import pytest
import torch
from test_sweep import batch
from torch import Tensor, nn

import underhood as uh
from underhood.core import sweep_tail
from underhood.core.edit import Edit
from underhood.core.errors import OutOfRange, UsageError
from underhood.core.model import Model
from underhood.core.sweep import sweep
from underhood.core.sweep_tail import Tail
from underhood.data import metric_named, reindex

pytestmark = pytest.mark.usefixtures("always_share")

# A bias, a soft cap, a factor, a tied table, experts; and what is batched plainly.
FAMILIES = ("gpt2", "gptj", "gemma2", "cohere", "granite", "phi", "mixtral", "bloom", "mamba")


def first(logits: Tensor) -> Tensor:
    return logits[:, 0] - logits[:, -1].double()


def cells_of(model: Model) -> list[Edit]:
    return [Edit(f"resid_post.{i}", uh.scale(1.5), p) for i in (0, 1) for p in (1, 4)]


class Widths:
    """How wide the outputs of a head were."""

    def __init__(self, model: Model) -> None:
        self.seen: list[int] = []
        self.handle = model.module.register_forward_hook(
            lambda m, a, out: self.seen.append(out.logits.shape[-1])
        )

    def close(self) -> list[int]:
        self.handle.remove()
        return self.seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [True, False])
def test_columns_equal_those_of_all_logits(family: str, share: bool) -> None:
    model = kit.model(family)
    tokens, columns = batch(model, [6, 6]), torch.tensor([50, 3, 17])
    cells = cells_of(model)
    whole = sweep(model, tokens, cells, lambda x: first(x[:, columns]), share=share)
    widths = Widths(model)
    some = sweep(model, tokens, cells, first, share=share, columns=columns)
    seen = widths.close()
    assert whole.values.std() > 1e-4
    assert (some.values - whole.values).abs().max() < 1e-5
    assert "3 columns of the logits" in some.how
    # All logits are made for the proof, and by the bare runs against which the engine is held.
    bare = len(tokens) if "shared" in some.how else 0
    assert seen.count(3) >= some.passes - bare > 0 and seen.count(99) <= 1 + bare


def test_a_metric_by_its_columns() -> None:
    model = kit.model("gemma2")
    tokens = batch(model, [7, 7])
    metric = metric_named("logit_diff")
    answers, wrong = torch.tensor([[5, 9], [5, -1]]), torch.tensor([[40], [8]])
    columns = metric.needs_columns(answers, wrong)
    assert columns is not None

    def read(logits: Tensor, right: Tensor = answers, other: Tensor = wrong) -> Tensor:
        n = len(logits) // 2
        return metric(logits, right.repeat(n, 1), other.repeat(n, 1))

    whole = sweep(model, tokens, cells_of(model), read).values
    ids = reindex(answers, columns), reindex(wrong, columns)
    some = sweep(model, tokens, cells_of(model), lambda x: read(x, *ids), columns=columns).values
    assert (some - whole).abs().max() < 1e-5 and whole.std() > 1e-4


def test_where_the_head_is_not_plain_all_logits_are_made() -> None:
    """A head of another class, one that is listened to, edited logits, and too many columns."""
    model, columns = uh.load("random/gpt2"), torch.tensor([4, 2])
    tokens, cells = batch(model, [5]), [Edit("resid_pre.1", uh.zero(), 2)]
    expected = sweep(model, tokens, cells, lambda x: x[:, 4] - x[:, 2]).values
    head = model.module.get_submodule("lm_head")
    assert isinstance(head, nn.Linear)

    class Odd(nn.Linear):
        """Not the plain class."""

    handle = head.register_forward_hook(lambda m, a, out: None)
    listened = sweep(model, tokens, cells, first, columns=columns)
    handle.remove()
    head.__class__ = Odd
    other = sweep(model, tokens, cells, first, columns=columns)
    head.__class__ = nn.Linear
    for found in (listened, other):
        assert "all logits, 2 columns" in found.how
        assert (found.values - expected).abs().max() < 1e-5
    cell = Edit("logits", uh.scale(2.0), -1)
    edited = sweep(model, tokens, [cell], first, columns=columns)
    bare = model.run(tokens).last_logits
    assert "all logits" in edited.how
    assert (edited.values[0] - 2 * (bare[:, 4] - bare[:, 2])).abs().max() < 1e-5
    order = torch.randperm(99, generator=torch.Generator().manual_seed(0))
    every = sweep(model, tokens, cells, lambda x: x[:, 7].double(), columns=order)
    alone = sweep(model, tokens, cells, lambda x: x[:, order[7]].double())
    assert torch.equal(every.values, alone.values) and "all logits" in every.how


def test_a_model_that_mixes_its_logits_is_noticed() -> None:
    """Whatever stands behind the head, the proof before the sweep sees it."""
    model, columns = uh.load("random/llama"), torch.tensor([4, 2])
    plain = type(model.module).forward

    def mixed(self: nn.Module, *args: object, **kwargs: object) -> object:
        out = plain(self, *args, **kwargs)
        out.logits = out.logits.log_softmax(-1)
        return out

    kind = type("Mixed", (type(model.module),), {"forward": mixed})
    model.module.__class__ = kind
    sweep_tail._PROVEN.pop(model.module, None)
    assert not Tail(model, columns).narrow
    found = sweep(model, batch(model, [5]), cells_of(model), lambda x: x[:, 0], columns=columns)
    direct = model.run(batch(model, [5]), edits=cells_of(model)[0]).last_logits
    assert (found.values[0] - direct[:, 4]).abs().max() < 1e-5


def test_columns_that_cannot_be() -> None:
    model = kit.model("gpt2")
    tokens, cells = batch(model, [5]), cells_of(model)
    for columns in (torch.tensor([[1]]), torch.tensor([], dtype=torch.long), torch.tensor([True])):
        with kit.untyped(), pytest.raises(UsageError, match="list of token ids"):
            sweep(model, tokens, cells, first, columns=columns)
    for column in (-1, 99):
        with pytest.raises(OutOfRange, match="not a token"):
            sweep(model, tokens, cells, first, columns=torch.tensor([3, column]))
