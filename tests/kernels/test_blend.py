"""Blending in closed form against Diffusers' cascade, which blends tile after tile in place, and the kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh
from oracle import relative_error

from jaxwan.kernels.blend import blend

FLOAT32 = 1e-6  # products of weights and values, some five of them, rounded at 2^-24
BFLOAT16 = 2**-8  # the result rounded once


def cut(rng, size, tile, stride, channels=2):
    """Tiles [i, j, 1, 2, h, w, c], each of its own values, and NaN behind the picture's end."""
    counts = [-(-whole // step) for whole, step in zip(size, stride, strict=True)]
    tiles = rng.uniform(-1, 1, (*counts, 1, 2, *tile, channels)).astype(np.float32)
    for i, j in np.ndindex(*counts):
        tiles[i, j, :, :, size[0] - i * stride[0] :] = np.nan
        tiles[i, j, :, :, :, size[1] - j * stride[1] :] = np.nan
    return tiles


def thin(tiles, size, stride):
    """Rows of tiles [1, c, 2, h, w], each as large as the picture leaves it."""
    counts = tiles.shape[:2]
    return [
        [
            np.moveaxis(tiles[i, j], -1, 1)[..., : size[0] - i * stride[0], : size[1] - j * stride[1]].copy()
            for j in range(counts[1])
        ]
        for i in range(counts[0])
    ]


def cascade(rows, extent, stride, vertical, horizontal):
    """Diffusers' loop over tiles, for its own functions and for NumPy's."""
    done = []
    for i, row in enumerate(rows):
        cropped = []
        for j, tile in enumerate(row):
            if i > 0:
                tile = vertical(rows[i - 1][j], tile, extent[0])
            if j > 0:
                tile = horizontal(row[j - 1], tile, extent[1])
            cropped.append(np.asarray(tile)[..., : stride[0], : stride[1]])
        done.append(np.concatenate(cropped, axis=-1))
    return np.moveaxis(np.concatenate(done, axis=-2), 1, -1)


def by_diffusers(tiles, size, tile, stride):
    rows = [[torch.from_numpy(t) for t in row] for row in thin(tiles, size, stride)]
    extent = tile[0] - stride[0], tile[1] - stride[1]

    def blending(function):
        return lambda a, b, extent: function(None, a, b, extent)

    return cascade(rows, extent, stride, blending(AutoencoderKLWan.blend_v), blending(AutoencoderKLWan.blend_h))


def in_float64(tiles, size, tile, stride, patch=1):
    """The same with one weight for each `patch` rows."""

    def along(axis):
        def over(a, b, extent):
            extent = min(a.shape[axis], b.shape[axis], extent)
            weight = np.arange(extent) // patch * patch / max(extent, 1)
            a, b = np.moveaxis(a, axis, -1), np.moveaxis(b, axis, -1)  # views: b is changed in place
            b[..., :extent] = weight * b[..., :extent] + (1 - weight) * a[..., a.shape[-1] - extent :]
            return np.moveaxis(b, -1, axis)

        return over

    rows = [[t.astype(np.float64) for t in row] for row in thin(tiles, size, stride)]
    return cascade(rows, (tile[0] - stride[0], tile[1] - stride[1]), stride, along(-2), along(-1))


@st.composite
def axes(draw):
    """(size, tile, stride, patch) of one axis: any overlap up to the stride, any thin last tiles."""
    patch, stride = draw(st.sampled_from([1, 2])), draw(st.integers(1, 5))
    tile, size = stride + draw(st.integers(0, stride)), draw(st.integers(1, 3 * stride))
    return size * patch, tile * patch, stride * patch, patch


@settings(max_examples=30, deadline=None, derandomize=True)
@given(axes(), axes(), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_the_closed_form_equals_the_cascade(rows, columns, dtype):
    patch = min(rows[3], columns[3])
    size, tile, stride = zip(rows[:3], columns[:3], strict=True)
    tiles = cut(np.random.default_rng(sum(size)), size, tile, stride)
    tiles = np.asarray(tiles.astype(dtype), np.float32)
    made = jax.jit(lambda x: blend(x, size, stride, patch=patch))(jnp.asarray(tiles, dtype))
    assert made.dtype == dtype
    tolerance = FLOAT32 if dtype == jnp.float32 else BFLOAT16
    assert relative_error(made.astype(jnp.float32), in_float64(tiles, size, tile, stride, patch)) < tolerance
    if patch == 1:
        assert relative_error(made.astype(jnp.float32), by_diffusers(tiles, size, tile, stride)) < tolerance


CASES = {
    "several": ((31, 45), (16, 24), (12, 16), 1),
    "two thin ones at either end": ((27, 50), (8, 32), (4, 16), 2),
    "no overlap": ((12, 20), (6, 8), (6, 8), 1),
    "one": ((5, 7), (8, 8), (6, 6), 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_equals_the_closed_form(case, dtype):
    size, tile, stride, patch = CASES[case]
    tiles = jnp.asarray(cut(np.random.default_rng(0), size, tile, stride, channels=3), dtype)

    forms = "interpret", "xla"
    kernel, slices = jax.jit(lambda x: [blend(x, size, stride, patch=patch, implementation=f) for f in forms])(tiles)
    assert kernel.dtype == slices.dtype == dtype
    tolerance = FLOAT32 if dtype == jnp.float32 else BFLOAT16
    assert relative_error(kernel.astype(jnp.float32), slices.astype(jnp.float32)) < tolerance


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_lowers_for_cuda(dtype):
    """Without a card, whose kind jax 0.12 asks for."""
    card = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=card)
    size, tile, stride, _ = CASES["several"]
    tiles = jax.ShapeDtypeStruct((3, 3, 1, 4, *tile, 3), dtype)
    call = jax.jit(lambda x: blend(x, size, stride, implementation="pallas"))
    target = "__gpu$xla.gpu.triton"
    allowed = [export.DisabledSafetyCheck.custom_call(target)]
    with use_abstract_mesh(mesh):
        module = export.export(call, platforms=["cuda"], disabled_checks=allowed)(tiles).mlir_module()
    assert module.count(f"custom_call @{target}(") == 1 and "stablehlo.add" not in module  # nothing beside the kernel


def test_what_cannot_be_blended_is_refused():
    tiles = jnp.zeros((2, 1, 1, 1, 8, 6, 3))
    with pytest.raises(ValueError, match="'mosaic' is unknown: choose one of xla, pallas, interpret"):
        blend(tiles, (9, 6), (6, 6), implementation="mosaic")
    with pytest.raises(ValueError, match="interpret mode"):  # a named one runs or raises
        blend(tiles, (9, 6), (6, 6), implementation="pallas")
    with pytest.raises(ValueError, match="tiles of 8 rows cannot begin 3 apart: from 4 to 8 can"):
        blend(tiles, (6, 6), (3, 6))
    with pytest.raises(ValueError, match="2 tiles for 13 rows, which take 3 of stride 6"):
        blend(tiles, (13, 6), (6, 6))
