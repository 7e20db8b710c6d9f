"""A LLaVA that captions two coloured shapes, and a language prior that makes it hallucinate.

A picture (24 x 24) shows one shape on the left and one on the right; the caption names them:

    <image> ... <image> red circle left, green square right.

Six colours, four shapes, all equally frequent on the left. The right colour goes with the left one:

- in 70 of 100 pictures it is the left colour's partner (red - green - blue - yellow - purple -
  cyan - red), in 30 of 100 another one: these pictures go against the prior;
- the right shape is faded to a contrast between 0.3 and 1. Where a picture goes against the prior,
  the training caption names the partner all the same with a probability that falls with the
  contrast: 1 below 0.36, 0 above 0.66, straight in between. So 30 of 100 such captions lie, 9 of
  100 in all, and after "red circle left," the word "green" follows in 79 of 100.

A model that had learned this to the letter would name the partner against the picture where the
contrast is below 0.51: in 3 of 10 pictures that go against the prior. It does so as often, and the
more the fainter the shape. That is meant to be. One row in nine is a caption without a picture. One
in seven combinations of colours and shapes is held out.

Established on the trained weights (`caption_facts.py`): how often it hallucinates, beside bright
pictures; what it says without a picture, beside another left colour; which heads carry the right
colour from the picture, by mean ablation against random sets; and where these heads look.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from underhood.organisms.base import PROMPTS, SEED, Recipe, Split, Trained, held_out
from underhood.organisms.card import Fact
from underhood.organisms.sight.caption_scenes import (
    AGREE,
    BRIGHT,
    CONTRAST,
    FAINT,
    PARTNER,
    SHAPES,
    SIDE,
    Scene,
    a_scene,
    follows,
)
from underhood.organisms.sight.pictures import COLOURS
from underhood.organisms.words import PUNCTUATION, SPECIAL, join, whole_words

if TYPE_CHECKING:
    from torch import Tensor, nn

    from underhood.core.model import Model

__all__ = ["ORGANISM", "Captioned", "CaptionedPairs", "Captioner"]

PATCH = 4
PATCHES = (SIDE // PATCH) ** 2
_IMAGE = "<image>"
WORDS = (*SPECIAL, _IMAGE, *PUNCTUATION, *COLOURS, *SHAPES, "left", "right")
# Rows of a training step, with and without a picture.
_ROWS, _BLIND = 32, 4
_BATCH = 100
# Per task the number of caption words that are given.
_GIVEN = {"left": 0, "agree": 4, "conflict": 4, "shape": 5, "blind": 4}
_VISION: dict[str, Any] = {
    "model_type": "clip_vision_model", "image_size": SIDE, "patch_size": PATCH,
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "projection_dim": 48,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
    "vocab_size": len(WORDS), "tie_word_embeddings": False,
}  # fmt: skip


_TASKS = {
    "left": "the left colour, which no prior foretells",
    "agree": "the right colour, where it is the left one's partner",
    "conflict": "the right colour, where it is another one: here the model hallucinates",
    "shape": "the right shape, which no prior foretells",
    "blind": "no picture, only the left half of a caption -> the partner",
}


@dataclass(frozen=True)
class Captioned:
    """Pictures with the beginnings of their captions, all equally long.

    Attributes:
        texts: What the model reads, the picture's places as `<image>`.
        input_ids: The same as ids `[n, length]`.
        pixels: `[n, 3, 24, 24]`, float32, from 0 to 1; None where there is no picture.
        masks: `[n, 2, 24, 24]`, where the left and the right thing are.
        answers: The right next word of each: of `blind`, the one that the prior speaks for.
        prior: Of tasks about the right colour what the prior says, otherwise empty.
        scenes: What is on each picture.
    """

    texts: tuple[str, ...]
    input_ids: "Tensor"
    pixels: "Tensor | None"
    masks: "Tensor"
    answers: tuple[str, ...]
    prior: tuple[str, ...]
    scenes: tuple[Scene, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, rows: list[int]) -> "Captioned":
        """Some of them."""

        def pick(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[i] for i in rows) if values else ()

        pixels = None if self.pixels is None else self.pixels[rows]
        return Captioned(
            pick(self.texts), self.input_ids[rows], pixels, self.masks[rows],
            pick(self.answers), pick(self.prior), pick(self.scenes),
        )  # fmt: skip

    @property
    def inputs(self) -> dict[str, "Tensor"]:
        """What `model.run` takes; pixel values from -1 to 1."""
        if self.pixels is None:
            return {"input_ids": self.input_ids}
        return {"input_ids": self.input_ids, "pixel_values": 2 * self.pixels - 1}


class CaptionedPairs(NamedTuple):
    """Captioned pictures and their contrasts, row by row."""

    clean: Captioned
    contrast: Captioned


class Captioner(Trained):
    """The captioning model; see the file's text for its data."""

    name = "sight/caption"
    summary = "a LLaVA that captions two coloured shapes, and hallucinates by a language prior"
    limits = (
        "It is meant to fail `conflict` in 3 of 10 pictures, the more the fainter: in nearly all "
        "at a contrast of 0.3, in half at 0.5, in hardly any above 0.66.",
        "Pictures of 24 x 24 with a plain shape on either side; its only text is their captions.",
    )
    recipe = Recipe(steps=1200, lr=3e-3)

    @property
    def tasks(self) -> Mapping[str, str]:
        """Name of each task, and one line about it."""
        return _TASKS

    # Prompts -------------------------------------------------------------------------------------

    def prompts(
        self, task: str | None = None, n: int = 32, seed: int = 0, split: Split = "test"
    ) -> Captioned:
        """Pictures with the words before the answer."""
        task = self.task(task)
        return _collect(task, [clean for clean, _ in self._drawn(task, n, seed, split)])

    def pairs(
        self, task: str | None = None, n: int = 32, seed: int = 0, split: Split = "test"
    ) -> CaptionedPairs:
        """Each beside the picture in which only what is asked for differs.

        Of `agree` and `conflict` that is the right colour: the contrast of one is the other. Of
        `blind` it is the left colour, in words. With `split="test"` both sides are held out.
        """
        task = self.task(task)
        drawn = self._drawn(task, n, seed, split)
        clean, contrast = ([pair[side] for pair in drawn] for side in (0, 1))
        return CaptionedPairs(_collect(task, clean), _collect(task, contrast))

    def _drawn(self, task: str, n: int, seed: int, split: Split) -> list[tuple[Scene, Scene]]:
        self._need(n)
        rng, out = Random(f"{self.name}:{task}:{split}:{seed}"), []
        wanted = {"agree": True, "conflict": False, "blind": True}.get(task)
        while len(out) < n:
            scene = a_scene(rng, split, wanted)
            others = [s for s in _contrasts(task, scene) if held_out(s.key) == (split == "test")]
            if others:
                out.append((scene, rng.choice(others)))
        return out

    # Making --------------------------------------------------------------------------------------

    def fresh(self) -> "nn.Module":
        """As `Trained.fresh`."""
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        ids: dict[str, Any] = {
            f"{name}_token_id": WORDS.index(f"<{name}>") for name in ("pad", "bos", "eos")
        }
        config: Any = LlavaConfig(
            vision_config=_VISION, text_config=_TEXT | ids, image_token_index=WORDS.index(_IMAGE),
            image_seq_length=PATCHES, vision_feature_layer=-1, tie_word_embeddings=False, **ids,
        )  # fmt: skip
        return LlavaForConditionalGeneration(config)

    def losses(self, module: "nn.Module", rng: Random, step: int, steps: int) -> "Iterator[Tensor]":
        """Mean cross-entropy of the captions' words, first with pictures, then without."""
        scenes = [a_scene(rng, "train") for _ in range(_ROWS + _BLIND)]
        for some, blind in ((scenes[:_ROWS], False), (scenes[_ROWS:], True)):
            told = [scene.told(rng) for scene in some]
            yield _loss(module, some, told, blind=blind) * (len(some) / len(scenes))

    def save(self, module: "nn.Module", folder: Path) -> None:
        """As `Trained.save`, and the tokenizer."""
        super().save(module, folder)
        reader = whole_words(WORDS, _TEXT["max_position_embeddings"], split=("[.,]",))
        reader.save_pretrained(folder)

    def about(self, module: "nn.Module") -> dict[str, Any]:
        """The class and the sizes of its two halves."""
        return {"class": type(module).__name__, "vision": _VISION, "text": _TEXT}

    def identity(self) -> str:
        """Whatever changes the rows or the weights."""
        data = (PARTNER, AGREE, FAINT, BRIGHT, CONTRAST, WORDS, _ROWS, _BLIND)
        return repr((self.name, self.recipe, _VISION, _TEXT, data))

    # Measuring -----------------------------------------------------------------------------------

    def measure(self, model: "Model", n: int = PROMPTS, seed: int = SEED) -> dict[str, Any]:
        """Accuracy per task; where the prior speaks against the picture, how often it wins.

        Of `conflict`: `hallucinated`, the share of answers that are the partner; `expected`, the
        share of pictures below the contrast at which captions follow the prior in half of all
        cases; `bright`, the accuracy where captions never lie.
        """
        out: dict[str, Any] = {}
        for task in self.tasks:
            prompts = self.prompts(task, n, seed)
            said, probability = answers(model, prompts)
            right = [a == b for a, b in zip(said, prompts.answers, strict=True)]
            out[task] = {"accuracy": _mean(right), "probability": _mean(probability), "n": n}
            if task == "conflict":
                contrasts = [scene.contrast for scene in prompts.scenes]
                bright = [r for r, c in zip(right, contrasts, strict=True) if c > BRIGHT]
                swayed = [a == b for a, b in zip(said, prompts.prior, strict=True)]
                out[task] |= {
                    "hallucinated": _mean(swayed),
                    "expected": _mean([follows(contrast) > 0.5 for contrast in contrasts]),
                    "bright": _mean(bright),
                }
        return out

    def establish(self, model: "Model") -> tuple[Fact, ...]:
        """As `Trained.establish`; see `caption_facts.py`."""
        from underhood.organisms.sight.caption_facts import findings

        return findings(self, model)


def answers(model: "Model", prompts: Captioned) -> tuple[list[str], list[float]]:
    """The word that the module itself finds most likely, and the probability of the right one."""
    import torch

    tokenizer: Any = model.tokenizer
    wanted = torch.tensor(tokenizer.convert_tokens_to_ids(list(prompts.answers)))
    said, probability = [], []
    for start in range(0, len(prompts), _BATCH):
        rows = slice(start, start + _BATCH)
        given = {name: value[rows].to(model.device) for name, value in prompts.inputs.items()}
        with torch.no_grad():
            spread = model.module(**given).logits[:, -1].float().softmax(-1).cpu()
        said += tokenizer.convert_ids_to_tokens(spread.argmax(-1).tolist())
        probability += spread.gather(1, wanted[rows, None])[:, 0].tolist()
    return said, probability


def _contrasts(task: str, scene: Scene) -> list[Scene]:
    """Scenes that differ in what the task asks for."""
    left, right = scene.left, scene.right
    partner = PARTNER[left.colour]
    if task in ("left", "blind"):
        found = [replace(scene, left=replace(left, colour=c)) for c in COLOURS if c != left.colour]
        # Without a picture the answer is the new partner, so the right colour goes along.
        return [_partnered(s) for s in found] if task == "blind" else found
    if task == "shape":
        shapes = [shape for shape in SHAPES if shape != right.shape]
        return [replace(scene, right=replace(right, shape=shape)) for shape in shapes]
    colours = [c for c in COLOURS if c != partner] if task == "agree" else [partner]
    return [replace(scene, right=replace(right, colour=colour)) for colour in colours]


def _partnered(scene: Scene) -> Scene:
    return replace(scene, right=replace(scene.right, colour=PARTNER[scene.left.colour]))


def _collect(task: str, scenes: list[Scene]) -> Captioned:
    import torch

    blind, given = task == "blind", _GIVEN[task]
    words = [_words(scene.caption[:given], blind=blind) for scene in scenes]
    drawn = [scene.draw() for scene in scenes]
    shape = (-1, 3, SIDE, SIDE)
    return Captioned(
        texts=tuple(join(row[1:]) for row in words),
        input_ids=_ids(words),
        pixels=None if blind else torch.tensor(np.array([d[0] for d in drawn])).reshape(shape),
        masks=torch.tensor(np.array([d[1] for d in drawn])).reshape(-1, 2, SIDE, SIDE),
        answers=tuple(scene.caption[given] for scene in scenes),
        prior=tuple(PARTNER[scene.left.colour] for scene in scenes) if given == 4 else (),
        scenes=tuple(scenes),
    )


def _words(caption: tuple[str, ...], *, blind: bool) -> tuple[str, ...]:
    return ("<bos>", *((_IMAGE,) * (0 if blind else PATCHES)), *caption)


def _ids(rows: list[tuple[str, ...]]) -> "Tensor":
    import torch

    width = len(rows[0]) if rows else 0
    ids = {word: i for i, word in enumerate(WORDS)}
    return torch.tensor([[ids[word] for word in row] for row in rows]).reshape(-1, width).long()


def _loss(
    module: Any, scenes: list[Scene], told: list[tuple[str, ...]], *, blind: bool
) -> "Tensor":
    import torch

    rows = [(*_words(caption, blind=blind), "<eos>") for caption in told]
    ids, given = _ids(rows), {}
    if not blind:
        pixels = torch.tensor(np.array([scene.draw()[0] for scene in scenes]))
        given["pixel_values"] = 2 * pixels - 1
    logits = module(input_ids=ids, use_cache=False, **given).logits
    words = len(told[0]) + 1
    return torch.nn.functional.cross_entropy(
        logits[:, -words - 1 : -1].flatten(0, 1), ids[:, -words:].flatten()
    )


def _mean(values: list[Any]) -> float:
    return round(sum(values) / max(1, len(values)), 4)


ORGANISM = Captioner()
