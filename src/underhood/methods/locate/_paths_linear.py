"""The straight line from a sender to a receiver's input: the norm between them held still.

    input of the receiver += (what the sender writes to the stream, changed) / scale * gain

with the norm's denominator of the base run (closed direct path: one matrix product). Into the
logits this is direct attribution, and parts add up. The exact direct path has the norm follow the
change, also to first order; the difference of the two is the norm's share.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from underhood.core.errors import NotOffered
from underhood.core.head import NormForm, norm_form
from underhood.core.site import Site
from underhood.core.taps.modules import weight_in_out

if TYPE_CHECKING:
    from underhood.core.model import Model
    from underhood.core.run import Run

__all__ = ["Line"]

# A receiver's norm, and the site of what that norm reads.
_NORMS = {"mlp_in": ("ln2", "resid_mid"), "logits": ("ln_final", "resid_post")}
_HEADS = ("ln1", "resid_pre")


class Line:
    """Linear arrivals at the norms in front of some receivers.

    Args:
        model: The model.
        receivers: Their sites, and when they are computed.
        senders: Sites of the senders, without units.

    Raises:
        NotOffered: A receiver has no norm in front of it.
    """

    def __init__(
        self, model: "Model", receivers: Sequence[tuple[Site, int]], senders: Sequence[Site]
    ) -> None:
        self.model = model
        self.ends: dict[Site, tuple[Site, int]] = {}
        for site, order in receivers:
            norm, read = _NORMS.get(site.name, _HEADS)
            layer = None if site.name == "logits" else site.layer
            place = Site(norm, layer, stack=model.main)
            model.resolve(place)
            last = model.n_layers - 1 if layer is None else layer
            self.ends[place] = (Site(read, last, stack=model.main), order)
        # What attention adds must be the sum of what its heads write.
        self.whole = [Site("attn_out", s.layer, stack=s.stack) for s in senders if s.name == "z"]
        self.sites = [*self.ends, *(read for read, _ in self.ends.values()), *self.whole]
        self.base: Run | None = None
        self.scales: dict[Site, tuple[NormForm, Tensor]] = {}

    def read(self, base: "Run", other: "Run") -> None:
        """Take the norms' denominators from the base run.

        Raises:
            NotOffered: Another norm stands behind the heads (Gemma, OLMo 2), or a norm that is not
                linear with its scale held.
        """
        self.base = base
        for place, (stream, _) in self.ends.items():
            tower = self.model.anatomy.stacks[place.stack]
            points = tower.points if place.layer is None else tower.blocks[place.layer].points
            value = base.aligned(stream)
            norm = self.model.module.get_submodule(points[place.name].path)
            form = norm_form(norm, value.shape[-1])
            self.scales[place] = (form, form.scale(value))
        for site in self.whole:
            heads = Site("z", site.layer, stack=site.stack)
            delta = other.aligned(heads).double() - base.aligned(heads).double()
            parts = self._writes(heads, delta)
            seen = other.aligned(site).double() - base.aligned(site).double()
            if float((parts - seen).abs().max()) > 1e-2 * max(float(seen.abs().max()), 1e-6):
                raise NotOffered(
                    "what the heads write does not arrive in a straight line here",
                    given=str(site),
                    why="a norm stands between the heads and the stream",
                    do="arrival='exact'",
                )

    def _writes(self, site: Site, delta: Tensor) -> Tensor:
        """What a change of `z` (`[rows, pos, head, d_head]`, or of one head) adds to the stream."""
        block = self.model.anatomy.stacks[site.stack].blocks[site.layer or 0]
        attention = block.attention
        assert attention is not None and attention.o_proj is not None and attention.heads
        module = self.model.module.get_submodule(attention.o_proj)
        weight = weight_in_out(module).detach().double().unflatten(0, (attention.heads, -1))
        scale = block.points["attn_out"].scale if "attn_out" in block.points else 1.0
        if site.unit is not None:
            return torch.einsum("bpd,dm->bpm", delta, weight[site.unit]) * scale
        return torch.einsum("bphd,hdm->bpm", delta, weight) * scale

    def written(self, sender: Site, order: int, delta: Tensor) -> dict[Site, Tensor]:
        """Per norm that the sender reaches, its output with the sender's change added.

        Args:
            sender: Its site; for a head, `delta` holds all heads of the layer.
            order: When it is computed.
            delta: Change of the sender's activation, `[rows, pos, ...]`.
        """
        assert self.base is not None
        if sender.name == "z":
            part = delta if sender.unit is None else delta[:, :, sender.unit]
            delta = self._writes(sender, part)
        found = {}
        for place, (_, end) in self.ends.items():
            if order < end:
                form, scale = self.scales[place]
                before = self.base.aligned(place)
                moved = before.double() + form.linear(delta, scale)
                found[place] = moved.detach().to(before.dtype)
        return found
