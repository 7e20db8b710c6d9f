"""The search for nodes that stand in for each other, and the random sets that it is judged by.

Two nodes of which one does the other's job when it is gone show little alone. Two searches:

    one by one     with each of the strongest nodes ablated, every other node; then with each set
                   found so far
    in groups      nodes that show nothing alone are ablated all at once, and in random halves; a
                   group that does more than its members alone is cut down, by halving, to a
                   smallest set that still does half of it; then again without each of its members,
                   until nothing is left. k nodes among n cost about k log2(n) sets.

`extra` is what counts: how much more each member of a set does, at least, once the others are gone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.methods.locate._cuts import Cuts, Set

__all__ = ["Rule", "Search", "extra", "interaction", "random_sets"]

_TURNS = 8  # turns of a group search, per set that is kept
_PATIENCE = 100  # draws for one random set


def interaction(cuts: Cuts, sets: Sequence[Set]) -> Float[Tensor, " set"]:
    """E of each set less the sum of its members' own."""
    alone = [float(cuts.lost([[n] for n in s]).sum()) for s in sets]
    return cuts.lost(sets) - torch.tensor(alone, dtype=torch.float64)


def extra(cuts: Cuts, sets: Sequence[Set]) -> Float[Tensor, " set"]:
    """What the least member does more, without the others, than by itself.

    The least over members j of E(S) - E(S without j) - max(E(j), 0). A member that works against
    the answer (E below 0) is no backup for losing its work: hence the 0.
    """
    cuts.lost([s - {n} for s in sets for n in s])  # one sweep for all of them
    found = []
    for s in sets:
        whole = float(cuts.lost([s])[0])
        rest, own = cuts.lost([s - {n} for n in s]), cuts.lost([[n] for n in s])
        found.append(float((whole - rest - own.clamp(min=0)).min()))
    return torch.tensor(found, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Rule:
    """How far the search goes.

    Attributes:
        top: Nodes (and sets) to go on from, and sets to keep.
        threshold: Least `extra` that counts.
        largest: Nodes of a set at most.
        halves: Random halves of the quiet nodes.
        seed: Of orders and halves.
    """

    top: int
    threshold: float
    largest: int
    halves: int = 8
    seed: int = 0


@dataclass
class Search:
    """Finds sets; see the module.

    Attributes:
        found: Sets, in the order of finding.
        bases: The strongest nodes.
        quiet: Nodes that do less than the threshold alone.
        diffuse: Groups that do more together, of which no small set does half.
    """

    cuts: Cuts
    nodes: tuple[int, ...]
    rule: Rule
    found: list[Set] = field(default_factory=list)
    bases: tuple[int, ...] = ()
    quiet: tuple[int, ...] = ()
    diffuse: int = 0

    def run(self) -> list[Set]:
        """All sets found, those that do most more than their members alone first."""
        single = self.cuts.lost([[n] for n in self.nodes])
        self.single = dict(zip(self.nodes, single.tolist(), strict=True))
        strongest = sorted(self.nodes, key=lambda n: -abs(self.single[n]))
        self.bases = tuple(strongest[: self.rule.top])
        self.quiet = tuple(n for n in self.nodes if abs(self.single[n]) < self.rule.threshold)
        self._one_by_one()
        self._in_groups()
        value = dict(zip(self.found, interaction(self.cuts, self.found).tolist(), strict=True))
        self.found.sort(key=lambda s: (-value[s], sorted(s)))
        return self.found

    def conditional(self) -> Float[Tensor, "base node"]:
        """What each node does with each base ablated; NaN for the base itself."""
        pairs = [[base, node] for base in self.bases for node in self.nodes]
        joint = self.cuts.lost(pairs).view(len(self.bases), len(self.nodes))
        found = joint - torch.tensor([[self.single[b]] for b in self.bases], dtype=torch.float64)
        for row, base in enumerate(self.bases):
            found[row, self.nodes.index(base)] = torch.nan
        return found

    # One by one ----------------------------------------------------------------------------------

    def _one_by_one(self) -> None:
        level = [frozenset([base]) for base in self.bases]
        for _ in range(1, self.rule.largest):
            wider = [(s, n) for s in level for n in self.nodes if n not in s]
            gained = self._gain(wider)
            kept = {
                s | {n} for (s, n), gain in zip(wider, gained, strict=True) if self._counts(gain)
            }
            level = self._keep(sorted(kept - set(self.found), key=sorted))[: self.rule.top]

    def _gain(self, wider: Sequence[tuple[Set, int]]) -> list[float]:
        """What a node does more once a set is gone."""
        joint = self.cuts.lost([s | {n} for s, n in wider]).tolist()
        before = self.cuts.lost([s for s, _ in wider]).tolist()
        ends = zip(joint, before, wider, strict=True)
        return [whole - rest - max(self.single[n], 0.0) for whole, rest, (_, n) in ends]

    def _keep(self, sets: Sequence[Set]) -> list[Set]:
        """Those of some sets whose every member counts, the clearest first; they are found."""
        values = extra(self.cuts, sets).tolist()
        ranked = sorted(zip(values, sets, strict=True), key=lambda item: -item[0])
        kept = [s for value, s in ranked if self._counts(value)]
        self.found += kept
        return kept

    def _counts(self, value: float) -> bool:
        return value > self.rule.threshold

    # In groups -----------------------------------------------------------------------------------

    def _in_groups(self) -> None:
        if self.rule.largest < 2:
            return
        rng = Random(self.rule.seed)
        quiet = rng.sample(self.quiet, len(self.quiet))
        self._among(frozenset(), quiet)
        for base in self.bases:
            self._among(frozenset([base]), [n for n in quiet if n != base])
        for _ in range(self.rule.halves if len(quiet) > 3 else 0):
            half = rng.sample(quiet, len(quiet) // 2)
            for known in self.found:
                if known <= set(half):
                    half.remove(min(known))
            self._among(frozenset(), half)

    def _among(self, base: Set, pool: Sequence[int]) -> None:
        """Every smallest set of a pool that does more with the base gone; breadth first."""
        todo: list[Set] = [frozenset()]
        for without in islice(_growing(todo), _TURNS * self.rule.top):
            left = [n for n in pool if n not in without]
            known = self._known(base, left)
            if known is None:
                known = self._smallest(base, left)
            if known is not None:
                todo += [w for n in sorted(known) if (w := without | {n}) not in todo]

    def _known(self, base: Set, pool: Sequence[int]) -> Set | None:
        inside = frozenset(pool)
        rests = (s - base for s in self.found if base <= s)
        return next((rest for rest in rests if rest <= inside), None)

    def _smallest(self, base: Set, pool: Sequence[int]) -> Set | None:
        """A smallest set of the pool that does half of what the pool does more; it is found."""
        whole = self._excess(base, pool)
        if not self._counts(whole):
            return None
        level = max(self.rule.threshold, whole / 2)
        members: list[int] = []
        left = list(pool)
        while self._excess(base, members) <= level:
            if len(base) + len(members) == self.rule.largest:
                self.diffuse += 1
                return None
            low, high = (
                0,
                len(left),
            )  # with `low` of them the set does too little, with `high` enough
            while high - low > 1:
                middle = (low + high) // 2
                enough = self._excess(base, [*members, *left[:middle]]) > level
                low, high = (low, middle) if enough else (middle, high)
            members.append(left[high - 1])
            left = left[: high - 1]
        if not self._keep([base | frozenset(members)]):
            self.diffuse += 1
            return None
        return frozenset(members)

    def _excess(self, base: Set, group: Sequence[int]) -> float:
        """What a group does more than its members alone, or than it does with the base."""
        joint, gone, without = self.cuts.lost([base | set(group), base, group]).tolist()
        if not base:
            return joint - sum(max(self.single[n], 0.0) for n in group)
        return joint - gone - max(without, 0.0)


def _growing(todo: list[Set]) -> Iterable[Set]:
    """A list, and what is added to it on the way."""
    at = 0
    while at < len(todo):
        yield todo[at]
        at += 1


def random_sets(
    nodes: Sequence[int], size: int, avoid: Sequence[Set], *, draws: int, seed: int
) -> list[Set]:
    """Random sets of so many nodes that hold none of some sets; fewer if there are not so many."""
    rng = Random(seed)
    found: dict[Set, None] = {}
    for _ in range(draws * _PATIENCE):
        if len(found) == draws or size > len(nodes):
            break
        drawn = frozenset(rng.sample(nodes, size))
        if not any(s <= drawn for s in avoid):
            found[drawn] = None
    return list(found)
