"""Exact patching sweeps: the shared-prefix engine against the naive loop and TransformerLens.

`python benchmarks/sweep.py [--quick] [--threads N] [--runs N]`; a GPT-2-small-size model with
random weights, a prompt of 16 tokens, resample patching. Times include reading the contrast's
activations on neither side. Prints and records how large the difference of the numbers is.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import common

TITLE = "Exact patching, over one forward per cell"
ABOUT = (
    "Every layer x position of resid_pre, or every head at the last position, patched one at a time"
    " from another prompt (16 tokens, GPT-2-small size, random weights, float32). Ours is"
    " `core.sweep`; the naive loop is one hooked forward of the bare Hugging Face module per cell;"
    " TransformerLens is its `patching.get_act_patch_resid_pre`. A result of 0.1 x means ten times"
    " faster. "
)
TOKENS = 16


def naive(
    module: nn.Module, ids: Tensor, source: dict[int, Tensor], cells: list[tuple[int, ...]]
) -> Tensor:
    """One forward per cell with one plain torch hook; no KV cache, all logits."""
    found = []
    for layer, pos, *head in cells:
        block = module.get_submodule(f"transformer.h.{layer}")
        place = block.attn.c_proj if head else block  # type: ignore[union-attr]

        def before(_m: Any, args: Any, layer: int = layer, pos: int = pos, head: Any = head) -> Any:
            h = args[0].clone()
            part = slice(None)
            if head:
                width = h.shape[-1] // 12
                part = slice(head[0] * width, (head[0] + 1) * width)
            h[:, pos, part] = source[layer][:, pos, part]
            return (h, *args[1:])

        handle = place.register_forward_pre_hook(before)
        with torch.no_grad():
            logits = module(ids, use_cache=False).logits[0, -1]
        handle.remove()
        found.append(logits[0] - logits[1])
    return torch.stack(found)


def ours(
    module: nn.Module, ids: Tensor, other: Tensor, site: str, places: Any
) -> Callable[[], Tensor]:
    """The same cells as edits."""
    import underhood as uh
    from underhood.core.site import Site
    from underhood.core.sweep import sweep

    model = uh.load(module)
    source = model.run(other, record=site)
    tokens = model.batch(ids)[0]
    assert tokens is not None
    cells = [
        uh.Edit(Site(site, layer, *head), uh.patch(source), pos) for layer, pos, *head in places
    ]
    return lambda: sweep(model, tokens, cells, lambda logits: logits[:, 0] - logits[:, 1]).values[
        :, 0
    ]


def transformer_lens(ids: Tensor, other: Tensor, *, quick: bool) -> Callable[[], Any]:
    """Its own patching function on its bridge, with the same metric."""
    from transformer_lens import patching  # type: ignore[import-not-found]

    bridge = common.bridge(common.gpt2(quick=quick))
    _, cache = bridge.run_with_cache(other)

    def patch() -> Any:
        with torch.no_grad():
            return patching.get_act_patch_resid_pre(
                bridge, ids, cache, lambda logits: logits[0, -1, 0] - logits[0, -1, 1]
            )

    return patch


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and write `results/sweep.json`."""
    chosen, load = common.options(__doc__, argv), common.load_average()
    report = common.Report("sweep", TITLE, ABOUT)
    module = common.gpt2(quick=chosen.quick)
    layers, heads = module.config.n_layer, module.config.n_head
    runs = chosen.runs or (1 if chosen.quick else 3)
    gaps = []
    for start, bar, peer_bar in ((0, 1 / 6.5, 1 / 9), (10, None, 1 / 25)):
        ids = torch.randint(1, module.config.vocab_size, (1, TOKENS))
        other = torch.randint(1, module.config.vocab_size, (1, TOKENS))
        other[:, :start] = ids[:, :start]
        places = [(layer, pos) for layer in range(layers) for pos in range(start, TOKENS)]
        source = _recorded(module, other, "resid_pre")
        mine = ours(module, ids, other, "resid_pre", places)
        every = [(layer, pos) for layer in range(layers) for pos in range(TOKENS)]
        gaps.append(float((mine() - naive(module, ids, source, places)).abs().max()))
        case = f"differ from {start}"
        loop = partial(naive, module, ids, source, every)
        report.rows.append(common.against(
            loop, mine, runs, case=case, what="layer x position, over the naive loop", bar=bar,
        ))  # fmt: skip
        try:
            peer = transformer_lens(ids, other, quick=chosen.quick)
            report.rows.append(common.against(
                peer, mine, runs, case=case, what="layer x position, over TransformerLens",
                bar=peer_bar,
            ))  # fmt: skip
        except Exception as error:
            report.missing["TransformerLens"] = f"{type(error).__name__}: {error}"[:200]
    ids = torch.randint(1, module.config.vocab_size, (1, TOKENS))
    other = torch.randint(1, module.config.vocab_size, (1, TOKENS))
    if heads == 12:
        last = [(layer, TOKENS - 1, head) for layer in range(layers) for head in range(heads)]
        source = _recorded(module, other, "z")
        mine = ours(module, ids, other, "z", last)
        gaps.append(float((mine() - naive(module, ids, source, last)).abs().max()))
        report.rows.append(common.against(
            lambda: naive(module, ids, source, last), mine, runs, case="all heads",
            what="last position, over the naive loop", bar=1 / 6,
        ))  # fmt: skip
    report.about += f"Largest difference between ours and the naive loop: {max(gaps):.1e} logits."
    return common.write(report, chosen, load)


def _recorded(module: nn.Module, ids: Tensor, site: str) -> dict[int, Tensor]:
    import underhood as uh

    run = uh.load(module).run(ids, record=site)
    return {s.layer or 0: run[s].flatten(2) if site == "z" else run[s] for s in run.sites}


if __name__ == "__main__":
    main(sys.argv[1:])
