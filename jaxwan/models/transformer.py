"""The Wan diffusion transformer (DiT): latents, timesteps and text to velocity.

The parts are methods of their own because the pipeline ring runs them on different devices and at different ticks:
`embed_latents` -> `run_blocks` (a stage's share of the layers) -> `head`. `__call__` is the plain forward.

Timesteps are `[B, Q]`: Q = 1 (one per sample), Q = T (one per latent frame: TI2V) or Q = S (one per token). Tokens run
through time first, so S tokens are Q groups of S/Q, and each group is modulated by its own timestep.

Source: diffusers transformer_wan.py; Wan2.2 wan/modules/model.py.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from jaxwan.config import TransformerConfig
from jaxwan.kernels.attention import attention
from jaxwan.models.layers import LayerNorm, Linear, RMSNorm, param, stack
from jaxwan.models.rope import rope_tables, rotate
from jaxwan.sharding.sequence import TokenSplit

HIGHEST = jax.lax.Precision.HIGHEST
AnyArray = TypeVar("AnyArray", Array, np.ndarray)
Rope = tuple[Float[Array, "s k2"], Float[Array, "s k2"]]


@dataclass(frozen=True)
class Parallel:
    """How a layer's work is split over a mesh, inside shard_map. By default it is not, and nothing is sent.

    heads: the mesh axis over which heads and the MLP are split; their parameters are this device's share then.
    tokens: how the video's tokens are split.
    """

    heads: str | None = None
    tokens: TokenSplit | None = None


ALONE = Parallel()


class Context(NamedTuple):
    """What cross-attention looks at, in model width: text rows, and CLIP's image rows in Wan2.1 image-to-video.

    bias: added to the logits of each text row. Published models have none; log(n) makes one row count as n equal ones,
    which spares the training of small models the many rows behind a text's end.
    """

    text: Float[Array, "b l d"]
    image: Float[Array, "b i d"] | None
    bias: Float[Array, "b l"] | None = None


class _Attention(nnx.Module):
    """What both kinds have: heads made of the model width and normalised all together, and the way back."""

    def __init__(self, cfg: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs, parallel: Parallel = ALONE):
        self.q = _to_heads(cfg.dim, cfg, dtype, rngs)
        self.k = _to_heads(cfg.dim, cfg, dtype, rngs)
        self.v = _to_heads(cfg.dim, cfg, dtype, rngs)
        self.out = Linear(cfg.dim, cfg.dim, axes=("head", None), sum_over=parallel.heads, dtype=dtype, rngs=rngs)
        self.norm_q = _norm_of_heads(cfg, dtype, parallel)
        self.norm_k = _norm_of_heads(cfg, dtype, parallel)
        self.head_dim = cfg.attention_head_dim


class SelfAttention(_Attention):
    """Attention among the video's tokens; q and k are normalised over all heads together, then rotated."""

    def __init__(self, cfg: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs, parallel: Parallel = ALONE):
        super().__init__(cfg, dtype=dtype, rngs=rngs, parallel=parallel)
        self.tokens = parallel.tokens

    def __call__(self, x: Float[Array, "b s d"], rope: Rope) -> Float[Array, "b s d"]:
        q = rotate(split_heads(self.norm_q(self.q(x)), self.head_dim), rope)
        k = rotate(split_heads(self.norm_k(self.k(x)), self.head_dim), rope)
        attend = attention if self.tokens is None else self.tokens.attention
        return self.out(merge_heads(attend(q, k, split_heads(self.v(x), self.head_dim))))


class CrossAttention(_Attention):
    """Attention from tokens to text, plus (2.1 image-to-video) to CLIP's rows with keys and values of their own."""

    def __init__(self, cfg: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs, parallel: Parallel = ALONE):
        super().__init__(cfg, dtype=dtype, rngs=rngs, parallel=parallel)
        self.has_image = cfg.added_kv_proj_dim is not None
        if cfg.added_kv_proj_dim is not None:
            self.image_k = _to_heads(cfg.added_kv_proj_dim, cfg, dtype, rngs)
            self.image_v = _to_heads(cfg.added_kv_proj_dim, cfg, dtype, rngs)
            self.norm_image_k = _norm_of_heads(cfg, dtype, parallel)

    def __call__(self, x: Float[Array, "b s d"], context: Context) -> Float[Array, "b s d"]:
        q = split_heads(self.norm_q(self.q(x)), self.head_dim)
        k = split_heads(self.norm_k(self.k(context.text)), self.head_dim)
        v = split_heads(self.v(context.text), self.head_dim)
        attended = merge_heads(attention(q, k, v, bias=context.bias))
        if self.has_image and context.image is not None:
            k = split_heads(self.norm_image_k(self.image_k(context.image)), self.head_dim)
            attended += merge_heads(attention(q, k, split_heads(self.image_v(context.image), self.head_dim)))
        return self.out(attended)


def _to_heads(d_in: int, cfg: TransformerConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> Linear:
    return Linear(d_in, cfg.dim, axes=(None, "head"), dtype=dtype, rngs=rngs)


def _norm_of_heads(cfg: TransformerConfig, dtype: DTypeLike, parallel: Parallel) -> RMSNorm:
    return RMSNorm(cfg.dim, cfg.eps, axes=("head",), mean_over=parallel.heads, dtype=dtype)


class FeedForward(nnx.Module):
    """Linear, GELU, linear; the inner state may be split over a mesh axis."""

    def __init__(self, d_in: int, hidden: int, d_out: int, *, approximate: bool, dtype: DTypeLike, rngs: nnx.Rngs,
                 inner: str | None = None, sum_over: str | None = None):  # fmt: skip
        self.up = Linear(d_in, hidden, axes=(None, inner), dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, d_out, axes=(inner, None), sum_over=sum_over, dtype=dtype, rngs=rngs)
        self.approximate = approximate

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        hidden = self.up(x).astype(jnp.float32)  # one rounding, after GELU, as in torch
        return self.down(jax.nn.gelu(hidden, approximate=self.approximate).astype(x.dtype))


class Block(nnx.Module):
    """One layer: self-attention, cross-attention, MLP; the first and last modulated by the timestep.

    All-zero parameters make it the identity, bit for bit: both output projections give 0, so do their gated sums. The
    ring pads short stages with such layers.
    """

    def __init__(self, cfg: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs, parallel: Parallel = ALONE):
        self.norm1 = LayerNorm(cfg.dim, cfg.eps, affine=False)
        self.attn1 = SelfAttention(cfg, dtype=dtype, rngs=rngs, parallel=parallel)
        self.norm2 = LayerNorm(cfg.dim, cfg.eps, affine=True) if cfg.cross_attn_norm else None
        self.attn2 = CrossAttention(cfg, dtype=dtype, rngs=rngs, parallel=parallel)
        self.norm3 = LayerNorm(cfg.dim, cfg.eps, affine=False)
        self.ffn = FeedForward(
            cfg.dim, cfg.ffn_dim, cfg.dim, approximate=True, dtype=dtype, rngs=rngs, inner="mlp",
            sum_over=parallel.heads,
        )  # fmt: skip
        self.scale_shift_table = param(jax.random.normal(rngs.params(), (1, 6, cfg.dim)) * cfg.dim**-0.5)

    def __call__(
        self, x: Float[Array, "b s d"], context: Context, modulation: Float[Array, "b q 6 d"], rope: Rope
    ) -> Float[Array, "b s d"]:
        table = self.scale_shift_table[...] + modulation.astype(jnp.float32)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (table[:, :, i] for i in range(6))
        with jax.named_scope("self_attention"):
            x = gated_sum(x, self.attn1(modulate(self.norm1(x), shift, scale).astype(x.dtype), rope), gate)
        with jax.named_scope("cross_attention"):
            x = x + self.attn2(x if self.norm2 is None else self.norm2(x).astype(x.dtype), context)
        with jax.named_scope("mlp"):
            return gated_sum(x, self.ffn(modulate(self.norm3(x), mlp_shift, mlp_scale).astype(x.dtype)), mlp_gate)


class ImageEmbedder(nnx.Module):
    """CLIP rows to model width. With position embeddings (first-last-frame models) two images are one sequence."""

    def __init__(self, cfg: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = cfg.image_dim or 0
        self.norm1 = LayerNorm(width, 1e-5, affine=True)
        self.ff = FeedForward(width, width, cfg.dim, approximate=False, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(cfg.dim, 1e-5, affine=True)
        rows = cfg.pos_embed_seq_len
        self.pos_embed = None if rows is None else param(jnp.zeros((1, rows, width), dtype))

    def __call__(self, x: Float[Array, "b i c"]) -> Float[Array, "b i d"]:
        if self.pos_embed is not None:
            x = x + self.pos_embed[...]
        return self.norm2(self.ff(self.norm1(x).astype(x.dtype))).astype(x.dtype)


class PatchEmbedding(nnx.Module):
    """Patches of the latent grid (`to_patches`) to tokens: a convolution whose stride is its kernel, as one matmul."""

    def __init__(self, cfg: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        shape = (*cfg.patch_size, cfg.in_channels, cfg.dim)
        fan_in = cfg.in_channels * cfg.patch_size[0] * cfg.patch_size[1] * cfg.patch_size[2]
        self.kernel = param(jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5)
        self.bias = param(jnp.zeros(cfg.dim, dtype))

    def __call__(self, patches: Float[Array, "b s p"]) -> Float[Array, "b s d"]:
        kernel = self.kernel[...]
        return patches.astype(kernel.dtype) @ kernel.reshape(patches.shape[-1], -1) + self.bias[...]


class TwoLinears(nnx.Module):
    """Linear, activation, linear: the time and text embedders."""

    def __init__(self, d_in: int, d: int, activation, *, dtype: DTypeLike, rngs: nnx.Rngs, precision=None):
        self.linear_1 = Linear(d_in, d, dtype=dtype, rngs=rngs, precision=precision)
        self.linear_2 = Linear(d, d, dtype=dtype, rngs=rngs, precision=precision)
        self.activation = activation

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b d"]:
        return self.linear_2(self.activation(self.linear_1(x)))


class WanTransformer(nnx.Module):
    """The DiT of one expert. Parameters are in `dtype`, but for those that Diffusers keeps in float32.

    Where `parallel` splits tokens, what `embed_patches` to `head_patches` take and give are this device's.
    """

    def __init__(self, cfg: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs, parallel: Parallel = ALONE):
        self.cfg, self.dtype, self.parallel = cfg, jnp.dtype(dtype), parallel
        self.patch_embedding = PatchEmbedding(cfg, dtype=dtype, rngs=rngs)
        self.time_embedder = TwoLinears(
            cfg.freq_dim, cfg.dim, jax.nn.silu, dtype=jnp.float32, rngs=rngs, precision=HIGHEST
        )
        self.time_proj = Linear(cfg.dim, 6 * cfg.dim, dtype=dtype, rngs=rngs)
        self.text_embedder = TwoLinears(cfg.text_dim, cfg.dim, jax.nn.gelu, dtype=dtype, rngs=rngs)
        self.image_embedder = None if cfg.image_dim is None else ImageEmbedder(cfg, dtype=dtype, rngs=rngs)
        self.blocks = stack(lambda r: Block(cfg, dtype=dtype, rngs=r, parallel=parallel), cfg.num_layers, rngs)
        self.norm_out = LayerNorm(cfg.dim, cfg.eps, affine=False)
        self.scale_shift_table = param(jax.random.normal(rngs.params(), (1, 2, cfg.dim)) * cfg.dim**-0.5)
        patch = cfg.patch_size[0] * cfg.patch_size[1] * cfg.patch_size[2]
        self.proj_out = Linear(cfg.dim, cfg.out_channels * patch, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        latents: Float[Array, "b t h w z"],
        timesteps: Float[Array, "b q"],
        text: Float[Array, "b l c"],
        image: Float[Array, "b i e"] | None = None,
    ) -> Float[Array, "b t h w v"]:
        """Velocity of `latents` (all input channels) at `timesteps` (1000 sigma), given text and CLIP embeddings."""
        grid = token_grid(self.cfg, latents.shape[1:])
        temb, modulation = self.embed_time(timesteps)
        context = self.embed_context(text, image)
        x = self.embed_latents(latents)
        x = self.run_blocks(x, jnp.arange(self.cfg.num_layers), context, modulation, grid)
        return self.head(x, temb, grid)

    def embed_latents(self, latents: Float[Array, "b t h w z"]) -> Float[Array, "b s d"]:
        """Latents to tokens, in the model's dtype."""
        return self.embed_patches(to_patches(latents, self.cfg.patch_size))

    def embed_patches(self, patches: Float[Array, "b s p"]) -> Float[Array, "b s d"]:
        """Latents' patches (`to_patches`) to tokens, in the model's dtype."""
        return self.patch_embedding(patches)

    def embed_time(self, timesteps: Float[Array, "b q"]) -> tuple[Float[Array, "b q d"], Float[Array, "b q 6 d"]]:
        """Time embedding (for the head) and the blocks' six modulation vectors."""
        temb = self.time_embedder(sinusoids(timesteps, self.cfg.freq_dim)).astype(self.dtype)
        modulation = self.time_proj(jax.nn.silu(temb))
        return temb, modulation.reshape(*temb.shape[:2], 6, self.cfg.dim)

    def embed_context(self, text: Float[Array, "b l c"], image: Float[Array, "b i e"] | None) -> Context:
        """Text (and CLIP) embeddings in model width. Without keys and values of their own, CLIP's rows are rows more of
        the text, before it."""
        embedded = self.text_embedder(text.astype(self.dtype))
        if self.image_embedder is None or image is None:
            return Context(embedded, None)
        rows = self.image_embedder(image.astype(self.dtype))
        if self.cfg.added_kv_proj_dim is None:
            return Context(jnp.concatenate([rows, embedded], axis=1), None)
        return Context(embedded, rows)

    def run_blocks(
        self,
        x: Float[Array, "b s d"],
        rows: Int[Array, " n"],
        context: Context,
        modulation: Float[Array, "b q 6 d"],
        grid: tuple[int, int, int],
    ) -> Float[Array, "b s d"]:
        """The layers at `rows` of the stacked parameters, in order.

        Indexing inside the scan (not before it) keeps one layer's weights in flight, whatever expert `rows` points at.
        """
        graph, stacked = nnx.split(self.blocks)
        rope = rope_tables(grid, self.cfg.attention_head_dim)
        if (split := self.parallel.tokens) is not None:
            rope = tuple(split.own(table.reshape(grid[0], -1, table.shape[-1])).reshape(-1, table.shape[-1])
                         for table in rope)  # fmt: skip

        def layer(x, row):
            weights = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, row, keepdims=False), stacked)
            return nnx.merge(graph, weights)(x, context, modulation, rope), None

        return jax.lax.scan(layer, x, rows)[0]

    def head(
        self, x: Float[Array, "b s d"], temb: Float[Array, "b q d"], grid: tuple[int, int, int]
    ) -> Float[Array, "b t h w v"]:
        """Tokens to velocity."""
        return from_patches(self.head_patches(x, temb), grid, self.cfg.patch_size)

    def head_patches(self, x: Float[Array, "b s d"], temb: Float[Array, "b q d"]) -> Float[Array, "b s p"]:
        """Tokens to the velocity's patches."""
        table = self.scale_shift_table[...] + temb[:, :, None].astype(jnp.float32)
        x = modulate(self.norm_out(x), table[:, :, 0], table[:, :, 1]).astype(x.dtype)
        return self.proj_out(x)


# Pure functions of the blocks


def token_grid(cfg: TransformerConfig, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(t, h, w) of the tokens of latents (T, H, W, …)."""
    t, h, w = (size // p for size, p in zip(latent_shape[:3], cfg.patch_size, strict=True))
    return t, h, w


def split_heads(x: Float[Array, "b s d"], head_dim: int) -> Float[Array, "b s n k"]:
    """The model width, or this device's share of it, as (heads, head width)."""
    return x.reshape(*x.shape[:-1], -1, head_dim)


def merge_heads(x: Float[Array, "b s n k"]) -> Float[Array, "b s d"]:
    """Inverse of split_heads."""
    return x.reshape(*x.shape[:-2], -1)


def modulate(
    x: Float[Array, "b s d"], shift: Float[Array, "b q d"], scale: Float[Array, "b q d"]
) -> Float[Array, "b s d"]:
    """x * (1 + scale) + shift, each of the Q groups of tokens by its own; float32."""
    return _per_group(lambda g: g * (1 + scale[:, :, None]) + shift[:, :, None], x, scale.shape[1])


def gated_sum(x: Float[Array, "b s d"], y: Float[Array, "b s d"], gate: Float[Array, "b q d"]) -> Float[Array, "b s d"]:
    """x + y * gate in float32, back in x's dtype."""
    scaled = _per_group(lambda g: g * gate[:, :, None], y.astype(jnp.float32), gate.shape[1])
    return (x.astype(jnp.float32) + scaled).astype(x.dtype)


def _per_group(f, x: Array, groups: int) -> Array:
    b, s, d = x.shape
    return f(x.reshape(b, groups, s // groups, d)).reshape(b, s, d)


def sinusoids(timesteps: Float[Array, "b q"], channels: int) -> Float[Array, "b q c"]:
    """Cosines then sines of the timesteps at geometric frequencies 1 … 1/10000; float32."""
    half = channels // 2
    # on the host: angles reach 1000, where the rounding of an accelerator's exp would show
    frequencies = np.exp(-np.log(10000.0) * np.arange(half) / half).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def to_patches(x: Shaped[AnyArray, "b t h w z"], patch: tuple[int, ...]) -> Shaped[AnyArray, "b s p"]:
    """Patches as rows, channels last within a patch: [B, T·H·W/|patch|, |patch|·Z]."""
    b, t, h, w, z = x.shape
    pt, ph, pw = patch
    x = x.reshape(b, t // pt, pt, h // ph, ph, w // pw, pw, z).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(b, -1, pt * ph * pw * z)


def from_patches(
    x: Shaped[AnyArray, "b s p"], grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> Shaped[AnyArray, "b t h w z"]:
    """Inverse of to_patches for a token grid (t, h, w)."""
    (t, h, w), (pt, ph, pw) = grid, patch
    x = x.reshape(x.shape[0], t, h, w, pt, ph, pw, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(x.shape[0], t * pt, h * ph, w * pw, -1)
