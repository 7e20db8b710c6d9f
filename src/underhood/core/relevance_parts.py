"""What relevance rules act on: norms, activations, torch functions; and what they make of them.

A rule never changes a value. `straight` returns the value that the module computed and sends its
gradient to something else, the rules say to what. See `core.relevance`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from underhood.core.anatomy import Block
from underhood.core.errors import NotOffered
from underhood.core.families import NAMES
from underhood.core.model import Model

STABLE = 1e-6  # keeps phi(x) / x finite at zero; the value of the RelP code

ROOTS = (
    torch.rsqrt, Tensor.rsqrt, torch.sqrt, Tensor.sqrt, torch.std, Tensor.std, torch.norm,
    Tensor.norm, torch.linalg.vector_norm, torch.linalg.norm,
)  # fmt: skip
POWERS = (torch.pow, Tensor.pow, Tensor.__pow__)
PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply)
SQUARES = (torch.square, Tensor.square)
RELU = (F.relu, torch.relu, Tensor.relu)
ACTIVATIONS = (
    F.gelu, F.silu, F.mish, F.elu, F.selu, F.celu, F.leaky_relu, F.hardswish, F.relu6,
)  # fmt: skip
SIGMOIDS = (torch.sigmoid, Tensor.sigmoid, F.sigmoid)
SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
_CANNOT = (
    TypeError, RuntimeError, ValueError, AttributeError, IndexError, NotImplementedError,
    AssertionError, KeyError,
)  # fmt: skip


class _Straight(torch.autograd.Function):
    """A value as it is; its gradient goes to something else."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, value: list[Tensor]) -> Tensor:
        # In a list: returned as an output of its own, not as a view of an input, so that models may
        # go on to change it in place.
        return value[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def straight(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, bit for bit, with the gradient of `surrogate`."""
    if not (torch.is_grad_enabled() and surrogate.requires_grad):
        return value
    out: Tensor = _Straight.apply(surrogate.to(value.dtype), [value.detach()])  # type: ignore
    return out


def identity_rule(x: Tensor, y: Tensor) -> Tensor:
    """phi(x) with the gradient of `x * stopgrad(phi(x) / x)`."""
    with torch.no_grad():
        wide = x.double() if x.dtype == torch.float64 else x.float()
        ratio = y.to(wide.dtype) / (wide + torch.where(wide < 0, -STABLE, STABLE))
    return straight(y, x * ratio.to(x.dtype))


def layer_norm_rule(
    value: Tensor, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    *_: Any,
) -> Tensor:  # fmt: skip
    """A LayerNorm's value with its sigma held constant."""
    dims = tuple(range(-len(shape), 0))
    wide = x.double() if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(dims, keepdim=True)
    sigma = (centred.detach().pow(2).mean(dims, keepdim=True) + eps).sqrt()
    out = centred / sigma
    out = out if weight is None else out * weight
    return straight(value, out if bias is None else out + bias)


def rms_norm_rule(
    value: Tensor, x: Tensor, shape: Any, weight: Any = None, eps: float | None = None
) -> Tensor:
    """An RMSNorm's value with its root held constant."""
    dims = tuple(range(-len(shape), 0))
    wide = x.double() if x.dtype == torch.float64 else x.float()
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    out = wide / (wide.detach().pow(2).mean(dims, keepdim=True) + eps).sqrt()
    return straight(value, out if weight is None else out * weight)


def has_mlp(block: Block) -> bool:
    """Whether a block must have an activation."""
    return "mlp_out" in block.points or block.experts is not None


def mixers_of(model: Model, blocks: Sequence[Block]) -> Iterator[tuple[str, str]]:
    """Attentions, other mixers and routers: what they call is no MLP's activation."""
    known = {name for name, _ in model.module.named_modules()}
    for block in blocks:
        for role in ("attn", "mixer", "cross"):
            spec = block.cross if role == "cross" else block.attention
            for name in NAMES[role]:
                path = f"{block.path}.{name}"
                if path in known:
                    soft = spec is not None and (spec.core + ".").startswith(path + ".")
                    yield path, "attention" if soft or role != "mixer" else "mixer"
        if block.experts is not None and block.experts.router:
            yield block.experts.router, "router"


def norms_of(model: Model, skipped: dict[str, str]) -> dict[int, str]:
    """Norms, path by identity: leaves that are called so, or stand where the anatomy has a norm."""
    stacks = model.anatomy.stacks.values()
    points = [p for s in stacks for p in (s.points, *(b.points for b in s.blocks))]
    named = {p[n].path for p in points for n in ("ln1", "ln2", "ln_final") if n in p}
    found = {}
    for path, module in model.module.named_modules():
        kind = type(module).__name__.lower()
        if any(module.children()) or "parametrizations" in path:
            continue
        if isinstance(module, nn.Identity):
            continue
        if "batchnorm" in kind:
            skipped[path] = "batch norm: linear at inference"
        elif "norm" in kind or path in named:
            found[id(module)] = path
    return found


def activation_kind(module: nn.Module, model: Model) -> str | None:
    """Which elementwise nonlinearity: "relu", "pole" (not zero at zero), "other"; None: not one.

    Found by applying its forward to a line of numbers; modules with matrices are not tried.
    """
    if any(module.children()) or any(p.ndim > 1 for p in module.parameters()):
        return None
    if isinstance(module, (nn.Dropout, nn.Identity)) or "norm" in type(module).__name__.lower():
        return None
    x = torch.linspace(-3, 3, 25, device=model.device, dtype=model.dtype)[None]
    try:
        with torch.no_grad():
            y, part = module.forward(x), module.forward(x[:, 5:9])
            turned = module.forward(x.flip(-1))
    except _CANNOT:
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
        return None
    if not torch.allclose(y[:, 5:9], part, atol=1e-3):
        return None
    if not torch.allclose(y.flip(-1), turned, atol=1e-3):
        return None
    if torch.equal(y, F.relu(x)):
        return "relu"
    slope = (y[:, 1:] - y[:, :-1]).float()
    if torch.allclose(slope, slope[:, :1].expand_as(slope), atol=1e-3):
        return None  # linear
    return "pole" if float(y[0, 12].abs()) > 1e-3 else "other"


def called_in_norm(func: Any, args: Any, kwargs: Any) -> tuple[Any, bool]:
    """A torch function called by a norm: its roots are held constant. And whether it was one."""
    out = func(*args, **kwargs)
    names = {"input": "x", "normalized_shape": "shape"}
    if func in (F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm):
        rule = layer_norm_rule if func in (F.layer_norm, torch.layer_norm) else rms_norm_rule
        kwargs = {names.get(k, k): v for k, v in kwargs.items() if k != "cudnn_enable"}
        return rule(out, *args, **kwargs), True
    exponent = args[1] if func in POWERS and len(args) > 1 else kwargs.get("exponent")
    if func in ROOTS or (isinstance(exponent, float) and abs(exponent) == 0.5):
        return out.detach(), True
    return out, False


def called_in_attention(func: Any, args: Any, kwargs: Any) -> tuple[Any, bool]:
    """A torch function called by an attention: patterns are held constant. And if it made one."""
    if func is F.scaled_dot_product_attention:
        names = ("query", "key")
        kwargs = {k: v.detach() if k in names else v for k, v in kwargs.items()}
        return func(*[a.detach() for a in args[:2]], *args[2:], **kwargs), True
    out = func(*args, **kwargs)
    return (out.detach(), True) if func in SOFTMAX else (out, False)


def among(value: Any, tensors: list[Tensor]) -> bool:
    """Whether a value is one of these very tensors."""
    return any(value is t for t in tensors)


def lost(rule: str, place: str, why: str) -> NotOffered:
    """The refusal for a rule that had to act somewhere and could not."""
    return NotOffered(
        f'the relevance rule "{rule}" found nothing to act on',
        given=place,
        why=f"{why}; its ordinary gradient would be passed off as relevance",
        do=f'leave "{rule}" out, or use attribution_patching, which needs no rules',
    )
