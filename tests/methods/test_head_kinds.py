"""Head kinds: planted patterns are found exactly; the built-in model copies by what is named."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from torch import Tensor

import underhood as uh
from underhood.core.errors import NotOffered, UsageError
from underhood.methods.read import _effective_ov as ov
from underhood.methods.read._attention import ordinary
from underhood.methods.read._repeats import draw
from underhood.methods.read.head_kinds import head_kinds
from underhood.organisms.tiny import tiny


@pytest.fixture(scope="module")
def town() -> uh.Model:
    return uh.load()


@pytest.fixture(scope="module")
def gpt2() -> uh.Model:
    return uh.load("random/gpt2")


def _planted(size: int, offset: int) -> Tensor:
    """Every query looks at the key `offset` places on; at key 0 where there is none."""
    pattern = torch.zeros(size, size)
    for query in range(size):
        pattern[query, max(query + offset, 0)] = 1
    return pattern


@pytest.mark.parametrize(
    ("kind", "offset"),
    [("previous", -1), ("duplicate", -7), ("induction", -6), ("lagged", -3), ("shifted", -5)],
)
def test_a_planted_head_is_found_alone_with_score_one(
    gpt2: uh.Model, kind: str, offset: int
) -> None:
    n = 7
    plan = uh.Plan([uh.Edit("pattern.1.2", uh.set_to(_planted(2 * n + 1, offset)))])
    result = head_kinds(gpt2, samples=4, length=n, edits=plan)
    hits = [(int(a), int(b)) for a, b in np.argwhere(result["kind"].values != "")]
    if kind in ("previous", "lagged"):
        assert hits == [(1, 2)] and str(result["kind"].values[1, 2]) == kind
        assert result[f"{kind}_control"].values.max() < 0.2
    else:
        # A fixed offset looks there without a repeat too, and the control says so.
        assert hits == []
        assert float(result[f"{kind}_control"].values[1, 2]) == pytest.approx(1.0)
    assert float(result[kind].values[1, 2]) == pytest.approx(1.0)
    second = np.sort(result[kind].values, axis=None)[-2]
    assert second < 0.5
    if kind in ("lagged", "shifted"):
        assert int(result[f"{kind}_offset"].values[1, 2]) == {"lagged": 3, "shifted": 2}[kind]


def _match(ids: Tensor, offset: int) -> Tensor:
    """Queries look `offset` past the last earlier occurrence of their token, else at key 0."""
    out = torch.zeros(*ids.shape, ids.shape[1])
    for row, line in enumerate(ids.tolist()):
        for query, token in enumerate(line):
            earlier = [k for k in range(query) if line[k] == token]
            out[row, query, earlier[-1] + offset if earlier else 0] = 1
    return out


@pytest.mark.parametrize(("kind", "offset"), [("duplicate", 0), ("induction", 1), ("shifted", 3)])
def test_a_head_that_matches_content_is_named(
    gpt2: uh.Model, monkeypatch: pytest.MonkeyPatch, kind: str, offset: int
) -> None:
    """A head whose pattern depends on the tokens passes the control that fixed offsets fail."""
    plain_run = uh.Model.run

    def run(self: uh.Model, inputs: object, **options: object) -> uh.Run:
        if isinstance(inputs, uh.Tokens):  # the sequences; tokens that stand alone pass by
            options["edits"] = [uh.Edit("pattern.2.0", uh.patch(_match(inputs.ids, offset)))]
        return plain_run(self, inputs, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(uh.Model, "run", run)
    result = head_kinds(gpt2, samples=4, length=9)
    assert [tuple(p) for p in np.argwhere(result["kind"].values != "").tolist()] == [(2, 0)]
    assert str(result["kind"].values[2, 0]) == kind
    assert float(result[kind].values[2, 0]) == pytest.approx(1.0)
    assert int(result[f"{kind}_offset"].values[2, 0]) == offset
    # BOS and 9 tokens before: the second half's queries see 11 to 19 keys.
    chance = float(np.mean([1 / k for k in range(11, 20)]))
    assert result.data.attrs["uniform_half"] == pytest.approx(chance)
    assert float(result[f"{kind}_unrepeated"].values[2, 0]) == 0.0
    assert float(result[f"{kind}_control"].values[2, 0]) == pytest.approx(chance)


def test_uniform_heads_score_uniform(gpt2: uh.Model) -> None:
    size = 15
    flat = torch.tril(torch.ones(size, size)) / torch.arange(1, size + 1)[:, None]
    plan = uh.Plan([uh.Edit("pattern", uh.set_to(flat))])
    result = head_kinds(gpt2, samples=3, length=7, edits=plan)
    np.testing.assert_allclose(result["induction"], result.data.attrs["uniform_half"], atol=1e-6)
    np.testing.assert_allclose(result["previous"], result.data.attrs["uniform_back"], atol=1e-6)
    assert (result["kind"].values == "").all()
    assert np.isnan(result["previous_z"].values).all() or np.isfinite(result["previous_z"]).all()


def test_town_copies_by_the_heads_that_are_named(town: uh.Model) -> None:
    """Induction, possibly displaced: removing it ends copying, removing as many others does not."""
    result = head_kinds(town)
    kind = result["kind"].values
    named = [(int(a), int(b)) for a, b in np.argwhere(np.isin(kind, ["induction", "shifted"]))]
    others = [(int(a), int(b)) for a, b in np.argwhere(kind == "")]
    assert named and len(others) >= len(named)
    best = max(max(result["induction"].values[p], result["shifted"].values[p]) for p in named)
    assert best > 0.6
    assert result.data.attrs["repeat_accuracy"] > 0.8
    assert result.data.attrs["control_accuracy"] < 0.1
    data = draw(town, None, samples=12, length=25, seed=7)  # other sequences than those scored
    ids = torch.tensor(data.repeated)

    def accuracy(heads: list[tuple[int, int]]) -> float:
        edits = [uh.Edit(f"z.{layer}.{head}", uh.zero()) for layer, head in heads]
        said = town.run(ids, edits=edits).logits[:, 26:-1].argmax(-1)
        return float((said == ids[:, 27:]).float().mean())

    whole = accuracy([])
    pick = random.Random(0)
    chance = [accuracy(pick.sample(others, len(named))) for _ in range(6)]
    assert whole > 0.8
    assert accuracy(named) < 0.3 * whole
    assert float(np.median(chance)) > 0.6 * whole


def test_rows_do_not_depend_on_the_batch(town: uh.Model) -> None:
    """Texts of different length, padded together, score as each alone."""
    texts = ["Mary gave the ball", "the keys near the lamp are in the store"]
    both = head_kinds(town, texts)
    alone = [head_kinds(town, [text]) for text in texts]
    for name in ("previous", "duplicate", "induction"):
        mean = (alone[0][name].values + alone[1][name].values) / 2
        np.testing.assert_allclose(both[name].values, mean, atol=1e-5)


def test_the_context_decides_the_length() -> None:
    short = uh.load(tiny("gpt2", max_position_embeddings=11).module)
    result = head_kinds(short)
    assert result.provenance["length"] == 5
    assert "context has 11" in result.provenance["note"]
    assert result.provenance["skipped"]["successor"]
    with pytest.raises(UsageError, match="too short"):
        head_kinds(uh.load(tiny("gpt2", max_position_embeddings=6).module))


def test_a_vocabulary_of_three(material: object) -> None:
    sorter = uh.load(str(material("nano-sort-gpt2")))  # type: ignore[operator]
    result = head_kinds(sorter)
    assert "recur by chance" in result.provenance["note"]
    assert np.isfinite(result["induction"].values).all()


def test_grouped_hybrid_and_missing_attention() -> None:
    assert head_kinds(uh.load("random/llama"), samples=2, length=6)["induction"].shape == (3, 4)
    hybrid = head_kinds(uh.load("random/jamba"), samples=2, length=6)
    assert hybrid["layer"].values.tolist() == [1]
    with pytest.raises(NotOffered):
        head_kinds(uh.load("random/mamba"))
    with pytest.raises(UsageError):
        head_kinds(uh.load("random/llama"), samples=1)


def test_copy_score_of_hand_made_heads() -> None:
    """W_O = W_V^T with tied embeddings copies (+1); its negative anticopies (-1)."""
    module: Any = tiny("llama", tie_word_embeddings=True, num_key_value_heads=4).module
    model = uh.load(module)
    attention = module.model.layers[1].self_attn
    with torch.no_grad():
        module.model.norm.weight.fill_(1.0)
        module.model.layers[1].input_layernorm.weight.fill_(1.0)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)
        width = attention.head_dim
        attention.o_proj.weight[:, :width] *= -1
    scores, controls = ov.copying(model, [0, 1], ordinary(model), seed=0)
    assert scores[1][1:].min() > 0.9
    assert scores[1][0] < -0.9
    assert controls[1].abs().max() < 0.6


def test_successor_score_of_a_hand_made_head() -> None:
    """A head whose OV maps each month's effective embedding to the next month's unembedding."""
    module: Any = tiny("llama", num_attention_heads=1, num_key_value_heads=1, head_dim=32).module
    model = uh.load(module)
    months = list(range(20, 32))
    [after] = ov._alone(model, months, [2], "ln1", through_mlp=True)
    target = module.lm_head.weight.detach()[months[1:] + months[:1]]
    ov_matrix = torch.linalg.lstsq(after.double(), target.double()).solution.float()
    attention = module.model.layers[2].self_attn
    with torch.no_grad():
        module.model.norm.weight.fill_(1.0)
        attention.v_proj.weight.copy_(torch.eye(32))
        attention.o_proj.weight.copy_(ov_matrix.T)
    scores, chance = ov.successor(model, [0, 2], [months])
    assert float(scores[1][0]) == 1.0
    assert float(scores[0][0]) < 0.5
    assert chance == pytest.approx(1 / 12)


def test_ordinals_of_town_are_runs_of_neighbours(town: uh.Model) -> None:
    classes = ov.ordinal_classes(town)
    assert [town.token_text(t) for t in classes["days"][0]][:2] == ["Monday", "Tuesday"]
    for run in classes["numbers"]:
        values = [int(town.token_text(t)) for t in run]
        assert values == list(range(values[0], values[0] + len(values)))


def test_random_model_has_no_kinds_and_the_result_survives_a_file(
    gpt2: uh.Model, tmp_path: object
) -> None:
    result = head_kinds(gpt2, samples=3, length=10)
    assert (result["kind"].values == "").all()
    from underhood.view import Result

    again = Result.load(str(result.save(f"{tmp_path}/kinds")))
    assert again.data.identical(result.data)
    assert "No head is of any of these kinds" in result.view.html()


def test_random_family_with_a_tokenizer_but_no_ordinals() -> None:
    result = head_kinds(random_model("llama"), samples=2, length=5)
    assert "successor" in result.provenance["skipped"]
