"""What an organism is and how well it does, as measured from its weights."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# The package imports this file while it loads, so its names exist only once functions run.
from underhood import organisms
from underhood.core.errors import FileProblem

CARD = "card.json"
# Prompts per task and the seed they are drawn with, for the numbers in a card.
PROMPTS = 500
_SEED = 1
# Where several answers are right, they must together have this probability (as well as the top).
_BAR = 0.8


@dataclass(frozen=True)
class Card:
    """The data sheet of an organism, kept as `card.json` beside the weights.

    Attributes:
        name: The organism.
        summary: What it is about.
        parameters: Number of weights.
        architecture: Class and sizes.
        recipe: Steps, rows, learning rate, seed: all that training needs.
        seconds: Time spent in training steps.
        tasks: Per task: `accuracy` and `probability` (mean, of the right answers) on held-out
            prompts, `judged` predictions, `n` prompts of which `distinct` differ, and
            `reproduce`, the call that gives these numbers again.
        limits: Known weaknesses.
    """

    name: str
    summary: str
    parameters: int
    architecture: dict[str, Any]
    recipe: dict[str, Any]
    seconds: float
    tasks: dict[str, dict[str, Any]]
    limits: list[str]

    def save(self, folder: Path) -> None:
        """Write `card.json` into a folder."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        (folder / CARD).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Card":
        """Read `card.json` of a folder.

        Raises:
            FileProblem: no card there, or not one.
        """
        path = folder / CARD
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{field.name: found[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileProblem(
                "There is no card to read.",
                given=path,
                why=f"{type(error).__name__}: {error}",
                do="Train the organism: `underhood organisms train NAME`.",
            ) from error


def evaluate(
    name: str, *, n: int = PROMPTS, seed: int = _SEED, folder: Path | None = None
) -> dict[str, dict[str, Any]]:
    """Measure an organism again, from its shipped weights (or those in `folder`).

    Returns what `Card.tasks` holds. Cost: about a second per task for 500 prompts of `town`.

    Raises:
        ModelNotFound: no such organism.
        FileProblem: its weights are missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from underhood.core.loading import no_bars

    what = organisms.organism(name)
    where = what.folder if folder is None else folder
    if not (where / "config.json").exists():
        raise FileProblem(
            f"The weights of {name!r} are missing.",
            given=where,
            do=f"Train it: `underhood organisms train {name}`.",
        )
    with no_bars():
        model = AutoModelForCausalLM.from_pretrained(where)
    return measure(what, model, AutoTokenizer.from_pretrained(where), n=n, seed=seed)


def measure(
    what: "organisms.Organism", model: Any, tokenizer: Any, *, n: int = PROMPTS, seed: int = _SEED
) -> dict[str, dict[str, Any]]:
    """Held-out accuracy and probability of the right answers, per task.

    Args:
        what: The organism, which draws the prompts.
        model: A causal language model of transformers, in evaluation mode.
        tokenizer: Its tokenizer.
        n: Prompts per task.
        seed: Seed of the prompts.
    """
    call = f"underhood.organisms.card.evaluate({what.name!r}, n={n}, seed={seed})"
    out: dict[str, dict[str, Any]] = {}
    for task in what.tasks:
        prompts = what.prompts(task, n, seed)
        right, probability = _judge(prompts, model, tokenizer)
        out[task] = {
            "accuracy": round(sum(right) / max(1, len(right)), 4),
            "probability": round(sum(probability) / max(1, len(probability)), 4),
            "judged": len(right),
            "n": n,
            "distinct": len({prompt.text for prompt in prompts}),
            "reproduce": f"{call}[{task!r}]",
        }
    return out


def _judge(
    prompts: "list[organisms.Prompt]", model: Any, tokenizer: Any, batch: int = 64
) -> tuple[list[bool], list[float]]:
    """Whether each judged prediction is right, and the probability of the right words."""
    import torch

    right: list[bool] = []
    probability: list[float] = []
    # Prompts of like length share a batch, so that little is padded.
    by_length = sorted(prompts, key=lambda prompt: len(prompt.text))
    for start in range(0, len(by_length), batch):
        some = by_length[start : start + batch]
        ids = [tokenizer(prompt.text)["input_ids"] for prompt in some]
        width = max(map(len, ids))
        padded = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids]
        # Padding on the right needs no mask, since attention is causal.
        with torch.no_grad():
            spread = model(input_ids=torch.tensor(padded)).logits.float().softmax(-1)
        for prompt, row, probs in zip(some, ids, spread, strict=True):
            for back in range(prompt.judged):
                at = len(row) - 1 - back
                if back == 0:
                    wanted = tokenizer.convert_tokens_to_ids(list(prompt.accept))
                else:
                    wanted = [row[at + 1]]
                mass = probs[at, wanted].sum().item()
                top = int(probs[at].argmax()) in wanted
                right.append(top and (len(wanted) == 1 or mass >= _BAR))
                probability.append(mass)
    return right, probability
