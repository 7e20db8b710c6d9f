"""A run: what one pass left behind."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Fired
from underhood.core.errors import SiteNotFound, UsageError, nearest
from underhood.core.shown import Shown
from underhood.core.site import Site
from underhood.core.taps import Read
from underhood.core.tokenizer import Text
from underhood.core.tokens import Tokens

__all__ = ["Generation", "Run"]


@dataclass(slots=True)
class Run(Shown):
    """Tokens, logits and the recorded activations of one pass.

    Attributes:
        tokens: The batch, when the input was text or ids.
        output: What the model returned.
        recorded: Recordings by what was asked for.
        fired: For each edit, where it acted and how much it moved.
        provenance: What made this run.
        text: What turns token ids into words, for showing the run.

    Index it by site: `run["resid_post", 5]`, `run["z.9.6"]`, `run["resid_post"]` (all layers, a
    leading `layer` axis). Axes: `run.axes("z.9")`.
    """

    tokens: Tokens | None
    output: Any
    recorded: dict[Read, Tensor] = field(default_factory=dict)
    fired: list[Fired] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    text: Text | None = None

    @property
    def logits(self) -> Float[Tensor, "batch *pos vocab"]:
        """The model's logits.

        Raises:
            UsageError: The model's output has none.
        """
        found = getattr(self.output, "logits", None)
        if not isinstance(found, Tensor):
            raise UsageError(
                "this model's output has no logits",
                given=type(self.output).__name__,
                do="use run.output",
            )
        return found

    @property
    def last_logits(self) -> Float[Tensor, "batch vocab"]:
        """Logits at each row's last real token."""
        if self.tokens is None:
            return self.logits if self.logits.ndim == 2 else self.logits[:, -1]
        ends = torch.tensor(
            [s + n - 1 for s, n in zip(self.tokens.starts, self.tokens.lengths, strict=True)]
        )
        return self.logits[torch.arange(len(ends)), ends.to(self.logits.device)]

    @property
    def sites(self) -> list[Site]:
        """What was recorded."""
        return [r.site for r in self.recorded]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.recorded)

    def __contains__(self, key: object) -> bool:
        try:
            self[key]  # type: ignore[index]
        except (SiteNotFound, UsageError):
            return False
        return True

    def __getitem__(self, key: "str | Site | tuple[Any, ...]") -> Tensor:
        site = self._site(key)
        if not site.spreads:
            return self._one(site)
        layers = sorted(
            r.site.layer for r in self.recorded
            if r.site.layer is not None and r.site.at(0).whole == site.at(0).whole
        )  # fmt: skip
        if not layers:
            raise self._missing(site)
        parts = [self._one(site.at(layer)) for layer in dict.fromkeys(layers)]
        if len({p.shape for p in parts}) > 1:
            raise UsageError(
                f"the layers of {site} have different shapes",
                given=", ".join(sorted({str(tuple(p.shape)) for p in parts})),
                do="take them one by one",
            )
        return torch.stack(parts)

    def _site(self, key: "str | Site | tuple[Any, ...]") -> Site:
        if not isinstance(key, tuple):
            return Site.parse(key)
        name, *numbers = key
        return Site.parse(".".join([str(name), *map(str, numbers)]))

    def _one(self, site: Site) -> Tensor:
        for read, value in self.recorded.items():
            if read.site == site:
                return value
        for read, value in self.recorded.items():
            if (
                read.site == site.whole
                and site.kind.unit in site.kind.axes
                and site.unit is not None
            ):
                return value.select(site.kind.axes.index(site.kind.unit), site.unit)
        raise self._missing(site)

    def _missing(self, site: Site) -> SiteNotFound:
        names = [str(s) for s in self.sites]
        return SiteNotFound(
            f"{site} was not recorded in this run",
            given=str(site),
            do=f"ask for it: run(..., record=[{str(site)!r}])"
            + (f"; recorded: {nearest(str(site), names)}" if names else ""),
        )

    def axes(self, key: "str | Site | tuple[Any, ...]") -> tuple[str, ...]:
        """Names of the axes of `run[key]`."""
        site = self._site(key)
        axes = site.kind.axes
        if site.unit is not None:
            # One expert of several: its share of every slot is summed.
            gone = site.kind.unit if site.kind.unit in axes else "slot"
            axes = tuple(a for a in axes if a != gone)
        if site.path:
            axes = ("batch", *(f"dim_{i}" for i in range(1, self[site].ndim)))
        return ("layer", *axes) if site.spreads else axes

    def aligned(self, site: "str | Site") -> Tensor:
        """A recording in each row's own positions: `[rows, pos, ...]`, padding taken out.

        Rows that are shorter than the longest end in zeros. Patterns keep `[rows, head, query,
        key]`, shifted along both.
        """
        place = Site.parse(site)
        value = self._one(place)
        read = next(r for r in self.recorded if r.site in (place, place.whole))
        if not read.where.everything:
            raise UsageError(
                f"{place} was recorded at some positions only",
                given=repr(read.where),
                do="record it without `at`",
            )
        if self.tokens is None or not any(self.tokens.starts):
            return value
        axis = place.kind.pos_axis or 1
        if place.unit is not None and place.kind.axes.index(place.kind.unit or "") < axis:
            axis -= 1
        rows = []
        for row, start in zip(value, self.tokens.starts, strict=True):
            shifted = row.roll(-start, axis - 1)
            rows.append(shifted.roll(-start, axis) if "key" in place.kind.axes else shifted)
        return torch.stack(rows)

    def __repr__(self) -> str:
        names = sorted({s.name for s in self.sites})
        held = f"{len(self)} recordings ({', '.join(names)})" if names else "nothing recorded"
        rows = f"{len(self.tokens)} prompts" if self.tokens is not None else "one input"
        return f"Run({rows}, {held}, {len(self.fired)} edits)"


@dataclass(slots=True)
class Generation(Shown):
    """Generated text.

    Attributes:
        text: What was written after each prompt.
        ids: Generated token ids per row, without the prompt (padded with the pad id).
        strings: Generated tokens as text, row by row.
        run: Recordings over prompt and generation, and the edits' report.
    """

    text: list[str]
    ids: Tensor
    strings: Sequence[tuple[str, ...]]
    run: Run

    @property
    def fired(self) -> list[Fired]:
        """For each edit, where it acted and how much it moved."""
        return self.run.fired

    def __str__(self) -> str:
        return "\n".join(self.text)
