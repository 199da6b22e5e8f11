"""What a pipeline is made of. Shapes may stand for the parameters: enough to compile, before any tensor is read."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.typing import DTypeLike

from jaxwan.models.image_encoder import CLIPVisionEncoder
from jaxwan.models.layers import abstract
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.models.vae import VAE
from jaxwan.models.video_coder import VideoCoder
from jaxwan.pipelines.checkpoint import Checkpoint
from jaxwan.pipelines.denoise import Denoiser
from jaxwan.pipelines.dit import Weights, placed_weights, shapes_at
from jaxwan.pipelines.encoder_ring import EncoderRing, make_encoder_ring, placed
from jaxwan.pipelines.loras import described
from jaxwan.pipelines.prompt import Tokenizer
from jaxwan.pipelines.request import Job
from jaxwan.sharding.mesh import devices_behind
from jaxwan.sharding.space import strip_mesh

MODELS = {"vae": VAE, "text_encoder": UMT5Encoder, "image_encoder": CLIPVisionEncoder}  # by component folder


class Parts(NamedTuple):
    """What a pipeline is made of. DiT and encoders are spread over the mesh, the VAE is whole on each of its devices,
    or on others behind them."""

    denoiser: Denoiser
    coder: VideoCoder
    tokenizer: Tokenizer | None
    encode_text: EncoderRing | None  # (tokens, mask) -> rows
    image_processor: Any  # with the next: Wan2.1 image to video
    encode_image: EncoderRing | None  # processed images -> CLIP rows
    seconds: dict[str, float]

    @property
    def vae_dtype(self) -> Any:
        """Of the VAE's parameters."""
        return jax.tree.leaves(self.coder.state)[0].dtype

    def states(self) -> dict[str, Any]:
        """The parameters by component folder, but for the DiT's."""
        encoders = {"text_encoder": self.encode_text, "image_encoder": self.encode_image}
        return {"vae": self.coder.state} | {name: ring.weights for name, ring in encoders.items() if ring is not None}

    def filled(self, states: Mapping[str, Any], weights: Weights) -> "Parts":
        """The same programs with other parameters: by component folder, and the DiT's."""
        return self._replace(
            denoiser=replace(self.denoiser, weights=weights),
            coder=self.coder.holding(states["vae"]),
            encode_text=self.encode_text and replace(self.encode_text, weights=states["text_encoder"]),
            encode_image=self.encode_image and replace(self.encode_image, weights=states["image_encoder"]),
        )


def job_settings(checkpoint: Checkpoint, parts: Parts, job: Job) -> tuple[dict[str, Any], ...]:
    """What makes each video of a job: the call's settings, the model and its numbers."""
    made_by = pipeline_settings(checkpoint, parts)
    return tuple(made_by | settings for settings in job.settings())


def pipeline_settings(checkpoint: Checkpoint, parts: Parts) -> dict[str, Any]:
    """The model and its numbers."""
    made_by: dict[str, Any] = {
        "model": checkpoint.name,
        "dtype": str(parts.denoiser.dtype),
        "vae_dtype": str(parts.vae_dtype),
    }
    if checkpoint.weights_variant is not None:
        made_by["variant"] = checkpoint.weights_variant
    if checkpoint.parts:
        made_by["components"] = [name for name, _ in checkpoint.parts]  # from files of their own
    if checkpoint.loras:
        made_by["loras"] = described(checkpoint.loras)
    return made_by


def abstract_parts(
    checkpoint: Checkpoint, mesh: Mesh, dtype: DTypeLike, vae_dtype: DTypeLike, tokenizer: Tokenizer | None = None,
    image_processor: Any = None, ulysses: int | None = None, vae_devices: int = 0,
) -> Parts:  # fmt: skip
    """The parts on a mesh, with shapes of parameters, each where it will be. ulysses: as of `MeshSpec`. vae_devices:
    how many of its own the VAE has, behind the mesh's; 0: it is on the mesh's."""
    strips = strip_mesh(devices_behind(mesh, vae_devices) if vae_devices else mesh.devices.flat)
    models = abstract_components(checkpoint, dtype, vae_dtype)
    states = placed_components(models, mesh, strips)
    rings = {
        name: make_encoder_ring(MODELS[name], graph, states[name], mesh)
        for name, (graph, _) in models.items()
        if name != "vae"
    }
    weights = placed_weights(checkpoint.transformer, checkpoint.num_experts, mesh, dtype)
    return Parts(
        denoiser=Denoiser(checkpoint.transformer, weights, mesh, jnp.dtype(dtype), ulysses),
        coder=VideoCoder(nnx.merge(models["vae"][0], states["vae"]), mesh=strips),
        tokenizer=tokenizer,
        encode_text=rings.get("text_encoder"),
        image_processor=image_processor,
        encode_image=rings.get("image_encoder"),
        seconds={},
    )


def abstract_components(
    checkpoint: Checkpoint, dtype: DTypeLike, vae_dtype: DTypeLike
) -> dict[str, tuple[Any, nnx.State]]:
    """Component folder -> structure and shapes of its model, of all but the DiT."""
    configs = {
        "vae": (checkpoint.vae, vae_dtype), "text_encoder": (checkpoint.text_encoder, dtype),
        # float32 in a bfloat16 pipeline too, as Wan's examples load it
        "image_encoder": (checkpoint.image_encoder, jnp.float32),
    }  # fmt: skip
    return {
        name: abstract(MODELS[name], cfg, jnp.dtype(dtype)) for name, (cfg, dtype) in configs.items() if cfg is not None
    }


def placed_components(models: Mapping[str, tuple[Any, nnx.State]], mesh: Mesh, strips: Mesh) -> dict[str, nnx.State]:
    """Component folder -> shapes, dtypes and shardings of its parameters: the VAE's on all devices of `strips`."""
    every = NamedSharding(strips, PartitionSpec()) if strips.size > 1 else SingleDeviceSharding(strips.devices.flat[0])
    return {
        name: shapes_at(every, state) if name == "vae" else placed(state, mesh) for name, (_, state) in models.items()
    }
