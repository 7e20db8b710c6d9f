"""Both runs of a commitment at their last token, and every curve over layers that is made of them.

All edits are at the last token of one run and write what the other run (or a random change as long)
has there; all of them go through `core.sweep`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from underhood.core.edit import Edit, Plan
from underhood.core.errors import PairError
from underhood.core.head import Head
from underhood.core.model import Model
from underhood.core.site import Site
from underhood.core.tokens import Tokens
from underhood.data import EncodedPairs, logit_diff
from underhood.methods.locate._trace import (
    last_states,
    random_like,
    streams,
    sweep_columns,
    written,
)
from underhood.methods.locate._trace_graph import Concepts, supports

__all__ = ["RUNS", "Ends", "alignment_of", "curves_of", "ends_of", "lenses_of", "pathways_of"]

RUNS = ("factual", "hallucinating")
_CHANCE = 32  # random tokens that stand in for the right and the wrong one


@dataclass(frozen=True, slots=True)
class Ends:
    """Both runs at the last token.

    Attributes:
        encoded: The pairs.
        tokens: The prompts of F and of X.
        states: Per run, every site's vector.
        margin: Per run, right minus wrong in the output.
        vocabulary: Width of the logits.
    """

    encoded: EncodedPairs
    tokens: tuple[Tokens, Tokens]
    states: tuple[dict[Site, Tensor], dict[Site, Tensor]]
    margin: tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]
    vocabulary: int

    @property
    def usable(self) -> Bool[Tensor, " batch"]:
        """Rows where F says the right answer rather than the wrong one, and X the reverse."""
        return (self.margin[0] > 0) & (self.margin[1] < 0)

    def read(self, logits: Tensor) -> Float[Tensor, "row 2"]:
        """Margin, and whether the top token is a wrong answer."""
        times = len(logits) // len(self.encoded)
        answers, wrong = (
            t.to(logits.device).repeat(times, 1) for t in (self.encoded.answers, self.encoded.wrong)
        )
        margin = logit_diff(logits, answers, wrong).double()
        says = (logits.argmax(1)[:, None] == wrong).any(1)
        return torch.stack([margin, says.double()], 1)


def ends_of(model: Model, encoded: EncodedPairs, batch_size: int | None) -> Ends:
    sites = [*streams(model), *_parts(model, "attn_out"), *_parts(model, "mlp_out")]
    sides = (encoded.clean, encoded.contrast)
    runs = [last_states(model, side, sites, batch_size=batch_size) for side in sides]
    answers, wrong = encoded.answers, encoded.wrong
    margins = [logit_diff(logits, answers, wrong).double().cpu() for _, logits in runs]
    states, vocabulary = (runs[0][0], runs[1][0]), runs[0][1].shape[1]
    ends = Ends(encoded, sides, states, (margins[0], margins[1]), vocabulary)
    if not bool(ends.usable.any()):
        raise PairError(
            "no row has a run that says the right answer and one that says the wrong one",
            given="margins "
            + ", ".join(f"{a:+.2f} and {b:+.2f}" for a, b in zip(*margins, strict=True))[:200],
            why="where the model commits itself can only be asked where the two runs differ",
            do="give prompts after which it is right, and contrasts that lead it astray",
        )
    return ends


def _parts(model: Model, name: str) -> list[Site]:
    sites = [Site(name, layer, stack=model.main) for layer in range(model.n_layers)]
    return [site for site in sites if model.offers(site)]


def curves_of(
    model: Model, ends: Ends, draws: int, seed: int, batch_size: int | None
) -> dict[str, Float[Tensor, "layer batch"]]:
    """X's stream in F, random changes and other rows' streams there, and the rest frozen."""
    factual, other = ends.states
    rows = len(ends.encoded)
    sets = [[other[site] for site in streams(model)]]
    for draw in range(draws):
        noise = [
            random_like(other[s].float() - factual[s].float(), hash((seed, i)), draw)
            for i, s in enumerate(streams(model))
        ]
        sets.append([(factual[s].float() + n).to(factual[s].dtype)
                     for s, n in zip(streams(model), noise, strict=True)])  # fmt: skip
    if rows > 1:
        sets.append([other[site].roll(1, 0) for site in streams(model)])
    cells = [
        written(site, value)
        for values in sets
        for site, value in zip(streams(model), values, strict=True)
    ]
    read, _ = sweep_columns(model, ends.tokens[0], cells, ends.read, batch_size=batch_size)
    read = read.view(len(sets), -1, rows, 2)
    chance = read[1 : 1 + draws, ..., 0]
    found = {
        "inserted": read[0, ..., 0], "says_wrong": read[0, ..., 1],
        "inserted_control": chance.amin(0),
        "shuffled": read[-1, ..., 0] if rows > 1 else torch.full_like(read[0, ..., 0], torch.nan),
    }  # fmt: skip
    return found | {"frozen": _frozen(model, ends, batch_size)}


def _frozen(model: Model, ends: Ends, batch_size: int | None) -> Float[Tensor, "layer batch"]:
    """The margin of X when every layer after the given one writes what it writes in F."""
    outs = [*_parts(model, "attn_out"), *_parts(model, "mlp_out")]
    cells = []
    for layer in range(-1, model.n_layers - 1):
        later: list[Edit] = [written(s, ends.states[0][s]) for s in outs if (s.layer or 0) > layer]
        cells.append(Plan(later))
    read, _ = sweep_columns(model, ends.tokens[1], cells, ends.read, batch_size=batch_size)
    return torch.cat([read[..., 0], ends.margin[1][None]])


def lenses_of(model: Model, ends: Ends, head: Head) -> dict[str, Float[Tensor, "layer batch"]]:
    found = {}
    for name, states in zip(RUNS, ends.states, strict=True):
        layers = [ends.read(head.logits(states[s]).float())[:, 0].cpu() for s in streams(model)]
        found[f"lens_{name}"] = torch.stack(layers)
    return found


def pathways_of(
    model: Model, ends: Ends, draws: int, seed: int, batch_size: int | None
) -> dict[str, Float[Tensor, "layer batch"]]:
    """What F loses when X's attention or MLP output stands in one layer; NaN before the first."""
    factual, other = ends.states
    names = {"contextual": _parts(model, "attn_out"), "associative": _parts(model, "mlp_out")}
    sites = [site for part in names.values() for site in part]
    cells = [written(site, other[site]) for site in sites]
    for draw in range(draws):
        for number, site in enumerate(sites):
            change = other[site].float() - factual[site].float()
            noise = random_like(change, hash((seed, number, 1)), draw)
            cells.append(written(site, (factual[site].float() + noise).to(factual[site].dtype)))
    read, _ = sweep_columns(model, ends.tokens[0], cells, ends.read, batch_size=batch_size)
    lost = (ends.margin[0] - read[..., 0]).view(1 + draws, len(sites), -1)
    chance = lost[1:].gather(0, lost[1:].abs().argmax(0)[None])[0]
    found = {}
    for name, part in names.items():
        for label, values in ((name, lost[0]), (f"{name}_control", chance)):
            table = torch.full((model.n_layers + 1, values.shape[1]), torch.nan).double()
            for site in part:
                table[(site.layer or 0) + 1] = values[sites.index(site)]
            found[label] = table
    return found


def alignment_of(
    model: Model, ends: Ends, run: int, found: Concepts, seed: int, batch_size: int | None
) -> dict[str, Tensor]:
    """Support of each concept for the right and the wrong side, and the balance of a layer."""
    sides = (ends.encoded.answers.cpu(), ends.encoded.wrong.cpu())
    make = torch.Generator().manual_seed(seed)
    others = torch.randint(ends.vocabulary, (len(ends.encoded), _CHANCE), generator=make)
    columns = torch.cat([*(side.clamp(min=0) for side in sides), others], 1)
    weight = supports(model, ends.tokens[run], found, columns, batch_size=batch_size)
    cut = sides[0].shape[1], sum(side.shape[1] for side in sides)
    right = (weight[..., : cut[0]] * (sides[0] >= 0)).sum(-1)
    wrong = (weight[..., cut[0] : cut[1]] * (sides[1] >= 0)).sum(-1)
    a, b = weight[..., cut[1] :: 2], weight[..., cut[1] + 1 :: 2]
    chance = _balance(a, b).abs().quantile(0.95, dim=-1)
    return {
        "to_answer": right, "to_wrong": wrong, "alignment": _balance(right, wrong),
        "alignment_control": chance,
    }  # fmt: skip


def _balance(
    right: Float[Tensor, "layer rank *rest"], wrong: Float[Tensor, "layer rank *rest"]
) -> Float[Tensor, "layer *rest"]:  # noqa: F821
    """Support for the right side less that for the wrong one, by the sum of their sizes."""
    size = (right.abs() + wrong.abs()).sum(1)
    return (right - wrong).sum(1) / size.clamp(min=1e-12)
