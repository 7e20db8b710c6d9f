"""A word-level `Reads` for tests: known words are one token, unknown ones are spelled out."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from underhood.core.errors import AnswerError, OutOfRange
from underhood.core.tokens import Tokens

WORDS = "the uncle uncles near dogs truck is are has have John Mary gave to 13 14 52 A B C D"

calm = settings(deadline=None)
"""Property tests without a time limit: the first example pays for imports and type checkers."""


class WordModel:
    """Tokens are words with the space before them; unknown words become single characters."""

    def __init__(self, words: str = WORDS, *, bos: bool = False, left: bool = False) -> None:
        vocabulary = ["<pad>", "<bos>", *(s + w for w in words.split() for s in ("", " "))]
        self.ids = {text: i for i, text in enumerate(vocabulary)}
        self.bos, self.left = bos, left

    def _pieces(self, text: str) -> list[str]:
        known: list[str] = []
        for word in re.findall(r" ?[^ ]+| ", text):
            known += [word] if word in self.ids else list(word)
        for piece in known:
            self.ids.setdefault(piece, len(self.ids))
        return known

    def tokens(self, prompts: str | Sequence[str]) -> Tokens:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = [["<bos>"] * self.bos + self._pieces(text) for text in texts]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            cols = slice(width - len(row), width) if self.left else slice(0, len(row))
            ids[i, cols] = torch.tensor([self.ids[piece] for piece in row], dtype=torch.long)
            mask[i, cols] = True
        return Tokens(ids, mask, tuple(map(tuple, rows)))

    def token_id(self, text: str) -> int:
        if text not in self.ids:
            raise AnswerError("not one token", given=text, do="choose another")
        return self.ids[text]

    def token_text(self, id: int) -> str:
        if id >= len(self.ids):
            raise OutOfRange(f"there is no token {id}", given=id, do="choose another")
        return list(self.ids)[id]


def material(*parts: str) -> Path:
    """A file of the independent material, or a skip."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("UNDERHOOD_MATERIAL", root / ".." / "shared" / "material"))
    path = folder.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"material not at hand: {'/'.join(parts)} (set UNDERHOOD_MATERIAL)")
    return path


def says(error: pytest.ExceptionInfo, *parts: str) -> None:
    """The message holds these parts and tells what to do."""
    text = str(error.value)
    assert "Instead:" in text, text
    for part in parts:
        assert part in text, f"{part!r} is not in:\n{text}"
