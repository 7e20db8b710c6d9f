"""Subspaces against swaps written by hand, and the diagnostic against a planted illusion.

The wired model: one GPT-2 block whose MLP has five neurons that matter. Its last token is of kind
"a" or "b", and neuron by neuron:

    honest        tells the kinds apart and writes to the answer
    disconnected  tells them apart and writes nothing
    dormant       is the same for all, and writes to the answer

`honest` is the direction that the model uses. `(disconnected + dormant) / sqrt 2` is the illusion
of Makelov et al. 2023: swapped, it changes the answer, by reading from a neuron that nothing reads
and writing through a neuron that never moves.
"""

from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import underhood as uh
from underhood.core.edit import Edit, Plan
from underhood.core.errors import (
    NotFinite,
    NotOffered,
    OutOfRange,
    PairError,
    SelfCheckFailed,
    ShapeMismatch,
    SiteNotFound,
    UsageError,
)
from underhood.core.model import Model
from underhood.core.site import Site
from underhood.core.tokens import Where
from underhood.data import Pairs
from underhood.methods.locate._das import Training, learn
from underhood.methods.locate._illusion import arms, split, verdict
from underhood.methods.locate._interchange import Interchange, spots
from underhood.methods.locate._readout import Readout, readout_of
from underhood.methods.locate._subspace_asked import divide
from underhood.methods.locate.subspace import illusion_report, subspace, subspace_edit
from underhood.organisms import organism
from underhood.view import Result, View

HONEST, DISCONNECTED, DORMANT = range(3)
KINDS = {"a": ("a0", "a1", "a2", "a3"), "b": ("b0", "b1", "b2", "b3")}
WORDS = ("yes", "no", "one", "two", "three", *KINDS["a"], *KINDS["b"])


@pytest.fixture(scope="module")
def town() -> Model:
    return uh.load("village")


def town_pairs(task: str, n: int, *, split: Any = "test") -> Pairs:
    return organism("village").pairs(task, n, 0, split=split)


def _wire(net: Any) -> None:
    """Set every weight by hand; the stream's axes: kind, minus kind, the answer
    (2, 3), noise and minus noise, the dormant neuron's way to the answer (6, 7)."""
    for parameter in net.parameters():
        parameter.zero_()
    block, vectors = net.transformer.h[0], net.transformer.wte.weight
    for norm in (block.ln_1, block.ln_2, net.transformer.ln_f):
        norm.weight.fill_(1.0)
    for i, word in enumerate(WORDS):
        kind = {"a": 1.0, "b": -1.0}.get(word[0], 0.0) * (word[1:] in "0123")
        noise = 0.15 * i
        vectors[i, :2] = torch.tensor([kind, -kind])
        vectors[i, 4:6] = torch.tensor([noise, -noise])
    mlp = block.mlp
    for neuron in (HONEST, DISCONNECTED):  # c_fc is [in, out]; large inputs keep the GELU linear
        mlp.c_fc.weight[0, neuron] = 2.0
        mlp.c_fc.bias[neuron] = 10.0
    mlp.c_fc.weight[4, 3] = 2.0  # a neuron of noise, read, but not by the answer
    mlp.c_fc.bias[DORMANT] = mlp.c_fc.bias[3] = 10.0
    # Each has its own way to the answer: with one way only, what it reads would be one direction.
    # The swap of the illusion moves the dormant neuron half as far as the other: twice the weight.
    for neuron, at, strength in ((HONEST, 2, 1.0), (DORMANT, 6, 2.0), (3, 4, 0.2)):
        mlp.c_proj.weight[neuron, at], mlp.c_proj.weight[neuron, at + 1] = strength, -strength
        mlp.c_proj.bias[at] -= 10.0 * strength
        mlp.c_proj.bias[at + 1] += 10.0 * strength
    for answer, ways in ((0, (2, 6)), (1, (3, 7))):
        net.lm_head.weight[answer, list(ways)] = 4.0


@pytest.fixture(scope="module")
def wired() -> Model:
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=8, n_embd=8, n_layer=1, n_head=2, n_inner=12,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    net = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        _wire(net)
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="one"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="one", pad_token="one")
    return Model(net, tokenizer, name="wired")


def wired_pairs(*, one_way: bool = False) -> Pairs:
    """Twelve pairs of both kinds; every other one goes from b to a, unless all go one way."""
    rows = [
        (f"{word} {a}", f"{word} {b}", "yes", "no")
        for word in ("one", "two", "three")
        for a, b in zip(KINDS["a"], KINDS["b"][1:] + KINDS["b"][:1], strict=True)
    ]
    rows = [r if one_way or i % 2 == 0 else (r[1], r[0], r[3], r[2]) for i, r in enumerate(rows)]
    clean, contrast, answers, wrong = (list(column) for column in zip(*rows, strict=True))
    return Pairs(clean, contrast, [[a] for a in answers], [[w] for w in wrong])


def axis(*neurons: int, size: int = 12) -> Tensor:
    found = torch.zeros(size)
    found[list(neurons)] = 1.0
    return found


def by_hand(model: Model, pairs: Pairs, direction: Tensor, layer: int = 0) -> np.ndarray:
    """Logit differences with the swap made by torch hooks on GPT-2's `c_proj`, row by row."""
    net: Any = model.module
    module = net.transformer.h[layer].mlp.c_proj
    encoded, found = pairs.encode(model), []
    v = direction / direction.norm()
    for row in range(len(pairs)):
        held: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _m, a, h=held: h.append(a[0].clone()))
        with torch.no_grad():
            model.module(input_ids=encoded.contrast.row(row).ids)
        handle.remove()

        def write(_m: Any, args: Any, source: Tensor = held[0]) -> Any:
            h = args[0].clone()
            h[0, -1] += ((source[0, -1] - h[0, -1]) @ v) * v
            return (h,)

        handle = module.register_forward_pre_hook(write)
        with torch.no_grad():
            logits = model.module(input_ids=encoded.clean.row(row).ids).logits[0, -1]
        handle.remove()
        found.append(float(logits[encoded.answers[row, 0]] - logits[encoded.wrong[row, 0]]))
    return np.array(found)


# The diagnostic ----------------------------------------------------------------------------------


def test_the_planted_illusion_is_flagged(wired: Model) -> None:
    v = axis(DISCONNECTED, DORMANT)
    report = illusion_report(wired, wired_pairs(), "mlp_post.0", v)
    effect = {str(p): float(report["effect"].sel(part=p)[0]) for p in report["part"].values}
    assert report["verdict"].values[0] == "illusion" and report["illusion"].values[0]
    assert effect["subspace"] > 0.5 and effect["full"] > 0.9
    assert report["accuracy"].sel(part="subspace")[0] == 1.0  # it changes every answer ...
    assert abs(effect["row"]) < 1e-4 and abs(effect["null"]) < 1e-6  # ... and neither part does
    assert np.allclose(report["row_norms"].values, 0.5**0.5, atol=1e-5)
    assert np.allclose(report["null_norms"].values, 0.5**0.5, atol=1e-5)
    assert report["disconnected"].values[0] > 0.99 and report["dormant"].values[0] > 0.99
    assert "An illusion by the split" in report.view.to_json()
    for name, direction in (("subspace", v), ("row", axis(DORMANT)), ("null", axis(DISCONNECTED))):
        mine = report["patched"].sel(part=name)[0].values
        assert np.allclose(mine, by_hand(wired, wired_pairs(), direction), atol=1e-4), name
    lost = 100 * (1 - by_hand(wired, wired_pairs(), v).mean() / float(report["clean"].mean()))
    assert abs(float(report["fldd"].sel(part="subspace")[0]) - lost) < 1e-3


def test_the_honest_direction_is_cleared(wired: Model) -> None:
    report = illusion_report(wired, wired_pairs(), "mlp_post.0", axis(HONEST))
    assert report["verdict"].values[0] == "cleared" and not report["illusion"].values[0]
    assert report["effect"].sel(part="subspace")[0] > 0.9
    assert np.allclose(report["effect"].sel(part="row"), report["effect"].sel(part="subspace"))
    assert "null" not in report["part"].values  # there is no such part to swap
    assert abs(report["disconnected"].values[0]) < 1e-6 and report["dormant"].values[0] < 1e-6
    # A subspace that holds both: each direction's split is told.
    both = illusion_report(
        wired, wired_pairs(), "mlp_post.0", torch.stack([axis(HONEST), axis(DISCONNECTED)])
    )
    assert both["verdict"].values[0] == "cleared"
    assert np.allclose(np.sort(both["null_norms"].values[0]), [0, 1], atol=1e-5)
    alone = both["effect"].sel(part="row").values
    assert np.allclose(alone, report["effect"].sel(part="subspace").values, atol=1e-5)


def test_directions_that_do_nothing(wired: Model) -> None:
    for neuron in (DISCONNECTED, DORMANT, 7):
        report = illusion_report(wired, wired_pairs(), "mlp_post.0", axis(neuron))
        assert report["verdict"].values[0] == "no effect"
        assert abs(float(report["effect"].sel(part="subspace")[0])) < 1e-5


def test_the_null_part_is_asserted(wired: Model) -> None:
    """A wrong read-out (here: one that misses the neuron that writes) is found out."""
    true = readout_of(wired, Site("mlp_post", 0))
    assert true.whole and true.rank == 3
    encoded = wired_pairs().encode(wired)
    work = Interchange(wired, encoded, [Site("mlp_post", 0)], [-1] * len(encoded))
    lying = Readout("a lie", true.matrix * (torch.arange(12) != HONEST)[:, None], whole=True)
    with pytest.raises(SelfCheckFailed, match="nothing reads"):
        arms(work, [(Site("mlp_post", 0), axis(HONEST)[None], lying)], draws=1, seed=0)


def test_the_verdict_on_the_papers_numbers() -> None:
    """GPT-2 small, IOI: FLDD in shares, squared norm of the null part (reference notebook)."""
    chance = 0.02
    assert verdict(0.459, 0.132, 0.657**2, chance=chance) == "illusion"  # DAS at MLP 8
    assert verdict(1.389, 1.260, 0.5, chance=chance) == "cleared"  # DAS at resid_post.8
    assert verdict(0.05, 0.0, 0.5, chance=chance) == "no effect"
    assert verdict(0.3, 0.0, 0.5, chance=0.4) == "no effect"  # no more than a random subspace
    assert verdict(0.3, 0.0, 0.1, chance=chance) == "cleared"  # hardly any null part
    assert verdict(0.3, float("nan"), float("nan"), chance=chance) == "undecided"


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("name", ["mlp_post", "z"])
def test_what_nothing_reads_does_nothing(family: str, name: str) -> None:
    """In every family: a random direction's null part alone is exactly 0, its row part is not."""
    model = random_model(family)
    site = Site(name, 0, 1 if name == "z" else None)
    reader = readout_of(model, site)
    d = reader.matrix.shape[0]
    direction = torch.randn(d, generator=torch.Generator().manual_seed(0))
    pairs = Pairs.one("w20 w31 w12 w40", "w20 w31 w18 w41", "w30", "w33")
    report = illusion_report(model, pairs, site, direction)  # raises where it is not so
    assert (reader.rank < d) == ("null" in report["part"].values)
    assert abs(float(report["effect"].sel(part="row")[0])) > 1e-5
    if reader.rank < d:
        assert abs(float(report["effect"].sel(part="null")[0])) < 1e-4
        total = report["row_norms"].values ** 2 + report["null_norms"].values ** 2
        assert np.allclose(total, 1, atol=1e-6) and report["null_norms"].values[0, 0] > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_read_outs_of_the_stream_are_what_is_read(family: str) -> None:
    """Moving the stream along the null space of `q.1.0` leaves that head's queries' direction."""
    model = random_model(family)
    site = Site("resid_post", 0)
    reader = readout_of(model, site, ("q.1.0",))
    d = int(model.d_model or 0)
    assert not reader.whole and 0 < reader.rank < d
    make = torch.Generator().manual_seed(1)
    null = torch.randn(d, generator=make, dtype=torch.float64)
    null = null - reader.space @ (reader.space.T @ null)
    run = model.run("w20 w31 w12", record=["resid_post.0", "q.1.0", "ln1_scale.1"])
    for direction, equal in ((null, True), (reader.space[:, 0], False)):
        edit = Edit(site, uh.add(direction.float() * 0.5), Where(-1))
        moved = model.run("w20 w31 w12", record=["q.1.0", "ln1_scale.1"], edits=[edit])
        bias = model.run("w20 w31 w12", record=["q.1.0"], edits=[Edit("ln1.1", uh.zero())])
        # The norm divides by another length; what is read keeps its direction.
        ours = (moved["q.1.0"] - bias["q.1.0"])[0, -1] * moved["ln1_scale.1"][0, -1]
        was = (run["q.1.0"] - bias["q.1.0"])[0, -1] * run["ln1_scale.1"][0, -1]
        shift = _norm_bias(model, run, moved)
        assert torch.allclose(ours - shift, was, atol=1e-3) == equal


def _norm_bias(model: Model, run: Any, moved: Any) -> Tensor:
    """What a norm's bias adds to the queries, times the change of its scale."""
    bias = getattr(model.module.get_submodule(_ln1(model)), "bias", None)
    if bias is None:
        return torch.zeros(1)
    reads = model.run(
        "w20 w31 w12", record=["q.1.0"], edits=[Edit("ln1.1", uh.set_to(bias.detach()))]
    )
    none = model.run("w20 w31 w12", record=["q.1.0"], edits=[Edit("ln1.1", uh.zero())])
    gap = moved["ln1_scale.1"][0, -1] - run["ln1_scale.1"][0, -1]
    return (reads["q.1.0"] - none["q.1.0"])[0, -1] * gap


def _ln1(model: Model) -> str:
    return model.anatomy.stacks[""].blocks[1].points["ln1"].path


# The search --------------------------------------------------------------------------------------


def test_das_on_the_town(town: Model, tmp_path: Any) -> None:
    """Agreement has two answers: one direction of the stream is enough, and a random one is not."""
    found = subspace(town, town_pairs("agreement", 32), site="resid_post.2", steps=20, lr=0.05)
    accuracy = {str(p): float(found["accuracy"].sel(part=p)[0]) for p in found["part"].values}
    assert accuracy["subspace"] > 0.9 and accuracy["full"] == 1.0
    assert accuracy["random"] == 0.0 and accuracy["permuted"] < 0.2
    assert found["loss"].values[0, 0] > 5 > 1 > found["loss"].values[0, -1]
    head = found.provenance["headline"]
    assert "learned by DAS, carry the decision" in head
    assert "random subspaces of equal size 0%" in head
    assert "other pairs' labels" in head and "whole activation 100%" in head
    assert "No illusion of this kind can be here" in found.view.to_json()
    assert View.from_json(found.view.to_json()) == found.view
    basis = found["basis"].values[0]
    assert np.allclose(basis @ basis.T, np.eye(1), atol=1e-5)
    # Every pair is on one side: the split counts them all.
    assert found.provenance["trained_on"] + found.provenance["tested_on"] == 32
    loaded = Result.load(found.save(tmp_path / "found.json"))
    assert loaded.data.equals(found.data)


def test_the_edit_reproduces_the_swap(town: Model) -> None:
    pairs = town_pairs("agreement", 12)
    found = subspace(town, pairs, site="resid_post", layers=(1, 2), steps=6, control=False, k=2)
    basis = torch.tensor(found["basis"].values[1]).float()
    report = illusion_report(town, pairs, "resid_post.2", basis)
    encoded = pairs.encode(town)
    source = town.run(encoded.contrast, record="resid_post.2")
    edit = subspace_edit(found, source, layer=2)
    assert str(edit.site) == "resid_post.2" and edit.where == Where(-1)
    logits = town.run(encoded.clean, edits=[edit]).last_logits
    mine = (logits.gather(1, encoded.answers) - logits.gather(1, encoded.wrong))[:, 0]
    expected = report["patched"].sel(part="subspace")[0].values
    assert np.allclose(mine.numpy(), expected, atol=1e-3)
    assert np.ptp(expected - report["clean"].values) > 0.1
    with pytest.raises(UsageError, match="say which layer"):
        subspace_edit(found, source)
    with pytest.raises(UsageError, match="no such layer"):
        subspace_edit(found, source, layer=3)


@pytest.mark.parametrize("kind", ["boundless", "mask", "mask-pca", "mean-difference", "pca"])
def test_other_kinds_find_the_honest_neuron(wired: Model, kind: Any) -> None:
    pairs = wired_pairs(one_way=kind == "mean-difference")  # of both ways the mean is noise
    found = subspace(wired, pairs, site="mlp_post.0", kind=kind, steps=40, lr=0.1, rows_per_step=6)
    assert found["accuracy"].sel(part="subspace")[0] == 1.0
    basis = found["basis"].values[0]
    size = int(found["size"].values[0])
    assert np.allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-4) and size == len(basis)
    assert size < 12 and np.linalg.norm(basis[:, HONEST]) > 0.4
    trained = kind in ("boundless", "mask", "mask-pca")
    assert ("permuted" in found["part"].values) == trained == ("loss" in found.data)
    if kind == "mask":
        assert set(np.unique(basis)) <= {0.0, 1.0} and basis[:, HONEST].sum() == 1
    if kind == "mean-difference":  # what the two runs differ in, read or not
        assert basis[0, DORMANT] == pytest.approx(0, abs=1e-4)


def test_training_follows_the_gradient(wired: Model) -> None:
    """The logit-difference loss of a step is the swap's, by hand; a full turn cannot be beaten."""
    encoded = wired_pairs().encode(wired)
    site = Site("mlp_post", 0)
    work = Interchange(wired, encoded, [site], [-1] * len(encoded))
    asked = Training("das", 1, 1, 0.1, "logit_diff", 0.0, len(encoded), 0)
    one = learn(work, site, asked)
    torch.manual_seed(0)
    start = torch.nn.init.orthogonal_(torch.empty(1, 12))[0]
    assert abs(one.losses[0] - by_hand(wired, wired_pairs(), start).mean()) < 1e-4
    many = learn(work, site, Training("das", 1, 30, 0.1, "logit_diff", 0.0, len(encoded), 0))
    assert many.losses[-1] < many.losses[0] - 1 and min(many.losses) >= many.losses[-1] - 0.5
    assert all(p.grad is None for p in wired.module.parameters())


@pytest.mark.parametrize("positions", ["last", "changed", "all", 1])
def test_positions_and_unequal_lengths(town: Model, positions: Any) -> None:
    """Rows of several lengths and spots: the batch equals each pair by itself."""
    pairs = town_pairs("agreement", 6)
    assert len(set(pairs.encode(town).clean.lengths)) > 1
    d = int(town.d_model or 0)
    basis = torch.randn(3, d, generator=torch.Generator().manual_seed(2))
    site = "resid_post.0"
    if positions == 1:
        pairs = Pairs.one("The book near the cup", "The books near the cup", "is", "are")
        positions = 2
    whole = illusion_report(town, pairs, site, basis, positions=positions, batch_size=4)
    moved = whole["patched"].sel(part="full")[0] - whole["clean"]
    assert float(np.abs(moved).max()) > 0.01
    encoded = pairs.encode(town)
    places = spots(encoded, pairs, positions)
    for row, pair in enumerate(pairs):
        one = pair.encode(town)
        source = town.run(one.contrast, record=site)
        where = None if places is None else places[row]
        for part, op in (("subspace", uh.swap_subspace(basis, source)), ("full", uh.patch(source))):
            logits = town.run(one.clean, edits=[Edit(site, op, where)]).last_logits[0]
            mine = float(logits[one.answers[0, 0]] - logits[one.wrong[0, 0]])
            assert abs(mine - float(whole["patched"].sel(part=part)[0][row])) < 1e-3


def test_the_batch_size_does_not_matter(town: Model) -> None:
    pairs = town_pairs("agreement", 8)
    options: dict[str, Any] = {"site": "mlp_post.2", "steps": 4, "k": 2}
    whole = subspace(town, pairs, **options)
    part = subspace(town, pairs, batch_size=3, **options)
    for name in ("effect", "accuracy", "patched", "dormant"):
        assert np.allclose(whole[name], part[name], atol=1e-4), name


def test_the_seed_decides_everything(wired: Model) -> None:
    options: dict[str, Any] = {"site": "mlp_post.0", "steps": 4, "control": False}
    found = [subspace(wired, wired_pairs(), seed=seed, **options) for seed in (0, 0, 1)]
    assert "do not carry the decision" in found[0].provenance["headline"]  # in so few steps
    assert found[0].data.equals(found[1].data)
    assert not np.allclose(found[0]["basis"], found[2]["basis"])


def test_more_than_the_whole_activation_is_told(wired: Model) -> None:
    """A subspace that moves more than all of the place does is suspect whatever the split says."""
    pairs = wired_pairs()
    found = subspace(
        wired, pairs, site="mlp_post.0", steps=30, lr=0.1, loss="logit_diff", control=False
    )
    more = float(found["effect"].sel(part="subspace")[0] - found["effect"].sel(part="full")[0])
    assert more > 0.05
    assert "more than the whole activation" in found.view.to_json()


def test_permuted_labels_are_never_a_pairs_own(wired: Model) -> None:
    from underhood.methods.locate.subspace import _permuted

    labels = torch.tensor([[1], [1], [1], [2], [3]])
    for seed in range(20):
        other = _permuted(labels, seed)
        assert other is not None and not bool((other == labels).any())
        assert set(other.flatten().tolist()) <= {1, 2, 3}
    assert _permuted(torch.tensor([[1], [1]]), 0) is None
    alike = subspace(wired, wired_pairs(one_way=True), site="mlp_post.0", steps=1)
    assert "permuted" not in alike["part"].values  # all pairs have one label: no such control


def test_answers_may_be_the_models_own(town: Model) -> None:
    pairs = town_pairs("agreement", 8)
    own = illusion_report(
        town, Pairs(list(pairs.clean), list(pairs.contrast)), "resid_post.2", torch.eye(128)[3]
    )
    told = illusion_report(town, pairs, "resid_post.2", torch.eye(128)[3])
    assert own.provenance["answers"] == "the model's own top tokens"
    assert np.allclose(own["patched"], told["patched"], atol=1e-4)


def test_equal_pairs_stay_on_one_side(town: Model) -> None:
    pairs = town_pairs("agreement", 10)
    twice = Pairs(
        pairs.clean + pairs.contrast, pairs.contrast + pairs.clean,
        pairs.answers + pairs.wrong, pairs.wrong + pairs.answers,
    )  # fmt: skip
    for seed in range(5):
        learning, testing = divide(twice, 0.5, seed)
        sides = [{frozenset((twice.clean[i], twice.contrast[i])) for i in part}
                 for part in (learning, testing)]  # fmt: skip
        assert not sides[0] & sides[1] and len(learning) + len(testing) == 20


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"site": "pattern.1"}, UsageError, "no single vector"),
        ({"site": "z.1"}, UsageError, "no single vector"),
        ({"site": "ln1_scale.1"}, UsageError, "no single vector"),
        ({"site": "embed"}, UsageError, "no single vector"),
        ({"site": "resid_prae"}, SiteNotFound, "no site named|name of a site"),
        ({"site": "resid_post.2", "layers": (1,)}, UsageError, "names a layer"),
        ({"layers": (9,)}, OutOfRange, "in layer 9"),
        ({"site": "resid_post.9"}, OutOfRange, "no layer 9"),
        ({"k": 128}, OutOfRange, "below the site's width"),
        ({"k": 0}, OutOfRange, "at least 1"),
        ({"steps": 0}, OutOfRange, "at least 1"),
        ({"held_out": 1.0}, OutOfRange, "between 0 and 1"),
        ({"kind": "mean-difference", "k": 2}, OutOfRange, "one direction"),
        ({"kind": "pca", "k": 60}, OutOfRange, "as many differences"),
        ({"positions": "frist"}, UsageError, "no position called"),
        ({"positions": 40}, OutOfRange, "outside the prompt"),
        ({"site": "resid_pre.0"}, PairError, "nothing to exchange"),
        ({"reader": ("pattern.3",)}, UsageError, "not a reader"),
        ({"site": "resid_post.2", "reader": ("q.1.0",)}, UsageError, "comes before"),
        ({"site": "mlp_post.1", "reader": ("q.2.0",)}, UsageError, "cannot be chosen"),
    ],
)
def test_refusals(town: Model, options: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        subspace(town, town_pairs("agreement", 6), **options)


def test_pairs_that_cannot_be_learned_from(town: Model) -> None:
    pairs = town_pairs("agreement", 3)
    with pytest.raises(PairError, match="4 different pairs"):
        subspace(town, pairs)
    same = Pairs(pairs.clean * 4, pairs.contrast * 4, pairs.answers * 4, pairs.wrong * 4)
    with pytest.raises(PairError, match="4 different pairs"):
        subspace(town, same)
    uneven = Pairs(["The cup is", "The cup"], ["The cup", "The cup is"], [["is"]] * 2)
    with pytest.raises(PairError, match="tokens"):
        subspace(town, uneven)


def test_directions_that_do_not_fit(town: Model) -> None:
    pairs = town_pairs("agreement", 4)
    with pytest.raises(ShapeMismatch, match="do not fit"):
        illusion_report(town, pairs, "resid_post.2", torch.ones(127))
    with pytest.raises(NotFinite, match="zero"):
        illusion_report(town, pairs, "resid_post.2", torch.zeros(128))
    with pytest.raises(OutOfRange, match="fewer than"):
        illusion_report(town, pairs, "resid_post.2", torch.eye(128))
    with pytest.raises(ShapeMismatch, match="read-out"):
        illusion_report(town, pairs, "resid_post.2", torch.ones(128), reader=torch.ones(3, 3))
    with pytest.raises(UsageError, match="one layer"):
        illusion_report(town, pairs, "resid_post", torch.ones(128))
    with pytest.raises(NotOffered, match="linear"):
        readout_of(town, Site("q", 1, 0))
    # Where no read-out is known the rest is still reported, and the verdict left open.
    report = illusion_report(town, pairs, "q.2.0", torch.ones(32))
    assert report["verdict"].values[0] in ("undecided", "no effect")
    assert "row" not in report["part"].values
    given = illusion_report(
        town, pairs, "resid_post.2", torch.ones(128), reader=torch.eye(128)[:, :5]
    )
    assert given["rank"].values[0] == 5
    assert isinstance(subspace_edit(given, torch.zeros(4, 9, 128)), Edit)
    assert isinstance(Plan([subspace_edit(given, torch.zeros(4, 9, 128))]), Plan)


def test_the_split_is_a_split() -> None:
    make = torch.Generator().manual_seed(0)
    reader = Readout("r", torch.randn(10, 3, generator=make, dtype=torch.float64), whole=False)
    basis = torch.linalg.qr(torch.randn(10, 5, generator=make, dtype=torch.float64))[0].T
    found = split(basis, reader)
    assert found.row.shape == (3, 10) and found.null.shape == (5, 10)
    assert float((found.null @ reader.matrix).abs().max()) < 1e-12
    assert torch.allclose(found.row_norms**2 + found.null_norms**2, torch.ones(5).double())
    for part in (found.row, found.null):
        assert torch.allclose(part @ part.T, torch.eye(len(part)).double(), atol=1e-10)
