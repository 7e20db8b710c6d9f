"""One realistic view of every kind that puts several things together, with invented numbers."""

from typing import Any

import numpy as np

from underhood.view import (
    View,
    bench,
    diff,
    feature,
    graph,
    grid,
    picture,
    timeline,
    tokens,
    tree,
)

WORDS = ["When", " Mary", " and", " John", " went", " to", " the", " store", ",", " John", " gave",
         " a", " drink", " to"]  # fmt: skip


def panels(rng: np.random.Generator) -> dict[str, View]:
    """A view per kind, by name."""
    return {**_models(rng), **_features(rng), **_changes(rng)}


def _models(rng: np.random.Generator) -> dict[str, View]:
    """What a model is made of."""
    nodes: list[dict[str, Any]] = [{"id": "input", "y": -1, "x": 6, "role": "input"}]
    for layer in range(12):
        nodes += [
            {"id": f"a{layer}.h{h}", "y": layer, "x": h, "role": "head",
             "value": float(rng.normal(0, 0.1)), "at": {"layer": layer, "head": h}}
            for h in range(12)
        ]  # fmt: skip
        nodes.append({"id": f"m{layer}", "y": layer + 0.5, "x": 12, "role": "MLP"})
    nodes.append({"id": "logits", "y": 12, "x": 6, "role": "logits"})
    heights = [node["y"] for node in nodes]
    edges: list[tuple[Any, ...]] = []
    for _ in range(400):
        a, b = sorted(rng.choice(len(nodes), 2, replace=False), key=lambda n: heights[n])
        if heights[a] < heights[b]:
            ends = (nodes[a]["id"], nodes[b]["id"])
            weight = float(rng.normal(0, 1) ** 3)
            edges.append((*ends, weight, bool(rng.random() < 0.7), f"{ends[0]}->{ends[1]}<k>"))
    block = {
        "name": "0", "type": "GPT2Block", "path": "transformer.h.0", "parameters": 7087872,
        "sites": ["resid_pre.0", "resid_mid.0", "resid_post.0"],
        "children": [
            {"name": "ln_1", "type": "LayerNorm", "shapes": {"weight": [768], "bias": [768]},
             "parameters": 1536, "sites": ["ln1.0", "ln1_scale.0"]},
            {"name": "attn", "type": "GPT2Attention", "parameters": 2362368,
             "sites": ["z.0", "pattern.0"]},
            {"name": "experts", "type": "ModuleList", "children": [
                {"name": "0-7", "many": 8, "type": "Expert", "shapes": {"w": [8, 2]}}]},
        ],
    }  # fmt: skip
    root = {
        "name": "gpt2", "type": "GPT2LMHeadModel", "parameters": 124439808,
        "children": [
            {"name": "wte", "type": "Embedding", "shapes": {"weight": [50257, 768]},
             "parameters": 38597376, "sites": ["embed"]},
            {"name": "h", "type": "ModuleList", "parameters": 7087872, "children": [block]},
            {"name": "scale", "type": "Scale", "shapes": {"factor": []}, "parameters": 1},
        ],
    }  # fmt: skip
    return {
        "graph": graph(
            nodes, edges, facts={"faithfulness": 0.93, "random circuits": 0.11, "edges": 241},
            unit="logits", value_unit="of f", total=32491, x_name="head, then MLP",
            title="The circuit", about="Lines: edges by score. Colours: what f loses without it.",
        ),
        "grouped": graph(
            [{"id": "input", "y": -1, "x": 1}, {"id": "logits", "y": 3, "x": 1},
             *({"id": f"a{y}.h{x}", "label": f"L{y}.H{x}", "y": y, "x": x, "value": x - y / 4,
                "at": {"layer": y, "head": x}} for y in range(3) for x in range(4))],
            [("input", "a0.h0", 1.5), ("input", "a0.h1", -0.25), ("input", "a1.h3", 0.5),
             ("a0.h0", "a1.h1", 0.75), ("a0.h1", "a1.h1", 0.5), ("a0.h0", "a1.h2", -1.0),
             ("a1.h1", "a2.h0", 2.0), ("a1.h2", "a2.h0", None), ("a1.h3", "logits", 0.25),
             ("a1.h1", "a1.h2", 9.0), ("a2.h0", "logits", 1.25), ("a1.h2", "logits", 0.125)],
            supernodes={"movers": ["a1.h1", "a1.h2"], "early": ["a0.h0", "a0.h1"]},
            pins=["movers", "a2.h0", "a2.h3"], unit="logits", title="A circuit with groups",
        ),
        "tree": tree(root, title="gpt2: GPT2LMHeadModel", about="Every module with its sites."),
    }  # fmt: skip


def _features(rng: np.random.Generator) -> dict[str, View]:
    """One feature, and one picture."""
    counts = (1000 * np.exp(-np.arange(50) / 9)).round()
    photo = np.zeros((48, 64, 3))
    photo[8:40, 16:48] = [220, 120, 40]
    photo[..., 2] += np.linspace(0, 120, 64)
    scores = rng.normal(0, 0.2, (6, 8))
    scores[1:5, 2:6] += 1
    scores[0, 0] = np.nan
    return {
        "feature": feature(
            [
                {"tokens": WORDS, "values": rng.exponential(1, 14) * (rng.random(14) < 0.3),
                 "note": "top" if i < 4 else "0.8 to 0.9 of the maximum"}
                for i in range(8)
            ],
            facts={"density": 0.0021, "largest activation": 7.31, "examples": 8},
            histograms=[{"name": "activations", "edges": np.linspace(0, 8, 51).tolist(),
                         "counts": counts.tolist()}],
            promoted=[(" Mary", 2.1), (" her", 1.4), ("\n", 0.9)],
            suppressed=[(" John", -1.8), (" him", -1.1)],
            neighbours=[("6.1204", 0.61), ("6.77", 0.55)],
            at={"layer": 6, "feature": 1204},
            title="Feature 6.1204", about="Acts on the second name.",
        ),
        "picture": picture(
            photo,
            grid(scores, rows=range(6), cols=range(8), row_name="row", col_name="column",
                 unit="logits", title="patch attribution"),
            alt="an orange square", title="What the model looks at",
        ),
    }  # fmt: skip


def _changes(rng: np.random.Generator) -> dict[str, View]:
    """Over steps, under changes, between models."""
    steps = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 4000, 8000, 16000]
    rise = 1 / (1 + np.exp(-(np.log10(np.maximum(steps, 0.5)) - 2.7) * 4))
    effect = rng.normal(0, 1, (6, 8))
    layout: dict[str, Any] = {"rows": range(6), "cols": WORDS[:8], "row_name": "layer",
                              "col_name": "pos", "unit": "logits"}  # fmt: skip
    arms: list[dict[str, Any]] = [
        {"label": "unedited", "tokens": [" She", " smiled", "."], "values": [0.4, 0.2, 0.9],
         "effects": {"perplexity": 12.1, "repetition": 0.0}},
        {"label": "joy", "tokens": [" Joy", " filled", " her"], "values": [0.1, 0.5, 0.4],
         "strength": 0.5, "effects": {"perplexity": 15.0, "repetition": 0.1}},
        {"label": "joy, stronger", "tokens": [" joy", " joy", " joy"], "values": [0.9, 0.9, None],
         "strength": 2, "effects": {"perplexity": 61.7, "repetition": 1.0}, "note": "breaks"},
    ]  # fmt: skip
    return {
        "generation": timeline(
            range(14), {"entropy": rng.random(14) * 3, "KL": rng.random(14)}, tokens=WORDS,
            y_name="nats", title="While writing",
        ),
        "training": timeline(
            steps, {"induction score": rise, "previous-token score": rise**0.5},
            bands={"induction score": (rise * 0.9, np.minimum(rise * 1.1, 1))},
            log=True, marks={"onset": 400}, y_name="score", title="How induction heads came to be",
        ),
        "bench": bench("Mary opened the letter.", arms, unit="residual norms",
                       title="Steering by joy", about="Greedy; the first arm is not changed."),
        "diff": diff(
            grid(effect, **layout, title="gpt2"),
            grid(effect * 0.8 + rng.normal(0, 0.2, (6, 8)), **layout, title="gpt2, tuned"),
            title="What tuning changed",
        ),
        "strips": diff(
            tokens(WORDS, rng.normal(0, 1, 14), unit="nats", title="before"),
            tokens(WORDS, rng.normal(0, 1, 14), unit="nats", title="after"),
            title="Loss per token",
        ),
    }  # fmt: skip
