"""Discovery: how a model's anatomy is found.

Hugging Face models are found, not adapted: a block is an element of a `ModuleList` whose elements
own an attention or another sequence mixer, and its parts are recognised by the few names that the
library's 500 families use for them (`core.families`), by the order in which a block's `forward`
first mentions its children (norm before or after the sub-layer), and by a handful of config flags.
"""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor, nn

from underhood.core.anatomy import SUMS, Anatomy, Attention, Block, Experts, Point, Scan, Stack
from underhood.core.families import (
    ADDS_RESIDUAL,
    AMBIGUOUS_NORMS,
    INPUT_MULTIPLIERS,
    LANES,
    MULTIPLIERS,
    NAMES,
    POST_NORMS,
)
from underhood.core.unknown import odd_attention, unknown_parts

__all__ = ["find_anatomy"]


class _View:
    """A module tree by relative paths."""

    def __init__(self, module: nn.Module) -> None:
        # A list of parts under one name is none of them (LongCat has two attentions in a block).
        named = module.named_modules()
        self.modules = {n: m for n, m in named if n and not isinstance(m, nn.ModuleList)}

    def first(self, role: str, under: str = "") -> str | None:
        prefix = under + "." if under else ""
        return next((prefix + n for n in NAMES[role] if prefix + n in self.modules), None)


@cache
def _mentions(cls: type) -> tuple[str, ...]:
    """Names in the order in which a class's `forward` first uses them."""
    forward = inspect.unwrap(cls.forward)
    code = getattr(forward, "__code__", None)
    return tuple(code.co_names) if code else ()


def uses_interface(module: nn.Module) -> bool:
    """Whether the module's own forward asks transformers for its attention function."""
    return "ALL_ATTENTION_FUNCTIONS" in _mentions(type(module))


def _config_for(path: str, config: Any) -> Any:
    """The sub-config that describes the tower at `path`."""
    if config is None:
        return None
    for word, names in (
        ("vision", ("vision_config",)),
        ("visual", ("vision_config",)),
        ("text", ("text_config",)),
        ("language", ("text_config",)),
    ):
        for name in names:
            if word in path and getattr(config, name, None) is not None:
                return getattr(config, name)
    return config


def _number(config: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _heads(core: nn.Module, config: Any) -> tuple[int | None, int | None]:
    own = ("num_heads", "num_attention_heads", "n_heads", "num_attn_heads")
    heads = _number(core, *own) or _number(
        config, "num_attention_heads", "n_head", "num_heads", "n_heads"
    )
    groups = _number(core, "num_key_value_groups")
    if groups and heads:
        return heads, heads // groups
    kv = _number(core, "num_key_value_heads", "num_kv_heads")
    return heads, kv or heads


def _attention(view: _View, outer: str, config: Any) -> Attention | None:
    """Describe the attention at `outer`, or None when nothing there is a softmax attention."""
    if odd_attention(view.modules[outer]):
        return None
    inside = [outer] + [n for n in view.modules if n.startswith(outer + ".")]
    core = next((n for n in inside if uses_interface(view.modules[n])), None)
    interface = core is not None
    if core is None:
        nested = [outer + ".attention", outer + ".self"]
        core = next((n for n in nested if n in view.modules), outer)
    if not interface and view.first("v_proj", core) is None:
        fused = ("query_key_value", "qkv_proj", "Wqkv", "c_attn", "qkv")
        if not any(f"{core}.{n}" in view.modules for n in fused):
            return None
    module = view.modules[core]
    if "cu_seqlens" in inspect.unwrap(type(module).forward).__code__.co_varnames:
        return None  # packed images without a batch axis: one call per image, no rectangle
    if not interface and not _has_softmax(type(module)):
        return None  # linear attentions name their parts like one and have no softmax over keys
    heads, kv_heads = _heads(module, config)
    scope = getattr(inspect.getmodule(type(module)), "__dict__", {})
    rotary = tuple(
        n for n in _mentions(type(module)) if n in scope and n.startswith("apply_") and "rot" in n
    )
    roles = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")
    projections = {r: p for r in roles if (p := view.first(r, core))}
    o_proj = view.first("o_proj", core) or view.first("o_proj", outer)
    late = _norms_after_rotation(module, rotary, projections)
    return Attention(core, o_proj, heads, kv_heads, interface, rotary, projections, late)


def _has_softmax(cls: type) -> bool:
    """Whether some method of a class calls a softmax, by itself or fused."""
    codes = (getattr(f, "__code__", None) for f in vars(cls).values())
    words = {name.lower() for code in codes if code for name in code.co_names}
    return not words.isdisjoint(("softmax", "scaled_dot_product_attention"))


def _norms_after_rotation(
    core: nn.Module, rotary: tuple[str, ...], projections: dict[str, str]
) -> bool:
    norm = projections.get("q_norm", "").rpartition(".")[2]
    order = _mentions(type(core))
    return bool(norm and rotary) and norm in order and order.index(norm) > order.index(rotary[0])


def _scan(view: _View, mixer: str) -> Scan | None:
    module = view.modules[mixer]
    names = _mentions(type(module))
    scan = next((n for n in names if n.endswith(("selective_scan", "chunk_scan"))), None)
    if scan is None:
        return None
    return Scan(mixer, scan, next((n for n in names if n.endswith("selective_state_update")), None))


def _is_parallel(view: _View, config: Any, mlp: str | None) -> bool:
    if mlp is None:
        return False
    flags = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")
    if any(getattr(config, f, None) is True for f in flags):
        return True
    return view.first("ln2") is None


def _norm_first(view: _View, block: nn.Module, attn: str | None, config: Any) -> bool:
    """Whether attention reads a norm's output (pre-norm) rather than the stream (post-norm)."""
    if getattr(config, "do_layer_norm_before", None) is False:
        return False
    if attn is not None and attn + ".output.LayerNorm" in view.modules:
        return False
    ln1, order = view.first("ln1"), _mentions(type(block))
    if ln1 in AMBIGUOUS_NORMS and attn in order:
        return order.index(ln1) < order.index(attn)
    return ln1 is not None


def _attn_points(view: _View, block: Block, module: nn.Module, outer: str) -> dict[str, Point]:
    """Points of the first sub-layer: its normalised input and what it adds."""
    points: dict[str, Point] = {}
    ln1, o_proj = view.first("ln1"), view.first("o_proj", outer)
    attn, mixer = view.first("attn"), view.first("mixer")
    scale = _multiplier(module, "attn" if outer == attn else "mixer")
    sandwich = not {"post_feedforward_layernorm", "pre_mlp_layernorm"}.isdisjoint(view.modules)
    if ln1 and block.norm_first:
        points["ln1"] = Point(ln1)
    if post := view.first("post_attn"):
        points["attn_out"] = Point(post, scale=scale)
    elif sandwich:
        points["attn_out"] = Point("post_attention_layernorm")
    elif o_proj and (
        outer + ".output.LayerNorm" in view.modules
        or type(view.modules[outer]).__name__.startswith(ADDS_RESIDUAL)
    ):
        points["attn_out"] = Point(o_proj)
    elif attn and mixer and _both(module, attn, mixer):
        beside = Point(mixer, scale=_multiplier(module, "mixer"))
        points["attn_out"] = Point(attn, scale=_multiplier(module, "attn"), plus=beside)
    else:
        points["attn_out"] = Point(outer, scale=scale)
    return points


def _both(module: nn.Module, attn: str, mixer: str) -> bool:
    """Whether a block's forward calls an attention and a mixer, side by side (Falcon-H1)."""
    return {attn, mixer} <= set(_mentions(type(module)))


def _multiplier(module: nn.Module, role: str) -> float:
    """What a block multiplies by before it adds what a sub-layer writes."""
    named = (vars(module).get(name) for name in MULTIPLIERS[role])
    return next((float(n) for n in named if isinstance(n, int | float)), 1.0)


def _mlp_points(view: _View, block: Block, module: nn.Module, mlp: str | None) -> dict[str, Point]:
    """Points of the MLP: norm, input, pre-activations, neurons, and what it adds."""
    scale = _multiplier(module, "mlp")
    beside = view.first("beside_mlp")
    under = mlp or ""
    up, down = view.first("up", under), view.first("down", under)
    gate, fused = view.first("gate", under), view.first("fused", under)
    points: dict[str, Point] = {}
    ln2 = view.first("ln2")
    if ln2 and block.norm_first and not block.parallel:
        points["ln2"] = Point(ln2)
        points["resid_mid"] = Point(ln2, "in")
    elif block.norm_first and not block.parallel and mlp:
        points["resid_mid"] = Point(mlp, "in")
    if fused:
        up = fused
        points["mlp_gate"] = Point(fused, chunk=(0, 2))
        points["mlp_pre"] = Point(fused, chunk=(1, 2))
    elif up:
        points["mlp_pre"] = Point(up)
    if gate:
        points["mlp_gate"] = Point(gate)
    if beside and beside != mlp and "ln2" in points:  # two MLPs read it: edit it before both
        points["mlp_in"] = points["ln2"]
    elif up and not (gate and mlp):  # two projections read a gated MLP's input: likewise
        points["mlp_in"] = Point(up, "in")
    elif mlp:
        points["mlp_in"] = Point(mlp, "in")
    if down:
        points["mlp_post"] = Point(down, "in")
    adds = mlp is not None and type(view.modules[mlp]).__name__.startswith(ADDS_RESIDUAL)
    if post := view.first("post_mlp"):
        points["mlp_out"] = Point(post, scale=scale)
    elif down and (adds or mlp is None):
        points["mlp_out"] = Point(down)
    elif mlp and beside and beside != mlp:
        points["mlp_out"] = Point(beside, scale=scale, plus=Point(mlp, scale=scale))
    elif mlp:
        points["mlp_out"] = Point(mlp, scale=scale)
    return points


def _experts(view: _View, mlp: str | None) -> Experts | None:
    if mlp is None:
        return None
    experts = next(
        (
            n
            for n in view.modules
            if n.startswith(mlp + ".") and hasattr(view.modules[n], "_is_expert_parallel")
        ),
        None,
    )
    router = view.first("router", mlp)
    if router and next(view.modules[router].parameters(), None) is None:
        router = None
    if experts is None and (router is None or "Router" not in type(view.modules[router]).__name__):
        return None
    module = view.modules[experts or router or mlp]
    count = _number(module, "num_experts", "n_routed_experts") or 0
    return Experts(router, experts, count)


def _post_norm_mid(view: _View, attn: str | None, has_cross: bool) -> Point | None:
    """Post-norm blocks: the normalised sum between attention and MLP."""
    if attn is None:
        return None
    if attn + ".output.LayerNorm" in view.modules:
        return Point(attn)
    name = "encoder_attn_layer_norm" if has_cross else "self_attn_layer_norm"
    return next((Point(n) for n in (name, "ln_1") if n in view.modules), None)


def _block(path: str, module: nn.Module, config: Any) -> Block:
    """Describe one block by its parts' names and its forward's order."""
    view = _View(module)
    attn, mixer, cross = view.first("attn"), view.first("mixer"), view.first("cross")
    mlp = view.first("mlp")
    # Zamba-2 feeds its shared attention into the mixer: only the mixer writes to the stream.
    outer = mixer or attn
    attention = _attention(view, attn, config) if attn else None
    if attention is None and mixer:
        attention = _attention(view, mixer, config)
    block = Block(
        path,
        {},
        attention=attention,
        cross=_attention(view, cross, config) if cross else None,
        experts=_experts(view, mlp),
        scan=_scan(view, mixer) if mixer else None,
        parallel=_is_parallel(view, config, mlp),
        norm_first=_norm_first(view, module, attn, config),
        unknown=_unknown(module),
        odd_attention=attn is not None and odd_attention(view.modules[attn]),
    )
    points = {"resid_pre": Point("", "in"), "resid_post": Point("")}
    if "pre_ln" in view.modules:  # RWKV's first block replaces the stream by its norm
        points["resid_pre"] = Point("pre_ln")
    if outer:
        points |= _attn_points(view, block, module, outer)
        points |= _mlp_points(view, block, module, mlp)
    if cross:
        points["cross_attn_out"] = Point(cross)
    if not block.norm_first and (mid := _post_norm_mid(view, attn, cross is not None)):
        points["resid_mid"] = mid
    if "mlp_out" not in points:
        points.pop("resid_mid", None)
    if block.unknown:
        points = {n: p for n, p in points.items() if n not in SUMS}
    return replace(
        block,
        points={name: point.under(path) for name, point in points.items()},
        attention=_rooted(block.attention, path),
        cross=_rooted(block.cross, path),
        experts=_rooted(block.experts, path),
        scan=_rooted(block.scan, path),
        mid_is_shared=block.norm_first and points.get("resid_mid", Point("")).side == "in",
        post_norms=() if block.norm_first else _post_norms(view, path),
    )


def _unknown(module: nn.Module) -> tuple[str, ...]:
    known = {path.split(".")[0] for paths in NAMES.values() for path in paths}
    numbers = {n for names in MULTIPLIERS.values() for n in names} | set(INPUT_MULTIPLIERS)
    return unknown_parts(module, _mentions(type(module)), known, numbers)


def _post_norms(view: _View, path: str) -> tuple[tuple[str, str], ...]:
    """The sums that a post-norm block normalises, in order."""
    return tuple((site, f"{path}.{norm}") for site, norm in POST_NORMS if norm in view.modules)


def _rooted(part: Any, path: str) -> Any:
    """The same part with paths from the model's root."""
    if isinstance(part, Attention):
        o_proj = f"{path}.{part.o_proj}" if part.o_proj else None
        projections = {r: f"{path}.{p}" for r, p in part.projections.items()}
        core = f"{path}.{part.core}"
        return replace(part, core=core, o_proj=o_proj, projections=projections)
    if isinstance(part, Experts):
        router = f"{path}.{part.router}" if part.router else None
        experts = f"{path}.{part.experts}" if part.experts else None
        return Experts(router, experts, part.count)
    if isinstance(part, Scan):
        return Scan(f"{path}.{part.path}", part.scan, part.step)
    return part


def _block_lists(module: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Module lists whose every element owns an attention or another mixer, outermost first."""
    found: list[str] = []
    for name, child in module.named_modules():
        if not isinstance(child, nn.ModuleList) or not len(child):
            continue
        if any(name.startswith(f + ".") for f in found):
            continue
        if all(_is_block(_View(b)) for b in child):
            found.append(name)
            yield name, child


def _is_block(view: _View) -> bool:
    """Whether it owns an attention, or another mixer with a norm; and has one stream, not lanes."""
    if not view.modules.keys().isdisjoint(LANES):
        return False
    return bool(view.first("attn") or (view.first("mixer") and view.first("ln1")))


def _stack_name(path: str, all_paths: list[str]) -> str:
    words = path.split(".")
    has = {w for p in all_paths for w in p.split(".")}
    if any(w.startswith(("vision", "visual")) for w in words) and len(all_paths) > 1:
        return "vision"
    if "encoder" in words and "decoder" in has:
        return "enc"
    if "decoder" in words and "encoder" in has:
        return "dec"
    if "text_model" in words and len(all_paths) > 1 and "language_model" not in has:
        return "text"
    return ""


def find_anatomy(module: nn.Module) -> Anatomy:
    """Find stacks, blocks and points of a model. Reads structure only; runs nothing.

    Args:
        module: Any torch module; one without recognisable blocks has no stacks and offers only
            `module:` sites.
    """
    config = getattr(module, "config", None)
    lists = list(_block_lists(module))
    paths = [p for p, _ in lists]
    stacks: dict[str, Stack] = {}
    by_name = dict(module.named_modules())
    for path, blocks in lists:
        name = _stack_name(path, paths)
        if name in stacks:
            continue  # a second tower of the same kind: reachable through module: sites
        own = _config_for(path, config)
        root = path.rpartition(".")[0]
        owner = _View(by_name[root])
        points: dict[str, Point] = {}
        outer = root if owner.first("final_norm") else root.rpartition(".")[0]
        if norm := _View(by_name[outer]).first("final_norm"):
            points["ln_final"] = Point(f"{outer}.{norm}".lstrip("."))
        if pos := owner.first("positions"):
            points["pos_embed"] = Point(f"{root}.{pos}".lstrip("."))
        if embed := _embedding(module, by_name, root, name):
            points["embed"] = Point(embed, scale=_embed_scale(by_name[root], own))
        described = tuple(_block(f"{path}.{i}", b, own) for i, b in enumerate(blocks))
        stacks[name] = Stack(name, root, described, points)
    return Anatomy(stacks, _head(module, by_name))


def _embed_scale(owner: nn.Module, config: Any) -> float:
    """What a model multiplies its token embedding by, beside the embedding module."""
    if isinstance(factor := getattr(owner, "normalizer", None), Tensor):  # RecurrentGemma
        return float(factor)
    return float(getattr(config, "embedding_multiplier", None) or 1.0)


def _embedding(
    module: nn.Module, by_name: dict[str, nn.Module], root: str, stack: str
) -> str | None:
    names = ("embed_tokens", "wte", "word_embeddings", "embed_in", "embeddings", "token_embedding",
             "tokens_embed")  # fmt: skip
    for prefix in (root, root + ".embeddings", root.rpartition(".")[0] + ".embeddings"):
        for name in (*names, "embeddings.word_embeddings"):
            path = f"{prefix}.{name}".lstrip(".")
            if isinstance(by_name.get(path), nn.Embedding):
                return path
    return None


def _head(module: nn.Module, by_name: dict[str, nn.Module]) -> str | None:
    """Path of the unembedding, for models that end in one."""
    getter = getattr(module, "get_output_embeddings", None)
    try:
        found = getter() if getter else None
    except (AttributeError, NotImplementedError):
        found = None
    if found is None:
        return None
    return next((n for n, m in by_name.items() if m is found), None)
