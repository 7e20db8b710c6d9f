"""Strength by effect: how strong an edit must be to move the next token by so many nats.

A strength of 2 is much at one site and nothing at another. What the edit does to the distribution
of the next token, KL(unedited || edited), means the same everywhere. It grows with strength, if not
always evenly; the strength found is the first that doubling and then halving come upon.
"""

import math
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Edit, replace_edit
from underhood.core.errors import OutOfRange

if TYPE_CHECKING:
    from underhood.core.model import Inputs, Model

__all__ = ["strength"]

# The first strength tried, and the last.
_LEAST, _MOST = 2.0**-6, 2.0**8
# How near the distance must come, as a share of what was asked, and after how many halvings it is
# near enough all the same: float32 knows no finer strength.
_NEAR, _HALVINGS = 0.01, 24


def strength(model: "Model", edit: Edit, inputs: "Inputs", kl: float) -> float:
    """The strength at which an edit moves the next token's distribution by so many nats.

    Args:
        model: The model.
        edit: What to do; its own strength is not read.
        inputs: Prompts; the distance is the mean over them, of the token after each.
        kl: KL(unedited || edited) in nats. Below zero: as far, with a strength below zero.

    Raises:
        OutOfRange: No strength up to 256 does so much.

    Cost: one forward, and one for each of some 15 strengths.
    """
    if not math.isfinite(kl):
        raise OutOfRange("a budget is a number of nats", given=kl, do="use e.g. 0.5")
    if kl == 0:
        return 0.0
    base, sign = _next(model, inputs, ()), math.copysign(1.0, kl)

    def distance(size: float) -> float:
        edited = _next(model, inputs, (replace_edit(edit, strength=sign * size),))
        return float((base.exp() * (base - edited)).nan_to_num().sum(-1).mean())

    low, high = 0.0, _LEAST
    while (reached := distance(high)) < abs(kl):
        if high >= _MOST:
            raise OutOfRange(
                "no strength moves the next token so far",
                given=f"{kl:g} nats, {edit}",
                why=f"at strength {sign * high:g} it is {reached:.3g} nats",
                do="ask for less, or edit another site or position",
            )
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        if abs(reached - abs(kl)) <= _NEAR * abs(kl):
            break
        middle = (low + high) / 2
        if (there := distance(middle)) < abs(kl):
            low = middle
        else:
            high, reached = middle, there
    return sign * high


def _next(
    model: "Model", inputs: "Inputs", edits: tuple[Edit, ...]
) -> Float[Tensor, "batch vocab"]:
    """Log-probabilities of the token after each prompt."""
    return model.run(inputs, edits=edits).last_logits.float().log_softmax(-1)
