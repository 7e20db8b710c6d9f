"""Refusals: typed, before the forward, in four parts, and nothing is half-changed afterwards."""

import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import hooks, inputs, model, one, padded, rows, untyped, vector
from torch import Tensor, nn

import underhood as uh
from underhood.core import errors
from underhood.core.edit import Edit
from underhood.core.errors import (
    AnswerError,
    EmptyPrompt,
    FileProblem,
    ModelNotFound,
    NotFinite,
    NotOffered,
    OutOfRange,
    PaddingError,
    PromptTooLong,
    ShapeMismatch,
    SiteNotFound,
    UnderhoodError,
    UntrustedCode,
    UsageError,
)
from underhood.core.offers import REASONS
from underhood.core.site import KINDS, Site
from underhood.core.tokens import Tokens
from underhood.loader import load
from underhood.organisms.tiny import FAMILIES, tiny

PROMPT = one(rows(9)[0])

FOUND: dict[str, tuple[str, str]] = {
    "no-attention": ("mamba", "pattern.0"),
    "no-cross": ("llama", "cross_pattern.0"),
    "parallel": ("gpt_neox", "resid_mid.1"),
    "post-norm": ("bert", "ln1.0"),
    "latent-keys": ("deepseek_v3", "q.0"),
    "late-norm": ("hunyuan_v1_dense", "k.1"),
    "odd-attention": ("jetmoe", "z.0"),
    "unknown-sum": ("minimax", "mlp_out.1"),
    "fused-qkv": ("bloom", "v.1"),
    "no-interface": ("gptj", "q_rot.0"),
    "no-mlp": ("mamba", "mlp_post.0"),
    "experts": ("mixtral", "mlp_post.0"),
    "not-gated": ("gpt2", "mlp_gate.0"),
    "no-experts": ("llama", "router_logits.0"),
    "no-scan": ("jamba", "ssm_x.1"),
    "no-pos-embed": ("llama", "pos_embed"),
    "no-embed": ("vit", "embed"),
    "no-final-norm": ("bert", "ln_final"),
    "no-logits": ("clip", "logits"),
}
"""For each row of the table one family and site that meets it."""
CONSTRUCTED = {"no-expert-interface", "no-heads", "no-mid"}
"""Rows that no family of ours meets; models made to meet them are below."""


def four_parts(error: UnderhoodError) -> str:
    """What happened, what was given, why, what to do: each there and on its own line."""
    text = str(error)
    for label, part in (("Given:", error.given), ("Because:", error.why), ("Instead:", error.do)):
        assert part is not None and str(part).strip(), f"no {label} in\n{text}"
        assert f"  {label}" in text
    assert error.what and "\n" not in error.what
    assert "None" not in text, text
    return text


def refused(kind: type[UnderhoodError], call: Callable[[], Any]) -> UnderhoodError:
    """The refusal of a call; of this type, with something to do instead."""
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert error.do, f"says not what to do:\n{error}"
    assert error.given is not None, f"says not what was given:\n{error}"
    return error


# The table ---------------------------------------------------------------------------------------


def test_every_row_is_met() -> None:
    assert set(FOUND) | CONSTRUCTED == set(REASONS)


@pytest.mark.parametrize("code", [*FOUND])
def test_rows_of_the_table(code: str) -> None:
    family, site = FOUND[code]
    m = model(family)
    assert (
        m.known.why_not(Site.parse(site) if m.main != "dec" else Site.parse(f"dec.{site}")) == code
    )
    for call in (lambda: m.resolve(site), lambda: m.run(inputs(family), record=site),
                 lambda: m.run(inputs(family), edits=Edit(site, uh.scale(1.0)))):  # fmt: skip
        error = refused(NotOffered, call)
        text = four_parts(error)
        assert REASONS[code].what in text and REASONS[code].instead in text and site in text
        assert isinstance(error, NotImplementedError)
    assert not m.offers(site)


def test_rows_met_by_no_family() -> None:
    """An attention whose heads are not known, a router alone, a block of unknown names."""
    met = set()
    for family, change in (("bloom", {"heads": None}), ("gptj", {"o_proj": None})):
        m = uh.load(f"random/{family}")
        spec = m.anatomy.stacks[""].blocks[0].attention
        assert spec is not None
        for name, value in change.items():
            object.__setattr__(spec, name, value)
        met.add(m.known.why_not(Site("head_out", 0)))
        four_parts(refused(NotOffered, lambda m=m: m.resolve("head_out.0")))
    m = uh.load("random/mixtral")
    experts = m.anatomy.stacks[""].blocks[0].experts
    object.__setattr__(experts, "experts", None)
    met.add(m.known.why_not(Site("expert_out", 0)))
    m = uh.load("random/olmo")
    m.anatomy.stacks[""].blocks[1].points.pop("resid_mid")
    met.add(m.known.why_not(Site("resid_mid", 1)))
    assert met == CONSTRUCTED


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_is_not_offered_has_a_row(family: str) -> None:
    """Every name in every layer of every family: offered, or refused by a row that fits."""
    m = uh.load(f"random/{family}")
    for stack, tower in m.anatomy.stacks.items():
        for name, kind in KINDS.items():
            for layer in range(len(tower.blocks)) if kind.layered else [None]:
                code = m.known.why_not(Site(name, layer, stack=stack if name != "logits" else ""))
                assert code is None or code in REASONS, (family, stack, name, layer)
    if not m.anatomy.stacks:
        error = refused(NotOffered, lambda: m.resolve("resid_post.0"))
        assert "module:" in four_parts(error)


def test_every_error_has_a_builtin_and_an_exit_code() -> None:
    kinds = [
        k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, UnderhoodError)
    ]
    for kind in kinds:
        assert kind.__doc__ and kind.exit_code in (1, 2, 3)
        if kind is not UnderhoodError:
            bases = {b for b in kind.__mro__ if b.__module__ == "builtins"}
            assert bases - {object, Exception, BaseException}, kind
        text = str(kind("it broke", given=3, why="so", do="that"))
        assert text.splitlines() == ["it broke", "  Given:   3", "  Because: so", "  Instead: that"]
        pickle.loads(pickle.dumps(kind("it broke", given=3, why="so", do="that")))


# Sites and places --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "kind", "says"),
    [
        ("resid_pots.1", SiteNotFound, "resid_post"),
        ("module:model.layers.1.mpl", SiteNotFound, "model.layers.1.mlp"),
        ("module:model.layers.1.mlp.3", SiteNotFound, "no units"),
        ("module_in:model.layers.1.self_attn.o_proj.0", SiteNotFound, "no units"),
        ("module:model.layers.7", SiteNotFound, "model.layers.0"),
        ("enc.resid_post.1", SiteNotFound, "no stack 'enc'"),
        ("resid_post.3", OutOfRange, "0 to 2"),
        ("z.1.4", OutOfRange, "0 to 3"),
        ("v.1.2", OutOfRange, "0 to 1"),
        ("mlp_post.0.48", OutOfRange, "0 to 47"),
        ("resid_post.0.32", OutOfRange, "0 to 31"),
        ("nothing*", OutOfRange, "sites()"),
        ("logits.99", OutOfRange, "0 to 98"),
    ],
)
def test_places_that_are_not_there(site: str, kind: type[UnderhoodError], says: str) -> None:
    m = model("llama")
    assert says in str(refused(kind, lambda: m.run(PROMPT, record=site)))
    if "*" not in site:
        assert says in str(refused(kind, lambda: m.run(PROMPT, edits=Edit(site, uh.zero()))))
        assert says in str(refused(kind, lambda: m.generate(PROMPT, edits=Edit(site, uh.zero()))))


def test_a_stack_must_be_said() -> None:
    m = model("t5")
    error = refused(SiteNotFound, lambda: m.resolve("resid_post.1"))
    assert "enc.resid_post.1" in str(error) and "dec.resid_post.1" in str(error)


def test_what_cannot_be_written() -> None:
    for site in ("router_index.0", "router_weights.0", "ssm_state.0"):
        assert "read, not written" in str(refused(UsageError, lambda s=site: Edit(s, uh.zero())))
    assert "router_logits" in str(refused(UsageError, lambda: Edit(SITE, uh.route(forbid=1))))
    assert "scores" in str(refused(UsageError, lambda: Edit("pattern.0", uh.attend(block=1))))
    refused(UsageError, lambda: Edit(SITE, uh.zero(), unit="sigma", sigma=1.0))
    refused(UsageError, lambda: Edit(SITE, uh.add(vector(32)), unit="sigma"))
    assert "raw" in str(refused(UsageError, lambda: Edit(SITE, uh.add(vector(32)), unit="std")))


# Prompts -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def town() -> Any:
    """The built-in model."""
    return uh.load()


def test_prompts(town: Any) -> None:
    for empty in ("", [], ["Paris", ""]):
        refused(EmptyPrompt, lambda p=empty: town.run(p))
    refused(EmptyPrompt, lambda: town.run(torch.zeros(1, 0, dtype=torch.long)))
    long = " ".join(["Paris"] * (town.text.context + 1))
    assert str(town.text.context) in four_parts(refused(PromptTooLong, lambda: town.run(long)))
    four_parts(
        refused(PromptTooLong, lambda: town.generate("The capital of", max_new_tokens=10**4))
    )
    assert "one token" in four_parts(refused(AnswerError, lambda: town.token_id("Paris Rome")))
    assert "unknown" in four_parts(refused(AnswerError, lambda: town.token_id(" Xyzzyx")))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ids(family: str) -> None:
    """The same refusals for ids, however they come; learned positions would crash, rotary go on."""
    m, mask = model(family), torch.ones(1, 65, dtype=torch.bool)
    long = torch.full((1, 65), 9)
    for given in (long, Tokens(long, mask), {"input_ids": long}):
        four_parts(refused(PromptTooLong, lambda g=given: m.run(g)))
    for wrong, says in ((torch.tensor([[9, 99]]), "99"), (torch.tensor([[9, -1]]), "-1")):
        for given in (wrong, {"input_ids": wrong}):
            assert says in four_parts(refused(OutOfRange, lambda g=given: m.run(g)))
    refused(ShapeMismatch, lambda: m.run({"input_ids": PROMPT, "attention_mask": torch.ones(1, 4)}))
    refused(NotOffered, lambda: m.run("text, and no tokenizer"))
    refused(PromptTooLong, lambda: m.generate(PROMPT, max_new_tokens=57))
    assert m.generate(PROMPT, max_new_tokens=56, min_new_tokens=56).ids.shape == (1, 56)


def test_padding(town: Any) -> None:
    no_pad = uh.load(town.module, town.tokenizer)
    no_pad.text.pad_id = None
    uneven = ["The capital of France is", "The capital of"]
    error = refused(PaddingError, lambda: no_pad.run(uneven))
    assert "pad_token" in str(error) and "lengths" in str(error)
    no_pad.run([uneven[0], uneven[0]])  # even prompts need none
    ids = town.tokens(uneven).ids
    assert "mask" in four_parts(refused(PaddingError, lambda: town.run(ids)))
    four_parts(refused(PaddingError, lambda: town.run({"input_ids": ids})))
    mask = town.tokens(uneven).mask
    a = town.run({"input_ids": ids, "attention_mask": mask.long()})
    assert torch.equal(a.last_logits, town.run(uneven).last_logits)
    refused(UsageError, lambda: uh.load(pad_token="<nonsense>"))
    for family in ("rwkv", "recurrent_gemma"):
        four_parts(refused(PaddingError, lambda f=family: model(f).run(padded(rows(5, 9), "left"))))


def test_generation() -> None:
    refused(NotOffered, lambda: model("vit").generate(PROMPT))
    refused(NotOffered, lambda: model("rwkv").generate(padded(rows(5, 5))))
    refused(UsageError, lambda: model("llama").generate(PROMPT, num_beams=2, record="resid_post"))


# Numbers -----------------------------------------------------------------------------------------

SITE = "resid_post.1"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers(value: float) -> None:
    m = model("llama")
    edit = Edit(SITE, uh.set_to(value), 3)
    error = refused(NotFinite, lambda: m.run(PROMPT, edits=edit, record=["resid_post"]))
    assert "resid_post.1" in str(error)
    for options in ({}, {"do_sample": True, "seed": 0}):
        refused(NotFinite, lambda o=options: m.generate(PROMPT, edits=edit, max_new_tokens=3, **o))
    assert torch.isfinite(m.run(PROMPT).logits).all()


def test_a_weight_that_is_no_number() -> None:
    module = tiny("gpt2").module
    with torch.no_grad():
        module.get_parameter("transformer.h.1.mlp.c_proj.bias")[3] = float("nan")
    m = uh.load(module)
    error = refused(NotFinite, lambda: m.run(PROMPT, record=["resid_post", "mlp_out"]))
    assert "mlp_out.1" in four_parts(error) or "resid_post.1" in four_parts(error)
    four_parts(refused(NotFinite, lambda: m.run(PROMPT)))
    refused(NotFinite, lambda: m.generate(PROMPT, max_new_tokens=2))


WRONG_TENSORS: dict[str, Callable[[], Any]] = {
    "too wide": lambda: Edit(SITE, uh.add(vector(33))),
    "a head's width at the stream": lambda: Edit(SITE, uh.add(vector(8))),
    "the stream's width at a head": lambda: Edit("z.1.0", uh.add(vector(32))),
    "wrong set": lambda: Edit("z.1.0", uh.set_to(vector(7))),
    "wrong project": lambda: Edit("k.1", uh.project_out(vector(32))),
    "wrong affine": lambda: Edit("q.1.0", uh.affine(torch.ones(8, 9), torch.ones(9))),
    "wrong clamp": lambda: Edit(
        "z.1", uh.clamp_feature(encoder=vector(32), decoder=vector(32), value=1.0)),
    "wrong patch": lambda: Edit(SITE, uh.patch(torch.ones(1, 9, 31))),
    "patch of other rows": lambda: Edit(SITE, uh.patch(torch.ones(5, 9, 32))),
    "unit of norm": lambda: Edit("z.1.0", uh.add(vector(32)), unit="norm"),
    "a batch of vectors": lambda: Edit(SITE, uh.add(torch.ones(3, 1, 9, 32))),
    "wrong function": lambda: Edit(SITE, uh.call(lambda h: h[:, :3])),
    "another device": lambda: Edit(SITE, uh.add(vector(32).to("meta"))),
    "another device, scaled": lambda: Edit(SITE, uh.add(vector(32).to("meta")), unit="norm"),
    "ints": lambda: Edit(SITE, uh.add(torch.ones(32, dtype=torch.long))),
    "bools": lambda: Edit(SITE, uh.set_to(torch.ones(32, dtype=torch.bool))),
}  # fmt: skip


@pytest.mark.parametrize("case", [*WRONG_TENSORS])
def test_tensors_that_do_not_fit(case: str) -> None:
    m = model("llama")
    error = refused(ShapeMismatch, lambda: m.run(PROMPT, edits=WRONG_TENSORS[case]()))
    assert "\n  Given:" in str(error)
    if case.startswith("another device"):
        assert "plan.to('cpu')" in str(error) and "meta" in str(error)


def test_plans_move_between_devices() -> None:
    edit = Edit(SITE, uh.add(vector(32)), gate=uh.Gate("resid_post.0", vector(32)))
    moved: Edit = uh.Plan([edit]).to("meta")[0]
    assert moved.op.tensors()["vector"].device.type == "meta"
    assert moved.gate is not None and moved.gate.direction.device.type == "meta"


def test_a_run_says_what_it_lacks() -> None:
    m = model("llama")
    run = m.run(PROMPT, record=["resid_post.1"], at=-1)
    assert "record=['z.1']" in str(refused(SiteNotFound, lambda: run["z.1"]))
    refused(SiteNotFound, lambda: run["resid_post", 2])
    assert "without `at`" in str(refused(UsageError, lambda: run.aligned("resid_post.1")))
    refused(UsageError, lambda: m.run(PROMPT, edits=Edit("resid_post.1", uh.patch(run))))
    refused(SiteNotFound, lambda: Edit("z.1", uh.patch(run)))
    refused(UsageError, lambda: model("clip").run(inputs("clip")).logits)


# Files -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model to damage."""
    module: Any = tiny("gpt2").module
    module.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def lfs(folder: Path) -> None:
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


FOLDERS: dict[str, tuple[Callable[[Path], Any], type[UnderhoodError], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), FileProblem, "no config.json"),
    "broken config": (
        lambda f: (f / "config.json").write_text('{"a": '), FileProblem, "cannot be read"),
    "config of a list": (
        lambda f: (f / "config.json").write_text("[1]"), FileProblem, "config.json"),
    "unknown type": (lambda f: change_config(f, model_type="gpt9"), FileProblem, "gpt9"),
    "no type": (lambda f: (f / "config.json").write_text("{}"), FileProblem, "cannot be loaded"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileProblem, "no weights"),
    "pointer": (lfs, FileProblem, "git lfs pull"),
    "cut weights": (cut, FileProblem, "cannot be loaded"),
    "own code": (
        lambda f: change_config(f, auto_map={"AutoModel": "evil.Model"}), UntrustedCode,
        "trust_remote_code"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*FOLDERS])
def test_damaged_folders(folder: Path, case: str) -> None:
    damage, kind, says = FOLDERS[case]
    damage(folder)
    error = refused(kind, lambda: load(folder))
    assert says in str(error) and str(folder) in str(error)


def test_missing_tensors_are_not_made_up(folder: Path) -> None:
    """Transformers would fill them with random numbers and warn."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = four_parts(refused(FileProblem, lambda: load(folder)))
    assert "transformer.h.1.mlp.c_fc.weight" in text and "random" in text


def test_code_of_a_folder_does_not_run(folder: Path) -> None:
    mark = folder / "it_ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    change_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.C"})
    refused(UntrustedCode, lambda: load(folder))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}})
    )
    refused(UntrustedCode, lambda: load(folder))
    assert not mark.exists()


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_a_pickle_of_code_does_not_run(folder: Path) -> None:
    """Weights as a pickle: tensors are read, anything else is refused, and nothing is executed."""
    weights = tiny("gpt2").module.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert load(folder).fingerprint == model("gpt2").fingerprint
    mark = folder / "it_ran"
    torch.save(weights | {"x": Payload(mark)}, folder / "pytorch_model.bin")
    error = refused(FileProblem, lambda: load(folder))
    assert not mark.exists()
    assert "safetensors" in str(error) or "weights" in str(error)


def test_no_such_model(folder: Path) -> None:
    from huggingface_hub import constants

    start = time.monotonic()
    error = refused(ModelNotFound, lambda: load("gpt-2-smal"))
    assert constants.HF_HUB_CACHE in four_parts(error) and "built-in" in str(error)
    for path in ("./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", str(folder / "missing")):
        assert "folder" in str(refused(ModelNotFound, lambda p=path: load(p)))
    assert time.monotonic() - start < 20, "refusing took as long as trying the network"
    assert "llama" in str(refused(ModelNotFound, lambda: load("random/lama")))


def test_wrong_options(folder: Path) -> None:
    refused(UsageError, lambda: load(folder, dtype="float17"))
    with untyped():
        refused(UsageError, lambda: load(3))  # type: ignore[arg-type]


# Nothing half-changed ----------------------------------------------------------------------------


def test_refusals_come_before_the_forward() -> None:
    """However a request is wrong, the model does not run."""
    module: Any = tiny("llama").module
    m = uh.load(module)
    ran = []
    handle = module.register_forward_pre_hook(lambda *_: ran.append(1))
    good = Edit("resid_post.0", uh.zero())
    wrong: list[Callable[[], Any]] = [
        lambda: m.run(PROMPT, record="z.9"),
        lambda: m.run(PROMPT, record="patern.0"),
        lambda: m.run(PROMPT, record="resid_post", at=9),
        lambda: m.run(PROMPT, edits=[good, Edit("z.0.9", uh.zero())]),
        lambda: m.run(PROMPT, edits=[good, Edit(SITE, uh.add(vector(3)))]),
        lambda: m.run(PROMPT, edits=[good, Edit(SITE, uh.zero(), -10)]),
        lambda: m.run(PROMPT, edits=[good, Edit(SITE, uh.zero(), uh.Where(rows=1))]),
        lambda: m.run(PROMPT, edits=[good, Edit("scores.0", uh.attend(block=10))]),
        lambda: m.run(PROMPT, edits=[good, Edit("ssm_x.0", uh.zero())]),
        lambda: m.run(torch.tensor([[9, 1000]]), edits=good),
        lambda: m.generate(PROMPT, edits=good, num_beams=4),
        lambda: m.generate(PROMPT, edits=good, max_new_tokens=1000),
    ]
    try:
        for i, call in enumerate(wrong):
            with pytest.raises(UnderhoodError):
                call()
            assert not ran, f"case {i} ran the model"
        m.run(PROMPT, edits=good)
        assert ran
    finally:
        handle.remove()
    assert hooks(module) == hooks(tiny("llama").module) or hooks(module) >= 0


class Unknown(nn.Module):
    """A network with names that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def test_a_network_nobody_knows() -> None:
    m = uh.load(Unknown())
    assert m.sites() == [] and m.n_layers == 0
    assert "module:first" in four_parts(
        refused(NotOffered, lambda: m.run(torch.ones(1, 4), record="z.0"))
    )
    refused(SiteNotFound, lambda: m.run(torch.ones(1, 4), record="module:frist"))
    refused(NotOffered, lambda: m.generate(PROMPT))
    refused(NotOffered, lambda: m.unembed(torch.ones(4)))
