"""Views: what a file holds in a form of its own, as the tensors that rule tables know. No number is read for it.

Names lose the prefixes of those who saved them, numbers of 8 bits their scales, and the tensors of the original image
encoder are cut into the shapes that it has here. Each step maps tensors by name to others; `as_known` does all of them.
Sources: ComfyUI's comfy/ops.py and comfy/quant_ops.py, LightX2V's converter (both for fp8), and the published files.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxwan.convert.gguf_files import text_encoder_names
from jaxwan.convert.rules import CheckpointError, Shape
from jaxwan.convert.save import Piece
from jaxwan.convert.tensors import DTYPES, Extent, Reader, Stored

Tensors = Mapping[str, Stored]

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.")
_INFIX = re.compile(r"(^|(?<=\.))(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
TOKENIZER = "spiece_model"  # no weights: SentencePiece's file, in ComfyUI's text encoders
_FP8 = (DTYPES["F8_E4M3"], DTYPES["F8_E5M2"])
_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's older name; its newer one and LightX2V's
_FOR_ACTIVATIONS = ("scale_input", "input_scale")  # of products in fp8, which are not computed here
_SCALE = re.compile(r"(^|[._])scale(_inv|_weight|_\d+)?$")
_NO_SCALES = ("log_scale", "logit_scale")  # of weights: CLIP's
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_FLOATS = (DTYPES["F32"], DTYPES["BF16"], DTYPES["F16"])
_METADATA = "_quantization_metadata"
_MOST_NOTE = 10_000  # bytes of a comfy_quant note
PLAIN = "take the file in bfloat16, float16 or fp8_scaled"


def as_known(tensors: Tensors, reader: Reader, *, what: str) -> dict[str, Stored]:
    """Tensors under the names, and of the kinds, that rule tables know.

    Raises CheckpointError, in a sentence that begins with `what`, for two tensors of one name and for kinds of
    quantisation that are not decoded.
    """
    tensors = _renamed(tensors, _without_prefix(tensors), what)
    tensors.pop(TOKENIZER, None)
    names = text_encoder_names(tensors)
    tensors = _renamed(tensors, lambda name: names.get(name, name), what)
    tensors = _decoded(tensors, reader, what)
    return _image_encoder(tensors)


# Names


def _without_prefix(names: Tensors) -> Callable[[str], str]:
    """A name without what wrapped the model where it was saved: what most names begin with, and wrappers anywhere."""
    bare = list(map(unwrapped, names))
    prefix = next((p for p in _PREFIXES if sum(name.startswith(p) for name in bare) > len(bare) / 2), "")
    return lambda name: unwrapped(name).removeprefix(prefix)


def unwrapped(name: str) -> str:
    """A name without the wrappers that training and compiling leave in it."""
    return _INFIX.sub("", name)


def _renamed(tensors: Tensors, rename: Callable[[str], str], what: str) -> dict[str, Stored]:
    renamed: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if rename(name) in renamed:
            raise CheckpointError(f"{what} holds {rename(name)} twice, once as {name}")
        renamed[rename(name)] = tensor
    return renamed


# Numbers of 8 bits


@dataclass(frozen=True)
class Decoded:
    """Numbers of 8 bits, times a scale (None: 1) for all or for each row, as float32."""

    numbers: Stored
    scale: Stored | None
    dtype = DTYPES["F32"]

    @property
    def shape(self) -> Shape:
        """Of the numbers."""
        return self.numbers.shape

    @property
    def num_bytes(self) -> int:
        """Of the numbers and their scales, as they are stored."""
        return self.numbers.num_bytes + (0 if self.scale is None else self.scale.num_bytes)

    def rows(self, rows: slice) -> "Decoded":
        """These rows, with their scales alone."""
        by_row = self.scale is not None and _size(self.scale) > 1
        return Decoded(self.numbers.rows(rows), self.scale.rows(rows) if by_row and self.scale else self.scale)

    def read(self, reader: Reader) -> np.ndarray:
        """The products, each rounded once. Raises CheckpointError where the file ends within the tensor."""
        codes = self.numbers.read(reader)
        values = np.arange(256, dtype=np.uint8).view(self.dtype_on_disk).astype(np.float32)  # of all 256 codes
        scale = np.float32(1) if self.scale is None else self.scale.read(reader).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # of codes that mean infinity or none
            if np.size(scale) == 1:
                return np.asarray((values * scale.reshape(()))[codes.view(np.uint8)])  # a scalar stays an array
            decoded = np.asarray(values[codes.view(np.uint8)])
            decoded *= scale.reshape(-1, *[1] * (decoded.ndim - 1))
            return decoded

    @property
    def dtype_on_disk(self) -> np.dtype:
        """Of the numbers."""
        return self.numbers.dtype


def _size(tensor: Stored) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64))


def _decoded(tensors: Tensors, reader: Reader, what: str) -> dict[str, Stored]:
    """fp8 as float32, by the scales beside it; scales and notes of what was decoded are gone."""
    if not any(tensor.dtype in _FP8 for tensor in tensors.values()) and not _notes(tensors):
        return dict(tensors)
    _check_notes(tensors, reader, what)
    # one says of all what the dtypes say, the others are of products in fp8
    done = {"scaled_fp8"} | {name for name in tensors if name.rpartition(".")[2] in _FOR_ACTIVATIONS}
    decoded: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if tensor.dtype in _FP8:
            layer = name.removesuffix(".weight")
            scales = [s for s in (f"{layer}.{end}" for end in _SCALES) if s in tensors] if layer != name else []
            done |= {*scales, f"{layer}.comfy_quant"}
            decoded[name] = Decoded(tensor, _scale_of(name, tensor, [tensors[s] for s in scales], what))
        else:
            decoded[name] = tensor
    decoded = {name: tensor for name, tensor in decoded.items() if name not in done}
    for name in decoded:
        if _SCALE.search(name) and name not in _NO_SCALES:
            raise CheckpointError(f"{what} holds {name}, a scale of weights in a form that is not read: {PLAIN}")
    return decoded


def _scale_of(name: str, tensor: Stored, scales: list[Stored], what: str) -> Stored | None:
    if not scales:
        return None
    (scale, *others) = scales
    rows = tensor.shape[:1]
    by_row = _size(scale) == 1 or (scale.shape[:1] == rows and _size(scale) == rows[0])
    if others or scale.dtype not in _FLOATS or not by_row:
        kinds = "mxfp8, which is not read" if scale.dtype == DTYPES["F8_E8M0"] else "not one for all or one a row"
        raise CheckpointError(f"{what}: scales {scale.shape} of {name} {tensor.shape} are {kinds}: {PLAIN}")
    return scale


def _notes(tensors: Tensors) -> list[str]:
    return [name for name in tensors if name.endswith(".comfy_quant")]


def _check_notes(tensors: Tensors, reader: Reader, what: str) -> None:
    """Raises CheckpointError for the first format, of those that ComfyUI notes beside tensors, that is not decoded."""
    for name in _notes(tensors):
        note = tensors[name]
        try:
            if note.dtype != DTYPES["U8"] or note.num_bytes > _MOST_NOTE:
                raise ValueError("it is no text")
            said: Any = json.loads(note.read(reader).tobytes().decode())
            kind, rotated = said["format"], said.get("convrot", False)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{what}: {name} does not say how it is quantised ({error!r:.80})") from error
        _check_format(kind, rotated, what)


def _check_format(kind: Any, rotated: Any, what: str) -> None:
    if kind not in _FORMATS or rotated:
        told = f"{kind!r:.40}{' with convrot' if rotated else ''}"
        raise CheckpointError(f"{what} holds weights quantised as {told}, which is not read: {PLAIN}")


def check_metadata(metadata: Mapping[str, Any], *, what: str) -> None:
    """Raises CheckpointError where a header's metadata say, as ComfyUI writes it there instead of notes beside tensors,
    that weights are quantised in a format that is not decoded."""
    if _METADATA not in metadata:
        return
    try:
        layers = json.loads(metadata[_METADATA])["layers"]
        formats = [(said["format"], said.get("convrot", False)) for said in layers.values()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{what}: its {_METADATA} do not say how it is quantised ({error!r:.80})") from error
    for kind, rotated in formats:
        _check_format(kind, rotated, what)


# The original image encoder

_ONES = {"visual.cls_embedding": (1, 1), "visual.pos_embedding": (1,)}  # axes that ours does not have


def _image_encoder(tensors: Tensors) -> dict[str, Stored]:
    """Its one tensor for queries, keys and values is cut into three, and axes of size 1 are gone."""
    if "visual.cls_embedding" not in tensors:
        return dict(tensors)
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        layer, fused, kind = name.partition(".attn.to_qkv.")
        if fused and tensor.shape and tensor.shape[0] % 3 == 0:
            size = tensor.shape[0] // 3
            for i, part in enumerate("qkv"):
                found[f"{layer}.attn.to_{part}.{kind}"] = tensor.rows(slice(i * size, (i + 1) * size))
        elif (ones := _ONES.get(name)) and tensor.shape[: len(ones)] == ones and isinstance(tensor, Extent):
            found[name] = replace(tensor, shape=tensor.shape[len(ones) :])
        else:
            found[name] = tensor
    return found


_PART = re.compile(r"(.*\.attn\.to_)([qkv])(\..*)")


def fuse_image_encoder(pieces: Iterable[Piece]) -> list[Piece]:
    """The way back, of tensors that are to be written: three become one, and axes of size 1 are there again."""
    found: dict[str, Piece] = {}
    parts: dict[str, dict[str, Piece]] = {}
    for piece in pieces:
        if part := _PART.fullmatch(piece.name):
            name = f"{part[1]}qkv{part[3]}"
            parts.setdefault(name, {})[part[2]] = piece
            if len(parts[name]) == 3:
                found[name] = _in_one(name, [parts[name][p] for p in "qkv"])
        elif piece.name in _ONES:
            found[piece.name] = _with_ones(piece, _ONES[piece.name])
        else:
            found[piece.name] = piece
    return list(found.values())


def _in_one(name: str, parts: Sequence[Piece]) -> Piece:
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    dtype = np.dtype(jnp.promote_types(jnp.promote_types(parts[0].dtype, parts[1].dtype), parts[2].dtype))
    return Piece(name, shape, dtype, lambda: np.concatenate([part.make().astype(dtype) for part in parts]))


def _with_ones(piece: Piece, ones: Shape) -> Piece:
    shape = (*ones, *piece.shape)
    return piece._replace(shape=shape, make=lambda: piece.make().reshape(shape))
