"""Configurations alone: which model a folder is, what it fills in, and what is refused before a tensor is read."""

import inspect
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from published import PUBLISHED, edit, write_configs

from jaxwan.config import VARIANTS, ConfigError, ImageInput
from jaxwan.pipelines.checkpoint import ensure_weights, find_checkpoint, open_checkpoint, read_checkpoint
from jaxwan.pipelines.components import check_components
from jaxwan.pipelines.prompt import load_tokenizer
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


@pytest.mark.parametrize(
    ("name", "file", "keys"),
    [
        ("Wan2.2-T2V-A14B", "vae/config.json", ["temperal_downsample", "dim_mult", "is_residual", "attn_scales"]),
        ("Wan2.1-T2V-14B", "transformer/config.json", ["eps", "freq_dim", "rope_max_seq_len", "qk_norm", "image_dim"]),
        ("Wan2.2-T2V-A14B", "text_encoder/config.json", ["layer_norm_epsilon", "relative_attention_num_buckets"]),
        (
            "Wan2.2-T2V-A14B", "scheduler/scheduler_config.json",
            ["use_karras_sigmas", "thresholding", "shift_terminal", "solver_order", "disable_corrector"],
        ),
    ],
)  # fmt: skip
def test_null_means_the_default(written, tmp_path, name, file, keys):
    folder = Path(shutil.copytree(written[name], tmp_path / "checkpoint"))
    edit(folder / file, **dict.fromkeys(keys, ...))
    without = read_checkpoint(folder)
    edit(folder / file, **dict.fromkeys(keys))
    assert read_checkpoint(folder) == without


def test_null_is_what_diffusers_makes_of_it_where_that_is_no_default(written, tmp_path):
    folder = Path(shutil.copytree(written["Wan2.1-T2V-14B"], tmp_path / "checkpoint"))
    edit(folder / "transformer/config.json", out_channels=None, cross_attn_norm=None)
    assert (cfg := read_checkpoint(folder).transformer).out_channels == cfg.in_channels == 16
    assert not cfg.cross_attn_norm
    edit(folder / "scheduler/scheduler_config.json", flow_shift=None, shift=7.0)
    assert read_checkpoint(folder).sampler.shift == 7.0
    edit(folder / "scheduler/scheduler_config.json", lower_order_final=None)  # to Diffusers null is false
    with pytest.raises(ValueError, match="lower_order_final=None, only True"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("absent", "boundary", "guidance"),
    [("transformer_2", 0.0, 4.0), ("transformer_2", None, None), ("transformer", 1.0, 3.0)],
)
def test_one_expert_alone_takes_all_steps(t2v, absent, boundary, guidance):
    edit(t2v / "model_index.json", **{absent: [None, None], "boundary_ratio": boundary})
    shutil.rmtree(t2v / absent)
    checkpoint = read_checkpoint(t2v)
    assert checkpoint.experts == tuple({"transformer", "transformer_2"} - {absent})
    assert checkpoint.components == ("vae", "text_encoder", *checkpoint.experts)
    if boundary is not None:  # without one nothing tells it from Wan2.1
        assert checkpoint.variant.name == "Wan2.2-T2V-A14B"
        assert (checkpoint.defaults.guidance_scale, checkpoint.defaults.guidance_scale_2) == (guidance, None)


@pytest.mark.parametrize("absent", ["text_encoder", "tokenizer"])
def test_a_checkpoint_may_do_without_a_text_encoder(t2v, absent):
    edit(t2v / "model_index.json", **{absent: [None, None]})
    shutil.rmtree(t2v / "text_encoder")
    checkpoint = read_checkpoint(t2v)
    assert checkpoint.text_encoder is None and "text_encoder" not in checkpoint.components


# What is refused


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "pipeline 'FluxPipeline' is none of WanPipeline, "),
        ("model_index.json", {"_class_name": ...}, "pipeline None is none of WanPipeline, "),
        ("model_index.json", {"transformer": None, "transformer_2": [None, None]}, "names no transformer$"),
        (
            "model_index.json",
            {"transformer": [None, None]},
            "names no transformer, which takes steps where boundary_ratio=0.875: 1.0 leaves them all to transformer_2",
        ),
        ("model_index.json", {"transformer": None, "boundary_ratio": None}, "boundary_ratio=None: 1.0 leaves them all"),
        ("model_index.json", {"transformer_2": None}, "boundary_ratio=0.875: 0.0 leaves them all to transformer$"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, "vae is a AutoencoderKL, only AutoencoderKLWan"),
        ("model_index.json", {"vae": "AutoencoderKL"}, "vae is a AutoencoderKL, only AutoencoderKLWan"),
        ("model_index.json", {"boundary_ratio": "0.9"}, "boundary_ratio='0.9' must be a number from 0 to 1"),
        ("model_index.json", {"boundary_ratio": 875}, "boundary_ratio=875 must be a number from 0 to 1"),
        ("transformer/config.json", {"qk_norm": "rms_norm"}, "qk_norm='rms_norm' is not implemented"),
        ("transformer/config.json", {"num_layers": 39}, r"the two experts differ in num_layers .39 and 40., which is"),
        (
            "transformer_2/config.json",
            {"ffn_dim": 64, "eps": 1e-5},
            r"differ in ffn_dim .13824 and 64., eps .1e-06 and",
        ),
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
        ("transformer/config.json", {"freq_dim": 33}, "freq_dim=33 is odd"),
        ("transformer/config.json", {"attention_head_dim": 21}, "attention_head_dim=21 is odd"),
        ("transformer/config.json", {"num_layers": 0}, "num_layers=0 must be 1 or more"),
        ("vae/config.json", {"quantization_config": {"quant_method": "torchao"}}, "quantised by torchao, which is not"),
        (
            "transformer_2/config.json",
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "transformer_2/config.json: the weights are quantised to 4 bits by bitsandbytes, which is not read",
        ),
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
        (
            "Wan2.1-I2V-14B",
            "image_encoder/config.json",
            {"num_attention_heads": 7},
            "1280 does not divide among num_att",
        ),
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


def test_a_pointer_of_git_lfs_is_no_configuration(tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ConfigError, match="tokenizer.json is a git-lfs pointer and not the file: .*git lfs pull"):
        load_tokenizer(tmp_path)


def test_other_layouts_are_told_apart(tmp_path):
    for name in ("empty", "orbax", "comfy", "whole/vae"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "orbax/_CHECKPOINT_METADATA").touch()
    (tmp_path / "comfy/wan2.1_t2v_1.3B_bf16.safetensors").touch()
    (tmp_path / "whole/model_index.json").touch()
    for name, message in {
        "empty": "is no Diffusers checkpoint: it has no model_index.json$",
        "orbax": "this is a folder of Orbax's alone",
        "comfy": "wan2.1_t2v_1.3B_bf16.safetensors and what lies beside it hold no DiT: name files as --component N",
        "whole/vae": "this is a part of one: give .*whole.$",
    }.items():
        with pytest.raises(FileNotFoundError, match=message):
            read_checkpoint(tmp_path / name)


# Folders and hub ids


@pytest.mark.parametrize(
    "text", ["nothing", "./no/folder", "/no/such", "~/no/such/folder", "a/b/c", "models/", "./models"]
)
def test_a_path_without_a_folder_is_refused_without_asking_the_hub(monkeypatch, text):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_checkpoint(text)


def test_a_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    assert find_checkpoint("owner/name") == Path("owner/name")


class Hub:
    """A repository, and the cache of those who ask for its files; `asked` are the names that were asked for."""

    def __init__(self, source: Path, cache: Path, monkeypatch):
        self.source, self.folder, self.asked, self.reason = source, cache / "0123", [], None
        self.folder.mkdir()
        for name in ("hf_hub_download", "snapshot_download", "list_repo_files"):
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))

    def hf_hub_download(self, repo, name, *, revision="main"):
        assert repo == "owner/name" and revision in ("main", self.folder.name)
        if not self._has(name):
            raise (EntryNotFoundError if self.reason is None else LocalEntryNotFoundError)(
                self.reason or "no such file"
            )
        return str(self.folder / name)

    def snapshot_download(self, repo, *, revision, allow_patterns):
        assert (repo, revision) == ("owner/name", self.folder.name) and not any("*" in p for p in allow_patterns)
        missing = [name for name in allow_patterns if (self.source / name).is_file() and not self._has(name)]
        if missing:
            raise LocalEntryNotFoundError(f"missing ({missing[0]}). {self.reason}")
        return str(self.folder)

    def list_repo_files(self, repo, *, revision):
        if self.reason is not None:
            raise OSError(self.reason)
        return [path.relative_to(self.source).as_posix() for path in self.source.rglob("*") if path.is_file()]

    def _has(self, name: str) -> bool:
        """Whether the cache has a file, once the network has given it."""
        target = self.folder / name
        if self.reason is None and (self.source / name).is_file() and not target.is_file():
            self.asked.append(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((self.source / name).read_bytes())
        return target.is_file()


@pytest.fixture
def hub(written, tmp_path, monkeypatch):
    """The hub, with a repository of files that are read and of others."""
    source = Path(shutil.copytree(written["Wan2.2-T2V-A14B"], tmp_path / "repository"))
    for name in (*CONFIGS, *WEIGHTS, *OTHERS):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    shards = [name.removeprefix("transformer/") for name in WEIGHTS if "-of-" in name]
    index = json.dumps({"weight_map": {str(i): name for i, name in enumerate(shards)}})
    (source / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(index)
    (tmp_path / "cache").mkdir()
    return Hub(source, tmp_path / "cache", monkeypatch)


CONFIGS = (
    "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "transformer_2/config.json",
    "vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
)  # fmt: skip
WEIGHTS = (
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer_2/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
)  # fmt: skip
OTHERS = (
    "README.md", "configuration.json", "assets/example.json", "assets/x.safetensors", "image_encoder/config.json",
    "image_encoder/model.safetensors", "transformer/diffusion_pytorch_model.bin", "tokenizer/spiece.model",
    "transformer/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin", "vae/diffusion_pytorch_model.safetensors.index.fp16.json",
)  # fmt: skip


def test_of_a_hub_id_the_files_that_are_read_are_fetched_and_no_others(hub):
    checkpoint = open_checkpoint("owner/name")
    assert sorted(hub.asked) == sorted(CONFIGS)
    assert (checkpoint.name, checkpoint.folder) == ("owner/name", hub.folder)
    hub.asked.clear()
    ensure_weights(checkpoint)
    assert sorted(hub.asked) == sorted(WEIGHTS)
    assert "index.json" in hub.asked[0]  # before the shards that it names


def test_of_a_variant_its_files_are_fetched_and_plain_ones_where_it_has_none(hub):
    ensure_weights(open_checkpoint("owner/name", "fp16"))
    fetched = {name for name in hub.asked if name.endswith(".safetensors")}
    assert fetched == {
        "transformer/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors",
        "transformer_2/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    hub.reason = "no network"
    ensure_weights(open_checkpoint("owner/name", "fp16"))
    hub.reason = None
    with pytest.raises(FileNotFoundError, match="owner/name has no weights of variant='bf16'; those there are fp16"):
        ensure_weights(open_checkpoint("owner/name", "bf16"))


def test_a_complete_cache_will_do_offline(hub):
    ensure_weights(open_checkpoint("owner/name"))
    hub.reason = "no network"
    (hub.source / "generation_config.json").write_text("{}")  # which Diffusers would not have fetched
    ensure_weights(open_checkpoint("owner/name"))


@pytest.mark.parametrize("name", [*CONFIGS, *WEIGHTS])
def test_a_partial_cache_is_completed_and_offline_the_missing_file_is_named(hub, name):
    ensure_weights(open_checkpoint("owner/name"))
    (hub.folder / name).unlink()
    hub.asked.clear()
    ensure_weights(open_checkpoint("owner/name"))
    assert hub.asked == [name]
    (hub.folder / name).unlink()
    hub.reason = "no network"
    with pytest.raises(OSError, match="the hub did not give it: .*no network") as error:
        ensure_weights(open_checkpoint("owner/name"))
    told = str(error.value)
    if name == WEIGHTS[-1]:  # the index: what its shards are called is not known any more
        assert "which says what is in the shards" in told
    else:
        assert name == "model_index.json" or name.split("/")[1] in told
    assert "\n" not in told


def test_a_repository_without_safetensors_says_what_it_has(hub):
    for path in hub.source.glob("vae/*.safetensors*"):
        path.unlink()
    (hub.source / "vae/diffusion_pytorch_model.bin").touch()
    with pytest.raises(
        FileNotFoundError, match="owner/name/vae holds diffusion_pytorch_model.bin and no .*--component NAME=FILE"
    ):
        ensure_weights(open_checkpoint("owner/name"))


def test_a_repository_in_another_layout_is_refused(hub):
    (hub.source / "model_index.json").unlink()
    with pytest.raises(
        OSError,
        match="has no model_index.json, and is no original .* are parts, to be named as --component NAME=owner/name:P",
    ) as error:
        open_checkpoint("owner/name")
    assert "\n" not in str(error.value) and hub.asked == []
    hub.reason = "no network"
    with pytest.raises(OSError, match="owner/name is no local folder, and the hub did not give it: no network"):
        open_checkpoint("owner/name")


ORIGINAL = (
    "high_noise_model/config.json", "high_noise_model/diffusion_pytorch_model-00001-of-00001.safetensors",
    "high_noise_model/diffusion_pytorch_model.safetensors.index.json",
    "low_noise_model/diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth",
    "google/umt5-xxl/tokenizer.json", "google/umt5-xxl/tokenizer_config.json",
)  # fmt: skip


@pytest.fixture
def original(hub, monkeypatch):
    """The hub with an original repository, of whose files no content is looked at."""
    shutil.rmtree(hub.source)
    for name in (*ORIGINAL, "README.md", "assets/x.safetensors", "nothing.bin"):
        (hub.source / name).parent.mkdir(parents=True, exist_ok=True)
        (hub.source / name).write_text("{}")
    checkpoint = read_checkpoint(write_configs(hub.source.parent / "twin", "Wan2.2-T2V-A14B"))
    names = ("transformer", "transformer_2", "vae", "text_encoder")
    configs = {name: getattr(checkpoint, name.removesuffix("_2")) for name in names}
    monkeypatch.setattr("jaxwan.pipelines.checkpoint.configs_of", lambda paths: configs)
    return hub


def test_of_an_original_repository_the_files_that_are_read_are_fetched(original):
    checkpoint = open_checkpoint("owner/name")
    assert sorted(original.asked) == sorted(ORIGINAL)
    assert (checkpoint.name, checkpoint.folder) == ("owner/name", original.folder)
    assert checkpoint.place("transformer_2") == original.folder / "low_noise_model"
    assert checkpoint.variant.name == "Wan2.2-T2V-A14B"
    ensure_weights(checkpoint)
    assert sorted(original.asked) == sorted(ORIGINAL)


def test_an_original_repository_of_another_model_is_refused_before_its_weights(original):
    (original.source / "high_noise_model/config.json").write_text('{"model_type": "s2v"}')
    with pytest.raises(ConfigError, match="owner/name holds a model of type 's2v', and implemented are t2v, i2v"):
        open_checkpoint("owner/name")
    assert original.asked == ["high_noise_model/config.json"]


def test_a_single_file_of_a_repository_is_fetched(hub):
    (hub.source / "split_files/vae").mkdir(parents=True)
    (hub.source / "split_files/vae/wan_2.1_vae.safetensors").touch()
    paths = check_components({"vae": "owner/name:split_files/vae/wan_2.1_vae.safetensors"})
    assert paths == {"vae": hub.folder / "split_files/vae/wan_2.1_vae.safetensors"}
    assert hub.asked == ["split_files/vae/wan_2.1_vae.safetensors"]
    for wrong in ("owner/name:no.safetensors", "owner/name:../x.safetensors", "owner/name:/etc/x.safetensors"):
        with pytest.raises(OSError, match="it has no no.safetensors|vae: there is no file or folder owner/name"):
            check_components({"vae": wrong})


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("cannot find it on disk"),
        HFValidationError("a bad name"),
        ConnectionError("no\nnetwork"),
    ],
)
def test_what_the_hub_does_not_give_is_said_in_one_sentence(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(OSError, match="owner/name is no local folder, and the hub did not give it: ") as caught:
        find_checkpoint("owner/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", ["", "fp 16", "../x"])
def test_what_is_no_variants_name_is_refused(written, variant):
    with pytest.raises(ValueError, match="is no variant's name, such as 'fp16'"):
        open_checkpoint(written["Wan2.1-T2V-14B"], variant)


def test_what_is_no_name_of_a_model_is_refused():
    for model, words in (("", "model is an empty text"), (3, "model=3 is no folder or hub id")):
        with pytest.raises(ValueError, match=words):
            inspect.unwrap(find_checkpoint)(model)  # without the type checks of the tests
