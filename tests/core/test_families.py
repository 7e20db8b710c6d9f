"""The matrix: every law of the self-check in every family, and the page that publishes it."""

from functools import cache
from pathlib import Path

import kit
import pytest
import torch

from underhood import coverage
from underhood.core.check import LAWS
from underhood.core.errors import SelfCheckFailed
from underhood.core.model import Model
from underhood.organisms.tiny import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
WRITTEN = PAGE.read_text(encoding="utf-8")
REPORT = cache(coverage.family_report)


@pytest.mark.families
@pytest.mark.parametrize("family", FAMILIES)
def test_every_law_holds_as_the_page_says(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = REPORT(family)
    assert [row.name for row in found.rows] == list(LAWS)
    assert found.ok, f"\n{found}"
    for row in found.rows:
        if row.status == "not offered":
            assert row.reason, row.name  # never without saying why
    monkeypatch.setattr(coverage, "family_report", REPORT)
    assert coverage.row(family) in WRITTEN.splitlines(), "run `python -m underhood.coverage`"


def test_the_page_has_every_family_and_no_other() -> None:
    rows = [line for line in WRITTEN.splitlines() if line.startswith("| ")][1:]
    assert [line.split()[1] for line in rows] == list(FAMILIES)
    assert coverage.table(rows) == WRITTEN, "run `python -m underhood.coverage`"


def test_the_check_can_fail() -> None:
    """A model whose heads are counted wrongly is found out, and `need` says by which law."""
    model = kit.model("llama")
    broken = Model(model.module, name="broken")
    stack = broken.anatomy.stacks[""]
    block = stack.blocks[1]
    block.points["mlp_out"], kept = block.points["attn_out"], block.points["mlp_out"]
    try:
        found = broken.check()
    finally:
        block.points["mlp_out"] = kept
    assert not found.ok
    with pytest.raises(SelfCheckFailed, match="self-check") as caught:
        found.need()
    assert "sub-layers add up" in str(caught.value)


def test_the_check_changes_nothing() -> None:
    model = kit.model("gpt2")
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    model.check()
    after = model.module.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
