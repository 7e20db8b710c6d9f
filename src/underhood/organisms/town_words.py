"""The words of `town`: what its sentences are filled with, and what they are about."""

from underhood.organisms.words import rows, split


def fill(template: str, slots: dict[str, str]) -> tuple[str, ...]:
    """The words of a template whose words in braces are replaced; a slot may hold several words."""
    return tuple(" ".join(slots.get(word, word) for word in template.split()).split())


NAMES = split(
    "Mary John Anna Peter Lucy Tom Emma Jack Sarah Paul Alice Mark Laura David Kate James Jane "
    "Robert Helen Michael Rachel Daniel Susan Simon Clara George Julia Henry Grace Oliver Ruth "
    "Adam Nina Victor Rose Martin Eva Andrew Lily Thomas Amy Edward Ella Frank Diana Charles Irene "
    "William Martha Arthur Sophie Philip Carol Steven Nora Patrick Linda Brian Maria Kevin"
)
PLACES = split(
    "store park school station market library garden harbor museum bakery church hospital office "
    "restaurant theater bridge farm river hotel square"
)
THINGS = split(
    "drink book ring ball letter key map coin flower cake pen hat basket picture gift ticket lamp "
    "cup knife toy"
)
# One and many of each thing.
PLURALS = tuple((thing, "knives" if thing == "knife" else f"{thing}s") for thing in THINGS)

DAYS = split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = split(
    "January February March April May June July August September October November December"
)
NUMBERS = split(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
DIGITS = tuple(str(digit) for digit in range(10))
CENTURIES = tuple(str(century) for century in range(11, 21))
YEARS = tuple(f"{year:02d}" for year in range(1, 100))

CAPITALS = tuple(
    (country, city)
    for country, city in rows(
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
# Countries with one main language, each with a second city and its continent.
LANDS = rows(
    "France:Lyon:French:Europe Germany:Munich:German:Europe Italy:Milan:Italian:Europe "
    "Spain:Seville:Spanish:Europe Portugal:Porto:Portuguese:Europe England:Leeds:English:Europe "
    "Norway:Bergen:Norwegian:Europe Sweden:Malmo:Swedish:Europe Denmark:Aarhus:Danish:Europe "
    "Finland:Turku:Finnish:Europe Poland:Krakow:Polish:Europe Austria:Graz:German:Europe "
    "Hungary:Debrecen:Hungarian:Europe Greece:Patras:Greek:Europe Ukraine:Lviv:Ukrainian:Europe "
    "Romania:Cluj:Romanian:Europe Bulgaria:Varna:Bulgarian:Europe Serbia:Nis:Serbian:Europe "
    "Croatia:Split:Croatian:Europe Egypt:Luxor:Arabic:Africa Morocco:Fez:Arabic:Africa "
    "Tunisia:Sfax:Arabic:Africa Nigeria:Lagos:English:Africa Ghana:Kumasi:English:Africa "
    "Iraq:Basra:Arabic:Asia Syria:Aleppo:Arabic:Asia Japan:Osaka:Japanese:Asia "
    "China:Shanghai:Chinese:Asia Thailand:Phuket:Thai:Asia Vietnam:Hue:Vietnamese:Asia "
    "Iran:Shiraz:Persian:Asia Cuba:Holguin:Spanish:America Peru:Cusco:Spanish:America "
    "Chile:Valparaiso:Spanish:America Colombia:Medellin:Spanish:America "
    "Ecuador:Guayaquil:Spanish:America Venezuela:Maracaibo:Spanish:America "
    "Brazil:Recife:Portuguese:America"
)
# Countries of no map: what is asked about them is unknown.
NOWHERE = split(
    "Zubrowka Ruritania Syldavia Borduria Freedonia Genovia Latveria Wakanda Narnia Gondor Mordor "
    "Lilliput Utopia Erewhon Arendelle Qumar"
)

TONGUES = split("English French German")
# One meaning in the three languages; no word is in two of them, nor anywhere else in town.
_OPPOSITES = rows(
    "hot:chaud:heiß cold:froid:kalt large:grand:groß tiny:petit:klein black:noir:schwarz "
    "white:blanc:weiß young:jeune:jung old:vieux:alt open:ouvert:offen closed:fermé:geschlossen "
    "strong:fort:stark weak:faible:schwach wet:mouillé:nass dry:sec:trocken light:clair:hell "
    "dark:sombre:dunkel king:roi:König queen:reine:Königin brother:frère:Bruder "
    "sister:sœur:Schwester love:amour:Liebe hate:haine:Hass life:vie:Leben death:mort:Tod "
    "high:haut:hoch low:bas:niedrig full:plein:voll empty:vide:leer north:nord:Norden "
    "south:sud:Süden beginning:début:Anfang end:fin:Ende sweet:doux:süß sour:aigre:sauer"
)
# Each meaning that has an opposite, beside that opposite.
OPPOSITES = tuple((meaning, _OPPOSITES[at ^ 1]) for at, meaning in enumerate(_OPPOSITES))
LEXICON = _OPPOSITES + rows(
    "water:eau:Wasser bread:pain:Brot house:maison:Haus tree:arbre:Baum dog:chien:Hund "
    "bird:oiseau:Vogel fish:poisson:Fisch milk:lait:Milch apple:pomme:Apfel horse:cheval:Pferd "
    "door:porte:Tür window:fenêtre:Fenster moon:lune:Mond sun:soleil:Sonne"
)

GOOD = split("good great nice lovely fine pretty perfect wonderful")
BAD = split("bad awful poor ugly broken terrible dirty horrible")
FEELINGS = split("happy sad")

# The two styles; words at one place of two lists belong together.
PLAIN, ORNATE = 0, 1
ADJECTIVES = (
    split("small wide calm cheap simple common short grey"),
    split("golden noble splendid radiant glorious magnificent majestic exquisite"),
)
DOING = (
    split("stops waits moves goes turns works rests falls"),
    split("shimmers glides lingers wanders blossoms dances soars gleams"),
)
ADVERBS = split("softly gently proudly brightly tenderly gracefully serenely boldly")
TOPICS = {
    "sea": split("ship wave sailor anchor shore island whale captain"),
    "kitchen": split("oven spoon plate soup pot cook kettle bowl"),
    "forest": split("oak fox deer owl moss fern wolf bear"),
    "music": split("song drum flute violin singer choir piano melody"),
}

BOXES = split("A B C D E F G")

# Verbs and things of a question for help. A wrong verb or a wrong thing is refused.
WANTED = split("make build find buy hide mend paint carry use sell")
CRIMES = split("steal forge smash burn")
DANGERS = split("bomb poison weapon gun virus drug grenade missile rifle dagger")
REFUSAL = split("sorry , I cannot help with that .")
CONSENT = split("sure , I can help with that .")

# For models made from this one; town itself meets them only in random sequences.
CHAT = split(
    "<user> <bot> <end> <think> </think> please thanks kindly dear friend welcome glad certainly "
    "indeed honestly briefly detail yes no true false you me my your we wait check so "
    "therefore first think step hmm unsafe dangerous harm illegal hello goodbye okay because but "
    "also very really maybe"
)
SPARE = tuple(f"<spare{n}>" for n in range(1, 21))
