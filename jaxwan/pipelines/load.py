"""A checkpoint onto a mesh: every component's files proved to fit, then read to where they are used."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxwan.convert.diffusers import TEXT_ENCODER, TRANSFORMER, image_encoder_rules
from jaxwan.convert.diffusers import VAE as VAE_RULES
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import flat_shapes, load_module, prove
from jaxwan.convert.rules import CheckpointError, Rule, Shape
from jaxwan.models.image_encoder import CLIPVisionEncoder
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.models.transformer import WanTransformer
from jaxwan.models.vae import VAE, VideoCoder
from jaxwan.pipelines.checkpoint import Checkpoint
from jaxwan.pipelines.denoise import Denoiser, load_weights
from jaxwan.pipelines.media import clip_pixels, load_image_processor
from jaxwan.pipelines.prompt import Tokenizer, load_tokenizer
from jaxwan.pipelines.request import check_mesh
from jaxwan.pipelines.stages import Stages
from jaxwan.sharding.mesh import MeshSpec, make_mesh

DTYPES = ("bfloat16", "float32")


class Parts(NamedTuple):
    """What a pipeline is made of. The DiT is spread over the mesh; all else lives on its first device."""

    denoiser: Denoiser
    coder: VideoCoder
    tokenizer: Tokenizer
    encode_text: Callable  # (tokens, mask) -> rows
    encode_clip: Callable | None  # image as loaded -> rows; Wan2.1 image to video
    seconds: dict[str, float]


def load_parts(
    checkpoint: Checkpoint, mesh: MeshSpec, dtype: str | None, vae_dtype: str, *, progress: bool = True
) -> Parts:
    """Load a checkpoint whose configuration was read; dtype None is the devices' default.

    Raises ValueError or OSError before any tensor is read: for the mesh, for a file that is missing or truncated, for
    tensors that do not fit.
    """
    devices = place(checkpoint, mesh, dtype, vae_dtype)
    folder = checkpoint.folder
    tokenizer = load_tokenizer(folder / "tokenizer")
    clip = checkpoint.image_encoder is not None
    processor = load_image_processor(folder / "image_processor") if clip else None
    files = prove_components(checkpoint)
    first = devices.devices.flat[0]
    if first.platform == "cpu":
        print(f"no accelerator: {devices.size} virtual CPU device{'s' * (devices.size > 1)}", file=sys.stderr)
    dtype = dtype or default_dtype(first)
    stages = Stages(progress=progress)
    with stages.stage("load", sum(f.total_bytes for f in files.values()), "B") as update:
        modules = {
            name: load_module(
                make, files[name], component_rules(name, checkpoint, files[name]), device=first,
                what=str(folder / name), progress=update,
            )
            for name, make in component_makers(checkpoint, dtype, vae_dtype).items()
        }  # fmt: skip
        experts = [files[name] for name in checkpoint.experts]
        weights = load_weights(checkpoint.transformer, experts, devices, dtype, update)
    return Parts(
        denoiser=Denoiser(checkpoint.transformer, weights, devices, jnp.dtype(dtype)),
        coder=VideoCoder(modules["vae"]),
        tokenizer=tokenizer,
        encode_text=jitted(modules["text_encoder"]),
        encode_clip=_clip_encoder(modules["image_encoder"], processor) if clip else None,
        seconds=stages.seconds,
    )


def place(checkpoint: Checkpoint, mesh: MeshSpec, dtype: str | None, vae_dtype: str) -> Mesh:
    """The devices for a checkpoint. Raises ValueError for a mesh it does not fit or too few devices, or a dtype."""
    check_mesh(mesh, checkpoint)
    check_dtype("dtype", dtype)
    check_dtype("vae_dtype", vae_dtype)
    return make_mesh(mesh)


def prove_components(checkpoint: Checkpoint) -> dict[str, TensorFiles]:
    """The files of every component, each proved to hold exactly what its configuration asks for; headers only.

    Raises one CheckpointError for the complaints of all components.
    """
    shapes = {name: _shapes(make) for name, make in component_makers(checkpoint, jnp.float32, jnp.float32).items()}
    expert = _shapes(lambda: WanTransformer(checkpoint.transformer, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    shapes |= dict.fromkeys(checkpoint.experts, expert)
    files = {name: TensorFiles.find(checkpoint.folder / name) for name in shapes}
    problems = []
    for name, targets in shapes.items():
        what = str(checkpoint.folder / name)
        try:
            prove(targets, files[name], component_rules(name, checkpoint, files[name]), what=what)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("; ".join(problems))
    return files


def _shapes(make: Callable[[], nnx.Module]) -> dict[str, Shape]:
    abstract = nnx.state(nnx.eval_shape(make), nnx.Param)
    return {path: leaf.shape for path, leaf in flat_shapes(abstract).items()}


def component_makers(
    checkpoint: Checkpoint, dtype: DTypeLike, vae_dtype: DTypeLike
) -> dict[str, Callable[[], nnx.Module]]:
    """Component folder -> maker of its module, of all that runs on the mesh's first device."""
    makers: dict[str, Callable[[], nnx.Module]] = {
        "vae": lambda: VAE(checkpoint.vae, dtype=vae_dtype, rngs=nnx.Rngs(0)),
        "text_encoder": lambda: UMT5Encoder(checkpoint.text_encoder, dtype=dtype, rngs=nnx.Rngs(0)),
    }
    image_encoder = checkpoint.image_encoder
    if image_encoder is not None:
        # float32 in a bfloat16 pipeline too, as Wan's examples load it
        makers["image_encoder"] = lambda: CLIPVisionEncoder(image_encoder, dtype=jnp.float32, rngs=nnx.Rngs(0))
    return makers


def component_rules(name: str, checkpoint: Checkpoint, files: TensorFiles) -> list[Rule]:
    """The rule table for a component's files."""
    if name == "image_encoder" and checkpoint.image_encoder is not None:
        return image_encoder_rules(files.shapes, checkpoint.image_encoder.num_hidden_layers)
    return {"vae": VAE_RULES, "text_encoder": TEXT_ENCODER}.get(name, TRANSFORMER)


def _clip_encoder(module: nnx.Module, processor: Any) -> Callable:
    run = jitted(module)
    return lambda image: run(clip_pixels(image, processor)[None])


def jitted(module: nnx.Module) -> Callable:
    """The module's call as one compiled function of arrays, its parameters an argument and not a constant."""
    graph, state = nnx.split(module)
    run = jax.jit(lambda state, *arguments: nnx.merge(graph, state)(*arguments))
    return lambda *arguments: run(state, *arguments)


def default_dtype(device: jax.Device) -> str:
    """bfloat16 on accelerators, float32 on a CPU."""
    return "float32" if device.platform == "cpu" else "bfloat16"


def check_dtype(name: str, value: str | None) -> None:
    """Raises ValueError for a dtype that is not offered."""
    if value is not None and value not in DTYPES:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(DTYPES)}")
