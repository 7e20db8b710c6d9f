"""Fine-tuned organisms: what they start from, what moves, what is kept on disk."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import underhood as uh
from underhood.core.errors import FileProblem
from underhood.organisms import Language, Phase, organism
from underhood.organisms.trainer import Run
from underhood.organisms.tuned import ADAPTER, Tuned, differences


@pytest.fixture(scope="module")
def town() -> Language:
    found = organism("town")
    assert isinstance(found, Language)
    return found


def tuned(town: Language, rank: int) -> Tuned:
    """A town that trains two steps more."""
    values: dict[str, Any] = {field.name: getattr(town, field.name) for field in fields(town)}
    values |= {"name": "hamlet", "start": "town", "rank": rank, "findings": differences}
    values["recipe"] = replace(town.recipe, steps=2, warmup=0, lr=1e-2)
    values["phases"] = (Phase(1.0, (("capitals", 2), ("mood", 2))),)
    return Tuned(**values)


def test_a_low_rank_one_moves_little_and_keeps_less(town: Language, tmp_path: Path) -> None:
    what = tuned(town, rank=2)
    run = Run(what, out=tmp_path)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.advance()
    moved = [n for n, v in run.model.state_dict().items() if not torch.equal(v, before[n])]
    assert moved and all(name.endswith((".up", ".down")) for name in moved)
    card = run.finish(prompts=2)
    assert card.architecture["was"] == "town" and card.architecture["rank"] == 2
    assert (tmp_path / ADAPTER).stat().st_size < 0.1 * sum(
        path.stat().st_size for path in town.folder.glob("*.safetensors")
    )
    model, plain = what.load(tmp_path), uh.load("town")
    assert model.name == "hamlet" and model.check().ok
    old, new = plain.module.state_dict(), model.module.state_dict()
    assert list(old) == list(new), "loaded, it is a plain model"
    changed = {name: new[name] - old[name] for name in old if not torch.equal(old[name], new[name])}
    assert changed and all("model.layers" in name for name in changed)
    for name, change in changed.items():
        assert torch.linalg.matrix_rank(change.double(), rtol=1e-3) <= 2, name
    text = "The capital of France is"
    ids = run.organism.load(tmp_path).tokens(text).ids
    with torch.no_grad():
        trained = run.model(input_ids=ids).logits
    torch.testing.assert_close(model.run(text).logits, trained, atol=0.02, rtol=0.02)


def test_a_whole_one_starts_from_its_origin(town: Language, tmp_path: Path) -> None:
    what = tuned(town, rank=0)
    state, old = what.fresh().state_dict(), uh.load("town").module.state_dict()
    assert all(torch.equal(state[name], old[name]) for name in old)
    assert what.identity() != town.identity() != tuned(town, rank=1).identity()
    for rank in (0, 1):
        with pytest.raises(FileProblem, match="build hamlet"):
            tuned(town, rank).load(tmp_path)


def test_differences_name_what_the_origin_does_not_know(town: Language) -> None:
    what = tuned(town, rank=0)
    assert differences(what, uh.load("town")) == ()
    more = replace(what, kinds=(*what.kinds, replace(what.kinds[2], name="again")))
    (fact,) = differences(more, uh.load("town"))
    assert fact.name == fact.task == "again"
    assert fact.effect is not None and fact.control is not None
    assert abs(fact.effect - fact.control) < 0.05, "the same model on the same task"
