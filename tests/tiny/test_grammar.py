"""Attributes, held-out pairs and captions."""

import re
from collections import Counter
from itertools import product

import jax
import numpy as np
import pytest

from jaxwan.tiny import attributes as att
from jaxwan.tiny import grammar

SHARE = 0.02  # what 2,000 draws may miss a share by: over three standard deviations


@pytest.fixture(scope="module")
def drawn():
    """Attributes of 2,000 training clips."""
    made = jax.jit(jax.vmap(att.draw_attributes))(jax.random.split(jax.random.key(3), 2000))
    return jax.tree.map(np.asarray, made)


def one(drawn, i):
    return jax.tree.map(lambda x: x[i], drawn)


def test_the_values_are_those_that_the_model_card_promises():
    assert {"red", "green", "blue", "yellow"} <= set(att.COLOURS) and len(att.COLOURS) >= 6
    assert {"circle", "square", "triangle"} <= set(att.SHAPES) and len(att.SHAPES) >= 4
    assert {"left", "right", "up", "down", "growing", "shrinking", "still"} <= set(att.MOTIONS)
    assert sum(x != 0 and y != 0 for x, y, _ in att.MOTIONS.values()) == 2
    assert {"black", "white", "gray", "blue"} <= set(att.BACKGROUNDS)


def test_a_tenth_of_the_pairs_is_held_out_and_no_value_often():
    for pairs, first, second in (
        (att.HELD_OUT_COLOUR_SHAPE, att.COLOURS, att.SHAPES),
        (att.HELD_OUT_SHAPE_MOTION, att.SHAPES, att.MOTIONS),
    ):
        assert 0.08 < len(pairs) / (len(first) * len(second)) < 0.13
        assert all(a in first and b in second for a, b in pairs)
        assert max(Counter(value for pair in pairs for value in pair).values()) == 1


def test_the_two_tables_are_all_combinations_without_an_object_in_its_backgrounds_colour():
    seen, held_out = (set(map(tuple, att.combinations(kind).tolist())) for kind in (False, True))
    allowed = {
        row for row in product(*(range(len(att.VALUES[name])) for name in att.READ))
        if att.names(row)["colour"] != att.names(row)["background"]
    }  # fmt: skip
    assert seen | held_out == allowed and not seen & held_out
    assert all(att.has_held_out_pair(*list(att.names(row).values())[:3]) for row in held_out)


def test_training_draws_no_held_out_pair_in_either_object(drawn):
    table = set(map(tuple, att.combinations().tolist()))
    for thing in (drawn.first, drawn.second):
        rows = np.stack([thing.colour, thing.shape, thing.motion, drawn.background], axis=1)
        assert set(map(tuple, rows.tolist())) <= table
    assert (drawn.first.colour != drawn.second.colour).all()
    assert abs(drawn.two.mean() - att.TWO_OBJECTS) < SHARE and att.TWO_OBJECTS <= 0.15


def test_every_value_is_drawn(drawn):
    for values, names in ((drawn.first.size, att.SIZES), (drawn.second.speed, att.SPEEDS), (drawn.graded, "no yes")):
        assert set(np.unique(values).tolist()) == set(range(2 if names == "no yes" else len(names)))
    for name, values in zip(att.READ, (*drawn.first[:3], drawn.background), strict=True):
        assert set(values.tolist()) == set(range(len(att.VALUES[name])))


def test_a_given_row_is_what_the_clip_shows():
    row = np.array(att.combinations(True)[7])
    made = att.draw_attributes(jax.random.key(0), jax.numpy.asarray(row), two_objects=0.0)
    np.testing.assert_array_equal(att.row_of(made), row)
    assert not made.two


def words(text):
    return re.findall(r"[a-z0-9]+|[.,;]", text.lower())


def mentioned(text, table):
    """Names of a table of words that stand in a text."""
    return {name for name, synonyms in table.items() if set(synonyms) & set(words(text))}


def test_plain_captions_name_all_four_attributes_truly_in_known_words(drawn):
    motions = {
        name: [f"{verb} {way}" for verb in ("",) for way in grammar.DIRECTIONS.get(name, ())]
        + [phrase for pair in grammar.ACTIONS.get(name, ()) for phrase in pair]
        for name in att.MOTIONS
    }
    for i in np.flatnonzero(~drawn.two)[:600]:
        clip = one(drawn, i)
        text = grammar.caption(clip, int(i), plain=True)
        truth = att.names(att.row_of(clip))
        assert set(words(text)) <= set(grammar.vocabulary()), text
        assert mentioned(text, grammar.SHAPE_WORDS) == {truth["shape"]}
        colours = mentioned(text, grammar.COLOUR_WORDS) | mentioned(text, grammar.BACKGROUND_WORDS)
        assert colours == {truth["colour"], truth["background"]}, text
        assert (
            any(phrase.strip() in text.lower() for phrase in motions[truth["motion"]])
            or "slowly" in text
            or ({"fast", "quickly"} & set(words(text)))
        ), text  # an adverb may part a verb from its direction


def test_sizes_and_speeds_are_said_of_those_that_have_them_alone(drawn):
    said = Counter()
    for i in np.flatnonzero(~drawn.two):
        clip = one(drawn, i)
        text = grammar.caption(clip, int(i), plain=True)
        sizes = mentioned(
            re.sub("get.*|becom.*|grow.*", "", text), {k: grammar.SIZE_WORDS[k] for k in ("small", "large")}
        )
        speeds = mentioned(text, grammar.SPEED_WORDS)
        assert sizes <= {list(att.SIZES)[clip.first.size]}, text
        assert speeds <= {list(att.SPEEDS)[clip.first.speed]}, text
        travels = list(att.MOTIONS)[clip.first.motion] in grammar.DIRECTIONS
        assert travels or not speeds
        said.update(sizes | speeds)
    assert set(said) == {"small", "large", "slow", "fast"}


def test_captions_of_two_objects_name_both(drawn):
    for i in np.flatnonzero(drawn.two)[:100]:
        clip = one(drawn, i)
        text = grammar.caption(clip, int(i), plain=True)
        wanted = {list(att.COLOURS)[thing.colour] for thing in (clip.first, clip.second)}
        assert wanted <= mentioned(text, grammar.COLOUR_WORDS), text


def test_one_clip_has_many_captions_and_a_seed_always_the_same(drawn):
    clip = one(drawn, int(np.flatnonzero(~drawn.two)[0]))
    texts = [grammar.caption(clip, seed) for seed in range(300)]
    assert len(set(texts)) > 200
    assert len({text.split()[0].lower() for text in texts}) > 5
    assert texts == [grammar.caption(clip, seed) for seed in range(300)]
    assert texts[:3] == grammar.captions(jax.tree.map(lambda x: np.repeat(x, 3), clip), range(3))


def test_some_captions_carry_unknown_words_and_some_leave_something_out(drawn):
    texts = grammar.captions(drawn, range(2000))
    unknown = [not set(words(text)) <= set(grammar.vocabulary()) for text in texts]
    assert abs(np.mean(unknown) - grammar.FILLER_SHARE) < SHARE
    assert not set(grammar.FILLERS) & set(grammar.vocabulary())
    backgrounds = [bool(mentioned(text, grammar.BACKGROUND_WORDS)) for text in texts]
    assert 0.01 < 1 - np.mean(backgrounds) < grammar.SILENT_SHARE
