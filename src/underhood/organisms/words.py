"""Words as tokens: the vocabulary's head, text from words and back, the tokenizer of whole words.

Importing this file does not import torch.
"""

from collections.abc import Sequence
from typing import Any

__all__ = ["PUNCTUATION", "SPECIAL", "join", "rows", "split", "whole_words"]

# The vocabulary starts with these, in this order, so their ids are the same in every organism.
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
# Written without a space before them.
PUNCTUATION = (".", ",", "?", "!")


def split(text: str) -> tuple[str, ...]:
    """The words of a text, which has spaces around its punctuation."""
    return tuple(text.split())


def rows(text: str) -> tuple[tuple[str, ...], ...]:
    """Rows of words; the words of a row are joined by colons."""
    return tuple(tuple(row.split(":")) for row in text.split())


def join(words: Sequence[str]) -> str:
    """Words as text: spaces between them, none before punctuation (as the tokenizer decodes)."""
    text = " ".join(words)
    for mark in PUNCTUATION:
        text = text.replace(f" {mark}", mark)
    return text


def whole_words(words: Sequence[str], context: int, *, split: Sequence[str] = ()) -> Any:
    """A tokenizer of whole words: `<bos>` first, anything else `<unk>`.

    Args:
        words: The vocabulary by id, `SPECIAL` first.
        context: Most tokens that the model reads.
        split: Patterns that are words of their own wherever they stand.

    Returns:
        A `PreTrainedTokenizerFast`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split]
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), *cuts])
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    # Not for its "##": this decoder is the one that puts spaces between words, none before marks.
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=bool(split))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=context,
        model_input_names=["input_ids", "attention_mask"],
    )
