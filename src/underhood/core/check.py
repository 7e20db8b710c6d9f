"""The self-check: prove, on the running model, that sites mean what their names say.

Each row is one law that must hold in every family: recording changes nothing, sub-layers add up to
the stream, a pattern times values is z, writing back what was read changes nothing, an edit changes
something, a batch is its rows, a cache is a full pass. A law that a model cannot state (a Mamba has
no pattern) is "not offered", with the reason; everything else is "ok" or "failed", with the largest
error. `docs/coverage.md` is this table for every family.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from underhood.core.errors import NotOffered, SelfCheckFailed, UnderhoodError, UsageError
from underhood.core.laws import LAWS, TOLERANCE, Bench, NotHere, blocks_of, count_hooks, output_of
from underhood.core.offers import REASONS
from underhood.core.run import Run
from underhood.core.site import Site

if TYPE_CHECKING:
    from underhood.core.model import Inputs, Model

__all__ = ["LAWS", "CheckReport", "CheckRow", "check"]

Status = Literal["ok", "failed", "not offered"]


@dataclass(frozen=True, slots=True)
class CheckRow:
    """One law: whether it holds, by how much it is missed (relative), and why it is not offered."""

    name: str
    status: Status
    value: float | None = None
    reason: str = ""


@dataclass(slots=True)
class CheckReport:
    """All laws of one model."""

    model: str
    rows: list[CheckRow] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no law failed."""
        return all(row.status != "failed" for row in self.rows)

    def need(self) -> "CheckReport":
        """Itself, or an error that names what failed.

        Raises:
            SelfCheckFailed: Some law failed.
        """
        failed = [f"{r.name} ({r.value if r.value is not None else r.reason})" for r in self.rows
                  if r.status == "failed"]  # fmt: skip
        if failed:
            raise SelfCheckFailed(
                f"{self.model} does not pass its self-check",
                given="; ".join(failed),
                why="some site does not mean here what its name says",
                do="use module: sites for this model, and report the family",
            )
        return self

    def __str__(self) -> str:
        width = max(len(r.name) for r in self.rows)
        lines = []
        for row in self.rows:
            note = f"{row.value:.1e}" if row.value is not None else row.reason
            lines.append(f"{row.name:<{width}}  {row.status:<11}  {note}")
        return "\n".join([self.model, *lines])


def check(model: "Model", inputs: "Inputs | None" = None) -> CheckReport:
    """Run every law on a model.

    Args:
        model: The model.
        inputs: Something it can run on; random token ids when it reads text.

    Returns:
        One row per law; `.ok`, `.need()`.

    Cost: about two forwards per writable site of each kind of layer (some 60 on a Llama), short
    inputs.
    """
    given = _default_inputs(model) if inputs is None else inputs
    bare = output_of(model.run(given))
    hooks = count_hooks(model)  # after the first pass: transformers installs some of its own in it
    record: list[str | Site] = [*model.sites(), *_projections(model)]
    run = model.run(given, record=record if model.anatomy.stacks else _some_modules(model, given))
    run.provenance["hooks"] = hooks
    bench = Bench(model, given, bare, run, _layer_sites(model, run))
    report = CheckReport(model.name)
    for name, law in LAWS.items():
        report.rows.append(_row(name, law, bench))
    return report


def _row(name: str, law: Callable[[Bench], float | None], bench: Bench) -> CheckRow:
    try:
        value = law(bench)
    except NotHere as reason:
        code = str(reason)
        return CheckRow(name, "not offered", None, REASONS[code].why if code in REASONS else code)
    except SelfCheckFailed as error:
        return CheckRow(name, "failed", None, f"{error.what}: {error.given}")
    except (NotOffered, UsageError) as error:
        return CheckRow(name, "not offered", None, error.why or error.what)
    except UnderhoodError as error:
        return CheckRow(name, "failed", None, f"{error.what}: {error.given}")
    return CheckRow(name, "ok" if value is None or value <= TOLERANCE else "failed", value)


def _default_inputs(model: "Model") -> "Inputs":
    make = torch.Generator().manual_seed(0)
    config: Any = model.config
    if {"sample", "timestep"} <= model.forward_names:  # a diffusers U-Net
        shape = (2, config.in_channels, config.sample_size, config.sample_size)
        return {"sample": torch.randn(shape, generator=make), "timestep": torch.tensor([10, 600])}
    if getattr(model.module, "main_input_name", "") == "pixel_values":
        side = getattr(config, "image_size", None) or 32
        shape = (2, getattr(config, "num_channels", 3), side, side)
        return {"pixel_values": torch.rand(shape, generator=make)}
    vocab = getattr(getattr(config, "text_config", None) or config, "vocab_size", None)
    if vocab is None or model.main not in ("", "text"):
        raise UsageError(
            "the self-check needs something to run on",
            given=repr(model),
            why="this model does not read text alone",
            do="pass its inputs: model.check({'pixel_values': ...})",
        )
    length = min(9, model.text.context or 9)
    words = torch.randint(min(5, vocab - 1), vocab, (2, length), generator=make)
    places = getattr(config, "image_seq_length", None)
    if not places or not model.offers("vision.resid_pre.0"):
        return {"input_ids": words}
    # A picture before the words, as LLaVA reads one.
    words = words.masked_fill(words == config.image_token_index, 0)
    picture, eye = torch.full((2, places), config.image_token_index), config.vision_config
    pixels = torch.rand((2, eye.num_channels, eye.image_size, eye.image_size), generator=make)
    ids = torch.cat([words[:, :1], picture, words[:, 1:]], 1)
    return {"input_ids": ids, "pixel_values": pixels}


def _projections(model: "Model") -> list[Site]:
    """The output projections' own outputs, to hold the heads' sum against."""
    paths = [
        spec.o_proj
        for _, _, block in blocks_of(model)
        for spec in (block.attention, block.cross)
        if spec is not None and spec.o_proj is not None
    ]
    return [Site("module", path=p) for p in dict.fromkeys(paths)]


def _some_modules(model: "Model", inputs: Any) -> list[str | Site]:
    """For plain modules: the output of every leaf that has parameters and is called."""
    leaves = {
        name: m
        for name, m in model.module.named_modules()
        if name and not list(m.children()) and list(m.parameters())
    }
    called: set[str] = set()
    hooks = [
        m.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, m in leaves.items()
    ]
    try:
        model.run(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [Site("module", path=name) for name in leaves if name in called]


def _layer_sites(model: "Model", run: Run) -> list[Site]:
    """Sites to edit: all of one layer per kind of layer, and those without a layer."""
    if not model.anatomy.stacks:
        return [s for s in run.sites if run[s].is_floating_point()][:4]
    chosen = _kinds_of_layers(model)
    return [
        s for s in model.sites()
        if s.layer is None or (s.stack, s.layer) in chosen
    ]  # fmt: skip


def _kinds_of_layers(model: "Model") -> list[tuple[str, int]]:
    """One layer of each kind (by what it offers), the last of its kind but not the model's last."""
    found: dict[tuple[str, tuple[str, ...]], tuple[str, int]] = {}
    offered: dict[tuple[str, int], list[str]] = {}
    for site in model.sites():
        if site.layer is not None:
            offered.setdefault((site.stack, site.layer), []).append(site.name)
    for (stack, layer), names in offered.items():
        last = layer == len(model.anatomy.stacks[stack].blocks) - 1
        key = (stack, tuple(names))
        if key not in found or not last:
            found[key] = (stack, layer)
    return list(found.values())
