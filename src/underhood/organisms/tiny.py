"""Tiny random models of many architectures, for tests that need no download.

`tiny("llama")` builds a three-layer model from the family's own transformers config. The weights
that a library draws for a fresh model are so small that attention is uniform, norms are the
identity and logits vanish; a tool that reads them wrongly would not be noticed. So every weight is
drawn again such that each part of the model visibly matters.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from underhood.core.errors import SiteNotFound, UsageError
from underhood.organisms.tiny_families import (
    DEFAULTS,
    FAMILY_TABLE,
    FIRST_WORD,
    IMAGE_TOKEN,
    IMAGE_TOKENS,
    VISION_END,
    VISION_START,
    VOCAB,
)

FAMILIES: tuple[str, ...] = tuple(FAMILY_TABLE)

_GAIN = 1.2  # matrices map unit-size vectors to vectors of this size
_NOISE = 0.2  # around the library's own start for norms, biases, decay rates and the like
_PLAIN_WIDTH = 8
# What every config takes although it is no field of it.
_NOT_FIELDS = {"attn_implementation", "experts_implementation", "num_labels", "tie_word_embeddings"}


class PlainMLP(nn.Module):
    """Three linear layers with ReLU between: the simplest network that is not a transformer."""

    def __init__(self, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.fc1 = nn.Linear(_PLAIN_WIDTH, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, classes)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[batch, classes]` of `x` `[batch, 8]`."""
        return self.fc3(self.act(self.fc2(self.act(self.fc1(x)))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut, as in ResNet-18."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; a stride halves height and width."""
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(out + shortcut)


class PlainResNet(nn.Module):
    """A ResNet of two stages, two blocks each, with torchvision's module names."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(BasicBlock(width, width, 1), BasicBlock(width, width, 1))
        self.layer2 = nn.Sequential(
            BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width, 1)
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[batch, classes]` of images `x` `[batch, 3, height, width]`."""
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.avgpool(x).flatten(1))


class PlainLSTM(nn.Module):
    """A two-layer LSTM with a linear read-out at every step."""

    def __init__(self, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.lstm = nn.LSTM(_PLAIN_WIDTH, width, num_layers=2, batch_first=True)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[batch, length, classes]` of `x` `[batch, length, 8]`."""
        return self.fc(self.lstm(x)[0])


_PLAIN: dict[str, type[nn.Module]] = {
    cls.__name__: cls for cls in (PlainMLP, PlainResNet, PlainLSTM)
}


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A tiny model and what a forward pass of it takes.

    Attributes:
        module: The model, in eval mode and float32.
        family: Its name in `FAMILIES`.
        kind: What it reads: `causal`, `masked`, `seq2seq`, `image`, `image_text` (two towers),
            `vlm` (a language model that reads an image), `speech` or `plain` (one tensor `x`).
    """

    module: nn.Module
    family: str
    kind: str

    def inputs(self, batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
        """Valid random inputs for `module(**inputs)`.

        Args:
            batch: Number of rows.
            length: Number of text positions (for `vlm` including those of the image). A `seq2seq`
                decoder gets three fewer, so that the two lengths cannot be confused.
            seed: Of the random numbers; the global generator is left alone.

        Raises:
            UsageError: A batch or length that the family cannot take.
        """
        least = IMAGE_TOKENS + 4 if self.kind == "vlm" else 1
        if batch < 1 or length < least:
            raise UsageError(
                "these inputs cannot be built",
                given=f"batch={batch}, length={length}",
                why=f"{self.family} needs batch >= 1 and length >= {least}",
            )
        generator = torch.Generator().manual_seed(seed)
        return _INPUTS[self.kind](self.module, batch, length, generator)


def tiny(family: str, *, seed: int = 0, **overrides: Any) -> TinyModel:
    """Build a tiny random model of a family, without downloads.

    Args:
        family: One of `FAMILIES`.
        seed: Of the weights; the same seed gives the same model. The global generator is left as
            it was.
        overrides: Values for the family's config (for the plain networks: for the constructor), in
            place of those of the table. `attn_implementation="eager"` works too.

    Raises:
        SiteNotFound: No such family.
        UsageError: A config value that the family does not have.
    """
    if family not in FAMILY_TABLE:
        _refuse_family(family)
    values, class_name, kind = FAMILY_TABLE[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "plain":
            _check_overrides(
                family, overrides, set(inspect.signature(_PLAIN[class_name]).parameters)
            )
            module = _PLAIN[class_name](**{**values, **overrides})
        else:
            model_class = getattr(transformers, class_name)
            module = model_class(_config(family, model_class.config_class, values, overrides))
    module = module.float().eval()
    _redraw(module, torch.Generator().manual_seed(seed))
    return TinyModel(module, family, kind)


def _refuse_family(family: str) -> NoReturn:
    raise SiteNotFound(
        "no such family of tiny models", given=repr(family), do=f"choose from {', '.join(FAMILIES)}"
    )


def _check_overrides(family: str, overrides: dict[str, Any], known: set[str]) -> None:
    # A config swallows names that it does not know, so a typing error would go unseen.
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise UsageError(
            f"{family} has no such setting",
            given=", ".join(unknown),
            do=f"choose from {', '.join(sorted(known))}",
        )


def _config(
    family: str, config_class: Any, values: dict[str, Any], overrides: dict[str, Any]
) -> transformers.PreTrainedConfig:
    """The family's config: defaults it knows, then the table's values, then the caller's."""
    known = {field.name for field in dataclasses.fields(config_class)}
    known |= set(config_class.attribute_map)
    _check_overrides(family, overrides, known | _NOT_FIELDS)
    defaults = {name: value for name, value in DEFAULTS.items() if name in known}
    return config_class(**{**defaults, **values, **overrides})


@torch.no_grad()
def _redraw(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight again, at a size at which no part of the model is idle.

    Matrices keep the size of what they map. Vectors and constants (gains, biases, decay rates,
    gates of a mixture) are jittered around the value that the library starts them at, since only
    the library knows whether a gain rests at one or, as in Gemma, at zero.
    """
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:  # fixed tables, such as Whisper's sinusoids
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        owner, _, leaf = name.rpartition(".")
        if leaf == "A_log" or _is_offset(parameter):
            parameter.add_(_NOISE * noise)
        else:
            # T5 divides by the root of its width before it unembeds with this very matrix.
            is_t5 = name == "shared.weight"
            fan_in = 1 if is_t5 else _fan_in(module.get_submodule(owner), parameter)
            parameter.copy_(_GAIN / fan_in**0.5 * noise)
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var", "_correction_bias", "final_logits_bias")):
            # Absolute, since a variance must stay above zero.
            buffer.add_(_NOISE * torch.randn(buffer.shape, generator=generator).abs())


def _is_offset(parameter: Tensor) -> bool:
    """Whether this is a vector, or a matrix that starts out constant, such as per-head gains."""
    if sum(size > 1 for size in parameter.shape) <= 1:
        return True
    return bool((parameter == parameter.flatten()[0]).all())


def _fan_in(owner: nn.Module, parameter: Tensor) -> int:
    """How many inputs each output sums over."""
    if isinstance(owner, Conv1D):  # GPT-2 stores its matrices as (in, out)
        return parameter.shape[0]
    if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return parameter[0].numel()
    return parameter.shape[-1]


def _words(batch: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(FIRST_WORD, VOCAB, (batch, length), generator=generator)


def _text(module: nn.Module, batch: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    ids = _words(batch, length, generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _seq2seq(
    module: nn.Module, batch: int, length: int, generator: torch.Generator
) -> dict[str, Any]:
    text = _text(module, batch, length, generator)
    return {**text, "decoder_input_ids": _words(batch, max(1, length - 3), generator)}


def _image(
    module: nn.Module, batch: int, length: int, generator: torch.Generator
) -> dict[str, Any]:
    config: Any = module.config
    vision = getattr(config, "vision_config", config)
    shape = (batch, vision.num_channels, vision.image_size, vision.image_size)
    return {"pixel_values": torch.randn(shape, generator=generator)}


def _image_text(
    module: nn.Module, batch: int, length: int, generator: torch.Generator
) -> dict[str, Any]:
    text = _text(module, batch, length, generator)
    # CLIP reads its text at the largest id; at the first position attention would have no say.
    config: Any = module.config
    text["input_ids"][:, -1] = config.text_config.vocab_size - 1
    return text | _image(module, batch, length, generator)


def _vlm(module: nn.Module, batch: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    """Text whose second to seventh positions are one image, between its start and end marks."""
    text = _text(module, batch, length, generator)
    image = slice(2, 2 + IMAGE_TOKENS)
    text["input_ids"][:, 1] = VISION_START
    text["input_ids"][:, image] = IMAGE_TOKEN
    text["input_ids"][:, image.stop] = VISION_END
    config: Any = module.config
    vision = config.vision_config
    if not hasattr(vision, "temporal_patch_size"):
        return text | _image(module, batch, length, generator)
    # Qwen takes images cut into patches, all rows in one sequence, and is told where each lies.
    side = vision.spatial_merge_size * int(IMAGE_TOKENS**0.5)
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    kinds = torch.zeros_like(text["input_ids"])
    kinds[:, image] = 1
    return {
        **text,
        "pixel_values": torch.randn((batch * side**2, patch), generator=generator),
        "image_grid_thw": torch.tensor([[1, side, side]] * batch),
        "mm_token_type_ids": kinds,
    }


def _speech(
    module: nn.Module, batch: int, length: int, generator: torch.Generator
) -> dict[str, Any]:
    config: Any = module.config
    shape = (batch, config.num_mel_bins, 2 * config.max_source_positions)
    features = torch.randn(shape, generator=generator)
    return {"input_features": features, "decoder_input_ids": _words(batch, length, generator)}


def _plain(
    module: nn.Module, batch: int, length: int, generator: torch.Generator
) -> dict[str, Any]:
    shape: tuple[int, ...] = (batch, _PLAIN_WIDTH)
    if isinstance(module, PlainResNet):
        shape = (batch, 3, 12, 12)
    elif isinstance(module, PlainLSTM):
        shape = (batch, length, _PLAIN_WIDTH)
    return {"x": torch.randn(shape, generator=generator)}


_Builder = Callable[[nn.Module, int, int, torch.Generator], dict[str, Any]]
_INPUTS: dict[str, _Builder] = {
    "causal": _text,
    "masked": _text,
    "seq2seq": _seq2seq,
    "image": _image,
    "image_text": _image_text,
    "vlm": _vlm,
    "speech": _speech,
    "plain": _plain,
}
