"""Encoded clips in files: which there are, what is in them, how they are kept."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_tiny import VAE_CONFIG, write_vae

from jaxwan.tiny import latents
from jaxwan.tiny.attributes import combinations
from jaxwan.tiny.latents import PIECE, PIECES, VALIDATION, make_latents, pieces_folder, read_latents


@pytest.fixture
def vae_folder(tmp_path):
    """No VAE: `keys_as_latents` encodes without."""
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    return tmp_path / "vae"


@pytest.fixture
def encoded(monkeypatch):
    """Numbers drawn by a clip's key in place of its latents: the key is all that tells it from others that show the
    same. The list is of how many were encoded at a time."""
    calls, numbers = [], jax.jit(jax.vmap(lambda key: jax.random.uniform(key, (1, 1, 1, 2))))

    def encode(attributes, keys):
        calls.append(len(keys))
        return attributes, numbers(keys)

    monkeypatch.setattr(latents, "BATCH", 64)
    monkeypatch.setattr(latents, "load_vae", lambda folder: None)
    monkeypatch.setattr(latents, "_encoder", lambda vae, kind: encode)
    return calls


def rows_of(attributes):
    first = attributes.first
    return np.stack([first.colour, first.shape, first.motion, attributes.background], axis=1)


def test_pieces_walk_through_all_combinations_evenly(vae_folder, tmp_path, encoded):
    """57 pieces of 256 are 16 times the 912 combinations; no stretch of them sees one much more often than another."""
    assert 4 * PIECE > len(combinations()) > 3 * PIECE
    folder = make_latents(vae_folder, tmp_path, "clips", range(57))
    rows = rows_of(read_latents(folder, "clips", range(57)).attributes)
    for stretch, count in ((rows, 16), (rows[:912], 1), (rows[912:1824], 1)):
        found, counts = np.unique(stretch, axis=0, return_counts=True)
        assert np.array_equal(found, np.unique(combinations(), axis=0)) and set(counts) == {count}
    assert not np.array_equal(rows[:912], rows[912:1824])  # each time in another order


def test_no_piece_of_training_holds_clips_of_another_or_of_the_validation(vae_folder, tmp_path, encoded):
    folder = make_latents(vae_folder, tmp_path, "clips", [VALIDATION, *range(5)])
    pieces = [read_latents(folder, "clips", [number]).latents for number in (VALIDATION, *range(5))]
    keys = np.concatenate(pieces).reshape(-1, 2)
    assert len(np.unique(keys, axis=0)) == len(keys) == 6 * PIECE
    assert VALIDATION not in range(max(PIECES.values()))


def test_a_piece_depends_on_its_number_alone(vae_folder, tmp_path, encoded):
    alone = make_latents(vae_folder, tmp_path / "alone", "clips", [3])
    after = make_latents(vae_folder, tmp_path / "after", "clips", [0, 3])
    pair = [read_latents(folder, "clips", [3]) for folder in (alone, after)]
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), *pair))


def test_only_what_is_missing_is_encoded(vae_folder, tmp_path, encoded):
    make_latents(vae_folder, tmp_path, "clips", [1])
    folder = make_latents(vae_folder, tmp_path, "clips", range(3))
    assert sum(encoded) == 3 * PIECE and set(encoded) == {64}
    assert len(read_latents(folder, "clips", range(9)).latents) == 3 * PIECE
    assert sorted(path.name for path in folder.iterdir()) == [f"clips-000000{i}.npz" for i in range(3)]
    with pytest.raises(ValueError, match="has no encoded pictures: run the stage 'latents' first"):
        read_latents(folder, "pictures", range(3))


def test_another_vae_has_another_folder(vae_folder, tmp_path):
    before = pieces_folder(vae_folder, tmp_path)
    assert before == pieces_folder(vae_folder, tmp_path)
    (vae_folder / "config.json").write_text("{ }")
    assert before != pieces_folder(vae_folder, tmp_path)


@pytest.mark.slow
def test_latents_are_scaled_by_the_vaes_statistics(tmp_path, monkeypatch):
    """Latents of a VAE without statistics give those with which they have no mean and unit spread."""
    monkeypatch.setattr(latents, "PIECE", 8)
    cfg = replace(VAE_CONFIG, dim_mult=(1, 1, 1), temperal_downsample=(True, True), scale_factor_spatial=4)

    def encode(name):
        folder = make_latents(tmp_path / name, tmp_path, "pictures", [0])
        return read_latents(folder, "pictures", [0]).latents.astype(np.float32)

    write_vae(tmp_path / "plain", cfg)
    plain = encode("plain")
    mean, std = (tuple(value.tolist()) for value in (plain.mean((0, 1, 2, 3)), plain.std((0, 1, 2, 3))))
    write_vae(tmp_path / "scaled", replace(cfg, latents_mean=mean, latents_std=std))
    scaled = encode("scaled")
    assert plain.shape == (8, 1, 16, 24, 16) and np.ptp(plain.std((0, 1, 2, 3))) > 0.05
    np.testing.assert_allclose(scaled.mean((0, 1, 2, 3)), 0, atol=2e-3)  # float16 on both sides
    np.testing.assert_allclose(scaled.std((0, 1, 2, 3)), 1, atol=2e-3)
    np.testing.assert_allclose(scaled, (plain - jnp.array(mean)) / jnp.array(std), atol=2e-2)
