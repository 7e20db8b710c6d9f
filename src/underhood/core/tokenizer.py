"""Text in and out: one thin layer over a Hugging Face tokenizer.

It adds what interpretability needs and tokenizers leave open: batches whose padding is always
masked, answers that are exactly one token, and the text of each token by itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from underhood.core.errors import AnswerError, EmptyPrompt, NotOffered, PaddingError, PromptTooLong
from underhood.core.tokens import Tokens

__all__ = ["Text"]


class Text:
    """A tokenizer with the model's limits.

    Args:
        tokenizer: A Hugging Face tokenizer, or None for models that are given ids or tensors.
        pad_id: The padding token, if the caller chose one.
        context: Longest prompt the model takes, if it has a limit.
    """

    def __init__(self, tokenizer: Any, *, pad_id: int | None = None, context: int | None = None) -> None:
        self.tokenizer, self.context = tokenizer, context
        own = getattr(tokenizer, "pad_token_id", None)
        self.pad_id = pad_id if pad_id is not None else own

    def _need(self) -> Any:
        if self.tokenizer is None:
            raise NotOffered(
                "this model came without a tokenizer",
                given="text",
                why="it was loaded from a bare module or folder",
                do="pass token ids as a tensor, or uh.load(module, tokenizer)",
            )
        return self.tokenizer

    def batch(self, prompts: str | Sequence[str], *, padding: str = "right") -> Tokens:
        """Prompts as a padded batch.

        Args:
            prompts: One or several.
            padding: "right", or "left" (generation).

        Raises:
            EmptyPrompt: A prompt without text.
            PaddingError: Rows of different length and no pad token.
            PromptTooLong: More tokens than the model's context.
        """
        tokenizer = self._need()
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts or any(not t for t in texts):
            raise EmptyPrompt(
                "a prompt is empty",
                given=repr(texts[:3]),
                do="write at least one word",
            )
        rows = [list(tokenizer(t)["input_ids"]) for t in texts]
        return self.rectangle(rows, padding=padding)

    def rectangle(self, rows: Sequence[Sequence[int]], *, padding: str = "right") -> Tokens:
        """Rows of ids as a padded batch; the same refusals as `batch`."""
        longest = max((len(r) for r in rows), default=0)
        if not longest or any(not len(r) for r in rows):
            raise EmptyPrompt("a prompt has no tokens", given=repr(rows)[:80], do="add some")
        if self.context is not None and longest > self.context:
            raise PromptTooLong(
                f"the prompt has {longest} tokens",
                given=f"{longest} tokens",
                why=f"the model's context is {self.context}",
                do="shorten it, or split it into several prompts",
            )
        uneven = any(len(r) != longest for r in rows)
        if uneven and self.pad_id is None:
            raise PaddingError(
                "prompts of different length need padding, and there is no pad token",
                given=f"lengths {[len(r) for r in rows][:8]}",
                do="choose one: uh.load(..., pad_token='<|endoftext|>') (padding is always masked),"
                " or run the prompts one by one",
            )
        pad = self.pad_id if self.pad_id is not None else 0
        ids = torch.full((len(rows), longest), pad, dtype=torch.long)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), longest) if padding == "left" else slice(len(row))
            ids[i, place] = torch.tensor(list(row))
            mask[i, place] = True
        strings = tuple(self.strings(r) for r in rows) if self.tokenizer is not None else ()
        return Tokens(ids, mask, strings)

    def of_ids(self, ids: Tensor, mask: Tensor | None) -> Tokens:
        """Given ids as a batch; ids that hold padding must come with their mask.

        Raises:
            PaddingError: The pad token occurs and no mask says where padding is.
        """
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.numel() == 0:
            raise EmptyPrompt("there are no tokens", given=str(tuple(ids.shape)), do="add some")
        if mask is None:
            edges = (ids[:, 0] == self.pad_id) | (ids[:, -1] == self.pad_id)
            padded = self.pad_id is not None and ids.shape[0] > 1 and bool(edges.any())
            if padded and not bool(edges.all()):
                raise PaddingError(
                    "these ids hold padding, and no attention mask says where",
                    given=f"pad token {self.pad_id} in some rows",
                    why="padding would be read as text",
                    do="pass {'input_ids': ids, 'attention_mask': mask}",
                )
            mask = torch.ones_like(ids, dtype=torch.bool)
        mask = mask.bool()
        if self.context is not None and ids.shape[1] > self.context:
            raise PromptTooLong(
                f"the prompt has {ids.shape[1]} tokens",
                given=f"{ids.shape[1]} tokens",
                why=f"the model's context is {self.context}",
                do="shorten it",
            )
        strings = tuple(
            self.strings(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)
        ) if self.tokenizer is not None else ()  # fmt: skip
        return Tokens(ids, mask, strings)

    def strings(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The text of each token by itself, leading spaces kept."""
        return tuple(self.token_text(int(i)) for i in ids)

    def token_text(self, token: int) -> str:
        """The text of one token; the id in angle brackets where there is no tokenizer."""
        token = int(token)
        if self.tokenizer is None:
            return f"<{token}>"
        raw = self.tokenizer.convert_ids_to_tokens(token)
        text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        # SentencePiece decoders drop the space that a piece begins with.
        if isinstance(raw, str) and raw.startswith("▁") and not text.startswith(" "):
            return " " + text
        return text

    def token_id(self, text: str) -> int:
        """The id of a text that is exactly one token.

        Raises:
            AnswerError: It is several tokens, or unknown to the vocabulary.
        """
        tokenizer = self._need()
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        unknown = getattr(tokenizer, "unk_token_id", None)
        # SentencePiece puts a lone "▁" before some words.
        if len(ids) == 2 and self.token_text(ids[0]).strip() == "":
            ids = ids[1:]
        if len(ids) == 1 and ids[0] != unknown:
            return int(ids[0])
        pieces = " | ".join(self.strings(ids)) or "nothing"
        raise AnswerError(
            f"the answer {text!r} is not one token",
            given=f"{pieces}  ({len(ids)} tokens)",
            why="it is unknown to the vocabulary" if unknown in ids else "a metric reads one logit",
            do="use a one-token answer; most vocabularies want the leading space (' Paris')",
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a token sequence, special tokens left out."""
        return self._need().decode(list(ids), skip_special_tokens=True)
