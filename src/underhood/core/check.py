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
from torch import Tensor

from underhood.core.edit import Edit
from underhood.core.errors import NotOffered, SelfCheckFailed, UnderhoodError, UsageError
from underhood.core.offers import REASONS
from underhood.core.ops import add, call, scale
from underhood.core.run import Run
from underhood.core.site import Site
from underhood.core.taps.modules import first_tensor
from underhood.core.taps.patches import active_patches
from underhood.core.tokens import Tokens

if TYPE_CHECKING:
    from underhood.core.anatomy import Block
    from underhood.core.model import Inputs, Model

__all__ = ["LAWS", "CheckReport", "CheckRow", "check"]

TOLERANCE = 2e-5  # of the largest value involved, in float32
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


@dataclass(slots=True)
class _Bench:
    """What the laws share: the model, an input, one recorded run."""

    model: "Model"
    inputs: Any
    bare: Tensor
    run: Run
    layers: list[Site]


def _output(run: Run) -> Tensor:
    found = getattr(run.output, "logits", None)
    out = found if isinstance(found, Tensor) else first_tensor(run.output)
    assert out is not None
    return out


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    size = max(float(b.detach().abs().max()), 1e-6)
    return float((a.detach().double() - b.detach().double()).abs().max()) / size


_PLAIN = "no blocks: a plain module"


class _NotHere(Exception):
    """A law that this model cannot state."""


def _blocks(model: "Model") -> list[tuple[str, int, "Block"]]:
    return [
        (name, i, block)
        for name, stack in model.anatomy.stacks.items()
        for i, block in enumerate(stack.blocks)
    ]


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


# The laws ----------------------------------------------------------------------------------------


def _transparent(bench: _Bench) -> float:
    """Logits with every site recorded equal the bare ones, bit for bit."""
    return 0.0 if torch.equal(_output(bench.run), bench.bare) else max(
        _gap(_output(bench.run), bench.bare), 1.0
    )  # fmt: skip


def _rows_sum(bench: _Bench) -> float:
    """Pattern rows sum to one (at most one where the family has attention sinks)."""
    worst, seen = 0.0, False
    for site in bench.run.sites:
        if not site.name.endswith("pattern"):
            continue
        seen = True
        sums = bench.run[site].double().sum(-1)
        sinks = hasattr(_core(bench.model, site), "sinks")
        off = (sums - 1).clamp(min=0) if sinks else (sums - 1).abs()
        worst = max(worst, float(_real_rows(bench, site, off).max()))
    if not seen:
        raise _NotHere(_why_no_attention(bench))
    return worst


def _real_rows(bench: _Bench, site: Site, by_query: Tensor) -> Tensor:
    """Only queries that are real tokens (padding may attend to nothing)."""
    tokens = bench.run.tokens
    if (
        tokens is None
        or by_query.shape[-1] != tokens.mask.shape[1]
        or site.stack != bench.model.main
    ):
        return by_query
    return torch.where(tokens.mask[:, None, :], by_query, 0)


def _core(model: "Model", site: Site) -> Any:
    block = model.anatomy.stacks[site.stack].blocks[site.layer or 0]
    spec = block.cross if site.name.startswith("cross_") else block.attention
    return model.module.get_submodule(spec.core) if spec is not None else None


def _pattern_times_values(bench: _Bench) -> float:
    """pattern @ v = z, per head, key/value heads repeated over their group."""
    worst, seen = 0.0, False
    for site in bench.run.sites:
        if not site.name.endswith("pattern"):
            continue
        prefix = site.name.removesuffix("pattern")
        v = Site(prefix + "v", site.layer, stack=site.stack)
        z = Site(prefix + "z", site.layer, stack=site.stack)
        if v not in bench.run or z not in bench.run:
            continue
        seen = True
        pattern, values = bench.run[site], bench.run[v].transpose(1, 2)
        values = values.repeat_interleave(pattern.shape[1] // values.shape[1], 1)
        made = (pattern @ values).transpose(1, 2)
        keep = _query_mask(bench, site, made)
        worst = max(worst, _gap(made * keep, bench.run[z] * keep))
    if not seen:
        raise _NotHere(_why_no_attention(bench) if not _has_attention(bench.model) else "fused-qkv")
    return worst


def _has_attention(model: "Model") -> bool:
    return any(b.attention for _, _, b in _blocks(model))


def _query_mask(bench: _Bench, site: Site, like: Tensor) -> Tensor:
    tokens = bench.run.tokens
    if tokens is None or site.stack != bench.model.main or like.shape[1] != tokens.mask.shape[1]:
        return torch.ones(1)
    return tokens.mask[:, :, None, None].to(like.dtype)


def _adds_up(bench: _Bench) -> float:
    """resid_pre plus what each sub-layer adds gives resid_post, in the family's own form."""
    worst = 0.0
    if not bench.model.anatomy.stacks:
        raise _NotHere(_PLAIN)
    known = [row for row in _blocks(bench.model) if not row[2].unknown]
    if not known:
        raise _NotHere("unknown-sum")
    for stack, layer, block in known:
        at = _reader(bench.run, stack, layer)
        stream = at("resid_pre")
        if block.post_norms:
            for name, norm in block.post_norms:
                with torch.no_grad():
                    stream = bench.model.module.get_submodule(norm)(stream + at(name))
        else:
            for name in ("attn_out", "cross_attn_out", "mlp_out"):
                stream = stream + at(name) if name in block.points else stream
        worst = max(worst, _gap(stream, at("resid_post")))
    return worst


def _reader(run: Run, stack: str, layer: int) -> Callable[[str], Tensor]:
    return lambda name: run[Site(name, layer, stack=stack)]


def _why_no_attention(bench: _Bench) -> str:
    if any(block.odd_attention for _, _, block in _blocks(bench.model)):
        return "odd-attention"
    return "no-attention" if bench.model.anatomy.stacks else _PLAIN


def _heads_add_up(bench: _Bench) -> float:
    """What the heads write, plus the output bias, is what the output projection writes."""
    model, worst, seen = bench.model, 0.0, False
    for site in bench.run.sites:
        if site.name not in ("head_out", "cross_head_out"):
            continue
        seen = True
        block = model.anatomy.stacks[site.stack].blocks[site.layer or 0]
        spec = block.cross if site.name.startswith("cross_") else block.attention
        assert spec is not None and spec.o_proj is not None
        path = Site("module", path=spec.o_proj)
        whole = bench.run[path]
        bias = getattr(model.module.get_submodule(spec.o_proj), "bias", None)
        factor = block.points["attn_out"].scale if "attn_out" in block.points else 1.0
        made = bench.run[site].sum(2) / factor + (bias if bias is not None else 0.0)
        worst = max(worst, _gap(made, whole))
    if not seen:
        unknown = any(block.unknown for _, _, block in _blocks(model))
        raise _NotHere("unknown-sum" if unknown else _why_no_attention(bench))
    return worst


def _stream_gives_logits(bench: _Bench) -> float:
    """The final norm and the head, on the stream that leaves the last block, give the logits."""
    model = bench.model
    logits = getattr(bench.run.output, "logits", None)
    if not model.anatomy.stacks or not isinstance(logits, Tensor):
        raise _NotHere("no-logits")
    last = Site("resid_post", len(model.anatomy.stacks[model.main].blocks) - 1, stack=model.main)
    return _gap(model.unembed(bench.run[last]), logits)


def _writes_back(bench: _Bench) -> float:
    """Every writable site, written with its own value, leaves the output as it was."""
    worst = 0.0
    for site in _writable(bench):
        run = bench.model.run(bench.inputs, edits=Edit(site, scale(1.0)))
        worst = max(worst, _gap(_output(run), bench.bare))
    return worst


def _shaken(h: Tensor) -> Tensor:
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(0))
    return h + noise.to(h)


def _edits_act(bench: _Bench) -> None:
    """Halving and shifting a site changes the output, for every writable site; or else noise does.

    Noise is for what is the same everywhere, as uniform scores are: halved, they are uniform still.
    """
    idle = []
    for site in _writable(bench):
        # Not a factor alone where a norm could undo it; scores must keep their masked places.
        halve = scale(0.5) if site.name.endswith("scores") else call(lambda h: 0.5 * h.roll(1, -1))
        edits = (Edit(site, op) for op in (halve, call(_shaken)))
        runs = (bench.model.run(bench.inputs, edits=edit) for edit in edits)
        if all(torch.equal(_output(run), bench.bare) for run in runs):
            idle.append(str(site))
    if idle:
        raise SelfCheckFailed("edits without effect", given=", ".join(idle))


def _writable(bench: _Bench) -> list[Site]:
    """Sites to edit. A side tower's final norm may feed a pooled output that nobody reads."""
    main = bench.model.main
    return [
        s for s in bench.layers
        if s.kind.writable and s.name != "logits" and (s.name != "ln_final" or s.stack == main)
    ]  # fmt: skip


def _batch_is_single(padding: str) -> Callable[[_Bench], float]:
    def law(bench: _Bench) -> float:
        model = bench.model
        rows = _uneven(model, bench)
        batch = model.run(_pad(model, rows, padding))
        worst = 0.0
        for i, row in enumerate(rows):
            alone = model.run(torch.tensor([row]))
            assert batch.tokens is not None
            seen = batch.logits[i][batch.tokens.mask[i]]
            worst = max(worst, _gap(seen, alone.logits[0]))
        return worst

    return law


def _uneven(model: "Model", bench: _Bench) -> list[list[int]]:
    """Three prompts of different length, for models that are given text only."""
    if model.main == "dec" or not _is_text(bench):
        raise _NotHere("inputs are not text alone")
    vocab = int(getattr(model.config, "vocab_size", 0))
    make = torch.Generator().manual_seed(1)
    low = min(5, vocab - 1)
    return [torch.randint(low, vocab, (n,), generator=make).tolist() for n in (4, 7, 9)]


def _is_text(bench: _Bench) -> bool:
    return isinstance(bench.inputs, dict) and set(bench.inputs) <= {"input_ids", "attention_mask"}


def _pad(model: "Model", rows: list[list[int]], padding: str) -> Tokens:
    longest = max(map(len, rows))
    pad = getattr(model.config, "pad_token_id", None) or 0
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if padding == "left" else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), True
    return Tokens(ids, mask)


def _cache_is_full(bench: _Bench) -> float:
    """Cached generation with edits in prompt and generation equals one pass over all tokens."""
    model = bench.model
    if not _is_text(bench) or not hasattr(model.module, "generate") or model.main != "":
        raise _NotHere("does not generate text from text")
    prompt = _uneven(model, bench)[1]
    sites = [s for s in bench.layers if s.name == "resid_post" and s.stack == ""]
    if not sites or not model.anatomy.head:
        raise _NotHere("no-logits")
    site = sites[0].at(0)
    width = bench.run[site].shape[-1]
    push = torch.linspace(-1, 1, width)
    edits = [Edit(site, add(push), p) for p in (2, len(prompt) + 1)]
    ids = torch.tensor([prompt])
    gaps = []
    for plan in (edits, []):
        made = model.generate(
            ids, max_new_tokens=4, min_new_tokens=4, edits=plan, record=["resid_post"]
        )
        full = torch.cat([ids, made.ids[:, :-1]], 1)
        again = model.run(full, edits=plan, record=["resid_post"])
        gaps.append(max(_gap(made.run[s], again[s]) for s in again.sites))
    edited, bare = gaps
    # Some families' cached step differs from their full pass by itself (chunked scans): what
    # counts is what the edits add to that.
    return edited if edited <= TOLERANCE else max(edited - 3 * bare, 0.0)


def _leaves_nothing(bench: _Bench) -> None:
    """No hooks, patches or changed weights after all of the above."""
    hooks = _hooks(bench.model)
    if hooks != bench.run.provenance["hooks"] or active_patches():
        raise SelfCheckFailed("hooks or patches were left behind", given=str(hooks))
    bench.model.__dict__.pop("fingerprint", None)
    if bench.model.fingerprint != bench.run.provenance["weights"]:
        raise SelfCheckFailed("weights changed", given=bench.model.fingerprint)


def _hooks(model: "Model") -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + int("forward" in vars(m))
        for m in model.module.modules()
    )


LAWS: dict[str, Callable[[_Bench], float | None]] = {
    "recording changes nothing": _transparent,
    "pattern rows sum to one": _rows_sum,
    "pattern x values = z": _pattern_times_values,
    "sub-layers add up": _adds_up,
    "heads add up": _heads_add_up,
    "the last stream gives the logits": _stream_gives_logits,
    "writing back changes nothing": _writes_back,
    "an edit changes the output": _edits_act,
    "batch = single, padded right": _batch_is_single("right"),
    "batch = single, padded left": _batch_is_single("left"),
    "cached = full pass, edited": _cache_is_full,
    "nothing left behind": _leaves_nothing,
}


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
    bare = _output(model.run(given))
    hooks = _hooks(model)  # after the first pass: transformers installs some of its own in it
    record: list[str | Site] = [*model.sites(), *_projections(model)]
    run = model.run(given, record=record if model.anatomy.stacks else _some_modules(model, given))
    run.provenance["hooks"] = hooks
    bench = _Bench(model, given, bare, run, _layer_sites(model, run))
    report = CheckReport(model.name)
    for name, law in LAWS.items():
        report.rows.append(_row(name, law, bench))
    return report


def _row(name: str, law: Callable[[_Bench], float | None], bench: _Bench) -> CheckRow:
    try:
        value = law(bench)
    except _NotHere as reason:
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
        for _, _, block in _blocks(model)
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
