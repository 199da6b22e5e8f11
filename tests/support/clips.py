"""Video files of every kind that cameras, browsers and bad luck make."""

from fractions import Fraction

import av
import numpy as np


def write_clip(path, frames, codec="libx264", pix_fmt="yuv420p", times=None, matrix=None, sar=None, gop=None, tags=(),
               options=None):  # fmt: skip
    """Frames at 8 a second, or at `times` in ms; tags: colour matrix, range, primaries and transfer (ITU-T H.273)."""
    quality = {"qscale": "1"} if "mpeg" in codec else {"crf": "4"}
    with av.open(str(path), "w", options=options or {}) as file:
        stream = file.add_stream(codec, rate=8 if times is None else 1000, options=quality)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        context = stream.codec_context
        if times is not None:
            context.time_base = stream.time_base = Fraction(1, 1000)
        context.gop_size = gop or context.gop_size
        if sar is not None:
            context.sample_aspect_ratio = sar
        if tags:
            context.colorspace, context.color_range, context.color_primaries, context.color_trc = tags
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24" if pixels.dtype == np.uint8 else "gbrp16le")
            if tags:
                frame = frame.reformat(format=pix_fmt, dst_colorspace=tags[0], dst_color_range=tags[1])
            frame.pts, frame.time_base = (i, Fraction(1, 8)) if times is None else (times[i], Fraction(1, 1000))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def damage(path, *indices):
    """Spoil packets of a file."""
    with av.open(str(path)) as file:
        packets = [bytes(packet) for packet in file.demux(video=0)]
    data = path.read_bytes()
    for index in indices:
        data = data.replace(packets[index], b"\xff" * len(packets[index]))
    path.write_bytes(data)
