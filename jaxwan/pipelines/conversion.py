"""A checkpoint written in another layout: planned from headers, then streamed, tensor by tensor.

Each tensor goes through the parameter that it is: the rule table of its layout forwards, that of the other backwards.
Both hold the same numbers under other names, so a tensor is changed by a dtype that was asked for, and by nothing else.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxwan.config import Variant
from jaxwan.convert.detect import kind_of, layout_rules
from jaxwan.convert.diffusers import CLIP_PREFIX
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import flat_shapes
from jaxwan.convert.orbax import Chunk, orbax_files
from jaxwan.convert.rules import KEEP, Shape, Target, expected_sources, place_all
from jaxwan.convert.save import STEM, File, OnBytes, Piece, sharded_files
from jaxwan.convert.torch_save import torch_file
from jaxwan.convert.views import fuse_image_encoder
from jaxwan.models.layers import abstract
from jaxwan.models.transformer import WanTransformer
from jaxwan.pipelines.checkpoint import Checkpoint, open_checkpoint
from jaxwan.pipelines.folders import appearing, check_target
from jaxwan.pipelines.inspection import stored_dtype
from jaxwan.pipelines.load import prove_components
from jaxwan.pipelines.parts import abstract_components
from jaxwan.pipelines.surroundings import diffusers_surroundings, original_surroundings

LAYOUTS = ("diffusers", "original", "orbax")
DTYPES = ("bfloat16", "float16", "float32")
SHARD = 5 * 10**9  # bytes of a file of tensors
NOISE = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}  # folders of an original repository
T5, CLIP = "models_t5_umt5-xxl-enc-bf16.pth", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
log = logging.getLogger(__name__)


class Tensor(NamedTuple):
    """A tensor of a source: where it is and which parameter's row, the row's shape, and the dtype to write."""

    files: TensorFiles
    key: str
    place: Target
    shape: Shape
    dtype: np.dtype


@dataclass(frozen=True)
class Conversion:
    """What is to be written: all files, of which none is made yet."""

    checkpoint: Checkpoint
    layout: str
    files: tuple[File, ...]
    dtypes: Mapping[str, Mapping[str, int]]  # component -> "F32 as bfloat16" -> how many tensors

    @property
    def num_bytes(self) -> int:
        """Of all files, but for the headers of those with tensors."""
        return sum(file.num_bytes for file in self.files)


def plan_conversion(
    checkpoint: Checkpoint, layout: str, *, dtype: str | None = None, shard_size: int = SHARD
) -> Conversion:
    """What `convert` writes of a checkpoint whose weights are here; only headers are read.

    layout: one of LAYOUTS. dtype: "bfloat16", "float16" or "float32", of DiT and text encoder, but for what Diffusers
    keeps in float32; None: as they are. Of VAE and image encoder they stay. shard_size: bytes of a safetensors file.
    Raises CheckpointError for files that do not fit, ValueError for what the layout cannot hold, and for weights of 8
    or fewer bits without a dtype to write them in.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r:.40} is none of {', '.join(LAYOUTS)}")
    if layout == "original" and checkpoint.num_experts < checkpoint.variant.experts:
        raise ValueError(f"the original layout of {checkpoint.variant.name} has two experts, and this has one")
    files, _ = prove_components(checkpoint)
    tensors = {name: _tensors(checkpoint, name, files[name], dtype) for name in checkpoint.components}
    if layout == "orbax":
        tensors = _alike(tensors, checkpoint.experts)
        planned = [*diffusers_surroundings(checkpoint, dtype), *orbax_files(_rows(checkpoint, tensors))]
    elif layout == "diffusers":
        planned = diffusers_surroundings(checkpoint, dtype)
        for name, own in tensors.items():
            stem = STEM if name in (*checkpoint.experts, "vae") else "model"
            planned += sharded_files(f"{name}/{stem}", _pieces(checkpoint, name, layout, own), shard_size)
    else:
        planned = _original(checkpoint, tensors, shard_size)
    dtypes = {name: dict(Counter(map(_change, own))) for name, own in tensors.items()}
    return Conversion(checkpoint, layout, tuple(planned), dtypes)


def convert(conversion: Conversion, target: Path, *, overwrite: bool = False, progress: OnBytes | None = None) -> Path:
    """Write what was planned into a folder, which appears whole or not at all, with checksums in SHA256SUMS.

    Before it gets its name, it is opened and proved as any checkpoint is. What its layout does not hold is told.
    Raises OSError for a folder that is there, or that the disk has no room for, before anything is written.
    """
    check_target(target, sources_of(conversion.checkpoint), overwrite)
    with appearing(target, conversion.num_bytes, overwrite) as folder:
        folder.write(conversion.files, progress)
        written = open_checkpoint(folder.path)
        prove_components(written)
        for lost in _lost(conversion.checkpoint, written):
            log.warning("the %s layout does not hold %s", conversion.layout, lost)
    return target


def sources_of(checkpoint: Checkpoint) -> list[Path]:
    """What is read of a checkpoint: its folder, and files of parts."""
    return [checkpoint.folder, *(path for _, path in checkpoint.parts)]


def _lost(before: Checkpoint, after: Checkpoint) -> Iterable[str]:
    """What another reader takes to be otherwise, because no file says it."""
    told = "transformer vae text_encoder image_encoder sampler boundary_ratio variant defaults".split()
    for name in told:
        a, b = getattr(before, name), getattr(after, name)
        if a == b:
            continue
        if isinstance(a, Variant) or not hasattr(a, "__dataclass_fields__") or type(a) is not type(b):
            yield f"{name} {_short(a)}: who opens it takes {_short(b)}"
            continue
        for field in fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if x != y:
                yield f"{name}'s {field.name}={_short(x)}: who opens it takes {_short(y)}"


def _short(value: Any) -> str:
    text = str(getattr(value, "name", value))
    return text if len(text) <= 60 else f"{text[:60]}…"


# Tensors


def _tensors(checkpoint: Checkpoint, name: str, files: TensorFiles, dtype: str | None) -> list[Tensor]:
    """What of a component's proved files is written, in the order in which it is read."""
    component = _component(checkpoint, name)
    kind = kind_of(files.shapes)
    assert kind is not None, name  # which was proved
    rules = layout_rules(component, kind.layout, getattr(checkpoint, component), files.shapes, whole=True)
    wanted = _dtypes(checkpoint, name, dtype)
    tensors = []
    for key, place in place_all(files.shapes, rules).items():
        stored = files.tensors[key]
        shape = place.transform.in_parameter(stored.shape)
        own = stored.dtype if wanted is None else wanted[place.path]
        if wanted is None and component in ("transformer", "text_encoder") and _is_decoded(files, key):
            raise ValueError(
                f"{name} is quantised or a sum with LoRAs ({key}), which is computed in float32: say in what it is to "
                "be written, --dtype bfloat16, float16 or float32"
            )
        tensors.append(Tensor(files, key, place, shape, own))
    return tensors


def _change(tensor: Tensor) -> str:
    return f"{stored_dtype(tensor.files.tensors[tensor.key])} as {tensor.dtype.name}"


def _component(checkpoint: Checkpoint, name: str) -> str:
    return "transformer" if name in checkpoint.experts else name


def _is_decoded(files: TensorFiles, key: str) -> bool:
    """Whether a file holds fewer bytes of a tensor than it is read as."""
    stored = files.tensors[key]
    return stored.num_bytes < int(np.prod(stored.shape, dtype=np.int64)) * stored.dtype.itemsize


def _dtypes(checkpoint: Checkpoint, name: str, dtype: str | None) -> dict[str, np.dtype] | None:
    """Path -> what a parameter is in a model of a dtype; None where tensors stay as they are."""
    if dtype is None or name not in (*checkpoint.experts, "text_encoder"):
        return None
    if name == "text_encoder":
        _, state = abstract_components(checkpoint, dtype, "float32")[name]
    else:
        _, state = abstract(WanTransformer, checkpoint.transformer, jnp.dtype(dtype))
    return {path: np.dtype(leaf.dtype) for path, leaf in flat_shapes(state).items()}


def _alike(tensors: Mapping[str, list[Tensor]], experts: Iterable[str]) -> dict[str, list[Tensor]]:
    """The same with one dtype for all rows of a parameter, which holds what each of them does."""
    common: dict[tuple[str, str], np.dtype] = {}
    of = {name: "transformer" if name in experts else name for name in tensors}
    for name, own in tensors.items():
        for tensor in own:
            parameter = of[name], tensor.place.path
            common[parameter] = np.dtype(jnp.promote_types(common.get(parameter, tensor.dtype), tensor.dtype))
    return {
        name: [tensor._replace(dtype=common[of[name], tensor.place.path]) for tensor in own]
        for name, own in tensors.items()
    }


def _rows(checkpoint: Checkpoint, tensors: Mapping[str, list[Tensor]]) -> Iterable[Chunk]:
    for name, own in tensors.items():
        expert = (checkpoint.experts.index(name),) if name in checkpoint.experts else ()
        for tensor in own:
            layer = () if tensor.place.layer is None else (tensor.place.layer,)
            keep = replace(tensor.place, transform=KEEP)
            piece = _piece(tensor, tensor.place.path, keep, tensor.shape)
            yield Chunk(_component(checkpoint, name), (*expert, *layer), piece)


def _pieces(checkpoint: Checkpoint, name: str, layout: str, tensors: Iterable[Tensor]) -> list[Piece]:
    """A component's tensors under the names of a layout."""
    component, tensors = _component(checkpoint, name), list(tensors)
    shapes: dict[str, Shape] = {}
    counts: dict[str, int] = {}
    for tensor in tensors:
        path, layer = tensor.place.path, tensor.place.layer
        shapes[path] = tensor.shape
        if layer is not None:
            counts[path] = max(counts.get(path, 0), layer + 1)
    shapes |= {path: (count, *shapes[path]) for path, count in counts.items()}
    rules = layout_rules(component, layout, getattr(checkpoint, component), {CLIP_PREFIX: ()}, whole=True)
    named = {(into.path, into.layer): (key, into, s) for key, (into, s) in expected_sources(shapes, rules).items()}
    pieces = [_piece(tensor, *named[tensor.place.path, tensor.place.layer]) for tensor in tensors]
    return fuse_image_encoder(pieces) if (component, layout) == ("image_encoder", "original") else pieces


def _piece(tensor: Tensor, name: str, into: Target, shape: Shape) -> Piece:
    def make() -> np.ndarray:
        value = into.transform.invert(tensor.place.transform.apply(tensor.files.read(tensor.key)))
        return value.astype(tensor.dtype, order="C", copy=False)

    return Piece(name, shape, tensor.dtype, make)


def _original(checkpoint: Checkpoint, tensors: Mapping[str, list[Tensor]], most: int) -> list[File]:
    """Files as Wan's own repositories have them."""
    files: list[File] = []
    folders = {name: "" if checkpoint.variant.experts == 1 else f"{NOISE[name]}/" for name in checkpoint.experts}
    whole = {"vae": f"Wan2.{2 if checkpoint.vae.is_residual else 1}_VAE.pth", "text_encoder": T5, "image_encoder": CLIP}
    for name, own in tensors.items():
        pieces = _pieces(checkpoint, name, "original", own)
        files += sharded_files(f"{folders[name]}{STEM}", pieces, most) if name in folders else [
            torch_file(whole[name], pieces)
        ]  # fmt: skip
    return [*original_surroundings(checkpoint, folders.values()), *files]
