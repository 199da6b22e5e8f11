"""Attention among tokens that are split over a mesh axis.

Tokens are split inside each frame: every position holds `share` neighbours of each frame, the last positions fewer, or
none, where they do not divide. What is missing there is filled with pads, which nothing looks at. So what differs from
frame to frame, such as timesteps, stays with its frame.

Two ways to attend to all tokens, and both at once:

Ulysses: neighbours trade tokens for heads, attend to all of their tokens with a part of the heads, and trade back.
Four all-to-alls a layer, and a part must be whole heads. Source: DeepSpeed-Ulysses, arXiv 2309.14509.

Ring attention: keys and values go round, and what each has seen is merged by its log-sum-exp. Any number of positions,
more sent. Source: arXiv 2310.01889.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxwan.kernels.attention import Attended, attention, attention_with_lse, merge
from jaxwan.sharding.collectives import position, shift, trade


@dataclass(frozen=True)
class TokenSplit:
    """Tokens `[frames, per_frame]` split over `ways` positions of a mesh axis.

    ulysses: of how many neighbours each trades tokens for heads; it divides `ways` and the heads. Keys and values go
    round the ways / ulysses groups. 2 groups of 2: positions 0 and 1 trade, 2 and 3 trade, and 0 and 2 pass on.
    """

    axis: str
    ways: int
    ulysses: int
    frames: int
    per_frame: int

    @property
    def share(self) -> int:
        """Tokens of each frame at a position, pads included."""
        return -(-self.per_frame // self.ways)

    def own(self, x: Shaped[Array, "*t w c"]) -> Shaped[Array, "*t s c"]:
        """This position's part of an array whose last axis but one counts a frame's tokens; pads are zero."""
        pads = self.share * self.ways - self.per_frame
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, pads), (0, 0)])
        return jax.lax.dynamic_slice_in_dim(padded, position(self.axis) * self.share, self.share, x.ndim - 2)

    def attention(
        self, q: Float[Array, "b s n k"], k: Float[Array, "b s n k"], v: Float[Array, "b s n k"]
    ) -> Float[Array, "b s n k"]:
        """Attention of all tokens to all tokens, of which each position has its own, frame by frame."""
        shape = q.shape
        q, k, v = (self._gather_tokens(x) for x in (q, k, v))
        out = self._whole(q, k, v) if self.ulysses == self.ways else self._around(q, k, v)
        return trade(out, self.axis, give=2, take=3, among=self.ulysses).reshape(shape)

    def _gather_tokens(self, x: Array) -> Float[Array, "b t w n k"]:
        """All of the group's tokens of each frame, in a part of the heads."""
        framed = x.reshape(x.shape[0], self.frames, self.share, *x.shape[2:])
        return trade(framed, self.axis, give=3, take=2, among=self.ulysses)

    def _whole(self, *qkv: Float[Array, "b t w n k"]) -> Float[Array, "b t w n k"]:
        """One group has all tokens: pads, which come last in every frame, are cut away and put back."""
        b, _, padded, *heads = qkv[0].shape
        out = attention(*(x[:, :, : self.per_frame].reshape(b, -1, *heads) for x in qkv))
        out = out.reshape(b, self.frames, self.per_frame, *heads)
        return jnp.pad(out, [(0, 0), (0, 0), (0, padded - self.per_frame), (0, 0), (0, 0)])

    def _around(self, q: Array, k: Array, v: Array) -> Float[Array, "b t w n k"]:
        """Keys and values of all groups come by, in turn."""
        b, _, width, *heads = q.shape
        groups = self.ways // self.ulysses
        group = position(self.axis) // self.ulysses
        queries = q.reshape(b, -1, *heads)
        k, v = (x.swapaxes(1, 2).reshape(b, -1, *heads) for x in (k, v))  # so that pads come last of all

        def part(hop: int, k: Array, v: Array) -> Attended:
            there = jnp.clip(self.per_frame - (group - hop) % groups * width, 0, width) * self.frames
            length = None if groups * width == self.per_frame else jnp.full(b, there)
            return attention_with_lse(queries, k, v, key_length=length)

        seen = part(0, k, v)
        for hop in range(1, groups):
            k, v = (shift(x, self.axis, by=self.ulysses) for x in (k, v))
            seen = merge(seen, part(hop, k, v))
        return seen.out.astype(q.dtype).reshape(q.shape)
