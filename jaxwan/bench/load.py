"""Loading: a checkpoint of a preset's transformer, made on the spot, onto the device."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from jaxwan.bench.item import Item, dtype
from jaxwan.bench.measure import POOL, compilations, memory, seconds_of
from jaxwan.bench.presets import Preset
from jaxwan.bench.report import Row
from jaxwan.config import TransformerConfig
from jaxwan.convert.diffusers import TRANSFORMER
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import flat_shapes
from jaxwan.convert.save import save_arrays
from jaxwan.pipelines.dit import abstract_weights, load_weights
from jaxwan.sharding.mesh import MeshSpec, make_mesh

BYTES = 2  # of a bfloat16, the dtype of the published checkpoints


def measure_load(item: Item) -> Iterator[Row]:
    """GB/s and peak memory, from the disk and from the system's page cache, of as many layers as fit the size."""
    cfg = _of_size(item.preset)
    shapes = _shapes(cfg)
    size = sum(BYTES * int(np.prod(shape)) for shape in shapes.values())
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free
        if free < 2 * size:
            reason = f"the checkpoint takes {size / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB left (TMPDIR)"
            yield item.no_row("", "skipped", reason)
            return
        pool = np.random.default_rng(0).standard_normal(POOL, np.float32).astype(jnp.bfloat16)
        save_arrays({path: np.resize(pool, shape) for path, shape in shapes.items()}, Path(folder), TRANSFORMER)
        files = TensorFiles.find(Path(folder))

        def load():
            return load_weights(cfg, [TensorFiles.find(Path(folder))], make_mesh(MeshSpec()), dtype())

        jax.block_until_ready(load())  # what is compiled once a process
        for part, prepare in (("from disk", lambda: _forget(files)), ("from the page cache", lambda: None)):
            seconds, peaks, compiling = [], [], []
            for _ in range(item.runs):
                prepare()
                counted = _reset_peak()
                with compilations() as programs:
                    seconds += seconds_of(load, 1, warmups=0)
                compiling.append(sum(programs, 0.0))
                peaks += [_peak()] if counted else []
            yield item.row(
                part, seconds=seconds, compile_seconds=median(compiling),
                memory={"host_peak": max(peaks)} if peaks else memory(),
                details={"GB": size / 1e9, "GB/s": size / 1e9 / median(seconds), "layers": cfg.num_layers,
                         "to": f"{jax.devices()[0].platform}, {dtype()}",
                         "compiling": "part of every load of large stacks",
                         "peak": "of these loads" if peaks else "of the process, which made the checkpoint"},
            )  # fmt: skip


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


def _forget(files: TensorFiles) -> None:
    """Have the system drop the files from its page cache."""
    for path in files.paths:
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
