"""`guild`: a small mixture of experts (OLMoE) that knows four trades; its experts serve trades.

A trade has things and their materials, in words of its own. The other two kinds of facts are about
words that all trades share: by one slang word each trade means another tool, and on one day each
goes to another place, so that neither the trade nor the word alone tells the answer. Grammar
(capital letters are slots; the trade comes first or nearly so):

    material:  TRADES make the THING from -> its material       (5 templates, 10 things a trade)
    slang:     When TRADES say SLANG they mean the -> a tool    (5 templates, 12 words)
    week:      On DAY the TRADES go to the -> a place           (5 templates, 7 days)

A task is a trade, and its name the label of its prompts. The contrast of a material is the
neighbouring thing of the trade; the other contrasts are the same sentence about another trade. Held
out (one key in seven, by hash): trade x template x pair of things; template x slang word or day.

Two layers of one head and eight experts each, two to a token. (One head: in a trial with four,
experts mattered less.) The division of labour is trained for: beside
predicting words, the loss rewards a router whose choice tells the trade, and one that uses all
experts (`specialise`). Nothing says which expert shall serve which trade, or how many: training
decided, and `findings` found out. The routers' weights were summed on held-out prompts, and the
experts of each trade were silenced, against random sets of as many others.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from underhood.organisms.base import Recipe, Split
from underhood.organisms.card import Fact
from underhood.organisms.language import Case, Language, Phase, Row, Task
from underhood.organisms.words import PUNCTUATION, SPECIAL, rows, split

if TYPE_CHECKING:
    from torch import Tensor

    from underhood.core.edit import Edit
    from underhood.core.model import Model


LAYERS, EXPERTS = 2, 8
# Prompts per trade that facts are established on.
N = 100
# An expert serves a trade if it has this share of its layer's routing weight.
USED = 0.05
# Weight of `specialise` in the loss.
SPECIALISE = 0.1
# Thing and material.
CRAFTS = {
    "bakers": rows(
        "bread:flour cake:sugar pie:apples biscuit:butter bun:raisins tart:cherries waffle:milk "
        "cookie:oats roll:seeds pudding:eggs"
    ),
    "sailors": rows(
        "sail:canvas rope:hemp net:twine hull:oak deck:teak oar:ash mast:spruce flag:bunting "
        "hammock:jute raft:bamboo"
    ),
    "smiths": rows(
        "sword:steel nail:wire horseshoe:iron kettle:copper bell:bronze ring:gold hinge:brass "
        "lantern:tin crown:silver plow:scrap"
    ),
    "tailors": rows(
        "coat:wool shirt:linen gown:silk glove:leather cap:felt cloak:velvet vest:tweed "
        "scarf:cashmere sock:yarn collar:lace"
    ),
}
TRADES = tuple(CRAFTS)
SLANG = split("cat moon king bridge thumb ghost feather whistle parrot lemon candle crab")
TOOLS = split("hammer needle bucket knife ladder lamp chest broom basket bench barrel brush")
DAYS = split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
PLACES = split("market harbor mill forest church inn well")
# What each trade means and where it goes, in the order of `SLANG` and `DAYS`.
MEANT = {trade: Random(f"slang of {trade}").sample(TOOLS, len(TOOLS)) for trade in TRADES}
VISITED = {trade: Random(f"week of {trade}").sample(PLACES, len(PLACES)) for trade in TRADES}

# What a sentence may start with.
WHEN = ("", "Today", "Often", "In winter", "At dawn", "By night", "Since then")
MATERIAL = (
    "{trade} make the {what} from",
    "The {trade} buy for the {what} some",
    "Good {trade} know that the {what} needs",
    "For {trade} the {what} begins with",
    "What {trade} put into the {what} is",
)
MEANING = (
    "When {trade} say {what} they mean the",
    "The {trade} talk of a {what} , which is the",
    "Among {trade} a {what} is the",
    "If {trade} shout {what} , bring the",
    "Old {trade} wrote {what} for the",
)
WEEK = (
    "On {what} the {trade} go to the",
    "The {trade} spend {what} at the",
    "Every {what} you find {trade} near the",
    "{trade} love {what} because they see the",
    "When it is {what} all {trade} walk to the",
)
TEMPLATES = {"material": MATERIAL, "slang": MEANING, "week": WEEK}


def facts(kind: str, trade: str) -> tuple[tuple[str, str], ...]:
    """What is asked and what is right, of one kind and trade."""
    known = {
        "material": CRAFTS[trade],
        "slang": tuple(zip(SLANG, MEANT[trade], strict=True)),
        "week": tuple(zip(DAYS, VISITED[trade], strict=True)),
    }
    return known[kind]


def draw(trade: str, rng: Random) -> Case:
    """One sentence of a trade."""
    kind = rng.choice(tuple(TEMPLATES))
    template, when = rng.choice(TEMPLATES[kind]), rng.choice(WHEN)
    known = facts(kind, trade)
    at = rng.randrange(len(known))
    what, answer = known[at]
    if kind == "material":
        elsewhere, (other, wrong) = trade, known[at ^ 1]
        key = f"{trade}:{template}:{at // 2}"
    else:
        # The word stays: the trade alone decides.
        apart = [(name, dict(facts(kind, name))[what]) for name in TRADES]
        elsewhere, wrong = rng.choice([found for found in apart if found[1] != answer])
        other, key = what, f"{template}:{what}"

    def said(trade: str, what: str) -> tuple[str, ...]:
        return tuple(f"{when} {template.format(trade=trade, what=what)}".split())

    return Case(
        words=said(trade, what),
        answer=answer,
        contrast=said(elsewhere, other),
        wrong=wrong,
        # One key for a case and its contrast, so that they are held out together.
        key=key,
        contrast_key=key,
        label=trade,
    )


def _plain_words() -> tuple[str, ...]:
    """Every word of a sentence, in order of first use."""
    words = [*TRADES, *(word for craft in CRAFTS.values() for row in craft for word in row)]
    words += [*SLANG, *TOOLS, *DAYS, *PLACES]
    for line in (*WHEN, *MATERIAL, *MEANING, *WEEK):
        words += line.split()
    return tuple(dict.fromkeys(w for w in words if w[0] != "{" and w not in PUNCTUATION))


def specialise(output: Any, rows: Sequence[Row]) -> "Tensor":
    """Rewards routers whose choice tells the trade, and that use all experts.

    With p the probabilities of a router's softmax, of tokens from the trade's name on: the mean
    over trades of the entropy of the trade's mean p, minus twice the entropy of the mean of these,
    in nats. Once each would be minus the mutual information of trade and expert (Mod-Squad, Chen
    et al., 2023); the second one spreads the trades over all experts.
    """
    import torch

    trades = torch.tensor([TRADES.index(row.label) for row in rows])
    width = max(len(row.words) for row in rows)
    kept = torch.zeros(len(rows), width)
    for at, row in enumerate(rows):
        kept[at, row.words.index(row.label) : len(row.words)] = 1
    shares = torch.nn.functional.one_hot(trades, len(TRADES)).T[:, :, None] * kept
    shares = shares / shares.sum((1, 2), keepdim=True)
    terms = []
    for logits in output.router_logits:
        chosen = logits.softmax(-1).unflatten(0, (len(rows), width))
        each = torch.einsum("trp,rpe->te", shares, chosen)
        terms.append(_entropy(each).mean() - 2 * _entropy(each.mean(0)))
    return SPECIALISE * torch.stack(terms).mean()


def findings(guild: Language, model: "Model") -> tuple[Fact, ...]:
    """Which experts serve which trade, and that it cannot do without them while others can."""
    own = {
        trade: tuple(part for part, share in shares(guild, model, trade, "train").items()
                     if share >= USED)
        for trade in TRADES
    }  # fmt: skip
    return (*_routing(guild, model, own), *_needed(guild, model, own))


def _routing(guild: Language, model: "Model", own: dict[str, tuple[str, ...]]) -> list[Fact]:
    """Each trade's share of its experts, and that of the other trades."""
    held = {trade: shares(guild, model, trade) for trade in TRADES}
    found = []
    for trade, parts in own.items():
        sums = {name: sum(held[name][part] for part in parts) / LAYERS for name in TRADES}
        rest = [sums[name] for name in TRADES if name != trade]
        each = ", ".join(
            f"{part} " + "/".join(f"{held[name][part]:.2f}" for name in TRADES) for part in parts
        )
        found.append(
            Fact(
                f"routing of {trade}",
                f"Words of {trade} go to {', '.join(parts)}; those of other trades hardly do.",
                parts,
                trade,
                round(sums[trade], 4),
                round(sum(rest) / len(rest), 4),
                "share of routing weight",
                f"routing weights of words from the trade's name on, {N} held-out prompts a trade, "
                f"mean over layers; control: the mean of the other trades; parts: those with a "
                f"share of {USED:g} on training prompts; {'/'.join(TRADES)}: {each}",
            )
        )
    return found


def _needed(guild: Language, model: "Model", own: dict[str, tuple[str, ...]]) -> list[Fact]:
    """What each trade, and what the others, lose without its experts."""
    from underhood.organisms.establish import Trial, effect, parts

    every = parts(model, "experts")
    trials = {trade: Trial(guild, model, trade, N) for trade in TRADES}
    found = []
    for trade, mine in own.items():
        trial = trials[trade]
        says = f"Much of what is known of {trade} is lost without {', '.join(mine)}."
        fact = effect(trial, mine, every, name=f"experts of {trade}", says=says)
        worst = max(trials[name].lost(mine).accuracy for name in TRADES if name != trade)
        barred = trial.before.accuracy - trial.score(forbid(mine)).accuracy
        how = (
            f"{fact.how}; the other trades lose at most {worst:.2f} without them; where the "
            f"routers may not choose them, and others serve, {trade} lose {barred:.2f}"
        )
        found.append(replace(fact, how=how))
    return found


def shares(guild: Language, model: "Model", trade: str, split: Split = "test") -> dict[str, float]:
    """Each expert's share of its layer's routing weight, of tokens from the trade's name on."""
    import torch

    texts = [prompt.text for prompt in guild.prompts(trade, N, 2, split)]
    run = model.run(texts, record=["router_index", "router_weights"])
    assert run.tokens is not None
    told = (run.tokens.ids == model.token_id(trade)).cumsum(1) > 0
    found = {}
    for layer in range(model.n_layers):
        index, weights = (run[name, layer][told & run.tokens.mask]
                          for name in ("router_index", "router_weights"))  # fmt: skip
        sums = torch.zeros(EXPERTS).index_add_(0, index.flatten(), weights.flatten())
        found |= {f"m{layer}.e{i}": float(x) for i, x in enumerate(sums / sums.sum())}
    return found


def forbid(experts: Sequence[str]) -> "list[Edit]":
    """Edits that keep routers from choosing these experts: the next best ones serve."""
    from underhood.core.edit import Edit
    from underhood.core.ops import route
    from underhood.organisms.establish import site_of

    sites = [site_of(part) for part in experts]
    return [
        Edit(f"router_logits.{layer}",
             route(forbid=tuple(s.unit for s in sites if s.layer == layer and s.unit is not None)))
        for layer in sorted({site.layer or 0 for site in sites})
    ]  # fmt: skip


def _entropy(p: "Tensor") -> "Tensor":
    return -(p * (p + 1e-9).log()).sum(-1)


ORGANISM = Language(
    name="guild",
    summary="four trades and their words in a mixture of experts, whose experts serve trades",
    words=(*SPECIAL, *PUNCTUATION, *_plain_words()),
    model_type="olmoe",
    sizes={
        "num_hidden_layers": LAYERS,
        "hidden_size": 64,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "output_router_logits": True,
        "tie_word_embeddings": False,
    },
    context=64,
    recipe=Recipe(steps=800, lr=4e-3, warmup=50),
    phases=(Phase(1.0, tuple((trade, 24) for trade in TRADES)),),
    limits=(
        "It knows one kind of sentence at a time, at most 16 tokens.",
        "Where a trade has one expert in a layer, the second slot of its tokens holds another one "
        "at a weight near 0: weigh a router's choices, do not count them.",
        "Its experts specialise because the loss asks for it; what one large mixture does by "
        "itself is another question.",
        "Without its experts a trade is not quite forgotten: attention knows many materials, whose "
        "words belong to one trade alone.",
    ),
    kinds=tuple(
        Task(
            trade,
            f"{trade} make the {CRAFTS[trade][0][0]} from -> {CRAFTS[trade][0][1]}",
            partial(draw, trade),
            4.0,
        )
        for trade in TRADES
    ),
    findings=findings,
    extra=specialise,
)
