"""How things are measured: times of single calls, memory, the state of the card; and random weights on the device."""

import os
import platform
import resource
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from math import prod
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxwan.convert.load import fill, flat_shapes

PEAKS = {"H100": 989.0, "H200": 989.0}  # dense bfloat16 TFLOP/s in the data sheets
POOL = 1_048_583  # prime, so that the rows of no matrix repeat
MOST_CALLS = 500  # of a ceiling
_CARD = {"sm_mhz": "clocks.sm", "watts": "power.draw", "celsius": "temperature.gpu"}


def seconds_of(call: Callable[[], Any], runs: int, warmups: int = 1) -> list[float]:
    """Seconds of each of `runs` calls, until their outputs are there."""
    for _ in range(warmups):
        jax.block_until_ready(call())
    return [_seconds(call) for _ in range(runs)]


def seconds_in_turns(calls: Mapping[Any, Callable[[], Any]], runs: int, warmups: int = 1) -> dict[Any, list[float]]:
    """Seconds of each of `runs` calls of each, in turns, so that a clock that falls meets all of them alike."""
    for call in list(calls.values()) * warmups:
        jax.block_until_ready(call())
    rounds = [{name: _seconds(call) for name, call in calls.items()} for _ in range(runs)]
    return {name: [r[name] for r in rounds] for name in calls}


def sustained(call: Callable[[], Any], duration: float) -> list[float]:
    """Seconds of each call, until they add up to `duration` or are MOST_CALLS, after two to warm up."""
    taken = seconds_of(call, 1, warmups=2)
    while sum(taken) < duration and len(taken) < MOST_CALLS:
        taken.append(_seconds(call))
    return taken


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


@contextmanager
def compilations() -> Iterator[list[float]]:
    """Seconds of each program that is compiled inside the block, or read from the persistent cache."""
    found: list[float] = []

    def listen(event: str, duration: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def compiled(function: Any, *arguments: Any) -> tuple[Any, float]:
    """The executable of a jitted function for these arguments, and the seconds of tracing and compiling it."""
    start = time.perf_counter()
    executable = function.lower(*arguments).compile()
    return executable, time.perf_counter() - start


def memory(*executables: Any) -> dict[str, int]:
    """Bytes: what the largest executable asks for, and the most this process has held on the device and the host."""
    found = {"host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    analyses = [e.memory_analysis() for e in executables]
    if analyses:
        found["arguments"] = max(a.argument_size_in_bytes for a in analyses)
        found["temporaries"] = max(a.temp_size_in_bytes for a in analyses)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return found if peak is None else found | {"device_peak": peak}


def peak_rate() -> float | None:
    """TFLOP/s in the data sheet of this device."""
    kind = jax.devices()[0].device_kind
    return next((rate for name, rate in PEAKS.items() if name in kind), None)


def environment() -> dict[str, str]:
    """Hardware, versions and settings of this process."""
    device = jax.devices()[0]
    found = {
        "device": device.device_kind,
        "platform": f"{device.platform}: {device.client.platform_version}".replace("\n", " "),
        "host": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }
    for package in ("jaxwan", "jax", "jaxlib", "flax", "numpy", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    chosen = ("XLA_FLAGS", "JAX_PLATFORMS", "XLA_PYTHON_CLIENT_PREALLOCATE", "JAX_DEFAULT_MATMUL_PRECISION")
    return found | {name: os.environ[name] for name in chosen if name in os.environ}


@contextmanager
def card_log() -> Iterator[dict[str, float]]:
    """Medians of an NVIDIA card's clock, power and temperature inside the block; filled in when it ends."""
    found: dict[str, float] = {}
    if jax.default_backend() != "gpu" or shutil.which("nvidia-smi") is None:
        yield found
        return
    query = ["nvidia-smi", f"--query-gpu={','.join(_CARD.values())}", "--format=csv,noheader,nounits", "-i", "0"]
    with subprocess.Popen([*query, "-lms", "200"], stdout=subprocess.PIPE, text=True) as logger:
        try:
            yield found
        finally:
            logger.terminate()
            lines = logger.communicate()[0].splitlines()
            found |= _medians([line.split(", ") for line in lines])


def _medians(samples: list[list[str]]) -> dict[str, float]:
    """A card may answer "[N/A]" to one question and numbers to others."""
    columns = zip(_CARD, zip(*[s for s in samples if len(s) == len(_CARD)], strict=True), strict=False)
    numbers = {name: [float(v) for v in values if v.replace(".", "", 1).isdecimal()] for name, values in columns}
    return {name: median(values) for name, values in numbers.items() if values}


# Random weights, made where they are used


def random_state(abstract: nnx.State, *, lead: int = 0) -> nnx.State:
    """An abstract state filled with random parameters of sane size, where it says that they lie: kernels of variance
    1 / fan-in, norms of 1.

    All are cut from one pool of normal numbers, in one program: drawing each by itself takes minutes to compile. The
    first `lead` axes of every parameter are experts and layers; each of these begins elsewhere in the pool.
    """
    shapes = flat_shapes(abstract)

    def make(pool):
        twice = jnp.concatenate([pool, pool])
        return {path: _cut(twice, path, leaf, lead) for path, leaf in shapes.items()}

    pool = random_input(0, POOL, dtype=jnp.float32)
    places = {path: leaf.sharding for path, leaf in shapes.items()}
    return fill(abstract, jax.jit(make, out_shardings=places)(pool))


def _cut(twice: jax.Array, path: str, leaf: jax.ShapeDtypeStruct, lead: int) -> jax.Array:
    rows, one = prod(leaf.shape[:lead]), leaf.shape[lead:]
    if path.rsplit(".", 1)[-1] in ("scale", "gamma"):
        return jnp.ones(leaf.shape, leaf.dtype)
    deviation = prod(one[:-1]) ** -0.5 if len(one) > 1 else 0.02
    repeats = -(-prod(one) // POOL)

    def row(start):
        part = jax.lax.dynamic_slice_in_dim(twice, start, POOL)
        return (jnp.tile(part, repeats)[: prod(one)].reshape(one) * deviation).astype(leaf.dtype)

    starts = np.asarray((zlib.crc32(path.encode()) + 1009 * np.arange(rows)) % POOL, np.int32)
    return jax.lax.map(row, starts).reshape(leaf.shape) if lead else row(starts[0])


def random_module(make: Callable[[], nnx.Module]) -> tuple[Any, nnx.State]:
    """Structure and random parameters of a module."""
    graph, state = nnx.split(nnx.eval_shape(make))
    return graph, random_state(state)


def random_input(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Normal numbers: zeros would run faster than data."""
    return _normal(jax.random.key(seed), shape, jnp.dtype(dtype))


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.normal(key, shape, dtype)
