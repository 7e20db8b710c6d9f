"""The question, put in numbers: prompt, contrast, answer, wrong answer.

Without a contrast one is searched: each word in turn is replaced by those nearest to it in the
model's own embedding, and the replacement that moves the answer most is taken. That is weaker
evidence than a contrast chosen by a person (it was chosen because it works), and is said so.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.errors import NotOffered, PairError, UsageError
from underhood.core.model import Model
from underhood.core.tokens import Tokens
from underhood.data import Pairs

__all__ = ["Question", "ask"]

NEAREST = 4  # replacements tried per position
ALIKE = 40  # words among which a word of the prompt itself counts as alike
ROWS = 64  # prompts per forward while searching


@dataclass(frozen=True, slots=True)
class Question:
    """What is explained.

    Attributes:
        pairs: One pair: prompt, contrast, answer, wrong answer.
        answer, wrong: The two tokens as text.
        searched: Whether the contrast was found by search rather than given.
        clean, contrast: Logit difference answer - wrong on either prompt.
        top: The most probable next tokens on the prompt, with probabilities.
        contrast_top: The same on the contrast.
    """

    pairs: Pairs
    answer: str
    wrong: str
    searched: bool
    clean: float
    contrast: float
    top: list[tuple[str, float]]
    contrast_top: list[tuple[str, float]]

    @property
    def prompt(self) -> str:
        """The prompt."""
        return self.pairs.clean[0]

    @property
    def other(self) -> str:
        """The contrast."""
        return self.pairs.contrast[0]


def ask(
    model: Model, prompt: str, contrast: str | None, *, answer: str | None, wrong: str | None
) -> Question:
    """Put the question: complete what the caller left open from the model's own predictions.

    Raises:
        NotOffered: The model does not predict tokens from text.
        PairError: Prompt and contrast cannot be compared, or lead to the same answer.
        AnswerError: An answer that is not one token.

    Cost: two forwards; the search for a contrast adds one forward per 64 candidates.
    """
    if model.main != "" or model.anatomy.head is None:
        raise NotOffered(
            "this model cannot be asked for its next word",
            given=repr(model),
            why="explain needs a model that predicts tokens from text alone",
            do="use the methods one by one: `underhood methods`",
        )
    tokens = model.tokens(prompt)
    for text in (prompt, contrast):
        _check_known(model, text)
    logits = model.run(tokens).last_logits[0].float()
    said = int(logits.argmax()) if answer is None else model.token_id(answer)
    searched = contrast is None
    if contrast is None:
        instead = None if wrong is None else model.token_id(wrong)
        other = _search(model, tokens, said, instead)
    else:
        Pairs.one(prompt, contrast, said, _second(logits, said)).encode(model)
        other = model.tokens(contrast)
    other_logits = model.run(other).last_logits[0].float()
    instead = _second(other_logits, said) if wrong is None else model.token_id(wrong)
    text = contrast if contrast is not None else _text(model, other.ids)
    pairs = Pairs.one(prompt, text, said, instead)
    pairs.encode(model)
    gap, other_gap = (float(x[said] - x[instead]) for x in (logits, other_logits))
    if abs(gap - other_gap) < 1e-4:
        raise PairError(
            "prompt and contrast do not differ in what is asked",
            given=f"logit difference {gap:.3f} and {other_gap:.3f}",
            why=f"{model.token_text(said)!r} against {model.token_text(instead)!r} is equally"
            " likely after both",
            do="choose a contrast that calls for another answer, or name both answers",
        )
    return Question(
        pairs, model.token_text(said), model.token_text(instead), searched, gap, other_gap,
        _top(model, logits), _top(model, other_logits),
    )  # fmt: skip


def _check_known(model: Model, text: str | None) -> None:
    """Words that the vocabulary lacks all look the same to the model; explain none of them."""
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    if text is None or unknown is None:
        return
    words = [w for w in text.split() if unknown in model.tokens(w).ids[0].tolist()]
    if words:
        raise UsageError(
            f"the model does not know {', '.join(map(repr, words[:5]))}",
            given=text,
            why="these words are not in its vocabulary, so it reads them all alike",
            do="use words that it knows (`underhood organisms show town` has examples), or"
            " another model",
        )


def _second(logits: Float[Tensor, " vocab"], taken: int) -> int:
    """The most probable token that is not the answer."""
    best = logits.topk(2).indices.tolist()
    return best[1] if best[0] == taken else best[0]


def _top(model: Model, logits: Tensor, n: int = 5) -> list[tuple[str, float]]:
    found = logits.softmax(-1).topk(min(n, logits.shape[-1]))
    pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return [(model.token_text(i), p) for i, p in pairs]


def _search(model: Model, tokens: Tokens, said: int, wrong: int | None) -> Tokens:
    """The one-word change of the prompt that moves the answer most."""
    table: Any = model.module.get_submodule(_embedding(model))
    embed = table.weight.detach().float()
    unit = embed / embed.norm(dim=1, keepdim=True).clamp(min=1e-9)
    ids = tokens.ids[0]
    special = set(getattr(model.tokenizer, "all_special_ids", ()) or ())
    rows, seen = [], set()
    for place, token in enumerate(ids.tolist()[:-1]):  # another last word asks something else
        if token in special:
            continue
        near = (unit @ unit[token]).topk(min(ALIKE, len(unit))).indices.tolist()
        fresh = [t for t in near if t != token and t not in special]
        # A word of the prompt itself is often the sharpest contrast (the other name).
        own = [t for t in ids.tolist() if t in fresh]
        for other in dict.fromkeys([*own, *fresh[:NEAREST]]):
            if (place, other) not in seen:
                seen.add((place, other))
                row = ids.clone()
                row[place] = other
                rows.append(row)
    if not rows:
        raise PairError(
            "no contrast could be made from this prompt",
            given=" ".join(tokens.strings[0]),
            why="it holds no word that could be replaced",
            do="give one of your own (on the command line: --vs)",
        )
    return _furthest(model, torch.stack(rows), said, wrong, tokens)


def _embedding(model: Model) -> str:
    """Path of the token embedding."""
    point = model.anatomy.stacks[model.main].points.get("embed")
    if point is None:
        raise NotOffered(
            "no contrast can be searched for in this model",
            given=repr(model),
            why="its token embedding was not found",
            do="give one of your own (on the command line: --vs)",
        )
    return point.path


def _furthest(model: Model, rows: Tensor, said: int, wrong: int | None, tokens: Tokens) -> Tokens:
    drops = []
    for start in range(0, len(rows), ROWS):
        logits = model.run({"input_ids": rows[start : start + ROWS]}).logits[:, -1].float()
        rival = logits.clone()
        rival[:, said] = -torch.inf
        against = rival.amax(1) if wrong is None else logits[:, wrong]
        drops.append(logits[:, said] - against)
    for place in torch.cat(drops).argsort().tolist():
        best = rows[place][None]
        # Byte pieces may join into other tokens when they are written down and read again.
        if torch.equal(model.tokens(_text(model, best)).ids, best.cpu()):
            strings = (model.text.strings(best[0].tolist()),)
            return Tokens(best, torch.ones_like(best, dtype=torch.bool), strings)
    raise PairError(
        "no contrast could be written down for this prompt",
        given=" ".join(tokens.strings[0]),
        why="no replacement survives being written as text and read again",
        do="give one of your own (on the command line: --vs)",
    )


def _text(model: Model, ids: Tensor) -> str:
    """One row of ids as text."""
    return model.text.decode(ids[0].tolist())
