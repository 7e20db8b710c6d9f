"""The sum behind direct attribution: which parts write to the stream, and along which directions.

Nothing of width `d_model` is kept per part: the final norm (and a norm between heads and stream) is
moved onto the directions, once per row, and each part is read along them.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from underhood.core.errors import NotOffered
from underhood.core.head import Head, NormForm, norm_form
from underhood.core.model import Model
from underhood.core.parts import norm_after_heads
from underhood.core.run import Run
from underhood.core.site import Site
from underhood.core.taps.modules import weight_in_out
from underhood.core.tokens import Tokens
from underhood.data import logit_diff

__all__ = ["Found", "Layout", "attribute", "layout_of"]

Place = tuple[str, int, int]
"""Kind of a part, its layer and its head (-1: it has none)."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What one block adds to the stream, and how its attention is taken apart.

    Attributes:
        attn, mlp: Sites of what is added, None where there is none.
        heads: Site of the heads' outputs, None to keep attention whole.
        norm: Path and linear form of a norm between the heads and the stream.
        softmax: Whether `attn` is an attention (else a mixer of another kind).
    """

    attn: Site | None
    mlp: Site | None
    heads: Site | None
    softmax: bool
    norm: tuple[str, NormForm] | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of a model's stream, and its way to the logits."""

    model: Model
    head: Head
    form: NormForm | None
    layers: tuple[Layer, ...]

    @property
    def embed(self) -> Site:
        """The stream before the first block, positions included."""
        return Site("resid_pre", 0, stack=self.model.main)

    @property
    def final(self) -> Site:
        """The stream after the last block."""
        return Site("resid_post", self.model.n_layers - 1, stack=self.model.main)

    @property
    def raw(self) -> Site:
        """The unembedding's output, before scale and soft cap."""
        return Site("module", path=str(self.model.anatomy.head))

    @property
    def sites(self) -> list[str | Site]:
        """Everything to record."""
        found: list[str | Site] = [self.embed, self.final]
        for layer in self.layers:
            found += [s for s in (layer.attn, layer.mlp, layer.heads) if s is not None]
            found += [Site("module_in", path=layer.norm[0])] if layer.norm else []
        return [*found, self.raw] if self.head.soft_cap else found


@dataclass(frozen=True, slots=True)
class Found:
    """What all parts write.

    Attributes:
        places: Kind, layer and head of each part.
        values: In logits: the answers' difference first, then those of random tokens.
        says: The model's own logit difference before any soft cap.
        capped: The same after it, None without one.
    """

    places: list[Place]
    values: Float[Tensor, "batch node pair"]
    says: Float[Tensor, " batch"]
    capped: Float[Tensor, " batch"] | None

    @property
    def mine(self) -> Float[Tensor, "batch node"]:
        """The answers' difference only."""
        return self.values[..., 0]

    @property
    def gap(self) -> float:
        """Largest difference between sum and model, relative to the row's largest number."""
        size = torch.maximum(self.mine.abs().amax(1), self.says.abs()).clamp(min=1e-12)
        return float(((self.mine.sum(1) - self.says).abs() / size).max())

    def without(self, kind: str, below: float) -> "Found":
        """The same without parts of a kind that are this small everywhere, relative to the largest.

        What they hold stays in the gap.
        """
        size = self.values.abs().amax((0, 2))
        keep = [
            i for i, place in enumerate(self.places)
            if place[0] != kind or float(size[i]) > below * float(size.max())
        ]  # fmt: skip
        return replace(self, places=[self.places[i] for i in keep], values=self.values[:, keep])


def layout_of(model: Model, head: Head, *, heads: bool) -> Layout:
    """The parts of a model; streams that are no sum of parts are refused.

    Args:
        model: The model.
        head: Its way to the logits.
        heads: Take attention apart by heads where it has some.

    Raises:
        NotOffered: The stream itself is normalised, or the final norm has no linear form.
    """
    blocks = model.anatomy.stacks[model.main].blocks
    if any(block.post_norms for block in blocks):
        raise NotOffered(
            "the stream of this model is not a sum of what its parts write",
            given=repr(model),
            why="its blocks normalise the stream itself (post-norm), so that every later block"
            " rescales what the earlier ones wrote",
            do="use activation patching, which needs no sum",
        )
    width = weight_in_out(head.module).shape[0]
    if model.d_model not in (None, width):
        raise NotOffered(
            "the unembedding of this model does not read the stream",
            given=f"stream of width {model.d_model}, unembedding of width {width}",
            why="another projection stands between them",
            do="use activation patching, which needs no unembedding",
        )
    layers = []
    for number, block in enumerate(blocks):
        at = [Site(n, number, stack=model.main) for n in ("attn_out", "mlp_out", "head_out")]
        attn, mlp, split = (site if model.offers(site) else None for site in at)
        layer = Layer(attn, mlp, split if heads else None, block.attention is not None)
        layers.append(_between(model, layer, width))
    return Layout(model, head, head.form(), tuple(layers))


def _between(model: Model, layer: Layer, width: int) -> Layer:
    """What lies between the heads and the stream: nothing, a norm, or another sub-layer."""
    if layer.attn is None:
        return replace(layer, heads=None)
    block = model.anatomy.stacks[model.main].blocks[layer.attn.layer or 0]
    path = norm_after_heads(model, block)
    if path is None:  # only that other sub-layer writes into the stream
        return replace(layer, heads=None, softmax=False)
    if not path or layer.heads is None:
        return layer
    return replace(layer, norm=(path, norm_form(model.module.get_submodule(path), width)))


def attribute(
    layout: Layout,
    tokens: Tokens,
    answers: Int[Tensor, "batch n"],
    wrong: Int[Tensor, "batch m"],
    drawn: Int[Tensor, "random 2"],
) -> Found:
    """One forward, and every part along every direction at the last position.

    Args:
        layout: From `layout_of`.
        tokens: The prompts.
        answers: Ids, padded with -1; several count with their mean.
        wrong: Likewise.
        drawn: Pairs of token ids whose differences are read too.
    """
    run = layout.model.run(tokens, record=layout.sites, at=-1)
    u, unembedding = _directions(layout.head, answers, wrong, drawn)
    parts: dict[Place, Tensor] = {}
    if isinstance(getattr(layout.head.module, "bias", None), Tensor):
        parts["unembedding bias", -1, -1] = unembedding
    if (form := layout.form) is not None:
        final = run[layout.final][:, 0].double()
        if bool(form.bias.any()):
            parts["final norm bias", -1, -1] = u @ form.bias.double()
        u = _through(form, final, u)
    parts["embed", -1, -1] = _along(run, layout.embed, u)
    for number, layer in enumerate(layout.layers):
        parts |= _layer(run, number, layer, u)
    says, capped = _model_says(layout, run, answers, wrong)
    return Found(list(parts), torch.stack(list(parts.values()), 1).cpu(), says, capped)


def _directions(
    head: Head, answers: Tensor, wrong: Tensor, drawn: Tensor
) -> tuple[Float[Tensor, "batch pair d_model"], Float[Tensor, "batch pair"]]:
    """Unembedding of answer minus wrong per row, then of random tokens; and their biases."""
    rows, biases = [], []
    for right, other in zip(answers.tolist(), wrong.tolist(), strict=True):
        a, w = ([i for i in ids if i >= 0] for ids in (right, other))
        rows.append(head.directions(a).mean(0) - head.directions(w).mean(0))
        biases.append(head.biases(a).mean() - head.biases(w).mean())
    first, second = (drawn[:, i].tolist() for i in range(2))
    random = head.directions(first) - head.directions(second)
    random_bias = head.biases(first) - head.biases(second)
    direction = torch.cat([torch.stack(rows)[:, None], random.expand(len(rows), -1, -1)], 1)
    bias = torch.cat([torch.stack(biases)[:, None], random_bias.expand(len(rows), -1)], 1)
    return direction.detach(), bias.detach()


def _through(form: NormForm, x: Float[Tensor, "batch d_model"], u: Tensor) -> Tensor:
    """Directions after a norm as directions before it, its scale frozen at `x`.

    `<linear(part), u> = <centre(part) / s * gain, u> = <part, centre(gain * u) / s>`.
    """
    return form.centre(form.gain.double() * u) / form.scale(x)[:, None]


def _along(run: Run, site: Site, u: Tensor) -> Float[Tensor, "batch pair"]:
    return torch.einsum("bd,bpd->bp", run[site][:, 0].double(), u)


def _layer(run: Run, number: int, layer: Layer, u: Tensor) -> dict[Place, Tensor]:
    """What one block writes along the directions."""
    parts: dict[Place, Tensor] = {}
    if layer.attn is not None:
        whole = _along(run, layer.attn, u)
        if layer.heads is None:
            parts["attn" if layer.softmax else "mixer", number, -1] = whole
        else:
            before = u
            if layer.norm is not None:
                path, form = layer.norm
                before = _through(form, run[Site("module_in", path=path)][:, 0].double(), u)
            heads = run[layer.heads][:, 0].double()
            each = torch.einsum("bhd,bpd->bhp", heads, before)
            parts |= {("head", number, h): each[:, h] for h in range(each.shape[1])}
            parts["rest", number, -1] = whole - each.sum(1)
    if layer.mlp is not None:
        parts["mlp", number, -1] = _along(run, layer.mlp, u)
    return parts


def _model_says(
    layout: Layout, run: Run, answers: Tensor, wrong: Tensor
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"] | None]:
    """The model's own logit difference before and, if there is one, after the soft cap."""
    after = logit_diff(run.last_logits.double(), answers, wrong).cpu()
    if not layout.head.soft_cap:
        return after, None
    raw = run[layout.raw][:, 0].double() * layout.head.factor
    return logit_diff(raw, answers, wrong).cpu(), after
