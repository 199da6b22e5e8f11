"""Loading: checkpoints of a preset's transformer in every layout, made on the spot, onto the device."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwan.bench.item import Item, dtype
from jaxwan.bench.measure import POOL, compilations, memory, seconds_of
from jaxwan.bench.presets import Preset
from jaxwan.bench.report import Row
from jaxwan.config import TransformerConfig
from jaxwan.convert.detect import layout_rules
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import flat_shapes
from jaxwan.convert.orbax import FOLDER as ORBAX
from jaxwan.convert.orbax import Chunk, Part, orbax_files
from jaxwan.convert.rules import Shape, expected_sources
from jaxwan.convert.save import File, Piece, safetensors_file, sharded_files
from jaxwan.convert.tensors import DTYPES
from jaxwan.convert.torch_save import torch_file
from jaxwan.pipelines.conversion import SHARD
from jaxwan.pipelines.dit import abstract_weights, load_weights
from jaxwan.sharding.mesh import MeshSpec, make_mesh

BYTES = 2  # of a bfloat16, the dtype of the published checkpoints
LAYOUTS = ("Diffusers", "original .pth", "one file of scaled fp8", "Orbax")
_FP8 = DTYPES["F8_E4M3"]


def measure_load(item: Item) -> Iterator[Row]:
    """GB/s and peak memory, from the disk and from the system's page cache, of as many layers as fit the size, in every
    layout; beside it the disk's own GB/s, where the same files are read and nothing else is done."""
    cfg = _of_size(item.preset)
    size = sum(BYTES * int(np.prod(shape)) for shape in _shapes(cfg).values())
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            free = shutil.disk_usage(folder).free
            if free < 2 * size:
                reason = f"the checkpoint takes {size / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB left (TMPDIR)"
                yield item.no_row(layout, "skipped", reason)
                continue
            for file in _files(layout, cfg):
                file.write_to(Path(folder))
            yield from _measure(item, layout, cfg, Path(folder))


def _measure(item: Item, layout: str, cfg: TransformerConfig, folder: Path) -> Iterator[Row]:
    def load() -> Any:
        return load_weights(cfg, [_tensors(layout, folder)], make_mesh(MeshSpec()), dtype())

    paths = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in paths)
    jax.block_until_ready(load())  # what is compiled once a process
    for part, prepare in (("from disk", lambda: _forget(paths)), ("from the page cache", lambda: None)):
        seconds, alone, peaks, compiling = [], [], [], []
        for _ in range(item.runs):
            prepare()
            alone += seconds_of(lambda: _read(paths), 1, warmups=0)
            prepare()
            counted = _reset_peak()
            with compilations() as programs:
                seconds += seconds_of(load, 1, warmups=0)
            compiling.append(sum(programs, 0.0))
            peaks += [_peak()] if counted else []
        yield item.row(
            f"{layout}, {part}", seconds=seconds, compile_seconds=median(compiling),
            memory={"host_peak": max(peaks)} if peaks else memory(),
            details={"GB": size / 1e9, "GB/s": size / 1e9 / median(seconds), "layers": cfg.num_layers,
                     "GB/s of reading alone": size / 1e9 / median(alone),
                     "to": f"{jax.devices()[0].platform}, {dtype()}",
                     "compiling": "part of every load of large stacks",
                     "peak": "of these loads" if peaks else "of the process, which made the checkpoint"},
        )  # fmt: skip


def _tensors(layout: str, folder: Path) -> TensorFiles:
    if layout == "Orbax":
        return TensorFiles((folder / ORBAX,), Part("transformer", 0))
    return TensorFiles.find(folder) if layout == "Diffusers" else TensorFiles((next(folder.iterdir()),))


def _files(layout: str, cfg: TransformerConfig) -> list[File]:
    """A DiT of random bfloat16 numbers, or their bytes taken for fp8."""
    pool = np.random.default_rng(0).standard_normal(POOL, np.float32).astype(jnp.bfloat16)
    name = {"Diffusers": "diffusers", "Orbax": "orbax"}.get(layout, "original")
    targets = expected_sources(_shapes(cfg), layout_rules("transformer", name, cfg, {}))

    def piece(key: str, shape: Shape) -> Piece:
        return Piece(key, shape, pool.dtype, lambda: np.resize(pool, shape))

    if layout == "Orbax":
        return orbax_files(
            Chunk("transformer", (0,) if into.layer is None else (0, into.layer), piece(into.path, shape))
            for into, shape in targets.values()
        )
    pieces = [piece(key, shape) for key, (_, shape) in targets.items()]
    if layout == "Diffusers":
        return sharded_files("diffusion_pytorch_model", pieces, SHARD)
    if layout == "original .pth":
        return [torch_file("model.pth", pieces)]
    return [safetensors_file("model.safetensors", [scaled for piece in pieces for scaled in _scaled(piece)])]


def _scaled(piece: Piece) -> list[Piece]:
    """A matrix in fp8 with a scale beside it; what is none, as it is."""
    if len(piece.shape) != 2 or not piece.name.endswith(".weight"):
        return [piece]
    scale = Piece(
        f"{piece.name.removesuffix('weight')}scale_weight", (), DTYPES["F32"], lambda: np.ones((), np.float32)
    )
    return [piece._replace(dtype=_FP8, make=lambda: np.zeros(piece.shape, _FP8)), scale]


def _read(paths: Sequence[Path]) -> None:
    """Read files into one piece of memory, again and again."""
    buffer = bytearray(2**26)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _of_size(preset: Preset) -> TransformerConfig:
    """The transformer with as many layers, of its own or more, as make up the preset's size of a checkpoint."""

    def size(layers: int) -> int:
        return sum(BYTES * int(np.prod(shape)) for shape in _shapes(preset.with_layers(layers).transformer).values())

    one, layer = size(1), size(2) - size(1)
    return preset.with_layers(1 + max(0, preset.load_bytes - one) // layer).transformer


def _shapes(cfg: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of one expert's parameters."""
    _, weights = abstract_weights(cfg, 1, 1, jnp.bfloat16)
    return {path: leaf.shape[1:] for part in weights for path, leaf in flat_shapes(part).items()}


def _forget(paths: Iterable[Path]) -> None:
    """Have the system drop files from its page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _reset_peak() -> bool:
    """Forget this process's peak of resident memory; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int:
    """Bytes of resident memory at most, since it was forgotten."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
