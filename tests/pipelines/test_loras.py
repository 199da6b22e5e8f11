"""LoRAs beside a checkpoint: which expert gets which, and what is refused before anything is loaded or fetched."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from loras import lora_tensors, write_lora
from published import edit, write_configs

from jaxwan import BUNDLED_MODEL, Lora, WanPipeline, dry_run, open_checkpoint
from jaxwan.convert.rules import CheckpointError
from jaxwan.pipelines.conversion import convert, plan_conversion
from jaxwan.pipelines.load import check_numbers, check_weights, prove_components
from jaxwan.pipelines.snapshot import identity

A14B, TI2V = "Wan2.2-T2V-A14B", "Wan2.2-TI2V-5B"
MODULE = "blocks.3.attn1.to_q"


def write(path, width=5120, module=MODULE):
    return write_lora(path, lora_tensors({module: (torch.ones(2, width), torch.ones(width, 2))}, "diffusers"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """name -> the configurations of a published checkpoint, at full size and without weights."""
    root = tmp_path_factory.mktemp("configs")
    return {name: write_configs(root / name, name) for name in (A14B, TI2V)}


def applied(checkpoint):
    """component -> names and strengths of what is merged into it."""
    return {
        expert: [(Path(lora.path).name, lora.strength) for lora in checkpoint.loras if lora.expert in (None, noise)]
        for expert, noise in (("transformer", "high"), ("transformer_2", "low"))
    }


def test_an_expert_gets_what_is_said_or_named_for_it_and_both_get_the_rest(folder, tmp_path, caplog):
    high, low, any_ = (write(tmp_path / name) for name in ("x_high_noise.safetensors", "Y-LOW.safetensors", "z"))
    caplog.set_level(logging.INFO)
    loras = [high, Lora(low, 0.5), Lora(str(any_), 2), Lora(write(tmp_path / "w"), -1, "low")]
    checkpoint = open_checkpoint(folder[A14B], loras=loras)
    assert applied(checkpoint) == {
        "transformer": [("x_high_noise.safetensors", 1.0), ("z", 2.0)],
        "transformer_2": [("Y-LOW.safetensors", 0.5), ("z", 2.0), ("w", -1.0)],
    }
    assert "z says no expert by its name (high or low): it goes to both" in caplog.text
    more = open_checkpoint(checkpoint, loras=[Lora(high, 1, "low")])
    assert applied(more)["transformer_2"][-1] == ("x_high_noise.safetensors", 1.0)
    assert "x_high_noise.safetensors is for the high-noise expert by its name, and goes to the other" in caplog.text
    assert open_checkpoint(checkpoint) == checkpoint


def test_a_model_with_one_dit_takes_any(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (lora,) = open_checkpoint(folder[TI2V], loras=[write(tmp_path / "x_LOW.safetensors", 3072)]).loras
    assert lora.expert is None
    assert "x_LOW.safetensors is for a low-noise expert by its name; Wan2.2-TI2V-5B has one DiT" in caplog.text


def test_what_passes_over_is_said(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    modules = MODULE, "blocks.0.attn2.add_k_proj"
    stored = lora_tensors({module: (torch.ones(2, 3072), torch.ones(3072, 2)) for module in modules}, "peft")
    open_checkpoint(folder[TI2V], loras=[write_lora(tmp_path / "x", stored)])
    assert "x: 1 of its modules are for an image's CLIP rows, which this model does not read" in caplog.text
    assert "x says no alpha, and neither does an adapter_config.json beside it: it counts as the rank" in caplog.text


@pytest.mark.parametrize(
    ("name", "loras", "words"),
    [
        (TI2V, lambda x: [Lora(x, expert="high")], "for the high-noise expert, and Wan2.2-TI2V-5B has one DiT"),
        (TI2V, lambda x: [write(x.with_name("wide"))], "wide does not fit Wan2.2-TI2V-5B: 1 of other ranks"),
        (TI2V, lambda x: [write(x, 3072, "blocks.30.attn1.to_q")], "1 without a place in it .blocks.30.attn1.to_q"),
        (A14B, lambda x: [x, Lora(x, 0.5, "low")], "x is given twice for the same expert: give one strength"),
        (A14B, lambda x: [Lora(x, 0.5, "low"), x], "x is given twice for the same expert"),
        (A14B, lambda x: [x, x.parent / ".." / x.parent.name / "x"], "is given twice for the same expert"),
        (A14B, lambda x: [x.with_name("y")], r"there is no file .*y \(a strength is a number behind a last colon"),
        (A14B, lambda x: [x.parent], r"is a folder \(with no safetensors\): give the file"),
        (A14B, lambda x: [Lora(x, float("nan"))], "strength=nan is not finite"),
        (A14B, lambda x: [Lora(x, 1.0, "middle")], "expert='middle' is neither 'high' nor 'low'"),
        (A14B, lambda x: [3], "3 is no jaxwan.Lora"),
        (A14B, lambda x: str(x), "is no list, such as"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_from_headers(folder, tmp_path, name, loras, words):
    given = loras(write(tmp_path / "x"))
    with pytest.raises((ValueError, OSError), match=words):
        # without the checks of types that tests have
        getattr(open_checkpoint, "__wrapped__", open_checkpoint)(folder[name], loras=given)


def test_one_expert_alone_takes_only_its_own(folder, tmp_path):
    alone = write_configs(tmp_path / "alone", A14B)
    edit(alone / "model_index.json", transformer=[None, None], boundary_ratio=1.0)
    checkpoint = open_checkpoint(alone, loras=[write(tmp_path / "a_low_noise"), write(tmp_path / "b")])
    assert [len(own) for own in applied(checkpoint).values()] == [1, 2]
    with pytest.raises(ValueError, match="c_HIGH is for the high-noise expert, and alone has the other alone"):
        open_checkpoint(alone, loras=[write(tmp_path / "c_HIGH")])


def test_loras_change_the_weights_that_are_loaded_and_are_in_every_account(tmp_path):
    make_checkpoint(tmp_path, "t2v-A14B")
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(2, 40, generator=generator), torch.randn(40, 2, generator=generator)
    lora = write_lora(tmp_path / "x_low", lora_tensors({MODULE: pair}, "musubi", 1.0))
    plain = open_checkpoint(tmp_path)
    ours = open_checkpoint(tmp_path, loras=[Lora(lora, 0.5)])
    report = dry_run(tmp_path, loras=[Lora(lora, 0.5)], mesh="pp=2", height=32, width=48, num_frames=5)
    assert report.weights.endswith("MB to read, with 1 LoRA") and check_weights(plain).endswith("MB to read")
    assert identity(plain, "float32")["tensors"] != identity(ours, "float32")["tensors"]
    pipe, own = (WanPipeline.from_pretrained(model, progress=False) for model in (plain, ours))
    flat = [pipe.parts.denoiser.weights.blocks["blocks"]["attn1"]["q"]["kernel"][...] for pipe in (pipe, own)]
    before, after = map(np.asarray, flat)
    change = after - before
    np.testing.assert_allclose(change[1, 3], (0.25 * pair[1] @ pair[0]).T.numpy(), atol=1e-6)
    change[1, 3] = 0
    assert not change.any()


def test_a_lora_that_fits_another_model_is_refused_before_the_first_byte(tmp_path):
    with pytest.raises(ValueError, match="the LoRA .* does not fit jaxwan-tiny"):
        WanPipeline.from_pretrained(BUNDLED_MODEL, loras=[write(tmp_path / "x")])


def test_numbers_that_are_none_are_not_blamed_on_the_model_alone(tmp_path):
    none = {MODULE: (torch.full((2, 128), torch.nan), torch.ones(128, 2))}
    lora = write_lora(tmp_path / "x_low", lora_tensors(none, "diffusers"))
    with pytest.raises(
        CheckpointError, match=rf"transformer_2, with its LoRAs, has NaN or Inf in 1 tensors \({MODULE}"
    ):
        check_numbers(open_checkpoint(BUNDLED_MODEL, loras=[lora]), progress=False)


def test_a_lora_over_orbax_is_refused_once_with_what_to_do(tmp_path):
    planned = plan_conversion(open_checkpoint(BUNDLED_MODEL), "orbax")
    lora = write_lora(tmp_path / "x", lora_tensors({MODULE: (torch.ones(2, 128), torch.ones(128, 2))}, "diffusers"))
    checkpoint = open_checkpoint(convert(planned, tmp_path / "orbax"), loras=[lora])
    with pytest.raises(CheckpointError, match="alone: convert it to one of these") as error:
        prove_components(checkpoint)
    assert str(error.value).count("LoRAs are merged") == 1
