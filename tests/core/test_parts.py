"""Readers and writers: a head's columns are the head's own, what parts write sums to the stream."""

import pytest
import torch

import underhood as uh
from underhood.core.parts import readers, writers

SPLIT = (
    "gpt2", "gpt_neox", "gptj", "gpt_neo", "opt", "llama", "mistral", "mixtral", "qwen2", "qwen3",
    "gemma", "gemma2", "gemma3", "gpt_oss", "olmo", "olmo2", "olmoe", "phi", "phi3", "stablelm",
    "starcoder2", "cohere", "granite", "glm4", "smollm3", "nemotron", "persimmon",
)  # fmt: skip
FUSED = ("gpt2", "gpt_neox", "phi3", "persimmon")


@pytest.mark.parametrize("family", SPLIT)
def test_the_columns_of_a_head_are_its_values(family: str) -> None:
    """What the projection makes in these columns is what attention uses as the head's values."""
    model = uh.load(f"random/{family}")
    ids = torch.arange(8, 16)[None]
    found = [r for r in readers(model) if r.kind in "qkv"]
    assert len(found) == 3 * model.n_layers
    record = [*{f"module:{r.module}" for r in found}, "v", "q", "k"]
    clip = getattr(model.config, "clip_qkv", None)
    run = model.run(ids, record=record)
    for reader in found:
        spec = model.anatomy.stacks[""].blocks[reader.layer].attention
        assert spec is not None
        if reader.kind != "v" and f"{reader.kind}_norm" in spec.projections:
            continue  # a norm stands between projection and head
        made = run[f"module:{reader.module}"]
        used = run[f"{reader.kind}.{reader.layer}"]
        columns = torch.tensor(reader.columns)
        mine = made[..., columns]
        if clip is not None:
            mine = mine.clamp(-clip, clip)
        if family == "opt" and reader.kind == "q":
            mine = mine * mine.shape[-1] ** -0.5  # OPT scales its queries, not the scores
        torch.testing.assert_close(mine.view(used.shape), used, atol=1e-5, rtol=1e-4)
        assert len({c for row in reader.columns for c in row}) == columns.numel()


def test_all_layouts_of_fused_projections_are_tested():
    fused = {f for f in SPLIT if len({r.module for r in readers(uh.load(f"random/{f}"))
                                      if r.layer == 0 and r.module}) == 1}  # fmt: skip
    assert fused == set(FUSED)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "granite", "phi", "mamba", "jamba"])
def test_what_is_written_sums_to_the_stream(family):
    from underhood.circuits import Wiring

    model = uh.load(f"random/{family}")
    tokens = model.text.of_ids(torch.arange(8, 16)[None], None)
    wiring = Wiring(model)
    now = wiring.writes(tokens)
    total = sum(
        wiring.additive(i, v).sum(2) for i, v in enumerate(now.values)
    )  # biases of output projections belong to no part
    last = model.run(tokens, record="resid_post")["resid_post", model.n_layers - 1]
    biases = sum(
        (b * w.scale if w.norm is None else 0)
        for w in writers(model)
        if w.kind == "heads"
        and (b := getattr(model.module.get_submodule(w.o_proj), "bias", None)) is not None
    )
    torch.testing.assert_close(total + biases, last, atol=1e-4, rtol=1e-4)


def test_a_norm_that_does_nothing_has_a_form() -> None:
    """Wired models put `nn.Identity` where a norm was; every law still holds."""
    model = uh.load("random/gpt2")
    for layer in range(model.n_layers):
        block = model.module.get_submodule(f"transformer.h.{layer}")
        setattr(block, "ln_1", torch.nn.Identity())  # noqa: B010
        setattr(block, "ln_2", torch.nn.Identity())  # noqa: B010
    again = uh.load(model.module)
    assert again.check(torch.arange(8, 16)[None]).ok
    scale = again.run(torch.arange(8, 16)[None], record="ln1_scale.1")["ln1_scale.1"]
    assert bool((scale == 1).all())
