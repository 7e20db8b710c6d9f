"""Masks: parts that can be cut, found by gradient descent on all of them at once.

Every part gets a number between 0 and 1; a loss of the masked model and a price for what is kept
are minimised together. Scores of single parts do not know what happens when the others are cut too;
a trained mask does, and so keeps the same with far fewer parts. What is masked:

    edge     between two parts (Edge Pruning, subnetwork probing, UGS)
    node     heads and MLPs, for all their readers at once
    head     heads' outputs at one position, exchanged with the contrast's (DCM)
    weight   the weights of attention and MLPs (bigram subnetworks)
"""

from typing import Any, Literal

from underhood.circuits.faithfulness import Judge
from underhood.circuits.graph import Graph
from underhood.circuits.masks import Recipe, circuit_masks, train_masks
from underhood.circuits.score import edge_scores
from underhood.circuits.wiring import Wiring
from underhood.core.errors import UsageError
from underhood.core.model import Model
from underhood.core.provenance import describe
from underhood.data import EncodedPairs, Metric, Pairs, log_prob, metric_named
from underhood.methods.locate._mask_circuits import compared
from underhood.methods.locate._mask_head_views import carried, head_data, head_view
from underhood.methods.locate._mask_heads import Carrying
from underhood.methods.locate._mask_views import circuit_data, circuit_view
from underhood.methods.locate._mask_weight_views import judged, weight_data, weight_view
from underhood.methods.locate._mask_weights import Goal, Weights, bigrams_counted, bigrams_of
from underhood.methods.locate._options import Cut, at_least, below_one
from underhood.methods.locate.circuit import split_prompts
from underhood.methods.registry import method
from underhood.view import Result

__all__ = ["masks"]

Level = Literal["edge", "node", "head", "weight"]
Kind = Literal["hard-concrete", "sigmoid", "clamped", "uniform"]
Loss = Literal["kl", "metric", "answer", "bigram"]

_KIND: dict[str, Kind] = {
    "edge": "hard-concrete", "node": "hard-concrete", "head": "clamped", "weight": "sigmoid",
}  # fmt: skip
_LOSS: dict[str, Loss] = {"edge": "kl", "node": "kl", "head": "answer", "weight": "bigram"}
_LAM = {"edge": 3.0, "node": 1.0, "head": 0.5, "weight": 10.0}
_RATE = {"weight": 0.02}
# Heads begin as they are, as in DCM; masks that have no gradient there begin half exchanged.
_START = {"clamped": 0.0, "hard-concrete": 0.5, "uniform": 0.5}


@method
def masks(
    model: Model,
    pairs: Pairs,
    *,
    level: Level = "edge",
    kind: Kind | None = None,
    loss: Loss | None = None,
    lam: float | None = None,
    sparsity: float | None = None,
    steps: int = 120,
    lr: float | None = None,
    init: Literal["open", "eap-ig"] | None = None,
    restarts: int = 1,
    ablation: Cut = "resample",
    experts: bool = False,
    metric: str = "logit_diff",
    position: str = "last",
    corpus: tuple[str, ...] = (),
    draws: int = 10,
    held_out: float = 0.5,
    batch_size: int = 16,
    seed: int = 0,
) -> Result:
    """The few edges, nodes, heads or weights that a trained mask keeps, beside what chance keeps.

    Args:
        pairs: Clean and contrast prompts of equal length, with answers.
        level: What is masked: "edge"; "node", a head or MLP for all its readers; "head", heads'
            outputs at one position exchanged with the contrast's (DCM); "weight", the weights of
            attention and MLPs (for "bigram": a bigram subnetwork).
        kind: How a mask stays between 0 and 1: "hard-concrete" (edge, node), "clamped" (head),
            "sigmoid" (weight), or "uniform" (UGS). Default by level.
        loss: What the masked model shall do. "kl" (edge, node): as the whole model; "answer" (head:
            the contrast's answer): say it; "metric": drive the metric up (head: down); "bigram"
            (weight only): as bigram probabilities. Default by level.
        lam: Price of keeping everything, in the loss's unit. Default 3 (edge), 1 (node), 0.5
            (head), 10 (weight). More: fewer parts.
        sparsity: Share of the parts to cut; then `lam` is not used.
        steps: Optimiser steps at most.
        lr: Adam's rate; default 0.2 (clamped 0.05, sigmoid 0.1, weight 0.02).
        init: Start with everything kept, "open", or from EAP-IG's scores with a fifth kept (default
            for edge and node: it takes about half the steps).
        restarts: Runs with other seeds; the best one is kept.
        ablation: What cut edges and nodes carry; weights become 0, heads the contrast's.
        experts: For "edge" and "node": take mixtures of experts apart, into experts and routers.
        metric: What faithfulness is measured in (see `uh.data.METRICS`).
        position: For "head": "last", "changed", a number, or the name of a word.
        corpus: For "bigram": texts to count in. Without any, bigrams are the model's own: what it
            says after each single token.
        draws: Random sets of the same size.
        held_out: Share of the prompts to judge on and not to train on (from four prompts on).
        batch_size: Prompts of one step: the result depends on it.
        seed: Of the split, the draws and the controls.

    Returns:
        Over `edge` or `node`: `mask` (0 to 1), `in_circuit`, `eap_ig`; over `random`: `f_random`.
        Scalars: faithfulness `f`, `f_low`, `f_high`, `f_eap_ig` (as many parts by EAP-IG),
        `f_rest`, `f_train`; `size`, and `size_eap_ig` (what EAP-IG needs to keep `f_train`); `kl`,
        `kl_eap_ig`, `kl_random`. Level "head", over `layer` and `head`: `mask`, `single`,
        `in_circuit`; `moved` (1: all the way to the contrast), `moved_single`, `moved_random`,
        `moved_all`. Level "weight", over `part` (a matrix): `kept`, `count`; `kept_share`, `loss_*`
        and `r_*` (correlation with bigrams) of mask, model, none, removed and random. All, over
        `step`: `loss` (of the step's draw), `share` (kept), `undecided`.

    Raises:
        NotOffered: Edges are undefined in this model, or (with `experts`) its mixtures; it has no
            heads, or no masked weights.
        UsageError: Options that the level has no meaning for; a contrast that changes nothing.
        NotFinite: A loss that is not a number.

    Cost: per step about three forwards of `batch_size` prompts; EAP-IG once, and about 60 circuits
        on each prompt to judge. Memory: all sources of a pass under autograd; weights: three
        numbers for each.

    Source: Cao et al. 2021 (subnetwork probing), Davies et al. 2023 (DCM), Bhaskar et al. 2024
        (Edge Pruning: sparsity by two multipliers; we mask no writers besides), Li and Janson 2024
        (UGS), Chang and Bergen 2025 (bigram subnetworks; here tau rises within `steps` to 200).
        Start from scores: after BlackboxNLP's shared task of 2025; log-odds by size are ours, as
        are one draw of the mask for each prompt, and the learning rates.

    Misleads: a mask is trained for its loss: under "kl" a saturated softmax lets the logit
        difference sink by a fifth unseen, and "metric" cuts what works against the answer. Of two
        ways to the same end one may be cut: everything else can keep much (`f_rest`). Other seeds
        and prices give other circuits. With few prompts it learns them by heart: look at the
        held-out ones. Own bigrams are the model's, not the language's.

    Example:
        >>> import underhood as uh
        >>> pairs = uh.Pairs.one("the capital of France is", "the capital of Japan is",
        ...                      "Paris", "Tokyo")
        >>> found = masks(uh.load(), pairs, level="head", steps=25, draws=3)
        >>> bool(found["moved"] > found["moved_random"].mean())
        True
    """
    how, aim = kind or _KIND[level], loss or _LOSS[level]
    first = init or ("eap-ig" if level in ("edge", "node") else "open")
    at_least(1, draws=draws)
    below_one(held_out=held_out)
    _check(level, aim, init=first, ablation=ablation, corpus=bool(corpus), experts=experts)
    recipe = Recipe(
        kind=how, lam=_LAM[level] if lam is None else lam, sparsity=sparsity, steps=steps,
        lr=_RATE.get(level) if lr is None else lr, batch=batch_size, restarts=restarts, seed=seed,
        start=_START.get(how) if level == "head" else None,
    )  # fmt: skip
    encoded, measure = pairs.encode(model), metric_named(metric)
    if not measure.differentiable and (level in ("edge", "node") or aim == "metric"):
        raise UsageError(
            f"{metric} has no gradient",
            given=f"metric={metric}, level={level}, loss={aim}",
            why="the mask, or the EAP-IG scores that it is compared with, need one",
            do='use metric="logit_diff"',
        )
    train, test = split_prompts(encoded, held_out, seed)
    options: dict[str, Any] = {"loss": aim, "draws": draws, "seed": seed}
    if level == "head":
        data, view = _heads(model, pairs, train, test, measure, recipe, position, **options)
    elif level == "weight":
        data, view = _weights(model, train, test, measure, recipe, corpus, **options)
    else:
        options |= {"level": level, "ablation": ablation, "experts": experts, "init": first}
        data, view = _circuit(model, train, test, measure, recipe, **options)
    return Result(
        name="masks", data=data, view=view,
        provenance=describe(
            model, pairs=len(pairs), level=level, kind=how, loss=aim, lam=recipe.lam,
            sparsity=sparsity, steps=steps, lr=recipe.rate, init=first, restarts=restarts,
            ablation=ablation, experts=experts, metric=metric, position=position,
            corpus=len(corpus), draws=draws, held_out=held_out if test is not train else 0,
            batch_size=batch_size, seed=seed,
        ),
    )  # fmt: skip


def _check(level: str, loss: str, *, init: str, ablation: str, corpus: bool, experts: bool) -> None:
    """Refuse what would otherwise be ignored."""
    graph = level in ("edge", "node")
    wrong = {
        "loss": loss == "bigram" and level != "weight",
        "init": init != "open" and not graph,
        "ablation": ablation != "resample" and not graph,
        "experts": experts and not graph,
        "corpus": corpus and loss != "bigram",
    }
    given = {
        "loss": loss, "init": init, "ablation": ablation, "experts": experts, "corpus": corpus,
    }  # fmt: skip
    for name, bad in wrong.items():
        if bad:
            raise UsageError(
                f"`{name}` has no meaning for this mask",
                given=f"level={level}, loss={loss}, {name}={given[name]}",
                why="it would be ignored",
                do="see the method's arguments",
            )


def _circuit(
    model: Model,
    train: EncodedPairs,
    test: EncodedPairs,
    metric: Metric,
    recipe: Recipe,
    *,
    level: str,
    loss: str,
    ablation: str,
    experts: bool,
    init: str,
    draws: int,
    seed: int,
) -> Any:
    wiring = Wiring(model, Graph.of(model, experts=experts))
    judge = Judge(wiring, train, metric, ablation)  # refuses a contrast that changes nothing
    # Under other ablations there is no line between the two prompts' embeddings.
    by = "eap-ig" if ablation == "resample" else "eap-ig-activations"
    scores = edge_scores(wiring, train, metric, method=by, ablation=ablation)
    found = circuit_masks(
        wiring, train, metric, recipe, level=level, loss=loss, ablation=ablation,
        init=scores if init != "open" else None,
    )  # fmt: skip
    if not len(found.circuit):
        raise UsageError(
            "the mask keeps no path from the input to the logits",
            given=f"lam={recipe.lam}, sparsity={recipe.sparsity}, steps={recipe.steps}",
            do="ask for a lower price or sparsity, or for more steps",
        )
    other = judge if test is train else Judge(wiring, test, metric, ablation)
    result = compared(found, scores, judge, other, level=level, draws=draws, seed=seed)
    return circuit_data(result), circuit_view(result, metric, ablation)


def _heads(
    model: Model,
    pairs: Pairs,
    train: EncodedPairs,
    test: EncodedPairs,
    metric: Metric,
    recipe: Recipe,
    position: str,
    *,
    loss: str,
    draws: int,
    seed: int,
) -> Any:
    work = Carrying(model, pairs, train, position=position, metric=metric)
    judge = work if test is train else (
        Carrying(model, pairs, test, position=position, metric=metric)
    )  # fmt: skip
    work.moved([range(len(work.heads))])  # refuses runs of equal metric
    trained = train_masks(
        work.objective(loss), len(work.heads), len(train), recipe, per_row=True,
        device=model.device,
    )  # fmt: skip
    found = carried(trained, work, judge, draws=draws, seed=seed)
    return head_data(found), head_view(found, metric, position)


def _weights(
    model: Model,
    train: EncodedPairs,
    test: EncodedPairs,
    metric: Metric,
    recipe: Recipe,
    corpus: tuple[str, ...],
    *,
    loss: str,
    draws: int,
    seed: int,
) -> Any:
    weights = Weights(model)
    both = [train.clean, train.contrast, test.clean, test.contrast]
    bigrams = None
    if loss == "bigram":
        bigrams = bigrams_counted(model, corpus, both) if corpus else bigrams_of(model, both)
    measure = log_prob if loss == "answer" else metric
    goal = Goal(weights, train, loss, measure, bigrams)
    trained = train_masks(goal, weights.total, len(train), recipe, device=model.device)
    judge = goal if test is train else Goal(weights, test, loss, measure, bigrams)
    found = judged(trained, judge, draws=draws, seed=seed, held_out=test is not train)
    return weight_data(found), weight_view(found)
