"""Plans on disk: what is saved comes back, what is damaged or foreign is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import gap, model, one, rows, untyped, vector
from safetensors.torch import load_file, save_file
from test_site import sites

import underhood as uh
from underhood.core.edit import Edit, Gate, Plan, Schedule
from underhood.core.errors import PlanError, UsageError
from underhood.core.ops import OPS, Op
from underhood.core.site import Site
from underhood.core.tokens import Where

D = 32
SITE = "resid_post.1"
PROMPT = one(rows(9)[0])
V, W = vector(D), vector(D, 1)

OPS_MADE: dict[str, tuple[str, Op]] = {
    "zero": (SITE, uh.zero()),
    "set": (SITE, uh.set_to(V)),
    "mean": (SITE, uh.mean(V)),
    "patch": (SITE, uh.patch(torch.randn(1, 9, D))),
    "add": (SITE, uh.add(V)),
    "scale": (SITE, uh.scale(0.3)),
    "project_out": (SITE, uh.project_out(torch.stack([V, W]))),
    "swap_subspace": (SITE, uh.swap_subspace(V, torch.randn(1, 9, D))),
    "affine": (SITE, uh.affine(torch.randn(D, D), V)),
    "clamp_feature": (SITE, uh.clamp_feature(encoder=V, decoder=W, bias=0.25, value=3.0)),
    "route": ("router_logits.1", uh.route(forbid=(1, 2), force=0, shift={3: 0.5})),
    "attend": ("scores.1", uh.attend(block=(0, 2), only=(0, 1, 3))),
}


def same_op(a: Op, b: Op) -> bool:
    """Equal in type and in every field, tensors bit for bit."""
    if type(a) is not type(b) or vars(a).keys() != vars(b).keys():
        return False
    pairs = [(vars(a)[k], vars(b)[k]) for k in vars(a)]
    return all(
        torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y
        for x, y in pairs
    )


def test_every_op_is_tried_here() -> None:
    assert set(OPS_MADE) == set(OPS)


@pytest.mark.parametrize("name", [*OPS_MADE])
def test_round_trip(tmp_path: Path, name: str) -> None:
    site, op = OPS_MADE[name]
    m = model("mixtral" if name == "route" else "llama")
    add = name == "add"
    edit = Edit(
        site, op, Where([2, -1], rows=0, phase="prompt"), strength=0.7,
        unit="sigma" if add else "raw", sigma=2.5 if add else None,
        gate=Gate("resid_post.0", W, threshold=-1e9, above=True),
        schedule=Schedule(((0, 1), (4, 0.5))),
    )  # fmt: skip
    plan = Plan([edit, Edit("mlp_out.0", uh.add(W))], model=m.identity())
    path = plan.save(tmp_path / "plans" / "one")
    assert path.name == "one.json" and path.with_suffix(".safetensors").is_file()
    again = Plan.load(path)
    assert again.model == plan.model
    for a, b in zip(plan, again, strict=True):
        assert same_op(a.op, b.op)
        assert (a.site, a.where, a.strength, a.unit, a.sigma) == (
            b.site, b.where, b.strength, b.unit, b.sigma)  # fmt: skip
        assert a.schedule == b.schedule and repr(a) == repr(b)
    gate = again[0].gate
    assert gate is not None and torch.equal(gate.direction, W)
    assert (str(gate.site), gate.threshold, gate.above, gate.lag) == ("resid_post.0", -1e9, True, 0)
    first, second = m.run(PROMPT, edits=plan), m.run(PROMPT, edits=again)
    # Tensors from a file may lie unaligned in memory, and kernels round by alignment.
    assert gap(first.logits, second.logits) < 1e-5
    assert gap(first.logits, m.run(PROMPT).logits) > 1e-3


@settings(max_examples=60, deadline=None)
@given(
    sites().filter(lambda s: s.kind.writable),
    st.none() | st.lists(st.integers(-5, 50), min_size=1, max_size=4),
    st.none() | st.lists(st.integers(-2, 8), max_size=3),
    st.none() | st.lists(st.integers(0, 99), max_size=3),
    st.sampled_from([None, "prompt", "generated"]),
    st.none() | st.lists(st.integers(0, 9), max_size=3),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_any_place_round_trips(
    tmp_path_factory: pytest.TempPathFactory, site: Site, pos: Any, of: Any, tokens: Any,
    phase: str | None, steps: Any, strength: float,
) -> None:  # fmt: skip
    where = Where(pos, rows=of, tokens=tokens, phase=phase, steps=steps)
    edit = Edit(site, uh.zero(), where, strength=strength)
    path = Plan([edit]).save(tmp_path_factory.mktemp("plan") / "p")
    (again,) = Plan.load(path)
    assert (again.site, again.where, again.strength) == (site, where, strength)


def test_an_empty_plan_round_trips(tmp_path: Path) -> None:
    path = Plan().save(tmp_path / "none")
    assert len(Plan.load(path)) == 0 and not path.with_suffix(".safetensors").exists()


def test_a_patch_from_a_run_is_saved_as_its_tensor(tmp_path: Path) -> None:
    m = model("llama")
    source = m.run(one(rows(9, seed=4)[0]), record=[SITE])
    plan = Plan([Edit(SITE, uh.patch(source))])
    again = Plan.load(plan.save(tmp_path / "p"))
    assert torch.equal(m.run(PROMPT, edits=again).logits, m.run(PROMPT, edits=plan).logits)


def test_what_is_no_data_cannot_be_saved(tmp_path: Path) -> None:
    m = model("llama")
    source = m.run(PROMPT, record=["resid_post"])
    unsaved = [
        Edit(SITE, uh.call(torch.tanh)),
        Edit("resid_post", uh.patch(source)),
        Edit("resid_post", uh.swap_subspace(V, source)),
    ]
    for edit in unsaved:
        with pytest.raises(PlanError, match="cannot be saved") as caught:
            Plan([Edit(SITE, uh.zero()), edit]).save(tmp_path / "p")
        assert "function" in str(caught.value)
    assert not list(tmp_path.iterdir())  # nothing half-written


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A plan with tensors, on disk."""
    gate = Gate("resid_post.0", W, threshold=0.0)
    plan = Plan([Edit(SITE, uh.add(V), gate=gate)], model=model("llama").identity())
    return plan.save(tmp_path / "p")


def change(path: Path, edit: Any) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def refused(path: Path) -> PlanError:
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    error = caught.value
    assert error.given and error.do, str(error)
    return error


def test_damaged_files(saved: Path) -> None:
    whole = saved.read_text()
    for cut in (0, 1, len(whole) // 2, len(whole) - 2):
        saved.write_text(whole[:cut])
        assert "truncated or not JSON" in str(refused(saved))
    saved.write_bytes(b"\xff\xfe\x00")
    refused(saved)
    for other in ("[]", "3", '"plan/1"', "{}", '{"schema": "result/1"}', '{"schema": "plan/x"}'):
        saved.write_text(other)
        assert "another kind" in str(refused(saved))
    saved.write_text('{"schema": "plan/2", "edits": []}')
    assert "newer version" in str(refused(saved)) and "update underhood" in str(refused(saved))
    saved.unlink()
    assert "there is no file" in str(refused(saved))


def test_missing_parts(saved: Path) -> None:
    whole = saved.read_text()
    breaks = [
        lambda d: d.pop("edits"),
        lambda d: d["edits"][0].pop("site"),
        lambda d: d["edits"][0].pop("op"),
        lambda d: d["edits"][0]["op"].pop("name"),
        lambda d: d["edits"][0]["op"].update(name="ad"),
        lambda d: d["edits"][0]["op"].update(name="zero", volume=11),
        lambda d: d["edits"][0].pop("index"),
        lambda d: d["edits"][0].update(index=5),
        lambda d: d["edits"][0]["where"].update(place=3),
        lambda d: d["edits"][0]["where"].update(phase="later"),
        lambda d: d["edits"][0].update(site="resid_pots.1"),
        lambda d: d["edits"][0]["gate"].update(lag=7),
        lambda d: d["edits"][0]["gate"].pop("site"),
        lambda d: d["edits"][0].update(strength="much"),
        lambda d: d.update(edits={"a": 1}),
        lambda d: d.update(edits=[3]),
        lambda d: d.update(model="gpt2"),
    ]
    for i, edit in enumerate(breaks):
        saved.write_text(whole)
        change(saved, edit)
        with pytest.raises(UsageError) as caught:  # a bad site or phase keeps its own type
            Plan.load(saved)
        assert caught.value.do, (i, str(caught.value))


def test_missing_tensors(saved: Path) -> None:
    beside = saved.with_suffix(".safetensors")
    tensors, whole = load_file(beside), beside.read_bytes()
    for keep in ("0.vector", "0.gate"):  # a plan without its gate would act everywhere
        save_file({keep: tensors[keep]}, beside)
        refused(saved)
    beside.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in str(refused(saved))
    beside.unlink()
    assert "missing" in str(refused(saved))
    change(saved, lambda d: d.update(tensors=None))
    refused(saved)


def test_a_plan_for_another_model(saved: Path) -> None:
    plan = Plan.load(saved)
    model("llama").run(PROMPT, edits=plan)
    for other in ("gpt2", "mistral"):
        with pytest.raises(PlanError, match="another model") as caught:
            model(other).run(PROMPT, edits=plan)
        assert "random/llama" in str(caught.value)
    model("mistral").run(PROMPT, edits=Plan(plan.edits))  # without an origin it is just edits


def test_a_plan_holds_edits() -> None:
    with untyped(), pytest.raises(UsageError, match="holds edits"):
        Plan([SITE])  # type: ignore[list-item]
    plan = Plan(Edit(SITE, uh.zero()))
    assert len(plan) == 1 and plan[0].site == Site("resid_post", 1) and "zero" in repr(plan)


def test_an_interrupted_save_leaves_what_was_there(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_text()

    def broken(*_: object, **__: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr("underhood.core.files.json.dumps", broken)
    with pytest.raises(OSError, match="disk full"):
        Plan([Edit(SITE, uh.zero())]).save(saved)
    assert saved.read_text() == before and len(Plan.load(saved)) == 1
