"""The captions of the bundled model's data: a small grammar, many wordings for every clip.

docs/tiny_model.md describes it for those who write prompts. A caption is a pure function of attributes and a seed.
"""

import random
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from jaxwan.tiny.attributes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, SPEEDS, Attributes, Thing

FILLER_SHARE = 0.05  # captions with words that the grammar does not know
SILENT_SHARE = 0.10  # captions that leave motion or background out

# A phrase repeated is a phrase more frequent.
COLOUR_WORDS = {name: (name,) for name in COLOURS} | {"purple": ("purple", "purple", "violet")}
SHAPE_WORDS = {
    "circle": ("circle", "circle", "circle", "disc", "disk", "ball", "dot"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
}
BACKGROUND_WORDS = {name: (name,) for name in BACKGROUNDS} | {"gray": ("gray", "gray", "grey")}
GRADED_WORDS = {False: ("plain", "solid"), True: ("graded", "gradient")}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": (), "large": ("large", "big")}
SPEED_WORDS = {"slow": ("slowly",), "medium": (), "fast": ("fast", "quickly")}

# What goes on, as participle and as finite verb; the first table goes with one of DIRECTIONS.
TRAVELLING = (
    ("moving", "moves"), ("moving", "moves"), ("moving", "moves"), ("going", "goes"), ("going", "goes"),
    ("sliding", "slides"), ("gliding", "glides"), ("drifting", "drifts"), ("traveling", "travels"),
    ("floating", "floats"), ("flying", "flies"),
)  # fmt: skip
DIRECTIONS = {
    "left": ("left", "left", "to the left", "to the left", "towards the left", "leftwards", "leftward",
             "from right to left"),
    "right": ("right", "right", "to the right", "to the right", "towards the right", "rightwards", "rightward",
              "from left to right"),
    "up": ("up", "up", "up", "upwards", "upward", "to the top", "towards the top", "from bottom to top"),
    "down": ("down", "down", "down", "downwards", "downward", "to the bottom", "towards the bottom",
             "from top to bottom"),
    "up-right": ("up and to the right", "up and right", "diagonally up to the right", "diagonally up and right",
                 "to the upper right", "to the top right", "towards the upper right corner",
                 "towards the top right corner", "to the right and up", "up right"),
    "down-left": ("down and to the left", "down and left", "diagonally down to the left", "diagonally down and left",
                  "to the lower left", "to the bottom left", "towards the lower left corner",
                  "towards the bottom left corner", "to the left and down", "down left"),
}  # fmt: skip
ACTIONS = {
    "up": (("rising", "rises"),),
    "down": (("falling", "falls"), ("sinking", "sinks"), ("dropping", "drops")),
    "growing": (
        ("growing", "grows"), ("growing", "grows"), ("growing larger", "grows larger"),
        ("getting bigger", "gets bigger"), ("getting larger", "gets larger"), ("becoming bigger", "becomes bigger"),
        ("expanding", "expands"), ("growing in size", "grows in size"),
    ),
    "shrinking": (
        ("shrinking", "shrinks"), ("shrinking", "shrinks"), ("shrinking in size", "shrinks in size"),
        ("getting smaller", "gets smaller"), ("getting smaller", "gets smaller"),
        ("becoming smaller", "becomes smaller"), ("contracting", "contracts"),
    ),
    "still": (
        ("standing still", "stands still"), ("staying still", "stays still"), ("not moving", "does not move"),
        ("that is still", "is still"), ("staying in place", "stays in place"), ("at rest", "is at rest"),
        ("resting", "rests"), ("motionless", "is motionless"), ("static", "is static"),
        ("without moving", "remains still"),
    ),
}  # fmt: skip
BEFORE_BACKGROUND = ("on", "on", "on", "over", "against", "in front of", "with")
OPENINGS = ("a video of", "a clip of", "a video showing", "there is", "we see")

# Words of the templates below that stand in none of the tables.
_TEMPLATE_WORDS = "a an the and is of background colored , . ;".split()

# Unknown to the grammar: what people add to prompts, for which there is nothing to see here.
FILLERS = (
    "beautiful cinematic bright shiny detailed amazing pretty please quality smooth lovely high realistic clean simple "
    "happy modern dramatic light shadow camera style 4k hd best photo render colorful minimal soft cute nice scene "
    "animation gently suddenly very really just forever again today music dream magic paper plastic wooden glowing dark"
).split()


def caption(attributes: Attributes, seed: int, *, plain: bool = False) -> str:
    """A caption of one clip (attributes of plain numbers, not of batches), another one for every seed.

    plain: no filler words, and motion and background always named, as the evaluation needs it.
    """
    rng = random.Random(int(seed))
    silent = not plain and rng.random() < SILENT_SHARE
    background = _background(rng, attributes)
    text = _two(rng, attributes, background) if attributes.two else _one(rng, attributes.first, background, silent)
    if not plain and rng.random() < FILLER_SHARE:
        text = _with_fillers(rng, text)
    return _dressed(rng, text)


def captions(attributes: Attributes, seeds: Sequence[int], *, plain: bool = False) -> list[str]:
    """A caption of each clip of a batch, whose attributes are NumPy arrays [B]."""
    first, second, *rest = attributes
    columns = zip(zip(*first, strict=True), zip(*second, strict=True), *rest, seeds, strict=True)
    return [
        caption(Attributes(Thing(*one), Thing(*other), *others), seed, plain=plain)
        for one, other, *others, seed in columns
    ]


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word and punctuation mark of the grammar, in alphabetical order; fillers are none of them."""
    tables = (COLOUR_WORDS, SHAPE_WORDS, BACKGROUND_WORDS, GRADED_WORDS, SIZE_WORDS, SPEED_WORDS, DIRECTIONS)
    phrases = [phrase for table in tables for row in table.values() for phrase in row]
    phrases += [form for forms in (TRAVELLING, *ACTIONS.values()) for pair in forms for form in pair]
    phrases += [*BEFORE_BACKGROUND, *OPENINGS, *_TEMPLATE_WORDS]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


# Phrases


def _noun(rng: random.Random, thing: Thing, *, article: bool = True) -> str:
    """Such as "a small red circle"; the size is said of half of the small and large ones."""
    size = list(SIZES)[int(thing.size)]
    says_size = SIZE_WORDS[size] and list(MOTIONS.values())[int(thing.motion)][2] == 0 and rng.random() < 0.5
    words = [rng.choice(SIZE_WORDS[size])] if says_size else []
    words.append(rng.choice(COLOUR_WORDS[list(COLOURS)[int(thing.colour)]]))
    words += ["colored"] if rng.random() < 0.03 else []
    words.append(rng.choice(SHAPE_WORDS[SHAPES[int(thing.shape)]]))
    text = " ".join(words)
    return _with_article(rng, text) if article else text


def _with_article(rng: random.Random, text: str) -> str:
    if rng.random() < 0.1:
        return f"the {text}"
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _motion(rng: random.Random, thing: Thing, *, finite: bool) -> str:
    """Such as "moving slowly to the right", or "moves …"; the speed is said of half of the slow and fast travellers."""
    motion = list(MOTIONS)[int(thing.motion)]
    adverbs = SPEED_WORDS[list(SPEEDS)[int(thing.speed)]] if motion in DIRECTIONS else ()
    own = ACTIONS.get(motion, ())
    if motion not in DIRECTIONS or own and rng.random() < 0.25:
        verb, direction = rng.choice(own)[finite], ""
    else:
        verb, direction = rng.choice(TRAVELLING)[finite], rng.choice(DIRECTIONS[motion])
    words = [verb, direction]
    if adverbs and rng.random() < 0.5:
        adverb = rng.choice(adverbs)
        words.insert(rng.choice((1, 2) if adverb == "fast" else (0, 1, 2)), adverb)
    return " ".join(word for word in words if word)


class _Background(NamedTuple):
    """One clip's background in words; whether it is plain or graded is said now and then."""

    noun: str  # "blue background"
    place: str  # "on a blue background", or "on blue"
    aside: str  # "blue background" or "a blue background"
    sentence: str  # "the background is blue"


def _background(rng: random.Random, attributes: Attributes) -> _Background:
    word = rng.choice(BACKGROUND_WORDS[list(BACKGROUNDS)[int(attributes.background)]])
    if rng.random() < 0.15:
        word = f"{rng.choice(GRADED_WORDS[bool(attributes.graded)])} {word}"
    noun = f"{word} background"
    place = rng.choice(BEFORE_BACKGROUND)
    short = place in ("on", "over") and rng.random() < 0.2
    return _Background(
        noun=noun,
        place=f"{place} {word if short else _with_article(rng, noun)}",
        aside=noun if rng.random() < 0.5 else _with_article(rng, noun),
        sentence=f"the background is {word}",
    )


# Sentences


def _one(rng: random.Random, thing: Thing, back: _Background, silent: bool) -> str:
    """A caption of one object."""
    noun, bare = _noun(rng, thing), _noun(rng, thing, article=False)
    doing, does = _motion(rng, thing, finite=False), _motion(rng, thing, finite=True)
    if silent:
        return rng.choice((f"{noun} {doing}", f"{noun} {does}", f"{noun} {back.place}", f"{bare}, {back.noun}", noun))
    keywords = [bare, doing, back.noun]
    rng.shuffle(keywords)
    colour, shape = (rng.choice(words) for words in _words_of(thing))
    either = rng.choice((doing, does))
    return _pick(rng, {
        f"{noun} {doing} {back.place}": 5,
        f"{noun} {does} {back.place}": 4,
        f"{noun} {back.place} {doing}": 1,
        f"{noun} {back.place}, {doing}": 1,
        f"{back.place}, {noun} {does}": 2,
        f"{back.aside}, {bare} {either}": 2,
        f"{back.aside} and {noun} {doing}": 1,
        f"{noun} {either}, {back.aside}": 2,
        f"{noun}, {doing}, {back.place}": 1,
        ", ".join(keywords): 2,
        f"{back.sentence} and {noun} {does}": 1,
        f"{noun} {does}. {back.sentence}": 1,
        f"the {shape} is {colour} and {does}, {back.aside}": 1,
        f"{rng.choice(OPENINGS)} {noun} {doing} {back.place}": 2,
    })  # fmt: skip


def _two(rng: random.Random, attributes: Attributes, back: _Background) -> str:
    """A caption of two objects, named in any order."""
    things = [attributes.first, attributes.second]
    rng.shuffle(things)
    nouns = [_noun(rng, thing) for thing in things]
    doing = [f"{noun} {_motion(rng, thing, finite=False)}" for noun, thing in zip(nouns, things, strict=True)]
    does = [f"{noun} {_motion(rng, thing, finite=True)}" for noun, thing in zip(nouns, things, strict=True)]
    return _pick(rng, {
        f"{doing[0]} and {doing[1]} {back.place}": 4,
        f"{does[0]} and {does[1]} {back.place}": 3,
        f"{back.place}, {does[0]} and {does[1]}": 2,
        f"{back.aside}, {doing[0]}, {doing[1]}": 1,
        f"{doing[0]}, {doing[1]}, {back.aside}": 1,
        f"{does[0]}; {does[1]}. {back.sentence}": 1,
        f"{rng.choice(OPENINGS)} {doing[0]} and {doing[1]} {back.place}": 1,
    })  # fmt: skip


def _words_of(thing: Thing) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return COLOUR_WORDS[list(COLOURS)[int(thing.colour)]], SHAPE_WORDS[SHAPES[int(thing.shape)]]


def _pick(rng: random.Random, weights: dict[str, int]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _with_fillers(rng: random.Random, text: str) -> str:
    """One to three words that mean nothing, anywhere; a third of them are no words at all."""
    words = text.split()
    for _ in range(rng.randint(1, 3)):
        filler = rng.choice(FILLERS)
        if rng.random() < 0.33:
            filler = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=rng.randint(2, 8)))
        words.insert(rng.randint(0, len(words)), filler)
    return " ".join(words)


def _dressed(rng: random.Random, text: str) -> str:
    """With a full stop now and then, and sometimes with a capital too."""
    if rng.random() < 0.6:
        return text
    return f"{text[0].upper() if rng.random() < 0.25 else text[0]}{text[1:]}."
