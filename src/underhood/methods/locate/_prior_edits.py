"""Edits that take the prior out of components (attention or MLP output of a layer), one or several.

direction   the prior's direction is projected out: along it, and along nothing else, the
            component moves the candidates' logits as their priors stand
mean        the component's output becomes its mean over the items chosen by
zero        it becomes zero
"""

import random
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from underhood.core.edit import Edit, Plan
from underhood.core.head import Head
from underhood.core.model import Model
from underhood.core.ops import Op, mean, project_out, zero
from underhood.core.site import Site
from underhood.methods.locate._prior_items import Items, Readings
from underhood.methods.locate._trace import random_like, sweep_columns, written

__all__ = ["Effects", "Joint", "effects_of", "joint", "outputs"]


def outputs(model: Model) -> list[Site]:
    """Attention and MLP output of every layer that has one."""
    sites = [
        Site(name, layer, stack=model.main)
        for name in ("attn_out", "mlp_out")
        for layer in range(model.n_layers)
    ]
    return [site for site in sites if model.offers(site)]


def direction(head: Head, items: Items) -> Float[Tensor, " d"]:
    """Where in the stream the candidates' logits move as their log priors stand."""
    prior = items.priors.double().mean(0)
    rows = head.directions(items.candidates.tolist())  # [candidate d]
    along = (prior - prior.mean()).to(rows.device) @ rows
    if head.norm is not None and not isinstance(head.norm, nn.Identity):
        form = head.form()
        along = along * form.gain.double() if form is not None else along
        along = along - along.mean() if form is not None and form.centred else along
    return (along / along.norm()).float()


@dataclass(frozen=True, slots=True)
class Effects:
    """What each component does for the margin: what the margin loses without it.

    Attributes:
        sites: The components.
        ops: The edit of each.
        effect: Logits; negative: the component works for the prior's favourite.
        control: The same for a random change of equal length, the strongest draw.
    """

    sites: list[Site]
    ops: list[Op]
    effect: Float[Tensor, "component batch"]
    control: Float[Tensor, "component batch"]

    def plan(self, chosen: list[int]) -> Plan:
        """The edits of some components together."""
        return Plan([Edit(self.sites[i], self.ops[i], -1) for i in chosen])


def _ops(kind: str, sites: list[Site], along: Tensor, items: Items, seen: Readings) -> list[Op]:
    if kind == "zero":
        return [zero() for _ in sites]
    if kind == "mean":
        return [mean(seen.states[s][items.train].float().mean(0)) for s in sites]
    return [project_out(along.to(seen.states[s].device)) for s in sites]


def _after(kind: str, h: Tensor, op: Op, along: Tensor) -> Tensor:
    """The component's output after its edit."""
    if kind == "zero":
        return torch.zeros_like(h)
    if kind == "mean":
        return op.tensors()["value"].expand_as(h)
    unit = along.to(h.device)
    return h - (h @ unit)[:, None] * unit


def effects_of(
    model: Model,
    head: Head,
    items: Items,
    seen: Readings,
    *,
    kind: str,
    draws: int,
    seed: int,
    batch_size: int | None,
) -> Effects:
    """Each component edited by itself, at the last token, and random changes as long."""
    sites, along = outputs(model), direction(head, items)
    ops = _ops(kind, sites, along, items, seen)
    cells: list[Edit] = [Edit(site, op, -1) for site, op in zip(sites, ops, strict=True)]
    for draw in range(draws):
        for number, (site, op) in enumerate(zip(sites, ops, strict=True)):
            h = seen.states[site].float()
            change = _after(kind, h, op, along) - h
            noise = random_like(change, hash((seed, number)), draw)
            cells.append(written(site, (h + noise).to(seen.states[site].dtype)))
    values, _ = sweep_columns(
        model, items.tokens, cells, lambda x: _read(items, x), batch_size=batch_size
    )
    lost = seen.margin(items)[-1].double() - values[..., 0]
    lost = lost.view(1 + draws, len(sites), -1)
    chance = torch.full_like(lost[0], torch.nan)
    if draws:
        chance = lost[1:].gather(0, lost[1:].abs().argmax(0)[None])[0]
    return Effects(sites, ops, lost[0], chance)


def _read(items: Items, logits: Tensor) -> Float[Tensor, "row 2"]:
    """The margin, and whether the answer is said."""
    times = len(logits) // len(items)
    right = items.answers.to(logits.device).repeat(times)[:, None]
    wrong = items.candidates[items.favoured].to(logits.device).repeat(times)[:, None]
    margin = (logits.gather(1, right) - logits.gather(1, wrong)).double()
    return torch.cat([margin, (logits.argmax(1)[:, None] == right).double()], 1)


@dataclass(frozen=True, slots=True)
class Joint:
    """Several components edited together.

    Attributes:
        chosen: Their numbers, the one that works most for the prior first.
        correct: Whether the answer is said then.
        random: The same for random other components of equal number, draw by draw.
    """

    chosen: list[int]
    correct: Bool[Tensor, " batch"]
    random: Bool[Tensor, "draw batch"]


def joint(
    model: Model, items: Items, effects: Effects, *, parts: int, draws: int, seed: int,
    batch_size: int | None,
) -> Joint:  # fmt: skip
    """Edit the components that work most for the prior, chosen on the training items alone."""
    order = effects.effect[:, items.train].mean(1).argsort().tolist()
    chosen, rest = order[:parts], order[parts:]
    rng = random.Random(seed)
    sets = [rng.sample(rest, parts) for _ in range(draws)] if len(rest) >= parts else []
    cells = [effects.plan(some) for some in (chosen, *sets)]
    values, _ = sweep_columns(
        model, items.tokens, cells, lambda x: _read(items, x), batch_size=batch_size
    )
    said = values[..., 1] > 0.5
    return Joint(chosen, said[0], said[1:])
