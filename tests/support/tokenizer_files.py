"""A small tokenizer folder in the form of the published ones: tokenizer.json of the T5 kind and its two configs."""

import json
from io import BytesIO
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram

SPECIAL = ("<pad>", "</s>", "<unk>")
EXTRA_IDS = 4  # in reverse order at the end of the vocabulary, as in umt5

_WORDS = (
    "▁a ▁the ▁cat ▁dog ▁runs ▁on ▁of ▁in ▁moon ▁red ▁blue ▁slow ▁motion ▁video ▁bright ▁tones ▁static ing ed er s "
    "画面 静止 质量 色调 过曝 人 背景 的 fi fl"
).split()
_CHARACTERS = [
    *"abcdefghijklmnopqrstuvwxyz",
    *"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    *"0123456789",
    *".,!?:;'\"-()&<>/",
    "é",
    "ü",
]


def train_sentencepiece(size: int, **settings) -> bytes:
    """A serialised SentencePiece model of so many pieces, with T5's special ids."""
    from sentencepiece import SentencePieceTrainer

    model, text = BytesIO(), " ".join([*_WORDS, *_CHARACTERS]).replace("▁", "")
    SentencePieceTrainer.train(
        sentence_iterator=iter([text, text[::-1]] * 4), model_writer=model, vocab_size=size, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=9, hard_vocab_limit=False, **settings,
    )  # fmt: skip
    return model.getvalue()


def write_tokenizer(folder: Path) -> int:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json; returns the size of the vocabulary.

    Ids: <pad> 0, </s> 1, <unk> 2; whatever the pieces do not spell is <unk>. There is no normalizer, because
    transformers 5 rebuilds T5 tokenizers from the vocabulary and keeps none but sentencepiece's compiled table.
    """
    extra = [f"<extra_id_{i}>" for i in reversed(range(EXTRA_IDS))]
    pieces = [(token, 0.0) for token in SPECIAL]
    pieces += [("▁", -2.0)] + [(word, -3.0 - 0.01 * i) for i, word in enumerate(_WORDS)]
    pieces += [(character, -6.0 - 0.01 * i) for i, character in enumerate(_CHARACTERS)]
    pieces += [(token, 0.0) for token in extra]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens([*SPECIAL, *extra])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": extra[::-1]}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**named, "tokenizer_class": "T5TokenizerFast", "extra_ids": EXTRA_IDS, "model_max_length": 512})
    )
    return tokenizer.get_vocab_size()
