"""The checkpoint that is used when none is given: random, tiny, in the layout of Wan2.2-T2V-A14B.

It is made without torch and without touching a device (NumPy draws the numbers), so that a mesh can still be chosen
afterwards. Diffusers loads it like a published one.
"""

import json
import os
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxwan.config import TextEncoderConfig, TransformerConfig, VAEConfig
from jaxwan.convert.diffusers import TEXT_ENCODER, TRANSFORMER
from jaxwan.convert.diffusers import VAE as VAE_RULES
from jaxwan.convert.load import flat_shapes
from jaxwan.convert.rules import Rule, expected_sources
from jaxwan.convert.save import STEM, save_arrays
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.models.transformer import WanTransformer
from jaxwan.models.vae import VAE

VERSION = 1  # of the recipe below; another version is another folder in the cache

_TRANSFORMER = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 24,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "ffn_dim": 128,
    "freq_dim": 64,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 3,
    "num_layers": 5,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 32,
}
_VAE = {
    "_class_name": "AutoencoderKLWan",
    "attn_scales": [],
    "base_dim": 8,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "latents_mean": list(VAEConfig.latents_mean),
    "latents_std": list(VAEConfig.latents_std),
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
_TEXT_ENCODER = {
    "architectures": ["UMT5EncoderModel"],
    "d_ff": 64,
    "d_kv": 8,
    "d_model": 32,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-6,
    "model_type": "umt5",
    "num_heads": 4,
    "num_layers": 2,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": True,
    "vocab_size": 384,  # more rows than the tokenizer has tokens, as published
}
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "disable_corrector": [],
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_type": "bh2",
    "use_flow_sigmas": True,
}
INDEX = {
    "_class_name": "WanPipeline",
    "boundary_ratio": 0.875,
    "expand_timesteps": False,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
_GENERATION = {
    "height": 64,
    "width": 96,
    "num_frames": 9,
    "fps": 8,
    "num_inference_steps": 5,
    "guidance_scale": 3.0,
    "guidance_scale_2": 2.0,
}
_WORDS = (
    "a an the and or but of in on at to from with by for as is are was be it its this that over under through into "
    "near behind above very slowly slow fast motion video frame scene camera shot view close up wide light dark bright "
    "red green blue yellow white black gold silver color water sea ocean wave river rain snow fire smoke cloud sky sun "
    "moon star night day morning evening city street house room forest tree flower grass mountain field man woman boy "
    "girl person people child cat dog bird fish horse bear car train boat ship plane runs run walks walk flies fly "
    "dances dance plays play sits stands looks moves moving standing sitting looking wearing big small old young "
    "beautiful style quality detail background static blurred one two three"
).split()
_ENDINGS = "s es ed er ing ly est al ion tion ness ful less able th st nd re in on an en or ar le ch sh ou ea".split()
_SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as published


def builtin_checkpoint(cache: Path | None = None) -> Path:
    """The folder of the built-in checkpoint, made on the first call (about a second).

    cache: where it is kept; by default `jaxwan` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`).
    Raises OSError when it has to be made and cannot be written.
    """
    cache = cache_folder() if cache is None else cache
    target = cache / f"random-t2v-a14b-v{VERSION}"
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache, prefix=".making-") as temporary:
            made = Path(temporary) / target.name
            _write(made)
            _publish(made, target)
    except OSError as error:
        raise OSError(
            f"the built-in checkpoint cannot be written to {target} ({error}): "
            "name a checkpoint, or set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return target


def cache_folder() -> Path:
    """`jaxwan` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`). Raises OSError without a home."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():  # the XDG specification ignores any other
        return given / "jaxwan"
    try:
        return Path.home() / ".cache" / "jaxwan"
    except RuntimeError as error:
        raise OSError("there is no home folder for the user's cache: set XDG_CACHE_HOME") from error


def _publish(made: Path, target: Path) -> None:
    """Move a finished folder to its place, unless another process was quicker: both made the same."""
    try:
        os.replace(made, target)
    except OSError:
        if not target.is_dir():
            raise


def _write(folder: Path) -> None:
    """Every file of the checkpoint."""
    dit = TransformerConfig.from_json(_TRANSFORMER)
    text = TextEncoderConfig.from_json(_TEXT_ENCODER)
    autoencoder = VAEConfig.from_json(_VAE)

    def make_transformer() -> nnx.Module:
        return WanTransformer(dit, dtype=jnp.float32, rngs=nnx.Rngs(0))

    def make_text_encoder() -> nnx.Module:
        return UMT5Encoder(text, dtype=jnp.float32, rngs=nnx.Rngs(0))

    _write_component(folder / "transformer", _TRANSFORMER, make_transformer, TRANSFORMER, seed=1)
    _write_component(folder / "transformer_2", _TRANSFORMER, make_transformer, TRANSFORMER, seed=2)
    _write_component(folder / "vae", _VAE, lambda: VAE(autoencoder, rngs=nnx.Rngs(0)), VAE_RULES, seed=3)
    _write_component(folder / "text_encoder", _TEXT_ENCODER, make_text_encoder, TEXT_ENCODER, seed=4, stem="model")
    _write_tokenizer(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "generation_config.json", _GENERATION)
    write_json(folder / "model_index.json", INDEX)


def _write_component(
    folder: Path, config: dict[str, Any], make: Callable[[], nnx.Module], rules: Sequence[Rule], *, seed: int,
    stem: str = STEM,
) -> None:  # fmt: skip
    save_arrays(_random_arrays(make, rules, seed), folder, rules, stem=stem)
    write_json(folder / "config.json", config)


def _random_arrays(make: Callable[[], nnx.Module], rules: Sequence[Rule], seed: int) -> dict[str, np.ndarray]:
    """Parameters of the module that `make` builds, distributed as its own initialisers distribute them.

    Those are not run: compiling a hundred of them takes far longer than the numbers do.
    """
    shapes = {path: s.shape for path, s in flat_shapes(nnx.state(nnx.eval_shape(make))).items()}
    stacked = {slot.path for slot, _ in expected_sources(shapes, rules).values() if slot.layer is not None}
    rng = np.random.default_rng(seed)
    return {path: _random_array(path, shape, path in stacked, rng) for path, shape in shapes.items()}


def _random_array(path: str, shape: tuple[int, ...], stacked: bool, rng: np.random.Generator) -> np.ndarray:
    name, own = path.rpartition(".")[2], shape[1:] if stacked else shape
    if name in ("scale", "gamma", "bias"):
        return np.full(shape, name != "bias", np.float32)
    fan_in = {"embedding": 1, "position_bias": 1, "scale_shift_table": own[-1]}.get(name, prod(own[:-1]))
    return rng.standard_normal(shape, np.float32) * np.float32(fan_in**-0.5)


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer of the T5 kind over printable ASCII, some English words and endings: no data is needed for it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = [f"▁{word}" for word in _WORDS] + _ENDINGS
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pieces = [(token, 0.0) for token in _SPECIAL] + [("▁", -2.0)]
    # the ranks make every score another, so that no two ways to cut a text are equally good
    pieces += [(word, -4.0 - 0.001 * rank) for rank, word in enumerate(words)]
    pieces += [(character, -6.0 - 0.001 * rank) for rank, character in enumerate(characters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(list(_SPECIAL))
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = dict(zip(("pad_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
    write_json(folder / "special_tokens_map.json", named)
    kind = {"tokenizer_class": "T5TokenizerFast", "extra_ids": 0, "model_max_length": 512}
    write_json(folder / "tokenizer_config.json", named | kind)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a configuration file, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
