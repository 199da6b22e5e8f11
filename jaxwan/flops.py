"""The FLOP account: how many floating-point operations the models must do, from configurations and sizes alone.

Only matrix products and convolutions count, a multiply-add as 2; everything else moves bytes. Padding counts as work.
A forward is one model evaluation for one sample; guidance takes two of them.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

from jaxwan.config import TextEncoderConfig, TransformerConfig, VAEConfig

TEXT_ROWS = 512  # the published pipelines pad prompts to it


class TransformerFlops(NamedTuple):
    """FLOPs of one DiT forward, by where they are."""

    linear: int  # projections and MLP of all layers, keys and values of the text included
    self_attention: int
    cross_attention: int
    ends: int  # embedders of patches, timesteps and text, and the head

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def transformer_flops(
    cfg: TransformerConfig, tokens: int, *, text_rows: int = TEXT_ROWS, image_rows: int = 0, timesteps: int = 1,
    pairs: Fraction | None = None, layers: int | None = None, tp: int = 1,
) -> TransformerFlops:  # fmt: skip
    """One forward over `tokens`, with `image_rows` CLIP rows and `timesteps` groups of tokens of their own timestep.

    Of a part of it: `layers` of all, `tokens` with so many `pairs` of a query and a key in self-attention, one in `tp`
    of the heads and the MLP.
    A14B at 75,600 tokens: 1,810 linear, 4,682 self-attention, 32 cross-attention and 0.15 at the ends, in TFLOP.
    """
    d, layers, pairs = cfg.dim, layers or cfg.num_layers, pairs or Fraction(tokens**2)
    # self-attention's q, k, v, out and cross-attention's q, out are D x D; the MLP is D x M twice
    per_layer = tokens * (12 * d * d + 4 * d * cfg.ffn_dim) + image_rows * 4 * d * (cfg.added_kv_proj_dim or d)
    return TransformerFlops(
        linear=layers * (per_layer + text_rows * 4 * d * d) // tp,  # the text's keys and values
        self_attention=int(layers * 4 * pairs * d / tp),
        cross_attention=layers * 4 * tokens * (text_rows + image_rows) * d // tp,
        ends=_ends_flops(cfg, tokens, text_rows, image_rows, timesteps),
    )


def _ends_flops(cfg: TransformerConfig, tokens: int, text_rows: int, image_rows: int, timesteps: int) -> int:
    d, width = cfg.dim, cfg.image_dim or 0
    patch = cfg.patch_size[0] * cfg.patch_size[1] * cfg.patch_size[2]
    patches = tokens * patch * (cfg.in_channels + cfg.out_channels) * d
    time = timesteps * (cfg.freq_dim * d + d * d + 6 * d * d)
    text = text_rows * (cfg.text_dim * d + d * d)
    image = image_rows * (width * width + width * d)
    return 2 * (patches + time + text + image)


def text_encoder_flops(cfg: TextEncoderConfig, rows: int = TEXT_ROWS) -> int:
    """One prompt of `rows` tokens, padding included, through UMT5."""
    inner = cfg.num_heads * cfg.d_kv
    linear = rows * 2 * (4 * cfg.d_model * inner + 3 * cfg.d_model * cfg.d_ff)
    return cfg.num_layers * (linear + 4 * rows**2 * inner)


# The VAE. `t` counts the frames at a level: 1 for the first latent frame and 1, 2 or 4 for each of the others.
# The first frame of a video has nothing ahead, so that causal convolutions apply only one tap in time to it. Counters
# of programs that pad it with zero frames find three: `first_taps=3` compares with those, and is about 1 % more.


def vae_encode_flops(cfg: VAEConfig, latent_shape: tuple[int, int, int], *, first_taps: int = 1) -> int:
    """Pixels to latents of `latent_shape` (T, H, W)."""
    t, h, w = latent_shape
    dims = [cfg.base_dim * m for m in (1, *cfg.dim_mult)]
    halvings = (*cfg.temperal_downsample, None)
    t, h, w = 4 * (t - 1) + 1, h << len(halvings) - 1, w << len(halvings) - 1
    total = _causal(t, h * w, cfg.in_channels, dims[0], first_taps)
    for d_in, d_out, time in zip(dims[:-1], dims[1:], halvings, strict=True):
        total += _resnets(t, h * w, d_in, d_out, cfg.num_res_blocks, first_taps)
        if time is not None:
            h, w = h // 2, w // 2
            total += _conv(t * h * w, 9, d_out, d_out)
        if time:
            t = (t - 1) // 2 + 1
            total += _conv((t - 1) * h * w, 3, d_out, d_out)
    total += _mid(t, h * w, dims[-1], first_taps) + _causal(t, h * w, dims[-1], 2 * cfg.z_dim, first_taps)
    return total + _conv(t * h * w, 1, 2 * cfg.z_dim, 2 * cfg.z_dim)


def vae_decode_flops(cfg: VAEConfig, latent_shape: tuple[int, int, int], *, first_taps: int = 1) -> int:
    """Latents of `latent_shape` (T, H, W) to pixels."""
    t, h, w = latent_shape
    mult = cfg.dim_mult[::-1]
    dims = [(cfg.decoder_base_dim or cfg.base_dim) * m for m in (mult[0], *mult)]
    doublings = (*cfg.temperal_downsample[::-1], None)
    total = _conv(t * h * w, 1, cfg.z_dim, cfg.z_dim) + _causal(t, h * w, cfg.z_dim, dims[0], first_taps)
    total += _mid(t, h * w, dims[0], first_taps)
    for level, (d_in, d_out, time) in enumerate(zip(dims[:-1], dims[1:], doublings, strict=True)):
        halved = not cfg.is_residual and level > 0  # going up halves the channels in the 2.1 kind
        total += _resnets(t, h * w, d_in // 2 if halved else d_in, d_out, cfg.num_res_blocks + 1, first_taps)
        if time:
            total += _conv((t - 1) * h * w, 3, d_out, 2 * d_out)
            t = 2 * (t - 1) + 1
        if time is not None:
            h, w = 2 * h, 2 * w
            total += _conv(t * h * w, 9, d_out, d_out if cfg.is_residual else d_out // 2)
    return total + _causal(t, h * w, dims[-1], cfg.out_channels, first_taps)


def _conv(outputs: int, taps: int, c_in: int, c_out: int) -> int:
    return 2 * outputs * taps * c_in * c_out


def _causal(t: int, pixels: int, c_in: int, c_out: int, first_taps: int) -> int:
    """A convolution of 3 x 3 x 3 over t frames."""
    return _conv((3 * (t - 1) + first_taps) * pixels, 9, c_in, c_out)


def _resnets(t: int, pixels: int, d_in: int, d_out: int, count: int, first_taps: int) -> int:
    shortcut = _conv(t * pixels, 1, d_in, d_out) if d_in != d_out else 0
    rest = (2 * count - 1) * _causal(t, pixels, d_out, d_out, first_taps)
    return _causal(t, pixels, d_in, d_out, first_taps) + shortcut + rest


def _mid(t: int, pixels: int, dim: int, first_taps: int) -> int:
    """Two residual blocks around attention among the pixels of each frame."""
    attention = _conv(t * pixels, 1, dim, 4 * dim) + 4 * t * pixels**2 * dim
    return 4 * _causal(t, pixels, dim, dim, first_taps) + attention


# What the devices of a mesh do of it, and send each other


class Share(NamedTuple):
    """What a device of a mesh has of a forward: of the DiT's layers, a frame's tokens (pads included), heads and MLP.

    ulysses: of how many devices trade tokens for heads; keys and values go round the sp / ulysses groups of them.
    """

    layers: int
    tokens: int
    sizes: Mapping[str, int]  # of the mesh's axes
    ulysses: int


def device_share(cfg: TransformerConfig, sizes: Mapping[str, int], per_frame: int, ulysses: int) -> Share:
    """The share of a device that has as much as any, on a mesh of these sizes, of frames of so many tokens."""
    return Share(-(-cfg.num_layers // sizes["pp"]), -(-per_frame // sizes["sp"]), sizes, ulysses)


def device_flops(
    cfg: TransformerConfig, share: Share, frames: int, per_frame: int, *, text_rows: int = TEXT_ROWS,
    image_rows: int = 0, timesteps: int = 1,
) -> TransformerFlops:  # fmt: skip
    """What such a device computes in a tick, in which it applies its layers to one micro-batch of so many frames."""
    sp, tokens = share.sizes["sp"], frames * share.tokens
    # those that trade tokens for heads cut pads away; where keys and values go round, pads do too
    pairs = Fraction((frames * per_frame) ** 2, sp) if share.ulysses == sp else Fraction(tokens * tokens * sp)
    return transformer_flops(
        cfg, tokens, text_rows=text_rows, image_rows=image_rows, timesteps=timesteps, pairs=pairs, layers=share.layers,
        tp=share.sizes["tp"],
    )  # fmt: skip


class Sent(NamedTuple):
    """A kind of collective that a device takes part in during a tick of the ring."""

    axis: str
    kind: str  # as XLA names it
    among: int  # devices
    a_layer: int  # how many in each layer
    a_tick: int  # and beside the layers
    payload: int  # bytes that this device brings to one of them

    def times(self, layers: int) -> int:
        """How many in a tick."""
        return self.a_layer * layers + self.a_tick

    def sent(self, layers: int) -> int:
        """Bytes that the device sends in a tick. An all-reduce among n sends 2 (n - 1) / n of its payload, an
        all-to-all (n - 1) / n of it, as a ring of devices does them."""
        parts = {"all-reduce": 2 * (self.among - 1), "all-to-all": self.among - 1, "collective-permute": self.among}
        return self.times(layers) * self.payload * parts[self.kind] // self.among


def tick_traffic(
    cfg: TransformerConfig, share: Share, frames: int, itemsize: int, *, text_rows: int = TEXT_ROWS, image_rows: int = 0
) -> list[Sent]:
    """All collectives of a tick, in which a device applies its layers to one micro-batch; hidden states have `itemsize`
    bytes a number."""
    branches, pp, sp, tp = (share.sizes[axis] for axis in ("cfg", "pp", "sp", "tp"))
    tokens = frames * share.tokens
    hidden, groups = tokens * cfg.dim * itemsize, sp // share.ulysses
    apart = bool(image_rows) and cfg.added_kv_proj_dim is not None  # keys of their own for the image
    patch = 4 * tokens * cfg.out_channels * cfg.patch_size[0] * cfg.patch_size[1] * cfg.patch_size[2]
    return [
        one for one in (
            Sent("cfg", "all-reduce", branches, 0, 1, 2 * patch),  # both velocities
            Sent("pp", "collective-permute", pp, 0, 1, hidden),
            Sent("sp", "all-to-all", share.ulysses, 4, 0, hidden // tp),  # q, k, v and the result
            Sent("sp", "collective-permute", groups, 2 * (groups - 1), 0, hidden // tp),  # k and v
            Sent("tp", "all-reduce", tp, 3, 0, hidden),  # what attention, cross-attention and MLP give
            Sent("tp", "all-reduce", tp, 3, 0, 4 * tokens),  # mean squares of q and k, and of q in cross-attention
            Sent("tp", "all-reduce", tp, 1, 0, 4 * text_rows),  # of the text's k
            Sent("tp", "all-reduce", tp, int(apart), 0, 4 * image_rows),
        ) if one.among > 1 and one.a_layer + one.a_tick
    ]  # fmt: skip
