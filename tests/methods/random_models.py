"""Tiny random models that read text: `w8` to `w98` are one token each."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from underhood.core.model import Model
from underhood.organisms.tiny import tiny
from underhood.organisms.tiny_families import FIRST_WORD, VOCAB


def random_model(family: str) -> Model:
    """A random model of a family, with a word tokenizer."""
    words = {f"w{i}": i for i in range(FIRST_WORD, VOCAB)}
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 7} | words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    return Model(tiny(family).module, tokenizer, name=f"random/{family}")
