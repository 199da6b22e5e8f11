"""The picture of the ring: what is in its cells, its files, and what it refuses."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxwan.commands.draw_ring import Schedule, Traced, draw, main
from jaxwan.pipelines.call import make_job
from jaxwan.pipelines.checkpoint import BUNDLED_MODEL, read_checkpoint
from jaxwan.pipelines.dry_run import make_report
from jaxwan.sharding.mesh import MeshSpec

DOCS = Path(__file__).parents[2] / "docs"


def cells(schedule):
    """Row by row, words such as "0:c1": video 0, prompt, step 1."""
    return {
        place: ["." if at is None else f"{at[0]}:{'cu'[at[1].branch]}{at[1].step}" for at in row]
        for place, row in schedule.rows.items()
    }


def test_a_ring_of_two_stages_is_the_one_in_the_docs():
    assert cells(Schedule(MeshSpec(pp=2), videos=1, steps=3)) == {
        (0, 0, 0): ["0:c0", "0:u0", ".", "0:c1", "0:u1", ".", "0:c2", "0:u2", "."],
        (0, 0, 1): [".", "0:c0", "0:u0", ".", "0:c1", "0:u1", ".", "0:c2", "0:u2"],
    }


def test_ranks_of_dp_have_videos_of_their_own_and_ranks_of_cfg_a_branch():
    assert cells(Schedule(MeshSpec(dp=2, cfg=2), videos=3, steps=2)) == {
        (0, 0, 0): ["0:c0", "2:c0", "0:c1", "2:c1"],
        (0, 1, 0): ["0:u0", "2:u0", "0:u1", "2:u1"],
        (1, 0, 0): ["1:c0", ".", "1:c1", "."],
        (1, 1, 0): ["1:u0", ".", "1:u1", "."],
    }


def test_devices_without_work_are_drawn_as_idle():
    idle = cells(Schedule(MeshSpec(dp=2, cfg=2), videos=1, steps=2, guided=False))
    assert idle.pop((0, 0, 0)) == ["0:c0", "0:c1"]
    assert list(idle.values()) == [[".", "."]] * 3


@pytest.mark.parametrize(
    ("mesh", "videos", "guided"),
    [("pp=4", 1, True), ("pp=4", 4, True), ("pp=3", 2, False), ("dp=2,cfg=2,pp=2", 3, True), ("dp=2,pp=3", 5, True)],
)
def test_the_share_of_cells_at_work_is_the_dry_runs(mesh, videos, guided):
    mesh, steps = MeshSpec.parse(mesh), 5
    job = make_job(
        read_checkpoint(BUNDLED_MODEL), prompt="a", seed=0, num_inference_steps=steps, num_videos_per_prompt=videos,
        guidance_scale=3 if guided else 1,
    )  # fmt: skip
    told = make_report(read_checkpoint(BUNDLED_MODEL), mesh, job, device_memory=10**12)
    schedule = Schedule(mesh, videos, steps, guided)
    assert (schedule.ticks, schedule.dealt.period) == (told.ticks, told.period)
    assert schedule.utilisation == pytest.approx(told.utilisation)


def test_every_cell_at_work_is_labelled_in_the_svg_and_lies_within_it():
    schedule = Schedule(MeshSpec(dp=2, pp=3), videos=9, steps=3)
    root = ElementTree.fromstring(draw(schedule).svg())
    width, height = (float(root.get(name)) for name in ("width", "height"))
    shapes = {kind: [e for e in root if e.tag.endswith(kind)] for kind in ("rect", "text")}
    words = [cell for row in cells(schedule).values() for cell in row]
    labels = [e.text for e in shapes["text"] if e.get("text-anchor") == "middle" and not e.text.isdecimal()]
    assert labels == [word.split(":")[1] for word in words if word != "."]
    assert len(shapes["rect"]) == 1 + len(words) + schedule.videos  # the ground, cells, and the legend
    for e in shapes["rect"]:
        assert float(e.get("x", 0)) + float(e.get("width")) <= width
        assert float(e.get("y", 0)) + float(e.get("height")) <= height
    fills = {word: e.get("fill") for word, e in zip(words, shapes["rect"][1:], strict=False)}
    assert len(set(fills.values())) == 1 + 2 * schedule.videos  # idle, and two shades a video


def test_a_png_has_the_same_colours_where_the_svg_has_them(tmp_path):
    picture = draw(Schedule(MeshSpec(pp=2), videos=2, steps=2))
    picture.png(tmp_path / "ring.png")
    pixels = np.asarray(Image.open(tmp_path / "ring.png"))
    boxes = [shape for shape in picture.shapes if hasattr(shape, "fill") and hasattr(shape, "height")]
    for box in boxes:
        x, y = 2 * box.x + 3, 2 * box.y + 3
        assert "#" + bytes(pixels[int(y), int(x)]).hex() == box.fill
    assert pixels.shape[:2] == (round(2 * picture.height), round(2 * picture.width)) and (pixels[0] == 255).all()


@pytest.mark.parametrize("videos", [1, 4])
def test_the_pictures_in_the_docs_are_what_is_drawn_now(tmp_path, capsys, videos):
    """Else: python scripts/draw_ring.py --videos N -o docs/ring-N.svg --overwrite"""
    assert main(["--videos", str(videos), "-o", str(tmp_path / "new" / "ring.svg")]) == 0
    drawn = (tmp_path / "new" / "ring.svg").read_text()
    assert drawn == (DOCS / f"ring-{videos}.svg").read_text()
    share, ticks = {1: ("40%", 20), 4: ("91%", 35)}[videos]
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'ring.svg'}  {ticks} ticks, at work {share} of the time\n"


def test_a_trace_is_drawn_as_it_entered_a_stage_later_each_tick(tmp_path):
    ring = [[0, [[3, 0, 0, 0], None]], [1, [[3, 0, 1, 0], [4, 1, 0, 0]]], [2, [None, None]]]
    (tmp_path / "trace.json").write_text(json.dumps([ring]))
    traced = Traced.read(MeshSpec(dp=2, pp=2), tmp_path / "trace.json")
    assert cells(traced) == {
        (0, 0, 0): ["0:c0", "0:u0", "."], (0, 0, 1): [".", "0:c0", "0:u0"],
        (1, 0, 0): [".", "1:c0", "."], (1, 0, 1): [".", ".", "1:c0"],
    }  # fmt: skip
    assert traced.names == ["call 3", "call 4.1"] and traced.utilisation == pytest.approx(6 / 12)
    assert "2 calls as they came" in draw(traced).svg()


def test_the_picture_of_an_engine_in_the_docs_is_its_trace(tmp_path):
    """Else: python scripts/draw_ring.py --mesh pp=4 --trace docs/engine_trace.json -o docs/engine.svg --overwrite"""
    told = ["--mesh", "pp=4", "--trace", str(DOCS / "engine_trace.json"), "-o", str(tmp_path / "engine.svg")]
    assert main(told) == 0
    assert (tmp_path / "engine.svg").read_text() == (DOCS / "engine.svg").read_text()
    traced = Traced.read(MeshSpec(pp=4), DOCS / "engine_trace.json")
    entered = [at for (at,) in traced.entered if at is not None]
    steps = {call: [at[3] for at in entered if at[0] == call and at[2] == 0] for call, _ in traced.videos}
    assert len(set(entered)) == len(entered) and all(own == list(range(len(own))) for own in steps.values())


@pytest.mark.parametrize(
    ("flags", "status", "told"),
    [
        ("--mesh pp4", 1, 'did you mean "pp=4"?'),
        ("--mesh cfg=3", 1, "cfg=3 is for the two branches of guidance, use cfg=2"),
        ("--videos 0", 1, "--videos 0 must be at least 1"),
        ("--steps 0", 1, "--steps 0 must be at least 1"),
        ("--steps 60", 1, "300 ticks are too many for a picture, which shows 240: --steps 48 would fit"),
        ("--videos 200", 1, "choose fewer videos or stages"),
        ("-o ring.pdf", 1, "output ring.pdf must end in .svg or .png"),
        ("-o taken.svg", 1, "output taken.svg exists: choose another name, or say --overwrite"),
        ("--trace taken.svg", 1, "taken.svg is no trace of an engine"),
        ("--trace none.json", 1, "none.json"),
        ("--video 2", 2, "there is no flag --video: did you mean --videos?"),
        ("--steps few", 2, "invalid int value: 'few'"),
    ],
)
def test_bad_input_is_one_sentence_and_no_file(tmp_path, monkeypatch, capsys, flags, status, told):
    monkeypatch.chdir(tmp_path)
    Path("taken.svg").write_text("mine")
    try:
        ended = main(flags.split())
    except SystemExit as stop:
        ended = stop.code
    error = capsys.readouterr().err
    assert ended == status and error.startswith("error: ") and told in error and error.count("\n") == 1
    assert [path.name for path in Path.cwd().iterdir()] == ["taken.svg"] and Path("taken.svg").read_text() == "mine"
    assert main(["-o", "taken.svg", "--overwrite"]) == 0 and Path("taken.svg").read_text().startswith("<svg")
