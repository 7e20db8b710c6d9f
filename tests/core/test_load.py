"""Loading: offline, from memory, by family; and an import that costs nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import gap
from safetensors.torch import load_file
from torch import nn

import underhood as uh
from underhood.core.errors import ModelNotFound, UsageError
from underhood.organisms.tiny import tiny

QUIET = ("torch", "transformers", "numpy", "xarray", "scipy", "sklearn", "pandas", "typer")


def python(code: str) -> str:
    """Run a line in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light() -> None:
    heavy = python(f"import underhood, sys; print([m for m in {QUIET!r} if m in sys.modules])")
    assert heavy == "[]"


def test_every_public_name_is_there() -> None:
    assert (
        python("import underhood as uh; print([n for n in uh.__all__ if not hasattr(uh, n)])")
        == "[]"
    )
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        uh.nonsense  # noqa: B018


def test_the_built_in_model_needs_no_network() -> None:
    blocked = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('a socket was opened')\n"
        "socket.socket.connect = refuse\n"
        "import underhood as uh\n"
        "model = uh.load()\n"
        "print(model.name, model.n_layers, model.run('The capital of France is').logits.ndim)"
    )
    assert python(blocked) == "town 6 3"


@pytest.mark.parametrize("family", ["gpt2", "mamba", "vit", "plain_mlp", "t5"])
def test_random_families(family: str) -> None:
    model = uh.load(f"random/{family}")
    assert model.name == f"random/{family}"
    assert model.fingerprint == uh.load(f"random/{family}").fingerprint
    assert model.fingerprint != uh.load(f"random/{family}", seed=1).fingerprint


def test_unknown_family() -> None:
    with pytest.raises(ModelNotFound, match="no family") as caught:
        uh.load("random/lama")
    assert "llama" in str(caught.value)
    with pytest.raises(UsageError, match="no such setting"):
        uh.load("random/llama", slidng_window=3)


@pytest.mark.parametrize("training", [True, False])
def test_a_module_in_memory_stays_as_it_is(training: bool) -> None:
    module = tiny("llama").module.train(training)
    module.get_submodule("model.layers.1").train(not training)
    flags = {n: m.training for n, m in module.named_modules()}
    weights = dict(module.state_dict())
    copies = {k: v.clone() for k, v in weights.items()}
    attributes = {n: set(vars(m)) for n, m in module.named_modules()}
    model = uh.load(module)
    model.sites()
    ids = torch.tensor([[9, 10, 11]])
    first = model.run(ids, record="*", edits=uh.Edit("z.1.0", uh.zero()))
    second = model.run(ids, record="*", edits=uh.Edit("z.1.0", uh.zero()))
    assert torch.equal(first.logits, second.logits)  # dropout is off in a run
    assert model.module is module
    assert flags == {n: m.training for n, m in module.named_modules()}
    for key, value in module.state_dict().items():
        assert value.data_ptr() == weights[key].data_ptr() and torch.equal(value, copies[key]), key
    assert all(p.grad is None for p in module.parameters())
    assert attributes == {n: set(vars(m)) for n, m in module.named_modules()}


def test_a_plain_module() -> None:
    last = nn.Linear(8, 2)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), last)
    model = uh.load(module)
    x = torch.randn(3, 4)
    run = model.run(x, record=["module:0", "module_in:2"])
    assert torch.equal(run["module:0"].relu(), run["module_in:2"])
    assert gap(run["module_in:2"] @ last.weight.T + last.bias, module(x)) < 1e-6
    quiet = model.run(x, edits=uh.Edit("module:0", uh.zero()))
    assert torch.allclose(quiet.output, last.bias.expand(3, 2))


def test_a_plain_network_on_real_pictures(material: Callable[[str], Path]) -> None:
    """784-100-100-10: the publisher's accuracy, and a neuron's edit equals a zeroed weight."""
    folder = material("mnist-mlp")
    weights = load_file(folder / "model.safetensors")
    data = load_file(folder / "mnist_test_2000.safetensors")
    linears = [nn.Linear(*sizes) for sizes in ((784, 100), (100, 100), (100, 10))]
    with torch.no_grad():
        for i, layer in enumerate(linears):
            layer.weight.copy_(weights[f"layers.{i}.W"].T)
            layer.bias.copy_(weights[f"layers.{i}.b"])
    module = nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])
    model = uh.load(module, name="digits")
    pictures, labels = data["images_uint8"].flatten(1).float() / 255, data["labels"]
    run = model.run(pictures, record=["module:3"])
    accuracy = float((run.output.argmax(-1) == labels).float().mean())
    assert accuracy > 0.96  # 97.60 % on all 10,000; these are the first 2,000, the harder ones
    quiet = torch.ones(100)
    quiet[run["module:3"].mean(0).argmax()] = 0
    edited = model.run(pictures, edits=uh.Edit("module:3", uh.affine(quiet, torch.zeros(100))))
    with torch.no_grad():
        expected = linears[2](run["module:3"] * quiet)
    assert torch.equal(edited.output, expected)
    assert not torch.equal(edited.output, run.output)


def test_a_folder_and_its_label(tmp_path: Path) -> None:
    module: Any = tiny("gpt2").module
    module.save_pretrained(tmp_path / "saved")
    model = uh.load(tmp_path / "saved")
    assert model.tokenizer is None and model.n_layers == 3
    assert model.fingerprint == uh.load("random/gpt2").fingerprint
    ids = torch.tensor([[9, 10, 11]])
    assert torch.equal(model.run(ids).logits, uh.load("random/gpt2").run(ids).logits)
