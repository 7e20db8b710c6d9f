"""The subgraph in which all depends on one token: wait, transfer, and the last token alone.

    layers before L_wait         every token knows itself only (CAMA: mean states by token)
    L_transfer layers from there the last token sees the others, these see themselves (ABP)
    layers after                 the last token sees itself only

The search finds the largest L_wait, then the smallest L_transfer, that keep the accuracy.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from underhood.core.edit import Plan
from underhood.core.errors import PairError
from underhood.core.model import Model
from underhood.core.site import Site
from underhood.core.sweep import rows_per_pass, sweep
from underhood.core.tokens import Tokens
from underhood.data import EncodedPairs
from underhood.methods.locate._flow import (
    TokenStates,
    alone,
    last_logits,
    looks,
    margin,
    streams,
)

if TYPE_CHECKING:
    import xarray

__all__ = ["Search", "Subgraph"]

_KINDS = ("mean", "blind", "skip", "noise")


@dataclass(frozen=True, slots=True)
class Subgraph:
    """What is asked of the search.

    Attributes:
        see: Positions that the last token sees while it transfers; None: all.
        keep: Share of the accuracy to keep.
        against: "all" or "wrong".
        draw: How prompts for the mean states are made.
        samples: How many.
        sink: Whether the first token, the same everywhere, stays visible.
        draws: Random choices of layers, and of tokens, in the controls; 0: no controls.
        seed: Of all draws.
        batch_size: Rows of one pass.
    """

    see: tuple[int, ...] | None
    keep: float
    against: str
    draw: str
    samples: int
    sink: bool
    draws: int
    seed: int
    batch_size: int | None


class Search:
    """The search on some prompts of one template.

    Raises:
        PairError: The unedited model is never right.
    """

    def __init__(
        self, model: Model, encoded: EncodedPairs, ids: Int[Tensor, "prompt pos"], asked: Subgraph
    ) -> None:
        self.model, self.encoded, self.asked = model, encoded, asked
        model.resolve(Site("scores", stack=model.main))
        self.ids, self.size = ids[: len(encoded)], ids.shape[1]
        self.wrong = encoded.wrong if asked.against == "wrong" else None
        self.tokens = Tokens(self.ids, torch.ones_like(self.ids, dtype=torch.bool))
        full = self._read(last_logits(model, self.tokens, asked.batch_size))
        self.full, self.full_accuracy = full, float((full > 0).double().mean())
        if not self.full_accuracy:
            raise PairError(
                "the model is right in none of these prompts",
                given=f"{len(encoded)} prompts, answers against {asked.against}",
                why="there is no accuracy that a part of the model could keep",
                do="give prompts that the model answers; or against='wrong'",
            )
        self.states = TokenStates(
            model, ids, draw=asked.draw, samples=asked.samples, seed=asked.seed,
            batch_size=asked.batch_size,
        )  # fmt: skip
        self.passes, self.how = self.states.passes, ""
        self.attending = [
            n for n in range(model.n_layers)
            if model.offers(Site("scores", n, stack=model.main))
        ]  # fmt: skip

    def _read(self, logits: Tensor) -> Float[Tensor, " rows"]:
        times = len(logits) // len(self.encoded)
        right = self.encoded.answers.repeat(times, 1)
        wrong = None if self.wrong is None else self.wrong.repeat(times, 1)
        return margin(logits, right, wrong).cpu()

    def _sweep(self, plans: list[Plan]) -> Float[Tensor, "cell batch"]:
        """Margins; an empty plan is the unedited run."""
        values = self.full.expand(len(plans), -1).clone()
        live = [i for i, plan in enumerate(plans) if plan]
        if live:
            swept = sweep(
                self.model, self.tokens, [plans[i] for i in live], self._read,
                batch_size=self.asked.batch_size,
            )  # fmt: skip
            values[live] = swept.values
            self.how, self.passes = swept.how, self.passes + swept.passes
        return values

    def good(self, values: Tensor) -> Tensor:
        """Whether enough accuracy is kept."""
        return (values > 0).double().mean(-1) >= self.asked.keep * self.full_accuracy

    # Waiting -------------------------------------------------------------------------------------

    def wait(self) -> dict[str, Float[Tensor, "layer batch"]]:
        """Margins by L_wait, attention open afterwards: by the mean states, and the controls."""
        size = self.asked.batch_size or rows_per_pass(self.size)
        found: dict[str, list[Tensor]] = {kind: [] for kind in _KINDS}
        kinds = _KINDS if self.asked.draws else _KINDS[:1]
        for rows in self.tokens.blocks(size):
            some = self._rows(rows)
            run = self.model.run(some.tokens, record=streams(self.model))
            cells = [
                (kind, Plan([edit]))
                for kind, edit in self.states.waiting(some.ids, run, rows, seed=self.asked.seed)
                if kind in kinds
            ]
            values = some._sweep([plan for _, plan in cells])
            for kind in kinds:
                found[kind].append(values[[i for i, (name, _) in enumerate(cells) if name == kind]])
            self.how, self.passes = some.how, self.passes + some.passes + 1
        return {kind: torch.cat(found[kind], 1) for kind in kinds}

    def _rows(self, rows: range) -> "Search":
        """The same search on some rows; counts its own passes."""
        cut = slice(rows.start, rows.stop)
        part = object.__new__(Search)
        part.__dict__ |= self.__dict__ | {"passes": 0, "ids": self.ids[cut]}
        part.tokens = Tokens(self.tokens.ids[cut], self.tokens.mask[cut])
        e = self.encoded
        part.encoded = EncodedPairs(
            part.tokens, part.tokens, e.answers[cut], e.wrong[cut], e.first_difference[cut]
        )
        part.wrong = None if self.wrong is None else self.wrong[cut]
        part.full = self.full[cut]
        return part

    # Transfer ------------------------------------------------------------------------------------

    def _visible(self, see: Iterable[int] | None) -> Bool[Tensor, "query key"]:
        """In a transfer layer: the last token sees the others, these themselves."""
        visible = alone(self.size, first=self.asked.sink)
        spots = list(range(self.size)) if see is None else list(see)
        visible[-1, spots] = True
        return visible

    def plan(self, wait: int, transfer: Iterable[int], see: Iterable[int] | None) -> Plan:
        """The subgraph: states at `wait`, attention in the layers after it."""
        chosen = set(transfer)
        open_, shut = self._visible(see), alone(self.size, first=self.asked.sink)
        edits = [self.states.edit(wait, self.states.mean(self.ids, wait))] if wait else []
        masks = {n: open_ if n in chosen else shut for n in self.attending if n >= wait}
        return Plan([*edits, *looks(self.model, masks)])

    def transfers(
        self, wait: int, see: Iterable[int] | None, counts: Iterable[int]
    ) -> Float[Tensor, "step batch"]:
        """Margins of the subgraph by L_transfer."""
        return self._sweep([self.plan(wait, range(wait, wait + n), see) for n in counts])

    def elsewhere(self, wait: int, count: int) -> Float[Tensor, "draw batch"]:
        """As many transfer layers, drawn among those after L_wait."""
        rest = range(wait, self.model.n_layers)
        rng = random.Random(f"{self.asked.seed} layers {wait} {count}")
        sets = [rng.sample(rest, count) for _ in range(self.asked.draws)]
        return self._sweep([self.plan(wait, layers, self.asked.see) for layers in sets])

    def other_tokens(self, wait: int, count: int) -> Float[Tensor, "draw batch"]:
        """As many visible tokens, drawn among those that are not to be seen."""
        see = set(self.asked.see or ())
        rest = [p for p in range(int(self.asked.sink), self.size - 1) if p not in see]
        many = min(len(see), len(rest))
        rng = random.Random(f"{self.asked.seed} tokens {wait} {count}")
        sets = [rng.sample(rest, many) for _ in range(self.asked.draws)]
        return self._sweep([self.plan(wait, range(wait, wait + count), s) for s in sets])

    def without(self, wait: int, count: int) -> Float[Tensor, " batch"]:
        """The unedited model, its last token alone in the transfer layers: are they needed?"""
        everything = torch.ones(self.size, self.size, dtype=torch.bool)
        everything[-1] = alone(self.size, first=self.asked.sink)[-1]
        chosen = [n for n in self.attending if wait <= n < wait + count]
        return self._sweep([Plan(looks(self.model, dict.fromkeys(chosen, everything)))])[0]

    # The search ----------------------------------------------------------------------------------

    def run(self) -> "xarray.Dataset":
        """Wait, transfer, and what speaks for them."""
        import numpy as np
        import xarray

        layers = self.model.n_layers
        waits = self.wait()
        table = torch.full((layers + 1, layers + 1, len(self.ids)), torch.nan, dtype=torch.float64)
        wait, transfer = self._found(waits["mean"], table)
        accuracy = {kind: (v > 0).double().mean(1) for kind, v in waits.items()}
        nan = torch.full((layers + 1,), torch.nan, dtype=torch.float64)
        variables = {}
        for kind in _KINDS:
            name = "wait_accuracy" if kind == "mean" else f"wait_{kind}"
            variables[name] = ("layer", accuracy.get(kind, nan).numpy())
        variables["wait_margin"] = (("layer", "batch"), waits["mean"].numpy())
        known = ~table.isnan().any(-1)
        share = torch.where(known, (table > 0).double().mean(-1), torch.nan)
        variables["transfer_accuracy"] = (("layer", "step"), share.numpy())
        variables["transfer_margin"] = (("layer", "step", "batch"), table.numpy())
        variables["margin"] = ("batch", self.full.numpy())
        scalars = {"full_accuracy": self.full_accuracy, "wait": -1, "transfer": -1}
        scalars |= {"accuracy": np.nan, "elsewhere": np.nan, "other_tokens": np.nan}
        scalars["without"] = np.nan
        if wait is not None and transfer is not None:
            scalars |= {"wait": wait, "transfer": transfer}
            scalars["accuracy"] = float(share[wait, transfer])
            scalars["without"] = _accuracy(self.without(wait, transfer))
            if self.asked.draws:
                scalars["elsewhere"] = _accuracy(self.elsewhere(wait, transfer))
            if self.asked.draws and self.asked.see is not None:
                scalars["other_tokens"] = _accuracy(self.other_tokens(wait, transfer))
        counts = list(range(layers + 1))
        return xarray.Dataset(variables | scalars, coords={"layer": counts, "step": counts})

    def _found(self, waits: Tensor, table: Tensor) -> tuple[int | None, int | None]:
        """The largest L_wait for which some L_transfer keeps the accuracy, and the smallest such.

        `table` is filled with what was run.
        """
        good = self.good(waits).nonzero()[:, 0].tolist()
        for wait in reversed(good):
            counts = range(self.model.n_layers - wait + 1)
            values = self.transfers(wait, self.asked.see, counts)
            table[wait, : len(counts)] = values
            enough = self.good(values).nonzero()[:, 0].tolist()
            if enough:
                return wait, enough[0]
        return None, None


def _accuracy(values: Tensor) -> float:
    return float((values > 0).double().mean())
