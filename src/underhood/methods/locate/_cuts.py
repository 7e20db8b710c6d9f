"""What nodes do: exact ablations of any set of them, as shares of what the contrast changes.

    E(S) = (clean - with all nodes of S ablated) / (clean - contrast)      ratio of means

Ablating a node is cutting all edges out of it: every reader gets, in place of what it writes, what
it writes in the contrast run (or a mean, or nothing). Sets are single cells of one sweep, and no
set is run twice.
"""

from collections.abc import Collection, Iterable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from underhood.circuits.ablation import Ablation
from underhood.circuits.wiring import Wiring, last_logits
from underhood.core.edit import Edit, Plan
from underhood.core.errors import NotOffered
from underhood.core.ops import SwapSubspace, patch
from underhood.core.site import Site
from underhood.core.sweep import rows_per_pass, sweep
from underhood.core.tokens import Tokens
from underhood.data import EncodedPairs, Metric, normalised

__all__ = ["Cuts", "Set", "nodes_of"]

Set = frozenset[int]
"""Nodes by their number among the graph's sources."""

_CELLS = 1024  # sets of one sweep
_FEW = 32  # sets that are batched plainly: sharing layers pays for many cells of each prompt


def nodes_of(wiring: Wiring, kind: str) -> tuple[int, ...]:
    """Numbers of the nodes of a kind: "heads", "mlps", or "all" but the input.

    Raises:
        NotOffered: The model has none.
    """
    graph = wiring.graph
    wanted = {"heads": {"heads"}, "mlps": {"mlp"}, "all": {"heads", "mixer", "mlp"}}[kind]
    found = [n for i, w in enumerate(graph.writers) if w.kind in wanted for n in graph.written(i)]
    if not found:
        raise NotOffered(
            f"this model has no {kind} that write to its stream by themselves",
            given=f"{graph!r}",
            do="use nodes='all'",
        )
    return tuple(found)


class Cuts:
    """Ablates sets of nodes on the same prompts.

    Args:
        wiring: The model and its graph.
        pairs: The prompts.
        metric: What is measured.
        ablation: What an ablated node writes: one of `underhood.circuits.ABLATIONS`.
        batch_size: Rows of one pass.

    Raises:
        PairError: The metric is the same for clean prompts and contrasts.
        UsageError: An unknown ablation.
    """

    def __init__(
        self,
        wiring: Wiring,
        pairs: EncodedPairs,
        metric: Metric,
        ablation: str = "resample",
        batch_size: int | None = None,
    ) -> None:
        self.wiring, self.pairs, self.metric, self.batch_size = wiring, pairs, metric, batch_size
        self.passes, self.how = 0, "nothing was run"
        size = batch_size or rows_per_pass(pairs.clean.ids.shape[1])
        cut = Ablation(wiring, pairs, ablation, size)
        parts = [pairs.rows(block) for block in pairs.blocks(size)]
        ends = [last_logits(wiring.model, part.clean)[0] for part in parts]
        other = [cut.writes(part) for part in parts]
        self.passes += cut.passes + 2 * len(parts)
        self.logits = torch.cat(ends)
        self.clean = self._read(self.logits)
        self.contrast = self._read(torch.cat([part.logits for part in other]))
        self.gap = self.clean - self.contrast
        normalised(0.0, float(self.clean.mean()), float(self.contrast.mean()))  # refuses no gap
        writers = range(len(wiring.graph.writers))
        self.columns = [torch.cat([part.values[w] for part in other]) for w in writers]
        self._plain = self._z_is_written()
        self._edits: dict[int, Edit] = {}
        self._done: dict[Set, Tensor] = {frozenset(): torch.zeros_like(self.clean)}

    def drops(self, sets: Iterable[Collection[int]]) -> Float[Tensor, "set batch"]:
        """What the metric loses on each prompt without each set, in its unit."""
        asked = [frozenset(s) for s in sets]
        todo = [s for s in dict.fromkeys(asked) if s not in self._done]
        for first in range(0, len(todo), _CELLS):
            some = todo[first : first + _CELLS]
            swept = sweep(
                self.wiring.model, self.pairs.clean, [self._plan(s) for s in some], self._read,
                batch_size=self.batch_size, share=len(some) > _FEW,
            )  # fmt: skip
            self.passes, self.how = self.passes + swept.passes, swept.how
            self._done |= zip(some, self.clean - swept.values, strict=True)
        if not asked:
            return torch.zeros(0, len(self.clean), dtype=torch.float64)
        return torch.stack([self._done[s] for s in asked])

    def lost(self, sets: Iterable[Collection[int]]) -> Float[Tensor, " set"]:
        """E of each set."""
        return self.drops(sets).mean(1) / self.gap.mean()

    @property
    def sets(self) -> int:
        """How many sets were run."""
        return len(self._done) - 1

    def _read(self, logits: Tensor) -> Float[Tensor, " rows"]:
        times = len(logits) // len(self.pairs)
        answers, wrong = (ids.repeat(times, 1) for ids in (self.pairs.answers, self.pairs.wrong))
        near = self.logits.repeat(times, 1) if self.metric.uses_reference else None
        return self.metric(logits, answers, wrong, reference=near).double().cpu()

    # Edits ---------------------------------------------------------------------------------------

    def _plan(self, nodes: Set) -> Plan:
        graph = self.wiring.graph
        edits = []
        for number, writer in enumerate(graph.writers):
            mine = [node for node in sorted(nodes) if node in graph.written(number)]
            if mine and writer.kind == "heads" and not self._plain[number]:
                start = graph.written(number).start
                edits.append(self._gated_edit(number, [node - start for node in mine]))
            else:
                edits += [self._edit(number, node) for node in mine]
        return Plan(edits)

    def _edit(self, number: int, node: int) -> Edit:
        """One node's edit, at a site inside its layer, so that sets share what comes before."""
        if node not in self._edits:
            writer, value = self.wiring.graph.writers[number], self.columns[number]
            site = writer.site
            if writer.kind == "heads":
                head = node - self.wiring.graph.written(number).start
                site = Site("z", writer.layer, head, stack=self.wiring.model.main)
                value = value.unflatten(-1, (writer.heads, -1))[:, :, head]
            self._edits[node] = Edit(site, patch(_own(value, self.pairs.clean)))
        return self._edits[node]

    def _gated_edit(self, number: int, heads: Sequence[int]) -> Edit:
        """The same where the output projection reads `z` behind a gate: some of its columns."""
        writer, value = self.wiring.graph.writers[number], self.columns[number]
        basis = torch.eye(value.shape[-1], device=value.device).unflatten(0, (writer.heads, -1))
        basis = basis[list(heads)].flatten(0, 1)
        return Edit(writer.site, SwapSubspace(basis, _own(value, self.pairs.clean)))

    def _z_is_written(self) -> list[bool]:
        """Per writer of heads, whether the output projection reads the heads' `z` as it is."""
        model, writers = self.wiring.model, self.wiring.graph.writers
        known = {i: w for i, w in enumerate(writers) if w.kind == "heads"}
        z = {i: Site("z", w.layer, stack=model.main) for i, w in known.items()}
        z = {i: site for i, site in z.items() if model.offers(site)}
        run = model.run(
            self.pairs.clean.row(0), record=[*z.values(), *(known[i].site for i in z)]
        ) if z else None  # fmt: skip
        same = {i: run is not None and _equal(run[z[i]], run[known[i].site]) for i in z}
        return [same.get(i, False) for i in range(len(writers))]


def _equal(z: Tensor, read: Tensor) -> bool:
    flat = z.flatten(-2)
    return flat.shape == read.shape and bool(torch.equal(flat, read))


def _own(value: Tensor, tokens: Tokens) -> Tensor:
    """Columns of a padded batch as each row's own positions."""
    keep: Bool[Tensor, "rows pos"] = tokens.mask.to(value.device)
    out = torch.zeros_like(value)
    for row, length in enumerate(tokens.lengths):
        out[row, :length] = value[row, keep[row]]
    return out
