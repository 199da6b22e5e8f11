"""The bundled model as a Diffusers folder: what is written around the trained weights, and reading them back."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxwan.convert.diffusers import TEXT_ENCODER, TRANSFORMER
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import load_module
from jaxwan.convert.save import STEM, save_arrays, write_json
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.models.transformer import WanTransformer
from jaxwan.tiny.clips import HEIGHT, NUM_FRAMES, WIDTH
from jaxwan.tiny.grammar import vocabulary
from jaxwan.tiny.muon import Params
from jaxwan.tiny.tokenizer import write_tokenizer
from jaxwan.tiny.train_dit import DIT, FLOW_SHIFT
from jaxwan.tiny.train_text import TEXT
from jaxwan.tiny.training import parameters

EXPERTS = {"high": "transformer", "low": "transformer_2"}  # folder names

_RULES = {"transformer": TRANSFORMER, "transformer_2": TRANSFORMER, "text_encoder": TEXT_ENCODER}
_INDEX = {
    "_class_name": "WanPipeline",
    "boundary_ratio": 0.875,
    "expand_timesteps": False,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],  # keeps tokenizer.json as it is
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "disable_corrector": [],
    "final_sigmas_type": "zero",
    "flow_shift": FLOW_SHIFT,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_type": "bh2",
    "use_flow_sigmas": True,
}
_GENERATION = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": NUM_FRAMES,
    "fps": 8,
    "num_inference_steps": 20,
    "guidance_scale": 5.0,
    "guidance_scale_2": 3.0,
    "example_prompt": "a red circle moves to the right over a blue background",
    "vocabulary": list(vocabulary()),
}


def write_component(params: Params, folder: Path, name: str) -> None:
    """Write an expert or the text encoder, in bfloat16."""
    config, stem = (_text_config(), "model") if name == "text_encoder" else (_transformer_config(), STEM)
    save_arrays({path: p.astype(jnp.bfloat16) for path, p in params.items()}, folder / name, _RULES[name], stem=stem)
    write_json(folder / name / "config.json", config)


def write_surroundings(folder: Path) -> None:
    """Write everything that is not trained."""
    write_tokenizer(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER)
    write_json(folder / "generation_config.json", _GENERATION)
    write_json(folder / "model_index.json", _INDEX)


def read_component(folder: Path, name: str) -> Params:
    """Parameters, in float32, of an expert or the text encoder."""

    def make() -> nnx.Module:
        if name == "text_encoder":
            return UMT5Encoder(TEXT, dtype=jnp.float32, rngs=nnx.Rngs(0))
        return WanTransformer(DIT, dtype=jnp.float32, rngs=nnx.Rngs(0))

    return parameters(load_module(make, TensorFiles.find(folder / name), _RULES[name], what=str(folder / name)))


def _transformer_config() -> dict[str, Any]:
    fixed = {"_class_name": "WanTransformer3DModel", "qk_norm": "rms_norm_across_heads"}
    return fixed | asdict(DIT)


def _text_config() -> dict[str, Any]:
    return {
        "architectures": ["UMT5EncoderModel"],
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.0,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "model_type": "umt5",
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        **asdict(TEXT),
    }
