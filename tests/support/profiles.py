"""Colour profiles for the tests, written out byte by byte. Source: ICC.1:2001-04, the file format specification."""

import struct

import numpy as np

# XYZ of red, green and blue as profiles have them, for the white of D50
P3 = [(0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)]
ADOBE = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]
SRGB = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)]
WHITE = (0.9642, 1.0, 0.82491)


def rgb_profile(primaries, code_to_light):
    """Of a display: its primaries, and light from 0 to 1 of codes from 0 to 1."""
    curve = _curve(code_to_light)
    tags = {f"{letter}XYZ": _xyz(xyz) for letter, xyz in zip("rgb", primaries, strict=True)}
    return _profile(b"RGB ", b"XYZ ", tags | {"rTRC": curve, "gTRC": curve, "bTRC": curve})


def gray_profile(code_to_light):
    return _profile(b"GRAY", b"XYZ ", {"kTRC": _curve(code_to_light)})


def cmyk_profile():
    """Of a printer whose inks all do the same: lightness is 100 (1-c)(1-m)(1-y)(1-k), and there is no colour."""
    corners = b"".join(bytes([255 if ink == 0 else 0, 128, 128]) for ink in range(16))
    straight = bytes(range(256))
    matrix = struct.pack(">9i", *(0x10000 * (i % 4 == 0) for i in range(9)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + straight * 4 + corners + straight * 3
    return _profile(b"CMYK", b"Lab ", {"A2B0": table}, kind=b"prtr")


def srgb_light(code):
    return np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)


def srgb_code(light):
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def _curve(code_to_light):
    values = code_to_light(np.arange(1024) / 1023) * 65535
    return b"curv\0\0\0\0" + struct.pack(">I", 1024) + values.round().astype(">u2").tobytes()


def _xyz(xyz):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in xyz))


def _profile(space, connection, tags, kind=b"mntr"):
    tags = {"wtpt": _xyz(WHITE), "desc": b"desc\0\0\0\0\0\0\0\x02t\0" + bytes(79), "cprt": b"text\0\0\0\0t\0"} | tags
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name.encode() + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    white = struct.pack(">3i", *(round(value * 65536) for value in WHITE))
    header = struct.pack(">I4sI4s4s4s12s4s", start + len(data), b"", 0x02100000, kind, space, connection, b"", b"acsp")
    return header.ljust(68, b"\0") + white.ljust(60, b"\0") + table + data
