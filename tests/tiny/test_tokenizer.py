"""The bundled model's tokenizer, as jaxwan and as transformers read it."""

import random
import sys

import pytest
import transformers

from jaxwan.pipelines.prompt import clean_prompt, load_tokenizer, tokenize
from jaxwan.schedulers.presets import OFFICIAL_NEGATIVE_PROMPT
from jaxwan.tiny.grammar import FILLERS, vocabulary
from jaxwan.tiny.tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tokenizer"
    assert write_tokenizer(path) <= 600
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    # as diffusers loads ["transformers", "PreTrainedTokenizerFast"] of a model_index.json
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


TEXTS = [
    "",
    "a red circle moving right on a blue background",
    "Blue Background, SMALL red circle goes up-right; it's 100% fine!",
    "cafés über ångström, İstanbul",
    "一只猫 🐈\u200d⬛ \u0301 \ufeff \u202e",
    "</s> the <pad> <unk> <extra_id_0>",
    OFFICIAL_NEGATIVE_PROMPT,
    "word " * 600,
]


@pytest.mark.filterwarnings("ignore:the prompt is longer")
@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers(folder, theirs, text):
    text = clean_prompt(text)
    ids, mask = tokenize(load_tokenizer(folder), text)
    expected = theirs(text, padding="max_length", max_length=512, truncation=True, add_special_tokens=True)
    assert ids.tolist() == expected["input_ids"]
    assert mask.astype(int).tolist() == expected["attention_mask"]


def test_any_unicode_text_is_tokenized_alike(folder, theirs):
    rng, ours = random.Random(0), load_tokenizer(folder)
    usable = [c for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    for _ in range(200):
        text = clean_prompt("".join(map(chr, rng.choices(usable, k=rng.randint(1, 40)))))
        ids, mask = tokenize(ours, text)
        assert ids[mask].tolist() == theirs(text)["input_ids"]
        assert ids[mask][-1] == 1 and ids.max() < ours.backend.get_vocab_size()


def test_every_word_of_the_grammar_is_one_id_in_any_case(folder):
    backend = load_tokenizer(folder).backend
    for word in vocabulary():
        ids = backend.encode(word).ids
        assert len(ids) == 2 and ids[1] == 1 and ids[0] > 2, word
        assert backend.encode(word.upper()).ids == ids
    assert backend.encode("circle,up-right").tokens == ["▁circle", "▁,", "▁up", "▁-", "▁right", "</s>"]


def test_unknown_english_words_are_spelled_without_the_unknown_token(folder):
    backend = load_tokenizer(folder).backend
    for word in FILLERS:
        ids = backend.encode(word).ids
        assert len(ids) > 2 and 2 not in ids, word
    assert backend.encode("").ids == [1]
