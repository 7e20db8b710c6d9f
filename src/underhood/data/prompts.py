"""Prompts: where words are among the tokens, prompts from files, and few-shot prompts.

All positions are counted from 0 at a row's own first token (BOS included, padding excluded), as
everywhere in underhood; `Where(pos=...)` takes them as they come.

    span(tokens, 0, "Eiffel Tower")        range(2, 6)
    token_positions(tokens, 0, "Mary")     [1, 9]
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from underhood.core.errors import FileProblem, OutOfRange, UsageError, nearest
from underhood.core.tokens import Tokens
from underhood.data._files import read_json, read_text

__all__ = ["TEMPLATE", "FewShot", "few_shot", "last", "load_prompts", "span", "token_positions"]

TEMPLATE = "Q: {input}\nA: {output}"
"""One example of a few-shot prompt (Todd et al. 2023)."""

_PROMPT_KEYS = ("prompt", "text", "input", "clean")


def _strings(tokens: Tokens, row: int) -> tuple[str, ...]:
    if not 0 <= row < len(tokens):
        raise OutOfRange(
            f"there is no row {row} in this batch",
            given=f"{len(tokens)} prompts",
            do=f"use 0 to {len(tokens) - 1}",
        )
    if not tokens.strings:
        raise UsageError(
            "these tokens carry no text to search in",
            given=f"{len(tokens)} rows of ids",
            why="they were made from ids, not by `model.tokens`",
            do="make them with model.tokens(prompt), or give positions as numbers",
        )
    return tokens.strings[row]


def _wanted(text: str) -> str:
    if not text:
        raise UsageError(
            "nothing to search for", given=repr(text), do="give some text of the prompt"
        )
    return text


def span(tokens: Tokens, row: int, text: str, *, occurrence: int | None = None) -> range:
    """Positions of the tokens that hold this text: the fewest that cover all of it.

    Args:
        tokens: A batch with strings.
        row: Which prompt.
        text: A part of the prompt, as it reads; it may begin or end inside a token.
        occurrence: Which one, if there are several: 0 is the first, -1 the last. None: there must
            be only one.

    Raises:
        UsageError: The text is absent, or occurs more than once and `occurrence` is None.
        OutOfRange: No such row or occurrence.

    Known limits: special tokens are part of the searched text; a character that is spread over
    several byte-level tokens cannot be found.
    """
    strings = _strings(tokens, row)
    joined, wanted = "".join(strings), _wanted(text)
    ends = []
    for piece in strings:
        ends.append((ends[-1] if ends else 0) + len(piece))
    found: list[range] = []
    at = joined.find(wanted)
    while at >= 0:
        first = next(i for i, end in enumerate(ends) if end > at)
        stop = next(i for i, end in enumerate(ends) if end >= at + len(wanted)) + 1
        # Two hits inside the same tokens are one place: positions cannot tell them apart.
        if range(first, stop) not in found:
            found.append(range(first, stop))
        at = joined.find(wanted, at + 1)
    if not found:
        raise UsageError(
            f"row {row} does not contain {text!r}",
            given=_shown(strings),
            do="copy the text from the prompt; case and spaces count",
        )
    if occurrence is None and len(found) > 1:
        places = ", ".join(f"{r.start} to {r.stop - 1}" for r in found[:8])
        raise UsageError(
            f"row {row} contains {text!r} {len(found)} times",
            given=_shown(strings),
            why=f"it could be positions {places}",
            do=f"say which one: occurrence=0 to {len(found) - 1}, or -1 for the last;"
            " or give more of the text around it",
        )
    if occurrence is not None and not -len(found) <= occurrence < len(found):
        raise OutOfRange(
            f"row {row} has no occurrence {occurrence} of {text!r}",
            given=f"{len(found)} occurrences",
            do=f"use 0 to {len(found) - 1}, or -1 for the last",
        )
    return found[occurrence or 0]


def _shown(strings: Sequence[str], limit: int = 300) -> str:
    text = "|".join(strings).replace("\n", "\\n")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def token_positions(tokens: Tokens, row: int, text: str, *, exact: bool = False) -> list[int]:
    """Positions of the single tokens that read `text`, ascending.

    Args:
        tokens: A batch with strings.
        row: Which prompt.
        text: The token's text.
        exact: Compare with the spaces around it; otherwise " Mary" and "Mary" are the same.

    Raises:
        UsageError: No token of the row reads so; the message carries the nearest.
        OutOfRange: No such row.
    """
    strings, wanted = _strings(tokens, row), _wanted(text)
    same = wanted if exact else wanted.strip() or wanted
    reads = [piece if exact else piece.strip() or piece for piece in strings]
    found = [i for i, piece in enumerate(reads) if piece == same]
    if not found:
        close = nearest(same, reads, n=3)
        raise UsageError(
            f"row {row} has no token {text!r}",
            given=_shown(strings),
            why="a word may be several tokens" if same in "".join(strings) else None,
            do=f"use one of the nearest: {close}; or span(tokens, {row}, {text!r}) for text"
            " across tokens",
        )
    return found


def last(tokens: Tokens, row: int = 0) -> int:
    """Position of the row's last token, which predicts what comes next.

    Raises:
        OutOfRange: No such row.
    """
    if not 0 <= row < len(tokens):
        raise OutOfRange(
            f"there is no row {row} in this batch",
            given=f"{len(tokens)} prompts",
            do=f"use 0 to {len(tokens) - 1}",
        )
    return tokens.lengths[row] - 1


def load_prompts(path: str | Path) -> list[str]:
    """Prompts from a file: text with one per line, a JSON list, or JSON-lines.

    In JSON a prompt is a string, or an object with `prompt`, `text`, `input` or `clean`. Blank
    lines are skipped; spaces at the ends of lines are kept, because tokenizers see them.

    Raises:
        FileProblem: Missing, truncated, of another form, or without prompts (with the line).
    """
    path = Path(path)
    if path.suffix.lower() not in (".json", ".jsonl", ".txt", ".text", ""):
        raise FileProblem(
            f"{path.name!r} is not a file of prompts",
            given=str(path),
            why=f"the form {path.suffix} is not read here",
            do="use .txt (one per line), .json or .jsonl; pairs are read by Pairs.load",
        )
    if path.suffix.lower() not in (".json", ".jsonl"):
        # Not splitlines(): a prompt may hold U+2028, form feeds and the like.
        lines = read_text(path).replace("\r\n", "\n").split("\n")
        return [line for line in lines if line.strip()]
    parsed = read_json(path)
    items = parsed.value if isinstance(parsed.value, list) else [parsed.value]
    places = parsed.places or [f"entry {i} of {path.name}" for i in range(len(items))]
    prompts = [_prompt_in(item, place) for item, place in zip(items, places, strict=True)]
    if not prompts:
        raise FileProblem(
            f"{path.name!r} holds no prompts", given="an empty list", do="give at least one"
        )
    return prompts


def _prompt_in(item: object, place: str) -> str:
    keys = [key for key in _PROMPT_KEYS if key in item] if isinstance(item, Mapping) else []
    prompt = item[keys[0]] if isinstance(item, Mapping) and keys else item
    if not isinstance(prompt, str) or not prompt:
        raise FileProblem(
            f"{place} is not a prompt",
            given=repr(item)[:120],
            do=f"write a string, or an object with one of: {', '.join(_PROMPT_KEYS)}",
        )
    return prompt


@dataclass(frozen=True, slots=True)
class FewShot:
    """Few-shot prompts and the answer to each.

    Attributes:
        prompts: Examples, then the question without its answer.
        answers: What should come next, with the space that the template puts before it.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)


def few_shot(
    rows: Sequence[Mapping[str, Any]],
    n: int,
    *,
    seed: int = 0,
    template: str = TEMPLATE,
    separator: str = "\n\n",
    shuffled: bool = False,
) -> FewShot:
    """One prompt per row: `n` other rows as examples, then the row's input as the question.

    Examples never repeat the question's input, and not all of their outputs are equal, so that the
    same seed with `shuffled` gives a prompt of the same words that no longer shows the task.

    Args:
        rows: Mappings with text under `input` and `output`.
        n: Examples per prompt.
        seed: Decides which examples, and nothing else.
        template: One example, with `{input}` and `{output}`, the output at its end.
        separator: What stands between examples.
        shuffled: Rotate the examples' outputs, so that as many as possible are wrong.

    Raises:
        UsageError: A row without text, a template without its fields, or too few different rows.

    Source: Todd et al. 2023, "Function Vectors in Large Language Models" (prompts and shuffled
    prompts).

    Example:
        >>> rows = [{"input": "big", "output": "small"}, {"input": "hot", "output": "cold"}]
        >>> few_shot(rows, 1).prompts[1]
        'Q: big\\nA: small\\n\\nQ: hot\\nA:'
    """
    items = _checked(rows, n, template, shuffled)
    before = template[: template.index("{output}")]
    question = before.rstrip(" ")
    gap = before[len(question) :]
    rng = random.Random(seed)
    twins = Counter(given for given, _ in items)
    prompts = []
    for i in range(len(items)):
        shown = _examples(items, i, n, rng=rng, twins=twins[items[i][0]])
        outputs = [output for _, output in shown]
        if shuffled:
            turns = [outputs[k:] + outputs[:k] for k in range(1, n)]
            outputs = max(turns, key=lambda turn: sum(map(str.__ne__, turn, outputs)))
        parts = [
            _filled(template, given, output)
            for (given, _), output in zip(shown, outputs, strict=True)
        ]
        prompts.append(separator.join([*parts, question.replace("{input}", items[i][0])]))
    return FewShot(tuple(prompts), tuple(gap + output for _, output in items))


def _filled(template: str, given: str, output: str) -> str:
    # Not str.format: braces in the data, and in the template, are ordinary characters.
    head, tail = template.split("{input}", 1)
    return head + given + tail.replace("{output}", output)


def _examples(
    items: Sequence[tuple[str, str]], i: int, n: int, *, rng: random.Random, twins: int
) -> list[tuple[str, str]]:
    """`n` examples for question `i`, without its input, with at least two outputs if n > 1."""
    others = rng.sample(range(len(items)), min(len(items), n + twins))
    shown = [items[j] for j in others if items[j][0] != items[i][0]][:n]
    enough = len(shown) == n
    if enough and n > 1 and len({output for _, output in shown}) == 1:
        mixed = [x for x in items if x[0] != items[i][0] and x[1] != shown[0][1]]
        enough = bool(mixed)
        shown[-1] = rng.choice(mixed) if mixed else shown[-1]
    if not enough:
        raise UsageError(
            f"too few different examples for the question {items[i][0]!r}",
            given=f"{len(items)} rows, {n} examples per prompt",
            why="examples differ from the question, and their outputs are not all equal",
            do="give more rows, or ask for fewer examples",
        )
    return shown


def _checked(
    rows: Sequence[Mapping[str, Any]], n: int, template: str, shuffled: bool
) -> list[tuple[str, str]]:
    if template.count("{input}") != 1 or not template.endswith("{output}"):
        raise UsageError(
            "a template needs {input} once and {output} at its end",
            given=repr(template),
            do=f"write it like {TEMPLATE!r}, and what stands between examples as separator",
        )
    if template.count("{output}") != 1:
        raise UsageError(
            "a template needs {output} only once", given=repr(template), do="remove the others"
        )
    if n < (2 if shuffled else 0):
        raise UsageError(
            "too few examples per prompt",
            given=f"n={n}",
            why="exchanging outputs needs two of them" if shuffled else None,
            do="use 2 or more" if shuffled else "use 0 or more",
        )
    items: list[tuple[str, str]] = []
    for i, row in enumerate(rows):
        given, output = row.get("input"), row.get("output")
        if not isinstance(given, str) or not isinstance(output, str) or not given or not output:
            raise UsageError(
                f"row {i} has no text under `input` and `output`",
                given=repr(dict(row))[:120],
                do='write {"input": "big", "output": "small"}',
            )
        items.append((given, output))
    return items
