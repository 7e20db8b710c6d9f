"""Text in and out: one thin layer over a Hugging Face tokenizer.

It adds what interpretability needs and tokenizers leave open: batches whose padding is always
masked, answers that are exactly one token, and the text of each token by itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from underhood.core.errors import (
    AnswerError,
    EmptyPrompt,
    NotOffered,
    OutOfRange,
    PaddingError,
    PromptTooLong,
    ShapeMismatch,
)
from underhood.core.tokens import Tokens

__all__ = ["Text"]


def _too_long(length: int, context: int) -> PromptTooLong:
    return PromptTooLong(
        "the prompt is longer than the model's context",
        given=f"{length} tokens",
        why=f"the context is {context} tokens",
        do="shorten it, or split it into several prompts",
    )


class Text:
    """A tokenizer with the model's limits.

    Args:
        tokenizer: A Hugging Face tokenizer, or None for models that are given ids or tensors.
        pad_id: The padding token, if the caller chose one.
        context: Longest prompt the model takes, if it has a limit.
    """

    def __init__(
        self, tokenizer: Any, *, pad_id: int | None = None, context: int | None = None
    ) -> None:
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
            raise _too_long(longest, self.context)
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
        if mask is None or mask.ndim != 2:  # a 4-D mask says who sees whom, not what is padding
            mask = torch.ones_like(ids, dtype=torch.bool)
        if mask.shape[0] != ids.shape[0] or mask.shape[1] < ids.shape[1]:
            raise ShapeMismatch(
                "the attention mask does not fit the ids",
                given=f"mask {tuple(mask.shape)}, ids {tuple(ids.shape)}",
                why="it must say of every token whether it is real",
                do="pass a mask of the ids' shape, 1 on real tokens and 0 on padding",
            )
        mask = mask[:, -ids.shape[1] :].bool()  # a longer one also covers a cache
        strings = tuple(
            self.strings(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)
        ) if self.tokenizer is not None else ()  # fmt: skip
        return Tokens(ids, mask, strings)

    def checked(self, tokens: Tokens, *, vocabulary: int | None) -> Tokens:
        """A batch that the model can take, or a refusal before the forward.

        Args:
            tokens: The batch.
            vocabulary: Rows of the embedding, if known.

        Raises:
            PromptTooLong: More columns than the model's context.
            EmptyPrompt: A row that is all padding.
            PaddingError: Padding inside a row, which positions cannot be counted across.
            OutOfRange: An id that the embedding lacks.
        """
        ids, mask = tokens.ids, tokens.mask
        if self.context is not None and ids.shape[1] > self.context:
            raise _too_long(ids.shape[1], self.context)
        if not bool(mask.all()):
            for row, keep in enumerate(mask.tolist()):
                real = [i for i, k in enumerate(keep) if k]
                if not real:
                    raise EmptyPrompt(
                        f"row {row} is all padding",
                        given=f"an attention mask of {len(keep)} zeros",
                        do="leave the row out, or give it a token",
                    )
                if real[-1] - real[0] + 1 != len(real):
                    raise PaddingError(
                        f"row {row} has padding inside it",
                        given=f"{len(real)} real tokens in columns {real[0]} to {real[-1]}",
                        why="positions are counted along a row's own tokens, without holes",
                        do="pad at the start or at the end only",
                    )
        if vocabulary is not None and not ids.is_cuda:  # there, looking would wait for the device
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= vocabulary:
                raise OutOfRange(
                    f"there is no token {low if low < 0 else high}",
                    given=f"ids from {low} to {high}",
                    why=f"the vocabulary has {vocabulary} tokens",
                    do="check that the ids were made with this model's tokenizer",
                )
        return tokens

    def room(self, tokens: Tokens, new: int) -> None:
        """Refuse to generate beyond the model's context.

        Raises:
            PromptTooLong: Prompt and new tokens together do not fit.
        """
        # The last token written is not read any more.
        length = tokens.ids.shape[1] + new - 1
        if self.context is not None and length > self.context:
            raise PromptTooLong(
                "the prompt and the tokens to write do not fit into the context",
                given=f"{tokens.ids.shape[1]} tokens and max_new_tokens={new}",
                why=f"the model's context is {self.context}",
                do=f"use max_new_tokens={max(self.context - tokens.ids.shape[1] + 1, 1)} or less",
            )

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
