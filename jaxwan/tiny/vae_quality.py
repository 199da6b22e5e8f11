"""How well a VAE keeps the clips of the bundled model's data, beside codes that anyone could write.

Quality is the mean over clips of -10 log10(MSE) in dB, frames in [0, 1]. The clips are of keys that training never
draws, and of all combinations of attributes.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxwan.models.vae import VAE
from jaxwan.models.video_coder import VideoCoder
from jaxwan.tiny.attributes import combinations, draw_attributes
from jaxwan.tiny.clips import make_clip

Clips = Float[Array, "b f h w 3"]
TEST_CLIPS = 200
OTHER_CLIPS = 256
PATCH = 8  # pixels a side and, in all but the first frame, 4 frames: what a latent pixel covers


@partial(jax.jit, static_argnames=("count", "held_out"))
def draw_clips(key: PRNGKeyArray, count: int, *, held_out: bool = False) -> Float[Array, "{count} 17 64 96 3"]:
    """Whole clips in [0, 1]; with `held_out` also of the combinations that training never sees.

    The first ones are the same for every count.
    """
    rows = jnp.concatenate([combinations()] + held_out * [combinations(held_out=True)])

    def draw(key: PRNGKeyArray) -> Float[Array, "f h w 3"]:
        row, attributes, clip = jax.random.split(key, 3)
        chosen = rows[jax.random.randint(row, (), 0, len(rows))]
        return make_clip(draw_attributes(attributes, chosen), clip)

    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
    return jax.lax.map(draw, keys, batch_size=16)


def judged_clips(count: int = TEST_CLIPS) -> Float[Array, "{count} 17 64 96 3"]:
    """The clips that every VAE is judged by, or the first `count` of them."""
    return draw_clips(_key(), count, held_out=True)


def other_clips(count: int = OTHER_CLIPS) -> Float[Array, "{count} 17 64 96 3"]:
    """Clips that codes may be fitted to."""
    return draw_clips(jax.random.fold_in(_key(), 1 << 20), count)


def _key() -> PRNGKeyArray:
    return jax.random.key(1_000_003)  # no seed of a training


def psnr(frames: Clips, truth: Clips) -> Float[Array, " b"]:
    """Of each clip, in dB."""
    return -10 * jnp.log10(((frames - truth) ** 2).mean((1, 2, 3, 4)))


def mean_psnr(code: Callable[[Clips], Clips], clips: Clips, batch: int = 4) -> float:
    """Mean quality of `code`, frames in [0, 1] to what is left of them, run on `batch` clips at a time."""
    parts = [clips[i : i + batch] for i in range(0, len(clips), batch)]
    return float(jnp.concatenate([psnr(code(part), part) for part in parts]).mean())


def coding(vae: VAE) -> Callable[[Clips], Clips]:
    """Through the latents and back as users do it, chunk by chunk."""
    coder = VideoCoder(vae)
    return lambda clips: (jnp.asarray(coder.decode(coder.encode(2 * clips - 1))) + 1) / 2


def baselines(clips: Clips, others: Float[Array, "n f h w 3"], components: int = 16) -> dict[str, float]:
    """Quality of two codes: the median colour of each clip, and the principal components of other clips.

    The components are those of blocks of 4 x 8 x 8 pixels, and of 8 x 8 in the first frame: as many numbers as the
    latents are.
    """
    flat = jnp.broadcast_to(jnp.median(clips, axis=(1, 2, 3), keepdims=True), clips.shape)
    parts = [slice(0, 1), slice(1, None)]
    coded = [_through_components(clips[:, part], others[:, part], components) for part in parts]
    return {
        "constant background": float(psnr(flat, clips).mean()),
        f"{components} principal components": float(psnr(jnp.concatenate(coded, axis=1), clips).mean()),
    }


def _through_components(clips: Clips, fitted: Float[Array, "n f h w 3"], components: int) -> Clips:
    time = min(4, clips.shape[1])
    rows = _to_blocks(fitted, time)
    mean = rows.mean(0)
    axes = jnp.linalg.eigh((rows - mean).T @ (rows - mean))[1][:, -components:]
    coded = (_to_blocks(clips, time) - mean) @ axes @ axes.T + mean
    b, f, h, w, c = clips.shape
    shape = (b, f // time, h // PATCH, w // PATCH, time, PATCH, PATCH, c)
    return jnp.clip(coded.reshape(shape).transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(clips.shape), 0, 1)


def _to_blocks(x: Clips, time: int) -> Float[Array, "n d"]:
    b, f, h, w, c = x.shape
    x = x.reshape(b, f // time, time, h // PATCH, PATCH, w // PATCH, PATCH, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(-1, time * PATCH * PATCH * c)
