"""The metric's gradient at every reader's own stream, summed over passes and kept folded.

Between a reader's stream and where its gradient arrives lie a norm and, for a head's q, k or v, its
columns of a projection. With x^ = centre(stream) / scale,

    dm/d in_v = J^T W_h^T g_h,      J^T y = (centre(gain y) - x^ mean(x^ . gain y)) / scale

Only x^ and the scale change from pass to pass. So of the first term no more is kept than the sum of
g / scale over the passes. The second is a multiple of x^; its factor, one number per head and
position, needs no unfolding either:

    mean(x^ . gain W_h^T g_h) = (W_h gain x^) . g_h / d_model

Passes leave this behind while they go backward; nothing of width `d_model` is kept per head.
"""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from underhood.circuits.graph import Graph
from underhood.circuits.wiring import Wiring
from underhood.core.edit import Edit
from underhood.core.head import NormForm
from underhood.core.ops import call
from underhood.core.site import Site

__all__ = ["Slopes"]


class Slopes:
    """Gradients at all readers, summed over the passes that are run with `watch`.

    Args:
        wiring: The model and its graph.
        still: Whether the scales of norms are constants (the relevance rule "ln").
    """

    def __init__(self, wiring: Wiring, *, still: bool = False) -> None:
        self.wiring, self.still = wiring, still
        self.graph: Graph = wiring.graph
        width = wiring.model.d_model or 0
        self._forms = [
            r.form(wiring.model, width) if r.inside or r.module else None
            for r in self.graph.readers
        ]
        self._ends: dict[Site, list[int]] = {}
        for number, reader in enumerate(self.graph.readers):
            end = Site("module", path=reader.module) if reader.module else reader.tap
            self._ends.setdefault(end, []).append(number)
        self.clear()

    def clear(self) -> None:
        """Forget all passes."""
        self._inputs: dict[Site, Tensor] = {}  # of this pass: what experts and router both read
        self._units: dict[str, tuple[Tensor, Tensor]] = {}  # of this pass: x^ and scale of a norm
        self._sums: dict[int, Tensor] = {}  # g / scale [n head d_head], or [n 1 d_model]
        self._leans: dict[int, list[tuple[Tensor, Tensor]]] = {}  # x^ [n d_model], factors [n head]

    # In a pass -----------------------------------------------------------------------------------

    def watch(self) -> list[Edit]:
        """Edits under which a pass with gradients adds to the sums, when it goes backward."""
        norms = {
            reader.norm: form
            for reader, form in zip(self.graph.readers, self._forms, strict=True)
            if form is not None
        }
        watched = [(Site("module_in", path=path), partial(self._normed, path, form))
                   for path, form in norms.items()]  # fmt: skip
        watched += [(end, partial(self._read, end)) for end in self._ends]
        return [Edit(site, call(function)) for site, function in watched]

    def _normed(self, path: str, form: NormForm, value: Tensor) -> Tensor:
        stream = _flat(value.detach())
        scale, dtype = form.scale(stream), self.wiring.model.dtype
        self._units[path] = (form.centre(stream) / scale).to(dtype), scale.to(dtype)
        return value

    def _read(self, end: Site, value: Tensor) -> Tensor:
        """Take a gradient here; of an input that two parts share, each gets a branch of its own."""
        numbers = self._ends[end]
        reader = self.graph.readers[numbers[0]]
        if reader.choice is not None and reader.beside is None:
            self._inputs[end] = value
        if reader.beside is not None:  # past the experts' branch
            value = self._inputs[reader.beside].reshape(value.shape)
        value = value if reader.module else value.view_as(value)
        if value.requires_grad:
            behind = self._forms[numbers[0]] is not None
            unit = self._units[reader.norm] if behind else None
            value.register_hook(partial(self._arrived, numbers, unit))
        return value

    def _arrived(
        self, numbers: list[int], unit: tuple[Tensor, Tensor] | None, grad: Tensor
    ) -> None:
        whole = _flat(grad)
        whole = whole if unit is None else whole / unit[1]
        for number in numbers:
            columns = self.graph.readers[number].columns
            part = whole[:, torch.tensor(columns)] if columns else whole[:, None]
            if unit is not None and not self.still:
                lean = self._factors(number, unit[0], part)
                self._leans.setdefault(number, []).append((unit[0], lean))
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            self._sums[number] = self._sums.get(number, 0) + wide

    def _factors(
        self, number: int, unit: Float[Tensor, "n d_model"], grad: Float[Tensor, "n head d"]
    ) -> Float[Tensor, "n head"]:
        """How much of x^ there is in the gradients before the norm."""
        reader, form = self.graph.readers[number], self._forms[number]
        assert form is not None
        normed = (unit * form.gain.to(unit.dtype))[:, None]
        if reader.module:
            weight, _ = self.wiring.columns(reader)
            normed = torch.einsum("nm,hmd->nhd", normed[:, 0], weight)
        return (normed * grad).sum(-1) / unit.shape[-1]

    # What all passes left ------------------------------------------------------------------------

    def at(self, number: int, some: Int[Tensor, " n"]) -> Float[Tensor, "head n d_model"] | None:
        """The summed gradient at a reader's stream; None where none arrived.

        Args:
            number: The reader.
            some: Rows and positions, counted through.
        """
        if number not in self._sums:
            return None
        reader, form, grad = self.graph.readers[number], self._forms[number], self._sums[number]
        each = grad[some].to(self.wiring.model.dtype).transpose(0, 1)
        if reader.module:
            weight, _ = self.wiring.columns(reader)
            each = each @ weight.mT
        if form is None:
            return each
        each = form.centre(each * form.gain.to(each.dtype))
        for unit, lean in self._leans.get(number, []):
            each.addcmul_(lean[some].T[..., None], unit[some], value=-1)
        return each


def _flat(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])
