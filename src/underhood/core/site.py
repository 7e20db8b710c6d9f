"""Sites: the address of one activation.

A `Site` is a frozen value with one text form that round-trips:

    resid_post.5        the residual stream after block 5
    z.9.6               head 6 of layer 9, before the output projection
    expert_post.4.17    expert 17 of layer 4
    enc.pattern.0       the attention pattern of the encoder's first layer
    module:layer3.1.conv2      the output of any torch module
    module_in:lm_head          the input of any torch module

`KINDS` is the whole vocabulary: for each name its axes, what its unit (the number after the layer)
counts, and one sentence. A name means the same tensor in every family; `core.anatomy` says where a
given model keeps it and `core.check` proves it. TransformerLens names (`blocks.5.hook_resid_post`,
`blocks.5.attn.hook_z`) are read as aliases and never written.
"""

import re
from dataclasses import dataclass, replace

from underhood.core.errors import SiteNotFound, UsageError, nearest

__all__ = ["KINDS", "STACKS", "Kind", "Site", "parse_many"]

STACKS = ("enc", "dec", "vision", "text", "audio")
"""Prefixes for models with more than one stack of blocks; a single stack has no prefix."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What one site name means.

    Attributes:
        axes: Axis names in order; the first is always `batch`.
        unit: The axis that the number after the layer selects from, or None.
        about: One sentence.
        layered: Whether the name needs a layer.
        writable: Whether an edit may be placed there.
    """

    axes: tuple[str, ...]
    about: str
    unit: str | None = None
    layered: bool = True
    writable: bool = True

    @property
    def pos_axis(self) -> int | None:
        """Index of the axis that runs over positions (`pos` or `query`), if there is one."""
        for name in ("pos", "query"):
            if name in self.axes:
                return self.axes.index(name)
        return None


_D = ("batch", "pos", "d_model")
_F = ("batch", "pos", "neuron")
_H = ("batch", "pos", "head", "d_head")
_QK = ("batch", "head", "query", "key")

KINDS: dict[str, Kind] = {
    "embed": Kind(_D, "token embedding, scaled as the model scales it", "d_model", layered=False),
    "pos_embed": Kind(_D, "learned absolute position embedding", "d_model", layered=False),
    "resid_pre": Kind(_D, "the residual stream entering a block", "d_model"),
    "resid_mid": Kind(_D, "the stream between attention and MLP (sequential blocks)", "d_model"),
    "resid_post": Kind(_D, "the residual stream leaving a block", "d_model"),
    "ln1": Kind(_D, "normalised input of attention or mixer", "d_model"),
    "ln2": Kind(_D, "normalised input of the MLP", "d_model"),
    "ln_final": Kind(_D, "output of the final norm", "d_model", layered=False),
    "ln1_scale": Kind(("batch", "pos"), "what ln1 divides by at each position", writable=False),
    "ln2_scale": Kind(("batch", "pos"), "what ln2 divides by at each position", writable=False),
    "ln_final_scale": Kind(
        ("batch", "pos"), "what the final norm divides by", layered=False, writable=False
    ),
    "q": Kind(_H, "queries before rotary embedding", "head"),
    "k": Kind(_H, "keys before rotary embedding (key/value heads)", "head"),
    "v": Kind(_H, "values (key/value heads)", "head"),
    "q_rot": Kind(_H, "queries as the attention scores use them", "head"),
    "k_rot": Kind(_H, "keys as the attention scores use them", "head"),
    "scores": Kind(_QK, "attention scores, scaled and masked, before the softmax", "head"),
    "pattern": Kind(_QK, "attention probabilities after the softmax", "head"),
    "z": Kind(_H, "weighted values per head, before the output projection", "head"),
    "head_out": Kind(
        ("batch", "pos", "head", "d_model"), "what each head writes (z through its W_O)", "head"
    ),
    "attn_out": Kind(_D, "what attention (or the mixer) adds to the stream", "d_model"),
    "mlp_in": Kind(_D, "the input of the MLP", "d_model"),
    "mlp_pre": Kind(_F, "MLP before its nonlinearity (gated: the linear factor)", "neuron"),
    "mlp_gate": Kind(_F, "gated MLP: the gate before its nonlinearity", "neuron"),
    "mlp_post": Kind(_F, "MLP neurons, the input of the down projection", "neuron"),
    "mlp_out": Kind(_D, "what the MLP adds to the stream", "d_model"),
    "router_logits": Kind(("batch", "pos", "expert"), "router scores before selection", "expert"),
    "router_weights": Kind(
        ("batch", "pos", "slot"), "weights of the chosen experts", None, writable=False
    ),
    "router_index": Kind(
        ("batch", "pos", "slot"), "numbers of the chosen experts", None, writable=False
    ),
    "expert_post": Kind(
        ("batch", "pos", "slot", "neuron"), "neurons of each chosen expert", "expert"
    ),
    "expert_out": Kind(
        ("batch", "pos", "slot", "d_model"), "what each chosen expert adds, weight in", "expert"
    ),
    "ssm_x": Kind(("batch", "pos", "channel"), "input of the state-space scan", "channel"),
    "ssm_dt": Kind(("batch", "pos", "channel"), "step size of the scan, after softplus", "channel"),
    "ssm_B": Kind(("batch", "pos", "state"), "input matrix of the scan", None),
    "ssm_C": Kind(("batch", "pos", "state"), "output matrix of the scan", None),
    "ssm_state": Kind(
        ("batch", "pos", "channel", "state"),
        "state after each position (recomputed by the plain recurrence)",
        "channel",
        writable=False,
    ),
    "ssm_out": Kind(("batch", "pos", "channel"), "output of the scan before gating", "channel"),
    "logits": Kind(("batch", "pos", "vocab"), "the model's logits", "vocab", layered=False),
}
for _name in ("q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z", "head_out", "attn_out"):
    _kind = KINDS[_name]
    KINDS[f"cross_{_name}"] = replace(_kind, about=f"cross-attention: {_kind.about}")

MODULE_KINDS = {
    "module": Kind(("batch",), "output of a torch module (first tensor)", None, layered=False),
    "module_in": Kind(("batch",), "first input of a torch module", None, layered=False),
}

_TL_PLAIN = {
    "hook_embed": "embed",
    "hook_pos_embed": "pos_embed",
    "ln_final.hook_normalized": "ln_final",
    "ln_final.hook_scale": "ln_final_scale",
}
_TL_LAYERED = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "ln1.hook_normalized": "ln1",
    "ln2.hook_normalized": "ln2",
    "ln1.hook_scale": "ln1_scale",
    "ln2.hook_scale": "ln2_scale",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_rot_q": "q_rot",
    "attn.hook_rot_k": "k_rot",
    "attn.hook_attn_scores": "scores",
    "attn.hook_pattern": "pattern",
    "attn.hook_z": "z",
    "attn.hook_result": "head_out",
    "mlp.hook_post": "mlp_post",
    "mlp.hook_pre_linear": "mlp_pre",
    "mlp.hook_pre": "mlp_pre",
    "mlp.hook_router_scores": "router_logits",
    "mlp.hook_expert_weights": "router_weights",
    "mlp.hook_expert_indices": "router_index",
}
_TL = re.compile(r"^blocks\.(\d+)\.(.+)$")


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """The address of one activation, e.g. `Site("z", 9, 6)`; text form `z.9.6`.

    Args:
        name: A name of `KINDS`, or `module` / `module_in`.
        layer: Block number from 0; None for names without layers, and for "every layer" in a
            request such as `record=["resid_post"]`.
        unit: One head, expert, neuron or channel; None for all.
        stack: One of `STACKS`, or "" for the only stack.
        path: The torch module's path, for `module` and `module_in`.

    Raises:
        SiteNotFound: The name is unknown; the message carries the nearest names.
    """

    name: str
    layer: int | None = None
    unit: int | None = None
    stack: str = ""
    path: str = ""

    def __post_init__(self) -> None:
        if self.name in MODULE_KINDS:
            if not self.path or (self.layer, self.unit, self.stack) != (None, None, ""):
                raise SiteNotFound(
                    f"a {self.name!r} site has a path, and nothing else",
                    given=f"path={self.path!r}, layer={self.layer}, unit={self.unit},"
                    f" stack={self.stack!r}",
                    do=f"write {self.name}:{self.path or 'PATH'}",
                )
            return
        if self.name not in KINDS:
            raise SiteNotFound(
                f"there is no site named {self.name!r}",
                given=self.name,
                do=f"use one of the nearest names: {nearest(self.name, KINDS)};"
                " `underhood inspect MODEL --sites` lists those of a model",
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        """Refuse what has no text form: it would be another site once saved and read."""
        kind = KINDS[self.name]
        if self.stack and self.stack not in STACKS:
            raise SiteNotFound(
                f"there is no stack named {self.stack!r}",
                given=repr(self.stack),
                do=f"use one of {', '.join(STACKS)}, or none",
            )
        if self.path or min(self.layer or 0, self.unit or 0) < 0:
            raise SiteNotFound(
                f"this is not a place of the site {self.name!r}",
                given=f"layer={self.layer}, unit={self.unit}, path={self.path!r}",
                why="layers and units count from 0, and only module: sites have a path",
                do=f"write {self.name}.LAYER or {self.name}.LAYER.UNIT",
            )
        if self.layer is not None and not kind.layered:
            raise SiteNotFound(
                f"the site {self.name!r} has no layers", given=str(self), do=f"write {self.name}"
            )
        if self.unit is not None and (kind.unit is None or (kind.layered and self.layer is None)):
            raise SiteNotFound(
                f"the site {self.name!r} takes no unit without a layer, or none at all",
                given=str(self),
                do=f"its axes are {' '.join(kind.axes)}",
            )

    @property
    def kind(self) -> Kind:
        """The vocabulary entry of this site."""
        return MODULE_KINDS.get(self.name) or KINDS[self.name]

    @property
    def whole(self) -> "Site":
        """The same site with all its units."""
        return self if self.unit is None else replace(self, unit=None)

    @property
    def spreads(self) -> bool:
        """Whether this stands for every layer (a layered name without a layer)."""
        return self.kind.layered and self.layer is None

    def at(self, layer: int) -> "Site":
        """The same site in another layer."""
        return replace(self, layer=layer)

    def __str__(self) -> str:
        if self.name in MODULE_KINDS:
            return f"{self.name}:{self.path}"
        parts = [self.stack, self.name]
        parts += [str(n) for n in (self.layer, self.unit) if n is not None]
        return ".".join(p for p in parts if p)

    @classmethod
    def parse(cls, text: "str | Site") -> "Site":
        """Read a site from its text form or from a TransformerLens name.

        Raises:
            SiteNotFound: No such name, or numbers where none belong.

        Example:
            >>> Site.parse("z.9.6")
            Site(name='z', layer=9, unit=6, stack='', path='')
            >>> str(Site.parse("blocks.5.hook_resid_post"))
            'resid_post.5'
        """
        if isinstance(text, Site):
            return text
        for name in MODULE_KINDS:
            if text.startswith(name + ":"):
                return cls(name, path=text[len(name) + 1 :])
        if text in _TL_PLAIN:
            return cls(_TL_PLAIN[text])
        if (tl := _TL.match(text)) and tl[2] in _TL_LAYERED:
            return cls(_TL_LAYERED[tl[2]], int(tl[1]))
        head, *rest = text.split(".")
        stack = ""
        if head in STACKS and rest:
            stack, head, *rest = head, *rest
        if len(rest) > 2 or not all(r.isdecimal() for r in rest):
            known = [*KINDS, *_TL_PLAIN, *(f"blocks.{tl[1] if tl else 0}.{n}" for n in _TL_LAYERED)]
            close = text if tl or not rest else head
            raise SiteNotFound(
                f"{text!r} is not the name of a site",
                given=text,
                why="a site reads NAME, NAME.LAYER or NAME.LAYER.UNIT, with numbers from 0",
                do=f"use one of the nearest names: {nearest(close, known)}",
            )
        layer, unit = (*(int(r) for r in rest), None, None)[:2]
        if head in KINDS and not KINDS[head].layered and layer is not None and unit is None:
            layer, unit = None, layer
        return cls(head, layer, unit, stack)


def parse_many(sites: "str | Site | list[str | Site] | tuple[str | Site, ...]") -> list[Site]:
    """Read one site or several; a `str` may hold several, separated by commas.

    Raises:
        UsageError: Nothing was named.
    """
    items: list[str | Site] = []
    for entry in [sites] if isinstance(sites, (str, Site)) else list(sites):
        items += [s.strip() for s in entry.split(",")] if isinstance(entry, str) else [entry]
    found = [Site.parse(item) for item in items if item]
    if not found:
        raise UsageError("no site was named", given=repr(sites), do="name one, e.g. resid_post.0")
    return found
