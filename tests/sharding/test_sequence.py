"""Attention among tokens that are split over devices, against attention among all of them."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracle import relative_error

from jaxwan.sharding.mesh import MeshSpec, make_mesh
from jaxwan.sharding.sequence import TokenSplit

BATCH, FRAMES, HEADS, WIDTH = 2, 3, 4, 8


def attend(*qkv):
    """Of all tokens to all, in float64."""
    q, k, v = (x.reshape(BATCH, -1, HEADS, WIDTH).astype(np.float64) for x in qkv)
    weights = np.exp(np.einsum("bqnk,bsnk->bnqs", q, k) * WIDTH**-0.5)
    return np.einsum("bnqs,bsnk->bqnk", weights / weights.sum(-1, keepdims=True), v)


def split_attention(split, qkv):
    """q, k, v [B, T, W, N, K] of all tokens -> the result, each device having its own tokens."""
    mesh = make_mesh(MeshSpec(sp=split.ways))

    def on_each(*qkv):
        own = [split.own(x.reshape(BATCH, FRAMES, split.per_frame, -1)) for x in qkv]
        out = split.attention(*(x.reshape(BATCH, -1, HEADS, WIDTH) for x in own))
        return out.reshape(BATCH, FRAMES, split.share, HEADS, WIDTH)

    whole = jax.shard_map(on_each, mesh=mesh, in_specs=P(), out_specs=P(None, None, "sp"))
    return np.asarray(jax.jit(whole)(*qkv))[:, :, : split.per_frame]


@pytest.mark.parametrize(
    ("ways", "ulysses", "per_frame"),
    [
        (1, 1, 5), (2, 2, 6), (2, 2, 5), (2, 1, 5), (3, 1, 6), (3, 1, 7), (4, 4, 8), (4, 4, 7), (4, 2, 8), (4, 2, 5),
        (4, 1, 9), (8, 4, 17), (8, 2, 16), (8, 1, 3),  # the last: some devices have no token at all
    ],
)  # fmt: skip
def test_split_tokens_attend_to_all_others(ways, ulysses, per_frame):
    """To 1e-6 of float64: roundings of float32."""
    rng = np.random.default_rng(0)
    shape = (BATCH, FRAMES, per_frame, HEADS, WIDTH)
    qkv = [rng.standard_normal(shape).astype(np.float32) for _ in range(3)]
    split = TokenSplit("sp", ways, ulysses, FRAMES, per_frame)
    assert relative_error(split_attention(split, qkv), attend(*qkv).reshape(shape)) < 1e-6


@pytest.mark.parametrize(("ways", "ulysses"), [(2, 2), (2, 1), (4, 2)])
def test_pads_are_not_looked_at(ways, ulysses):
    """Of what they hold, nothing comes out: even keys that would outweigh all others."""
    mesh, split = make_mesh(MeshSpec(sp=ways)), TokenSplit("sp", ways, ulysses, FRAMES, 5)
    rng = np.random.default_rng(1)

    def run(fill):
        def on_each(*qkv):
            return split.attention(*qkv).reshape(BATCH, FRAMES, split.share, HEADS, WIDTH)

        rows = np.full((3, BATCH, FRAMES, split.share * ways, HEADS, WIDTH), fill, np.float32)
        rows[:, :, :, :5] = real
        by_device = rows.reshape(3, BATCH, FRAMES, ways, split.share, HEADS, WIDTH).swapaxes(2, 3)
        qkv = by_device.reshape(3, BATCH, -1, HEADS, WIDTH)
        whole = jax.shard_map(on_each, mesh=mesh, in_specs=P(None, "sp"), out_specs=P(None, None, "sp"))
        return np.asarray(jax.jit(whole)(*qkv))[:, :, :5]

    real = rng.standard_normal((3, BATCH, FRAMES, 5, HEADS, WIDTH)).astype(np.float32)
    np.testing.assert_array_equal(run(1000.0), run(0.0))


def test_a_share_of_a_frame_is_its_neighbours_and_zeros_at_the_end():
    mesh, split = make_mesh(MeshSpec(sp=3)), TokenSplit("sp", 3, 1, 2, 7)
    x = np.arange(1, 15).reshape(2, 7, 1)
    shares = jax.shard_map(split.own, mesh=mesh, in_specs=P(), out_specs=P(None, "sp"))(x)
    assert np.asarray(shares)[..., 0].tolist() == [[*range(1, 8), 0, 0], [*range(8, 15), 0, 0]]
    assert (split.share, TokenSplit("sp", 8, 1, 1, 3600).share) == (3, 450)
