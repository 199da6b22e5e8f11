"""Compilation: what it takes without and with programs kept from before, and the XLA flags that are worth a try."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxwan.bench.dit import complete, ring_inputs
from jaxwan.bench.item import Item, dtype
from jaxwan.bench.measure import compiled, random_input
from jaxwan.bench.presets import Preset
from jaxwan.bench.report import Row
from jaxwan.bench.vae import chunk_program, text_program
from jaxwan.models.vae import VAE
from jaxwan.pipelines.denoise import abstract_weights, make_program, make_text_program
from jaxwan.sharding.mesh import MeshSpec, make_mesh
from jaxwan.sharding.ring import RingPlan, Turns

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


def _programs(preset: Preset) -> Iterator[tuple[str, Any, tuple]]:
    """(name, jitted function, arguments) of all that a call compiles for a size."""
    yield from _ring(preset)
    encode, abstract, prompt = text_program(preset)
    yield "text encoder", encode, (abstract, *prompt)
    graph, weights = nnx.split(nnx.eval_shape(lambda: VAE(preset.vae, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    latents = random_input(5, 1, 1, *preset.latent_shape[1:], preset.vae.z_dim, dtype=jnp.float32)
    decode = chunk_program(graph, "decode")
    yield "VAE decoder, first frame", decode, (weights, None, latents)
    yield "VAE decoder, later frames", decode, (weights, jax.eval_shape(decode, weights, None, latents)[0], latents)


def _ring(preset: Preset) -> Iterator[tuple[str, Any, tuple]]:
    """The ring, and what makes the text's keys and values where they are carried."""
    mesh, cfg = make_mesh(MeshSpec()), preset.transformer
    shape = 1, *preset.latent_shape, preset.vae.z_dim
    begin, run = make_program(cfg, mesh, RingPlan(1, 1, 2), shape, dtype())
    _, weights = abstract_weights(cfg, preset.experts, 1, dtype())
    inputs, latents = ring_inputs(preset, preset.steps)
    carry = make_text_program(cfg, mesh, dtype())
    inputs = complete(preset, inputs, lambda text: jax.eval_shape(carry, weights, text))
    turns = Turns(np.zeros(1, np.int32), np.full(1, preset.steps, np.int32))
    yield "ring", run, (weights, inputs, turns, jax.eval_shape(begin, latents), np.int32(1))
    if inputs.carried is not None:
        yield "keys and values of the text", carry, (weights, inputs.text)
