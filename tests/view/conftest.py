"""Realistic views of every kind: the indirect-object story, with invented numbers.

Those that put several things together are in `panel_samples`.
"""

from typing import Any

import numpy as np
import pytest
from panel_samples import panels

from underhood.view import (
    View,
    bars,
    grid,
    group,
    heads,
    lines,
    sentences,
    table,
    texts,
    tokens,
)
from underhood.view.page import Section, page

PROMPT = [
    "<|endoftext|>", "When", " Mary", " and", " John", " went", " to", " the", " store", ",",
    " John", " gave", " a", " drink", " to",
]  # fmt: skip
LAYERS = [str(i) for i in range(12)]
MADE: dict[str, Any] = {
    "model": "gpt2",
    "revision": "607a30d783df",
    "weights_hash": "sha256:8b7a1c0e",
    "dtype": "float32",
    "device": "cpu",
    "seed": 0,
    "underhood": "0.1.0",
    "torch": "2.13.0",
    "date": "2026-10-21 14:03 UTC",
}
CALL = (
    'uh.locate.activation_patching(model, "When Mary and John went to the store, John gave a drink'
    ' to", contrast="When Mary and John went to the store, Mary gave a drink to")'
)


def _effects(rng: np.random.Generator) -> np.ndarray:
    effect = rng.normal(0, 0.04, (12, 15))
    effect[:9, 10] += np.linspace(3.1, 0.2, 9)
    effect[7:, 14] += np.linspace(0.4, 3.4, 5)
    effect[5:9, 11] += [0.3, 0.5, 0.4, 0.1]
    effect[3, 4] = -0.8
    effect[:, :3] = np.nan
    return effect


def _pattern(rng: np.random.Generator, kind: str, n: int) -> np.ndarray:
    scores = rng.normal(0, 0.6, (n, n))
    scores[:, 0] += 2.5
    for q in range(1, n):
        scores[q, q - 1] += 5 if kind == "previous" else 0
    if kind == "name":
        scores[14, 2] += 6.5
        scores[10, 4] += 3
    weights = np.exp(scores) * np.tril(np.ones((n, n)))
    return weights / weights.sum(1, keepdims=True)


def _says(rng: np.random.Generator) -> dict[str, View]:
    """What the model says, and then."""
    continuation = [" Mary", ".", " She", " thanked", " him", " and", " they", " left", ".", "\n"]
    return {
        "sentences": sentences(
            [
                "The model says “ Mary” next with probability 0.68; “ John” has 0.02.",
                "The answer settles at layer 9 of 12: before it, “ John” is ahead by 0.4 logits.",
                "Heads 9.9, 9.6 and 10.0 write +5.66 of the +3.55 logits between the two names.",
            ],
            title="In short",
        ),
        "top": bars(
            [" Mary", " the", " them", " her", " John", "\n", "<|endoftext|>"],
            [0.681, 0.052, 0.041, 0.023, 0.021, 0.011, 0.0004],
            unit="probability",
            signed=False,
            span=(0.0, 1.0),
            title="Next token",
            about="Probabilities after the last token; greedy decoding takes the first.",
        ),
        "texts": texts(
            [
                {
                    "label": "unchanged",
                    "tokens": continuation,
                    "values": [0.68, 0.9, 0.2, 0.05, 0.6, 0.3, 0.2, 0.1, 0.8, 0.4],
                },
                {
                    "label": "three heads removed",
                    "note": "z.9.9, z.9.6, z.10.0 set to zero",
                    "tokens": [" John", ",", " who", " was", " thirsty", "."],
                    "values": [0.31, 0.4, 0.2, 0.5, 0.02, 0.7],
                },
                {"label": "no values", "tokens": [" A", " control", " prompt", "."]},
            ],
            title="What the model says then",
        ),
    }


def _forms(rng: np.random.Generator) -> dict[str, View]:
    """Where the answer forms."""
    n = len(PROMPT)
    lens = 1 / (1 + np.exp(-(np.arange(12)[:, None] - 9 + rng.normal(0, 1.2, (12, n)))))
    spoken = [" Mary", " John", " the", " a", "\n", " store", ",", " him"]
    ids = np.argsort(rng.random((12, n, len(spoken))))[..., :3]
    words = np.array(spoken)[ids[..., 0]]
    others = np.sort(rng.random((12, n, 3)) ** 4)[..., ::-1]
    return {
        "tokens": tokens(
            PROMPT,
            [
                None,
                0.02,
                0.31,
                -0.05,
                -1.21,
                0.04,
                0.01,
                0.0,
                0.06,
                -0.02,
                1.8,
                0.4,
                0.03,
                0.1,
                0.9,
            ],
            unit="logits",
            title="Attribution of every token",
            about="Blue tokens support the answer, red ones speak against it.",
        ),
        "lens": grid(
            lens,
            rows=LAYERS,
            cols=PROMPT,
            row_name="layer",
            col_name="token",
            text=words.tolist(),
            scale="probability",
            unit="probability",
            measures=[
                {"name": "rank", "values": (50 * (1 - lens) ** 4).round(), "unit": "tokens above"},
                {"name": "entropy", "values": 6 * (1 - lens), "unit": "nats"},
            ],
            candidates={
                "tokens": spoken,
                "ids": ids,
                "values": others,
            },
            title="What each layer would say",
            about="The top token if the model stopped there, and its probability. "
            "Early layers are read with the last layer's norm and can mislead.",
        ),
    }


def _causes(rng: np.random.Generator) -> dict[str, View]:
    """Grids: claim and control, small and large."""
    long_rows = rng.normal(0, 1, (48, 300)).cumsum(axis=1) / 9
    long_rows[5, 40] = 30
    long_rows[:, 280:] = np.nan
    return {
        "grid": grid(
            _effects(rng),
            rows=LAYERS,
            cols=PROMPT,
            row_name="layer",
            col_name="token",
            unit="logits",
            marks=[(0, 10), (11, 14)],
            title="Effect of patching the residual stream",
            about="Each cell replaces one activation by that of the contrast prompt and shows how "
            "much the logit difference falls. Positions before the first difference are not run.",
            control=grid(
                rng.normal(0, 0.05, (12, 15)),
                rows=LAYERS,
                cols=PROMPT,
                row_name="layer",
                col_name="token",
                unit="logits",
                title="The same with random directions of equal norm",
            ),
            provenance=MADE | {"forwards": 96},
            python=CALL,
        ),
        "heads_grid": grid(
            rng.normal(0, 0.3, (12, 8)) ** 3 * 20,
            rows=LAYERS,
            cols=range(8),
            row_name="layer",
            col_name="head",
            unit="logits",
            title="Effect of every head",
            control=grid(
                rng.normal(0, 0.05, (12, 8)),
                rows=LAYERS,
                cols=range(8),
                row_name="layer",
                col_name="head",
                unit="logits",
                title="Shuffled pairs",
            ),
        ),
        "wide": grid(
            long_rows,
            rows=[f"{i // 4}.{i % 4}" for i in range(48)],
            cols=[f" token{i}" for i in range(300)],
            row_name="head",
            col_name="token",
            unit="sd",
            marks=[(5, 40)],
            title="A long prompt",
        ),
    }


def _parts(rng: np.random.Generator) -> dict[str, View]:
    """Parts, roles and the circuit."""
    names = ["9.9", "9.6", "10.0", "8.10", "7.9", "MLP 11", "MLP 9", "10.7", "11.10", "the rest"]
    parts = np.array([2.61, 1.93, 1.12, 0.61, 0.32, 0.19, -0.08, -1.44, -1.76, 0.05])
    steps = np.arange(0, 26)
    curve = 1 - np.exp(-steps / 5)
    chance = steps / 60
    return {
        "bars": bars(
            names,
            parts,
            unit="logits",
            total=float(parts.sum()),
            total_label="sum of all parts = logit difference",
            baseline=np.stack([np.full(10, -0.12), np.full(10, 0.15)], axis=1),
            baseline_name="95 % of random directions",
            title="Who writes the answer",
            about="Direct contribution of each part; the parts sum to the logit difference.",
        ),
        "lines": lines(
            steps,
            {"this circuit": curve, "random circuits of the same size": chance},
            bands={"random circuits of the same size": (chance * 0.6, chance * 1.3)},
            x_name="edges kept",
            y_name="share of the logit difference",
            title="Faithfulness",
            about="How much of the behaviour remains when only the strongest edges are kept.",
        ),
        "table": table(
            [
                "head",
                {"name": "score", "format": "+.2f"},
                {"name": "share", "format": ".1%"},
                "role",
            ],
            [
                ["9.9", 2.61, 0.735, "name mover"],
                ["9.6", 1.93, 0.544, "name mover"],
                ["10.7", -1.44, -0.406, "negative name mover"],
                ["5.5", None, 0.01, "induction"],
            ],
            title="Roles",
        ),
    }


def _looks(rng: np.random.Generator) -> dict[str, View]:
    """Attention and what is odd."""
    n = len(PROMPT)
    return {
        "heads": heads(
            PROMPT,
            {
                "9.9": _pattern(rng, "name", n),
                "4.11": _pattern(rng, "previous", n),
                "0.1": _pattern(rng, "none", n),
            },
            notes={"9.9": "name mover, score 0.61", "4.11": "previous-token head, score 0.97"},
            title="What the important heads look at",
        ),
        "group": group(
            [
                sentences(["Layer 2 has one neuron above 1,000."], title="Massive activations"),
                tokens(PROMPT, title="Tokens"),
            ],
            title="What is odd",
            folded=True,
        ),
    }


def make_samples() -> dict[str, View]:
    """A view per kind and notable variant, by name."""
    rng = np.random.default_rng(0)
    makers = (_says, _forms, _causes, _parts, _looks, panels)
    return {name: view for make in makers for name, view in make(rng).items()}


def make_page(samples: dict[str, View]) -> str:
    """A page with all of them."""
    pick = samples.__getitem__
    story = [
        (
            "says",
            "What the model says",
            "What comes next, and how sure is it?",
            ["sentences", "top"],
        ),
        ("lens", "Where the answer forms", "At which layer is it settled?", ["lens", "tokens"]),
        ("writes", "Who writes it", "Which heads and MLPs add it?", ["bars", "table"]),
        (
            "causes",
            "Who causes it",
            "What changes it when replaced?",
            ["grid", "heads_grid", "wide"],
        ),
        ("circuit", "The circuit and its proof", "Do these parts suffice?", ["lines"]),
        ("heads", "What the heads do", "Where do they look?", ["heads"]),
        ("change", "The change", "What does it say without them?", ["texts", "group"]),
    ]
    sections = [
        Section(id=i, number=k, title=t, question=q, views=[pick(v) for v in views])
        for k, (i, t, q, views) in enumerate(story, 1)
    ]
    return page(
        "Why does gpt2 say “Mary”?",
        sections,
        lead=[
            "It says “ Mary” with probability 0.68, and “ John” with 0.02.",
            "Three heads in layers 9 and 10 write +5.66 of the +3.55 logits between them; "
            "two others take back 3.20.",
        ],
        provenance=MADE,
        python='uh.explain(uh.load("gpt2"), "When Mary and John ...", "When Mary and John ...")',
    )


@pytest.fixture(scope="session")
def samples() -> dict[str, View]:
    return make_samples()


@pytest.fixture(scope="session")
def sample_page(samples: dict[str, View]) -> str:
    return make_page(samples)
