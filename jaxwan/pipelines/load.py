"""A checkpoint onto a mesh: every component's files proved to fit, then read to where they are used."""

import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxwan.convert.diffusers import TEXT_ENCODER, TRANSFORMER, image_encoder_rules
from jaxwan.convert.diffusers import VAE as VAE_RULES
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import Progress, flat_shapes, load_module, prove
from jaxwan.convert.rules import CheckpointError, Rule, Shape
from jaxwan.models.transformer import WanTransformer
from jaxwan.pipelines.checkpoint import Checkpoint
from jaxwan.pipelines.denoise import Weights, load_weights
from jaxwan.pipelines.media import load_image_processor
from jaxwan.pipelines.parts import Parts, abstract_parts, component_makers
from jaxwan.pipelines.prompt import load_tokenizer
from jaxwan.pipelines.request import Job, check_mesh
from jaxwan.pipelines.stages import Stages
from jaxwan.pipelines.warmup import compiling, job_programs
from jaxwan.sharding.mesh import MeshSpec, make_mesh

DTYPES = ("bfloat16", "float32")


def load_parts(
    checkpoint: Checkpoint, mesh: MeshSpec, dtype: str | None, vae_dtype: str, job: Job | None = None, *,
    progress: bool = True,
) -> Parts:  # fmt: skip
    """Load a checkpoint whose configuration was read; dtype None is the devices' default.

    The programs of a `job` are compiled meanwhile; `seconds` says under "compile" for how long nothing else happened.
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
    parts = abstract_parts(checkpoint, devices, dtype, vae_dtype, tokenizer, processor)
    stages = Stages(progress=progress)
    start = time.perf_counter()
    programs = [] if job is None else list(job_programs(checkpoint, parts, job))
    with compiling(programs) as finished:
        traced = time.perf_counter() - start
        with stages.stage("load", sum(f.total_bytes for f in files.values()), "B") as update:
            loaded = load_tensors(checkpoint, devices, dtype, vae_dtype, files, update)
        if programs:
            with stages.stage("compile", len(programs), "program") as update:
                for _ in finished:
                    update(1)
    stages.seconds["compile"] += traced
    return parts.filled(*loaded)._replace(seconds=stages.seconds)


def load_tensors(
    checkpoint: Checkpoint, mesh: Mesh, dtype: str, vae_dtype: str, files: dict[str, TensorFiles], progress: Progress
) -> tuple[dict[str, nnx.State], Weights]:
    """Parameters by component folder, and the DiT's, from files that were proved to hold them."""
    states = {
        name: nnx.split(load_module(
            make, files[name], component_rules(name, checkpoint, files[name]), device=mesh.devices.flat[0],
            what=str(checkpoint.folder / name), progress=progress,
        ))[1]
        for name, make in component_makers(checkpoint, dtype, vae_dtype).items()
    }  # fmt: skip
    experts = [files[name] for name in checkpoint.experts]
    return states, load_weights(checkpoint.transformer, experts, mesh, dtype, progress)


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


def component_rules(name: str, checkpoint: Checkpoint, files: TensorFiles) -> list[Rule]:
    """The rule table for a component's files."""
    if name == "image_encoder" and checkpoint.image_encoder is not None:
        return image_encoder_rules(files.shapes, checkpoint.image_encoder.num_hidden_layers)
    return {"vae": VAE_RULES, "text_encoder": TEXT_ENCODER}.get(name, TRANSFORMER)


def default_dtype(device: jax.Device) -> str:
    """bfloat16 on accelerators, float32 on a CPU."""
    return "float32" if device.platform == "cpu" else "bfloat16"


def check_dtype(name: str, value: str | None) -> None:
    """Raises ValueError for a dtype that is not offered."""
    if value is not None and value not in DTYPES:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(DTYPES)}")
