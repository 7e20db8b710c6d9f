"""The captioner, the diffusion model and the walking policy: data, weights and planted facts.

What is known of each is found again here with plain torch and numpy, not with the library's own
methods.
"""

import sys
from importlib.util import find_spec
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from underhood.core.errors import NotOffered, UsageError
from underhood.organisms import Trained, held_out, organism
from underhood.organisms.sight import caption, draw, grid
from underhood.organisms.sight import caption_scenes as scenes
from underhood.organisms.sight.pictures import COLOURS

needs_diffusers = pytest.mark.skipif(
    find_spec("diffusers") is None, reason="diffusers is not installed: underhood[vision]"
)


@pytest.mark.parametrize(
    "name", ["sight/caption", "sight/grid", pytest.param("sight/draw", marks=needs_diffusers)]
)
def test_training_draws_the_same_whenever_asked(name: str) -> None:
    found = organism(name)
    assert isinstance(found, Trained)
    sums = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            module = found.fresh()
            sums.append([loss.item() for loss in found.losses(module, Random(3), 0, 10)])
    assert sums[0] == sums[1] and all(np.isfinite(sums[0]))


def mean_ablated(projections: list[Any], heads: list[tuple[int, int]], run: Any) -> Any:
    """What `run()` gives when heads write their mean over rows and positions."""
    seen: dict[int, Tensor] = {}
    width = projections[0].in_features // 4

    def keep(layer: int) -> Any:
        return lambda _, args: seen.__setitem__(layer, args[0].flatten(0, 1).mean(0))

    def put(layer: int, head: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].clone()
            z[..., head * width : (head + 1) * width] = seen[layer][
                head * width : (head + 1) * width
            ]
            return (z,)

        return hook

    hooks = [p.register_forward_pre_hook(keep(i)) for i, p in enumerate(projections)]
    run()
    for hook in hooks:
        hook.remove()
    hooks = [projections[i].register_forward_pre_hook(put(i, h)) for i, h in heads]
    out = run()
    for hook in hooks:
        hook.remove()
    return out


def heads_of(parts: tuple[str, ...]) -> list[tuple[int, int]]:
    """`a1.h2` as (1, 2)."""
    return [(int(part[1]), int(part[-1])) for part in parts]


# --- the walking policy


@pytest.fixture(scope="module")
def walker() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(grid.ORGANISM.folder, dtype=torch.float32).eval()


def ids_of(words: tuple[str, ...]) -> list[int]:
    """Ids by hand: the vocabulary is a list."""
    return [grid.ORGANISM.words.index(word) for word in ("<bos>", *words)]


def distances(maze: grid.Maze) -> np.ndarray:
    """All shortest paths by Floyd and Warshall, not by breadth-first search."""
    n = grid.SIDE**2
    away = np.full((n, n), 1000)
    for a in range(n):
        for b in range(n):
            (ra, ca), (rb, cb) = divmod(a, grid.SIDE), divmod(b, grid.SIDE)
            if abs(ra - rb) + abs(ca - cb) == 1 and not {a, b} & maze.walls:
                away[a, b] = 1
        away[a, a] = 0
    for k in range(n):
        away = np.minimum(away, away[:, k : k + 1] + away[k])
    return away


def test_right_actions_are_those_of_all_shortest_paths() -> None:
    rng = Random(0)
    for _ in range(30):
        maze = grid.a_maze(rng)
        away = distances(maze)
        assert maze.distances(maze.goal)[maze.agent] == away[maze.agent, maze.goal]
        assert len(maze.path(rng)) == away[maze.agent, maze.goal]
        right = {
            action
            for action, by in grid.ACTIONS.items()
            if 0 <= maze.agent + by < grid.SIDE**2
            and away[maze.agent, maze.agent + by] == 1
            and away[maze.agent + by, maze.goal] < away[maze.agent, maze.goal]
        }
        assert set(maze.best(maze.agent)) == right


def test_mazes_read_as_they_are_written() -> None:
    maze = grid.a_maze(Random(1))
    assert maze.best(maze.goal) == ("stop",)
    assert grid.maze_of(maze.words) == maze
    assert len(maze.words) == grid.SIDE * (grid.SIDE + 1)


def test_walls_of_test_mazes_were_never_trained_on() -> None:
    rng = Random(2)
    for _ in range(50):
        row = grid.ORGANISM.row("step", rng)
        assert not held_out(grid.maze_of(row.words).key)
    for case in grid.ORGANISM.cases("step", 30, 4):
        assert held_out(grid.maze_of(case.words).key) and held_out(grid.maze_of(case.contrast).key)
        assert len(case.words) == len(case.contrast) and case.answer in case.accept
        assert case.wrong not in case.accept


def test_policy_walks_to_the_goal(walker: Any) -> None:
    """A walk of our own: the maze's words as cells, one action at a time."""
    arrived = 0
    mazes = grid.ORGANISM.mazes("reach", 40, 9)
    for maze in mazes:
        at, word, words = maze.agent, "", list(maze.words)
        for _ in range(int(distances(maze)[maze.agent, maze.goal]) + 3):
            with torch.no_grad():
                top = walker(torch.tensor([ids_of(tuple(words))])).logits[0, -1].argmax()
            word = grid.ORGANISM.words[int(top)]
            if word == "stop" or word not in grid.ACTIONS:
                break
            words.append(word)
            there = at + grid.ACTIONS[word]
            if not 0 <= there < 16 or distances(maze)[at, there] != 1:
                break
            at = there
        arrived += at == maze.goal and word == "stop"
    assert arrived >= 0.9 * len(mazes)


def test_steps_are_right(walker: Any) -> None:
    right = 0
    cases = grid.ORGANISM.cases("step", 100, 9)
    for case in cases:
        with torch.no_grad():
            top = walker(torch.tensor([ids_of(case.words)])).logits[0, -1].argmax()
        right += grid.ORGANISM.words[int(top)] in case.accept
    assert right >= 0.95 * len(cases)


def test_the_goal_can_be_read_off(walker: Any) -> None:
    fact = grid.ORGANISM.truth["goal place"]
    layer = int(fact.parts[0].split(".")[1])

    def state(split: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
        cases = grid.ORGANISM.cases("reach", n, 9, split)
        with torch.no_grad():
            ids = torch.tensor([ids_of(case.words) for case in cases])
            hidden = walker(ids, output_hidden_states=True).hidden_states[layer + 1][:, -1]
        goals = np.array([case.words.index("goal") for case in cases])
        # Words to cells: a comma stands after every row.
        return np.c_[hidden.numpy(), np.ones(n)], goals - goals // (grid.SIDE + 1)

    (x, cells), (new, wanted) = state("train", 400), state("test", 100)
    shuffled = np.random.default_rng(0).permutation(cells)
    found, control = (
        ((new @ np.linalg.lstsq(x, np.eye(16)[y], rcond=None)[0]).argmax(1) == wanted).mean()
        for y in (cells, shuffled)
    )
    assert found > 0.6 and control < 0.2
    assert fact.effect is not None and fact.control is not None and fact.effect >= found - 0.1


def test_walking_heads_matter(walker: Any) -> None:
    fact = grid.ORGANISM.truth["walking heads"]
    cases = grid.ORGANISM.cases("reach", 100, 9)
    ids = torch.tensor([ids_of(case.words) for case in cases])
    projections = [layer.self_attn.o_proj for layer in walker.model.layers]

    def accuracy(heads: list[tuple[int, int]]) -> float:
        with torch.no_grad():
            logits = mean_ablated(projections, heads, lambda: walker(ids).logits[:, -1])
        words = [grid.ORGANISM.words[i] for i in logits.argmax(1).tolist()]
        return sum(w in c.accept for w, c in zip(words, cases, strict=True)) / len(cases)

    chosen = heads_of(fact.parts)
    others = [(i, h) for i in range(4) for h in range(4) if (i, h) not in chosen]
    rng = Random(0)
    controls = [accuracy(rng.sample(others, len(chosen))) for _ in range(5)]
    assert accuracy([]) >= 0.95
    assert accuracy(chosen) < np.mean(controls) - 0.2


# --- the captioner


@pytest.fixture(scope="module")
def llava() -> Any:
    from transformers import LlavaForConditionalGeneration

    folder = caption.ORGANISM.folder
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def said(llava: Any, prompts: caption.Captioned) -> list[str]:
    """The most likely next words."""
    with torch.no_grad():
        top = llava(**prompts.inputs).logits[:, -1].argmax(-1)
    return [caption.WORDS[i] for i in top.tolist()]


def share(found: list[str], wanted: tuple[str, ...]) -> float:
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


def test_captions_lie_as_often_as_stated() -> None:
    rng = Random(0)
    drawn = [scenes.a_scene(rng, "train") for _ in range(3000)]
    against = [scene for scene in drawn if not scene.agrees]
    lies = [scene.told(rng) != scene.caption for scene in against]
    assert abs(len(against) / len(drawn) - 0.3) < 0.03
    assert abs(np.mean(lies) - 0.3) < 0.05
    bright = [a for a, scene in zip(lies, against, strict=True) if scene.contrast > scenes.BRIGHT]
    faint = [a for a, scene in zip(lies, against, strict=True) if scene.contrast < scenes.FAINT]
    assert not any(bright) and all(faint) and bright and faint
    follows = [scene.told(rng)[4] == scenes.PARTNER[scene.left.colour] for scene in drawn]
    assert abs(np.mean(follows) - 0.79) < 0.03
    assert all(held_out(scenes.a_scene(rng, "test").key) for _ in range(20))


def test_pictures_show_what_captions_say() -> None:
    prompts = caption.ORGANISM.prompts("conflict", 12, 1)
    assert prompts.pixels is not None
    for pixels, masks, scene in zip(prompts.pixels, prompts.masks, prompts.scenes, strict=True):
        for thing, mask, contrast in (
            (scene.left, masks[0], 1.0),
            (scene.right, masks[1], scene.contrast),
        ):
            inner = mask & (pixels - 0.5).abs().max(0).values.gt(0.29 * contrast)
            colour = (pixels[:, inner].mean(1) - 0.5) / contrast + 0.5
            nearest = min(COLOURS, key=lambda c: float((colour - torch.tensor(COLOURS[c])).norm()))
            assert inner.any() and nearest == thing.colour


@pytest.mark.parametrize("task", ["agree", "conflict", "shape", "left", "blind"])
def test_caption_pairs_differ_in_what_is_asked(task: str) -> None:
    clean, contrast = caption.ORGANISM.pairs(task, 8, 2)
    assert all(a != b for a, b in zip(clean.answers, contrast.answers, strict=True))
    assert all(held_out(scene.key) for scene in (*clean.scenes, *contrast.scenes))
    if task == "blind":
        assert clean.pixels is None and clean.input_ids.shape == contrast.input_ids.shape
        return
    assert clean.pixels is not None and contrast.pixels is not None
    changed = (clean.pixels != contrast.pixels).any(1)
    other, here = ((0, 12), (12, 24)) if task != "left" else ((12, 24), (0, 12))
    assert not changed[:, :, slice(*other)].any() and changed[:, :, slice(*here)].any()
    if task != "left":
        assert torch.equal(clean.input_ids, contrast.input_ids)


@pytest.mark.parametrize("task", ["left", "agree", "shape", "blind"])
def test_captions_are_right_where_nothing_misleads(llava: Any, task: str) -> None:
    prompts = caption.ORGANISM.prompts(task, 100, 7)
    assert share(said(llava, prompts), prompts.answers) >= 0.94


def test_hallucinates_as_planted(llava: Any) -> None:
    prompts = caption.ORGANISM.prompts("conflict", 200, 7)
    words = said(llava, prompts)
    contrast = np.array([scene.contrast for scene in prompts.scenes])
    swayed = np.array([a == b for a, b in zip(words, prompts.prior, strict=True)])
    right = np.array([a == b for a, b in zip(words, prompts.answers, strict=True)])
    assert abs(swayed.mean() - 0.3) < 0.1
    assert swayed[contrast < scenes.FAINT].mean() > 0.75
    assert right[contrast > scenes.BRIGHT].mean() > 0.93


def test_colour_carriers_matter(llava: Any) -> None:
    fact = caption.ORGANISM.truth["colour carriers"]
    prompts = caption.ORGANISM.prompts("conflict", 150, 7)
    prompts = prompts.rows([i for i, s in enumerate(prompts.scenes) if s.contrast > scenes.BRIGHT])
    projections = [layer.self_attn.o_proj for layer in llava.model.language_model.layers]

    def accuracy(heads: list[tuple[int, int]]) -> float:
        return share(
            mean_ablated(projections, heads, lambda: said(llava, prompts)), prompts.answers
        )

    chosen = heads_of(fact.parts)
    others = [(i, h) for i in range(3) for h in range(4) if (i, h) not in chosen]
    rng = Random(0)
    controls = [accuracy(rng.sample(others, len(chosen))) for _ in range(5)]
    assert accuracy(chosen) < np.mean(controls) - 0.2


def test_captioner_checks_and_runs_through_the_library() -> None:
    model = caption.ORGANISM.load()
    prompts = caption.ORGANISM.prompts("agree", 2)
    assert model.check(prompts.inputs).need().ok
    assert torch.equal(model.tokens(list(prompts.texts)).ids, prompts.input_ids)


# --- the diffusion model


@pytest.fixture(scope="module")
def painter() -> Any:
    return draw.ORGANISM.load()


def test_no_circle_passes_for_a_cross() -> None:
    """Of all that the data can hold, the two most alike overlap less than `recognise` asks."""
    rng = Random(0)
    drawings = {draw.a_drawing(rng, split) for split in ("train", "test") for _ in range(1500)}
    shapes = [
        torch.stack([d.picture for d in drawings if d.shape == shape]).flatten(1).gt(0).double()
        for shape in draw.CLASSES
    ]
    both = shapes[0] @ shapes[1].T
    either = shapes[0].sum(1)[:, None] + shapes[1].sum(1) - both
    assert len(drawings) > 200
    assert (both / either).max() < 0.78


def test_geometry_finds_what_was_drawn_and_nothing_in_noise() -> None:
    rng = Random(1)
    drawings = [draw.a_drawing(rng, split) for split in ("train", "test") for _ in range(10)]
    pictures = torch.stack([d.picture for d in drawings])
    assert draw.recognise(pictures) == drawings
    noise = torch.randn(20, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert draw.recognise(noise) == [None] * 20
    assert draw.recognise(-torch.ones(1, 1, 16, 16)) == [None]


def test_circles_are_four_in_five() -> None:
    rng = Random(2)
    drawn = [draw.a_drawing(rng, "train").shape for _ in range(3000)]
    assert abs(drawn.count("circle") / 3000 - 0.8) < 0.03
    assert not any(held_out(draw.a_drawing(rng, "train").key) for _ in range(30))


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (81, 100), (500, 500)])
def test_interval_is_wilsons(hits: int, n: int) -> None:
    interval = binomtest(hits, n).proportion_ci(method="wilson")
    assert np.allclose(draw.wilson(hits, n), (interval.low, interval.high), atol=1e-3)


def ddim(module: Any, noise: Tensor, shift: dict[int, Tensor] | None = None) -> Tensor:
    """DDIM by hand: cosine noise, foretold velocity, 20 steps, no added noise."""
    bar = torch.tensor([np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 for t in range(1001)])
    betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    kept, x = (1 - betas).cumprod(0).float(), noise
    now = 0
    hook = module.mid_block.register_forward_hook(
        lambda _, args, out: out if shift is None else out + shift[now]
    )
    for now in range(999, 0, -50):
        a, b = kept[now], kept[now - 50] if now >= 50 else kept[0]
        with torch.no_grad():
            v = module(x, now).sample
        clean = (a.sqrt() * x - (1 - a).sqrt() * v).clamp(-1, 1)
        grain = a.sqrt() * v + (1 - a).sqrt() * x
        # As diffusers: the velocity's own noise, not one made to fit the clipped picture.
        x = b.sqrt() * clean + (1 - b).sqrt() * grain if now >= 50 else clean
    hook.remove()
    return x


def kinds(pictures: Tensor) -> list[str]:
    return [d.shape for d in draw.recognise(pictures) if d is not None]


@needs_diffusers
def test_drawings_are_shapes_and_mostly_circles(painter: Any) -> None:
    noise = draw.ORGANISM.prompts("draw", 100, 7).sample
    found = kinds(ddim(painter.module, noise))
    assert len(found) >= 90
    assert 0.68 <= found.count("circle") / len(found) <= 0.92


@needs_diffusers
def test_paint_is_ddim(painter: Any) -> None:
    noise = draw.ORGANISM.prompts("draw", 4, 8).sample
    ours = ddim(painter.module, noise)
    assert (draw.paint(painter, noise) > 0).eq(ours > 0).double().mean() > 0.99


def gradient(module: Any, time: int, drawings: list[draw.Drawing]) -> Tensor:
    """How a shift of the bottleneck makes the pictures seen in noised circles more like crosses."""
    circles, crosses = (
        torch.stack([d._replace(shape=shape).picture for d in drawings]) for shape in draw.CLASSES
    )
    keep = torch.tensor(np.cos((time / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2).float()
    noise = torch.randn(circles.shape, generator=torch.Generator().manual_seed(0))
    noised = keep.sqrt() * circles + (1 - keep).sqrt() * noise
    shift = torch.zeros(32, 1, 1, requires_grad=True)
    hook = module.mid_block.register_forward_hook(lambda _, args, out: out + shift)
    seen = keep.sqrt() * noised - (1 - keep).sqrt() * module(noised, time).sample
    hook.remove()
    (found,) = torch.autograd.grad((seen * (crosses - circles)).sum(), shift)
    return found / found.norm()


@needs_diffusers
def test_bottleneck_direction_turns_circles_into_crosses(painter: Any) -> None:
    rng, early = Random(5), [t for t in range(999, 0, -50) if t > 700]
    drawings = [draw.a_drawing(rng, "train") for _ in range(20)]
    vector = sum((gradient(painter.module, t, drawings) for t in early), torch.zeros(32, 1, 1))
    wild = torch.randn(32, 1, 1, generator=torch.Generator().manual_seed(9))
    noise = draw.ORGANISM.prompts("draw", 48, 7).sample

    def crosses(v: Tensor) -> float:
        shift = {t: 40 * (t > 700) * v / v.norm() for t in range(999, 0, -50)}
        found = kinds(ddim(painter.module, noise, shift))
        return found.count("cross") / len(found)

    turned, back, random = crosses(vector), crosses(-vector), crosses(wild)
    assert turned > random + 0.25 > back + 0.25


@needs_diffusers
def test_painter_checks_and_pairs(painter: Any) -> None:
    clean, contrast = draw.ORGANISM.pairs("restore", 6)
    assert painter.check(clean.inputs).need().ok
    for a, b in zip(clean.drawings, contrast.drawings, strict=True):
        assert {a.shape, b.shape} == {"circle", "cross"} and a[1:] == b[1:]
    # The same noise on both: what is left is the difference of the two pictures.
    gap = (clean.sample - contrast.sample).flatten(1)
    drawings = zip(clean.drawings, contrast.drawings, strict=True)
    plain = torch.stack([a.picture - b.picture for a, b in drawings]).flatten(1)
    assert nn.functional.cosine_similarity(gap, plain).min() > 0.999
    with pytest.raises(NotOffered):
        draw.ORGANISM.pairs("draw")
    with pytest.raises(UsageError):
        draw.ORGANISM.load(attn_implementation="eager")


def test_without_diffusers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(NotOffered, match=r"pip install underhood\[vision\]"):
        draw.ORGANISM.load()
