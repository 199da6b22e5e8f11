"""Images and videos in and out: pixels against diffusers and transformers, files by round trip, every refusal."""

import errno
import gc
import io
import json
import os
import re
import resource
import struct
import sys
import warnings
import zlib
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from clips import damage, write_clip
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image as diffusers_load_image
from diffusers.video_processor import VideoProcessor
from PIL import Image, ImageCms, ImageOps
from profiles import ADOBE, P3, SRGB, cmyk_profile, gray_profile, rgb_profile, srgb_code, srgb_light
from transformers import AutoImageProcessor

from jaxwan.pipelines.media import (
    FITS,
    Compression,
    check_output,
    clip_pixels,
    crop_image,
    fit_size,
    load_image,
    load_image_processor,
    load_video,
    open_video,
    resize_image,
    save_gif,
    save_image,
    save_npz,
    save_output,
    save_video,
    to_uint8,
    to_unit_range,
    videos,
)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def smooth(num_frames, height=48, width=64):
    """Float frames that H.264 keeps well: a colour ramp that moves."""
    y, x = np.mgrid[0:height, 0:width]
    ramp = np.stack([x / (width - 1), y / (height - 1), np.full_like(x, 0.5, float)], -1)
    return np.stack([ramp * (1 - 0.05 * i) for i in range(num_frames)]).astype(np.float32)


# Input


@pytest.mark.parametrize("size", [(48, 64), (100, 30), (16, 16)])
def test_lanczos_equals_diffusers_for_images_of_any_aspect(size):
    image = Image.fromarray(noise(75, 50, 3))
    expected = VaeImageProcessor(vae_scale_factor=8).preprocess(image, height=48, width=64)
    actual = resize_image(load_image(image), 48, 64)
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(2 * actual - 1, expected[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size", [(75, 50), (50, 75), (301, 40), (64, 48), (7, 300)])
def test_crop_keeps_the_middle_and_pad_the_whole_of_an_image(size):
    image, lanczos = Image.fromarray(noise(*size, 3)), Image.Resampling.LANCZOS
    for height, width in ((48, 64), (64, 48), (32, 32)):
        crop, pad = (resize_image(image, height, width, fit=fit) for fit in ("crop", "pad"))
        np.testing.assert_array_equal(crop, np.asarray(ImageOps.fit(image, (width, height), lanczos), np.float32) / 255)
        np.testing.assert_array_equal(pad, np.asarray(ImageOps.pad(image, (width, height), lanczos), np.float32) / 255)


def test_an_image_of_the_sizes_shape_is_the_same_in_every_fit():
    image = Image.fromarray(noise(30, 40, 3))
    stretched, crop, pad = (resize_image(image, 48, 64, fit=fit) for fit in FITS)
    np.testing.assert_array_equal(stretched, crop)
    np.testing.assert_array_equal(stretched, pad)


def test_a_crop_that_is_not_resized_is_the_middle_too():
    x, y = np.meshgrid(np.arange(100), np.arange(50))
    image = Image.fromarray(np.stack([x, y, x], -1).astype(np.uint8))
    np.testing.assert_array_equal(np.asarray(crop_image(image, 64, 96))[:, :, 0], np.arange(12, 87)[None].repeat(50, 0))
    np.testing.assert_array_equal(crop_image(image, 32, 64), image)
    assert crop_image(image, 20, 80).size == (100, 25) and crop_image(image, 16, 16000).size == (100, 1)
    floats = np.zeros((4, 6, 3), np.float32)
    assert crop_image(floats, 4, 6) is floats


def test_a_video_whose_pixels_are_not_square_is_fitted_as_it_is_shown(tmp_path):
    """64 x 48 pixels, each twice as wide as high: shown as 128 x 48."""
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:, 16:48] = 255
    write_clip(tmp_path / "wide.mp4", np.stack([frame] * 3), sar=Fraction(2))
    video = open_video(tmp_path / "wide.mp4")
    assert (video.height, video.width) == (48, 128)
    assert video.read(1, 48, 64, "crop")[:, :, 1:-1].min() > 240  # its white middle
    padded = video.read(1, 64, 64, "pad")[0]  # 64 x 24 in the middle
    assert padded[:19].max() < 5 and padded[45:].max() < 5 and padded[24:40, 20:44].min() > 240
    assert padded[24:40, :12].max() < 15


def test_lanczos_equals_diffusers_for_videos():
    frames = noise(3, 30, 90, 3)
    images = [Image.fromarray(frame) for frame in frames]
    expected = VideoProcessor(vae_scale_factor=8).preprocess_video(images, height=32, width=48)
    for source in (images, frames):
        video = open_video(source)
        assert (video.num_frames, video.height, video.width, video.fps) == (3, 30, 90, None)
        pixels = to_unit_range(video.read(3, 32, 48))
        np.testing.assert_array_equal(2 * pixels - 1, expected[0].permute(1, 2, 3, 0).numpy())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA", "1", "CMYK"])
def test_a_file_is_read_as_diffusers_reads_it(tmp_path, recwarn, mode):
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    pixels = noise(20, 30, 3)
    Image.fromarray(pixels).convert("RGB" if mode == "CMYK" else "RGBA").convert(mode).save(path)
    for source in (str(path), path, Image.open(path)):
        np.testing.assert_array_equal(load_image(source), diffusers_load_image(str(path)))
    # an alpha channel that hides nothing is not told
    assert not [told for told in recwarn if "transparent in places" in str(told.message)]


UPRIGHT = {  # of the EXIF tag's eight values
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("value", UPRIGHT)
@pytest.mark.parametrize("format", ["png", "tiff", "webp"])
def test_a_photo_is_turned_upright_by_its_exif_tag(tmp_path, format, value):
    exif, path, pixels = Image.Exif(), tmp_path / f"photo.{format}", noise(20, 30, 3)
    exif[0x0112] = value
    Image.fromarray(pixels).save(path, exif=exif, **{"lossless": True} if format == "webp" else {})
    for source in (path, Image.open(path)):
        image = load_image(source)
        np.testing.assert_array_equal(image, UPRIGHT[value](pixels))
        np.testing.assert_array_equal(load_image(image), image)  # once and not twice
    np.testing.assert_array_equal(image, diffusers_load_image(str(path)))


COLOUR = np.array([200, 90, 30])
PROFILES = {  # (profile, pixels, what they are in sRGB)
    "Display P3": (rgb_profile(P3, srgb_light), Image.new("RGB", (8, 8), tuple(COLOUR)),
                   srgb_code(np.linalg.solve(np.transpose(SRGB), np.transpose(P3) @ srgb_light(COLOUR / 255)))),
    "Adobe RGB": (rgb_profile(ADOBE, lambda code: code**2.2), Image.new("RGB", (8, 8), tuple(COLOUR)),
                  srgb_code(np.linalg.solve(np.transpose(SRGB), np.transpose(ADOBE) @ (COLOUR / 255) ** 2.2))),
    "linear gray": (gray_profile(lambda code: code), Image.new("L", (8, 8), 128), srgb_code(np.full(3, 128 / 255))),
    "gray with alpha": (gray_profile(lambda code: code), Image.new("LA", (8, 8), (128, 255)),
                        srgb_code(np.full(3, 128 / 255))),
    "ink": (cmyk_profile(), Image.new("CMYK", (8, 8), (0, 0, 0, 128)),
            srgb_code(np.full(3, ((100 * 127 / 255 + 16) / 116) ** 3))),
    "gray of a display": (rgb_profile(P3, lambda code: code), Image.new("L", (8, 8), 128),
                          srgb_code(np.full(3, 128 / 255))),
}  # fmt: skip


@pytest.mark.parametrize("name", PROFILES)
def test_colours_of_a_profile_are_read_as_srgb(tmp_path, recwarn, name):
    profile, image, expected = PROFILES[name]
    path = tmp_path / ("a.jpg" if image.mode == "CMYK" else "a.png")
    image.save(path, icc_profile=profile, **{"quality": 100} if image.mode == "CMYK" else {})
    assert np.abs(255 * expected - np.asarray(image.convert("RGB"))[0, 0]).max() > 5  # else it would prove nothing
    for source in (path, Image.open(path)):
        read = load_image(source)
        assert np.abs(np.asarray(read) - 255 * expected).max() <= 1
        np.testing.assert_array_equal(load_image(read), read)
    assert not recwarn.list


@pytest.mark.parametrize("profile", ["ours", "PIL's"])
def test_a_profile_of_srgb_itself_changes_nothing(tmp_path, profile):
    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.stack(np.meshgrid(*[np.arange(0, 256, 3, dtype=np.uint8)] * 3), axis=-1).reshape(-1, 86, 3)
    profile = rgb_profile(SRGB, srgb_light) if profile == "ours" else made
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), pixels)


@pytest.mark.parametrize(
    ("profile", "why"),
    [
        (b"nonsense" * 30, "cannot open profile"),
        (rgb_profile(P3, srgb_light)[:300], ""),
        (gray_profile(lambda code: code), "it is for GRAY, the pixels are RGB"),
    ],
)
def test_a_profile_that_cannot_be_used_is_left_aside(tmp_path, profile, why):
    pixels = noise(20, 30, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
    for source in (tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        with pytest.warns(UserWarning, match=f"image.* has a colour profile that is left aside: .*{why}"):
            np.testing.assert_array_equal(load_image(source), pixels)


def cut_out(mode):
    """An image whose left half nobody sees, its middle half, and what of it is to be seen."""
    pixels, alpha = noise(20, 30, 3), np.full((20, 30), 255, np.uint8)
    alpha[:, :10], alpha[:, 10:20] = 0, 0 if mode in ("RGB", "L", "P") else 102
    if mode in ("RGB", "L", "P"):  # one colour is transparent
        pixels[:, :20], pixels[:, 20:] = (9, 9, 9), np.array([60, 60, 60])
        image = Image.fromarray(pixels).convert(mode, palette=Image.Palette.ADAPTIVE)
        image.info["transparency"] = (9, 9, 9) if mode == "RGB" else image.getpixel((0, 0))
    else:
        whole = Image.fromarray(np.dstack([pixels, alpha]), "RGBA")
        image = whole.convert("LA").convert("La") if mode == "La" else whole.convert(mode)
        pixels = np.asarray(image.convert("RGBA") if mode != "La" else image.convert("LA").convert("RGB"))[..., :3]
    part = alpha[..., None] / 255
    return image, pixels * part + 255 * (1 - part)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "RGB", "L", "P"])
def test_what_is_transparent_lies_on_white_and_is_told(tmp_path, mode):
    image, expected = cut_out(mode)
    sources = [image]
    if mode not in ("RGBa", "La"):  # which no file has
        image.save(tmp_path / "cut.png", transparency=image.info.get("transparency"))
        sources += [tmp_path / "cut.png", Image.open(tmp_path / "cut.png")]
    for source in sources:
        with pytest.warns(UserWarning, match="image.* is transparent in places, which are laid on white"):
            read = np.asarray(load_image(source))
        assert np.abs(read - expected).max() <= 1 and (read[:, :10] == 255).all()


def test_frames_that_are_transparent_are_told_once():
    image, expected = cut_out("RGBA")
    with pytest.warns(UserWarning) as told:
        warnings.simplefilter("default")
        frames, _ = load_video([image] * 5)
    assert len({str(warning.message) for warning in told}) == 1
    assert np.abs(frames - expected).max() <= 1


def test_an_animated_picture_begins_with_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    for format in ("png", "gif", "webp"):
        frames[0].save(tmp_path / f"a.{format}", save_all=True, append_images=frames[1:])
        assert np.abs(np.asarray(load_image(tmp_path / f"a.{format}")).astype(int) - [255, 0, 0]).max() < 5


def png_with(kind, data, exif=b"", crc=0):
    """A png with a chunk of its own behind the header, and the pixels in it."""
    pixels, file = noise(20, 30, 3), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **{"exif": exif} if exif else {})
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ crc)
    return file.getvalue()[:33] + chunk + file.getvalue()[33:], pixels


def jpeg_with(marker, data):
    file = io.BytesIO()
    Image.fromarray(noise(20, 30, 3)).save(file, "JPEG")
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data
    return file.getvalue()[:2] + segment + file.getvalue()[2:], np.asarray(Image.open(file))


BROKEN = {
    "EXIF of no TIFF": png_with(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03"),
    "EXIF that ends early": png_with(b"eXIf", b"II*"),
    "too long a text": png_with(b"zTXt", b"k\0\0" + zlib.compress(bytes(8 << 20))),
    "too many texts": png_with(b"tEXt", b"k\0" + b"a" * (65 << 20)),
    "a text in no known packing": png_with(b"zTXt", b"k\0\x05abc"),
    "a faulty checksum": png_with(b"tEXt", b"k\0abc", crc=1),
    "half a resolution": png_with(b"pHYs", b"\0\0"),
    "half a gamma": png_with(b"gAMA", b"\0"),
    "half a white point": png_with(b"cHRM", b"\0"),
    "half an animation": png_with(b"acTL", b"\0"),
    "half a transparency": png_with(b"tRNS", b"\0"),
    "too large a profile": png_with(b"iCCP", b"x\0\0" + zlib.compress(bytes(8 << 20))),
    "half a JFIF header": jpeg_with(0xE0, b"JFIF\0\1"),
    "half an Adobe header": jpeg_with(0xEE, b"Adobe\0"),
    "half a profile": jpeg_with(0xE2, b"ICC_PROFILE\0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_metadata_is_left_aside_with_a_warning(tmp_path, name):
    data, pixels = BROKEN[name]
    (tmp_path / "a").write_bytes(data)
    with pytest.warns(UserWarning, match=f"image {tmp_path}/a has broken .*metadata, which is left aside"):
        np.testing.assert_array_equal(load_image(tmp_path / "a"), pixels)


def test_a_video_is_saved_as_what_its_name_says(tmp_path):
    save_video(iter(smooth(3)), tmp_path / "clip.gif", 8)
    assert Image.open(tmp_path / "clip.gif").n_frames == 3
    for name in ("clip.avi", "clip.png", "clip"):
        with pytest.raises(ValueError, match=f"output .*{name} must end in .mp4, .webm or .gif"):
            save_video(smooth(1), tmp_path / name, 8)


def test_broken_exif_of_which_pil_only_warns_is_told_with_the_files_name(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_image(tmp_path / "a.jpg")
    assert [str(one.message) for one in told] == [
        f"image {tmp_path / 'a.jpg'} has broken EXIF metadata, which is left aside"
    ]


def test_broken_exif_of_an_image_that_the_caller_opened_is_left_aside():
    data, pixels = BROKEN["EXIF of no TIFF"]
    with pytest.warns(UserWarning, match="image has broken EXIF metadata, which is left aside"):
        np.testing.assert_array_equal(load_image(Image.open(io.BytesIO(data))), pixels)


def test_one_broken_part_costs_no_other(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data, pixels = png_with(b"zTXt", b"k\0\0" + zlib.compress(bytes(8 << 20)), exif=exif.tobytes())
    (tmp_path / "a.png").write_bytes(data)
    with pytest.warns(UserWarning, match="broken metadata"):
        np.testing.assert_array_equal(load_image(tmp_path / "a.png"), np.rot90(pixels, -1))


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "gif"])
def test_a_picture_that_is_not_whole_is_refused(tmp_path, format):
    file = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(file, format)
    half = file.getvalue()[: len(file.getvalue()) // 2]
    (tmp_path / "half").write_bytes(half)
    with pytest.raises(OSError, match=f"image {tmp_path}/half is no readable image"):
        load_image(tmp_path / "half")
    if format in ("png", "jpeg", "gif"):  # of which PIL opens a half
        with pytest.raises(OSError, match="image cannot be read"):
            load_image(Image.open(io.BytesIO(half)))


ELSE = {
    "photo.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is HEIC, which is not read: convert it to png or jpeg, "),
    "photo.jpg": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "it is HEIC"),  # as phones send it
    "photo.NEF": (b"MM\0*\0\0\0\x08", "it is a camera's RAW file: develop it to png or jpeg"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d", "it is a git-lfs pointer: fetch"),
    "page.png": (b"\n<!DOCTYPE html><html><body>404", "it is a web page: download the file itself"),
    "drawing.png": (b'<?xml version="1.0"?><svg width="9">', "it is a drawing, SVG: export it as png"),
    "new.jxl": (b"\xff\x0a\xfa\x1f", "it is JPEG XL: convert it to png or jpeg"),
    "clip.png": (b"\0\0\0\x18ftypisom\0\0\0\0isom", "it is a video: give a picture, such as one of its frames"),
    "clip.webm": (b"\x1aE\xdf\xa3", "it is a video"),
}  # fmt: skip


@pytest.mark.parametrize("name", ELSE)
def test_a_file_of_another_kind_is_named(tmp_path, name):
    data, reason = ELSE[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(OSError) as caught:
        load_image(tmp_path / name)
    assert str(caught.value).startswith(f"image {tmp_path}/{name} is no readable image ({reason}")


@pytest.mark.parametrize("name", ["pointer.png", "page.png"])
def test_what_is_no_video_at_all_is_named_too(tmp_path, name):
    (tmp_path / "clip.mp4").write_bytes(ELSE[name][0])
    with pytest.raises(OSError, match=f"clip.mp4 is no readable video .{ELSE[name][1][:12]}"):
        load_video(tmp_path / "clip.mp4")


def test_heic_is_read_where_its_plug_in_is_installed(tmp_path, monkeypatch):
    """The plug-in that stands for it knows one picture."""
    data, pixels = ELSE["photo.heic"][0], noise(4, 6, 3)

    def register_heif_opener():
        Image.register_open("HEIF", lambda file, name: Image.fromarray(pixels), lambda head: head[4:12] == b"ftypheic")

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register_heif_opener))
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    (tmp_path / "photo.heic").write_bytes(data)
    np.testing.assert_array_equal(load_image(tmp_path / "photo.heic"), pixels)


def test_a_uint8_array_is_an_image_and_a_float_array_stays_as_it_is():
    pixels = noise(20, 30, 3)
    np.testing.assert_array_equal(load_image(pixels), pixels)
    floats = load_image(pixels / 255)  # float64
    assert floats.dtype == np.float32
    assert resize_image(floats, 20, 30) is floats
    video, _ = load_video(np.stack([pixels / 255] * 2))
    assert video.dtype == np.float32
    np.testing.assert_array_equal(video[1], floats)


@pytest.mark.parametrize(
    ("image", "expected"), [((1080, 1920), (464, 832)), ((512, 512), (624, 624)), ((1000, 500), (880, 432))]
)
def test_fit_size_keeps_the_aspect_at_the_area(image, expected):
    assert fit_size(*image, 480 * 832, 16) == expected


@pytest.mark.parametrize("seed", range(5))
def test_fit_size_equals_the_example_of_diffusers(seed):
    h, w = map(int, np.random.default_rng(seed).integers(100, 3000, 2))
    aspect_ratio = h / w
    height = round(np.sqrt(720 * 1280 * aspect_ratio)) // 32 * 32
    width = round(np.sqrt(720 * 1280 / aspect_ratio)) // 32 * 32
    assert fit_size(h, w, 720 * 1280, 32) == (height, width)


def test_fit_size_refuses_a_strip():
    with pytest.raises(ValueError, match="an image of 9000x1 is too narrow for .*: give height and width"):
        fit_size(1, 9000, 480 * 832, 16)


@pytest.fixture(scope="module")
def processor_folder(tmp_path_factory):
    """preprocessor_config.json as the published image-to-video checkpoints have it."""
    folder = tmp_path_factory.mktemp("image_processor")
    published = dict(
        crop_size=dict(height=224, width=224), do_center_crop=True, do_convert_rgb=True, do_normalize=True,
        do_rescale=True, do_resize=True, image_processor_type="CLIPImageProcessor", resample=3,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
        rescale_factor=1 / 255, size=dict(shortest_edge=224),
    )  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(published))
    return folder


@pytest.mark.parametrize("shape", [(300, 400), (90, 60), (224, 224)])
def test_clip_pixels_equal_what_diffusers_feeds(processor_folder, shape):
    theirs, ours = AutoImageProcessor.from_pretrained(processor_folder), load_image_processor(processor_folder)
    image = Image.fromarray(noise(*shape, 3))
    expected = theirs(images=image, return_tensors="pt")["pixel_values"]
    actual = clip_pixels(load_image(image), ours)
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, expected[0].permute(1, 2, 0))


def test_clip_pixels_of_a_float_array_equal_diffusers_with_a_warning(processor_folder):
    pixels = noise(50, 70, 3).astype(np.float32) / 255
    theirs = AutoImageProcessor.from_pretrained(processor_folder)
    expected = theirs(images=torch.tensor(pixels).permute(2, 0, 1)[None], return_tensors="pt")["pixel_values"]
    with pytest.warns(UserWarning, match="almost black") as caught:
        actual = clip_pixels(load_image(pixels), load_image_processor(processor_folder))
    np.testing.assert_array_equal(actual, expected[0].permute(1, 2, 0))
    assert [warning.filename for warning in caught] == [__file__]


def test_a_folder_without_preprocessor_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no preprocessor_config.json"):
        load_image_processor(tmp_path)


NAN = np.full((4, 6, 3), np.nan)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (noise(4, 6), r"last_image has shape \(4, 6\), must be \(H, W, 3\)"),
        (noise(4, 6, 4), r"has shape \(4, 6, 4\)"),
        (noise(1, 4, 6, 3), r"has shape \(1, 4, 6, 3\)"),
        (noise(0, 6, 3), r"has shape \(0, 6, 3\)"),
        (noise(4, 6, 3).astype(np.int32), "has dtype int32, must be uint8, or float"),
        (np.linspace(-1, 1, 72).reshape(4, 6, 3), "values from -1.0 to 1.0, float pixels must lie in"),
        (NAN, "values from nan to nan"),
        (Image.fromarray(noise(4, 6).astype(np.uint16) * 256), "mode I;16"),
    ],
)
def test_pixels_of_another_shape_depth_or_range_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_image(source, "last_image")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (noise(4, 6, 3), r"video has shape \(4, 6, 3\), must be \(F, H, W, 3\): give a picture as image"),
        (noise(4, 6), r"video has shape \(4, 6\), must be \(F, H, W, 3\)"),
        (NAN[None], "values from nan"),
        ([], "no frames"),
        ([Image.new("RGB", (4, 6)), Image.new("RGB", (6, 4))], r"one size, got \[\(4, 6\), \(6, 4\)\]"),
        ([Image.new("RGB", (4, 6)), noise(6, 4, 3)], "frame 1 of video is a ndarray"),
    ],
)
def test_frames_of_another_shape_or_range_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_video(source)


def test_a_float_array_is_never_resized():
    with pytest.raises(ValueError, match="image is a float array of 4 x 6 but 8 x 6 is asked for"):
        resize_image(np.zeros((4, 6, 3), np.float32), 8, 6)
    with pytest.raises(ValueError, match="video is a float array of 4 x 6 but 4 x 8 is asked for"):
        open_video(np.zeros((2, 4, 6, 3), np.float32)).read(2, 4, 8)


@pytest.mark.parametrize("load", [load_image, load_video])
def test_files_that_are_missing_or_unreadable_are_refused_by_name_and_reason(tmp_path, load):
    kind = load.__name__.removeprefix("load_")
    with pytest.raises(FileNotFoundError, match="absent.mp4 does not exist"):
        load(tmp_path / "absent.mp4")
    (tmp_path / "text.png").write_text("no pixels")
    (tmp_path / "empty.png").touch()
    reasons = {"text.png": "damaged, or of an unknown format", "empty.png": "it is empty", "": "Is a directory"}
    for path, why in ((tmp_path / name, why) for name, why in reasons.items()):
        with pytest.raises(OSError) as caught:
            load(path)
        assert str(caught.value) == f"{kind} {path} is no readable {kind} ({why})"


def test_truncated_files_are_refused_by_name_and_reason(tmp_path):
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / "whole.png")
    save_video(smooth(9), tmp_path / "whole.mp4", 8)
    for name, load, kind in (("png", load_image, "image"), ("mp4", load_video, "video")):
        half = tmp_path / f"half.{name}"
        half.write_bytes((tmp_path / f"whole.{name}").read_bytes()[:500])
        with pytest.raises(OSError, match=rf"half.{name} is no readable {kind} \(") as caught:
            load(half)
        assert str(caught.value).count(str(tmp_path)) == 1


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tiff", "a.gif", "png called a.mp4"])
def test_a_picture_is_no_video(tmp_path, name):
    format = "PNG" if name.endswith("mp4") else None
    Image.fromarray(noise(16, 32, 3)).save(tmp_path / name, format=format)
    with pytest.raises(ValueError, match=f"{name} is a picture: give it as image"):
        load_video(tmp_path / name, max_frames=5)


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_pil_image_is_no_video(mode):
    with pytest.raises(ValueError, match="must be .F, H, W, 3.: give a picture as image"):
        load_video(Image.new(mode, (6, 4)))


@pytest.mark.parametrize("format", ["gif", "png"])
def test_an_animated_picture_is_a_video(tmp_path, format):
    images = [Image.fromarray(frame) for frame in to_uint8(smooth(5))]
    images[0].save(tmp_path / f"moving.{format}", save_all=True, append_images=images[1:], duration=100)
    frames, rate = load_video(tmp_path / f"moving.{format}")
    assert (frames.shape, rate) == ((5, 48, 64, 3), 10)


def test_transparency_is_that_of_pictures(tmp_path):
    images = [Image.fromarray(noise(16, 16, 4)), Image.fromarray(noise(16, 16, 4)[::-1])]
    images[0].save(tmp_path / "moving.png", save_all=True, append_images=images[1:], duration=100, blend=0)
    frames, _ = load_video(tmp_path / "moving.png")
    np.testing.assert_array_equal(frames, [np.asarray(load_image(image)) for image in images])
    np.testing.assert_array_equal(load_video(images)[0], frames)


def test_a_video_of_one_frame_is_one(tmp_path):
    save_video(smooth(1), tmp_path / "short.mp4", 8)
    assert load_video(tmp_path / "short.mp4")[0].shape == (1, 48, 64, 3)


def test_frames_are_counted_without_decoding(tmp_path, monkeypatch):
    frames = to_uint8(smooth(9))
    paths = [write_clip(tmp_path / f"clip.{suffix}", frames) for suffix in ("mp4", "mkv", "ts")]
    monkeypatch.setattr(videos, "_shown", None)
    assert [open_video(path).num_frames for path in paths] == [9, 9, 9]
    assert open_video(smooth(3)).num_frames == open_video([Image.new("RGB", (6, 4))] * 3).num_frames == 3


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("times", "fps"),
    [
        ([round(i * 1000 / 30) + i * 7 % 5 for i in range(17)], 30),  # of a browser: the times are right to 5 ms
        ([round(i * 1001 / 24) for i in range(17)], 24000 / 1001),
        ([0, 40, 80, 120, 160, 200, 240, 280, 1320], 8 / 1.32),  # lasts as long as before
    ],
)
def test_the_rate_is_that_of_the_frames_times(tmp_path, suffix, times, fps):
    path = write_clip(tmp_path / f"clip.{suffix}", to_uint8(smooth(len(times))), times=times)
    video = open_video(path)
    assert float(video.fps) == pytest.approx(fps, rel=0.01)
    if suffix == "mkv":
        assert video.header_fps == 1000


def test_the_rate_is_that_of_the_frames_that_are_read(tmp_path):
    times = [20 * i for i in range(60)] + [1200 + 500 * i for i in range(40)]  # 50 a second, and then 2
    path = write_clip(tmp_path / "clip.mp4", noise(100, 16, 16, 3), times=times)
    rates = [float(load_video(path, max_frames=most)[1]) for most in (50, None)]
    assert rates == pytest.approx([50, 99 / times[-1] * 1000], rel=1e-3)


def test_frames_of_vp8_that_are_not_shown_count_for_nothing(tmp_path):
    path = write_clip(tmp_path / "clip.webm", to_uint8(smooth(17)), "libvpx")
    with av.open(str(path)) as file, av.open(str(tmp_path / "hidden.webm"), "w") as copy:
        stream = copy.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(video=0):
            if packet.size:
                data = bytes(packet)
                hidden = av.Packet(bytes([data[0] & ~16]) + data[1:])  # as what the next frame refers to
                hidden.pts = hidden.dts = packet.pts
                hidden.time_base, hidden.is_keyframe = packet.time_base, packet.is_keyframe
                packet.pts = packet.dts = packet.pts + 2
                for one in (hidden, packet):
                    one.stream = stream
                    copy.mux(one)
    video = open_video(tmp_path / "hidden.webm")
    assert (video.num_frames, len(video.read())) == (17, 17)
    assert float(video.fps) == pytest.approx(8, rel=0.01)


@pytest.mark.parametrize(("sar", "size"), [((4, 3), (48, 85)), ((8, 9), (54, 64)), ((1, 1), (48, 64))])
def test_pixels_that_are_not_square_are_stretched_to_what_is_shown(tmp_path, sar, size):
    frames = to_uint8(smooth(2))
    path = write_clip(tmp_path / "dv.mp4", frames, sar=Fraction(*sar))
    loaded, _ = load_video(path)
    assert loaded.shape == (2, *size, 3) and (open_video(path).height, open_video(path).width) == size
    expected = [Image.fromarray(frame).resize(size[::-1]) for frame in frames]
    assert np.abs(loaded - np.stack(expected).astype(float)).mean() < 4
    assert open_video(path).read(1, 32, 32).shape == (1, 32, 32, 3)


MIRRORED, UPSIDE_DOWN = Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM
ORIENTATIONS = {  # a, b, c, d of a display matrix: x' = a x + c y, y' = b x + d y
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): MIRRORED,
    (1, 0, 0, -1): UPSIDE_DOWN,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # clockwise, as phones write
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_matrix"), reason="av cannot write a display matrix")
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_turned_or_mirrored_video_is_read_as_it_is_shown(tmp_path, orientation):
    picture, how = to_uint8(smooth(1)), ORIENTATIONS[orientation]
    a, b, c, d = (65536 * value for value in orientation)
    path = write_clip(tmp_path / "phone.mp4", picture, matrix=[a, b, 0, c, d, 0, 0, 0, 2**30], sar=Fraction(4, 3))
    image = Image.fromarray(picture[0]).resize((85, 48))  # pixels are wide before the picture is turned
    expected = np.asarray(image if how is None else image.transpose(how))
    loaded, _ = load_video(path)
    assert loaded.shape[1:] == expected.shape
    assert np.abs(loaded[0] - expected.astype(float)).mean() < 5  # from 40 on when turned another way


@pytest.mark.parametrize("matrix", [1, 5])  # BT.709, BT.601
@pytest.mark.parametrize("range", [1, 2])  # 16 to 235, 0 to 255
@pytest.mark.parametrize("colour", [(255, 255, 255), (200, 40, 30), (30, 60, 200), (10, 10, 10)])
def test_colours_follow_the_matrix_and_range_of_a_file(tmp_path, matrix, range, colour):
    path = write_clip(tmp_path / "a.mp4", np.full((2, 16, 16, 3), colour, np.uint8), tags=(matrix, range, 1, 1))
    assert np.abs(load_video(path)[0].astype(int) - colour).max() <= 4


def linear(colour):
    """Light of sRGB."""
    code = np.asarray(colour) / 255
    return np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)


BT709_TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])  # BT.2087


def pq(light):
    """Code of light that is 1 at 203 nits: ITU-R BT.2100, table 4."""
    y = (203 / 10000 * light) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(light):
    """Code of light that is 1 at 203 nits, on a display of 1000: ITU-R BT.2100, table 5 and note 5i."""
    shown = 203 / 1000 * light
    scene = shown * (shown @ [0.2627, 0.6780, 0.0593])[..., None] ** (1 / 1.2 - 1)
    return np.where(
        scene <= 1 / 12, np.sqrt(3 * scene), 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    )


@pytest.mark.parametrize(("name", "encode", "transfer"), [("HDR (PQ)", pq, 16), ("HDR (HLG)", hlg, 18)])
@pytest.mark.parametrize("colour", [(255, 255, 255), (200, 40, 30), (30, 60, 200), (90, 130, 80), (20, 20, 20)])
def test_hdr_is_read_as_srgb(tmp_path, name, encode, transfer, colour):
    code = encode(BT709_TO_BT2020 @ linear(colour))
    frames = np.broadcast_to((65535 * code).round().astype(np.uint16), (2, 16, 16, 3))
    path = write_clip(tmp_path / "hdr.mp4", frames.copy(), pix_fmt="yuv420p10le", tags=(9, 1, 9, transfer))
    assert open_video(path).colours == name
    assert np.abs(load_video(path)[0].astype(int) - colour).max() <= 4  # as SDR it would be off by 70


def test_what_is_brighter_than_white_is_white(tmp_path):
    frames = np.full((1, 16, 16, 3), 65535 * pq(np.array(3.0)), np.uint16)
    path = write_clip(tmp_path / "hdr.mp4", frames, pix_fmt="yuv420p10le", tags=(9, 1, 9, 16))
    assert load_video(path)[0].min() >= 254


def test_bt2020_without_hdr_is_read_as_srgb(tmp_path):
    light = BT709_TO_BT2020 @ linear((200, 40, 30))
    code = 65535 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    frames = np.broadcast_to(code.round().astype(np.uint16), (1, 16, 16, 3))
    path = write_clip(tmp_path / "wide.mp4", frames.copy(), pix_fmt="yuv420p10le", tags=(9, 1, 9, 14))
    assert open_video(path).colours == "BT.2020"
    assert np.abs(load_video(path)[0].astype(int) - (200, 40, 30)).max() <= 4


def test_frames_come_in_the_size_asked_for_as_if_resized_afterwards(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", noise(4, 48, 64, 3))
    whole, _ = load_video(path)
    expected = [np.asarray(Image.fromarray(frame).resize((40, 24), Image.Resampling.LANCZOS)) for frame in whole[:3]]
    read = open_video(path).read(3, 24, 40)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, expected)


def test_no_frame_lives_longer_than_its_turn(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", noise(20, 16, 16, 3))
    gc.collect()
    gc.disable()  # what refers to itself would stay until it runs: 12 MB a frame of 4K
    try:
        load_video(path)
        alive = sum(isinstance(thing, av.VideoFrame) for thing in gc.get_objects())
    finally:
        gc.enable()
    assert alive <= 3


# Damaged files: what the ffmpeg command gives of them


@pytest.fixture(scope="module")
def long_clip():
    return np.stack([np.roll(noise(48, 64, 3), 3 * i, 1) for i in range(17)])


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"movflags": "+faststart"}),
        ("a.mov", "libx264", {"movflags": "frag_keyframe+empty_moov+default_base_moof+dash"}),
        ("a.mkv", "libx264", {}),
        ("a.avi", "mjpeg", {}),
        ("a.flv", "libx264", {}),
        ("a.ts", "libx264", {}),
    ],
)
@pytest.mark.parametrize("share", [0.8, 0.5])
def test_a_torn_file_gives_its_whole_frames(tmp_path, long_clip, name, codec, options, share):
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_clip(tmp_path / name, long_clip, codec, pix_fmt, options=options, gop=4)
    whole, _ = load_video(path)
    assert len(whole) == 17
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        part, _ = load_video(path)
    assert 17 * share - 4 < len(part) < 17
    np.testing.assert_array_equal(part[:-1], whole[: len(part) - 1])  # of JPEG, the last one may be half there
    if name != "a.ts":  # which does not say how long it is to be
        (warning,) = caught
        assert re.search(f"video {path} (ends early: .* s that its header promises|is damaged: )", str(warning.message))


def test_a_file_damaged_in_the_middle_gives_the_other_frames(tmp_path, long_clip):
    path = write_clip(tmp_path / "clip.mkv", long_clip, gop=1)
    whole, _ = load_video(path)
    damage(path, 4, 9)
    with pytest.warns(UserWarning, match="clip.mkv is damaged: frames lost or faulty: 2"):
        rest, _ = load_video(path)
    np.testing.assert_array_equal(rest, np.delete(whole, [4, 9], 0))


def test_a_file_of_which_nothing_can_be_decoded_is_refused(tmp_path, long_clip):
    path = write_clip(tmp_path / "clip.mkv", long_clip[:3], gop=1)
    damage(path, 0, 1, 2)
    with pytest.raises(OSError, match=r"clip.mkv is no readable video \(damaged, or of an unknown format\)"):
        load_video(path)


def test_a_file_of_an_unknown_codec_is_refused(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", noise(3, 16, 16, 3))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz1"))
    with pytest.raises(OSError, match=r"clip.mp4 is no readable video \(its codec is unknown\)"):
        load_video(path)


def test_tags_in_another_encoding_do_not_matter(tmp_path):
    path = tmp_path / "clip.avi"
    with av.open(str(path), "w") as file:
        file.metadata["title"] = "caf??"
        stream = file.add_stream("mjpeg", rate=8)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuvj420p"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(noise(16, 16, 3), format="rgb24")) + stream.encode())
    path.write_bytes(path.read_bytes().replace(b"caf??", b"caf\xe9 "))
    assert load_video(path)[0].shape == (1, 16, 16, 3)


@pytest.mark.parametrize("name", ["a.mp3", "a.flac"])
def test_a_song_with_a_cover_is_no_video(tmp_path, name):
    with av.open(str(tmp_path / name), "w") as file:
        sound = file.add_stream("mp3" if name == "a.mp3" else "flac", rate=44100)
        cover = file.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic.value
        file.mux(cover.encode(av.VideoFrame.from_ndarray(noise(48, 64, 3), format="rgb24")))
        file.mux(cover.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8820), np.int16), format="s16", layout="stereo")
        frame.sample_rate = 44100
        file.mux(sound.encode(frame))
        file.mux(sound.encode())
    with pytest.raises(ValueError, match=f"video .*{name} has no video stream but a cover picture"):
        load_video(tmp_path / name)


def test_a_file_with_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="sound.wav has no video stream"):
        load_video(tmp_path / "sound.wav")


# Output


@pytest.mark.parametrize(
    ("name", "fps"), [("clip.mp4", fps) for fps in (16, 12.5, 23.976, Fraction(30000, 1001))] + [("clip.webm", 16)]
)
def test_a_file_gives_back_frames_size_and_rate(tmp_path, name, fps):
    frames = smooth(9)
    save_video(frames, tmp_path / name, fps)
    loaded, rate = load_video(tmp_path / name)
    assert loaded.shape == frames.shape
    assert float(rate) == pytest.approx(float(fps), rel=1e-9)
    # Halved chroma and compression cost 0.8 %; BT.601 taken for BT.709 would cost 2.3 %.
    assert np.abs(loaded / 255 - frames).mean() < 0.012
    first, _ = load_video(tmp_path / name, max_frames=2)
    np.testing.assert_array_equal(first, loaded[:2])


@pytest.mark.parametrize(
    ("name", "codec", "kept"),
    [("clip.mp4", "h264", {}), ("clip.mp4", "h264", {"crf": 1, "x264_preset": "ultrafast"}), ("clip.webm", "vp9", {})],
)
def test_a_video_is_what_browsers_play(tmp_path, name, codec, kept):
    path = tmp_path / name
    save_video(smooth(5), path, 16, **kept)
    with av.open(str(path)) as file:
        context = file.streams.video[0].codec_context
        assert (context.name.removeprefix("lib"), context.pix_fmt) == (codec, "yuv420p")
        assert codec != "h264" or context.profile in ("High", "Constrained Baseline", "Main")
        tags = (context.color_range, context.colorspace, context.color_primaries, context.color_trc)
        assert len(list(file.decode(video=0))) == 5
    assert tags == (1, 1, 1, 1)  # limited range, BT.709 thrice
    data = path.read_bytes()
    assert codec != "h264" or 0 < data.find(b"moov") < data.find(b"mdat")  # the index comes first


@pytest.mark.parametrize(
    ("name", "kept", "words"),
    [
        ("a.mp4", {"crf": 0}, "crf=0 must be a whole number from 1 to 51 for .*a.mp4"),
        ("a.mp4", {"crf": 52}, "from 1 to 51"),
        ("a.webm", {"crf": 64}, "from 1 to 63"),
        ("a.mp4", {"crf": True}, "crf=True must be"),
        ("a.gif", {"crf": 20}, "crf=20 is for mp4 and webm, and .*a.gif is neither"),
        ("a.mp4", {"x264_preset": "fastest"}, "x264_preset='fastest' is not one of ultrafast, superfast, "),
        ("a.webm", {"x264_preset": "fast"}, "x264_preset=fast is for mp4, and .*a.webm is none"),
    ],
)
def test_a_compression_that_a_file_does_not_take_is_refused(tmp_path, name, kept, words):
    with pytest.raises(ValueError, match=words):
        save_video(smooth(2), tmp_path / name, 8, **kept)
    with pytest.raises(ValueError, match=words):
        check_output(tmp_path / name, 2, compression=Compression(**kept))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (51, 102, 153)])
def test_flat_colours_survive_an_mp4(tmp_path, colour):
    save_video(np.full((3, 16, 16, 3), colour, np.uint8), tmp_path / "flat.mp4", 8)
    loaded, _ = load_video(tmp_path / "flat.mp4")
    assert np.abs(loaded.astype(int) - colour).max() <= 3  # 219 levels of luma for 256


def test_frames_may_come_one_by_one(tmp_path):
    frames = smooth(6)
    save_video(frames, tmp_path / "whole.mp4", 8)
    save_video((frame for frame in to_uint8(frames)), tmp_path / "streamed.mp4", 8)
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "streamed.mp4").read_bytes()


def test_a_png_gives_back_its_pixels_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "frame.png"
    path.write_text("older")
    frame = noise(16, 32, 3)
    save_image(frame, path)
    np.testing.assert_array_equal(load_image(path), frame)
    assert os.listdir(tmp_path) == ["frame.png"]


def test_rounding_to_8_bits_equals_diffusers():
    frame = np.random.default_rng(0).random((40, 50, 3), np.float32)
    frame[0, :5, 0] = [0, 1, 0.5 / 255, 1.5 / 255, 254.5 / 255]
    np.testing.assert_array_equal(to_uint8(frame), VaeImageProcessor.numpy_to_pil(frame)[0])


@pytest.mark.parametrize("bad", [-0.001, 1.001, np.nan])
def test_frames_out_of_range_are_not_wrapped_around(bad):
    with pytest.raises(ValueError, match="float pixels must lie in"):
        to_uint8(np.array([[0.5, bad]], np.float32))


def broken(frames):
    yield from frames
    raise RuntimeError("the decoder failed")


@pytest.mark.parametrize(
    ("frames", "fps", "error", "message"),
    [
        ([], 8, ValueError, "no frames to save"),
        (broken(smooth(3)), 8, RuntimeError, "decoder failed"),
        ([smooth(1)[0], smooth(1)[0, :16]], 8, ValueError, r"frame 1 has shape \(16, 64, 3\), frame 0 is 48 x 64"),
        ([np.full((16, 16, 3), np.nan)], 8, ValueError, "frame 0 has values from nan"),
        (noise(2, 15, 16, 3), 8, ValueError, "even H and W"),
        (noise(2, 16, 16), 8, ValueError, r"shape \(16, 16\)"),
        (smooth(2), 0, ValueError, "fps=0 must be a positive number"),
        (smooth(2), float("nan"), ValueError, "fps=nan"),
        (smooth(2), True, ValueError, "fps=True must be"),
        (smooth(2)[None], 8, ValueError, r"a frame has shape \(2, 48, 64, 3\): give the frames of one video"),
    ],
)
def test_a_failed_mp4_leaves_the_folder_as_it_was(tmp_path, frames, fps, error, message):
    (tmp_path / "clip.mp4").write_text("older")
    with pytest.raises(error, match=message):
        save_video(frames, tmp_path / "clip.mp4", fps)
    assert os.listdir(tmp_path) == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_text() == "older"


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "frame.png", "arrays.npz"])
def test_a_full_disk_is_told_with_the_name_that_was_asked_for(tmp_path, name):
    """As far as a limit of the process is like one: SIGXFSZ is ignored by Python."""
    (tmp_path / name).write_text("older")
    frames, limits = noise(3, 128, 128, 3), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            if name.endswith("npz"):
                save_npz(tmp_path / name, frames=frames)
            else:
                save_output(frames[: 1 if name.endswith("png") else None], tmp_path / name, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / name)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "older"


@pytest.mark.parametrize("save", [save_output, lambda frames, path, fps, **kept: save_npz(path, x=frames, **kept)])
def test_of_two_that_write_the_same_file_the_later_is_refused_unless_it_may_replace(tmp_path, save):
    path = tmp_path / "clip.gif"

    def frames_while_another_writes():
        path.write_text("another's")
        return smooth(2)

    with pytest.raises(FileExistsError, match="clip.gif"):
        save(frames_while_another_writes(), path, 8, overwrite=False)
    assert path.read_text() == "another's" and os.listdir(tmp_path) == ["clip.gif"]
    save(smooth(2), path, 8)
    assert path.stat().st_size > 20
    path.unlink()
    save(smooth(2), path, 8, overwrite=False)
    assert path.stat().st_size > 20 and os.listdir(tmp_path) == ["clip.gif"]


def test_the_suffix_says_what_is_written(tmp_path):
    frames = smooth(3)
    for name in ("clip.mp4", "clip.GIF", "frame.png"):
        save_output(frames[: 1 if name.endswith("png") else None], check_output(tmp_path / name, 1), 10)
    assert len(load_video(tmp_path / "clip.mp4")[0]) == 3
    np.testing.assert_array_equal(Image.open(tmp_path / "frame.png"), to_uint8(frames[0]))
    with Image.open(tmp_path / "clip.GIF") as gif:
        assert (gif.format, gif.n_frames, gif.info["duration"], gif.info["loop"]) == ("GIF", 3, 100, 0)
        for i, frame in enumerate(frames):
            gif.seek(i)
            assert np.abs(np.asarray(gif.convert("RGB")) / 255 - frame).mean() < 0.02  # 256 of 3,072 colours are left


def read_gif(path):
    """(first pixel's red, delay in ms) of each frame in the file."""
    with Image.open(path) as gif:
        for i in range(gif.n_frames):
            gif.seek(i)
            yield gif.convert("RGB").getpixel((0, 0))[0], gif.info["duration"]


@pytest.mark.parametrize("fps", [0.5, 7, 12.5, 15, 16, 23.976, 24, Fraction(30000, 1001), 33, 49.9, 50])
def test_a_gif_lasts_as_long_as_its_frames(tmp_path, recwarn, fps):
    frames = np.arange(49, dtype=np.uint8)[:, None, None, None] * np.full((16, 16, 3), 5, np.uint8)
    save_gif(frames, tmp_path / "a.gif", fps)
    levels, delays = zip(*read_gif(tmp_path / "a.gif"), strict=True)
    assert levels == tuple(range(0, 245, 5))
    assert abs(sum(delays) - 49000 / fps) <= 5 and max(delays) - min(delays) <= 10 and min(delays) >= 20
    late = np.cumsum(delays) - 1000 * np.arange(1, 50) / float(fps)
    assert np.abs(late).max() <= 10 and not recwarn.list


@pytest.mark.parametrize(("fps", "kept"), [(51, 48), (60, 41), (100, 24), (120, 20), (1000, 2)])
def test_a_gif_of_many_frames_a_second_leaves_some_out(tmp_path, fps, kept):
    """Browsers play a delay below 20 ms as 100 ms."""
    frames = np.arange(49, dtype=np.uint8)[:, None, None, None] * np.full((16, 16, 3), 5, np.uint8)
    with pytest.warns(UserWarning, match=f"at most 50 frames a second, not {fps}: {kept} of 49 frames are kept"):
        save_video(frames, tmp_path / "a.gif", fps)
    levels, delays = zip(*read_gif(tmp_path / "a.gif"), strict=True)
    assert len(levels) == kept and min(delays) >= 20 and abs(sum(delays) - 49000 / fps) <= 5
    times = 1000 * np.array(levels) / 5 / fps  # when each was filmed, and when it is shown
    assert np.abs(times - np.cumsum([0, *delays[:-1]])).max() <= max(20, 1000 / fps)


def test_a_gif_of_frames_that_stand_still_lasts_as_long(tmp_path):
    """PIL writes equal frames as one."""
    frames = np.zeros((24, 16, 16, 3), np.uint8)
    save_gif(frames, tmp_path / "still.gif", 24)
    frames[12:] = 200
    save_gif(frames, tmp_path / "two.gif", 24)
    save_gif(frames[:1], tmp_path / "one.gif", 1000)
    delays = [[delay for _, delay in read_gif(tmp_path / f"{name}.gif")] for name in ("still", "two", "one")]
    assert delays == [[1000], [500, 500], [20]]


def test_a_gif_is_the_one_that_pil_makes_of_all_frames_at_once(tmp_path):
    """Of moving shapes, of noise in as many colours as there can be, and with frames that stand still."""
    shapes = np.zeros((12, 40, 56, 3), np.uint8)
    for i, frame in enumerate(shapes):
        frame[10:20, 2 * i : 2 * i + 9], frame[25:30, 30 - i : 40 - i] = (200, 30, 10 * i), (9, 99, 255 - 20 * i)
    clips = shapes, noise(6, 40, 56, 3), np.repeat(shapes[:5], 3, 0), np.concatenate([noise(2, 40, 56, 3), shapes[:4]])
    for frames in clips:
        save_gif(frames, tmp_path / "ours.gif", 10, {"comment": "é" * 300})
        images = [Image.fromarray(frame).quantize(dither=Image.Dither.NONE) for frame in frames]
        told = dict(duration=[100] * len(images), loop=0, comment=("é" * 300).encode())
        images[0].save(tmp_path / "whole.gif", save_all=True, append_images=images[1:], **told)
        assert (tmp_path / "ours.gif").read_bytes() == (tmp_path / "whole.gif").read_bytes()


def test_a_gif_keeps_three_frames_however_many_there_are(tmp_path):
    """Of those that are given one by one."""
    most = 0

    class Frames:
        def __len__(self):
            return 30

        def __iter__(self):
            nonlocal most
            for i in range(30):
                frame = np.full((16, 16, 3), 8 * i, np.uint8)
                yield frame
                del frame
                most = max(most, sum(isinstance(thing, Image.Image) for thing in gc.get_objects()) - before)

    gc.collect()
    before = sum(isinstance(thing, Image.Image) for thing in gc.get_objects())
    save_gif(Frames(), tmp_path / "a.gif", 10)
    assert 0 < most <= 6  # PIL images, with those of the pair that is written


def test_an_output_is_checked_beforehand_without_leaving_anything(tmp_path):
    assert check_output(tmp_path / "new" / "deep" / "clip.mp4", 81) == tmp_path / "new" / "deep" / "clip.mp4"
    check_output(str(tmp_path / "frame.png"), 1)
    check_output(tmp_path / "frame.MP4", 1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "num_frames", "message"),
    [
        ("clip.png", 81, r"must end in .mp4 or .webm or .gif for 81 frame"),
        ("clip.avi", 1, r"must end in .mp4 or .webm or .gif or .png for 1 frame"),
        ("clip", 81, "must end in .mp4"),
    ],
)
def test_an_output_of_another_kind_is_refused(tmp_path, name, num_frames, message):
    with pytest.raises(ValueError, match=message):
        check_output(tmp_path / name, num_frames)


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file cannot be written"):
        check_output(tmp_path / "file" / "clip.mp4", 81)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match="folder.mp4 is a folder"):
        check_output(tmp_path / "folder.mp4", 81)
