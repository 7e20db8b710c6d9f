"""Relevance rules: values stay bit for bit, gradients follow the rules, nothing is left behind."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from kit import HOOKS, hooks, inputs, model
from torch import Tensor, nn
from torch.nn import functional as F

import underhood as uh
from underhood.core.errors import NotOffered, UsageError
from underhood.core.model import Model
from underhood.core.relevance import RULES, Touched, relevance_rules
from underhood.core.taps.patches import active_patches
from underhood.organisms.tiny import tiny

PAPER = ("ln", "identity", "half")
ALL = RULES
GATED = ("llama", "gemma2", "qwen3", "olmo2", "phi3", "mixtral", "gpt_oss", "qwen2_moe")
PLAIN = ("gpt2", "gpt_neox", "bloom", "nemotron", "bert")
RELUS = ("opt", "t5")


class Passed:
    """A forward and the gradients of one logit at the start of every layer."""

    def __init__(
        self, m: Model, given: dict[str, Tensor], rules: Sequence[str], *, grad: bool = True
    ) -> None:
        self.streams: list[Tensor] = []
        probes: list[Tensor] = []

        def probe(h: Tensor) -> Tensor:
            probes.append(torch.zeros_like(h, requires_grad=True))
            self.streams.append(h.detach())
            return h + probes[-1]

        prefix = f"{m.main}." if m.main else ""
        edits = [
            uh.Edit(f"{prefix}resid_pre.{layer}", uh.call(probe)) for layer in range(m.n_layers)
        ]
        with relevance_rules(m, rules) if rules else nullcontext() as touched:
            run = m.run(given, edits=edits, grad=grad)
        self.logits, self.touched = run.logits.detach(), touched
        self.number = run.logits[0, -1, 5]
        if grad:
            self.number.backward()
            self.grads = [p.grad for p in probes if p.grad is not None]
            m.module.zero_grad(set_to_none=True)

    def sums(self) -> list[float]:
        """Sum of activation x gradient over row 0, per layer."""
        return [float((h * g)[0].sum()) for h, g in zip(self.streams, self.grads, strict=True)]


# Values stay, gradients change, nothing is left --------------------------------------------------


@pytest.mark.parametrize("family", GATED + PLAIN + RELUS)
@pytest.mark.parametrize("rules", [("ln",), ("ln", "half"), PAPER, ALL], ids="-".join)
def test_values_stay_and_gradients_change(family: str, rules: tuple[str, ...]) -> None:
    m, given = model(family), inputs(family)
    before = {n: dict(vars(x)) for n, x in m.module.named_modules()}
    bare, ruled = Passed(m, given, ()), Passed(m, given, rules)
    assert torch.equal(bare.logits, ruled.logits)
    for plain, changed in zip(bare.grads, ruled.grads, strict=True):
        assert torch.isfinite(changed).all()
        assert float((plain - changed).norm() / plain.norm()) > 0.03
    after = {n: dict(vars(x)) for n, x in m.module.named_modules()}
    assert {n: set(v) for n, v in before.items()} == {n: set(v) for n, v in after.items()}
    assert active_patches() == 0 and hooks(m.module) == HOOKS[id(m)]
    again = Passed(m, given, ())
    for first, second in zip(bare.grads, again.grads, strict=True):
        assert torch.equal(first, second)


def test_what_was_touched_is_reported() -> None:
    touched = Passed(model("llama"), inputs("llama"), ALL).touched
    assert isinstance(touched, Touched) and touched.rules == ALL
    layers = range(3)
    norms = [
        f"model.layers.{i}.{n}" for i in layers
        for n in ("input_layernorm", "post_attention_layernorm")
    ]  # fmt: skip
    assert touched.paths["ln"] == [*norms, "model.norm"]
    assert touched.paths["identity"] == [f"model.layers.{i}.mlp.act_fn" for i in layers]
    assert touched.paths["half"] == [f"model.layers.{i}" for i in layers]
    assert touched.paths["heads"] == [f"model.layers.{i}.self_attn" for i in layers]
    assert not touched.skipped
    gpt2 = Passed(model("gpt2"), inputs("gpt2"), PAPER).touched
    assert isinstance(gpt2, Touched)
    assert [len(gpt2.paths[rule]) for rule in PAPER] == [7, 3, 0]
    opt = Passed(model("opt"), inputs("opt"), PAPER).touched
    assert isinstance(opt, Touched)
    assert not opt.paths["identity"] and len(opt.skipped) == 3
    assert all("ReLU" in why for why in opt.skipped.values())


@pytest.mark.parametrize(("family", "norms"), [("gemma2", 13), ("qwen3", 13), ("olmo2", 13)])
def test_post_norms_and_qk_norms_are_touched(family: str, norms: int) -> None:
    """4 norms a layer in Gemma 2 (two after), q and k norms in Qwen 3, both kinds in OLMo 2."""
    touched = Passed(model(family), inputs(family), ("ln",)).touched
    assert isinstance(touched, Touched) and len(touched.paths["ln"]) == norms


def test_in_half_precision_and_without_gradients() -> None:
    m = Model(tiny("llama").module.bfloat16(), name="bf16")
    bare, ruled = Passed(m, inputs("llama"), ()), Passed(m, inputs("llama"), ALL)
    assert torch.equal(bare.logits, ruled.logits)
    assert torch.isfinite(ruled.grads[0]).all()
    for rules in (ALL, ("half",)):
        quiet = Passed(m, inputs("llama"), rules, grad=False)
        assert torch.equal(quiet.logits, bare.logits)
        assert quiet.touched is not None and len(quiet.touched.paths["half"]) == 3


# The oracle: the rules as the paper's code writes them, into the classes themselves --------------


def _stop(x: Tensor) -> Tensor:
    return x.detach()


def _times(x: Tensor, y: Tensor) -> Tensor:
    """x * stopgrad(y / x), the identity rule."""
    return x * _stop(y / (x + torch.where(x < 0, -1e-6, 1e-6)))


def _rms(self: Any, x: Tensor) -> Tensor:
    return self.weight * (
        x / _stop((x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt())
    )


def _layer_norm(self: Any, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / _stop((x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()) * self.weight + self.bias


def _silu(self: Any, x: Tensor) -> Tensor:
    return _times(x, F.silu(x))


def _gelu(self: Any, x: Tensor) -> Tensor:
    return _times(x, F.gelu(x, approximate="tanh"))


def _gated(self: Any, x: Tensor) -> Tensor:
    y = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(y / 2 + _stop(y / 2))


def _written(family: str) -> dict[str, tuple[type, Callable[..., Any]]]:
    from transformers.activations import NewGELUActivation, SiLUActivation
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    if family == "gpt2":
        return {"ln": (nn.LayerNorm, _layer_norm), "identity": (NewGELUActivation, _gelu)}
    return {
        "ln": (LlamaRMSNorm, _rms), "identity": (SiLUActivation, _silu), "half": (LlamaMLP, _gated)
    }  # fmt: skip


@contextmanager
def by_hand(family: str, rules: Sequence[str]) -> Iterator[None]:
    """The classes' forwards replaced by the rules' formulas, in which values are only close."""
    with pytest.MonkeyPatch.context() as patch:
        for rule, (cls, forward) in _written(family).items():
            if rule in rules:
                patch.setattr(cls, "forward", forward)
        yield


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rules", [("ln",), ("identity",), ("ln", "half"), PAPER], ids="-".join)
def test_gradients_are_those_of_the_formulas(family: str, rules: tuple[str, ...]) -> None:
    m, given = model(family), inputs(family)
    ours = Passed(m, given, rules)
    with by_hand(family, rules):
        theirs = Passed(m, given, ())
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-5)
    for a, b in zip(ours.grads, theirs.grads, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-4


# Conservation ------------------------------------------------------------------------------------


def relu_net(bias: bool) -> Model:
    torch.manual_seed(0)
    sizes = (6, 16, 16, 1)
    parts: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        parts += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return Model(nn.Sequential(*parts[:-1]).double(), name="relu net")


def test_relevance_is_conserved_in_a_bias_free_relu_net() -> None:
    """The relevance of the inputs, of each hidden layer, and the output: one number."""
    for bias in (False, True):
        m = relu_net(bias)
        x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
        paths = [n for n, _ in m.module.named_children()][:-1]
        with relevance_rules(m, ("identity", "half")) as touched:
            run = m.run(x, record=[f"module:{path}" for path in paths], grad=True)
        assert len(touched.skipped) == 2
        kept = [x, *(run[f"module:{path}"] for path in paths)]
        out: Tensor = run.output
        grads = torch.autograd.grad(out.sum(), kept)
        gaps = [
            float(((h * g).sum(1) - out[:, 0]).detach().abs().max())
            for h, g in zip(kept, grads, strict=True)
        ]
        assert (max(gaps) < 1e-12) is not bias


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "olmo2", "nemotron"])
def test_relevance_is_conserved_in_bias_free_transformers(family: str) -> None:
    """With all four rules, at every layer; with any of them left out it is not."""
    m = Model(tiny(family).module.double(), name=family)
    for name, p in m.module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
    if family == "nemotron":  # its LayerNorm has a bias, now zero
        assert any(n.endswith("bias") for n, _ in m.module.named_parameters())
    found = Passed(m, inputs(family), ALL)
    number = float(found.number.detach())
    assert max(abs(s - number) for s in found.sums()) < 2e-5 * abs(number)
    for left_out in ALL:
        if left_out == "half" and family == "nemotron":
            continue  # it has no gates
        rest = Passed(m, inputs(family), [rule for rule in ALL if rule != left_out])
        assert abs(rest.sums()[0] - number) > 1e-3 * abs(number), left_out


# What cannot be done is refused ------------------------------------------------------------------


class _Oddly(nn.Module):
    """A norm by division that takes no root: refused, not guessed at."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().mean(-1, keepdim=True)


_Oddly.__name__ = "MeanNorm"


def fresh(family: str) -> Model:
    made: Model = uh.load(f"random/{family}")
    return made


def test_a_norm_of_another_kind_is_refused() -> None:
    m = fresh("llama")
    m.module.model.norm = _Oddly()  # type: ignore[union-attr]
    with pytest.raises(NotOffered, match='"ln"') as refused:
        Passed(m, inputs("llama"), PAPER)
    assert "model.norm (MeanNorm)" in str(refused.value)
    assert active_patches() == 0
    Passed(m, inputs("llama"), ("identity", "half"))


def test_an_activation_written_out_is_refused_and_a_function_is_found() -> None:
    m: Any = fresh("gpt2")
    for block in m.module.transformer.h:
        del block.mlp.act
        block.mlp.act = lambda x: x * torch.sigmoid(x)
    with pytest.raises(NotOffered, match='"identity"') as refused:
        Passed(m, inputs("gpt2"), PAPER)
    assert "transformer.h.0" in str(refused.value)
    for block in m.module.transformer.h:
        block.mlp.act = F.gelu
    found = Passed(m, inputs("gpt2"), PAPER)
    assert found.touched is not None
    assert found.touched.paths["identity"] == [f"transformer.h.{i} (gelu)" for i in range(3)]
    as_module: Any = fresh("gpt2")
    for block in as_module.module.transformer.h:
        block.mlp.act = nn.GELU()
    same = Passed(as_module, inputs("gpt2"), PAPER)
    assert torch.equal(found.grads[0], same.grads[0])


def test_a_gated_product_that_is_not_seen_is_refused() -> None:
    m: Any = fresh("llama")
    mlp = m.module.model.layers[1].mlp

    def forward(x: Tensor) -> Tensor:
        gate, up = mlp.act_fn(mlp.gate_proj(x)), mlp.up_proj(x)
        return mlp.down_proj(torch.einsum("...d,...d->...d", gate, up))

    mlp.forward = forward
    with pytest.raises(NotOffered, match='"half"') as refused:
        Passed(m, inputs("llama"), PAPER)
    assert "model.layers.1" in str(refused.value)
    Passed(m, inputs("llama"), ("ln", "identity"))


class _Soft(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


def test_other_refusals() -> None:
    m: Any = fresh("gpt2")
    with pytest.raises(UsageError, match="no relevance rule 'lm'"), relevance_rules(m, ("lm",)):
        pass
    with pytest.raises(UsageError, match="no relevance rule given"), relevance_rules(m, ()):
        pass
    with relevance_rules(m), pytest.raises(UsageError, match="already active"):
        relevance_rules(m).__enter__()
    with pytest.raises(NotOffered, match='"ln"'), relevance_rules(relu_net(False)):
        pass
    with pytest.raises(NotOffered, match='"half"'):
        Passed(m, inputs("gpt2"), ("half",))
    m.module.transformer.h[0].mlp.act = _Soft()
    with pytest.raises(NotOffered, match="pole"):
        Passed(m, inputs("gpt2"), PAPER)
    with pytest.raises(NotOffered, match='"identity"'):
        Passed(model("mamba"), inputs("mamba"), PAPER)
    with pytest.raises(NotOffered, match='"heads"'):
        Passed(model("rwkv"), inputs("rwkv"), ALL)
    m.module.activation_checkpointing_enable()
    m.module.train()
    with pytest.raises(UsageError, match="checkpointing"), relevance_rules(m):
        pass


# Leaving no trace --------------------------------------------------------------------------------


def test_an_exception_leaves_nothing() -> None:
    m = model("llama")

    def boom(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    def slope() -> Tensor:
        x = torch.linspace(-1, 1, 5, requires_grad=True)
        return torch.autograd.grad(F.gelu(x).sum(), x)[0]

    before, outside = hooks(m.module), slope()
    with pytest.raises(ZeroDivisionError), relevance_rules(m, ALL):
        with pytest.raises(ZeroDivisionError):
            m.run(inputs("llama"), edits=uh.Edit("mlp_out.1", uh.call(boom)), grad=True)
        # The user's own functions, after a pass that died halfway, are not the model's.
        assert torch.equal(slope(), outside)
        raise ZeroDivisionError
    assert active_patches() == 0 and hooks(m.module) == before
    again = Passed(m, inputs("llama"), ())
    assert again.touched is None


def test_other_threads_see_nothing_of_the_rules() -> None:
    m, given = model("llama"), inputs("llama")
    plain, ruled = Passed(m, given, ()), Passed(m, given, ALL)
    found: list[Passed] = []
    with relevance_rules(m, ALL):
        thread = threading.Thread(target=lambda: found.append(Passed(m, given, ())))
        thread.start()
        thread.join()
        other = threading.Thread(target=lambda: found.append(Passed(m, given, PAPER)))
        other.start()
        other.join()
    assert torch.equal(found[0].grads[0], plain.grads[0])
    assert torch.equal(found[1].grads[0], Passed(m, given, PAPER).grads[0])
    assert not torch.equal(found[1].grads[0], ruled.grads[0])
