"""Positions: batches are their rows, caches are full passes, `Where` means what it says."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import gap, inputs, model, one, padded, rows, vector

import underhood as uh
from underhood.core.edit import Edit, Schedule
from underhood.core.errors import OutOfRange, PaddingError, ShapeMismatch, UsageError
from underhood.core.tokens import Frame, Tokens, Where

LENGTHS = (9, 4, 7)
PROMPTS = rows(*LENGTHS)
CPU = torch.device("cpu")


def place(batch: Tokens, row: int) -> slice:
    """The columns of a row's own tokens."""
    start = batch.starts[row]
    return slice(start, start + batch.lengths[row])


# Batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "mistral", "gemma3", "mamba"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_rows(family: str, side: str) -> None:
    m, batch = model(family), padded(PROMPTS, side)
    names = [n for n in ("resid_post", "pattern", "z", "k", "mlp_post") if m.offers(n)]
    edits = [
        Edit("resid_post.0", uh.add(vector(32)), [1, -1]),
        Edit("attn_out.1", uh.scale(0.3), 2),
    ]
    run = m.run(batch, record=names, edits=edits)
    assert [f.places for f in run.fired] == [6, 3]
    for i, prompt in enumerate(PROMPTS):
        alone = m.run(one(prompt), record=names, edits=edits)
        mine = place(batch, i)
        assert gap(run.logits[i, mine], alone.logits[0]) < 2e-5
        assert gap(run.last_logits[i], alone.logits[0, -1]) < 2e-5
        for site in alone.sites:
            whole = run.aligned(site)[i]
            own = alone[site][0]
            whole = (
                whole[:, : len(prompt), : len(prompt)]
                if site.name == "pattern" else whole[: len(prompt)]
            )  # fmt: skip
            assert gap(whole, own) < 2e-5, site


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "mamba", "gemma2", "deepseek_v3"])
@pytest.mark.parametrize(
    "site", ["resid_post.0", "z.1", "v.0.0", "k_rot.1", "pattern.1", "mlp_out.1", "head_out.0.1",
             "resid_mid.1", "expert_out.1", "ssm_x.1"],
)  # fmt: skip
def test_an_edit_in_one_row_leaves_the_others_bit_for_bit(family: str, site: str) -> None:
    m, batch = model(family), padded(PROMPTS, "left")
    if not m.offers(site):
        pytest.skip(f"{family} has no {site}")
    bare = m.run(batch)
    # The site is written with its own value first, so that both runs take the same kernels.
    same = m.run(batch, edits=Edit(site, uh.call(lambda h: h.clone()), Where(rows=1)))
    # Not a factor alone, which a norm could undo.
    run = m.run(batch, edits=Edit(site, uh.call(lambda h: 0.5 * h.roll(1, -1)), Where(rows=1)))
    assert torch.equal(run.logits[[0, 2]], same.logits[[0, 2]])
    for row in (0, 2):
        assert gap(run.logits[row, place(batch, row)], bare.logits[row, place(batch, row)]) < 2e-5
    assert gap(run.logits[1, 5:], bare.logits[1, 5:]) > 1e-4


def test_rows_may_count_from_the_end() -> None:
    m, batch = model("llama"), padded(PROMPTS)
    a = m.run(batch, edits=Edit("resid_post.0", uh.zero(), Where(-1, rows=-1)))
    b = m.run(batch, edits=Edit("resid_post.0", uh.zero(), Where(6, rows=2)))
    assert torch.equal(a.logits, b.logits)


def test_a_patch_meets_its_own_positions() -> None:
    """Source and target are padded on different sides; each row still gets its own."""
    m = model("llama")
    source = m.run(
        padded(rows(*LENGTHS, seed=9), "left"), record=["resid_post.1", "pattern.1", "z.1"]
    )
    target = padded(PROMPTS, "right")
    for site in ("resid_post.1", "pattern.1", "z.1"):
        run = m.run(target, edits=Edit(site, uh.patch(source)))
        for i, prompt in enumerate(PROMPTS):
            other = rows(*LENGTHS, seed=9)[i]
            from_one = m.run(one(other), record=[site])
            alone = m.run(one(prompt), edits=Edit(site, uh.patch(from_one)))
            assert gap(run.logits[i, : len(prompt)], alone.logits[0]) < 2e-5, site


def test_learned_positions_are_shared_by_all_rows() -> None:
    """GPT-2 adds one row of positions to the whole batch: no row can be told apart there."""
    m = model("gpt2")
    batch = padded(PROMPTS)
    with pytest.raises(ShapeMismatch, match="cannot be told apart"):
        m.run(batch, edits=Edit("pos_embed", uh.zero(), -1))
    with pytest.raises(ShapeMismatch, match="cannot be told apart"):
        m.run(batch, edits=Edit("pos_embed", uh.zero(), Where(rows=1)))
    last = m.run(batch, record=["pos_embed"], at=-1)["pos_embed"]
    table = m.module.get_parameter("transformer.wpe.weight")
    assert torch.equal(last[:, 0], table[[n - 1 for n in LENGTHS]])
    left = padded(PROMPTS, "left")  # with position_ids of its own, each row has its own positions
    run = m.run(left, edits=Edit("pos_embed", uh.zero(), -1), record=["pos_embed"])
    assert not bool(run["pos_embed"][:, -1].any()) and bool(run["pos_embed"][:, -2].any())


def test_masks_with_holes_are_refused() -> None:
    m = model("llama")
    ids = torch.tensor([PROMPTS[0][:4]] * 2)
    hole = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])
    with pytest.raises(PaddingError, match="hole|inside"):
        m.run({"input_ids": ids, "attention_mask": hole})
    with pytest.raises(PaddingError):
        m.run(Tokens(ids, hole.bool()))
    with pytest.raises(UsageError):
        m.run({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])})


# Where -------------------------------------------------------------------------------------------

WHERE = st.builds(
    lambda pos, tokens, phase, steps, of: Where(
        pos, rows=of, tokens=tokens, phase=phase, steps=steps
    ),
    st.none() | st.lists(st.integers(-3, 9), min_size=1, max_size=3),
    st.none() | st.lists(st.integers(8, 12), min_size=1, max_size=3),
    st.sampled_from([None, "prompt", "generated"]),
    st.none() | st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.none() | st.lists(st.integers(-3, 2), min_size=1, max_size=2),
)


def meant(where: Where, row: int, pos: int, token: int, *, prompt: int, batch: int) -> bool:
    """Whether a token is meant, said once more in plain Python."""
    if where.rows is not None and row not in [r % batch for r in where.rows]:
        return False
    if where.pos is not None and pos not in [p if p >= 0 else prompt + p for p in where.pos]:
        return False
    if where.phase is not None and (pos >= prompt) != (where.phase == "generated"):
        return False
    if where.steps is not None and (pos < prompt or pos - prompt not in where.steps):
        return False
    return where.tokens is None or token in where.tokens


@settings(max_examples=150, deadline=None)
@given(
    WHERE, st.lists(st.integers(3, 6), min_size=3, max_size=3), st.integers(0, 5),
    st.lists(st.integers(1, 6), max_size=3), st.sampled_from(["left", "right"]),
)  # fmt: skip
def test_where(where: Where, lengths: list[int], extra: int, cuts: list[int], side: str) -> None:
    """Any cut of prompt and generation into passes selects what the sentence says."""
    side = "left" if extra else side  # generation pads on the left
    prompts = rows(*lengths, low=8, vocab=13)
    grown = (
        [p + rows(extra, seed=i, vocab=13)[0] for i, p in enumerate(prompts)] if extra else prompts
    )
    batch = padded(grown, side)
    columns = max(lengths)
    offsets = torch.tensor(batch.starts) if side == "left" and len(set(lengths)) > 1 else None
    wanted = torch.zeros(batch.ids.shape, dtype=torch.bool)
    for i, row in enumerate(grown):
        for pos, token in enumerate(row):
            wanted[i, batch.starts[i] + pos] = meant(
                where, i, pos, token, prompt=lengths[i], batch=3
            )
    start, seen = 0, []
    ends = sorted({c for c in (columns, *(columns + c for c in range(1, extra + 1))) if c > 0})
    ends = sorted({*ends, *(c for c in cuts if c < columns)})
    for end in ends:
        frame = Frame(3, end - start, start, columns, offsets=offsets, cached=start > 0)
        frame.ids, frame.mask = batch.ids[:, start:end], batch.mask[:, start:end]
        frame.lengths = torch.tensor(lengths)
        chosen = where.select(frame, CPU)
        seen.append(frame.mask if chosen is None else chosen)
        start = end
    assert torch.equal(torch.cat(seen, 1), wanted)


def test_where_refuses_what_cannot_come_up() -> None:
    m, batch = model("llama"), padded(PROMPTS)
    for wrong in (Where(4), Where(-5), Where([0, 9]), Where(rows=3), Where(rows=-4),
                  Where(phase="generated"), Where(steps=0)):  # fmt: skip
        with pytest.raises(OutOfRange) as caught:
            m.run(batch, edits=Edit("resid_post.0", uh.zero(), wrong))
        assert caught.value.do
        with pytest.raises(OutOfRange):
            m.run(batch, record=["resid_post.0"], at=wrong)
    m.run(batch, edits=Edit("resid_post.0", uh.zero(), Where(8, rows=0)))  # that row is longer
    with pytest.raises(UsageError, match="phase"):
        Where(phase="prompts")


def test_recordings_at_positions() -> None:
    m = model("llama")
    for side in ("left", "right"):
        batch = padded(PROMPTS, side)
        run = m.run(batch, record=["resid_post.1", "z.0.2"], at=[0, -1])
        for i, prompt in enumerate(PROMPTS):
            alone = m.run(one(prompt), record=["resid_post.1", "z.0.2"])
            ends = [0, len(prompt) - 1]
            assert gap(run["resid_post.1"][i], alone["resid_post.1"][0, ends]) < 2e-5
            assert gap(run["z.0.2"][i], alone["z.0.2"][0, ends]) < 2e-5
    with pytest.raises(UsageError, match="rows differ"):
        m.run(batch, record=["resid_post.1"], at=Where(tokens=PROMPTS[0][0]))


# Caches ------------------------------------------------------------------------------------------

SITES = ("resid_post.1", "z.1", "k.1", "v.1", "q.1", "k_rot.0", "pattern.1", "scores.1",
         "mlp_post.0", "head_out.1.2", "attn_out.0", "ssm_x.1")  # fmt: skip
NEW = 6


def push(site: str, where: Where, schedule: Schedule | None = None) -> Edit:
    """An edit that matters, for any site."""
    if site.startswith("scores"):
        return Edit(site, uh.attend(block=(1, 2)), where, schedule=schedule)
    if site.startswith("pattern"):  # heads are mixed: keys come and go with the passes
        return Edit(site, uh.call(lambda h: 0.4 * h + 0.3 * h.flip(1)), where, schedule=schedule)
    return Edit(site, uh.call(lambda h: 0.4 * h - 0.3 * h.roll(1, -1)), where, schedule=schedule)


def fits(family: str, site: str) -> None:
    if not model(family).offers(site):
        pytest.skip(f"{family} has no {site}")


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "mixtral", "mamba"])
@pytest.mark.parametrize("site", SITES)
def test_cached_equals_uncached(family: str, site: str) -> None:
    """Token by token with a cache, or all over again each time: the same tokens and activations."""
    fits(family, site)
    m, prompts = model(family), padded(rows(7, 5), "left")
    cases = [Where(), Where(phase="prompt"), Where(phase="generated"), Where(steps=(1, 3))]
    cases.append(Where([3, -1]))
    if site.startswith(("pattern", "mlp_post")):
        cases = cases[:3]
    for where in cases:
        made = {}
        for cached in (True, False):
            made[cached] = m.generate(
                prompts, max_new_tokens=NEW, min_new_tokens=NEW, use_cache=cached,
                edits=push(site, where), record=["resid_post"],
            )  # fmt: skip
        a, b = made[True], made[False]
        assert torch.equal(a.ids, b.ids), where
        keep = torch.ones(2, 7 + NEW - 1, dtype=torch.bool)
        keep[1, :2] = False
        assert gap(a.run["resid_post"][:, keep], b.run["resid_post"][:, keep]) < 1e-4, where
        assert a.fired[0].places == b.fired[0].places, where


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "mixtral", "mamba"])
def test_cached_equals_one_pass(family: str) -> None:
    """Generated phase, steps and schedule against one pass with the positions written out."""
    m = model(family)
    prompt = rows(7, seed=4)[0]
    fade = Schedule(((0, 1.0), (4, 0.2)))
    plans = {
        "generated": ([push("resid_post.1", Where(phase="generated"))],
                      [push("resid_post.1", Where(range(7, 7 + NEW - 1)))]),
        "steps": ([push("resid_post.1", Where(steps=(0, 2)))],
                  [push("resid_post.1", Where((7, 9)))]),
        "prompt": ([push("resid_post.0", Where(-1)), push("attn_out.1", Where(phase="prompt"))],
                   [push("resid_post.0", Where(6)), push("attn_out.1", Where(range(7)))]),
        "schedule": (
            [Edit("resid_post.1", uh.add(vector(32)), schedule=fade)],
            [Edit("resid_post.1", uh.add(vector(32)), i, strength=f)
             for i, f in enumerate([1.0] * 7 + [1.0, 0.8, 0.6, 0.4, 0.2])]),
    }  # fmt: skip
    for name, (during, written) in plans.items():
        made = m.generate(
            one(prompt), max_new_tokens=NEW, min_new_tokens=NEW, edits=during, record=["resid_post"]
        )
        full = torch.cat([one(prompt), made.ids[:, :-1]], 1)
        again = m.run(full, edits=written, record=["resid_post"])
        assert gap(made.run["resid_post"], again["resid_post"]) < 1e-4, name
        best = again.logits[0, 6:].clone()
        best[:, 2] = -torch.inf  # the end token, which min_new_tokens forbids
        assert best.argmax(-1).tolist() == made.ids[0].tolist(), name


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "mamba"])
def test_prompt_edits_persist_through_the_cache(family: str) -> None:
    m = model(family)
    prompt = one(rows(7)[0])
    site = "ssm_x.0" if family == "mamba" else "v.0"
    edit = Edit(site, uh.scale(-2.0), 3)
    bare = m.generate(prompt, max_new_tokens=4, min_new_tokens=4, record=["resid_post"])
    made = m.generate(prompt, max_new_tokens=4, min_new_tokens=4, edits=edit, record=["resid_post"])
    assert made.fired[0].places == 1
    later = slice(7, None)
    same = torch.equal(made.ids[:, :2], bare.ids[:, :2])
    if same:  # the tokens fed are the same: only the cache can carry the edit
        moved = made.run["resid_post"][:, :, later] - bare.run["resid_post"][:, :, later]
        assert float(moved.abs().max()) > 1e-3
    full = torch.cat([prompt, made.ids[:, :-1]], 1)
    again = m.run(full, edits=edit, record=["resid_post"])
    assert gap(made.run["resid_post"], again["resid_post"]) < 1e-4


def test_generation_options_that_cut_passes() -> None:
    """Chunked prefill counts positions as one prefill does; guessing ahead is refused with taps."""
    m = model("llama")
    prompt = one(rows(9)[0])
    edit = Edit("resid_post.1", uh.add(2 * vector(32)), [2, -1])
    plain = m.generate(
        prompt, max_new_tokens=4, min_new_tokens=4, edits=edit, record=["resid_post"]
    )
    chunks = m.generate(
        prompt, max_new_tokens=4, min_new_tokens=4, edits=edit, record=["resid_post"],
        prefill_chunk_size=4,
    )  # fmt: skip
    assert torch.equal(plain.ids, chunks.ids)
    assert chunks.fired[0].places == 2
    assert gap(plain.run["resid_post"], chunks.run["resid_post"]) < 1e-4
    strategies: list[dict[str, Any]] = [
        {"prompt_lookup_num_tokens": 2},
        {"assistant_model": m.module},
        {"num_beams": 2},
    ]
    for options in strategies:
        with pytest.raises(UsageError) as caught:
            m.generate(prompt, max_new_tokens=4, edits=edit, **options)
        assert next(iter(options)) in str(caught.value)


def test_sampling_several_per_prompt() -> None:
    """Rows that transformers multiplies are each edited."""
    m = model("llama")
    made = m.generate(
        one(rows(5)[0]), max_new_tokens=3, min_new_tokens=3, do_sample=True, num_return_sequences=3,
        seed=0, edits=Edit("resid_post.0", uh.zero(), -1), record=["resid_post.0"],
    )  # fmt: skip
    assert made.ids.shape == (3, 3) and made.fired[0].places == 3
    assert not bool(made.run["resid_post.0"][:, 4].any())
    assert bool(made.run["resid_post.0"][:, 5:].any())


def test_seeds_leave_the_global_generator_alone() -> None:
    m = model("llama")
    before = torch.get_rng_state()
    made = [
        m.generate(one(rows(5)[0]), max_new_tokens=6, do_sample=True, seed=s).ids for s in (1, 1)
    ]
    assert torch.equal(made[0], made[1])
    assert torch.equal(before, torch.get_rng_state())


# Code that calls the model itself ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "mamba", "jamba"])
def test_edited_counts_each_prompt_anew(family: str) -> None:
    """Two generations in one block: a new cache is a new prompt, wherever it lies in memory."""
    m: Any = model(family)
    edit = Edit("resid_post.0", uh.scale(-1.0), Where([1, 8]))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    prompts = [one(rows(6, seed=s)[0]) for s in range(5)]
    wanted = [m.generate(p, max_new_tokens=5, min_new_tokens=5, edits=edit).ids for p in prompts]
    with m.edited(edit) as fired:
        made = [m.module.generate(p, **options)[:, 6:] for p in prompts]
    for a, b in zip(made, wanted, strict=True):
        assert torch.equal(a, b)
    assert fired[0].places == 10


def test_edited_in_a_batch_of_the_callers() -> None:
    m: Any = model("llama")
    batch = padded(PROMPTS, "right")
    edit = Edit("resid_post.0", uh.zero(), Where(-1, rows=1))
    with m.edited(edit), torch.no_grad():
        out = m.module(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
    assert torch.equal(out, m.run(batch, edits=edit).logits)
    with m.edited(Edit("resid_post.0", uh.zero(), Where(rows=2))) as fired, torch.no_grad():
        m.module(input_ids=batch.ids)
    assert fired[0].places == 9


def test_rows_of_inputs_that_are_no_text() -> None:
    m = model("vit")
    run = m.run(
        inputs("vit"), edits=Edit("resid_post.1", uh.zero(), Where(rows=1)), record=["resid_post.1"]
    )
    assert bool(run["resid_post.1"][0].any()) and not bool(run["resid_post.1"][1].any())
    plain = uh.load(torch.nn.Sequential(torch.nn.Linear(4, 3)))
    out = plain.run(torch.ones(5, 4), edits=Edit("module:0", uh.zero(), Where(rows=4))).output
    assert not bool(out[4].any()) and bool(out[3].any())
