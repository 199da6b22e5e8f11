"""Trains the bundled model's VAE: first on single frames, then on short crops of clips, then on long ones.

Image quality comes from the first phase, whose steps are cheap; the later ones teach time. Trained on videos from the
start, or on videos at the rates of the first phase, it ends far worse.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxwan.config import VAEConfig
from jaxwan.convert.diffusers import VAE as RULES
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import load_module
from jaxwan.convert.save import save_arrays, write_json
from jaxwan.models.causal_conv import Formulation
from jaxwan.models.vae import VAE
from jaxwan.pipelines.media import save_image
from jaxwan.tiny.attributes import draw_attributes
from jaxwan.tiny.clips import HEIGHT, NUM_FRAMES, WIDTH, Body, coverage, paint, place
from jaxwan.tiny.muon import Params, muon
from jaxwan.tiny.training import (
    Phase,
    Saved,
    Saver,
    TrainState,
    make_step,
    parameters,
    run,
    start,
)
from jaxwan.tiny.vae_init import make_vae, with_parameters
from jaxwan.tiny.vae_quality import baselines, coding, draw_clips, judged_clips, mean_psnr, other_clips, psnr

CONFIG = VAEConfig(base_dim=16, num_res_blocks=1, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)

CROP = 32  # pixels a side
ON_EDGE = 0.6  # share of the crops that are centred on an object's edge
LATENT_DECAY = 1e-6  # keeps latents from drifting off, and costs no quality
AVERAGE = 0.998
INIT_CROPS = 128
REPORT_CLIPS = 24
STATISTICS_CLIPS = 2048
LEAST_SPREAD = 0.1  # of a latent channel, against the widest: less is noise to the denoiser


class Plan(NamedTuple):
    """A phase: its steps, frames a crop and crops a step, learning rate at its start and end."""

    name: str
    steps: int
    frames: int
    crops: int
    first_rate: float
    last_rate: float


PLANS = (  # on one core of a server: 0.17, 0.8 and 1.1 seconds a step
    Plan("frames", 3600, 1, 16, 5e-3, 1e-3),
    Plan("short crops", 600, 5, 12, 1e-3, 2e-4),
    Plan("long crops", 500, NUM_FRAMES, 4, 2e-4, 0.0),
)


def train_vae(states: Path, output: Path, *, scale: float = 1.0, minutes: float | None = None, seed: int = 0) -> bool:
    """Train and, once all steps are done, write `output`; returns whether it is written.

    Goes on from the state in `states`, else with the last phase from the weights in `output`, else starts afresh.
    Stops after `minutes`. scale: of the number of steps. Sample pictures go to `states` / samples.
    """
    saver = Saver(states / "vae")
    saved = saver.restore(abstract_state(CONFIG))
    if saved is not None and saved.phase == len(PLANS) and (output / "config.json").is_file():
        _say(f"{output} is trained and stays as it is")  # written anew elsewhere, the clips encoded with it would go
        return True
    if saved is not None:
        _say(f"goes on from step {int(saved.state.step)} in {saver.folder}")
    elif (output / "config.json").is_file():
        _say(f"no state in {saver.folder}: goes on from the weights in {output}")
        saved = Saved(start(parameters(load_vae(output)), make_optimizer()), phase=len(PLANS) - 1)
    else:
        _say(f"starts; states go to {saver.folder}")
        saved = Saved(initial_state(seed=seed))
    clips = judged_clips(REPORT_CLIPS)
    report = _reporter(clips, states / "samples")
    saved, done = run(make_phases(scale), saved, saver, minutes=minutes, seed=seed, report=report)
    if not done:
        _say(f"stopped at step {int(saved.state.step)}; the same command goes on")
        return False
    export(saved.state.average, output)
    for line in judge(output):
        _say(line)
    return True


def judge(folder: Path) -> list[str]:
    """Quality of the exported VAE in `folder` and of the codes beside it, in words."""
    clips = judged_clips()
    beside = [f"{value:.1f} dB with {name}" for name, value in baselines(clips, other_clips()).items()]
    return [
        f"{mean_psnr(coding(load_vae(folder)), clips):.2f} dB on {len(clips)} clips of {NUM_FRAMES} frames",
        *beside,
    ]


def _reporter(clips: Float[Array, "b f h w 3"], folder: Path) -> Callable[[Saved], Mapping[str, Any]]:
    """Measures the averaged parameters on `clips`, and paints every fourth frame of one above what becomes of it."""

    @jax.jit
    def code(params: Params, clips: Float[Array, "b f h w 3"]) -> Float[Array, "b f h w 3"]:
        decoded, _ = reconstruct(with_parameters(CONFIG, params), 2 * clips - 1)
        return jnp.clip((decoded + 1) / 2, 0, 1)

    def report(saved: Saved) -> Mapping[str, Any]:
        coded = jnp.concatenate([code(saved.state.average, clip[None]) for clip in clips])
        rows = [np.concatenate(clip[::4], axis=1) for clip in np.asarray([clips[0], coded[0]])]
        folder.mkdir(parents=True, exist_ok=True)
        save_image(np.concatenate(rows, axis=0), folder / f"vae-{int(saved.state.step):06}.png")
        first = psnr(coded[:, :1], clips[:, :1]).mean()
        return {"psnr": round(float(psnr(coded, clips).mean()), 2), "psnr of first frames": round(float(first), 2)}

    return report


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# The model and its files


def initial_state(cfg: VAEConfig = CONFIG, *, seed: int = 0) -> TrainState:
    """Before the first step, fitted to a few crops."""

    @jax.jit
    def fit(key: PRNGKeyArray) -> Params:
        weights, pictures = jax.random.split(key)
        return parameters(make_vae(cfg, weights, 2 * draw_crops(pictures, INIT_CROPS, 1) - 1))

    return start(fit(jax.random.key(seed)), make_optimizer())


def abstract_state(cfg: VAEConfig = CONFIG) -> TrainState:
    """Shapes and dtypes of a state."""
    return jax.eval_shape(lambda: start(parameters(VAE(cfg, rngs=nnx.Rngs(0))), make_optimizer()))


def load_vae(folder: Path) -> VAE:
    """The exported VAE in `folder`, in float32."""
    cfg = VAEConfig.from_json(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    vae = load_module(lambda: VAE(cfg, rngs=nnx.Rngs(0)), TensorFiles.find(folder), RULES, what=str(folder))
    assert isinstance(vae, VAE)
    return vae


def export(params: Params, folder: Path, *, cfg: VAEConfig = CONFIG, clips: int = STATISTICS_CLIPS) -> None:
    """Write a Diffusers folder: weights in float16, and the mean and spread of each latent channel over `clips`.

    Raises ValueError when a channel spreads too little for the denoiser to see it.
    """
    halves = {path: p.astype(jnp.float16) for path, p in params.items()}
    rounded = {path: p.astype(jnp.float32) for path, p in halves.items()}
    mean, std = latent_statistics(with_parameters(cfg, rounded), clips)
    if std.min() < LEAST_SPREAD * std.max():
        raise ValueError(
            f"latent channel {std.argmin()} has a standard deviation of {std.min():.3f}, less than {LEAST_SPREAD} of "
            f"the widest's {std.max():.3f}: train on, with a larger --scale"
        )
    cfg = replace(cfg, latents_mean=_rounded(mean), latents_std=_rounded(std))
    save_arrays(halves, folder, RULES)
    write_json(folder / "config.json", {"_class_name": "AutoencoderKLWan", **asdict(cfg)})


def _rounded(values: Float[np.ndarray, " z"]) -> tuple[float, ...]:
    return tuple(round(float(v), 4) for v in values)


def latent_statistics(
    vae: VAE, clips: int, *, batch: int = 16
) -> tuple[Float[np.ndarray, " z"], Float[np.ndarray, " z"]]:
    """Mean and standard deviation of each channel of `vae`'s latents over at least `clips` training clips."""
    graph, state = nnx.split(vae)
    batch = min(batch, clips)

    @jax.jit
    def sums(state: nnx.State, key: PRNGKeyArray) -> Float[Array, "2 z"]:
        z = encode(nnx.merge(graph, state), 2 * draw_clips(key, batch) - 1)
        return jnp.stack([z.mean((0, 1, 2, 3)), (z**2).mean((0, 1, 2, 3))])

    keys = jax.random.split(jax.random.key(0), -(-clips // batch))
    mean, square = np.mean([np.asarray(sums(state, key), np.float64) for key in keys], axis=0)
    return mean, np.sqrt(square - mean**2)


# Training


def make_phases(scale: float = 1.0, cfg: VAEConfig = CONFIG, plans: Sequence[Plan] = PLANS) -> list[Phase]:
    """The phases, with `scale` times the planned steps."""
    optimizer = make_optimizer()
    return [_make_phase(plan, round(scale * plan.steps), cfg, optimizer) for plan in plans]


def _make_phase(plan: Plan, steps: int, cfg: VAEConfig, optimizer: optax.GradientTransformation) -> Phase:
    formulation: Formulation = "joined" if jax.default_backend() == "cpu" else "direct"

    def loss(params: Params, key: PRNGKeyArray) -> Float[Array, ""]:
        pixels = 2 * draw_crops(key, plan.crops, plan.frames) - 1
        decoded, latents = reconstruct(with_parameters(cfg, params), pixels, formulation)
        away = decoded - pixels
        return jnp.abs(away).mean() + (away**2).mean() + LATENT_DECAY * (latents**2).mean()

    def rate(done: Float[Array, ""]) -> Float[Array, ""]:
        return plan.first_rate + done * (plan.last_rate - plan.first_rate)

    return Phase(plan.name, steps, make_step(loss, optimizer, rate, steps=steps, decay=AVERAGE))


def make_optimizer() -> optax.GradientTransformation:
    """Muon on kernels, each as one matrix from all it sees to its channels; Adam on biases and norms."""
    by_muon = muon(
        lambda path: 0 if path.endswith("kernel") else None,
        scale=lambda inputs, outputs: max(1.0, outputs / inputs) ** 0.5,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), by_muon)


def reconstruct(
    vae: VAE, pixels: Float[Array, "b f h w 3"], formulation: Formulation | None = None
) -> tuple[Float[Array, "b f h w 3"], Float[Array, "b t y x z"]]:
    """Pixels in [-1, 1] to latents and back, not clamped: the first frame, then all others as one chunk."""
    latents = encode(vae, pixels, formulation)
    cache, decoded = vae.decode_chunk_unclamped(None, latents[:, :1], formulation=formulation)
    if latents.shape[1] > 1:
        _, others = vae.decode_chunk_unclamped(cache, latents[:, 1:], formulation=formulation)
        decoded = jnp.concatenate([decoded, others], axis=1)
    return decoded, latents


def encode(
    vae: VAE, pixels: Float[Array, "b f h w 3"], formulation: Formulation | None = None
) -> Float[Array, "b t y x z"]:
    """Latents of the first frame, then of all others as one chunk: quicker than chunk by chunk, and larger."""
    cache, latents = vae.encode_chunk(None, pixels[:, :1], formulation=formulation)
    if pixels.shape[1] > 1:
        _, others = vae.encode_chunk(cache, pixels[:, 1:], formulation=formulation)
        latents = jnp.concatenate([latents, others], axis=1)
    return latents


# Data


def draw_crops(key: PRNGKeyArray, count: int, num_frames: int) -> Float[Array, "{count} {num_frames} 32 32 3"]:
    """Crops of training clips, in [0, 1], of successive frames; flipped or not."""
    return jax.vmap(lambda k: _draw_crop(k, num_frames))(jax.random.split(key, count))


def _draw_crop(key: PRNGKeyArray, num_frames: int) -> Float[Array, "f h w 3"]:
    attributes, place_key, first, corner_key, flips = jax.random.split(key, 5)
    scene = place(draw_attributes(attributes), place_key)
    begin = jax.random.randint(first, (), 0, NUM_FRAMES - num_frames + 1)
    times = (begin + jnp.arange(num_frames)) / (NUM_FRAMES - 1)
    y, x = _draw_corner(corner_key, scene.first, times)
    crop = jax.lax.dynamic_slice(paint(scene, times), (0, y, x, 0), (num_frames, CROP, CROP, 3))
    for axis, flip in zip((1, 2), jax.random.bernoulli(flips, shape=(2,)), strict=True):
        crop = jnp.where(flip, jnp.flip(crop, axis), crop)
    return crop


def _draw_corner(key: PRNGKeyArray, body: Body, times: Float[Array, " f"]) -> Int[Array, " 2"]:
    """The upper left corner (y, x) of a crop, whose centre often lies on the body's edge in one of the frames."""
    frame, spot, anywhere, choice = jax.random.split(key, 4)
    cover = coverage(body, jax.random.choice(frame, times))
    edge = jax.random.categorical(spot, jnp.log(cover * (1 - cover) + 1e-6).reshape(-1))
    room = jnp.array([HEIGHT - CROP, WIDTH - CROP])
    centred = jnp.clip(jnp.stack([edge // WIDTH, edge % WIDTH]) - CROP // 2, 0, room)
    uniform = jax.random.randint(anywhere, (2,), 0, room + 1)
    return jnp.where(jax.random.uniform(choice) < ON_EDGE, centred, uniform)
