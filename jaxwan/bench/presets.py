"""What is measured: the published models at their official sizes, and small ones for CPUs. Configurations only."""

from dataclasses import dataclass, field, replace

from jaxwan.config import TextEncoderConfig, TransformerConfig, VAEConfig
from jaxwan.flops import TransformerFlops, transformer_flops
from jaxwan.geometry import Geometry

BOUNDARY = 0.875  # where the second expert of A14B takes over


@dataclass(frozen=True)
class Preset:
    """One model at one size."""

    name: str
    transformer: TransformerConfig
    vae: VAEConfig
    size: tuple[int, int, int]  # frames, height, width
    steps: int  # of a whole clip, each with guidance
    experts: int = 1
    first_frame: bool = False  # timesteps of their own for every latent frame
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    matmul: int = 16384  # side of the square product that the ceiling is measured with
    copy_bytes: int = 2**32
    sustain: float = 3.0  # seconds that a ceiling is held
    load_bytes: int = 2**32  # of the checkpoint that loading is timed with
    whole_pair: bool = False  # whether the comparison with Diffusers also runs all layers
    needs_accelerator: bool = True

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(T, H, W) of the latents."""
        return self._geometry.latent_shape(*self.size)

    @property
    def tokens(self) -> int:
        """Length of the transformer's sequence."""
        return self._geometry.num_tokens(*self.size)

    @property
    def timesteps(self) -> int:
        """Groups of tokens with a timestep of their own."""
        return self.latent_shape[0] if self.first_frame else 1

    @property
    def forward(self) -> TransformerFlops:
        """FLOPs of one model evaluation."""
        return transformer_flops(self.transformer, self.tokens, timesteps=self.timesteps)

    def with_layers(self, layers: int) -> "Preset":
        """The same model, shallower or deeper."""
        return replace(self, transformer=replace(self.transformer, num_layers=layers))

    @property
    def _geometry(self) -> Geometry:
        scale = self.vae.scale_factor_temporal, self.vae.scale_factor_spatial
        return Geometry(*scale, self.transformer.patch_size, self.vae.z_dim)


_A14B = TransformerConfig()
_TI2V = TransformerConfig(in_channels=48, out_channels=48, num_attention_heads=24, num_layers=30, ffn_dim=14336)
_1_3B = TransformerConfig(num_attention_heads=12, num_layers=30, ffn_dim=8960)
_VAE_2_2 = VAEConfig(
    base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
    scale_factor_spatial=16, latents_mean=(0.0,) * 48, latents_std=(1.0,) * 48,
)  # fmt: skip

# What CPUs do in seconds. "small" rehearses the harness; "tiny" is the bundled model; "mid" has layers that are worth
# measuring on a CPU, with ticks of over 50 ms; "pair" is for two cores of it, one of which takes half a second a tick;
# "vae2.1-64p5" has the convolutions of the official VAE
SMALL = Preset(
    "small",
    TransformerConfig(num_attention_heads=4, attention_head_dim=32, num_layers=4, ffn_dim=256, text_dim=64, freq_dim=8),
    VAEConfig(base_dim=8, num_res_blocks=1), (9, 64, 96), 4, experts=2,
    text_encoder=TextEncoderConfig(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=100),
    matmul=512, copy_bytes=2**24, sustain=0.2, load_bytes=2**23, whole_pair=True, needs_accelerator=False,
)  # fmt: skip
TINY = replace(
    SMALL, name="tiny", size=(17, 64, 96), steps=20, vae=VAEConfig(base_dim=16, num_res_blocks=1),
    transformer=TransformerConfig(
        num_attention_heads=4, attention_head_dim=32, num_layers=8, ffn_dim=512, text_dim=96, freq_dim=256
    ),
    text_encoder=TextEncoderConfig(vocab_size=320, d_model=96, d_kv=24, d_ff=256, num_layers=3, num_heads=4),
)  # fmt: skip
MID = replace(
    SMALL, name="mid", size=(13, 512, 512), steps=20, experts=1, matmul=2048, sustain=1.0, load_bytes=2**29,
    transformer=TransformerConfig(num_attention_heads=4, num_layers=2, ffn_dim=2048, text_dim=64),
)  # fmt: skip
PAIR = replace(
    MID, name="pair", size=(5, 256, 512),
    transformer=TransformerConfig(
        num_attention_heads=4, attention_head_dim=64, num_layers=4, ffn_dim=1024, text_dim=64, freq_dim=64
    ),
)  # fmt: skip
WIDE_VAE = replace(SMALL, name="vae2.1-64p5", size=(5, 64, 64), vae=VAEConfig())
MID_VAES = (
    replace(SMALL, name="vae2.1-mid", size=(9, 128, 192), vae=VAEConfig(base_dim=32)),
    replace(SMALL, name="vae2.2-mid", size=(9, 128, 192), vae=replace(_VAE_2_2, base_dim=32, decoder_base_dim=48)),
)

PRESETS = {
    preset.name: preset
    for preset in (
        Preset("t2v-a14b-720p", _A14B, VAEConfig(), (81, 720, 1280), 40, experts=2),
        Preset("t2v-a14b-480p", _A14B, VAEConfig(), (81, 480, 832), 40, experts=2, whole_pair=True),
        Preset("ti2v-5b-704p121", _TI2V, _VAE_2_2, (121, 704, 1280), 50, first_frame=True),
        Preset("t2v-1.3b-480p", _1_3B, VAEConfig(), (81, 480, 832), 50, whole_pair=True),
        SMALL,
        TINY,
        MID,
        PAIR,
        WIDE_VAE,
        *MID_VAES,
    )
}
FULL_SIZE = tuple(name for name, preset in PRESETS.items() if preset.needs_accelerator)
