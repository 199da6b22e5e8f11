"""What the hardware gives, matrix products and memory, and attention by implementation."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxwan.bench.item import TERA, Item, dtype
from jaxwan.bench.measure import card_log, compiled, memory, random_input, seconds_of, sustained
from jaxwan.bench.presets import Preset
from jaxwan.bench.report import Row
from jaxwan.kernels.attention import attend, attention

CHECKED_ROWS = 256  # queries of an attention output that are compared with float32


def measure_ceilings(item: Item) -> Iterator[Row]:
    """Matrix products, held for a while, and a copy."""
    preset = item.preset
    square = (preset.matmul,) * 3
    mlp = preset.tokens, preset.transformer.dim, preset.transformer.ffn_dim
    for part, (m, k, n) in (("square matmul", square), ("MLP matmul", mlp)):
        with card_log() as card:
            seconds, took = _matmul(m, k, n, preset.sustain)
        tflop = 2 * m * k * n / TERA
        yield item.row(
            part,
            seconds=seconds,
            compile_seconds=took,
            tflop=tflop,
            details={"shape": f"{m}x{k}x{n}", "dtype": str(dtype())} | card,
        )
    x = random_input(0, preset.copy_bytes // 2)
    copy, took = compiled(jax.jit(lambda x: -x), x)
    seconds = sustained(lambda: copy(x), preset.sustain / 3)
    speed = 2 * preset.copy_bytes / TERA / sorted(seconds)[len(seconds) // 2]
    yield item.row("memory", seconds=seconds, compile_seconds=took, details={"TB/s read and written": speed})


def _matmul(m: int, k: int, n: int, duration: float) -> tuple[list[float], float]:
    """Seconds of each product [m, k] @ [k, n] in the models' dtype, held for `duration`; seconds to compile it."""
    left, right = random_input(1, m, k, dtype=dtype()), random_input(2, k, n, dtype=dtype())
    product, took = compiled(jax.jit(jnp.matmul), left, right)
    return sustained(lambda: product(left, right), duration), took


def ceiling(preset: Preset) -> float:
    """TFLOP/s of the square matrix product right now."""
    size = preset.matmul
    seconds, _ = _matmul(size, size, size, preset.sustain)
    return 2 * preset.matmul**3 / TERA / sorted(seconds)[len(seconds) // 2]


def measure_attention(item: Item) -> Iterator[Row]:
    """Of one layer, after its output was compared with float32 on some rows."""
    preset, cfg = item.preset, item.preset.transformer
    shape = 1, preset.tokens, cfg.num_attention_heads, cfg.attention_head_dim
    q, k, v = (random_input(seed, *shape, dtype=dtype()) for seed in range(3))
    call = jax.jit(lambda q, k, v: attention(q, k, v, implementation=item.form))
    executable, took = compiled(call, q, k, v)
    rows = np.sort(np.random.default_rng(0).choice(preset.tokens, min(CHECKED_ROWS, preset.tokens), replace=False))
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(attend)(*(x.astype(jnp.float32) for x in (q[:, rows], k, v)))
    got = executable(q, k, v)[:, rows].astype(jnp.float32)
    error = float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))
    if not error < 2e-2:  # bfloat16 weights and outputs round at 4e-3; NaN is no better than wrong
        raise RuntimeError(f"wrong result: relative error {error:.3g} against float32 on {len(rows)} rows")
    with card_log() as card:
        seconds = seconds_of(lambda: executable(q, k, v), item.runs)
    yield item.row(
        seconds=seconds, compile_seconds=took, memory=memory(executable), tflop=4 * preset.tokens**2 * cfg.dim / TERA,
        details={"shape": "x".join(map(str, shape)), "relative error": error} | card,
    )  # fmt: skip
