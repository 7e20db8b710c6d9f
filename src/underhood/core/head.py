"""The way from residual stream to logits: final norm, unembedding, scale, soft cap.

`Head` uses the model's own modules and finds by measurement what is left between the head module
and the logits (a constant factor as in Cohere and Granite, or a soft cap as in Gemma 2). `NormForm`
is a norm as a linear map once its scale is frozen, found by probing it with two random vectors and
verified with a third, whatever its class; direct attribution stands on it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underhood.core.errors import NotOffered
from underhood.core.taps.modules import weight_in_out

if TYPE_CHECKING:
    from underhood.core.model import Model

__all__ = ["Head", "NormForm", "norm_form"]


@dataclass(frozen=True, slots=True)
class NormForm:
    """`norm(x) = (x - centred * mean(x)) / scale(x) * gain + bias`.

    Attributes:
        gain: `[d]`.
        bias: `[d]`.
        centred: Whether the mean is taken out first (LayerNorm).
        eps: What is added under the root.
        still: A norm that does nothing (`nn.Identity`): its scale is 1.
    """

    gain: Tensor
    bias: Tensor
    centred: bool
    eps: float
    still: bool = False

    def scale(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
        """The denominator at `x`."""
        if self.still:
            return torch.ones_like(x[..., :1], dtype=torch.float64)
        y = self.centre(x.double())
        return (y.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def centre(self, x: Tensor) -> Tensor:
        """`x` without its mean, where the norm takes it out."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def linear(self, part: Float[Tensor, "*batch d"], scale: Tensor) -> Float[Tensor, "*batch d"]:
        """A part of the stream through the norm with its scale frozen; no bias."""
        return self.centre(part.double()) / scale * self.gain.double()


def norm_form(norm: nn.Module, width: int) -> NormForm:
    """Find a norm's linear form by probing it.

    Raises:
        NotOffered: The module is not such a norm (the third probe disagrees).
    """
    if isinstance(norm, nn.Identity):
        one = torch.ones(width, dtype=torch.float64)
        return NormForm(one, torch.zeros_like(one), False, 0.0, still=True)
    first = next(norm.parameters(), torch.empty(0))
    dtype = first.dtype if first.is_floating_point() else torch.float32
    make = torch.Generator().manual_seed(0)
    probes = torch.randn(3, width, generator=make).to(first.device, dtype) * 3 + 1
    eps = next(
        (float(getattr(norm, n)) for n in ("eps", "variance_epsilon") if hasattr(norm, n)), 1e-5
    )
    with torch.no_grad():
        # The forward itself, past any hooks: a session may be listening to this norm.
        outs = norm.forward(probes).double()
        level = torch.full((1, width), 2.0, device=first.device, dtype=dtype)
        flat = norm.forward(level)[0].double()
    x = probes.double()
    for centred in (True, False):
        bias = flat if centred else torch.zeros_like(flat)
        empty = NormForm(torch.ones_like(flat), bias, centred, eps)
        gain = (outs[0] - bias) * empty.scale(x[0]) / empty.centre(x[0])
        form = NormForm(gain, bias, centred, eps)
        seen = form.linear(x[1:], form.scale(x[1:])) + bias
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        if torch.allclose(seen, outs[1:], atol=tolerance, rtol=tolerance):
            return form
    raise NotOffered(
        "the final norm is not a LayerNorm or RMSNorm",
        given=type(norm).__name__,
        why="with its scale frozen it is not linear, so parts cannot be added up",
        do="use activation patching, which needs no linear form",
    )


# Children beside an unembedding that stand before it.
_BEFORE_UNEMBEDDING = ("transform", "dense", "layer_norm", "lm_head")
# Classes whose logits are scaled: the config's name for the factor, and its power.
_FACTORS = (
    ("Cohere", "logit_scale", 1),
    ("Granite", "logits_scaling", -1),
    ("MiniCPM3", "logits_scaling", -1),
    ("HyperCLOVAX", "logits_scaling", 1),
    ("FalconH1", "lm_head_multiplier", 1),
)


class Head:
    """Final norm and unembedding of a model's main stack."""

    def __init__(self, model: "Model") -> None:
        self.model = model
        path = model.anatomy.head
        if path is None:
            raise NotOffered(
                "this model has no unembedding",
                given=repr(model),
                why="it does not predict tokens",
                do="use a model with a language-model head",
            )
        self._check_bare(path)
        self.module = model.module.get_submodule(path)
        point = model.anatomy.stacks[model.main].points.get("ln_final")
        self.norm = model.module.get_submodule(point.path) if point else None

    def _check_bare(self, path: str) -> None:
        """Refuse a head of several layers (BERT's): it is more than an unembedding."""
        owner = path.rpartition(".")[0]
        found = dict(self.model.module.get_submodule(owner).named_children())
        between = [
            n for n in _BEFORE_UNEMBEDDING if n in found and f"{owner}.{n}".strip(".") != path
        ]
        if between:
            raise NotOffered(
                "this model's stream does not meet its unembedding directly",
                given=f"{path}, behind {', '.join(between)}",
                why="another layer with a nonlinearity stands before it",
                do="record logits, or use module: sites of the head",
            )

    def logits(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """What the model would say if `resid` were its final stream."""
        with torch.no_grad():
            normed = self.norm(resid) if self.norm is not None else resid
            return self.finish(self.module(normed))

    def finish(self, raw: Tensor) -> Tensor:
        """From the head module's output to the logits."""
        cap, factor = self.soft_cap, self.factor
        raw = raw * factor if factor != 1.0 else raw
        raw = raw if self.added is None else raw + self.added
        return torch.tanh(raw / cap) * cap if cap else raw

    @property
    def _config(self) -> Any:
        config = self.model.config
        return getattr(config, "text_config", None) or config

    @property
    def factor(self) -> float:
        """Constant between the final norm and the logits (T5, and `_FACTORS`)."""
        config, family = self._config, type(self.model.module).__name__
        if getattr(config, "scale_decoder_outputs", False):
            return float(config.d_model) ** -0.5
        for start, name, power in _FACTORS:
            if family.startswith(start):
                return float(getattr(config, name, None) or 1.0) ** power
        return 1.0

    @property
    def soft_cap(self) -> float | None:
        """Soft cap of the logits (Gemma 2, RecurrentGemma)."""
        config = self._config
        cap = getattr(config, "final_logit_softcapping", None)
        return cap or getattr(config, "logits_soft_cap", None)

    @property
    def added(self) -> Tensor | None:
        """Bias that the model adds beside its head (BART)."""
        found = getattr(self.model.module, "final_logits_bias", None)
        return found.detach()[0] if isinstance(found, Tensor) else None

    def directions(self, tokens: list[int]) -> Float[Tensor, "n d_model"]:
        """Unembedding rows of some tokens, factor included, in float64."""
        return weight_in_out(self.module).T[tokens].double() * self.factor

    def biases(self, tokens: list[int]) -> Float[Tensor, " n"]:
        """Unembedding biases of some tokens."""
        total = torch.zeros(len(tokens), dtype=torch.float64, device=self.model.device)
        if isinstance(bias := getattr(self.module, "bias", None), Tensor):
            total = total + bias[tokens].double() * self.factor
        return total if self.added is None else total + self.added[tokens].double()

    def form(self) -> NormForm | None:
        """The final norm's linear form; None when the stack has none."""
        if self.norm is None:
            return None
        width = weight_in_out(self.module).shape[0]
        return norm_form(self.norm, width)
