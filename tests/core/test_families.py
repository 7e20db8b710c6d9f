"""The matrix: every law of the self-check in every family, and the page that publishes it."""

import difflib
from pathlib import Path

import kit
import pytest
import torch

from underhood import coverage
from underhood.core.check import LAWS, CheckReport
from underhood.core.errors import SelfCheckFailed
from underhood.core.model import Model
from underhood.organisms.tiny import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
pytestmark = pytest.mark.xdist_group("families")  # one worker: the reports are made once
MAKE = coverage.family_report
REPORTS: dict[str, tuple[Model, CheckReport]] = {}


def report(family: str) -> tuple[Model, CheckReport]:
    """A family's report, made once in this session."""
    if family not in REPORTS:
        REPORTS[family] = MAKE(family)
    return REPORTS[family]


@pytest.mark.families
@pytest.mark.parametrize("family", FAMILIES)
def test_every_law_holds(family: str) -> None:
    _, found = report(family)
    assert [row.name for row in found.rows] == list(LAWS)
    assert found.ok, f"\n{found}"
    for row in found.rows:
        if row.status == "not offered":
            assert row.reason, row.name  # never without saying why


@pytest.mark.families
def test_the_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "family_report", report)
    made, written = coverage.table(), PAGE.read_text(encoding="utf-8")
    changes = difflib.unified_diff(written.splitlines(), made.splitlines(), lineterm="", n=0)
    assert made == written, "run `python -m underhood.coverage`\n" + "\n".join(changes)


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
