"""Recording, over the bare forward: ours, TransformerLens and nnsight.

GPT-2-small size with random weights, float32, one prompt of ids, no KV cache. "Bare" is the Hugging
Face module itself under `no_grad`. Every tool gets its own copy of the model, because
TransformerLens rebuilds the one that it is given.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import common

TITLE = "Recording, over the bare forward"
ABOUT = (
    "One forward of a GPT-2-small-size model (random weights, float32, token ids in, no KV cache)"
    " that keeps activations, against the bare Hugging Face module. Ours keeps copies, safe from"
    " the model's in-place arithmetic; TransformerLens and nnsight keep references. Sites differ:"
    " ours counts what each head writes (head_out) among one layer's sites, TransformerLens does"
    " not by default; it counts inputs and outputs of every sub-module, which ours has as module:"
    " sites."
)
RESIDUALS, LAYER, EVERYTHING = "all residuals", "everything of one layer", "everything"
BARS = {RESIDUALS: 1.03, LAYER: 1.15}
Arm = tuple[str, Callable[[], Any]]


def bare(module: nn.Module, ids: Tensor) -> Callable[[], Any]:
    """The module itself."""

    def forward() -> Any:
        with torch.no_grad():
            return module(input_ids=ids, use_cache=False)

    return forward


def ours(module: nn.Module, ids: Tensor) -> Iterator[Arm]:
    """Our runs on the very module that the bare forward runs."""
    import underhood as uh

    model = uh.load(module)
    layer = [s for s in model.sites() if s.layer == model.n_layers // 2 - 1]
    sites = model.sites()
    yield "nothing", lambda: model.run(ids)
    yield RESIDUALS, lambda: model.run(ids, record="resid_post")
    yield LAYER, lambda: model.run(ids, record=layer)
    yield EVERYTHING, lambda: model.run(ids, record=sites)


def transformer_lens(module: nn.Module, ids: Tensor) -> Iterator[Arm]:
    """TransformerLens 4: `run_with_cache` of the bridge over a Hugging Face model."""
    bridge = common.bridge(module)
    layer = f"blocks.{module.config.n_layer // 2 - 1}."  # type: ignore[union-attr]

    def cached(keep: Callable[[str], bool] | None) -> Any:
        with torch.no_grad():
            return bridge.run_with_cache(ids, names_filter=keep)

    yield RESIDUALS, lambda: cached(lambda name: name.endswith("hook_resid_post"))
    yield LAYER, lambda: cached(lambda name: name.startswith(layer))
    yield EVERYTHING, lambda: cached(None)


def nnsight(module: nn.Module, ids: Tensor) -> Iterator[Arm]:
    """nnsight: a trace that saves each block's output."""
    import nnsight as peer  # type: ignore[import-not-found]

    model = peer.NNsight(module)

    def residuals() -> Any:
        # nnsight reads this source: its `with` has to stand alone.
        with torch.no_grad():  # noqa: SIM117
            with model.trace(ids, use_cache=False):
                kept = peer.save([block.output for block in model.transformer.h])
                out = model.output.save()
        return out, kept

    yield RESIDUALS, residuals


TOOLS: dict[str, Callable[[nn.Module, Tensor], Iterator[Arm]]] = {
    "underhood": ours,
    "TransformerLens": transformer_lens,
    "nnsight": nnsight,
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and write `results/recording.json`."""
    chosen, load = common.options(__doc__, argv), common.load_average()
    report = common.Report("recording", TITLE, ABOUT)
    module = common.gpt2(quick=chosen.quick)
    for length, runs in ((8, 2),) if chosen.quick else ((16, 30), (128, 15)):
        ids = torch.randint(1, module.config.vocab_size, (1, length))
        base = bare(module, ids)
        for tool, arms in TOOLS.items():
            own = module if tool == "underhood" else common.gpt2(quick=chosen.quick)
            try:
                for what, run in arms(own, ids):
                    bar = BARS.get(what) if tool == "underhood" else None
                    row = common.against(
                        base, run, chosen.runs or runs,
                        case=f"{length} tokens", what=f"{tool}: {what}", bar=bar,
                    )  # fmt: skip
                    report.rows.append(row)
            except ModuleNotFoundError as error:
                report.missing[tool] = f"not installed ({error.name})"
            except Exception as error:  # a peer's failure is reported, ours is raised
                if tool == "underhood":
                    raise
                report.missing[tool] = f"{type(error).__name__}: {error}"[:200]
    return common.write(report, chosen, load)


if __name__ == "__main__":
    main(sys.argv[1:])
