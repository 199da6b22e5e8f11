"""The mesh that chooses itself: what holds for all plans, seconds by hand, and what is said."""

import itertools
import math
from functools import cache
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published import write_configs

from jaxwan.flops import text_encoder_flops, vae_decode_flops
from jaxwan.models.tiles import Tiling
from jaxwan.pipelines.call import make_job
from jaxwan.pipelines.checkpoint import read_checkpoint
from jaxwan.pipelines.chips import CHIPS, LINKS
from jaxwan.pipelines.dry_run import dry_run, make_report
from jaxwan.pipelines.load import check_mesh, check_use
from jaxwan.pipelines.pipeline import WanPipeline
from jaxwan.pipelines.plan import plan_mesh, possible_meshes
from jaxwan.sharding.mesh import MeshSpec

GB, TERA = 10**9, 1e12
A14B, SMALL = "Wan2.2-T2V-A14B", "Wan2.1-T2V-1.3B"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """name -> checkpoint of full-size configurations."""
    return cache(lambda name: read_checkpoint(write_configs(tmp_path_factory.mktemp("published"), name)))


@pytest.fixture(scope="module", autouse=True)
def all_memory():
    """JAX takes all of a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_CLIENT_MEM_FRACTION", "1.0")
        yield


# What holds for all plans

MACHINES = st.fixed_dictionaries({
    "devices": st.integers(1, 4), "device_memory": st.integers(8, 60).map(lambda n: n * GB),
    "requests": st.integers(1, 3), "goal": st.sampled_from(["latency", "throughput"]),
    "chip": st.sampled_from([None, *CHIPS]), "devices_per_host": st.sampled_from([1, 2, 4]),
    "guidance_scale": st.sampled_from([1.0, 5.0]), "vae_dtype": st.sampled_from(["float32", "bfloat16"]),
})  # fmt: skip
SOME = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def seconds_of(checkpoint, machine):
    """The plan, and its seconds: infinitely many where nothing fits."""
    try:
        plan = plan_mesh(checkpoint, **machine)
    except ValueError as refused:
        assert "too much" in str(refused)
        return None, math.inf
    return plan, plan.seconds


@given(machine=MACHINES)
@SOME
def test_what_is_chosen_fits_and_can_be(published, machine):
    checkpoint = published(SMALL)
    plan, _ = seconds_of(checkpoint, machine)
    call = {"guidance_scale": machine["guidance_scale"], "num_videos_per_prompt": machine["requests"]}
    job, account = (
        make_job(checkpoint, prompt="a", seed=0, **call),
        dict(dtype="bfloat16", vae_dtype=machine["vae_dtype"]),
    )
    if plan is None:
        for mesh in itertools.islice(possible_meshes(checkpoint, job, machine["devices"]), 5):
            report = make_report(checkpoint, mesh, job, device_memory=10**12, **account)
            assert max(report.needed_bytes) > machine["device_memory"]
        return
    check_mesh(plan.mesh, checkpoint)
    check_use(plan.mesh, checkpoint, job)
    assert plan.fits and plan.mesh.num_devices <= machine["devices"]
    report = make_report(checkpoint, plan.mesh, job, device_memory=machine["device_memory"], **account)
    assert report.fits and plan.bytes == max(report.needed_bytes) <= machine["device_memory"]


@given(machine=MACHINES, more=st.integers(1, 100))
@SOME
def test_more_memory_is_never_slower(published, machine, more):
    larger = machine | {"device_memory": machine["device_memory"] + more * GB}
    assert seconds_of(published(SMALL), larger)[1] <= seconds_of(published(SMALL), machine)[1]


@given(machine=MACHINES, more=st.integers(1, 3))
@SOME
def test_more_devices_are_never_slower(published, machine, more):
    larger = machine | {"devices": min(4, machine["devices"] + more)}
    assert seconds_of(published(SMALL), larger)[1] <= seconds_of(published(SMALL), machine)[1]


def test_all_meshes_are_looked_at(published):
    checkpoint = published(SMALL)
    meshes = list(possible_meshes(checkpoint, make_job(checkpoint, prompt="a", num_videos_per_prompt=2, seed=0), 8))
    assert len(set(meshes)) == len(meshes)
    for mesh in (MeshSpec(), MeshSpec(dp=2, cfg=2, pp=2), MeshSpec(sp=8), MeshSpec(sp=8, ulysses=1), MeshSpec(pp=5)):
        assert mesh in meshes
    assert MeshSpec(sp=8, ulysses=4) not in meshes  # which is sp=8, of 12 heads
    assert not any(mesh.dp > 2 or mesh.tp in (5, 7, 8) for mesh in meshes)
    assert {m.pp for m in possible_meshes(checkpoint, make_job(checkpoint, prompt="a", seed=0), 20)} == {
        *(1, 2, 3, 4, 5, 6, 8, 10, 15),  # others leave stages without layers
    }


# Seconds, by hand

HIDDEN = 75_600 * 5120 * 2  # bytes
RATE, NVLINK = 989 * TERA * CHIPS["H100"].dit, 450 * GB * LINKS["NVLink"].reached


def phases(checkpoint, mesh, devices, **machine):
    """Seconds that a plan has for some mesh."""
    plan = plan_mesh(checkpoint, devices=devices, **{"chip": "H100", "device_memory": "1TB"} | machine)
    (row,) = (row for row in plan.rows if str(row.mesh) == mesh and row.mesh.ulysses is None)
    assert row.seconds == pytest.approx(sum(row.phases))
    return row.phases


def test_one_device_does_all_forwards_and_the_vae(published):
    told, checkpoint = phases(published(A14B), "pp=1", 1), published(A14B)
    assert told.denoise == pytest.approx(80 * 6523.4 * TERA / RATE, rel=1e-4)
    vae = vae_decode_flops(checkpoint.vae, (21, 90, 160))
    assert told.decode == pytest.approx(vae / (989 * TERA * CHIPS["H100"].vae / 2), rel=1e-6)  # in float32
    assert told.encode == pytest.approx(2 * text_encoder_flops(checkpoint.text_encoder) / RATE, rel=1e-6)


def test_axes_share_the_work_and_send(published):
    checkpoint = published(A14B)
    whole = 80 * 6523.4 * TERA / RATE
    velocities = 2 * 4 * 21 * 90 * 160 * 16
    told = phases(checkpoint, "cfg=2", 2)
    assert told.denoise == pytest.approx(whole / 2 + 40 * (velocities / NVLINK + 20e-6), rel=1e-4)
    trades = 4 * 40 * (HIDDEN / 2 / 2 / NVLINK + 20e-6)
    assert phases(checkpoint, "sp=2", 2).denoise == pytest.approx(whole / 2 + 80 * trades, rel=1e-3)
    passing = HIDDEN / NVLINK + 20e-6
    assert phases(checkpoint, "pp=2", 2).denoise == pytest.approx(120 * (whole / 80 / 2 + passing), rel=1e-3)
    sums = 40 * (3 * HIDDEN / NVLINK + 7 * 20e-6)  # of two devices each sends what it sums once
    assert phases(checkpoint, "tp=2", 2).denoise == pytest.approx(whole / 2 + 80 * sums, rel=2e-3)
    assert phases(checkpoint, "cfg=2", 2).decode == phases(checkpoint, "pp=1", 1).decode / 2  # of 160 columns


def test_hosts_send_over_what_is_between_them(published):
    checkpoint = published(A14B)
    near, far = (phases(checkpoint, "pp=2", 2, devices_per_host=n) for n in (2, 1))
    slower = 120 * (HIDDEN / (12.5 * GB * 0.7) + 100e-6 - HIDDEN / NVLINK - 20e-6)
    assert far.denoise - near.denoise == pytest.approx(slower)
    assert far.denoise > phases(checkpoint, "pp=2", 2, devices_per_host=1, between="InfiniBand").denoise


def test_a_full_ring_makes_videos_at_the_pace_of_its_work(published):
    """Four guided videos in four stages: a period of 8 ticks makes a step of each."""
    checkpoint = published(A14B)
    given = dict(requests=4, device_memory="60GB")
    call, steady = (phases(checkpoint, "pp=4", 4, goal=goal, **given) for goal in ("latency", "throughput"))
    assert call.denoise / 4 / steady.denoise == pytest.approx((8 * 40 + 3) / (8 * 40))
    assert steady.decode == call.decode / 4


def test_a_vae_of_its_own_works_beside_the_ring(published):
    checkpoint = published(SMALL)
    given = dict(devices=4, chip="H100", requests=4, vae_devices=1)
    beside = plan_mesh(checkpoint, goal="throughput", **given)
    assert beside.mesh.num_devices <= 3
    parts = beside.rows[0].phases
    assert beside.seconds == max(parts.denoise, parts.encode + parts.decode) < sum(parts)
    after = plan_mesh(checkpoint, **given)
    assert after.seconds == sum(after.rows[0].phases)


def test_tiles_are_dealt_to_devices(published):
    checkpoint, size = published(A14B), dict(height=720, width=1280, tiling=Tiling())
    one, eight = (phases(checkpoint, mesh, n, **size) for mesh, n in (("pp=1", 1), ("cfg=2,sp=4", 8)))
    assert one.decode == 28 / 4 * eight.decode  # 4 x 7 tiles
    assert one.decode > phases(checkpoint, "pp=1", 1).decode


def test_images_of_image_models_are_encoded(published):
    text, image = (phases(published(name), "pp=1", 1, height=720, width=1280) for name in (A14B, "Wan2.2-I2V-A14B"))
    assert image.encode > text.encode + image.decode / 2  # 382 TFLOP beside 633


# What is said


def test_the_choice_is_explained(published):
    plan = plan_mesh(published(A14B), devices=8, chip="RTX 4090", height=480, width=832)
    table, why = str(plan).split("\n\n")
    chosen = table.splitlines()[1]
    assert chosen.startswith(f"{plan.mesh} ") and chosen.endswith("  chosen") and f"{plan.seconds:.3g}" in chosen
    first, *lines = why.splitlines()
    assert first.startswith(f"{plan.mesh}, the best of 67 meshes of up to 8 devices for latency: about ")
    assert "of 22.35 GiB a device" in first and str(plan).endswith(plan.why)
    (rejected,) = (row for row in plan.rows if str(row.mesh) == "cfg=2,sp=4")
    excess = f"{(rejected.bytes - 24 * GB) / 2**30:.2f} GiB too much"
    share = round(100 * rejected.seconds / plan.seconds)
    assert f"cfg=2,sp=4 would take {share} % of the time and does not fit: {excess}" in lines
    second = plan.rows[1]
    slower = 100 * (second.seconds / plan.seconds - 1)
    assert any(line.startswith(f"{second.mesh} is {slower:.1f} % slower, with ") for line in lines)
    assert lines[-1] == "seconds are estimates until measured: RTX 4090 at 107 TFLOP/s, PCIe 4 at 16 GB/s"
    assert not plan.relative


def test_of_an_unknown_chip_and_of_virtual_devices_times_are_relative(published):
    unknown = plan_mesh(published(SMALL), devices=2, device_memory="48GB")
    assert unknown.relative and "chip is not known, times are relative: counted as H100 at" in unknown.why
    assert " s for " not in unknown.why
    assert str(unknown).splitlines()[1].split()[-2:] == ["1", "chosen"]
    here = plan_mesh(published(SMALL))
    assert here.relative and here.mesh == MeshSpec() and "virtual CPU devices share one machine's cores" in here.why


def test_where_nothing_fits_it_says_by_how_much_and_how_many_devices_would_do(published):
    with pytest.raises(ValueError, match="^none of 1 mesh of up to 1 device fits: pp=1 needs least, ") as refused:
        plan_mesh(published(A14B), devices=1, chip="H100")
    report = dry_run(published(A14B), device_memory="80GB")
    excess = (max(report.needed_bytes) - 80 * GB) / 2**30
    assert f"of 74.51 GiB a device, {excess:.2f} GiB too much; 2 such devices would do, " in str(refused.value)
    assert plan_mesh(published(A14B), devices=2, chip="H100").fits
    with pytest.raises(ValueError, match=r"too much$"):  # for every usual number
        plan_mesh(published(SMALL), devices=1, device_memory="1MB", height=16, width=16, num_frames=1)


def test_the_dry_run_reports_the_mesh_that_was_chosen(published):
    machine = dict(devices=4, chip="H100", devices_per_host=2)
    plan, report = plan_mesh(published(A14B), **machine), dry_run(published(A14B), mesh="auto", **machine)
    assert report.mesh == str(plan.mesh) and max(report.needed_bytes) == plan.bytes and report.fits
    assert str(report).startswith(f"{plan}\n\n") and report.plan == str(plan)
    assert (report.device_memory, report.dtype) == (80 * GB, "bfloat16")
    report = dry_run(published(A14B), mesh="auto", devices=1, device_memory="80GB")
    assert report.fits is False and report.would_fit and report.plan.startswith("mesh")


def test_a_pipeline_goes_onto_the_mesh_for_the_devices_that_are_there(folder, monkeypatch, caplog):
    """Which are said to be cards whose memory two of them need."""
    path, taken = folder("t2v-A14B"), []
    needed = max(dry_run(path, dtype="bfloat16", height=32, width=48, num_frames=5).needed_bytes)
    memory = [needed - 1]
    for name, told in (
        ("default_dtype", "bfloat16"),
        ("find_devices", [SimpleNamespace(device_kind="NVIDIA H200")] * 4),
    ):
        monkeypatch.setattr(f"jaxwan.pipelines.plan.{name}", lambda *_, told=told: told)
    monkeypatch.setattr("jaxwan.pipelines.plan.present_memory", lambda _: memory[0])

    def load(checkpoint, mesh, *rest, **more):
        taken.append(mesh)
        raise InterruptedError

    monkeypatch.setattr("jaxwan.pipelines.pipeline.load_parts", load)
    with caplog.at_level("INFO"), pytest.raises(InterruptedError):
        WanPipeline.from_pretrained(path, mesh="auto", warmup=dict(height=32, width=48, num_frames=5))
    assert taken[0].num_devices > 1
    (line,) = (m for m in caplog.messages if m.startswith("mesh auto"))
    assert line.startswith(f"mesh auto: {taken[0]}") and "of up to 4 devices for latency: about " in line
    memory[0] = 1000
    with pytest.raises(ValueError, match="^none of .* of up to 4 devices fits: "):
        WanPipeline.from_pretrained(path, mesh="auto", warmup=dict(height=32, width=48, num_frames=5))
    assert len(taken) == 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"goal": "speed"}, "goal='speed' is not one of latency, throughput"),
        ({"chip": "H900", "devices": 1}, "chip 'H900' is not known"),
        ({"between": "rope"}, "link 'rope' is not known"),
        ({"device_memory": "80GB"}, "needs to know how many devices it has: devices=8"),
        ({"devices": 2, "vae_devices": 2}, "vae_devices=2 of 2 devices leave none for a mesh: the most is 1"),
        ({"num_videos_per_prompt": 2}, "num_videos_per_prompt is called requests here"),
        ({"height": 33}, "height"),
        ({"requests": 0}, "requests"),
    ],
)
def test_what_makes_no_plan_is_refused(folder, given, told):
    with pytest.raises(ValueError, match=told):
        plan_mesh(folder("t2v-A14B"), **given)
