"""Prompt cleaning, tokens and context rows against diffusers and transformers."""

import contextlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from diffusers.pipelines.wan.pipeline_wan_i2v import prompt_clean
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizer_files import train_sentencepiece, write_tokenizer
from transformers import AutoTokenizer

from jaxwan.pipelines.prompt import (
    clean_prompt,
    encode_prompts,
    load_sentencepiece,
    load_tokenizer,
    lost_text,
    tokenize,
)
from jaxwan.schedulers.presets import OFFICIAL_NEGATIVE_PROMPT

NASTY = [
    "",
    " \t\n ",
    "  two   cats \n\n on\ta\u00a0\u3000moon\u2028now \ufeff",
    OFFICIAL_NEGATIVE_PROMPT,
    "一只猫，在月球上！“你好”（Ｗａｎ２．２）",
    "‘curly’ “quotes” – and — dashes… it’s",
    "ﬁne ﬂow oﬃce ½ ① ㎏",
    "&lt;b&gt; &amp;amp; &amp;lt; &#8217; &eacute; &nbsp; x",
    "sch\u00c3\u00b6n caf\u00c3\u00a9 \u00e2\u20ac\u0153quoted\u00e2\u20ac\u009d",
    "e\u0301 combining, \u200bzero\u200dwidth, \x07bell, \x1b[31mred\x1b[0m",
    "emoji 🐈\u200d⬛ and \U0001f1e9\U0001f1ea, unpaired \ud83d",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tokenizer"
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.mark.parametrize("text", NASTY)
def test_cleaning_equals_diffusers(text):
    assert clean_prompt(text) == prompt_clean(text)


def test_cleaning_turns_the_official_negative_prompt_into_ascii_commas():
    assert OFFICIAL_NEGATIVE_PROMPT.count("，") == 27
    assert clean_prompt(OFFICIAL_NEGATIVE_PROMPT) == OFFICIAL_NEGATIVE_PROMPT.replace("，", ",")


@pytest.mark.parametrize("text", [*NASTY[:-1], "a cat runs on the moon", "<extra_id_2> of </s> the <pad>"])
def test_tokens_equal_tokenizer_json_and_transformers(folder, tokenizer, text):
    text = clean_prompt(text)
    ids, mask = tokenize(tokenizer, text, 512)
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert ids.dtype == np.int32
    assert ids.tolist() == plain + [0] * (512 - len(plain))
    assert mask.tolist() == [True] * len(plain) + [False] * (512 - len(plain))
    theirs = AutoTokenizer.from_pretrained(folder)(text, padding="max_length", max_length=512, truncation=True)
    assert (ids.tolist(), mask.astype(int).tolist()) == (theirs.input_ids, theirs.attention_mask)


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no valid Unicode"):
        tokenize(tokenizer, NASTY[-1])


@pytest.mark.parametrize("length", [2, 7, 40])
def test_truncation_equals_transformers_and_what_is_lost_can_be_asked_for(folder, tokenizer, length):
    text = "a cat runs on the moon, slow motion video of " * 4 + "the dog"
    assert lost_text(tokenizer, text, length).endswith("the dog")
    ids, mask = tokenize(tokenizer, text, length)
    theirs = AutoTokenizer.from_pretrained(folder)(text, max_length=length, truncation=True)
    assert ids.tolist() == theirs.input_ids
    assert ids[-1] == 1 and mask.all()


def test_a_text_that_just_fits_is_not_cut(tokenizer):
    text = "a cat runs on the moon"  # six words and the closing token
    assert tokenize(tokenizer, text, 7)[1].all() and lost_text(tokenizer, text, 7) == ""
    assert lost_text(tokenizer, text, 6) == "moon"


def rewritten(folder, target, name, **changes):
    """A copy of a tokenizer folder with keys of one of its files changed, or removed where None."""
    for path in folder.iterdir():
        data = json.loads(path.read_text())
        if path.name == name:
            data = {key: value for key, value in (data | changes).items() if value is not None}
        (target / path.name).write_text(json.dumps(data))
    return target


@pytest.mark.parametrize("text", ["[]", '{"model": 3}', "{"])
def test_a_malformed_tokenizer_is_refused_in_a_sentence(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer.json (describes no tokenizer|holds a list|is no JSON)"):
        load_tokenizer(tmp_path)


def test_the_pad_id_is_looked_up_and_not_assumed(folder, tmp_path):
    copy = rewritten(folder, tmp_path, "tokenizer_config.json", pad_token={"content": "<extra_id_0>", "lstrip": False})
    tokenizer = load_tokenizer(copy)
    assert tokenizer.pad_id == tokenizer.backend.token_to_id("<extra_id_0>") != 0
    assert tokenize(tokenizer, "a cat", 5)[0].tolist()[3:] == [tokenizer.pad_id] * 2


def test_the_pad_token_may_stand_in_the_special_tokens_map_alone(folder, tmp_path):
    assert load_tokenizer(rewritten(folder, tmp_path, "tokenizer_config.json", pad_token=None)).pad_id == 0


def test_truncation_and_padding_stored_in_tokenizer_json_are_ignored(folder, tmp_path):
    stored = dict(direction="Left", max_length=3, strategy="LongestFirst", stride=0)
    copy = rewritten(folder, tmp_path, "tokenizer.json", truncation=stored)
    assert tokenize(load_tokenizer(copy), "a cat runs on the moon", 8)[1].sum() == 7


def test_a_folder_without_tokenizer_json_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json, which prompts need"):
        load_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="only spiece.model, which gives other tokens"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json is no JSON file"),
        ("tokenizer.json", "{}", "describes no tokenizer"),
        ("tokenizer_config.json", '{"pad_token": "<blank>"}', "does not know '<blank>'"),
    ],
)
def test_a_malformed_tokenizer_file_is_refused_by_name(folder, tmp_path, name, content, message):
    rewritten(folder, tmp_path, "")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_begins_a_text_is_refused(folder, tmp_path):
    first = [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}
    template = {"type": "TemplateProcessing", "single": first, "pair": first, "special_tokens": special}
    rewritten(folder, tmp_path, "tokenizer.json", post_processor=template)
    with pytest.raises(ValueError, match="tokenizer.json puts tokens before a text"):
        load_tokenizer(tmp_path)


def test_a_folder_that_names_no_pad_token_is_refused(folder, tmp_path):
    rewritten(folder, tmp_path, "tokenizer_config.json", pad_token=None)
    (tmp_path / "special_tokens_map.json").unlink()
    with pytest.raises(ValueError, match="names no pad_token"):
        load_tokenizer(tmp_path)


# SentencePiece's own


@pytest.fixture(scope="module")
def serialised():
    return train_sentencepiece(400, byte_fallback=True)


@pytest.mark.parametrize("text", [*NASTY[:-1], "a cat runs on the moon", "of </s> the <pad> <0x41> ☃"])
def test_sentencepiece_gives_its_own_ids_and_the_closing_one(serialised, text):
    text = clean_prompt(text)
    ids, mask = tokenize(load_sentencepiece(serialised, 400, "x"), text)
    theirs = SentencePieceProcessor(model_proto=serialised, add_eos=True).encode(text)
    assert theirs[-1] == 1 and len(theirs) < 512
    assert ids.tolist() == theirs + [0] * (512 - len(theirs)) and ids.dtype == np.int32
    assert mask.sum() == len(theirs) and mask[: len(theirs)].all()


def test_sentencepiece_spells_unknown_characters_as_bytes(serialised):
    tokenizer = load_sentencepiece(serialised, 400, "x")
    ids = tokenizer.ids("a ☃")
    assert [tokenizer.backend.id_to_piece(i) for i in ids[-3:]] == ["<0xE2>", "<0x98>", "<0x83>"]
    assert lost_text(tokenizer, "a cat on a ☃", len(tokenizer.ids("a cat on a")) + 1) == "☃"


def test_what_is_no_sentencepiece_model_is_refused_in_a_sentence(serialised, monkeypatch):
    for model, size, words in (
        (b"junk", 400, "x brings no tokenizer that SentencePiece can read .*: give another as --component tokenizer="),
        (serialised[:-9], 400, "x brings no tokenizer that SentencePiece can read"),
        (serialised, 300, "x brings a tokenizer that has 3.. tokens, and a table of 300 rows"),
    ):
        with pytest.raises(ValueError, match=words):
            load_sentencepiece(model, size, "x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="`pip install sentencepiece`, or give another as --component tokenizer=FOLD"):
        load_sentencepiece(serialised, 400, "x")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_sentencepiece_model_is_read_or_refused(serialised, data):
    model = bytearray(serialised)
    for _ in range(data.draw(st.integers(1, 3))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        tokenize(load_sentencepiece(bytes(model), 400, "x"), "a red cat ☃")


@pytest.fixture
def encoder():
    """A stand-in for the text encoder that counts its calls; every row depends on all visible tokens of its text."""
    calls = []

    @jax.jit
    def rows(tokens, mask):
        total = jnp.where(mask, tokens, 0).sum(-1, keepdims=True)
        return (tokens + total)[..., None] * jnp.ones(3, jnp.bfloat16) + 1

    def encode(tokens, mask):
        calls.append(tokens.shape)
        return np.asarray(rows(tokens, mask), np.float32)

    return encode, calls


def test_prompts_are_encoded_together_and_equal_ones_once(tokenizer, encoder):
    encode, calls = encoder
    context = encode_prompts(encode, tokenizer, ["a cat", "", " a  cat\n", "the dog"])
    assert context.shape == (4, 512, 3) and context.dtype == np.float32
    assert calls == [(3, 512)]
    np.testing.assert_array_equal(context[0], context[2])
    np.testing.assert_array_equal(context[3], encode_prompts(encode, tokenizer, ["the dog"])[0])


def test_rows_behind_the_last_token_are_zero(tokenizer, encoder):
    context = np.asarray(encode_prompts(encoder[0], tokenizer, ["a cat", ""], length=16), np.float32)
    assert (context != 0).any(-1).sum(-1).tolist() == [3, 1]  # two words and </s>; </s> alone
    assert (context[0, :3] != 0).all() and not context[0, 3:].any()
