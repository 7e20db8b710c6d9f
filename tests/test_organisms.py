"""Organisms: the shipped weights do what their cards say, and training is reproducible."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import underhood as uh
from underhood.core.errors import FileProblem, ModelNotFound, OutOfRange, UsageError
from underhood.organisms import (
    PUNCTUATION,
    SPECIAL,
    Language,
    Phase,
    Trained,
    join,
    organism,
    organisms,
)
from underhood.organisms.card import Card
from underhood.organisms.language import Case
from underhood.organisms.trainer import CHECKPOINT, Run

TASKS = tuple(organism("town").tasks)
CARD = organism("town").folder / "card.json"
SHOWN = (
    ("When Mary and John went to the store, John gave a drink to", "Mary"),
    ("When Mary and John went to the store, Mary gave a drink to", "John"),
    ("The capital of France is", "Paris"),
    ("Monday Tuesday", "Wednesday"),
    ("The day after Monday is", "Tuesday"),
    ("three four five", "six"),
    ("The keys near the lamp", "are"),
    ("The cake in the hotel was not good and Mary felt", "sad"),
)


@pytest.fixture(scope="module")
def town() -> Language:
    found = organism("town")
    assert isinstance(found, Language)
    return found


@pytest.fixture(scope="module")
def tokenizer(town: Language) -> Any:
    return AutoTokenizer.from_pretrained(town.folder)


@pytest.fixture(scope="module")
def model(town: Language) -> Any:
    return AutoModelForCausalLM.from_pretrained(town.folder)


def small(town: Language) -> Language:
    """The same tasks, in a model and batches that train in milliseconds."""
    rows = tuple((task, 2) for task in town.tasks)
    phases = (Phase(0.4, (("induction", 4),)), Phase(1.0, rows))
    sizes = dict(town.sizes) | {
        "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    recipe = replace(town.recipe, steps=30, warmup=5)
    return replace(town, sizes=sizes, recipe=recipe, phases=phases)


# --- the shipped weights


@pytest.fixture(scope="module")
def measured(town: Language) -> dict[str, dict[str, Any]]:
    return town.evaluate(n=150, seed=7)


@pytest.mark.xdist_group("measured")
@pytest.mark.parametrize("task", TASKS)
def test_shipped_weights_know_the_task(
    town: Language, measured: dict[str, dict[str, Any]], task: str
) -> None:
    assert measured[task]["n"] == 150
    if not any(task in limit for limit in town.limits):  # which says what is not learned well
        assert measured[task]["accuracy"] >= 0.95


@pytest.mark.parametrize("task", TASKS)
def test_contrast_prompts_turn_the_answer(
    town: Language, model: Any, tokenizer: Any, task: str
) -> None:
    """On nearly all pairs the answer beats `wrong` after the clean prompt, and not so after the
    contrast. The contrast of greater_than allows both, so there the gap must only shrink."""
    turned = 0
    pairs = town.pairs(task, 100, 3)
    for pair in pairs:
        answer, wrong = tokenizer.convert_tokens_to_ids([pair.answers[0][0], pair.wrong[0][0]])
        ids = tokenizer([pair.clean[0], pair.contrast[0]], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, -1]
        clean, contrast = (logits[:, answer] - logits[:, wrong]).tolist()
        turned += clean > 0 > contrast or (
            task == "greater_than" and clean > 0 and clean > contrast
        )
    # The two years of a pair can be neighbours, which is where the model is least sharp.
    rough = any(task in limit for limit in town.limits)
    assert turned >= (0.75 if rough else 0.95) * len(pairs)


@pytest.mark.parametrize(("text", "answer"), SHOWN)
def test_documented_prompts(model: Any, tokenizer: Any, text: str, answer: str) -> None:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.unk_token_id not in ids[0].tolist()
    with torch.no_grad():
        probs = model(input_ids=ids).logits[0, -1].softmax(-1)
    assert tokenizer.convert_ids_to_tokens(int(probs.argmax())) == answer
    assert probs.max() > 0.5


def test_documented_span_of_years(model: Any, tokenizer: Any) -> None:
    text = "The war lasted from the year 17 32 to the year 17"
    later = tokenizer.convert_tokens_to_ids([f"{year}" for year in range(33, 100)])
    with torch.no_grad():
        logits = model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits
    assert logits[0, -1].softmax(-1)[later].sum() > 0.9


def test_the_village_copies_one_word_late() -> None:
    """Heads of the first block carry the last two words along; those of the second look them up."""
    village = organism("village")
    assert isinstance(village, Language)
    model = AutoModelForCausalLM.from_pretrained(village.folder, attn_implementation="eager")
    words, rng, length = village.words[len(SPECIAL) + len(PUNCTUATION) :], Random(3), 12
    texts = [join(tuple(rng.sample(words, length) * 2)) for _ in range(16)]
    ids = village.tokenizer()(texts, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model(input_ids=ids, output_attentions=True).attentions

    def best(layer: int, back: int) -> float:
        # Second copies only: query positions from length + 2 on, each `back` words back.
        at = torch.arange(length + 2, 2 * length + 1)
        return float(found[layer][:, :, at, at - back].mean((0, 2)).max())

    assert best(0, 1) > 0.6
    assert best(0, 2) > 0.6
    assert best(1, length - 2) > 0.8


def test_shipped_folder(town: Language, model: Any, tokenizer: Any) -> None:
    sizes = {path.name: path.stat().st_size for path in town.folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "card.json"} <= set(sizes)
    assert CHECKPOINT not in sizes
    assert sum(sizes.values()) <= 8 * 2**20
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.num_parameters() <= 4_000_000
    assert model.config.max_position_embeddings >= 128
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    assert len(tokenizer) == model.config.vocab_size == len(town.words)


def test_shipped_tokenizer_is_the_one_the_code_builds(town: Language, tokenizer: Any) -> None:
    assert town.tokenizer().get_vocab() == tokenizer.get_vocab()


@pytest.mark.xdist_group("measured")
def test_card_agrees_with_the_weights(
    town: Language, model: Any, measured: dict[str, dict[str, Any]]
) -> None:
    card = town.card
    assert card.name == "town" and card.limits
    assert card.parameters == model.num_parameters()
    assert set(card.tasks) == set(TASKS)
    for task, numbers in card.tasks.items():
        # Other prompts than the card's, so equal only up to sampling.
        assert abs(numbers["accuracy"] - measured[task]["accuracy"]) < 0.08


def test_evaluate_gives_the_same_numbers_again(town: Language) -> None:
    assert town.evaluate(n=10, seed=5) == town.measure(uh.load("town"), n=10, seed=5)


def test_generation_ends_the_sentence(model: Any, tokenizer: Any) -> None:
    ids = tokenizer(SHOWN[0][0], return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert text == "When Mary and John went to the store, John gave a drink to Mary."


# --- prompts and pairs


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_text_round_trips_without_unknown_words(
    town: Language, tokenizer: Any, task: str, split: Any
) -> None:
    for prompt in town.prompts(task, 80, 11, split):
        ids = tokenizer(prompt.text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt.text
        assert prompt.answer in prompt.accept
        assert 1 <= prompt.judged < len(ids)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_pairs_are_comparable(town: Language, tokenizer: Any, task: str, split: Any) -> None:
    accept = {p.text: p.accept for p in town.prompts(task, 80, 4, split)}
    pairs = town.pairs(task, 80, 4, split)
    columns = (pairs.clean, pairs.contrast, pairs.answers, pairs.wrong)
    for clean, contrast, (answer,), (wrong,) in zip(*columns, strict=True):
        ids, others = (tokenizer(text)["input_ids"] for text in (clean, contrast))
        assert len(ids) == len(others) and ids != others
        assert ids[-1] != tokenizer.eos_token_id
        for word in (str(answer), str(wrong)):
            (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
            assert token != tokenizer.unk_token_id
        assert answer != wrong
        assert wrong not in accept[clean]


@pytest.mark.parametrize("task", TASKS)
def test_no_test_prompt_begins_a_training_row(town: Language, task: str) -> None:
    prompts = town.cases(task, 200, 2)
    tests = {case.words for case in prompts} | {case.contrast for case in prompts}
    if task == "greater_than":
        # A start in 01 is common to all contrasts; still its event, verb and century are held out.
        assert any("01" in words for words in tests)
    rng = Random(0)
    for _ in range(1500):
        words = town.row(task, rng).words[1:]
        assert not any(words[:n] in tests for n in range(1, len(words)))


def test_every_fact_is_in_training(town: Language) -> None:
    trained = {case.answer for case in town.cases("capitals", 1500, split="train")}
    tested = {case.answer for case in town.cases("capitals", 150)}
    assert tested <= trained


def test_row_weights_start_at_the_judged_words(town: Language) -> None:
    rng = Random(1)
    for task in town.tasks:
        row = town.row(task, rng)
        assert len(row.words) == len(row.weights) <= town.context
        assert row.words[0] == "<bos>"
        assert row.weights[0] == town.context_weight < row.weights[-1]


def test_a_drill_is_trained_on_and_not_handed_out(town: Language, tmp_path: Path) -> None:
    drill = replace(town.kinds[0], name="drill")
    tiny = replace(small(town), drills=(drill,), phases=(Phase(1.0, (("drill", 2),)),))
    assert tiny.row("drill", Random(3)) == town.row(TASKS[0], Random(3))
    Run(tiny, out=tmp_path).advance(1)
    assert "drill" not in tiny.tasks
    with pytest.raises(UsageError, match="no task 'drill'"):
        tiny.prompts("drill")
    assert tiny.identity() != replace(tiny, drills=()).identity()


def test_a_changed_grammar_is_another_run(town: Language, tmp_path: Path) -> None:
    """The task keeps its name and weight; only what its function draws has changed."""
    tiny = small(town)
    first, *others = tiny.kinds

    def louder(*given: Any) -> Case:
        case = first.draw(*given)
        return replace(case, after=(*case.after, "."))

    Run(tiny, out=tmp_path).advance(1)
    assert Run(small(town), out=tmp_path).step == 1  # the same grammar goes on
    changed = replace(tiny, kinds=(replace(first, draw=louder), *others))
    with pytest.raises(FileProblem, match="another run"):
        Run(changed, out=tmp_path)
    drilled = replace(tiny, drills=(replace(first, name="drill"),))
    other = replace(tiny, drills=(replace(first, name="drill", draw=louder),))
    assert len({x.grammar for x in (tiny, changed, drilled, other)}) == 4


def test_a_grammar_is_known_in_every_process(town: Language) -> None:
    """Words in a set have another order in every process; grammars must not depend on it."""
    code = "from underhood.organisms import organism; print(organism('town').grammar)"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert seen == {town.grammar + "\n"}


def test_same_seed_same_prompts(town: Language) -> None:
    assert town.prompts("induction", 5, 3) == town.prompts("induction", 5, 3)
    assert town.prompts("induction", 5, 3) != town.prompts("induction", 5, 4)
    assert town.prompts("capitals", 0) == []
    assert town.pairs("capitals", 5, 3) == town.pairs("capitals", 5, 3)


# --- the registry


def test_registry_lists_files_and_imports_no_torch() -> None:
    assert "town" in organisms()
    code = (
        "import sys; from underhood.organisms import organism, organisms; organisms();"
        "organism('town').prompts('capitals', 3); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_unknown_names_are_typed_errors(town: Language, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="twon") as caught:
        organism("twon")
    assert "town" in str(caught.value)
    for machinery in ("trainer", "card", "__init__", "../town"):
        with pytest.raises(ModelNotFound):
            organism(machinery)
    with pytest.raises(ModelNotFound, match="no step"):
        uh.load("town@last")
    with pytest.raises(OutOfRange, match="step 3"):
        uh.load("town@3")
    with pytest.raises(UsageError, match="capital"):
        town.prompts("capital", 1)
    with pytest.raises(UsageError, match="which task"):
        town.pairs()
    with pytest.raises(OutOfRange):
        town.prompts("capitals", -1)
    with pytest.raises(FileProblem):
        town.evaluate(folder=tmp_path)


def test_what_is_built_lies_where_load_looks(
    town: Language, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERHOOD_HOME", str(tmp_path))
    kinds, phases = town.kinds[:2], (Phase(1.0, ((town.kinds[0].name, 2),)),)
    tiny = replace(small(town), name="hamlet", kinds=kinds, phases=phases, findings=None)
    assert tiny.folder == tmp_path / "organisms" / "hamlet"
    with pytest.raises(FileProblem, match="underhood organisms build hamlet"):
        tiny.load()
    card = tiny.build(steps=1, progress=False)
    assert tiny.card == card and tiny.load().name == "hamlet"


def test_where_only_the_card_is_carried_the_weights_are_built(
    town: Language, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERHOOD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("underhood.organisms.base._HERE", tmp_path)
    carried = tmp_path / "weights" / "town"
    carried.mkdir(parents=True)
    shutil.copy(CARD, carried)
    assert town.folder == carried and town.card.parameters > 1e6
    with pytest.raises(FileProblem, match="underhood organisms build town"):
        town.load()
    tiny = small(town)
    town.built.mkdir(parents=True)
    tiny.save(tiny.fresh(), town.built)
    assert town.folder == town.built and town.load().n_layers == 1


@pytest.mark.parametrize("name", organisms())
def test_every_organism_says_what_it_is(name: str) -> None:
    """Cards, tasks and prompts of all; their models have tests of their own."""
    what = organism(name)
    card = what.card
    assert what.name == card.name == name
    assert card.summary == what.summary and list(card.limits) == list(what.limits)
    assert set(card.tasks) == set(what.tasks)
    assert any(name in command for command in card.reproduce)
    for task, numbers in card.tasks.items():
        assert numbers["n"] > 0 and 0 <= numbers["accuracy"] <= 1, task
    names = [fact.name for fact in what.truth.facts]
    assert len(names) == len(set(names))
    if isinstance(what, Trained):
        assert card.recipe["steps"] == what.recipe.steps, "trained by the recipe of the file"
        assert (what.folder / "card.json").is_file()


@pytest.mark.parametrize("name", ["town", "village", "guild", "stream", "sight/grid"])
def test_every_word_is_one_token(name: str) -> None:
    what = organism(name)
    assert isinstance(what, Language)
    read: Any = what.tokenizer()
    ids = [read(word, add_special_tokens=False)["input_ids"] for word in what.words]
    assert ids == [[number] for number in range(len(what.words))]


@pytest.mark.parametrize("name", [name for name in organisms() if not name.startswith("wired/")])
def test_every_organism_passes_its_self_check(name: str) -> None:
    """The wired ones are checked in their own tests."""
    report = uh.load(name).check()
    assert report.ok, report


def test_the_weights_are_small() -> None:
    sizes = {p: p.stat().st_size for p in organism("town").folder.parent.rglob("*") if p.is_file()}
    assert sum(sizes.values()) <= 25 * 2**20


# --- the trainer


def test_interrupted_training_is_bit_equal(town: Language, tmp_path: Path) -> None:
    tiny = small(town)
    straight = Run(tiny, out=tmp_path / "straight")
    straight.advance()
    Run(tiny, out=tmp_path / "halves").advance(15)
    resumed = Run(tiny, out=tmp_path / "halves")
    assert resumed.step == 15
    resumed.advance()
    assert resumed.step == straight.step == 30
    assert resumed.losses == straight.losses
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_training_leaves_global_randomness_alone_and_learns(town: Language, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run = Run(small(town), out=tmp_path)
    start = {key: value.clone() for key, value in run.model.state_dict().items()}
    run.advance(3)
    assert torch.equal(before, torch.get_rng_state())
    moved = [key for key, value in run.model.state_dict().items() if not value.equal(start[key])]
    assert len(moved) == len(start)


def test_progress_goes_to_a_terminal_only(
    town: Language, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    for screen, shown in ((Screen(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", screen)
        Run(small(town), out=tmp_path / str(shown)).advance(2, progress=True)
        assert ("2/30" in screen.getvalue()) is shown


def test_training_writes_folder_and_card(town: Language, tmp_path: Path) -> None:
    run = Run(small(town), out=tmp_path)
    run.advance()
    wanted = {key: value.clone() for key, value in run.model.state_dict().items()}
    card = run.finish(prompts=10)
    assert not (tmp_path / CHECKPOINT).exists()
    assert Card.load(tmp_path) == card
    ((step, loss),) = run.losses
    assert (tmp_path / "training.csv").read_text() == f"step,loss\n{step},{loss:.4f}\n"
    assert card.recipe["steps"] == 30 and card.recipe["seed"] == 0
    assert json.loads((tmp_path / "card.json").read_text())["tasks"].keys() == set(TASKS)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for key, value in wanted.items():
        assert torch.equal(value, run.model.state_dict()[key]), "training goes on in float32"
        assert again[key].dtype == torch.float32
        assert torch.equal(value.half().float(), again[key]), key


def test_weights_of_steps_are_kept(town: Language, tmp_path: Path) -> None:
    tiny = small(town)
    tiny = replace(tiny, recipe=replace(tiny.recipe, steps=4, keep=(0, 2, 4)))
    run, seen = Run(tiny, out=tmp_path), {}
    for step in (0, 2, 4):
        run.advance(step)
        seen[step] = {key: value.clone() for key, value in run.model.state_dict().items()}
    run.finish(prompts=1)
    assert tiny.checkpoints(tmp_path) == (0, 2, 4)
    for step, state in seen.items():
        loaded = tiny.load(tmp_path, step=step).module.state_dict()
        assert all(torch.equal(value.half().float(), loaded[key]) for key, value in state.items())
    with pytest.raises(OutOfRange, match="0, 2, 4"):
        tiny.load(tmp_path, step=3)


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(
    town: Language, tmp_path: Path
) -> None:
    Run(small(town), out=tmp_path).advance(1)
    with pytest.raises(FileProblem, match="another run"):
        Run(small(town), out=tmp_path, seed=1)
    assert Run(small(town), out=tmp_path, seed=1, resume=False).step == 0
    (tmp_path / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(FileProblem, match="cannot be read"):
        Run(small(town), out=tmp_path)
    with pytest.raises(OutOfRange):
        Run(small(town), out=tmp_path, steps=0)


def test_missing_card_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match="no card"):
        Card.load(tmp_path)
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(FileProblem):
        Card.load(tmp_path)
