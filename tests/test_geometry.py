"""Pixels, latents, tokens: literal sizes of the published checkpoints, and what is refused."""

import pytest

from jaxwan.geometry import Geometry

WAN = Geometry()
TI2V = Geometry(spatial=16, z_dim=48)


@pytest.mark.parametrize(
    ("geometry", "size", "latents", "grid", "tokens"),
    [
        (WAN, (81, 720, 1280), (21, 90, 160), (21, 45, 80), 75_600),
        (WAN, (81, 480, 832), (21, 60, 104), (21, 30, 52), 32_760),
        (WAN, (1, 16, 16), (1, 2, 2), (1, 1, 1), 1),
        (TI2V, (121, 704, 1280), (31, 44, 80), (31, 22, 40), 27_280),
    ],
)
def test_sizes_of_videos_latents_and_tokens(geometry, size, latents, grid, tokens):
    assert geometry.latent_shape(*size) == latents
    assert geometry.pixel_shape(*latents) == size
    assert geometry.token_grid(*size) == grid
    assert geometry.num_tokens(*size) == tokens


def test_the_stride_is_the_pixels_of_a_token():
    assert (WAN.stride, TI2V.stride) == (16, 32)


@pytest.mark.parametrize(
    ("geometry", "size", "message"),
    [
        (WAN, (80, 720, 1280), "num_frames=80 is not 4k+1: nearest are 77 and 81"),
        (WAN, (81, 500, 1280), "height=500 is no multiple of 16: nearest are 496 and 512"),
        (TI2V, (81, 704, 720), "width=720 is no multiple of 32: nearest are 704 and 736"),
        (WAN, (0, 16, 16), "num_frames=0 is not 4k+1: nearest is 1"),
        (WAN, (3, 16, 16), "num_frames=3 is not 4k+1: nearest are 1 and 5"),
        (WAN, (-3, 16, 16), "num_frames=-3 is not 4k+1: nearest is 1"),
        (
            WAN,
            (1, 0, -16),
            "height=0 is no multiple of 16: nearest is 16; width=-16 is no multiple of 16: nearest is 16",
        ),
        (WAN, (1, 15, 16), "height=15 is no multiple of 16: nearest is 16"),
        (
            WAN,
            (82, 721, 1000),
            "num_frames=82 is not 4k+1: nearest are 81 and 85; "
            "height=721 is no multiple of 16: nearest are 720 and 736; "
            "width=1000 is no multiple of 16: nearest are 992 and 1008",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_nearest_valid_ones(geometry, size, message):
    for method in (geometry.check_size, geometry.latent_shape, geometry.token_grid, geometry.num_tokens):
        with pytest.raises(ValueError) as error:
            method(*size)
        assert str(error.value) == message


def test_the_most_frames_of_a_source_are_valid_and_no_further_block_fits():
    assert [Geometry().most_frames(n) for n in (1, 4, 5, 81, 83, 85)] == [1, 1, 5, 81, 81, 85]


def test_the_named_nearest_sizes_are_valid():
    for value in range(-5, 200):
        for sizes, place in (((value, 64, 64), 0), ((1, value, 64), 1)):
            try:
                TI2V.check_size(*sizes)
            except ValueError as error:
                for nearest in str(error).split("nearest ")[1].replace("is ", "").replace("are ", "").split(" and "):
                    TI2V.check_size(*(int(nearest) if i == place else size for i, size in enumerate(sizes)))


@pytest.mark.parametrize("patch", [(2, 2, 2), (1, 2, 4)])
def test_a_patch_over_frames_or_one_that_is_not_square_is_refused(patch):
    with pytest.raises(ValueError, match="only \\(1, p, p\\)"):
        Geometry(patch=patch)
