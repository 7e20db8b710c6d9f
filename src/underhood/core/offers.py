"""What a model offers, and why it does not offer the rest.

Every "cannot do" about a site comes from the one table `REASONS`: what is missing, why, and what to
use instead. `why_not` finds the row for a site in a model; a test walks the table.
"""

from dataclasses import dataclass
from typing import NamedTuple

from underhood.core.anatomy import SUMS, Anatomy, Attention, Block, Stack
from underhood.core.errors import NotOffered, OutOfRange, SiteNotFound, nearest
from underhood.core.site import KINDS, Site

__all__ = ["REASONS", "Sites", "refuse"]


class Reason(NamedTuple):
    """One refusal: what is missing, why, and what to use instead."""

    what: str
    why: str
    instead: str


REASONS: dict[str, Reason] = {
    "no-attention": Reason(
        "there is no attention in this layer",
        "it mixes positions by a state-space scan or recurrence, not by a softmax over keys",
        "read resid_post, attn_out (what the mixer writes) or, for Mamba, the ssm_* sites",
    ),
    "no-cross": Reason(
        "there is no cross-attention in this layer",
        "only decoders of encoder-decoder models have it",
        "use the same site without cross_",
    ),
    "parallel": Reason(
        "there is no stream between attention and MLP here",
        "attention and MLP of this block read the same input, in parallel",
        "use resid_pre, or attn_out and mlp_out",
    ),
    "post-norm": Reason(
        "the sub-layer's input is not normalised here",
        "this family normalises what a sub-layer writes (or its sum with the stream), not what it"
        " reads",
        "use resid_pre, resid_mid, attn_out or mlp_out",
    ),
    "latent-keys": Reason(
        "queries and keys before rotation do not exist per head here",
        "multi-head latent attention rotates one part that all heads share",
        "use q_rot and k_rot, or module: sites for the latent projections",
    ),
    "late-norm": Reason(
        "queries and keys before rotation are not offered here",
        "this family normalises them after their rotation",
        "use q_rot and k_rot, or module: sites for the projections",
    ),
    "odd-attention": Reason(
        "this attention is not taken apart",
        "its heads are mixtures of experts, or differences of two patterns",
        "use attn_out (what it adds to the stream), or module: sites",
    ),
    "unknown-sum": Reason(
        "what this block's parts add to the stream is not known",
        "its forward scales or adds something by a name that the anatomy does not know",
        "use resid_pre and resid_post, z, mlp_post, or module: sites",
    ),
    "fused-qkv": Reason(
        "this family's queries, keys and values are not offered",
        "it does not use transformers' attention interface, and its projections are fused",
        "use scores, pattern, z, or module: sites",
    ),
    "no-interface": Reason(
        "queries and keys as the scores use them are not offered",
        "this family does not use transformers' attention interface",
        "use q and k, scores or pattern",
    ),
    "no-mlp": Reason(
        "there is no MLP in this layer",
        "the block consists of a mixer only",
        "use attn_out (what the mixer writes), or resid_pre and resid_post",
    ),
    "experts": Reason(
        "this layer's MLP is a mixture of experts and has no single set of neurons",
        "each token passes through its own experts",
        "use expert_post and expert_out, or mlp_out for their sum",
    ),
    "not-gated": Reason(
        "this MLP has no gate",
        "it applies one nonlinearity to one projection",
        "use mlp_pre and mlp_post",
    ),
    "no-experts": Reason(
        "there are no experts in this layer", "its MLP is dense", "use mlp_post and mlp_out"
    ),
    "no-expert-interface": Reason(
        "this family's experts cannot be taken apart",
        "it does not use transformers' experts interface",
        "use mlp_out, or module: sites",
    ),
    "no-scan": Reason(
        "there is no state-space scan in this layer",
        "it is an attention layer, or a mixer of another kind",
        "use q, k, v, pattern, z in attention layers; attn_out elsewhere",
    ),
    "no-heads": Reason(
        "this attention's output projection cannot be split by heads",
        "its head count or its projection is not known",
        "use attn_out, or a module: site",
    ),
    "no-pos-embed": Reason(
        "there are no learned absolute positions here",
        "this family uses rotary, relative or no position embedding",
        "use q_rot and k_rot for rotary positions, or embed",
    ),
    "no-embed": Reason(
        "there is no token embedding here",
        "this stack reads pictures or sound",
        "use resid_pre.0",
    ),
    "no-final-norm": Reason(
        "this stack has no final norm", "its blocks end in one already", "use resid_post"
    ),
    "no-logits": Reason(
        "this model has no logits over a vocabulary",
        "it has no unembedding head",
        "use resid_post, or a module: site of its head",
    ),
    "no-mid": Reason(
        "the stream between attention and MLP is not known here",
        "the block's parts have names that the anatomy does not know",
        "use resid_pre and resid_post, or module: sites",
    ),
}

_ATTENTION = ("q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z", "head_out")
_MLP = ("ln2", "mlp_in", "mlp_pre", "mlp_gate", "mlp_post", "mlp_out")
_EXPERTS = ("router_logits", "router_weights", "router_index", "expert_post", "expert_out")


def refuse(code: str, site: object, error: type[Exception] = NotOffered) -> Exception:
    """The typed refusal for a row of `REASONS`."""
    reason = REASONS[code]
    assert issubclass(error, NotOffered)
    return error(f"{site}: {reason.what}", given=str(site), why=reason.why, do=reason.instead)


def _attention_reason(
    spec: Attention | None, name: str, *, latent: bool, cross: bool
) -> str | None:
    if spec is None:
        return "no-cross" if cross else "no-attention"
    if name in ("q", "k") and latent:
        return "latent-keys"
    if name in ("q", "k") and spec.late_norm:
        return "late-norm"
    if name in ("q", "k", "v") and not spec.interface and f"{name}_proj" not in spec.projections:
        return "fused-qkv"
    if name in ("q_rot", "k_rot") and not spec.interface:
        return "no-interface"
    headless = spec.o_proj is None or spec.heads is None
    if headless and (name == "head_out" or (name == "z" and not spec.interface)):
        return "no-heads"
    return None


def _block_reason(block: Block, name: str, *, latent: bool) -> str | None:
    """Why a block does not offer a name; None when it does."""
    name = name.removesuffix("_scale")  # a norm's denominator is there where the norm is
    cross = name.startswith("cross_")
    bare = name.removeprefix("cross_")
    if block.unknown and name not in block.points and bare in (*SUMS, "head_out"):
        return "unknown-sum"
    if bare in _ATTENTION:
        spec = block.cross if cross else block.attention
        if spec is None and not cross and block.odd_attention:
            return "odd-attention"
        return _attention_reason(spec, bare, latent=latent, cross=cross)
    if name in block.points:
        return None
    if cross:
        return "no-cross"
    if name in _EXPERTS:
        if block.experts is None:
            return "no-experts"
        router, experts = block.experts.router, block.experts.experts
        if name == "router_logits":
            return None if router else "no-expert-interface"
        # A choice that the experts are not told (Llama 4) is not to be had from the router either.
        known = experts and (router or not name.startswith("router"))
        return None if known else "no-expert-interface"
    if name.startswith("ssm_"):
        return "no-scan" if block.scan is None else None
    if name in ("ln1", "ln2") and not block.norm_first:
        return "post-norm"
    if name in ("resid_mid", "ln2") and block.parallel:
        return "parallel"
    if name == "resid_mid":
        return "no-mid" if "mlp_out" in block.points else "no-mlp"
    if name in _MLP:
        return _mlp_reason(block, name)
    return "post-norm" if name == "ln1" else "no-attention"


def _mlp_reason(block: Block, name: str) -> str:
    if "mlp_out" not in block.points:
        return "no-mlp"
    if name == "ln2":
        return "post-norm"
    if block.experts is not None:
        return "experts"
    return "not-gated" if name == "mlp_gate" else "no-mlp"


_STACK_REASONS = {"pos_embed": "no-pos-embed", "embed": "no-embed", "ln_final": "no-final-norm"}


@dataclass(frozen=True, slots=True)
class Sites:
    """The sites of one model: which it has, and where a request leads.

    Args:
        anatomy: The model's anatomy.
        modules: Paths of all its modules.
        latent: Whether its attention shares a rotated part among heads (MLA).
    """

    anatomy: Anatomy
    modules: frozenset[str]
    latent: bool = False

    def why_not(self, site: Site) -> str | None:
        """The code of the reason why a concrete site is not offered; None when it is."""
        if site.path or site.name in ("module", "module_in"):
            return None
        if site.name == "logits":
            return None if self.anatomy.head else "no-logits"
        stack = self.anatomy.stacks[site.stack]
        if not site.kind.layered:
            name = site.name.removesuffix("_scale")
            return None if name in stack.points else _STACK_REASONS[name]
        return _block_reason(stack.blocks[site.layer or 0], site.name, latent=self.latent)

    def all(self) -> list[Site]:
        """Every site that the model offers, without `module:` sites."""
        found: list[Site] = []
        for stack, tower in self.anatomy.stacks.items():
            for name, kind in KINDS.items():
                layers = range(len(tower.blocks)) if kind.layered else [None]
                if name == "logits":
                    continue
                sites = [Site(name, layer, stack=stack) for layer in layers]
                found += [s for s in sites if self.why_not(s) is None]
        if self.anatomy.head:
            found.append(Site("logits"))
        return found

    def home(self, site: Site) -> str:
        """Path of the module at which an offered site is read."""
        if site.path:
            return site.path
        if site.name == "logits":
            return self.anatomy.head or ""
        stack, name = self.anatomy.stacks[site.stack], site.name.removesuffix("_scale")
        if not site.kind.layered:
            return stack.points[name].path
        block = stack.blocks[site.layer or 0]
        attention = block.cross if name.startswith("cross_") else block.attention
        if attention is not None and name.removeprefix("cross_") in _ATTENTION:
            return attention.core
        if block.experts is not None and name in _EXPERTS:
            part = block.experts.router if name.startswith("router") else block.experts.experts
            return part or block.path
        if block.scan is not None and name.startswith("ssm_"):
            return block.scan.path
        return block.points[name].path

    def resolve(self, site: Site) -> list[Site]:
        """Concrete sites for a request: itself checked, or one per layer that offers it.

        Raises:
            SiteNotFound: Unknown module path or stack.
            OutOfRange: A layer that the model lacks.
            NotOffered: The model has no such thing.
        """
        if site.name in ("module", "module_in"):
            return [self._module(site)]
        if site.name == "logits":
            if self.anatomy.head is None:
                raise refuse("no-logits", site)
            return [site]
        stack = self._stack(site)
        if not site.spreads:
            self._layer(site, stack)
            if code := self.why_not(site):
                raise refuse(code, site)
            return [site]
        each = [site.at(layer) for layer in range(len(stack.blocks))]
        offered = [s for s in each if self.why_not(s) is None]
        if not offered:
            raise refuse(self.why_not(each[0]) or "no-attention", site)
        return offered

    def _module(self, site: Site) -> Site:
        if site.path not in self.modules:
            path, _, unit = site.path.rpartition(".")
            numbered = f"{path}.0" in self.modules  # a list of modules, and one that it lacks
            if path in self.modules and unit.isdecimal() and not numbered:
                raise SiteNotFound(
                    f"{site.name}: sites have no units",
                    given=str(site),
                    why="what the axes of any module's tensor count is not known",
                    do=f"take {site.name}:{path} whole and pick from it, or change a part with"
                    " uh.call; heads, neurons and experts have sites of their own (z.LAYER.HEAD)",
                )
            raise SiteNotFound(
                f"this model has no module {site.path!r}",
                given=str(site),
                do=f"use one of the nearest paths: {nearest(site.path, self.modules)};"
                " `underhood inspect MODEL --modules` lists them",
            )
        return site

    def _stack(self, site: Site) -> Stack:
        stacks = self.anatomy.stacks
        if site.stack in stacks:
            return stacks[site.stack]
        if not stacks:
            raise NotOffered(
                f"{site}: no blocks of a transformer or state-space model were found here",
                given=str(site),
                why="this is a plain torch module, its parts have names that nobody knows, or its"
                " stream runs in several lanes",
                do="use module: sites, e.g. module:" + next(iter(sorted(self.modules - {""})), ""),
            )
        raise SiteNotFound(
            f"this model has no stack {site.stack!r}" if site.stack else
            f"this model has several stacks, and {site} does not say which",
            given=str(site),
            do="prefix the site: " + ", ".join(f"{s}.{site}".lstrip(".") for s in stacks),
        )  # fmt: skip

    def _layer(self, site: Site, stack: Stack) -> None:
        if site.layer is not None and site.layer >= len(stack.blocks):
            raise OutOfRange(
                f"this model has no layer {site.layer}",
                given=str(site),
                why=f"it has {len(stack.blocks)} layers",
                do=f"use 0 to {len(stack.blocks) - 1}",
            )
