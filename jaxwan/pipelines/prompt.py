"""Prompts: cleaned as Diffusers cleans them, tokenized by the checkpoint's own tokenizer.json, encoded."""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxwan.config import Defaults, read_json
from jaxwan.pipelines.telling import warn

MAX_TOKENS = 512  # the length every Wan model was trained with; image-to-video 2.1 even splits its context there


@dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer: `backend` is a tokenizers.Tokenizer that neither cuts nor pads.

    closing: the ids that end every text.
    """

    backend: Any
    pad_id: int
    closing: tuple[int, ...]

    def ids(self, text: str) -> list[int]:
        """Ids of a cleaned text, without the closing ones."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def text(self, ids: list[int]) -> str:
        """What ids spell."""
        return self.backend.decode(ids)


@dataclass(frozen=True)
class SentencePiece(Tokenizer):
    """SentencePiece's own, from the file that ComfyUI's text encoders carry: `backend` is its processor."""

    def ids(self, text: str) -> list[int]:
        """Ids of a cleaned text, without the closing one."""
        return self.backend.encode(text)


def clean_prompt(text: str) -> str:
    """Text as the model saw it in training: broken encodings repaired, HTML unescaped, every white space one blank.

    ftfy also turns full-width and curly characters into ASCII, so Chinese prompts get other tokens without it.
    Source: diffusers pipelines/wan/pipeline_wan.py:prompt_clean.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint's `tokenizer` folder, every id taken from its files.

    Raises FileNotFoundError without tokenizer.json (spiece.model is no substitute: it spells unknown characters as
    bytes where tokenizer.json has one unknown token), ValueError when a file is malformed or the pad token unknown.
    """
    import tokenizers

    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        instead = ", only spiece.model, which gives other tokens" if (folder / "spiece.model").is_file() else ""
        raise FileNotFoundError(f"{folder} has no tokenizer.json{instead}, which prompts need")
    if "model" not in read_json(path):
        raise ValueError(f"{path} describes no tokenizer: it has no 'model'")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} describes no tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    pad = _pad_token(folder)
    pad_id = backend.token_to_id(pad)
    if pad_id is None:
        raise ValueError(f"{path} does not know {pad!r}, the pad_token of its folder")
    closing = backend.encode("").ids
    if backend.encode("a").ids != backend.encode("a", add_special_tokens=False).ids + closing:
        raise ValueError(f"{path} puts tokens before a text, which Wan's does not")
    return Tokenizer(backend, pad_id, tuple(closing))


def load_sentencepiece(model: bytes, vocabulary: int, what: str) -> SentencePiece:
    """The tokenizer of a serialised SentencePiece model, as T5 uses it: a text ends with its end-of-sentence token.

    It spells unknown characters as bytes where a tokenizer.json may have one unknown token. vocabulary: rows of the
    text encoder's table. Raises ValueError, in a sentence that begins with `what`, for what is no such model, and
    where the package sentencepiece is not installed.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ValueError(
            f"{what} brings a tokenizer of its own, which the package sentencepiece reads: `pip install sentencepiece`"
            ", or give another as --component tokenizer=FOLDER (with a tokenizer.json)"
        ) from error
    backend = SentencePieceProcessor()
    try:
        backend.LoadFromSerializedProto(model)
    except (RuntimeError, UnicodeDecodeError) as error:  # the latter of a message that quotes the model
        raise ValueError(
            f"{what} brings no tokenizer that SentencePiece can read ({error!s:.200}): give another as --component "
            "tokenizer=FOLDER (with a tokenizer.json)"
        ) from error
    pad, closing, size = backend.pad_id(), backend.eos_id(), backend.get_piece_size()
    if pad < 0 or closing < 0 or size > vocabulary:
        told = "no token for padding or for the end of a text" if size <= vocabulary else f"{size} tokens"
        raise ValueError(f"{what} brings a tokenizer that has {told}, and a table of {vocabulary} rows")
    return SentencePiece(backend, pad, (closing,))


def check_unicode(text: str, what: str = "the prompt") -> None:
    """Raises ValueError for half a surrogate pair, which JSON and broken command lines can carry."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{what} is no valid Unicode text: {text!r}")


def tell_unknown_words(prompts: Sequence[str | None], defaults: Defaults) -> None:
    """Warn of words that a model of few words does not know."""
    if defaults.vocabulary is None:
        return
    words = re.findall(r"[^\W_]+", " ".join(text or "" for text in prompts).lower())
    unknown = [word for word in dict.fromkeys(words) if word not in defaults.vocabulary]
    if unknown:
        shown = ", ".join(map(repr, unknown[:5])) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        example = f"; it knows those of {defaults.example_prompt!r}" if defaults.example_prompt else ""
        warn(f"the model does not know the word{'s' * (len(unknown) > 1)} {shown}{example}")


def lost_text(tokenizer: Tokenizer, text: str, length: int = MAX_TOKENS) -> str:
    """The end of a text that `tokenize` leaves out, shortened; empty where the text fits."""
    body, room = _encoded(tokenizer, clean_prompt(text), length)
    lost = tokenizer.text(body[room:])
    return lost if len(lost) <= 100 else f"{lost[:60]} … {lost[-30:]}"


def tokenize(
    tokenizer: Tokenizer, text: str, length: int = MAX_TOKENS
) -> tuple[Int[np.ndarray, " l"], Bool[np.ndarray, " l"]]:
    """Token ids of a cleaned text, padded to `length`, and the mask that is true for what is no padding.

    A longer text loses its end (`lost_text`) but keeps the closing token. Raises ValueError like `check_unicode`.
    """
    body, room = _encoded(tokenizer, text, length)
    ids = [*body[:room], *tokenizer.closing]
    padded = np.full(length, tokenizer.pad_id, np.int32)
    padded[: len(ids)] = ids
    return padded, np.arange(length) < len(ids)


Encode = Callable[[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"]], Float[np.ndarray, "b l c"]]


def encode_prompts(
    encode: Encode, tokenizer: Tokenizer, prompts: Sequence[str], *, length: int = MAX_TOKENS
) -> Float[np.ndarray, "b l c"]:
    """Context rows of each prompt, float32 on the host, zero behind its last token.

    encode: the text encoder as a function of (tokens, mask), in which no text's rows depend on the others'. It is
    called once, and prompts that are equal after cleaning are one text.
    Source: diffusers pipelines/wan/pipeline_wan.py:WanPipeline._get_t5_prompt_embeds.
    """
    texts = [clean_prompt(prompt) for prompt in prompts]
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    tokens, mask = map(np.stack, zip(*(tokenize(tokenizer, text, length) for text in places), strict=True))
    rows = np.where(mask[..., None], encode(tokens, mask), np.float32(0))
    return rows[[places[text] for text in texts]]


def _encoded(tokenizer: Tokenizer, text: str, length: int) -> tuple[list[int], int]:
    """The ids of a cleaned text before its closing one, and how many of them have room in `length`."""
    check_unicode(text)
    return tokenizer.ids(text), length - len(tokenizer.closing)


def abstract_prompt(length: int = MAX_TOKENS) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes of a prompt's (tokens, mask), as `encode_prompts` gives the text encoder several of."""
    return jax.ShapeDtypeStruct((length,), np.int32), jax.ShapeDtypeStruct((length,), np.bool_)


def _pad_token(folder: Path) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file() and (token := read_json(folder / name).get("pad_token")) is not None:
            return token["content"] if isinstance(token, dict) else token
    raise ValueError(f"{folder} names no pad_token in tokenizer_config.json or special_tokens_map.json")
