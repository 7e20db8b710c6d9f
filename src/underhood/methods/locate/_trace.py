"""What the tracing methods share: several numbers per cell, the lens as edits, states at the end.

`core.sweep` reads one number per cell and prompt. `sweep_columns` reads several from the same
logits: it hands the sweep a running number and keeps what was read under it.

The logit lens of a layer, in a sweep, is the model *stopped* after that layer: what later blocks
add at the last token is set to zero, so that the stream arrives at the unembedding as it left the
layer. `stop_gap` measures that this is so.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from underhood.core.edit import Edit, Plan
from underhood.core.errors import NotOffered, PairError
from underhood.core.head import Head
from underhood.core.model import Model
from underhood.core.ops import set_to, zero
from underhood.core.site import Site
from underhood.core.sweep import Swept, rows_per_pass, sweep
from underhood.core.tokens import Tokens
from underhood.data import EncodedPairs

__all__ = [
    "check_stop", "first_staying", "last_states", "log_prob_and_rank",
    "own_answers", "random_like", "stopped", "streams", "sweep_columns", "written",
]  # fmt: skip

_STOP = 1e-3  # of the largest logit: the stopped model against the lens


def sweep_columns(
    model: Model,
    tokens: Tokens,
    cells: Sequence[Edit | Plan],
    read: Callable[[Tensor], Tensor],
    *,
    batch_size: int | None = None,
) -> tuple[Float[Tensor, "cell batch column"], Swept]:
    """A sweep that reads several numbers per cell and prompt.

    Args:
        model: The model.
        tokens: The prompts.
        cells: As in `core.sweep`.
        read: From logits `[rows, vocab]` (cell by cell all prompts) to numbers `[rows, column]`.
        batch_size: Rows of one pass.
    """
    kept: list[Tensor] = []

    def note(logits: Tensor) -> Tensor:
        found = read(logits).double().cpu()
        first = sum(len(block) for block in kept)
        kept.append(found)
        return torch.arange(first, first + len(found), dtype=torch.float64)

    swept = sweep(model, tokens, cells, note, batch_size=batch_size)
    return torch.cat(kept)[swept.values.long()], swept


def streams(model: Model) -> list[Site]:
    """The stream before the first block (layer -1 in results) and after each block."""
    after = [Site("resid_post", layer, stack=model.main) for layer in range(model.n_layers)]
    return [Site("resid_pre", 0, stack=model.main), *after]


def last_states(
    model: Model, tokens: Tokens, sites: Sequence[Site], *, batch_size: int | None = None
) -> tuple[dict[Site, Float[Tensor, "batch d"]], Float[Tensor, "batch vocab"]]:
    """Activations and logits at each prompt's last token, run in blocks of rows."""
    size = batch_size or rows_per_pass(tokens.ids.shape[1])
    kept: dict[Site, list[Tensor]] = {site: [] for site in sites}
    logits = []
    for rows in tokens.blocks(size):
        run = model.run(tokens.rows(rows), record=list(sites), at=-1)
        for site, found in kept.items():
            found.append(run[site][:, 0])
        logits.append(run.last_logits.float())
    return {site: torch.cat(found) for site, found in kept.items()}, torch.cat(logits)


def written(site: Site, values: Float[Tensor, "batch d"]) -> Edit:
    """The edit that puts one vector per prompt at its last token."""
    return Edit(site, set_to(values[:, None]), -1)


def stopped(model: Model, layer: int) -> list[Edit]:
    """Edits that stop the model after a layer, as far as the last token's stream goes."""
    later = [
        Site(name, at, stack=model.main)
        for at in range(layer + 1, model.n_layers)
        for name in ("attn_out", "mlp_out")
    ]
    return [Edit(site, zero(), -1) for site in later if model.offers(site)]


def check_stop(
    model: Model,
    head: Head,
    tokens: Tokens,
    layer: int,
    stream: Float[Tensor, "batch d"],
    *,
    do: str,
) -> None:
    """Prove that the stopped model says what the lens of the layer says.

    Args:
        model: The model.
        head: Its unembedding.
        tokens: The prompts; the first is run.
        layer: Where it stops.
        stream: `resid_post` of that layer at the last token of each.
        do: What to do where it does not.

    Raises:
        NotOffered: A block does more than add to the stream.
    """
    run = model.run(tokens.row(0), edits=Plan(stopped(model, layer)))
    lens = head.logits(stream[:1]).float()
    gap = float((run.last_logits.float() - lens).abs().max() / lens.abs().max().clamp(min=1.0))
    if gap > _STOP:
        raise NotOffered(
            f"this model cannot be stopped after layer {layer}",
            given=f"{model!r}: {gap:.2g} of the largest logit beside the lens",
            why="its blocks do more to the stream than add what attention and MLP write",
            do=do,
        )


def random_like(
    change: Float[Tensor, "batch *rest"],  # noqa: F821
    seed: int,
    draw: int,
    *,
    first_row: int = 0,
) -> Float[Tensor, "batch *rest"]:  # noqa: F821
    """Random directions as long as the changes (over the last axis).

    Each row has its own generator, so that blocks of rows do not matter.
    """
    found = torch.zeros(change.shape)
    for row in range(len(change)):
        make = torch.Generator().manual_seed(hash((seed, draw, first_row + row)) % 2**63)
        vector = torch.randn(change.shape[1:], generator=make)
        found[row] = vector / vector.norm(dim=-1, keepdim=True)
    return found.to(change.device) * change.float().norm(dim=-1, keepdim=True)


def first_staying(holds: Sequence[bool]) -> int | None:
    """Index of the first entry from which all hold; None when the last does not."""
    found = None
    for index in range(len(holds) - 1, -1, -1):
        if not holds[index]:
            break
        found = index
    return found


def log_prob_and_rank(
    logits: Float[Tensor, "row vocab"], targets: Int[Tensor, " row"]
) -> Float[Tensor, "row 2"]:
    """Log-probability (nats) and reciprocal rank of one token per row; ties count against it."""
    mine = logits.float().gather(1, targets[:, None])
    above = (logits.float() >= mine).sum(1, keepdim=True)
    log = mine - logits.float().logsumexp(1, keepdim=True)
    return torch.cat([log, 1.0 / above], 1)


def own_answers(
    model: Model, encoded: EncodedPairs, *, batch_size: int | None = None
) -> tuple[EncodedPairs, str]:
    """Missing answers filled in with what the model says; and where they come from.

    Raises:
        PairError: The model says the same after both prompts.
    """
    if encoded.answers.shape[1] and encoded.wrong.shape[1]:
        return encoded, "as given"
    tops = [
        last_states(model, side, [], batch_size=batch_size)[1].argmax(-1)[:, None]
        for side in (encoded.clean, encoded.contrast)
    ]
    answers = encoded.answers if encoded.answers.shape[1] else tops[0].to(encoded.answers.device)
    wrong = encoded.wrong if encoded.wrong.shape[1] else tops[1].to(encoded.wrong.device)
    same = (answers[:, :, None] == wrong[:, None, :]).flatten(1).any(1)
    if bool(same.any()):
        raise PairError(
            "the model says the same after the clean prompt and after the contrast",
            given=f"row {int(same.nonzero()[0])}",
            why="the pair came without answers, so the model's own were to be compared",
            do="give answers and wrong answers",
        )
    return replace(encoded, answers=answers, wrong=wrong), "the model's own top tokens"
