"""The bundled model's tokenizer: whole words for the grammar, letters and frequent pairs of letters for the rest."""

from pathlib import Path
from string import ascii_lowercase, digits, punctuation

from jaxwan.convert.save import write_json
from jaxwan.tiny.grammar import vocabulary

SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as in Wan's own
MAX_TOKENS = 512

_PAIRS = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro ic "
    "ne ea ra ce li ch ll be ma si om ur ing ion ly ful"
).split()


def write_tokenizer(folder: str | Path) -> int:
    """Write tokenizer.json and its two configurations; returns the number of ids.

    transformers reads them as PreTrainedTokenizerFast, which takes tokenizer.json as it is. It lower-cases and drops
    accents; a character that no piece spells becomes <unk>. There is no byte fallback.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram(_pieces(), unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    # "circle," and "up-right" are cut at their marks, so that each word is found whole
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_TOKENS}
    for name, content in (("special_tokens_map.json", named), ("tokenizer_config.json", named | kind)):
        write_json(folder / name, content)
    return tokenizer.get_vocab_size()


def _pieces() -> list[tuple[str, float]]:
    """(piece, score): a word beats its parts, and the ranks make every score another, so that no two cuts tie."""
    words = [f"▁{word}" for word in vocabulary()]
    marks = [f"▁{mark}" for mark in punctuation if f"▁{mark}" not in words]
    pieces = [(token, 0.0) for token in SPECIAL] + [("▁", -2.0)]
    pieces += [(word, -4.0 - 0.001 * rank) for rank, word in enumerate(words + marks)]
    pieces += [(pair, -7.0 - 0.001 * rank) for rank, pair in enumerate(_PAIRS)]
    pieces += [(letter, -6.0 - 0.001 * rank) for rank, letter in enumerate(ascii_lowercase + digits)]
    return pieces
