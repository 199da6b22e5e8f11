"""Configurations alone: which model a folder is, what it fills in, and what is refused before a tensor is read."""

import inspect
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from published import PUBLISHED, edit, write_configs

from jaxwan.config import VARIANTS, ConfigError, ImageInput
from jaxwan.pipelines.checkpoint import find_checkpoint, read_checkpoint
from jaxwan.schedulers.config import SamplerDefaults

BY_NAME = {variant.name: variant for variant in VARIANTS}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """name -> a folder of configuration files at full size."""
    root = tmp_path_factory.mktemp("published")
    return {name: write_configs(root / str(i), name) for i, name in enumerate(PUBLISHED)}


@pytest.fixture
def t2v(written, tmp_path):
    """A copy of the two-expert text-to-video folder, to be spoilt."""
    return Path(shutil.copytree(written["Wan2.2-T2V-A14B"], tmp_path / "checkpoint"))


# What is read


def test_every_variant_has_its_published_configurations():
    assert PUBLISHED.keys() == BY_NAME.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_checkpoint_is_recognised_from_its_configurations_alone(written, name):
    checkpoint = read_checkpoint(written[name])
    assert checkpoint.variant is BY_NAME[name]
    assert checkpoint.defaults == BY_NAME[name].defaults
    assert checkpoint.num_experts == BY_NAME[name].experts
    assert checkpoint.transformer.dim == BY_NAME[name].dim
    assert checkpoint.experts == ("transformer", "transformer_2")[: checkpoint.num_experts]
    assert checkpoint.sampler == SamplerDefaults("unipc", 2, 5.0 if name == "Wan2.2-TI2V-5B" else 3.0)


@pytest.mark.parametrize(
    ("name", "size", "guidance", "boundary", "image"),
    [
        ("Wan2.2-T2V-A14B", (720, 1280, 81, 16, 40), (4.0, 3.0), 0.875, ImageInput.NONE),
        ("Wan2.2-I2V-A14B", (720, 1280, 81, 16, 40), (3.5, 3.5), 0.9, ImageInput.CHANNELS),
        ("Wan2.2-TI2V-5B", (704, 1280, 121, 24, 50), (5.0, None), None, ImageInput.FIRST_FRAME),
        ("Wan2.1-T2V-1.3B", (480, 832, 81, 16, 50), (5.0, None), None, ImageInput.NONE),
        ("Wan2.1-T2V-14B", (720, 1280, 81, 16, 50), (5.0, None), None, ImageInput.NONE),
        ("Wan2.1-I2V-14B", (480, 832, 81, 16, 50), (5.0, None), None, ImageInput.CHANNELS_AND_CLIP),
        ("Wan2.1-FLF2V-14B", (720, 1280, 81, 16, 50), (5.5, None), None, ImageInput.CHANNELS_AND_CLIP),
    ],
)
def test_the_defaults_are_those_of_the_model_card(written, name, size, guidance, boundary, image):
    checkpoint = read_checkpoint(written[name])
    d = checkpoint.defaults
    assert (d.height, d.width, d.num_frames, d.fps, d.num_inference_steps) == size
    assert (d.guidance_scale, d.guidance_scale_2) == guidance
    assert (checkpoint.boundary_ratio, checkpoint.image_input) == (boundary, image)
    # a last frame: A14B by its mask channels, Wan2.1 only with position embeddings for two images
    assert checkpoint.variant.last_image == (name in ("Wan2.2-I2V-A14B", "Wan2.1-FLF2V-14B"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_unknown_size_takes_the_row_of_the_same_structure(tmp_path, name):
    checkpoint = read_checkpoint(write_configs(tmp_path, name, tiny=True))
    # of Wan2.1's two text-to-video sizes the nearest in width
    assert checkpoint.variant.name == ("Wan2.1-T2V-1.3B" if name == "Wan2.1-T2V-14B" else name)
    assert checkpoint.transformer.dim == 40


def test_keys_that_wan_2_1_lacks_take_the_defaults_of_diffusers(written):
    checkpoint = read_checkpoint(written["Wan2.1-T2V-1.3B"])
    vae, dit = checkpoint.vae, checkpoint.transformer
    assert (vae.is_residual, vae.patch_size, vae.decoder_base_dim) == (False, None, None)
    assert (vae.in_channels, vae.out_channels, vae.scale_factor_temporal, vae.scale_factor_spatial) == (3, 3, 4, 8)
    assert (dit.pos_embed_seq_len, checkpoint.boundary_ratio, checkpoint.num_experts) == (None, None, 1)


def test_no_name_of_a_folder_is_looked_at(written, tmp_path):
    misleading = shutil.copytree(written["Wan2.2-TI2V-5B"], tmp_path / "Wan2.1-I2V-14B-480P-Diffusers")
    assert read_checkpoint(Path(misleading)).variant.name == "Wan2.2-TI2V-5B"


def test_strides_follow_the_vae_and_the_patch(written):
    assert read_checkpoint(written["Wan2.2-T2V-A14B"]).geometry.stride == 16
    geometry = read_checkpoint(written["Wan2.2-TI2V-5B"]).geometry
    assert (geometry.stride, geometry.z_dim) == (32, 48)


def test_a_generation_config_overrides_the_table(t2v):
    given = {"height": 64, "width": 96, "fps": 8, "guidance_scale": 2, "sampler": "euler", "flow_shift": 7.5}
    (t2v / "generation_config.json").write_text(json.dumps({"_note": "x", "num_frames": None, **given}))
    d = read_checkpoint(t2v).defaults
    assert {key: getattr(d, key) for key in given} == given
    assert (d.num_frames, d.num_inference_steps, d.guidance_scale_2) == (81, 40, 3.0)  # the table's


def test_clip_may_be_described_inside_a_whole_clip(written, tmp_path):
    folder = Path(shutil.copytree(written["Wan2.1-I2V-14B"], tmp_path / "checkpoint"))
    path = folder / "image_encoder/config.json"
    path.write_text(json.dumps({"vision_config": json.loads(path.read_text())}))
    assert read_checkpoint(folder).image_encoder == read_checkpoint(written["Wan2.1-I2V-14B"]).image_encoder


# What is refused


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "pipeline 'FluxPipeline' is none of WanPipeline, "),
        ("model_index.json", {"_class_name": ...}, "pipeline None is none of WanPipeline, "),
        ("model_index.json", {"transformer": [None, None]}, "names no transformer"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, "vae is a AutoencoderKL, only AutoencoderKLWan"),
        ("model_index.json", {"vae": "AutoencoderKL"}, "vae is a AutoencoderKL, only AutoencoderKLWan"),
        ("model_index.json", {"boundary_ratio": "0.9"}, "boundary_ratio='0.9' must be a number from 0 to 1"),
        ("model_index.json", {"boundary_ratio": 875}, "boundary_ratio=875 must be a number from 0 to 1"),
        ("transformer/config.json", {"qk_norm": "rms_norm"}, "qk_norm='rms_norm' is not implemented"),
        ("transformer/config.json", {"num_layers": 39}, "the two experts differ"),
        ("transformer_2/config.json", {"ffn_dim": 64}, "the two experts differ"),
        ("vae/config.json", {"attn_scales": [1.0]}, "attn_scales=.* is not implemented"),
        ("vae/config.json", {"z_dim": 48}, "transformer channels 16 -> 16, expected 48 -> 48"),
        ("text_encoder/config.json", {"d_model": 512}, "text_dim=4096 for a text encoder of width 512"),
        ("text_encoder/config.json", {"feed_forward_proj": "relu"}, "feed_forward_proj='relu' is not implemented"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "'DDIMScheduler' is not one of UniPC"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas=True, only False"),
        ("scheduler/scheduler_config.json", {"_class_name": ["x"]}, "_class_name=.'x'. is not one of UniPC"),
        ("transformer/config.json", {"num_layers": "5"}, "transformer/config.json: .*num_layers='5' is no int"),
        ("transformer/config.json", {"num_layers": True, "eps": "x"}, "eps='x' is no float, num_layers=True is no int"),
        ("transformer/config.json", {"patch_size": 2}, "patch_size=2 is no tuple"),
        ("vae/config.json", {"temperal_downsample": None}, "temperal_downsample=None is no tuple"),
        ("vae/config.json", {"latents_mean": [0.0, "a"]}, "latents_mean=.0.0, 'a'. is no tuple"),
        ("text_encoder/config.json", {"d_model": 4096.5}, "d_model=4096.5 is no int"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(t2v, file, values, message):
    edit(t2v / file, **values)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(t2v)


@pytest.mark.parametrize(
    ("name", "file", "values", "message"),
    [
        ("Wan2.1-I2V-14B", "model_index.json", {"image_encoder": ...}, "names no image_encoder"),
        ("Wan2.1-I2V-14B", "image_encoder/config.json", {"hidden_size": 64}, "image_dim=1280 for an image encoder of"),
        ("Wan2.2-I2V-A14B", "transformer/config.json", {"in_channels": 33}, "the two experts differ"),
        ("Wan2.2-TI2V-5B", "transformer/config.json", {"in_channels": 100}, "channels 100 -> 48, expected 48 -> 48"),
        ("Wan2.1-T2V-14B", "transformer/config.json", {"in_channels": 32}, "channels 32 -> 16, expected 36 -> 16"),
        ("Wan2.1-T2V-14B", "transformer/config.json", {"pos_embed_seq_len": 514}, "no Wan model takes its image as"),
        ("Wan2.1-FLF2V-14B", "transformer/config.json", {"pos_embed_seq_len": 257}, "257 for two images of 257 rows"),
        ("Wan2.1-I2V-14B", "image_encoder/config.json", {"image_size": "224"}, "image_encoder/config.json: .*'224'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(written, tmp_path, name, file, values, message):
    folder = Path(shutil.copytree(written[name], tmp_path / "checkpoint"))
    edit(folder / file, **values)
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 4}, "unknown steps; known are boundary_ratio, example_prompt, flow_shift, fps"),
        ({"vocabulary": "red"}, "vocabulary='red' must be a list"),
        ({"vocabulary": ["red", 3]}, "vocabulary=3 must be a text"),
        ({"timesteps": 4}, "timesteps=4 must be a list"),
        ({"height": "720"}, "generation_config.json: height='720' must be a whole number"),
        ({"num_inference_steps": 4.5}, "num_inference_steps=4.5 must be a whole number"),
        ({"guidance_scale": True}, "guidance_scale=True must be a number"),
        ({"sampler": 3}, "sampler=3 must be a text"),
        ([], "generation_config.json holds a list, not an object"),
    ],
)
def test_a_generation_config_with_other_keys_or_kinds_is_refused(t2v, given, message):
    (t2v / "generation_config.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(t2v)


@pytest.mark.parametrize(
    "file",
    ["model_index.json", "transformer/config.json", "transformer_2/config.json", "vae/config.json",
     "text_encoder/config.json", "scheduler/scheduler_config.json"],
)  # fmt: skip
@pytest.mark.parametrize("broken", [None, b"{", b"[1]", b"\xff\xfe"])
def test_a_missing_or_broken_configuration_is_named(t2v, file, broken):
    (t2v / file).unlink() if broken is None else (t2v / file).write_bytes(broken)
    with pytest.raises((ConfigError, FileNotFoundError)) as caught:
        read_checkpoint(t2v)
    assert file in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError) == (broken is None)


def test_other_layouts_are_told_apart(tmp_path):
    for name in ("empty", "original", "older", "orbax"):
        (tmp_path / name).mkdir()
    (tmp_path / "original/high_noise_model").mkdir()
    (tmp_path / "older/Wan2.1_VAE.pth").touch()
    (tmp_path / "orbax/_CHECKPOINT_METADATA").touch()
    for name, message in {
        "empty": "is no Diffusers checkpoint: it has no model_index.json$",
        "original": "this is the original Wan layout, which is not read yet",
        "older": "this is the original Wan layout, which is not read yet",
        "orbax": "this is an Orbax folder, which is not read yet",
    }.items():
        with pytest.raises(FileNotFoundError, match=message):
            read_checkpoint(tmp_path / name)


# Folders and hub ids


@pytest.mark.parametrize(
    "text", ["nothing", "./no/folder", "/no/such", "~/no/such/folder", "a/b/c", "models/", "./models"]
)
def test_a_path_without_a_folder_is_refused_without_asking_the_hub(monkeypatch, text):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_checkpoint(text)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(NotADirectoryError, match="is a file; a checkpoint is a folder"):
        find_checkpoint(tmp_path / "model.safetensors")


def test_a_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    assert find_checkpoint("owner/name") == Path("owner/name")


@pytest.mark.parametrize("json_only", [True, False])
def test_of_a_hub_id_only_what_is_needed_is_fetched(written, monkeypatch, json_only):
    def fetch(repo, *, allow_patterns):
        asked.update(repo=repo, patterns=allow_patterns)
        return str(written["Wan2.1-T2V-14B"])

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert read_checkpoint(find_checkpoint("Wan-AI/X", json_only=json_only)).variant.name == "Wan2.1-T2V-14B"
    assert asked["repo"] == "Wan-AI/X" and "*.json" in asked["patterns"]
    assert ("*.safetensors" in asked["patterns"]) != json_only


@pytest.mark.parametrize(
    "error",
    [LocalEntryNotFoundError("cannot find it on disk"), HFValidationError("a bad name"), ConnectionError("no network")],
)
def test_what_the_hub_does_not_give_is_said_in_one_sentence(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="owner/name is no local folder, and the hub did not give it: ") as caught:
        find_checkpoint("owner/name")
    assert "\n" not in str(caught.value)


def test_what_is_no_name_of_a_model_is_refused():
    for model, words in (("", "model is an empty text"), (3, "model=3 is no folder or hub id")):
        with pytest.raises(ValueError, match=words):
            inspect.unwrap(find_checkpoint)(model)  # without the type checks of the tests
