"""Names and shapes of all tensors of the published models at full size, from the rule tables and abstract models."""

import jax.numpy as jnp

from jaxwan.config import TextEncoderConfig, TransformerConfig, VAEConfig
from jaxwan.convert.detect import Kind, config_of, rules_of
from jaxwan.convert.load import flat_shapes
from jaxwan.convert.rules import expected_sources
from jaxwan.models.image_encoder import CLIPVisionEncoder
from jaxwan.models.layers import abstract
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.models.transformer import WanTransformer
from jaxwan.models.vae import VAE

MODELS = {"transformer": WanTransformer, "vae": VAE, "text_encoder": UMT5Encoder, "image_encoder": CLIPVisionEncoder}
LAYOUTS = ("original", "diffusers")
CONFIGS = {
    ("transformer", "1.3B"): (TransformerConfig(num_attention_heads=12, num_layers=30, ffn_dim=8960), 825),
    ("transformer", "5B"): (
        TransformerConfig(num_attention_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48), 825,
    ),
    ("transformer", "14B"): (TransformerConfig(), 1095),
    ("transformer", "I2V-A14B"): (TransformerConfig(in_channels=36), 1095),
    ("transformer", "2.1 I2V"): (TransformerConfig(in_channels=36, image_dim=1280, added_kv_proj_dim=5120), 1303),
    ("transformer", "FLF2V"): (
        TransformerConfig(in_channels=36, image_dim=1280, added_kv_proj_dim=5120, pos_embed_seq_len=514), 1304,
    ),
    ("vae", "2.1"): (VAEConfig(), 194),
    ("text_encoder", "UMT5"): (TextEncoderConfig(), 242),
}  # fmt: skip


def vae_2_2() -> VAEConfig:
    """The configuration that the sizes of the published file tell."""
    sizes = {"conv2.weight": (48, 48, 1, 1, 1), "encoder.conv1.weight": (160, 12, 3, 3, 3)}
    sizes |= {"decoder.head.2.weight": (12, 256, 3, 3, 3)}
    sizes |= {"encoder.downsamples.0.downsamples.2.resample.1.weight": (160, 160, 3, 3)}
    config = config_of(Kind("vae", "original"), sizes)
    assert isinstance(config, VAEConfig)
    return config


def sources(component, config, layout):
    """The parameters' shapes by path, the rule table, and the tensors' shapes by name."""
    shapes = {
        path: s.shape for path, s in flat_shapes(abstract(MODELS[component], config, jnp.dtype(jnp.float32))[1]).items()
    }
    signs = {"transformer": "head.modulation", "vae": "decoder.middle.0.residual.0.gamma",
            "text_encoder": "token_embedding.weight", "image_encoder": "visual.transformer.0.x"}  # fmt: skip
    rules = rules_of(component, config, {signs[component]: ()} if layout == "original" else {})
    return shapes, rules, {key: shape for key, (_, shape) in expected_sources(shapes, rules).items()}
