"""Carrying a training to another machine and back."""

import io
import tarfile
from hashlib import sha256

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxwan.tiny import pack as packing
from jaxwan.tiny.pack import SUMS, pack, unpack
from jaxwan.tiny.training import Saved, Saver, latest_step, start

OPTIMIZER = optax.adam(1.0)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(packing, "PIECE", 20_000)


def state(step):
    params = {"x": jax.random.normal(jax.random.key(step), (20, 30))}
    return Saved(start(params, OPTIMIZER)._replace(step=jnp.int32(step)), phase=1, done=step, history=({"step": step},))


def save(states, **steps):
    for stage, step in steps.items():
        with Saver(states / stage) as saver:
            saver.save(state(step))


def restore(states, stage):
    with Saver(states / stage) as saver:
        return saver.restore(state(0).state)


def write_model(output, *entries, content="here"):
    for name in entries:
        (output / name).mkdir(parents=True, exist_ok=True)
        (output / name / "weights").write_text(f"{name} {content}")


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(states, model, packed) of a training whose second stage is under way."""
    folder = tmp_path_factory.mktemp("whole")
    states, output = folder / "states", folder / "model"
    save(states, vae=30, base=10)
    save(states, base=20)
    (states / "latents").mkdir()
    (states / "latents" / "clips.npz").write_text("many")
    write_model(output, "vae", "tokenizer", "samples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PIECE", 20_000)
        assert pack(states, output, folder / "packed") == {"vae": 30, "base": 20}
    return states, output, folder / "packed"


def test_a_training_goes_on_elsewhere_as_it_stood(whole, tmp_path):
    states, output = tmp_path / "there" / "states", tmp_path / "there" / "model"
    assert unpack(whole[2], states, output) == {"vae": 30, "base": 20}
    for stage, step in (("vae", 30), ("base", 20)):
        found, saved = restore(states, stage), state(step)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found.state, saved.state))
        assert found._replace(state=None) == saved._replace(state=None)
    assert everything(output) == {"tokenizer/weights": b"tokenizer here", "vae/weights": b"vae here"}


def test_neither_clips_nor_earlier_states_nor_what_is_no_part_of_the_model_is_carried(whole, tmp_path):
    unpack(whole[2], tmp_path, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tokenizer", "vae"]
    assert {path.name for path in (tmp_path / "base").iterdir()} == {"20"}


def test_pieces_are_small_and_a_tar_file_together(whole):
    pieces = sorted(whole[2].glob("state.tar.*"))
    sizes = [path.stat().st_size for path in pieces]
    assert len(pieces) > 2 and set(sizes[:-1]) == {20_000} and 0 < sizes[-1] <= 20_000
    assert {path.name for path in whole[2].iterdir()} == {SUMS, *(path.name for path in pieces)}
    lines = [f"{sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in pieces]  # as of sha256sum
    assert (whole[2] / SUMS).read_text().splitlines() == lines
    with tarfile.open(fileobj=io.BytesIO(b"".join(path.read_bytes() for path in pieces))) as tar:
        assert {"states/vae/30", "states/base/20", "model/vae/weights"} <= set(tar.getnames())


def test_pieces_are_at_most_15_mib(monkeypatch):
    monkeypatch.undo()
    assert packing.PIECE <= 15 * 2**20


def test_packing_again_leaves_nothing_of_before(whole, tmp_path):
    states, output, _ = whole
    pack(states, output, tmp_path)
    before = len(list(tmp_path.iterdir()))
    assert pack(states, output, tmp_path, ["vae"]) == {"vae": 30}
    assert len(list(tmp_path.iterdir())) < before
    assert unpack(tmp_path, tmp_path / "a", tmp_path / "b") == {"vae": 30}


def test_the_model_alone_can_be_carried_but_not_nothing(whole, tmp_path):
    states, output, _ = whole
    assert pack(states, output, tmp_path / "packed", ["high"]) == {}
    assert unpack(tmp_path / "packed", tmp_path / "states", tmp_path / "model") == {}
    assert "vae/weights" in everything(tmp_path / "model") and not everything(tmp_path / "states")
    with pytest.raises(ValueError, match="there is nothing to pack: .*none holds no state, .*neither no model"):
        pack(tmp_path / "none", tmp_path / "neither", tmp_path / "packed")


def copy(whole, folder):
    folder.mkdir()
    for name, content in everything(whole[2]).items():
        (folder / name).write_bytes(content)
    return folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def sign(folder):
    """Write the sums of whatever pieces there are."""
    pieces = sorted(folder.glob("state.tar.*"))
    lines = [f"{sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in pieces]
    (folder / SUMS).write_text("".join(lines))


def tar_of(folder, name):
    folder.joinpath("state.tar.001").unlink()
    for path in folder.glob("state.tar.00[2-9]"):
        path.unlink()
    with tarfile.open(folder / "state.tar.000", "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 3
        tar.addfile(info, io.BytesIO(b"bad"))
    sign(folder)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: flip(f / "state.tar.001"), r"state.tar.001 is damaged"),
        (lambda f: (f / "state.tar.001").unlink(), r"lacks state.tar.001 of \d+ pieces"),
        (lambda f: (f / "state.tar.077").write_text("x"), r"has state.tar.077, which SHA256SUMS does not name"),
        (lambda f: (f / SUMS).unlink(), "has no SHA256SUMS"),
        (lambda f: (f / SUMS).write_text(""), r"has state.tar.000, .*, which SHA256SUMS does not name"),
        (lambda f: ((f / "state.tar.000").write_text("no tar" * 999), sign(f)), "holds no packed training"),
        (lambda f: tar_of(f, "states/base/../../../evil"), "holds no packed training: .* outside"),
        (lambda f: tar_of(f, "states/muse/3"), "states of muse are packed: known are vae, text, base, high, low"),
    ],
    ids=["damaged", "missing", "one more", "no sums", "empty sums", "no tar", "path outside", "unknown stage"],
)
def test_what_is_not_whole_is_refused_and_changes_nothing(whole, tmp_path, harm, message):
    folder = copy(whole, tmp_path / "packed")
    states, output = tmp_path / "there" / "states", tmp_path / "there" / "model"
    save(states, base=5)
    write_model(output, "vae", content="of there")
    harm(folder)
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=message):
        unpack(folder, states, output)
    assert everything(tmp_path) == before
    assert {path.name for path in (*states.iterdir(), *output.iterdir())} == {"base", "vae"}


def test_a_state_that_is_further_here_is_kept(whole, tmp_path):
    save(tmp_path / "states", base=25)
    with pytest.raises(ValueError, match="base is at step 25, .* only at 20: move the first away"):
        unpack(whole[2], tmp_path / "states", tmp_path / "model")
    assert latest_step(tmp_path / "states" / "base") == 25
    assert latest_step(tmp_path / "states" / "vae") is None and not everything(tmp_path / "model")


def test_a_later_state_comes_with_what_its_stage_wrote(tmp_path):
    """Base and one expert trained there, meanwhile the other expert here: none loses what it has written."""
    there, here = tmp_path / "there", tmp_path / "here"
    for folder, expert in ((there, "low"), (here, "high")):
        save(folder / "states", base=20, **{expert: 8})
        write_model(folder / "model", "vae", "text_encoder", "transformer", "transformer_2", content=folder.name)
    write_model(there / "model", "tokenizer", content="there")
    pack(there / "states", there / "model", tmp_path / "packed")
    assert unpack(tmp_path / "packed", here / "states", here / "model") == {"base": 20, "low": 8}
    names = ("text_encoder", "transformer", "transformer_2")
    written = {name: (here / "model" / name / "weights").read_text().split()[1] for name in names}
    assert written == {"text_encoder": "here", "transformer": "here", "transformer_2": "there"}
    assert (here / "model" / "tokenizer" / "weights").read_text() == "tokenizer there"  # there was none
    assert [latest_step(here / "states" / stage) for stage in ("base", "high", "low")] == [20, 8, 8]


def test_an_earlier_state_here_is_replaced(whole, tmp_path):
    save(tmp_path / "states", vae=3)
    write_model(tmp_path / "model", "vae", content="of before")
    unpack(whole[2], tmp_path / "states", tmp_path / "model")
    assert latest_step(tmp_path / "states" / "vae") == 30
    assert (tmp_path / "model" / "vae" / "weights").read_text() == "vae here"
