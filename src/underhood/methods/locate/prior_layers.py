"""Prior layers: which layers drag the answer to what is likely anyway, and a remedy for just those.

A model may know the answer half-way and still say something commoner. Three readings of that:

    correlation(l)   over items, Spearman of the lens log-probability of the wrong token that is
                     said and its log prior
    carried(l)       how much block l adds to the slope of the other candidates' lens logits over
                     their log priors (logits per nat)
    margin(l)        lens logit of the right answer less that of the prior's favourite; an item is
                     *overwritten* if it is positive somewhere and negative at the end

and three remedies, each measured on answers that nothing was chosen by: the prior taken out of the
components that work most for it; those layers, and no others, tuned at low rank on a copy; an
instruction in front of the prompt.

What this does not do: tell a prior from knowledge. If the common answer is right, it looks alike.
"""

import random
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from underhood.core.errors import OutOfRange
from underhood.core.model import Model
from underhood.core.provenance import describe
from underhood.core.tokens import Tokens
from underhood.methods.locate._options import at_least
from underhood.methods.locate._prior_edits import Effects, Joint, effects_of, joint, outputs
from underhood.methods.locate._prior_items import (
    Items,
    Readings,
    items_of,
    permuted,
    readings_of,
    spearman,
)
from underhood.methods.locate._prior_tuning import Tuned, tune_layers, tune_tokens
from underhood.methods.locate._prior_view import view_of
from underhood.methods.locate._trace import last_states
from underhood.methods.read._unembedding import head_of
from underhood.methods.registry import method
from underhood.view import Result

if TYPE_CHECKING:
    import xarray

__all__ = ["Tuned", "prior_layers", "tune_layers"]

QUARTERS = ("rare", "uncommon", "usual", "common")


@method
def prior_layers(
    model: Model,
    prompts: list[str],
    *,
    answers: tuple[str, ...] = (),
    stems: tuple[str, ...] = (),
    corpus: tuple[str, ...] = (),
    layers: int = 1,
    parts: int = 1,
    edit: Literal["direction", "mean", "zero"] = "direction",
    instruction: str = "",
    tune: int = 0,
    rank: int = 1,
    lr: float = 3e-3,
    draws: int = 5,
    seed: int = 0,
    batch_size: int | None = None,
) -> Result:
    """The layers that carry the prior, and what editing or tuning just those gains.

    Args:
        prompts: Prompts with one right answer each.
        answers: Right answer of each prompt, text of one token.
        stems: Task-free beginnings; the prior is what the model says after them.
        corpus: Texts; the prior is how often they hold each token. Without stems and corpus the
            prior is the model's mean probability after the other prompts.
        layers: Layers to tune, those that carry most.
        parts: Components to edit, those that work most for the prior.
        edit: What is done to them: the prior's "direction" projected out, their "mean" written, or
            "zero". A constant bias survives "mean".
        instruction: Text put before every prompt ("Do not go by what is common. "). Empty: none.
        tune: Steps of low-rank tuning (80 do for the built-in model). 0: none.
        rank: Rank of the tuning; more forgets more of the answers that it does not see.
        lr: Its learning rate.
        draws: Random changes per component, and random sets of components.
        seed: Of these, of the tuning, and of which answers are held out.
        batch_size: Rows of one pass; the numbers do not depend on it.

    Returns:
        Layer -1 is the stream before the first block. Over `layer`: `correlation` (items that are
        wrong; NaN for fewer than 4) and `correlation_all` (all items; the likeliest wrong token),
        `correlation_control` (95th percentile of its size, priors permuted over items), `slope`,
        `carried` (logits per nat), `carried_control` (95th percentile of its size, priors permuted
        over answers). Over `batch`, `layer`: `margin` (logits). Over `batch`: `overwritten`,
        `loss_layer` (where the margin falls most), `log_prior` (nats), `quartile`, `correct`,
        `train`. Over `site` ("attn_out", "mlp_out"), `layer`: `effect` (margin lost without the
        component: negative works for the prior), `effect_control` (random change of equal length,
        strongest draw), `edited` (chosen). Over `part` (quarters by the answer's prior, test items
        only): `accuracy`, `accuracy_edited`, `accuracy_random` (random components, mean of draws),
        and where asked `accuracy_instructed`, `accuracy_tuned`, `accuracy_tuned_random` (other
        layers), `rows`. Scalars `error_prior` and the same names after it: Spearman of being wrong
        and the answer's log prior, test items. Over `layer`: `tuned` and `tuned_size` (length of
        the difference by that of the weights).

    Raises:
        UsageError: Not one answer per prompt, or fewer than four different ones.
        NotOffered: No unembedding, or layers that cannot be tuned.

    Cost: 1 forward per item to read (2 without stems and corpus); one row per item for each of 2 L
        components, times 1 + draws, and 1 + draws for the joint edit; with tuning 2 tune forwards
        and backwards of 32 rows and 4 copies of the weights, one at a time.

    Source: adapted from "The Influence of the Prior" (2025: known answers lost to likely ones; a
        prompt or the tuning of a few layers frees them). The paper's layer statistic was not found:
        correlation, margin and overwriting follow its description; `carried`, the projection, the
        held-out answers and all controls are ours. Low rank after Hu et al. 2021 (LoRA).

    Misleads: after the layer that brings the prior, all later layers correlate with it: `carried`
        tells which one did. The correlation sees one wrong token per item and is weak for few
        items: of a prior planted in layer 1 it showed nothing beyond chance in 29 items. Few
        different answers make a coarse prior: see the controls. Tuning on the task can teach the
        task, and forget answers that it does not see: compare `accuracy_tuned_random`. The default
        prior holds the other items' right answers.

    Example:
        >>> import underhood as uh
        >>> words = "one two three four five six seven eight nine ten".split()
        >>> asked = [" ".join(words[i : i + 3]) for i in range(7)]
        >>> found = prior_layers(uh.load(), asked, answers=tuple(words[3:]), draws=1)
        >>> float(found["overwritten"].mean())
        0.0
    """
    at_least(1, layers=layers, parts=parts, rank=rank, batch_size=batch_size, draws=draws)
    head = head_of(model)
    _check_counts(model, layers=layers, parts=parts, tune=tune)
    items = items_of(
        model, prompts, answers, stems=stems, corpus=corpus, seed=seed, batch_size=batch_size
    )
    seen = readings_of(model, head, items, outputs(model), batch_size=batch_size)
    effects = effects_of(
        model, head, items, seen, kind=edit, draws=draws, seed=seed, batch_size=batch_size
    )
    changed = joint(
        model, items, effects, parts=parts, draws=draws, seed=seed, batch_size=batch_size
    )
    said: dict[str, Float[Tensor, " batch"]] = {
        "": seen.correct.double(), "_edited": changed.correct.double(),
    }  # fmt: skip
    if len(changed.random):
        said["_random"] = changed.random.double().mean(0)
    if instruction:
        told = model.tokens([instruction + prompt for prompt in prompts])
        said["_instructed"] = _right(model, told, items, batch_size)
    tuned: dict[str, Tuned] = {}
    for name, some in _layers(items, seen, layers, seed).items() if tune else ():
        tuned[name] = tune_tokens(
            model, items.tokens.rows(items.train.nonzero()[:, 0].tolist()),
            items.answers[items.train], some, rank=rank, steps=tune, lr=lr, seed=seed,
        )  # fmt: skip
        said[name] = _right(tuned[name].model(model), items.tokens, items, batch_size)
    data = _dataset(model, items, seen, effects, changed, said, seed)
    if tuned:
        data = _with_sizes(data, tuned["_tuned"].sizes(model))
    origin = "corpus" if corpus else "stems" if stems else "the other prompts"
    return Result(
        name="prior_layers",
        data=data,
        view=view_of(data, origin),
        provenance=describe(
            model, rows=len(items), prior=origin, layers=layers, parts=parts, edit=edit, tune=tune,
            rank=rank, lr=lr, draws=draws, seed=seed, instruction=instruction,
            losses=list(tuned["_tuned"].losses) if tuned else [],
        ),
    )  # fmt: skip


def _check_counts(model: Model, *, layers: int, parts: int, tune: int) -> None:
    """Refuse more layers or components than there are."""
    for name, number, most in (
        ("layers", layers, model.n_layers), ("parts", parts, len(outputs(model))),
    ):  # fmt: skip
        if number > most:
            raise OutOfRange(f"there are not that many {name}", given=number, do=f"1 to {most}")
    if tune < 0:
        raise OutOfRange("tuning takes a number of steps", given=tune, do="tune=80, or 0 for none")


def _right(
    model: Model, tokens: Tokens, items: Items, batch_size: int | None
) -> Float[Tensor, " batch"]:
    """1 where the top token is the answer."""
    logits = last_states(model, tokens, [], batch_size=batch_size)[1]
    return (logits.argmax(-1).cpu() == items.answers).double()


def _layers(items: Items, seen: Readings, layers: int, seed: int) -> dict[str, list[int]]:
    """Layers to tune: those that carry most on the training items, and random others if enough."""
    carried = seen.slope(items).diff(dim=0)[:, items.train].mean(1)
    order = carried.argsort(descending=True).tolist()
    found, rest = {"_tuned": order[:layers]}, order[layers:]
    if len(rest) >= layers:
        found["_tuned_random"] = random.Random(seed).sample(rest, layers)
    return found


# Numbers -----------------------------------------------------------------------------------------


def _correlations(items: Items, seen: Readings, seed: int) -> dict[str, Tensor]:
    """Rank correlation of the rivals' lens log-probability and log prior, by layer."""
    prior, wrong = items.of(seen.rivals), ~seen.correct
    found = {
        "correlation": spearman(seen.rival[:, wrong], prior[wrong]),
        "correlation_all": spearman(seen.rival, prior),
    }
    chance = [spearman(seen.rival, prior[order]) for order in permuted(len(items), seed)]
    found["correlation_control"] = torch.stack(chance).abs().quantile(0.95, dim=0)
    return found


def _carried(items: Items, seen: Readings, seed: int) -> dict[str, Tensor]:
    """The slope over log priors, what each block adds to it, and what permuted priors give."""
    slope = seen.slope(items).mean(1)
    blank = torch.full((1,), torch.nan, dtype=torch.float64)
    steps = [
        seen.slope(items, items.priors[:, order]).mean(1).diff()
        for order in permuted(len(items.candidates), seed)
    ]
    chance = torch.stack(steps).abs().quantile(0.95, dim=0)
    return {
        "slope": slope, "carried": torch.cat([blank, slope.diff()]),
        "carried_control": torch.cat([blank, chance]),
    }  # fmt: skip


def _dataset(
    model: Model,
    items: Items,
    seen: Readings,
    effects: Effects,
    changed: Joint,
    said: dict[str, Tensor],
    seed: int,
) -> "xarray.Dataset":
    import numpy as np
    import xarray

    margin = seen.margin(items)
    lost = (margin.amax(0) > 0) & (margin[-1] < 0)
    columns = _correlations(items, seen, seed) | _carried(items, seen, seed)
    variables: dict[str, Any] = {name: ("layer", v.numpy()) for name, v in columns.items()}
    variables |= {
        "margin": (("batch", "layer"), margin.T.numpy()),
        "overwritten": ("batch", lost.numpy()),
        "loss_layer": ("batch", margin.diff(dim=0).argmin(0).numpy()),
        "log_prior": ("batch", items.own.numpy()),
        "quartile": ("batch", items.quartile.numpy()),
        "correct": ("batch", seen.correct.numpy()),
        "train": ("batch", items.train.numpy()),
    }
    names, layers = ["attn_out", "mlp_out"], list(range(-1, model.n_layers))
    tables = {n: np.full((2, len(layers)), np.nan) for n in ("effect", "effect_control")}
    edited = np.zeros((2, len(layers)), dtype=bool)
    for number, site in enumerate(effects.sites):
        place = names.index(site.name), layers.index(site.layer or 0)
        tables["effect"][place] = effects.effect[number].mean()
        tables["effect_control"][place] = effects.control[number].mean()
        edited[place] = number in changed.chosen
    variables |= {name: (("site", "layer"), table) for name, table in tables.items()}
    variables["edited"] = (("site", "layer"), edited)
    test = ~items.train
    for name, right in said.items():
        variables[f"accuracy{name}"] = ("part", _by_quarter(right, items, test))
        variables[f"error_prior{name}"] = float(spearman(1 - right[test], items.own[test]))
    variables["rows"] = ("part", [int((test & (items.quartile == q)).sum()) for q in range(4)])
    coords = {"layer": layers, "site": names, "part": list(QUARTERS)}
    return xarray.Dataset(variables, coords=coords)


def _with_sizes(data: "xarray.Dataset", sizes: dict[int, float]) -> "xarray.Dataset":
    """The numbers with what tuning changed, by layer."""
    column = [sizes.get(int(layer), 0.0) for layer in data["layer"].values]
    return data.assign(tuned=("layer", [s > 0 for s in column]), tuned_size=("layer", column))


def _by_quarter(
    right: Float[Tensor, " batch"], items: Items, test: Bool[Tensor, " batch"]
) -> list[float]:
    found = [right[test & (items.quartile == quarter)] for quarter in range(4)]
    return [float(some.mean()) if len(some) else float("nan") for some in found]
