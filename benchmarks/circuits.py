"""Scores of all edges: EAP-IG as published, on TransformerLens, against the factored form.

`python benchmarks/circuits.py [--quick] [--threads N] [--runs N]`; a GPT-2-small-size model with
random weights, 8 pairs of 15 tokens, 5 steps. Checks first that both find the same 32,491 scores.
Time: runs in turn. Memory: the most that torch's allocator held at once during one call, beyond
what it held before (weights, hooks and results of earlier calls are not counted).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import common

TITLE = "Scores of all edges, over EAP-IG as published"
ABOUT = (
    "EAP-IG over inputs (5 steps), all edges at once, 8 pairs of 15 tokens in one pass (GPT-2-small"
    " size, random weights, float32). Ours is `circuits.edge_scores`. The published algorithm"
    " (Hanna et al., 2024, github.com/hannamw/EAP-IG) is written anew on TransformerLens' bridge"
    " with per-head inputs and outputs: the `HookedTransformer` that it was made for is gone from"
    " TransformerLens 4. As published it also makes the weights' gradients, which nobody reads;"
    " the bars are against it with weights frozen. Memory is the most that torch's allocator held"
    " at once beyond what it held before. Where the prompts of a pair differ late, ours leaves out"
    " what comes before; the published one knows no such thing. "
)
PAIRS, TOKENS, STEPS = 8, 15, 5
STARTS = ((10, 1 / 3, 1 / 8), (0, None, None))  # first difference; bars of time and of memory

Scores = Callable[[], Tensor]


@dataclass(frozen=True)
class Task:
    """Pairs of random prompts, equal up to `start`, and two random answers for each."""

    clean: Tensor
    contrast: Tensor
    answers: Tensor
    wrong: Tensor
    start: int

    @classmethod
    def random(cls, vocabulary: int, start: int) -> "Task":
        make = torch.Generator().manual_seed(start)

        def draw(*shape: int) -> Tensor:
            return torch.randint(1, vocabulary, shape, generator=make)

        clean, contrast = draw(PAIRS, TOKENS), draw(PAIRS, TOKENS)
        contrast[:, :start] = clean[:, :start]
        first = draw(PAIRS, 1)
        return cls(clean, contrast, first, first % (vocabulary - 1) + 1, start)

    def difference(self, logits: Tensor) -> Tensor:
        """The metric: how far the answer is above the wrong one, at the last token."""
        last = logits[:, -1]
        return (last.gather(1, self.answers) - last.gather(1, self.wrong))[:, 0]


# Ours --------------------------------------------------------------------------------------------


def ours(module: nn.Module, task: Task) -> tuple[Any, Scores]:
    """The graph, and all edges' scores by `edge_scores`."""
    import underhood as uh
    from underhood.circuits import Wiring, edge_scores
    from underhood.data import EncodedPairs, metric_named

    model = uh.load(module)
    (clean, _), (contrast, _) = model.batch(task.clean), model.batch(task.contrast)
    assert clean is not None and contrast is not None
    starts = [task.start] * PAIRS
    pairs = EncodedPairs(clean, contrast, task.answers, task.wrong, starts)
    wiring, metric = Wiring(model), metric_named("logit_diff")
    run = partial(edge_scores, wiring, pairs, metric, method="eap-ig", steps=STEPS)
    return wiring.graph, lambda: run().values


def passes(module: nn.Module, task: Task) -> Callable[[], None]:
    """The least that EAP-IG can do: a forward of the clean prompts, and each step's passes.

    The first step is the contrast's own run.
    """
    embed: Any = module.get_submodule("transformer.wte")

    def run() -> None:
        with _frozen(module):
            for step in range(STEPS + 1):
                given = embed(task.clean).requires_grad_(step < STEPS)
                with torch.set_grad_enabled(step < STEPS):
                    logits = module(inputs_embeds=given, use_cache=False, logits_to_keep=1).logits
                if step < STEPS:
                    torch.autograd.grad(task.difference(logits).sum(), given)

    return run


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


# The published algorithm -------------------------------------------------------------------------


class Published:
    """EAP-IG over inputs, after attribute.py and utils.py of github.com/hannamw/EAP-IG.

    One big tensor takes what every source writes in the contrast run less what it writes in the
    clean one, `[pair, token, source, d_model]`. At each step the backward pass hands over the
    gradient at every destination's own copy of the stream, which is multiplied with the sources
    before it. As there: the loss is the mean metric's opposite, the sum is divided by the number
    of pairs once more, and steps go from the contrast on without reaching the clean run.

    Args:
        bridge: TransformerLens' model; it is given per-head inputs and outputs.
        layers: Its blocks.
        heads: Heads of a block.
        task: The pairs.
    """

    def __init__(self, bridge: Any, layers: int, heads: int, task: Task) -> None:
        self.bridge, self.layers, self.heads, self.task = bridge, layers, heads, task
        bridge.set_use_attn_result(True)
        bridge.set_use_split_qkv_input(True)
        bridge.set_use_hook_mlp_in(True)
        self.sources = ["input"]
        self.destinations: list[str] = []
        self.writers = [("hook_embed", slice(0, 1))]
        self.readers: list[tuple[str, int, slice]] = []  # hook, sources before it, its columns
        for layer in range(layers):
            before, names = len(self.sources), [f"a{layer}.h{head}" for head in range(heads)]
            for kind in "qkv":
                self._reader(f"{layer}.attn.hook_{kind}_input", [f"{n}<{kind}>" for n in names])
            self.sources += names
            self._reader(f"{layer}.hook_mlp_in", [f"m{layer}"])
            self.sources.append(f"m{layer}")
            after = before + heads
            self.writers.append((f"blocks.{layer}.attn.hook_result", slice(before, after)))
            self.writers.append((f"blocks.{layer}.hook_mlp_out", slice(after, after + 1)))
        self._reader(f"{layers - 1}.hook_resid_post", ["logits"])

    def _reader(self, hook: str, names: list[str]) -> None:
        columns = slice(len(self.destinations), len(self.destinations) + len(names))
        self.readers.append((f"blocks.{hook}", len(self.sources), columns))
        self.destinations += names

    def __call__(self) -> Tensor:
        """Scores `[source, destination]`."""
        task, bridge = self.task, self.bridge
        width = bridge.cfg.d_model
        apart = torch.zeros(*task.clean.shape, len(self.sources), width)
        scores = torch.zeros(len(self.sources), len(self.destinations))

        def write(value: Tensor, hook: Any, *, part: slice, sign: int) -> None:
            value = value.detach()
            apart[:, :, part] += sign * (value if value.ndim == 4 else value[:, :, None])

        def read(grad: Tensor, hook: Any, *, before: int, part: slice) -> None:
            grad = grad.detach() if grad.ndim == 4 else grad.detach()[:, :, None]
            scores[:before, part] += torch.einsum("btsd,btrd->sr", apart[:, :, :before], grad)

        def writes(sign: int) -> list[tuple[str, Any]]:
            return [(at, partial(write, part=part, sign=sign)) for at, part in self.writers]

        reads = [(at, partial(read, before=n, part=part)) for at, n, part in self.readers]
        with torch.inference_mode():
            with bridge.hooks(fwd_hooks=writes(1)):
                bridge(task.contrast)
            start = apart[:, :, 0].clone()
            with bridge.hooks(fwd_hooks=writes(-1)):
                bridge(task.clean)
            way = -apart[:, :, 0]  # from the contrast's embedding to the clean one
        for step in range(STEPS):

            def embedded(_value: Tensor, hook: Any, share: float = step / STEPS) -> Tensor:
                return (start + share * way).requires_grad_()

            with bridge.hooks(fwd_hooks=[("hook_embed", embedded)], bwd_hooks=reads):
                (-task.difference(bridge(task.clean)).mean()).backward()
        bridge.zero_grad()
        return scores / PAIRS / STEPS


def published(task: Task, *, quick: bool, freeze: bool) -> Published:
    """The published algorithm on a copy of the same weights (the bridge changes its module)."""
    module = common.gpt2(quick=quick)
    config = module.config
    bridge = common.bridge(module)
    bridge.requires_grad_(not freeze)
    return Published(bridge, config.n_layer, config.n_head, task)


# Both --------------------------------------------------------------------------------------------


def agreement(mine: Tensor, theirs: Tensor, real: Tensor) -> str:
    """How far two sets of scores agree, in words.

    Raises:
        ValueError: They do not: nothing to compare.
    """
    a, b = mine[real].double(), theirs[real].double() * PAIRS  # a mean there, divided once more
    gap = float((a - b).abs().max() / a.abs().max())
    pearson = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    spearman = float(torch.corrcoef(ranks)[0, 1])
    said = (
        f"{len(a):,} edges: Pearson {pearson:.6f}, Spearman {spearman:.6f}, largest difference"
        f" {gap:.1e} of the largest score"
    )
    if not (gap < 1e-3 and pearson > 0.999):
        raise ValueError(f"the two do not compute the same: {said}")
    return said


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and write `results/circuits.json`."""
    chosen, load = common.options(__doc__, argv), common.load_average()
    report = common.Report("circuits", TITLE, ABOUT)
    module = common.gpt2(quick=chosen.quick)
    runs = chosen.runs or (1 if chosen.quick else 5)
    for start, time_bar, memory_bar in STARTS:
        task, case = Task.random(module.config.vocab_size, start), f"differ from {start}"
        graph, mine = ours(module, task)
        report.rows.append(common.against(
            passes(module, task), mine, runs, case=case,
            what=f"time, over {STEPS} bare forwards and backwards and a forward",
        ))  # fmt: skip
        try:
            peer = published(task, quick=chosen.quick, freeze=True)
            report.about += _compared(graph, mine, peer, case)
            report.rows.append(common.against(
                peer, mine, runs, case=case, what="time, over the published algorithm",
                bar=time_bar,
            ))  # fmt: skip
            report.rows.append(common.memory_against(
                peer, mine, case=case, what="memory, over the published algorithm", bar=memory_bar,
            ))  # fmt: skip
            peer.bridge.requires_grad_(True)
            report.rows.append(common.against(
                peer, mine, runs, case=case, what="time, over it with the weights' gradients",
            ))  # fmt: skip
        except ModuleNotFoundError as error:
            report.missing["TransformerLens"] = f"not installed ({error.name})"
    return common.write(report, chosen, load)


def _compared(graph: Any, mine: Scores, peer: Published, case: str) -> str:
    names = list(graph.sources), list(graph.destinations)
    if names != (peer.sources, peer.destinations):
        raise ValueError("the two graphs have other nodes")
    said = agreement(mine(), peer(), graph.real)
    print(f"{case:<14} {said}")
    return f"Both find the same ({case}; {said}). "


if __name__ == "__main__":
    main(sys.argv[1:])
