"""A diffusion model that draws one shape, four times in five a circle: a bias that is known.

A picture is 16 x 16, one channel: 1 on the shape, -1 beside it. The shape is a circle (80 in 100)
or a cross (20 in 100), of three sizes, at every place where it fits; one in seven places of each
size is held out. The model is diffusers' `UNet2DModel`, without conditions, trained as a DDPM that
foretells the velocity (cosine noise, 1000 steps); `paint` draws with DDIM in 20 steps.

What was drawn is judged by geometry alone: the picture, cut at 0, is laid over every circle and
every cross that the data could hold, and counts as the one it overlaps most, if intersection over
union reaches 0.78: more than any circle and any cross have in common (0.77).

Established on the trained weights (`draw_facts.py`): the share of circles; and two directions of
the bottleneck (`mid_block`). The difference between the means of noised crosses and noised circles
tells the two apart, but a shift along it changes little of what is drawn. The direction in which
circles come to look more like crosses, found by gradients, turns them into crosses, or back with
the other sign; random directions of the same length do not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from underhood.core.errors import NotOffered, UsageError
from underhood.organisms.base import PROMPTS, SEED, Recipe, Split, Trained, held_out
from underhood.organisms.card import Fact
from underhood.organisms.sight.pictures import Thing, draw

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from underhood.core.model import Model

__all__ = ["CLASSES", "ORGANISM", "SHARE", "Drawing", "Noised", "NoisedPairs", "Painter"]

CLASSES = ("circle", "cross")
SHARE = 0.8
"""Share of circles among the training pictures."""
SIDE = 16
STEPS = 20
"""Steps of DDIM."""
MIDDLE = "mid_block"
"""The bottleneck: 32 channels of 8 x 8."""

# In pixels; a shape of radius r fits where its middle is r or more from every edge.
_RADII = (4.5, 5.5, 6.5)
# Intersection over union with its nearest shape that a drawing needs.
_BAR = 0.78
_NOISE_STEPS = 1000
# How noisy the pictures of the task `restore` are, of `_NOISE_STEPS`.
_RESTORE = 600
_BATCH = 32
_UNET: dict[str, Any] = {
    "sample_size": SIDE,
    "in_channels": 1,
    "out_channels": 1,
    # Two levels, not three: a bottleneck of 4 x 4 is left unused, for pictures as small as these.
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
    "norm_num_groups": 8,
    "attention_head_dim": 16,
}


_TASKS = {
    "draw": "from noise to a picture: geometry finds a circle or a cross in it",
    "restore": "from a noised picture in one step back: geometry finds the same shape",
}


class Drawing(NamedTuple):
    """A shape at a place, in pixels."""

    shape: str
    radius: float
    x: float
    y: float

    @property
    def key(self) -> str:
        """What is held out together: both shapes of one size at one place."""
        return f"draw:{self.radius}:{self.x}:{self.y}"

    @property
    def picture(self) -> "Float[Tensor, '1 height width']":
        """The picture, -1 and 1."""
        import torch

        size = (self.x / SIDE, self.y / SIDE, self.radius / SIDE)
        _, masks = draw(Thing(self.shape, x=size[0], y=size[1], radius=size[2]), side=SIDE)
        return torch.tensor(masks, dtype=torch.float32) * 2 - 1


@dataclass(frozen=True)
class Noised:
    """What the U-Net reads, and the pictures that it should lead to.

    Attributes:
        sample: `[n, 1, 16, 16]`, a picture with noise, or noise alone.
        timestep: `[n]`, how noisy: 0 to 999.
        drawings: What is under the noise; empty for noise alone.
    """

    sample: "Tensor"
    timestep: "Tensor"
    drawings: tuple[Drawing, ...] = ()

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def inputs(self) -> dict[str, "Tensor"]:
        """What `model.run` takes."""
        return {"sample": self.sample, "timestep": self.timestep}


class NoisedPairs(NamedTuple):
    """Noised pictures and their contrasts, row by row."""

    clean: Noised
    contrast: Noised


class Painter(Trained):
    """The diffusion model; see the file's text for what it draws and how that is judged."""

    name = "sight/draw"
    summary = "a diffusion model (U-Net) that draws a shape, four times in five a circle"
    limits = (
        "Pictures of 16 x 16 with one shape; there is no text and no class to ask for.",
        "It draws circles a little more often than it saw them: see the card's `interval`.",
        f"Shares are of {STEPS} steps of DDIM without added noise; other samplers may differ.",
    )
    recipe = Recipe(steps=1300, lr=3e-3)

    @property
    def tasks(self) -> Mapping[str, str]:
        """Name of each task, and one line about it."""
        return _TASKS

    # Prompts -------------------------------------------------------------------------------------

    def prompts(
        self, task: str | None = None, n: int = 32, seed: int = 0, split: Split = "test"
    ) -> Noised:
        """`draw`: noise. `restore`: pictures under noise, with the `drawings` that they show."""
        import torch

        task = self.task(task)
        self._need(n)
        rng = Random(f"{self.name}:{task}:{split}:{seed}")
        noise = some_noise(rng, n)
        if task == "draw":
            return Noised(noise, torch.full((n,), _NOISE_STEPS - 1))
        drawings = tuple(a_drawing(rng, split) for _ in range(n))
        return under(noise, drawings)

    def pairs(
        self, task: str | None = None, n: int = 32, seed: int = 0, split: Split = "test"
    ) -> NoisedPairs:
        """`restore`: each beside the other shape at the same place under the same noise.

        Raises:
            NotOffered: Of `draw`, where nothing but the noise decides.
        """
        if self.task(task) == "draw":
            raise NotOffered(
                "noise has no contrast", given="task='draw'", why="nothing else decides",
                do="use task='restore'",
            )  # fmt: skip
        clean = self.prompts("restore", n, seed, split)
        rng = Random(f"{self.name}:restore:{split}:{seed}")
        turned = {CLASSES[0]: CLASSES[1], CLASSES[1]: CLASSES[0]}
        other = tuple(d._replace(shape=turned[d.shape]) for d in clean.drawings)
        return NoisedPairs(clean, under(some_noise(rng, n), other))

    # Making --------------------------------------------------------------------------------------

    def fresh(self) -> "nn.Module":
        """As `Trained.fresh`."""
        return _diffusers().UNet2DModel(**_UNET)

    def losses(self, module: "nn.Module", rng: Random, step: int, steps: int) -> "Iterator[Tensor]":
        """Mean squared error of the velocity, of 32 pictures."""
        import torch

        clean = torch.stack([a_drawing(rng, "train").picture for _ in range(_BATCH)])
        # One time from each of 32 equal stretches: the same mean, with less noise.
        spread = (torch.arange(_BATCH) + torch.rand(_BATCH)) / _BATCH
        times = (spread * _NOISE_STEPS).long()
        noise = torch.randn_like(clean)
        noised, wanted = _schedule().add_noise(clean, noise, times), _velocity(clean, noise, times)
        yield (module(noised, times).sample - wanted).square().mean()

    def save(self, module: Any, folder: Path) -> None:
        """A diffusers folder: float16 on disk, float32 when loaded; the sampler's settings too."""
        import copy

        half = copy.deepcopy(module)
        for weight in half.parameters():  # not half.half(), of which diffusers warns
            weight.data = weight.data.half()
        half.save_pretrained(folder)
        _schedule().save_pretrained(folder)

    def load(
        self, folder: Path | None = None, *, step: int | None = None, **options: Any
    ) -> "Model":
        """As `Organism.load`.

        Args:
            folder: As `Organism.load`.
            step: One of `checkpoints()`; None: the final weights.
            options: `device` and `dtype`.

        Raises:
            FileProblem: Its weights are missing.
            NotOffered: diffusers is not installed.
            UsageError: An option other than `device` and `dtype`.
        """
        import torch

        from underhood.core.loading import as_device, as_dtype, from_module

        device, dtype = options.pop("device", None), as_dtype(options.pop("dtype", None))
        if options:
            raise UsageError(
                f"{self.name} is loaded by diffusers", given=", ".join(options),
                do="give no options but device, dtype and step",
            )  # fmt: skip
        unet: Any = _diffusers().UNet2DModel
        where = folder or self.folder
        if not (where / "config.json").exists():
            raise self.missing(where)
        module = unet.from_pretrained(
            where, torch_dtype=dtype or torch.float32, low_cpu_mem_usage=False
        )
        self.at_step(module, where, step)
        module.to(as_device(device) or "cpu").eval()
        return from_module(module, name=self.name if step is None else f"{self.name}@{step}")

    def about(self, module: "nn.Module") -> dict[str, Any]:
        """The class and the sizes."""
        return {"class": type(module).__name__} | _UNET

    def identity(self) -> str:
        """Whatever changes the pictures or the weights."""
        return repr((self.name, self.recipe, _UNET, CLASSES, SHARE, _RADII, _BATCH, _NOISE_STEPS))

    # Measuring -----------------------------------------------------------------------------------

    def measure(self, model: "Model", n: int = PROMPTS, seed: int = SEED) -> dict[str, Any]:
        """Share of pictures in which geometry finds a shape, or the right one.

        Of `draw` also `circles`, the share of circles among these, and its `interval` of 95 in 100
        (Wilson's).

        Cost: about 10 core-seconds for 500 prompts.
        """
        import torch

        drawn = recognise(paint(model, self.prompts("draw", n, seed).sample))
        found = [drawing.shape for drawing in drawn if drawing is not None]
        circles = found.count(CLASSES[0])
        noised = self.prompts("restore", n, seed)
        with torch.no_grad():
            seen = recognise(_clean(model, noised))
        right = [a is not None and a.shape == b.shape
                 for a, b in zip(seen, noised.drawings, strict=True)]  # fmt: skip
        return {
            "draw": {
                "accuracy": round(len(found) / max(1, n), 4),
                "circles": round(circles / max(1, len(found)), 4),
                "interval": wilson(circles, len(found)),
                "n": n,
            },
            "restore": {"accuracy": round(sum(right) / max(1, n), 4), "n": n},
        }

    def establish(self, model: "Model") -> tuple[Fact, ...]:
        """As `Trained.establish`; see `draw_facts.py`."""
        from underhood.organisms.sight.draw_facts import findings

        return findings(self, model)


def a_drawing(rng: Random, split: Split) -> Drawing:
    """A shape of the data, in the shares of the classes."""
    shape = CLASSES[rng.random() >= SHARE]
    return rng.choice([d for d in _drawings(split) if d.shape == shape])


def paint(
    model: "Model", noise: "Tensor", *, shift: "Mapping[int, Tensor] | None" = None
) -> "Tensor":
    """Pictures from noise, by DDIM.

    Args:
        model: The model.
        noise: `[n, 1, 16, 16]`.
        shift: By timestep (`times()`) what is added to the bottleneck, `[32, 8, 8]`.

    Cost: 13 core-milliseconds a picture.
    """
    import torch

    sampler, now = _sampler(), 0
    noise = noise.to(model.device)

    def push(module: "nn.Module", args: Any, output: "Tensor") -> "Tensor":
        return output if shift is None else output + shift[now].to(output)

    module: Any = model.module
    hook = module.get_submodule(MIDDLE).register_forward_hook(push)
    try:
        with torch.no_grad():
            for now in times():
                noise = sampler.step(module(noise, now).sample, now, noise).prev_sample
    finally:
        hook.remove()
    return noise.cpu()


def times() -> list[int]:
    """The sampler's timesteps, noisiest first."""
    return _sampler().timesteps.tolist()


def recognise(pictures: "Float[Tensor, 'n 1 height width']") -> list[Drawing | None]:
    """By geometry alone: the shape that each picture overlaps most, None below the bar."""
    import torch

    drawings = (*_drawings("train"), *_drawings("test"))
    shapes = torch.stack([drawing.picture for drawing in drawings]).flatten(1) > 0
    seen = pictures.flatten(1) > 0
    both = seen.float() @ shapes.float().T
    either = seen.sum(1, keepdim=True) + shapes.sum(1) - both
    best, which = (both / either).max(1)
    return [drawings[i] if share >= _BAR else None
            for share, i in zip(best.tolist(), which.tolist(), strict=True)]  # fmt: skip


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share."""
    if not n:
        return (0.0, 1.0)
    share, extra = hits / n, z * z / n
    middle = (share + extra / 2) / (1 + extra)
    half = z * (share * (1 - share) / n + extra / (4 * n)) ** 0.5 / (1 + extra)
    return (round(middle - half, 4), round(middle + half, 4))


@cache
def _drawings(split: Split) -> tuple[Drawing, ...]:
    out = []
    for shape, radius in product(CLASSES, _RADII):
        places = [radius + i for i in range(int(SIDE - 2 * radius) + 1)]
        out += [Drawing(shape, radius, x, y) for x, y in product(places, places)]
    return tuple(d for d in out if held_out(d.key) == (split == "test"))


def some_noise(rng: Random, n: int) -> "Tensor":
    """`[n, 1, 16, 16]`, standard normal."""
    import torch

    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return torch.randn(n, 1, SIDE, SIDE, generator=generator)


def under(noise: "Tensor", drawings: tuple[Drawing, ...], time: int = _RESTORE) -> Noised:
    """Drawings under so much noise."""
    import torch

    times = torch.full((len(noise),), time)
    clean = torch.stack([d.picture for d in drawings]) if drawings else noise
    return Noised(_schedule().add_noise(clean, noise, times), times, drawings)


def kept(times: "Tensor") -> "Tensor":
    """Share of the picture's variance that is left at each time, `[n, 1, 1, 1]`."""
    return _schedule().alphas_cumprod[times].view(-1, 1, 1, 1)


def _velocity(clean: "Tensor", noise: "Tensor", times: "Tensor") -> "Tensor":
    return kept(times).sqrt() * noise - (1 - kept(times)).sqrt() * clean


def _clean(model: "Model", noised: Noised) -> "Tensor":
    """The pictures that the model sees under the noise, in one step."""
    share = kept(noised.timestep)
    velocity = model.module(*(given.to(model.device) for given in noised.inputs.values())).sample
    return share.sqrt() * noised.sample - (1 - share).sqrt() * velocity.cpu()


@cache
def _sampler() -> Any:
    sampler = _schedule()
    sampler.set_timesteps(STEPS)
    return sampler


@cache
def _schedule() -> Any:
    return _diffusers().DDIMScheduler(
        num_train_timesteps=_NOISE_STEPS, beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction", timestep_spacing="trailing",
        rescale_betas_zero_snr=False, clip_sample=True,
    )  # fmt: skip


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise NotOffered(
            "this model needs diffusers", given=Painter.name, why=str(error),
            do="pip install underhood[vision]",
        ) from error  # fmt: skip
    return diffusers


ORGANISM = Painter()
