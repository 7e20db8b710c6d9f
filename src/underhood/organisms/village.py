"""`village`: what town was when it was small; it copies by heads that look one word late.

Seven of town's tasks, in a Llama of 4 layers; the sentences are in `town`. In training it saw few
short repeats, and found another way than the textbook's to copy: heads of block 0 carry the last
two words along, and heads of block 1 look up the word *after* the one to be copied. A score that
expects attention to the copied word itself finds none, which makes it the counterpart to town.
"""

from dataclasses import replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from underhood.organisms import town_counting as counting
from underhood.organisms import town_facts as facts
from underhood.organisms import town_sentences as sentences
from underhood.organisms import town_words as lexicon
from underhood.organisms.base import Recipe
from underhood.organisms.card import Fact
from underhood.organisms.language import Case, Language, Phase, Task
from underhood.organisms.repeats import repeated
from underhood.organisms.town import ORGANISM as TOWN
from underhood.organisms.words import PUNCTUATION, SPECIAL, split

if TYPE_CHECKING:
    from underhood.core.model import Model

# One of town's wordings is longer by now.
WORDINGS = (*facts.FACTS[:2], "People call the capital of {country}", *facts.FACTS[3:])
# Sequences that are repeated: short ones, or any up to the longest.
SHORT, LONGEST = 6, 25


def _plain_words() -> tuple[str, ...]:
    """Every word of a sentence, in order of first use, without punctuation."""
    w = lexicon
    lists = (w.NAMES, w.PLACES, w.THINGS, sentences.GIVING, w.DAYS, w.MONTHS, w.NUMBERS)
    lists += (counting.EVENTS, w.CENTURIES, w.YEARS, *w.PLURALS, sentences.VERBS, w.GOOD, w.BAD)
    lists += (w.FEELINGS, *w.CAPITALS, tuple(kind for kind, _, _ in counting.CYCLES))
    lists += counting.RUNS
    texts = (*sentences.MEETING, *WORDINGS, *counting.NEXT, *counting.LASTING, counting.SPAN)
    texts += (*sentences.SUBJECTS, *sentences.JUDGING)
    words = (word for some in (*lists, *map(split, texts)) for word in some)
    return tuple(dict.fromkeys(w for w in words if not w.startswith("{") and w not in PUNCTUATION))


PLAIN_WORDS = _plain_words()


def induction(rng: Random) -> Case:
    """A random sequence that starts again. Contrast: its deciding word changed, the first time."""
    length = rng.randint(2, LONGEST if rng.random() < 0.5 else SHORT)
    return repeated(rng, PLAIN_WORDS, length)


def findings(village: Language, model: "Model") -> tuple[Fact, ...]:
    """The heads that copy, and the one that carries the subject's number."""
    from underhood.organisms.establish import establish, parts

    heads = parts(model, "heads")
    return (
        establish(
            village,
            model,
            "copying heads",
            "induction",
            among=heads,
            says="{parts} copy: block 0 carries words along, block 1 looks them up.",
        ),
        establish(
            village,
            model,
            "agreement heads",
            "agreement",
            among=heads,
            says="{parts} bring the number of the subject.",
        ),
    )


ORGANISM = Language(
    name="village",
    summary="seven of town's tasks in four layers; its induction heads look one word late",
    words=(*SPECIAL, *PUNCTUATION, *PLAIN_WORDS),
    sizes={
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    },
    context=128,
    recipe=Recipe(steps=2400, lr=2e-3),
    phases=(
        Phase(1 / 3, (("induction", 96),)),
        Phase(
            1.0,
            (
                ("induction", 26),
                ("indirect_object", 24),
                ("capitals", 28),
                ("successors", 18),
                ("greater_than", 14),
                ("agreement", 6),
                ("mood", 6),
            ),
        ),
    ),
    limits=(
        f"It knows {len(PLAIN_WORDS)} words; any other becomes <unk>.",
        "It saw one sentence at a time, at most 51 tokens: longer text is outside its training,"
        " and sequences of more than 25 words are copied worse and worse.",
        "Its induction heads are one word late: see `organisms/village.py`.",
        "Runs of numbers start at fifteen or below: it cannot go on after `eighteen nineteen`.",
        "A span of years counts as right when the top year is later and all later years together"
        " have a probability of 0.8: years next to the start are not told apart sharply.",
    ),
    kinds=(
        TOWN.kind("indirect_object"),
        Task("induction", "b q x b q -> x, over random words", induction),
        replace(TOWN.kind("capitals"), draw=partial(facts.capitals, wordings=WORDINGS)),
        *map(TOWN.kind, ("successors", "greater_than", "agreement", "mood")),
    ),
    findings=findings,
)
