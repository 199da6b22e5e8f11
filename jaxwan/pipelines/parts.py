"""What a pipeline is made of. Shapes may stand for the parameters: enough to compile, before any tensor is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from jaxwan.models.image_encoder import CLIPVisionEncoder
from jaxwan.models.layers import abstract
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.models.vae import VAE
from jaxwan.models.video_coder import VideoCoder
from jaxwan.pipelines.checkpoint import Checkpoint
from jaxwan.pipelines.denoise import Denoiser
from jaxwan.pipelines.dit import Weights, placed_weights, shapes_at
from jaxwan.pipelines.prompt import Tokenizer


@dataclass(frozen=True)
class Jitted:
    """A module's call as one compiled function of arrays, its parameters an argument and not a constant."""

    run: Callable  # (state, *arguments)
    state: Any

    def __call__(self, *arguments: Any) -> Any:
        return self.run(self.state, *arguments)


class Parts(NamedTuple):
    """What a pipeline is made of. The DiT is spread over the mesh; all else lives on its first device."""

    denoiser: Denoiser
    coder: VideoCoder
    tokenizer: Tokenizer | None
    encode_text: Jitted | None  # (tokens, mask) -> rows
    image_processor: Any  # with the next: Wan2.1 image to video
    encode_image: Jitted | None  # processed images -> CLIP rows
    seconds: dict[str, float]

    def states(self) -> dict[str, Any]:
        """The parameters by component folder, but for the DiT's."""
        encoders = {"text_encoder": self.encode_text, "image_encoder": self.encode_image}
        return {"vae": self.coder.state} | {name: coder.state for name, coder in encoders.items() if coder is not None}

    def filled(self, states: Mapping[str, Any], weights: Weights) -> "Parts":
        """The same programs with other parameters: by component folder, and the DiT's."""
        return self._replace(
            denoiser=replace(self.denoiser, weights=weights),
            coder=self.coder.holding(states["vae"]),
            encode_text=self.encode_text and replace(self.encode_text, state=states["text_encoder"]),
            encode_image=self.encode_image and replace(self.encode_image, state=states["image_encoder"]),
        )


def abstract_parts(
    checkpoint: Checkpoint, mesh: Mesh, dtype: DTypeLike, vae_dtype: DTypeLike, tokenizer: Tokenizer | None = None,
    image_processor: Any = None, ulysses: int | None = None,
) -> Parts:  # fmt: skip
    """The parts on a mesh, with shapes of parameters, each where it will be. ulysses: as of `MeshSpec`."""
    first = SingleDeviceSharding(mesh.devices.flat[0])
    models = abstract_components(checkpoint, dtype, vae_dtype)
    placed = {name: (graph, shapes_at(first, state)) for name, (graph, state) in models.items()}
    weights = placed_weights(checkpoint.transformer, checkpoint.num_experts, mesh, dtype)
    return Parts(
        denoiser=Denoiser(checkpoint.transformer, weights, mesh, jnp.dtype(dtype), ulysses),
        coder=VideoCoder(nnx.merge(*placed["vae"])),
        tokenizer=tokenizer,
        encode_text=_jitted(*placed["text_encoder"]) if "text_encoder" in placed else None,
        image_processor=image_processor,
        encode_image=_jitted(*placed["image_encoder"]) if "image_encoder" in placed else None,
        seconds={},
    )


def abstract_components(
    checkpoint: Checkpoint, dtype: DTypeLike, vae_dtype: DTypeLike
) -> dict[str, tuple[Any, nnx.State]]:
    """Component folder -> structure and shapes of its model, of all that runs on the mesh's first device."""
    models = {"vae": abstract(VAE, checkpoint.vae, jnp.dtype(vae_dtype))}
    if checkpoint.text_encoder is not None:
        models["text_encoder"] = abstract(UMT5Encoder, checkpoint.text_encoder, jnp.dtype(dtype))
    if checkpoint.image_encoder is not None:
        # float32 in a bfloat16 pipeline too, as Wan's examples load it
        models["image_encoder"] = abstract(CLIPVisionEncoder, checkpoint.image_encoder, jnp.dtype(jnp.float32))
    return models


def _jitted(graph: Any, state: Any) -> Jitted:
    return Jitted(_program(graph), state)


@lru_cache(maxsize=8)
def _program(graph: Any) -> Callable:
    """The jitted call of a model of this structure, the same for all pipelines that have one."""
    return jax.jit(lambda state, *arguments: nnx.merge(graph, state)(*arguments))
