"""Generation with one edit, over the bare `generate`.

The same greedy decoding of 32 tokens with a KV cache, GPT-2-small size, random weights. The edit
adds a vector to the residual stream after block 6 (of 12) at every position.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch

import common

TITLE = "Generation, over the bare generate"
ABOUT = (
    "32 greedy tokens after a prompt of 16 (GPT-2-small size, random weights, float32, KV cache),"
    " against `module.generate` with the same settings. The edit adds a vector at resid_post of the"
    " middle layer, at all positions, and reports how much it moved."
)
BAR = 1.03


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and write `results/generation.json`."""
    chosen, load = common.options(__doc__, argv), common.load_average()
    import underhood as uh

    report = common.Report("generation", TITLE, ABOUT)
    module = common.gpt2(quick=chosen.quick)
    model = uh.load(module)
    new, runs = (4, 2) if chosen.quick else (32, 15)
    ids = torch.randint(1, module.config.vocab_size, (1, 16))
    vector = torch.randn(module.config.n_embd) * 0.1
    edit = uh.Edit(f"resid_post.{module.config.n_layer // 2}", uh.add(vector))
    # Random weights may choose the end token; both sides have to write on.
    settings: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new}
    mask = torch.ones_like(ids)
    end = module.generation_config.eos_token_id

    def bare() -> Any:
        return module.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=end, **settings
        )

    arms: dict[str, tuple[Any, float | None]] = {
        "no edit": (lambda: model.generate(ids, **settings), BAR),
        "one edit": (lambda: model.generate(ids, edits=edit, **settings), BAR),
        "one edit, its site recorded": (
            lambda: model.generate(ids, edits=edit, record=edit.site, **settings), None
        ),
    }  # fmt: skip
    for what, (run, bar) in arms.items():
        row = common.against(
            bare, run, chosen.runs or runs, case=f"{new} new tokens", what=what, bar=bar
        )
        report.rows.append(row)
    return common.write(report, chosen, load)


if __name__ == "__main__":
    main(sys.argv[1:])
