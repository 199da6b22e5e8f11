"""Encoded training clips and pictures, kept in files: training sees each of them many times, worded anew.

A picture is one frame of a clip, at any time of it. A piece holds PIECE clips or pictures and depends only on its
number and the VAE, so that several processes can fill one folder.
"""

import os
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from jaxwan.models.vae import VAE
from jaxwan.tiny.attributes import Attributes, combinations, draw_attributes
from jaxwan.tiny.clips import make_clip, paint, place
from jaxwan.tiny.train_vae import encode, load_vae

PIECE = 256  # clips a file
BATCH = 8  # clips encoded at a time
PIECES = {"clips": 80, "pictures": 64}
VALIDATION = 1_000_000  # number of the piece that training never sees


class Latents(NamedTuple):
    """Clips (or pictures, T = 1) as the denoiser sees them, and what each shows (integers and booleans)."""

    latents: Float[np.ndarray, "n t y x z"]
    attributes: Attributes


def make_latents(vae_folder: Path, folder: Path, kind: str, numbers: Iterable[int]) -> Path:
    """Encode the pieces of these numbers that are not there yet; returns their folder, one for each VAE."""
    folder = pieces_folder(vae_folder, folder)
    folder.mkdir(parents=True, exist_ok=True)
    encode_batch = None
    for number in numbers:
        if not _path(folder, kind, number).is_file():
            encode_batch = encode_batch or _encoder(load_vae(vae_folder), kind)
            _write(_path(folder, kind, number), [encode_batch(*b) for b in _batches(number)])
    return folder


def read_latents(folder: Path, kind: str, numbers: Iterable[int]) -> Latents:
    """The pieces of these numbers that are there, in order. Raises ValueError when none is."""
    paths = [path for number in numbers if (path := _path(folder, kind, number)).is_file()]
    if not paths:
        raise ValueError(f"{folder} has no encoded {kind}: run the stage 'latents' first")
    return jax.tree.map(lambda *parts: np.concatenate(parts), *[_read(path) for path in paths])


def pieces_folder(vae_folder: Path, folder: Path) -> Path:
    """The folder in `folder` that belongs to a VAE: named by what is in its files."""
    digest = sha256()
    for path in sorted(vae_folder.iterdir()):
        digest.update(path.read_bytes())
    return folder / digest.hexdigest()[:12]


def _batches(number: int) -> list[tuple[Attributes, Key[Array, " n"]]]:
    """Attributes and keys of a piece, BATCH at a time. The pieces walk through all combinations of training alike."""
    rows = jnp.asarray(combinations()[_rows(number)])
    drawing, placing = jax.random.split(jax.random.fold_in(jax.random.key(2), number))
    drawn = _draw_all(jax.random.split(drawing, PIECE), rows)
    keys = jax.random.split(placing, PIECE)
    return [jax.tree.map(lambda x, i=i: x[i : i + BATCH], (drawn, keys)) for i in range(0, PIECE, BATCH)]


_draw_all = jax.jit(jax.vmap(draw_attributes))


def _rows(number: int) -> Int[np.ndarray, " n"]:
    """Rows of `combinations` in a piece: successive pieces walk through random orders of all of them."""
    count = len(combinations())
    places = number * PIECE + np.arange(PIECE)
    orders = {lap: np.random.default_rng((2, lap)).permutation(count) for lap in np.unique(places // count).tolist()}
    return np.array([orders[place // count][place % count] for place in places.tolist()])


def _encoder(vae: VAE, kind: str) -> Callable:
    """(attributes, keys) -> the attributes and the latents, scaled as the denoiser sees them."""
    draw = make_clip if kind == "clips" else _make_picture
    formulation = "joined" if jax.default_backend() == "cpu" else "direct"

    @jax.jit
    def latents(attributes: Attributes, keys: Key[Array, " n"]) -> Float[Array, "n t y x z"]:
        pixels = 2 * jax.vmap(draw)(attributes, keys) - 1
        return encode(vae, pixels, formulation).astype(jnp.float16)

    return lambda attributes, keys: (attributes, latents(attributes, keys))


def _make_picture(attributes: Attributes, key: PRNGKeyArray) -> Float[Array, "1 h w 3"]:
    placing, time = jax.random.split(key)
    return paint(place(attributes, placing), jax.random.uniform(time, (1,)))


def _path(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}-{number:07}.npz"


def _write(path: Path, batches: list) -> None:
    """One file, whole or not at all."""
    attributes, latents = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
    names = {f"attribute-{i}": leaf for i, leaf in enumerate(jax.tree.leaves(attributes))}
    temporary = path.with_suffix(f".{os.getpid()}.part")  # another process may write the same piece
    with open(temporary, "wb") as file:
        np.savez(file, latents=latents, **names)
    temporary.replace(path)


def _read(path: Path) -> Latents:
    with np.load(path) as file:
        structure = jax.tree.structure(jax.eval_shape(draw_attributes, jax.random.key(0)))
        leaves = [file[f"attribute-{i}"] for i in range(structure.num_leaves)]
        return Latents(file["latents"], jax.tree.unflatten(structure, leaves))
