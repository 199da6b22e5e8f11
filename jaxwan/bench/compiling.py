"""Compilation: what it takes without and with programs kept from before, and the XLA flags that are worth a try."""

from collections.abc import Iterator

import jax

from jaxwan.bench.clip import VAE_DTYPE, make_checkpoint
from jaxwan.bench.item import Item, dtype
from jaxwan.bench.measure import compiled
from jaxwan.bench.presets import Preset
from jaxwan.bench.report import Row
from jaxwan.pipelines.call import make_job
from jaxwan.pipelines.parts import abstract_parts
from jaxwan.pipelines.warmup import Program, job_programs
from jaxwan.sharding.mesh import MeshSpec, make_mesh

_GPU = {
    "--xla_gpu_enable_triton_gemm=false": "cuBLAS alone: our products are large, and trying Triton's takes time",
    "--xla_gpu_enable_latency_hiding_scheduler=true": "transfers beside work; where JAX-Toolbox starts from",
    "--xla_gpu_enable_command_buffer=": "no CUDA graphs: launches are nothing beside a second of work",
    "--xla_gpu_exhaustive_tiling_search=true": "more tilings of what Triton takes, for longer compilation",
    "--xla_gpu_autotune_level=0": "what trying algorithms out is worth, against the time it takes",
}
_CPU = {
    "--xla_cpu_enable_fast_math=true": "sums in any order",
    "--xla_cpu_prefer_vector_width=512": "whole AVX-512 registers, where the default is 256 bits",
}
REASONS = {"none": "to compare with", **_GPU, **_CPU}


def candidates(preset: Preset) -> tuple[str, ...]:
    """XLA flags to try for a preset."""
    return tuple(_GPU if preset.needs_accelerator else _CPU)


def measure_compilation(item: Item) -> Iterator[Row]:
    """Tracing and compiling each program of a pipeline call, of abstract weights; the form says what the cache holds.

    "warm" finds in the persistent cache what "cold" left there.
    """
    total, kept_from = 0.0, jax.config.jax_persistent_cache_min_compile_time_secs  # pyright: ignore
    hits: list[str] = []

    def listen(event: str, **_):
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    for name, function, arguments in _programs(item.preset):
        before = len(hits)
        _, took = compiled(function, *arguments)
        total += took
        yield item.row(name, compile_seconds=took, details={"read from the cache": len(hits) > before})
    yield item.row(
        "all programs", compile_seconds=total,
        details={"layers": item.preset.transformer.num_layers, "kept by the cache from seconds": kept_from},
    )  # fmt: skip


def _programs(preset: Preset) -> Iterator[Program]:
    """All that a guided call of a preset's size compiles, in the order of a warm-up."""
    checkpoint = make_checkpoint(preset)
    parts = abstract_parts(checkpoint, make_mesh(MeshSpec()), dtype(), VAE_DTYPE)
    return job_programs(checkpoint, parts, make_job(checkpoint, prompt="", seed=0))
