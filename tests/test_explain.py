"""The main job, end to end on the built-in model."""

import html
import json
import re
from pathlib import Path

import pytest

import underhood as uh
from underhood.core.errors import AnswerError, NotOffered, PairError, UsageError
from underhood.explanation.change import change
from underhood.explanation.explain import Explanation
from underhood.explanation.question import ask
from underhood.explanation.sentences import percent
from underhood.view import View
from underhood.view.upgrade import script

PROMPT = "When Mary and John went to the store, John gave a drink to"
CONTRAST = "When Mary and John went to the store, Mary gave a drink to"


@pytest.fixture(scope="module")
def model() -> uh.Model:
    return uh.load()


@pytest.fixture(scope="module")
def found(model: uh.Model) -> Explanation:
    return uh.explain(model, PROMPT, CONTRAST)


def test_sentences_are_true(model: uh.Model, found: Explanation) -> None:
    """The numbers in the first sentences, computed here from bare forwards."""
    probabilities = model.run(PROMPT).last_logits[0].softmax(-1)
    assert model.token_text(int(probabilities.argmax())) == "Mary"
    assert percent(float(probabilities.max())) in found.sentences[0]
    said, other = model.token_id("Mary"), model.token_id("John")
    for text in (PROMPT, CONTRAST):
        logits = model.run(text).last_logits[0]
        assert f"{float(logits[said] - logits[other]):+.2f}".replace("-", "−") in found.sentences[1]


def test_parts_sum_and_the_sum_is_told(found: Explanation) -> None:
    data = found.results["writers"].data
    assert float(data["total"]) == pytest.approx(float(data["logit_diff"]), abs=1e-3)
    assert f"{float(data['total']):+.2f}" in " ".join(found.sentences)


def test_the_change_beats_its_control(model: uh.Model, found: Explanation) -> None:
    """Changing the important heads moves the answer further than changing random ones."""
    assert found.change is not None
    moved = abs(found.question.clean - found.change.after)
    assert moved > 2 * abs(found.question.clean - found.change.random_mean)
    nothing = change(model, found.question, [], seed=0)
    assert nothing.after == pytest.approx(found.question.clean, abs=1e-4)


def test_the_circuit_comes_with_its_proof(model: uh.Model, found: Explanation) -> None:
    """The headline's share is what a run with all other edges cut keeps, computed here."""
    data = found.results["circuit"].data
    wiring = uh.circuits.Wiring(model)
    names = data["name"].values[data["in_circuit"].values]
    keep = wiring.graph.mask([str(n) for n in names]).float()
    contrast = wiring.writes(model.tokens(CONTRAST))
    logits = wiring.logits(model.tokens(PROMPT), contrast, keep)[0]
    gap = float(logits[model.token_id("Mary")] - logits[model.token_id("John")])
    question = found.question
    kept = (gap - question.contrast) / (question.clean - question.contrast)
    assert float(data["f"]) == pytest.approx(kept, abs=1e-4)
    assert kept >= 0.9 > 0.5 > float(data["f_same_size"].max())
    told = next(s for s in found.sentences if "connections" in s)
    assert f"keep {round(100 * kept)} % of that difference" in told
    section = next(s for s in found.sections if s.id == "circuit")
    assert section.answer == told and not section.folded
    text = "".join(v.html() for v in section.views)
    assert "random ranking" in text and "completeness" in text


def test_report_is_one_offline_page(found: Explanation, tmp_path: Path) -> None:
    path = found.save(tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in html.unescape(text)
    assert text.count(script()) == 1
    assert "<script src" not in text
    assert not re.search(r'(?:src|href)="(?!#|data:)', text.replace(script(), ""))
    assert [s.number for s in found.sections] == [1, 2, 3, 4, 5, 6, 7, 8]
    # The picture and the proof are open; the rest tells its answer and is folded.
    assert [s.id for s in found.sections if not s.folded] == ["forms", "circuit"]
    assert all(s.answer for s in found.sections if s.id != "next")
    assert path.stat().st_size < 1_500_000


def test_document_is_json(found: Explanation, tmp_path: Path) -> None:
    document = json.loads(found.save(tmp_path / "report.json").read_text(encoding="utf-8"))
    assert document["schema"] == "explanation/1"
    assert document["answer"] == "Mary"
    assert len(document["sections"]) == 8
    with pytest.raises(UsageError, match=r"\.html or \.json"):
        found.save(tmp_path / "report.pdf")


def test_notebook_shows_the_report(found: Explanation) -> None:
    text = found._repr_html_()
    assert text.count("<style>") == 1
    for section in found.sections:
        assert html.escape(section.title) in text and html.escape(section.answer) in text
    assert View.from_json(found.view.to_json()) == found.view


def test_without_a_contrast_says_so(model: uh.Model) -> None:
    found = uh.explain(model, "The capital of France is")
    assert found.question.searched
    assert found.question.answer == "Paris"
    assert any("found by search" in s for s in found.sentences)
    before, after = (model.tokens(t).ids for t in (found.question.prompt, found.question.other))
    assert int((before != after).sum()) == 1


def test_unknown_words_are_refused(model: uh.Model) -> None:
    with pytest.raises(UsageError, match="'Zanzibarian'"):
        uh.explain(model, "The capital of Zanzibarian is")


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mamba", "mixtral", "cohere"])
def test_other_families(family: str) -> None:
    """Every part works, or says why it is not offered; the built-in tokenizer serves as text."""
    town = uh.load()
    words = len(town.tokenizer)
    module = uh.load(f"random/{family}", vocab_size=words).module
    model = uh.load(module, town.tokenizer)
    found = uh.explain(model, PROMPT, CONTRAST)
    assert len(found.sections) == 8
    assert found.sentences
    assert len(found.html()) > 10_000


def test_refusals(model: uh.Model) -> None:
    with pytest.raises(PairError):
        ask(
            model,
            PROMPT,
            "When Mary went to the store, John gave a drink to",
            answer=None,
            wrong=None,
        )
    with pytest.raises(AnswerError):
        ask(model, PROMPT, CONTRAST, answer="Mary John", wrong=None)
    with pytest.raises(NotOffered, match="cannot be asked"):
        ask(uh.load("random/vit"), PROMPT, CONTRAST, answer=None, wrong=None)
