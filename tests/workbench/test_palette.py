"""The palette and the forms are the code's own signatures; nothing is written by hand twice."""

from typing import Any

import pytest
import torch

import underhood as uh
from underhood.core.errors import UnderhoodError, UsageError
from underhood.core.ops import OPS
from underhood.methods import find, names
from underhood.workbench.asking import validated
from underhood.workbench.forms import Columns, arguments, card
from underhood.workbench.models import examples, trial
from underhood.workbench.palette import EditForm, builders, make_plan, palette

PROMPT = "a b"


def no_plan(key: str) -> uh.Plan:
    raise AssertionError(f"nobody asked for the plan {key}")


def test_every_op_is_in_the_palette() -> None:
    assert set(builders()) == set(OPS)
    for op in palette()["ops"]:
        assert op["about"].endswith((".", ")")), op
        assert all(field["kind"] for field in op["fields"])


def fields_of(model: uh.Model, name: str, prompt: str) -> tuple[str, dict[str, Any]]:
    """A site and fields that fit an op."""
    ones = [1.0] + [0.0] * ((model.d_model or 0) - 1)
    fields: dict[str, dict[str, Any]] = {
        "zero": {}, "set": {"value": 0.5}, "mean": {"value": {"prompts": [prompt]}},
        "patch": {"source": {"prompt": prompt}}, "add": {"vector": {"numbers": ones}},
        "scale": {"factor": 0.5}, "project_out": {"directions": {"numbers": ones}},
        "swap_subspace": {"directions": ones, "source": prompt},
        "affine": {"weight": [2.0] * len(ones), "bias": ones},
        "clamp_feature": {"encoder": ones, "decoder": ones, "bias": 0.1, "value": 1.0},
        "route": {"forbid": [0], "shift": {"1": 2.0}}, "attend": {"block": [0]},
    }  # fmt: skip
    site = {"route": "router_logits.0", "attend": "scores.0"}.get(name, "resid_post.0")
    return site, fields[name]


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_is_made_as_in_python(model: uh.Model, name: str) -> None:
    prompt = model.text.decode([5, 6, 7])
    site, fields = fields_of(model, name, prompt)
    form = validated(EditForm, {"site": site, "op": name, "fields": fields, "strength": 0.5})
    (edit,) = make_plan(model, [form], prompt, lambda key: uh.Plan())
    assert edit.op.name == name and str(edit.site) == site and edit.strength == 0.5
    if name not in ("route",):
        model.run(prompt, edits=edit)


def test_a_recipe_is_a_difference_of_means(model: uh.Model) -> None:
    prompts = [model.text.decode([i, i + 1, i + 2]) for i in (5, 8, 11)]
    vector = {"prompts": prompts[:2], "minus": prompts[2:], "pos": 1}
    said = {"site": "resid_post.1", "op": "add", "unit": "sigma", "strength": 3.0,
            "fields": {"vector": vector}}  # fmt: skip
    (edit,) = make_plan(model, [validated(EditForm, said)], prompts[0], lambda key: uh.Plan())
    each = [model.run(p, record="resid_post.1")["resid_post.1"][0, 1] for p in prompts]
    assert torch.allclose(edit.op.tensors()["vector"], (each[0] + each[1]) / 2 - each[2], atol=1e-6)
    assert edit.sigma == pytest.approx(model.sigma("resid_post.1", prompts[0]))


def test_a_strength_in_kl_moves_the_next_token_so_far(model: uh.Model) -> None:
    said = {"site": "resid_post.1", "op": "scale", "unit": "kl", "strength": 0.25,
            "fields": {"factor": 0.0}}  # fmt: skip
    prompt = model.text.decode([5, 6, 7])
    (edit,) = make_plan(model, [validated(EditForm, said)], prompt, lambda key: uh.Plan())
    bare, edited = (model.run(prompt, edits=e).last_logits.log_softmax(-1) for e in ((), edit))
    assert float((bare.exp() * (bare - edited)).sum()) == pytest.approx(0.25, rel=0.03)


@pytest.mark.parametrize("said", [
    {"site": "resid_post.0", "op": "nothing"}, {"site": "resid_post.0", "op": "scale"},
    {"site": "resid_post.0", "op": "scale", "fields": {"factor": "much"}},
    {"site": "resid_post.0", "op": "scale", "fields": {"facto": 1}},
    {"site": "", "op": "zero"}, {"site": "module:../x", "op": "zero"},
    {"site": "z.-1", "op": "zero"},
    {"site": "resid_post", "op": "add", "fields": {"vector": {"prompts": ["x"]}}},
    {"site": "resid_post.0", "op": "add", "fields": {"vector": {}}},
    {"site": "resid_post.0", "op": "add", "fields": {"vector": {"file": "/etc/passwd"}}},
    {"site": "resid_post.0", "op": "attend", "fields": {"block": [0.5]}},
    {"site": "resid_post.0", "op": "zero", "phase": "never"},
    {"site": "resid_post.0", "op": "zero", "unit": "miles"},
    {"site": "resid_post.0", "op": "zero", "strength": float("nan")},
    {"site": "resid_post.0", "op": "route", "fields": {"shift": [1, 2]}},
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_words(model: uh.Model, said: dict[str, Any]) -> None:
    with pytest.raises(UnderhoodError) as found:
        plan = make_plan(model, [validated(EditForm, said)], PROMPT, lambda key: uh.Plan())
        model.plan(plan, lengths=None, generating=True)
    assert found.value.what


METHODS = [n for found in names().values() for n in found]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_form(name: str) -> None:
    """Typing every default of the form gives the arguments that leaving it alone gives."""
    from underhood.cli.arguments import Given

    method = find(name)
    form = card(method)
    assert form["summary"] and {s[0] for s in form["sections"]} >= {"Cost", "Source", "Misleads"}
    typed = {
        f["name"]: f["default"] for f in form["options"]
        if f["default"] and f["control"] not in ("pairs", "plan")
    }  # fmt: skip
    given = Given(["p"], ["c"] if any(d["kind"] == "pairs" for d in form["data"]) else [])
    if needed := [f["name"] for f in form["options"] if f["required"]]:
        with pytest.raises(UsageError):
            arguments(method, given, typed, no_plan)
        typed |= dict.fromkeys(needed, Columns(prompts=["q"], contrasts=["r"]))
    said = arguments(method, given, typed, no_plan)
    assert set(needed) <= set(said)
    for parameter in method.parameters:
        if parameter.option and parameter.name in typed:
            assert parameter.name in needed or said[parameter.name] == parameter.default


def test_a_probe_leaves_the_model_as_it_was(model: uh.Model) -> None:
    before = len(model.module._forward_pre_hooks)
    assert trial(model, find("logit_lens"), [])[0] is None
    assert len(model.module._forward_pre_hooks) == before
    plain = uh.load("random/mamba")
    assert "attention" in (trial(plain, find("attention"), [])[0] or "") or plain.tokenizer is None


def test_a_form_starts_with_rows_enough(model: uh.Model) -> None:
    """A method that tests on other rows than it chooses on is given several, the rest one."""
    shown = examples(model, "village")
    rows = {n: trial(model, find(n), shown)[1] for found in names().values() for n in found}
    assert rows["logit_lens"] == rows["activation_patching"] == 1
    assert min(rows["component_roles"], rows["subspace"], rows["prior_layers"]) >= 4
    assert all(example["rows"][0]["prompt"] == example["prompt"] for example in shown)
