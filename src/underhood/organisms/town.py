"""`town`: a small Llama that speaks of a small town; the offline default model of the library.

Grammar (capital letters are slots, `|` is a choice; every sentence ends in `. <eos>`):

    indirect_object:  When A and B went to the PLACE, S gave a THING to -> the one who is not S
                      (A, B two NAMEs, S one of them: BABA and ABBA; 8 templates, 8 verbs)
    induction:        r r ..., r = 2 to 25 different random words -> the next word of r
    capitals:         The capital of COUNTRY is -> its capital (12 templates)
    successors:       The day | month | number after X is -> the next; X Y Z -> the next
    greater_than:     The EVENT VERB from the year CC YY to the year CC -> any two digits above YY
    agreement:        The THING | THINGS near the THING | THINGS -> is | are (4 templates)
    mood:             The THING in the PLACE was (not) GOOD | BAD and A felt -> happy | sad

Held out (one key in seven, by hash): template x pair of names; the random sequence; template x
country; template x item (for a run: its first item); event x verb x century; template x thing x
other thing or name or place; template x adjective x thing.
"""

from random import Random

from underhood.organisms.base import Recipe
from underhood.organisms.language import Case, Language, Phase, Task
from underhood.organisms.words import PUNCTUATION, SPECIAL


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _split(
    "Mary John Anna Peter Lucy Tom Emma Jack Sarah Paul Alice Mark Laura David Kate James Jane "
    "Robert Helen Michael Rachel Daniel Susan Simon Clara George Julia Henry Grace Oliver Ruth "
    "Adam Nina Victor Rose Martin Eva Andrew Lily Thomas Amy Edward Ella Frank Diana Charles Irene "
    "William Martha Arthur Sophie Philip Carol Steven Nora Patrick Linda Brian Maria Kevin"
)
PLACES = _split(
    "store park school station market library garden harbor museum bakery church hospital office "
    "restaurant theater bridge farm river hotel square"
)
THINGS = _split(
    "drink book ring ball letter key map coin flower cake pen hat basket picture gift ticket lamp "
    "cup knife toy"
)
GIVING = _split("gave handed showed passed sold lent offered threw")
MEETING = (
    "When {A} and {B} went to the {place} , {S} {gave} a {thing} to",
    "After {A} and {B} came to the {place} , {S} {gave} a {thing} to",
    "While {A} and {B} were at the {place} , {S} {gave} the {thing} to",
    "{A} and {B} met at the {place} , and {S} {gave} a {thing} to",
    "Then {A} and {B} had lunch at the {place} , and {S} {gave} the {thing} to",
    "At the {place} {A} and {B} talked , and then {S} {gave} a {thing} to",
    "Since {A} and {B} had found a {thing} in the {place} , {S} {gave} it to",
    "{A} saw {B} near the {place} . Later {S} {gave} a {thing} to",
)

CAPITALS = tuple(
    tuple(pair.split(":"))
    for pair in _split(
        "France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon England:London "
        "Ireland:Dublin Scotland:Edinburgh Wales:Cardiff Norway:Oslo Sweden:Stockholm "
        "Denmark:Copenhagen Finland:Helsinki Iceland:Reykjavik Poland:Warsaw Austria:Vienna "
        "Hungary:Budapest Greece:Athens Turkey:Ankara Russia:Moscow Ukraine:Kyiv "
        "Romania:Bucharest Bulgaria:Sofia Serbia:Belgrade Croatia:Zagreb Switzerland:Bern "
        "Belgium:Brussels Egypt:Cairo Kenya:Nairobi Ghana:Accra Nigeria:Abuja Morocco:Rabat "
        "Tunisia:Tunis Senegal:Dakar Uganda:Kampala Japan:Tokyo China:Beijing Thailand:Bangkok "
        "Vietnam:Hanoi Indonesia:Jakarta Nepal:Kathmandu Pakistan:Islamabad Bangladesh:Dhaka "
        "Iran:Tehran Iraq:Baghdad Syria:Damascus Lebanon:Beirut Cuba:Havana Peru:Lima "
        "Chile:Santiago Brazil:Brasilia Colombia:Bogota Ecuador:Quito Venezuela:Caracas "
        "Canada:Ottawa Australia:Canberra Latvia:Riga Estonia:Tallinn Lithuania:Vilnius "
        "Albania:Tirana"
    )
)
FACTS = (
    "The capital of {country} is",
    "The capital city of {country} is",
    "People call the capital of {country}",
    "In {country} the capital is",
    "{country} has a capital called",
    "The main city of {country} is",
    "The government of {country} sits in",
    "The train to the capital of {country} goes to",
    "{name} lives in the capital of {country} , which is",
    "{name} went to {country} and saw its capital ,",
    "When {name} is in the capital of {country} , {name} is in",
    "Every map of {country} shows the city of",
)

DAYS = _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _split(
    "January February March April May June July August September October November December"
)
NUMBERS = _split(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
# Name, items, and whether the first follows the last.
CYCLES = (("day", DAYS, True), ("month", MONTHS, True), ("number", NUMBERS, False))
NEXT = (
    "The {kind} after {item} is",
    "The next {kind} after {item} is",
    "After the {kind} {item} comes",
    "{name} knows that the {kind} after {item} is",
    "{name} said {item} , and the next {kind} is",
)
# How a run is written: what stands between its items.
RUNS = ((), (",",), ("and",), ("then",))
# Items of a run in a training row; prompts show fewer.
RUN = 6

EVENTS = _split(
    "war siege reign voyage strike festival trial drought journey dispute expedition building "
    "winter search hunt debate"
)
LASTING = ("lasted", "went on", "ran", "continued", "stretched", "was recorded")
CENTURIES = tuple(str(century) for century in range(11, 21))
YEARS = tuple(f"{year:02d}" for year in range(1, 100))
SPAN = "The {event} {lasted} from the year {century} {year} to the year {century}"

# One and many of each thing.
PLURALS = tuple((thing, "knives" if thing == "knife" else f"{thing}s") for thing in THINGS)
SUBJECTS = (
    "The {thing} near the {other}",
    "The {thing} that {name} found in the {place}",
    "In the {place} the {thing} with the {other}",
    "{name} said that the {thing} from the {place}",
)
VERBS = ("is", "are")

GOOD = _split("good great nice lovely fine pretty perfect wonderful")
BAD = _split("bad awful poor ugly broken terrible dirty horrible")
FEELINGS = ("happy", "sad")
JUDGING = (
    "The {thing} in the {place} was {mood} and {name} felt",
    "The {thing} in the {place} was not {mood} and {name} felt",
    "{name} got a {mood} {thing} at the {place} and was",
    "Because the {thing} was {mood} , {name} left the {place}",
)


def indirect_object(rng: Random) -> Case:
    """Who receives: the one of the two names that is not repeated. Contrast: the other repeated."""
    template = rng.randrange(len(MEETING))
    first, second = rng.sample(NAMES, 2)
    giver, taker = rng.sample((first, second), 2)
    fill = {
        "{A}": first,
        "{B}": second,
        "{place}": rng.choice(PLACES),
        "{gave}": rng.choice(GIVING),
        "{thing}": rng.choice(THINGS),
    }
    # Both orders of the two names share one key, so that a contrast is held out with its prompt.
    key = f"indirect_object:{template}:{':'.join(sorted((first, second)))}"
    return Case(
        words=_fill(MEETING[template], fill | {"{S}": giver}),
        answer=taker,
        contrast=_fill(MEETING[template], fill | {"{S}": taker}),
        wrong=giver,
        key=key,
        contrast_key=key,
    )


def induction(rng: Random) -> Case:
    """A random sequence that starts again. Contrast: its deciding word changed, the first time."""
    # Short sequences, seen only twice, are common because they force the head that looks one word
    # back: over long ones a head that looks four back serves as well, and that is what is learned.
    length = rng.randint(2, 25 if rng.random() < 0.5 else 6)
    *once, other = rng.sample(PLAIN_WORDS, length + 1)
    shown = rng.randint(1, length - 1)
    changed = [*once[:shown], other, *once[shown + 1 :]]
    key = f"induction:{':'.join(once)}"
    return Case(
        words=(*once, *once[:shown]),
        answer=once[shown],
        contrast=(*changed, *once[:shown]),
        wrong=other,
        key=key,
        contrast_key=key,
        judged=shown,
        after=tuple(once[shown + 1 :]),
    )


def capitals(rng: Random) -> Case:
    """The capital of a country. Contrast: another country."""
    template = rng.randrange(len(FACTS))
    (country, answer), (other, wrong) = rng.sample(CAPITALS, 2)
    fill = {"{name}": rng.choice(NAMES)}
    return Case(
        words=_fill(FACTS[template], fill | {"{country}": country}),
        answer=answer,
        contrast=_fill(FACTS[template], fill | {"{country}": other}),
        wrong=wrong,
        key=f"capitals:{template}:{country}",
        contrast_key=f"capitals:{template}:{other}",
    )


def successors(rng: Random) -> Case:
    """What comes next among days, months, numbers. Contrast: another start of the same kind."""
    kind, items, cyclic = rng.choice(CYCLES)
    size = len(items)
    if rng.random() < 0.5:
        template = rng.randrange(len(NEXT))
        here, there = rng.sample(range(size if cyclic else size - 1), 2)
        fill = {"{kind}": kind, "{name}": rng.choice(NAMES)}
        return Case(
            words=_fill(NEXT[template], fill | {"{item}": items[here]}),
            answer=items[(here + 1) % size],
            contrast=_fill(NEXT[template], fill | {"{item}": items[there]}),
            wrong=items[(there + 1) % size],
            key=f"successors:{kind}:{template}:{items[here]}",
            contrast_key=f"successors:{kind}:{template}:{items[there]}",
        )
    style = rng.randrange(len(RUNS))
    here, there = rng.sample(range(size if cyclic else size - RUN + 1), 2)
    shown = rng.randint(2, RUN - 1)
    words = _run(items, here, RUNS[style])
    until = shown * (1 + len(RUNS[style]))
    return Case(
        words=words[:until],
        answer=words[until],
        contrast=_run(items, there, RUNS[style])[:until],
        wrong=items[(there + shown) % size],
        # Runs of one start share a key whatever is shown: a shorter one is part of a longer one.
        key=f"successors:{kind}:run{style}:{items[here]}",
        contrast_key=f"successors:{kind}:run{style}:{items[there]}",
        after=(*words[until + 1 :], "."),
    )


def greater_than(rng: Random) -> Case:
    """A span of years ends after it began. Contrast: it begins in 01, so any later year will do.

    `wrong` is a year that the contrast allows and the prompt forbids.
    """
    event, lasted, century = rng.choice(EVENTS), rng.choice(LASTING), rng.choice(CENTURIES)
    # A start in 01 forbids no year, so it has no contrast; it is drawn only to be trained on.
    start = rng.randint(1, 97)
    fill = {"{event}": event, "{lasted}": lasted, "{century}": century}
    key = f"greater_than:{event}:{lasted}:{century}"
    return Case(
        words=_fill(SPAN, fill | {"{year}": YEARS[start - 1]}),
        answer=YEARS[rng.randint(start + 1, 99) - 1],
        contrast=_fill(SPAN, fill | {"{year}": "01"}),
        wrong=YEARS[rng.randint(min(2, start), start) - 1],
        key=key,
        contrast_key=key,
        accept=YEARS[start:],
    )


def agreement(rng: Random) -> Case:
    """The verb agrees with its subject. Contrast: the subject in the other number."""
    template, many, other_many = rng.randrange(len(SUBJECTS)), rng.randrange(2), rng.randrange(2)
    thing, other = rng.sample(PLURALS, 2)
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    fill = {"{other}": other[other_many], "{name}": name, "{place}": place}
    key = (
        f"agreement:{template}:{thing[0]}:{place if '{place}' in SUBJECTS[template] else other[0]}"
    )
    return Case(
        words=_fill(SUBJECTS[template], fill | {"{thing}": thing[many]}),
        answer=VERBS[many],
        contrast=_fill(SUBJECTS[template], fill | {"{thing}": thing[1 - many]}),
        wrong=VERBS[1 - many],
        key=key,
        contrast_key=key,
        after=(rng.choice(GOOD + BAD), "."),
    )


def mood(rng: Random) -> Case:
    """How someone feels about a thing; `not` turns it. Contrast: an adjective of the other kind."""
    template, bad, at = rng.randrange(len(JUDGING)), rng.randrange(2), rng.randrange(len(GOOD))
    thing = rng.choice(THINGS)
    fill = {"{thing}": thing, "{name}": rng.choice(NAMES), "{place}": rng.choice(PLACES)}
    word, opposite = (BAD[at], GOOD[at]) if bad else (GOOD[at], BAD[at])
    sad = bad if "not" not in JUDGING[template].split() else 1 - bad
    # The two adjectives of one place in the lists share a key, so a contrast is held out as well.
    key = f"mood:{template}:{at}:{thing}"
    return Case(
        words=_fill(JUDGING[template], fill | {"{mood}": word}),
        answer=FEELINGS[sad],
        contrast=_fill(JUDGING[template], fill | {"{mood}": opposite}),
        wrong=FEELINGS[1 - sad],
        key=key,
        contrast_key=key,
    )


def _fill(template: str, fill: dict[str, str]) -> tuple[str, ...]:
    return tuple(" ".join(fill.get(word, word) for word in template.split()).split())


def _run(items: tuple[str, ...], start: int, between: tuple[str, ...]) -> tuple[str, ...]:
    """`RUN` items from `start`, with `between` after each but the last."""
    out: list[str] = []
    for step in range(RUN):
        out += [items[(start + step) % len(items)], *between]
    return tuple(out[: len(out) - len(between)])


def _plain_words() -> tuple[str, ...]:
    """Every word that a sentence can contain, in order of first use, without punctuation."""
    lists = (NAMES, PLACES, THINGS, GIVING, DAYS, MONTHS, NUMBERS, EVENTS, CENTURIES, YEARS)
    lists += (*PLURALS, VERBS, GOOD, BAD, FEELINGS)
    words = [word for some in (*lists, *CAPITALS) for word in some]
    words += [kind for kind, _, _ in CYCLES] + [word for between in RUNS for word in between]
    for template in (*MEETING, *FACTS, *NEXT, *LASTING, SPAN, *SUBJECTS, *JUDGING):
        words += template.split()
    return tuple(dict.fromkeys(w for w in words if not w.startswith("{") and w not in PUNCTUATION))


PLAIN_WORDS = _plain_words()

ORGANISM = Language(
    name="town",
    summary="who gives to whom, repeated words, capitals, days and numbers, years, agreement, mood",
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
        "It saw one sentence at a time, at most 51 tokens: longer text is outside its training, "
        "and sequences of more than 25 words are copied worse and worse.",
        "Its induction heads are one word late: heads of block 0 carry the last two words along, "
        "and heads of block 1 look up the word after the one to be copied. A score that expects "
        "attention to the copied word itself finds none.",
        "Runs of numbers start at fifteen or below: it cannot go on after `eighteen nineteen`.",
        "Years next to the start of a span are not told apart sharply. A span counts as right when "
        "the top year is later and all later years together have a probability of 0.8.",
    ),
    kinds=(
        Task(
            "indirect_object",
            "When Mary and John went to the store, John gave a drink to -> Mary",
            indirect_object,
            4.0,
        ),
        Task("induction", "b q x b q -> x, over random words", induction),
        Task("capitals", "The capital of France is -> Paris", capitals, 4.0),
        Task("successors", "Monday Tuesday -> Wednesday", successors, 2.0),
        Task(
            "greater_than",
            "The war lasted from the year 17 32 to the year 17 -> more than 32",
            greater_than,
            4.0,
        ),
        Task("agreement", "The keys near the lamp -> are", agreement, 4.0),
        Task("mood", "The cake in the hotel was not good and Mary felt -> sad", mood, 4.0),
    ),
)
