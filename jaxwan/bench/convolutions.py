"""Every kind of convolution that a VAE has, in each of its formulations."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxwan.bench.item import TERA, Item
from jaxwan.bench.measure import card_log, compiled, memory, random_input, seconds_in_turns
from jaxwan.bench.presets import Preset
from jaxwan.bench.report import Row
from jaxwan.models.causal_conv import FORMULATIONS, conv, default_formulation
from jaxwan.models.layers import abstract
from jaxwan.models.vae import VAE

WITHIN = {"float32": 1e-5, "bfloat16": 2e-2}  # relative, of the form that the VAE uses here


class Kind(NamedTuple):
    """Convolutions of the same sizes, wherever in the model they are."""

    shape: tuple[int, ...]  # of the input, with the frames ahead of it
    kernel: tuple[int, ...]
    stride: tuple[int, int]  # in time, in space

    @property
    def name(self) -> str:
        """As in "3x3x3, 96-96, 6x720x1280": kernel, channels, and the frames and pixels that come in."""
        taps, size = ("x".join(map(str, numbers)) for numbers in (self.kernel[:3], self.shape[1:4]))
        return f"{taps}, {self.kernel[3]}-{self.kernel[4]}, {size}"


def measure_convolutions(item: Item) -> Iterator[Row]:
    """Forms of a kind in turns, each behind the same halo, after its result was compared with the others'."""
    for kind, count in kinds(item.preset).items():
        dtype, ahead = jnp.dtype(item.form), kind.kernel[0] - kind.stride[0]
        video, kernel = (random_input(8, *shape, dtype=dtype) for shape in (kind.shape, kind.kernel))
        given = video[:, ahead:], kernel, jnp.zeros(kind.kernel[-1], dtype), video[:, :ahead]
        made = {form: compiled(_jitted(form, kind), *given) for form in FORMULATIONS}
        results = {form: executable(*given).astype(jnp.float32) for form, (executable, _) in made.items()}
        usual = default_formulation(kind.kernel[3])
        for form, result in results.items():
            error = float(jnp.linalg.norm(result - results[usual]) / jnp.linalg.norm(results[usual]))
            if not error < WITHIN[item.form]:
                raise RuntimeError(f"wrong result: {kind.name} as {form!r} differs by {error:.3g} from {usual!r}")
        with card_log() as card:
            calls = {form: partial(executable, *given) for form, (executable, _) in made.items()}
            seconds = seconds_in_turns(calls, item.runs)
        least = {form: min(times) for form, times in seconds.items()}
        for form, (executable, took) in made.items():
            yield item.row(
                f"{kind.name}/{form}", seconds=seconds[form], compile_seconds=took, memory=memory(executable),
                tflop=2 * results[form].size * prod(kind.kernel[:4]) / TERA,
                details={"in the model": count, "chosen / this": least[usual] / least[form]}
                | ({"chosen": "here"} if form == usual else {}) | card,
            )  # fmt: skip


def _jitted(form: Any, kind: Kind) -> Any:
    def run(x, kernel, bias, before):
        return conv(x, kernel, bias, form, before=before, stride=kind.stride)

    return jax.jit(run)


def kinds(preset: Preset) -> dict[Kind, int]:
    """Convolutions over several frames in a chunk of four, encoded and decoded, and how many of each there are."""
    graph, state = abstract(VAE, preset.vae, jnp.dtype(jnp.float32))
    found: Counter[Kind] = Counter()
    for method, step, size in (
        (VAE.decode_chunk, 1, (*preset.latent_shape[1:], preset.vae.z_dim)),
        (VAE.encode_chunk, 4, (*preset.size[1:], 3)),
    ):

        def code(state, cache, given, method=method):
            return method(nnx.merge(graph, state), cache, given, formulation="direct")

        first, later = (jax.ShapeDtypeStruct((1, frames, *size), jnp.float32) for frames in (1, step))
        cache, _ = jax.eval_shape(lambda s, x, code=code: code(s, None, x), state, first)
        for equation in jax.make_jaxpr(code)(state, cache, later).jaxpr.eqns:
            if equation.primitive.name == "conv_general_dilated" and len(equation.params["window_strides"]) == 3:
                video, kernel = (v.aval.shape for v in equation.invars)
                found[Kind(video, kernel, equation.params["window_strides"][:2])] += 1
    return found
