"""A checkpoint onto a mesh: every component's files proved to fit, then read to where they are used."""

import difflib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxwan.convert.detect import rules_of
from jaxwan.convert.files import TensorFiles, check_variant, is_weights, list_files
from jaxwan.convert.load import OnBytes, count_bytes, flat_shapes, load_state, prove, targets_of
from jaxwan.convert.lora import MergedFiles
from jaxwan.convert.rules import CheckpointError, Rule, Target
from jaxwan.convert.verify import SUMS, check_finite, check_sums
from jaxwan.models.layers import abstract
from jaxwan.models.transformer import WanTransformer
from jaxwan.pipelines.checkpoint import Checkpoint
from jaxwan.pipelines.dit import Weights, layers_per_stage, load_weights
from jaxwan.pipelines.media import load_image_processor
from jaxwan.pipelines.parts import Parts, abstract_components, abstract_parts
from jaxwan.pipelines.progress import Progress
from jaxwan.pipelines.prompt import SentencePiece, load_tokenizer
from jaxwan.pipelines.request import Job
from jaxwan.pipelines.telling import warn
from jaxwan.pipelines.warmup import compiling, job_programs
from jaxwan.sharding.mesh import MeshSpec, make_mesh

DTYPES = ("bfloat16", "float32")
log = logging.getLogger(__name__)


def load_parts(
    checkpoint: Checkpoint, mesh: MeshSpec, dtype: str | None, vae_dtype: str, job: Job | None = None, *,
    vae_devices: int = 0, progress: bool = True,
) -> Parts:  # fmt: skip
    """Load a checkpoint whose configuration was read; dtype None is the devices' default. vae_devices: how many of its
    own the VAE has, 0 if it is on the mesh's.

    The programs of a `job` are compiled meanwhile; `seconds`, which add up to the time that this took, say under
    "compile" for how long nothing else happened any more.
    Raises ValueError or OSError before any tensor is read: for the mesh, for a file that is missing or truncated, for
    tensors that do not fit.
    """
    start = time.perf_counter()
    devices = place(checkpoint, mesh, job, vae_devices)
    tokenizer = checkpoint.tokenizer
    if tokenizer is None and checkpoint.text_encoder is not None:
        tokenizer = load_tokenizer(checkpoint.place("tokenizer"))  # raises
    if isinstance(tokenizer, SentencePiece):
        log.info(
            "the tokenizer is the one within %s, SentencePiece's: it spells characters that it does not know as bytes, "
            "where a tokenizer.json may differ", checkpoint.place("text_encoder").name,
        )  # fmt: skip
    clip = checkpoint.image_encoder is not None
    processor = load_image_processor(_image_processor(checkpoint)) if clip else None
    first = devices.devices.flat[0]
    dtype = dtype or default_dtype(first)
    files, found = prove_components(checkpoint, dtype, vae_dtype)
    count = devices.size + vae_devices
    if first.platform == "cpu":
        log.info("no accelerator: %d virtual CPU device%s", count, "s" * (count > 1))
    parts = abstract_parts(checkpoint, devices, dtype, vae_dtype, tokenizer, processor, mesh.ulysses, vae_devices)
    phases = Progress(visible=progress)
    num_bytes = bytes_to_read(checkpoint, parts, files, found)
    programs = [] if job is None else list(job_programs(checkpoint, parts, job))
    with compiling(programs, phases) as finished:
        with phases.phase("load", num_bytes, "B") as update:
            loaded = load_tensors(checkpoint, parts, files, update)
        with phases.phase("compile", len(programs), "program") as update:
            for _ in finished:
                update(1)
    prepare = time.perf_counter() - start - sum(phases.seconds.values())  # reading headers, making shapes
    return parts.filled(*loaded)._replace(seconds={"prepare": prepare} | phases.seconds)


def _image_processor(checkpoint: Checkpoint) -> Path | None:
    """Its folder; None for parts that were named one by one, of which none says it: the published models' own then."""
    folder = checkpoint.place("image_processor")
    return None if checkpoint.parts and not folder.is_dir() else folder


def load_tensors(
    checkpoint: Checkpoint, parts: Parts, files: Mapping[str, TensorFiles], progress: OnBytes
) -> tuple[dict[str, nnx.State], Weights]:
    """Parameters by component folder, and the DiT's, of parts that are shapes and say where they lie; from files that
    were proved to hold them."""
    models = abstract_components(checkpoint, parts.denoiser.dtype, parts.vae_dtype)
    states = {
        name: load_state(
            models[name][1], files[name], component_rules(name, checkpoint, files[name]), placed=placed,
            what=str(checkpoint.place(name)), progress=progress,
        )
        for name, placed in parts.states().items()
    }  # fmt: skip
    denoiser, experts = parts.denoiser, [files[name] for name in checkpoint.experts]
    return states, load_weights(checkpoint.transformer, experts, denoiser.mesh, denoiser.dtype, progress)


def bytes_to_read(
    checkpoint: Checkpoint, parts: Parts, files: Mapping[str, TensorFiles], found: Mapping[str, Mapping[str, Target]]
) -> int:
    """Bytes that this process will read of proved files, for parts that are shapes and say where they lie."""
    blocks, ends = parts.denoiser.weights
    experts = [((i,), files[name], found[name]) for i, name in enumerate(checkpoint.experts)]
    count = count_bytes(targets_of(blocks) | targets_of(ends), experts)
    for name, state in parts.states().items():
        count += count_bytes(targets_of(state), [((), files[name], found[name])])
    return count


def place(checkpoint: Checkpoint, mesh: MeshSpec, job: Job | None = None, vae_devices: int = 0) -> Mesh:
    """The devices for a checkpoint; so many of the VAE's own are behind them.

    Raises ValueError for a mesh that it or its first job does not fit, or too few devices.
    """
    check_mesh(mesh, checkpoint)
    if job is not None:
        check_use(mesh, checkpoint, job)
    return make_mesh(mesh, vae_devices=vae_devices)


def tell_idle_stages(mesh: MeshSpec, checkpoint: Checkpoint) -> None:
    """Warn of stages without a layer, in whatever call."""
    layers = checkpoint.transformer.num_layers
    idle = layers_per_stage(layers, mesh.pp).count(0)
    if idle:
        used = mesh.pp - idle
        warn(f"mesh {mesh}: {used} stages hold all {layers} layers and the others none: pp={used} does the same")


def check_mesh(mesh: MeshSpec, checkpoint: Checkpoint) -> None:
    """Raises ValueError for a mesh that this checkpoint cannot be laid out on."""
    cfg = checkpoint.transformer
    if mesh.cfg > 2:
        raise ValueError(f"mesh {mesh}: cfg={mesh.cfg} is for the two branches of guidance, the largest is cfg=2")
    if mesh.pp > cfg.num_layers:
        raise ValueError(
            f"mesh {mesh} has {mesh.pp} stages for {cfg.num_layers} layers: the largest is pp={cfg.num_layers}"
        )
    heads, inner = cfg.num_attention_heads, cfg.ffn_dim
    if heads % mesh.tp or inner % mesh.tp:
        fit = _divisors(math.gcd(heads, inner))
        raise ValueError(
            f"mesh {mesh}: tp={mesh.tp} does not divide the model's {heads} heads and MLP of {inner}: "
            f"what does is tp={_either(fit)}"
        )
    heads //= mesh.tp
    if mesh.ulysses is not None and mesh.sp == 1 and mesh.ulysses > 1:
        raise ValueError(f"ulysses={mesh.ulysses} is for devices of sp, and mesh {mesh} has none: leave it out")
    if mesh.ulysses is not None and (mesh.ulysses < 1 or mesh.sp % mesh.ulysses or heads % mesh.ulysses):
        fit = _divisors(math.gcd(mesh.sp, heads))
        raise ValueError(
            f"mesh {mesh}: ulysses={mesh.ulysses} does not divide the {mesh.sp} devices of sp and the {heads} heads "
            f"that each has: what does is {_either(fit)}"
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _either(numbers: Sequence[int]) -> str:
    return " or ".join([", ".join(map(str, numbers[:-1])), str(numbers[-1])] if len(numbers) > 1 else map(str, numbers))


def check_use(mesh: MeshSpec, checkpoint: Checkpoint, job: Job, *, loaded: bool = False) -> None:
    """Raises ValueError where devices would have nothing to do in a call.

    A pipeline that is loaded takes such a call, with a warning: others may give those devices work.
    """
    videos, idle = len(job.requests), []
    tokens = checkpoint.geometry.num_tokens(1, *job.size[1:])
    share = -(-tokens // mesh.sp)
    if (used := -(-tokens // share)) < mesh.sp:
        has = f"mesh {mesh} splits the tokens of a frame over {mesh.sp} devices, and {used} with {share} each have all "
        has += f"{tokens} of {job.size[2]}x{job.size[1]} pixels"
        idle.append((has, "the others compute on nothing", f"sp={used} does the same"))
    if mesh.dp > videos:
        has = f"mesh {mesh} deals videos to {mesh.dp} groups of devices and this call has {videos} video"
        fits = f"dp={videos} is the most" if videos > 1 else "leave dp out"
        has += "s" * (videos > 1)
        idle.append((has, "the others are idle", f"{fits}, or ask for more prompts or num_videos_per_prompt"))
    if mesh.cfg > 1 and not job.guided:
        has = f"mesh {mesh} has devices for the negative prompts and no video of this call is guided"
        idle.append((has, "those are idle", "leave cfg out, or give a guidance_scale above 1"))
    for has, told, remedy in idle:
        if not loaded:
            raise ValueError(f"{has}: {remedy}")
        warn(f"{has}: {told}")


def prove_components(
    checkpoint: Checkpoint, dtype: str = "float32", vae_dtype: str = "float32"
) -> tuple[dict[str, TensorFiles], dict[str, dict[str, Target]]]:
    """The files of every component, each proved to hold exactly what its configuration asks for, and where each of
    their tensors goes; headers only.

    Raises one CheckpointError for the complaints of all components.
    """
    states = {name: state for name, (_, state) in abstract_components(checkpoint, dtype, vae_dtype).items()}
    _, expert = abstract(WanTransformer, checkpoint.transformer, jnp.dtype(dtype))
    states |= dict.fromkeys(checkpoint.experts, expert)
    shapes = {name: {path: leaf.shape for path, leaf in flat_shapes(state).items()} for name, state in states.items()}
    folder, variant = checkpoint.folder, checkpoint.weights_variant
    check_variant(variant, {name: list_files(checkpoint.place(name)) for name in shapes}, what=str(folder))
    files = {name: checkpoint.files(name) for name in shapes}
    problems, found = [], {}
    for name, targets in shapes.items():
        try:
            rules = component_rules(name, checkpoint, files[name])
            found[name] = prove(targets, files[name], rules, what=str(checkpoint.place(name)))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("; ".join(dict.fromkeys(problems)))  # two experts may have the same
    return files, found


def check_weights(checkpoint: Checkpoint) -> str:
    """Whether the weights that are here can be loaded, in words: proved by their headers, or not here.

    Raises as `prove_components`, but for what a hub id can still fetch.
    """
    places = [checkpoint.place(name) for name in checkpoint.components]
    here = (place.is_file() or any(map(is_weights, list_files(place))) for place in places)
    if not checkpoint.is_orbax and not any(here):
        return f"not checked: {checkpoint.name} has none here" + " yet" * (checkpoint.hub_id is not None)
    try:
        files, found = prove_components(checkpoint)
    except FileNotFoundError as error:
        if checkpoint.hub_id is None:
            raise
        return f"not checked: not all are fetched ({error})"
    if checkpoint.text_encoder is not None and checkpoint.tokenizer is None and checkpoint.hub_id is None:
        load_tokenizer(checkpoint.place("tokenizer"))  # raises: where there are weights, it is to be there too
    num_bytes = sum(files[name].num_bytes(key) for name, keys in found.items() for key in keys)
    count = len(checkpoint.loras)
    merged = f", with {count} LoRA{'s' * (count > 1)}" if count else ""
    return f"checked by their headers: {', '.join(checkpoint.components)}, {num_bytes / 1e6:,.0f} MB to read{merged}"


def check_numbers(checkpoint: Checkpoint, *, progress: bool = True) -> None:
    """Read all weights once. Raises CheckpointError for files that are not as they were converted, where the folder
    says how they were, and for numbers that are infinite or none."""
    files, found = prove_components(checkpoint)
    total = sum(files[name].num_bytes(key) for name, keys in found.items() for key in keys)
    sums = (checkpoint.folder / SUMS).is_file()
    with Progress(visible=progress).phase("check", total * (1 + sums), "B") as update:
        if sums:
            check_sums(checkpoint.folder, update)
        for name, keys in found.items():
            own = isinstance(files[name], MergedFiles)
            what = f"{checkpoint.place(name)}{', with its LoRAs,' * own}"
            check_finite(files[name], keys, what=what, progress=update)


def component_rules(name: str, checkpoint: Checkpoint, files: TensorFiles) -> list[Rule]:
    """The rule table for a component's files."""
    component = "transformer" if name in checkpoint.experts else name
    return rules_of(component, getattr(checkpoint, component), files.shapes, what=str(checkpoint.place(name)))


def default_dtype(device: jax.Device) -> str:
    """bfloat16 on accelerators, float32 on a CPU."""
    return "float32" if device.platform == "cpu" else "bfloat16"


def parse_dtype(name: str, value: Any, allowed: Sequence[str] = DTYPES) -> str | None:
    """The name, one of those allowed, of what says it as JAX, NumPy or a text does; None stays. ValueError for another
    value."""
    if value is None:
        return None
    try:
        text = jnp.dtype(value).name
    except TypeError:
        text = str(value).removeprefix("torch.")
    if text not in allowed:
        long = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(text, text)
        nearest = difflib.get_close_matches(long, allowed, 1)
        hint = f": nearest is {nearest[0]}" if nearest else ""
        raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}{hint}")
    return text
