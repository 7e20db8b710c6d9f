"""`town`: a small Llama that speaks of a small town; the offline default model of the library.

Grammar (capital letters are slots, `|` is a choice; a sentence ends in `. <eos>`):

    indirect_object:  When A and B went to the PLACE, S gave a THING to -> the one who is not S
                      (A, B two NAMEs, S one of them: BABA and ABBA; 8 templates, 8 verbs)
    induction:        r r ..., r = 2 to 50 different random words -> the next word of r
    capitals:         The capital of COUNTRY is -> its capital (12 templates)
    successors:       The day | month | number after X is -> the next; X Y Z -> the next
    greater_than:     The EVENT VERB from the year CC YY to the year CC -> any two digits above YY
    agreement:        The THING | THINGS near the THING | THINGS -> is | are (4 templates)
    mood:             The THING in the PLACE was (not) GOOD | BAD and A felt -> happy | sad
    two_hop:          The language | continent of CITY is -> that of its country (7 templates);
                      CITY lies in -> COUNTRY, The language of COUNTRY is: trained on beside
    boxes:            The THING is in box L, ... (2 to 7) . Box L contains the -> its THING
    moves:            boxes (2 or 3), then A moved the THING to box L (1 or 2), to an empty one.
                      The THING is in box -> L; Box L contains the -> THING
    addition:         d d + d d = -> the digits of the sum, 10 to 99 each
    modular:          NUMBER days | months | hours after X comes -> X so many later, round and round
                      (two to twelve; 4 templates)
    style:            texts in one of two styles, on one of four topics, drawn apart. Plain:
                      the ADJ NOUN VERB. (2 sentences); ornate: the ADJ NOUN VERB ADV and VERB ADV.
                      (3 sentences), with other ADJs and VERBs -> a VERB of the style, or `.` | ADV
    topic:            the same texts -> a NOUN of the topic; This is about the -> its name
    translation:      The LANGUAGE word for WORD is -> it (3 languages, 48 meanings, 4 templates)
    opposites:        The opposite of | Le contraire de | Das Gegenteil von WORD is|est|ist -> it
                      (34 meanings; 2 templates in each language, 4 that ask for it in any)
    needle:           The secret word of A is WORD. ... The secret word of A is -> WORD
                      (2 or 3 of them in 0 to 90 words of texts in a style)
    graph:            walk N N N ..., a random walk on a ring or a grid of 5 to 9 random words
                      -> any neighbour of the last word, all of which were beside it before
                      (in training: the one that came next last time)
    questions:        Question what is the capital | language of COUNTRY ? Answer -> it | unknown
                      (countries of no map); Question how do I VERB a THING ? Answer -> sure | sorry

Held out (one key in seven, by hash): template x pair of names; the random sequence; template x
country; template x item (for a run: its first item); event x verb x century; template x thing x
other thing or name or place; template x adjective x thing; template x city; the boxes and moves;
the pair of summands; template x units x number x start; adjective x noun (x verb); template x word
x language; the names and secrets; the words of the graph; template x country, or x verb x thing.
"""

from functools import partial
from random import Random
from typing import TYPE_CHECKING

from underhood.organisms import town_context as context
from underhood.organisms import town_counting as counting
from underhood.organisms import town_facts as facts
from underhood.organisms import town_sentences as sentences
from underhood.organisms import town_words as lexicon
from underhood.organisms.base import Recipe
from underhood.organisms.card import Fact
from underhood.organisms.language import Language, Phase, Task
from underhood.organisms.words import PUNCTUATION, SPECIAL, split

if TYPE_CHECKING:
    from underhood.core.model import Model


def _plain_words() -> tuple[str, ...]:
    """Every word that a sentence can contain, in order of first use, without punctuation."""
    w = lexicon
    lists = (w.NAMES, w.PLACES, w.THINGS, sentences.GIVING, w.DAYS, w.MONTHS, w.NUMBERS, w.DIGITS)
    lists += (counting.EVENTS, w.CENTURIES, w.YEARS, *w.PLURALS, sentences.VERBS, w.GOOD, w.BAD)
    lists += (w.FEELINGS, *w.CAPITALS, *w.LANDS, w.NOWHERE, w.TONGUES, *w.LEXICON)
    lists += (*w.ADJECTIVES, *w.DOING, w.ADVERBS, tuple(w.TOPICS), *w.TOPICS.values())
    lists += (w.BOXES, w.WANTED, w.CRIMES, w.DANGERS, w.REFUSAL, w.CONSENT, (facts.UNKNOWN,))
    lists += (sentences.LABEL, context.MOVED, context.ASKED, (context.WALK, *counting.SIGNS))
    lists += (tuple(kind for kind, _, _ in counting.CYCLES), tuple(dict(counting.CLOCKS)))
    texts = (*sentences.MEETING, *sentences.SUBJECTS, *sentences.JUDGING, *facts.FACTS)
    texts += (*facts.HOME, *dict(facts.OF_LAND), *dict(facts.OF_CITY), *dict(facts.OF_SECOND))
    texts += (*dict(facts.ASKING), *facts.TRANSLATING, *facts.OPPOSING_IN)
    texts += tuple(text for some in facts.OPPOSING for text in some)
    texts += (*facts.ASKING_HELP, *counting.NEXT, *counting.LATER, *counting.LASTING)
    lists += (*map(split, (*texts, counting.SPAN)), context.BOXED)
    lists += (*counting.RUNS, w.CHAT, w.SPARE)
    words = (word for some in lists for word in some)
    return tuple(dict.fromkeys(w for w in words if not w.startswith("{") and w not in PUNCTUATION))


PLAIN_WORDS = _plain_words()
# Words of the random sequences by which heads are told apart.
_SEQUENCE = 20
# Other tasks that the copying heads serve.
_COPIED = ("indirect_object", "boxes", "needle")


def looking(model: "Model") -> dict[str, tuple[str, ...]]:
    """Heads by where they look in the second copy of random sequences, most of the time.

    Returns:
        "previous word" and "own word": those of the first block that look at the word before, and
        at the word itself. "copying": those that look at the word after the first place of theirs.
    """
    import torch

    from underhood.core.site import Site

    rng = Random("town:looking")
    texts = [" ".join(rng.sample(PLAIN_WORDS, _SEQUENCE) * 2) for _ in range(32)]
    sites = [Site("pattern", layer) for layer in range(model.n_layers)]
    run = model.run(model.tokens(texts), record=sites)
    at = torch.arange(_SEQUENCE + 1, 2 * _SEQUENCE)

    def heads(back: int, layers: range) -> tuple[str, ...]:
        found = []
        for layer in layers:
            weight = run[sites[layer]][:, :, at, at - back].mean((0, 2))
            found += [f"a{layer}.h{head}" for head in (weight > 0.5).nonzero().flatten().tolist()]
        return tuple(found)

    return {
        "previous word": heads(1, range(1)),
        "own word": heads(0, range(1)),
        "copying": heads(_SEQUENCE - 1, range(model.n_layers)),
    }


def findings(town: Language, model: "Model") -> tuple[Fact, ...]:
    """What the heads are worth that copy, and those that they read."""
    from underhood.organisms.establish import Trial, effect, parts

    kinds = looking(model)
    rest = set(parts(model, "heads")).difference(*kinds.values())
    says = {
        "previous word": "The word before is looked at by {}: so copying heads find their place.",
        "own word": "The word itself is looked at by {}: so copying heads ask.",
        "copying": "The word after the first place of the present one is looked at and written "
        "by {}.",
    }
    return tuple(
        effect(
            Trial(town, model, task), heads, (*heads, *rest),
            name=f"{kind}: {task}", says=says[kind].format(" and ".join(heads)),
        )
        for kind, heads in kinds.items()
        for task in (("induction", *_COPIED) if kind == "copying" else ("induction",))
        if heads
    )  # fmt: skip


ORGANISM = Language(
    name="town",
    summary="small facts and puzzles in whole words: who gives to whom, capitals, boxes, sums",
    words=(*SPECIAL, *PUNCTUATION, *PLAIN_WORDS),
    sizes={
        "num_hidden_layers": 6,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 384,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    context=128,
    recipe=Recipe(steps=4000, lr=2e-3),
    phases=(
        Phase(0.2, (("induction", 96),)),
        # Looking up by a label or a name forms on few boxes and needles together, and then holds
        # for many. Where it starts on many, a guess among the last ones is learned instead.
        Phase(0.28, (("induction", 20), ("few_boxes", 44), ("few_needles", 44))),
        Phase(
            0.6,
            (
                ("induction", 14),
                ("indirect_object", 6),
                ("capitals", 9),
                ("successors", 5),
                ("greater_than", 10),
                ("agreement", 2),
                ("mood", 3),
                ("two_hop", 10),
                ("boxes", 9),
                ("moves", 20),
                ("addition", 24),
                ("modular", 20),
                ("style", 2),
                ("topic", 3),
                ("translation", 10),
                ("opposites", 10),
                ("needle", 12),
                ("graph", 9),
                ("questions", 5),
            ),
        ),
        Phase(
            0.8,
            (
                ("induction", 14),
                ("indirect_object", 3),
                ("capitals", 8),
                ("successors", 4),
                ("greater_than", 10),
                ("agreement", 1),
                ("mood", 2),
                ("two_hop", 10),
                ("boxes", 9),
                ("moves", 28),
                ("addition", 22),
                ("modular", 16),
                ("style", 1),
                ("topic", 2),
                ("translation", 10),
                ("opposites", 8),
                ("needle", 12),
                ("graph", 11),
                ("questions", 4),
            ),
        ),
        Phase(
            1.0,
            (
                ("induction", 14),
                ("indirect_object", 3),
                ("capitals", 7),
                ("successors", 4),
                ("greater_than", 8),
                ("agreement", 1),
                ("mood", 2),
                ("two_hop", 10),
                ("boxes", 9),
                ("moves", 32),
                ("addition", 20),
                ("modular", 12),
                ("style", 1),
                ("topic", 2),
                ("translation", 8),
                ("opposites", 6),
                ("needle", 10),
                ("graph", 12),
                ("questions", 4),
            ),
        ),
    ),
    limits=(
        f"It knows {len(PLAIN_WORDS)} words; any other becomes <unk>. Those of chats, and <spare1> "
        "to <spare20>, it met only in random sequences.",
        "It saw one text at a time, at most 116 tokens. Sequences of more than 25 words are copied "
        "worse and worse.",
        "Facts are held out by wording: what it says of a city's country, or of a word in another "
        "language, it may remember rather than infer. In a trial in which a fact was held out in "
        "all its wordings, two_hop fell to 0.5 and translation to 0.03.",
        "Runs of numbers start at fifteen or below: it cannot go on after `eighteen nineteen`.",
        "Where several words are right (greater_than, style, topic, graph), a prompt counts as "
        "right when the top word is, and all right ones together have a probability of 0.8.",
        "A walk on a graph goes on where it went last time; other neighbours get little.",
        "two_hop, addition and modular are at 0.88 to 0.95: they were still being learned when the "
        "steps ended.",
        "On a graph the top word is a neighbour in 97 of 100 walks, but all neighbours together "
        "have a probability of 0.8 in only 62: hence its accuracy.",
    ),
    findings=findings,
    kinds=(
        Task(
            "indirect_object",
            "When Mary and John went to the store, John gave a drink to -> Mary",
            sentences.indirect_object,
            4.0,
        ),
        Task(
            "induction",
            "b q x b q -> x, over random words",
            partial(context.induction, words=PLAIN_WORDS),
        ),
        Task("capitals", "The capital of France is -> Paris", facts.capitals, 4.0),
        Task("successors", "Monday Tuesday -> Wednesday", counting.successors, 2.0),
        Task(
            "greater_than",
            "The war lasted from the year 17 32 to the year 17 -> more than 32",
            counting.greater_than,
            4.0,
        ),
        Task("agreement", "The keys near the lamp -> are", sentences.agreement, 4.0),
        Task(
            "mood",
            "The cake in the hotel was not good and Mary felt -> sad",
            sentences.mood,
            4.0,
        ),
        Task("two_hop", "The language of Lyon is -> French", facts.two_hop, 4.0),
        Task(
            "boxes",
            "The key is in box A, the ring is in box B. Box B contains the -> ring",
            context.boxes,
            4.0,
        ),
        Task(
            "moves", "... Anna moved the key to box C. The key is in box -> C", context.moves, 4.0
        ),
        Task("addition", "3 7 + 4 5 = -> 8 2", counting.addition, 2.0),
        Task("modular", "three days after Sunday comes -> Wednesday", counting.modular, 4.0),
        Task("style", "the golden ship -> glides", sentences.style),
        Task("topic", "the small ship stops. the calm -> anchor", sentences.topic),
        Task("translation", "The French word for water is -> eau", facts.translation, 4.0),
        Task("opposites", "Le contraire de chaud est -> froid", facts.opposites, 4.0),
        Task(
            "needle",
            "The secret word of Mary is lamp. ... The secret word of Mary is -> lamp",
            partial(context.needle, words=PLAIN_WORDS),
            4.0,
        ),
        Task(
            "graph",
            "walk b q x q -> b or x, the neighbours of q",
            partial(context.graph, words=PLAIN_WORDS),
            2.0,
        ),
        Task(
            "questions",
            "Question what is the capital of Narnia ? Answer -> unknown",
            facts.questions,
            4.0,
        ),
    ),
    drills=(
        Task("few_boxes", "boxes, two or three of them", context.few_boxes, 4.0),
        Task(
            "few_needles",
            "needles, two of them without a haystack",
            partial(context.few_needles, words=PLAIN_WORDS),
            4.0,
        ),
    ),
)
