"""The laws of the self-check: what must hold in every family, whatever its code looks like.

Each takes a `Bench` and gives the largest relative error, or None where there is only right and
wrong; `NotHere` says that a model cannot state it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from underhood.core.edit import Edit
from underhood.core.errors import SelfCheckFailed
from underhood.core.ops import add, call, scale
from underhood.core.run import Run
from underhood.core.site import Site
from underhood.core.taps.modules import first_tensor
from underhood.core.taps.patches import active_patches
from underhood.core.tokens import Tokens

if TYPE_CHECKING:
    from underhood.core.anatomy import Block
    from underhood.core.model import Model

__all__ = ["LAWS", "TOLERANCE", "Bench", "NotHere", "blocks_of", "count_hooks", "output_of"]

TOLERANCE = 2e-5  # of the largest value involved, in float32


@dataclass(slots=True)
class Bench:
    """What the laws share: the model, an input, one recorded run."""

    model: "Model"
    inputs: Any
    bare: Tensor
    run: Run
    layers: list[Site]


def output_of(run: Run) -> Tensor:
    found = getattr(run.output, "logits", None)
    out = found if isinstance(found, Tensor) else first_tensor(run.output)
    assert out is not None
    return out


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    size = max(float(b.detach().abs().max()), 1e-6)
    return float((a.detach().double() - b.detach().double()).abs().max()) / size


_PLAIN = "no blocks: a plain module"


class NotHere(Exception):
    """A law that this model cannot state."""


def blocks_of(model: "Model") -> list[tuple[str, int, "Block"]]:
    return [
        (name, i, block)
        for name, stack in model.anatomy.stacks.items()
        for i, block in enumerate(stack.blocks)
    ]


# The laws ----------------------------------------------------------------------------------------


def _transparent(bench: Bench) -> float:
    """Logits with every site recorded equal the bare ones, bit for bit."""
    return 0.0 if torch.equal(output_of(bench.run), bench.bare) else max(
        _gap(output_of(bench.run), bench.bare), 1.0
    )  # fmt: skip


def _rows_sum(bench: Bench) -> float:
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
        raise NotHere(_why_no_attention(bench))
    return worst


def _real_rows(bench: Bench, site: Site, by_query: Tensor) -> Tensor:
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


def _pattern_times_values(bench: Bench) -> float:
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
        raise NotHere(_why_no_attention(bench) if not _has_attention(bench.model) else "fused-qkv")
    return worst


def _has_attention(model: "Model") -> bool:
    return any(b.attention for _, _, b in blocks_of(model))


def _query_mask(bench: Bench, site: Site, like: Tensor) -> Tensor:
    tokens = bench.run.tokens
    if tokens is None or site.stack != bench.model.main or like.shape[1] != tokens.mask.shape[1]:
        return torch.ones(1)
    return tokens.mask[:, :, None, None].to(like.dtype)


def _adds_up(bench: Bench) -> float:
    """resid_pre plus what each sub-layer adds gives resid_post, in the family's own form."""
    worst = 0.0
    if not bench.model.anatomy.stacks:
        raise NotHere(_PLAIN)
    known = [row for row in blocks_of(bench.model) if not row[2].unknown]
    if not known:
        raise NotHere("unknown-sum")
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


def _why_no_attention(bench: Bench) -> str:
    if any(block.odd_attention for _, _, block in blocks_of(bench.model)):
        return "odd-attention"
    return "no-attention" if bench.model.anatomy.stacks else _PLAIN


def _heads_add_up(bench: Bench) -> float:
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
        unknown = any(block.unknown for _, _, block in blocks_of(model))
        raise NotHere("unknown-sum" if unknown else _why_no_attention(bench))
    return worst


def _stream_gives_logits(bench: Bench) -> float:
    """The final norm and the head, on the stream that leaves the last block, give the logits."""
    model = bench.model
    logits = getattr(bench.run.output, "logits", None)
    if not model.anatomy.stacks or not isinstance(logits, Tensor):
        raise NotHere("no-logits")
    last = Site("resid_post", len(model.anatomy.stacks[model.main].blocks) - 1, stack=model.main)
    return _gap(model.unembed(bench.run[last]), logits)


def _writes_back(bench: Bench) -> float:
    """Every writable site, written with its own value, leaves the output as it was."""
    worst = 0.0
    for site in _writable(bench):
        run = bench.model.run(bench.inputs, edits=Edit(site, scale(1.0)))
        worst = max(worst, _gap(output_of(run), bench.bare))
    return worst


def _shaken(h: Tensor) -> Tensor:
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(0))
    return h + noise.to(h)


def _edits_act(bench: Bench) -> None:
    """Halving and shifting a site changes the output, for every writable site; or else noise does.

    Noise is for what is the same everywhere, as uniform scores are: halved, they are uniform still.
    """
    idle = []
    for site in _writable(bench):
        # Not a factor alone where a norm could undo it; scores must keep their masked places.
        halve = scale(0.5) if site.name.endswith("scores") else call(lambda h: 0.5 * h.roll(1, -1))
        edits = (Edit(site, op) for op in (halve, call(_shaken)))
        runs = (bench.model.run(bench.inputs, edits=edit) for edit in edits)
        if all(torch.equal(output_of(run), bench.bare) for run in runs):
            idle.append(str(site))
    if idle:
        raise SelfCheckFailed("edits without effect", given=", ".join(idle))


def _writable(bench: Bench) -> list[Site]:
    """Sites to edit. A side tower's final norm may feed a pooled output that nobody reads."""
    main = bench.model.main
    return [
        s for s in bench.layers
        if s.kind.writable and s.name != "logits" and (s.name != "ln_final" or s.stack == main)
    ]  # fmt: skip


def _batch_is_single(padding: str) -> Callable[[Bench], float]:
    def law(bench: Bench) -> float:
        model = bench.model
        rows = _uneven(model, bench)
        batch = model.run(_pad(model, rows, padding))
        assert batch.tokens is not None
        seen = [logits[mask] for logits, mask in zip(batch.logits, batch.tokens.mask, strict=True)]
        alone = [model.run(torch.tensor([row])).logits[0] for row in rows]
        # Together: one row may have logits near 0 (a planted model), whose noise means nothing.
        return _gap(torch.cat(seen), torch.cat(alone))

    return law


def _uneven(model: "Model", bench: Bench) -> list[list[int]]:
    """Three prompts of different length, for models that are given text only."""
    if model.main == "dec" or not _is_text(bench):
        raise NotHere("inputs are not text alone")
    vocab = int(getattr(model.config, "vocab_size", 0))
    make = torch.Generator().manual_seed(1)
    low = min(5, vocab - 1)
    return [torch.randint(low, vocab, (n,), generator=make).tolist() for n in (4, 7, 9)]


def _is_text(bench: Bench) -> bool:
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


def _cache_is_full(bench: Bench) -> float:
    """Cached generation with edits in prompt and generation equals one pass over all tokens."""
    model = bench.model
    if not _is_text(bench) or not hasattr(model.module, "generate") or model.main != "":
        raise NotHere("does not generate text from text")
    prompt = _uneven(model, bench)[1]
    sites = [s for s in bench.layers if s.name == "resid_post" and s.stack == ""]
    if not sites or not model.anatomy.head:
        raise NotHere("no-logits")
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


def _leaves_nothing(bench: Bench) -> None:
    """No hooks, patches or changed weights after all of the above."""
    hooks = count_hooks(bench.model)
    if hooks != bench.run.provenance["hooks"] or active_patches():
        raise SelfCheckFailed("hooks or patches were left behind", given=str(hooks))
    bench.model.__dict__.pop("fingerprint", None)
    if bench.model.fingerprint != bench.run.provenance["weights"]:
        raise SelfCheckFailed("weights changed", given=bench.model.fingerprint)


def count_hooks(model: "Model") -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + int("forward" in vars(m))
        for m in model.module.modules()
    )


LAWS: dict[str, Callable[[Bench], float | None]] = {
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
