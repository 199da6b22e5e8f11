"""The process that runs Diffusers for a comparison: the only place where the package imports torch.

python -m jaxwan.bench.torch_side JSON

It answers requests, a JSON list a line on standard input: (verb, mode, case), where the verb is "prepare" (compile and
warm up) or "run" (one measured call). Modes are ways to run Diffusers: eager, as a user gets it, or compiled. JAX is
there for the configurations and never looks at a device. The process ends when its input closes, whatever it is doing.
"""

import json
import os
import queue
import re
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from jaxwan.bench.item import Item
from jaxwan.bench.presets import BOUNDARY, Preset

REPLY = "REPLY "
TEXT_ROWS = 512
EAGER, COMPILED, CUDNN = "eager", "compiled", "compiled, cuDNN attention"
KERNELS = re.compile(r"_scaled_dot_product\w+|\w*(?:flash|fmha|cudnn_attention|sdpa)\w*", re.IGNORECASE)
_FAILURES = (RuntimeError, ValueError, NotImplementedError, ImportError, AttributeError)  # how a mode says it cannot


def main(text: str) -> None:
    """Answer until there are no more requests."""
    wanted = json.loads(text)
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    try:
        side = Side(Item.from_json(wanted["item"]), wanted["dtype"], wanted["platform"])
    except ImportError as error:
        return _answer({"missing": f"{error}: pip install torch diffusers"})
    except RuntimeError as error:
        return _answer({"missing": str(error)})
    _answer({"modes": side.modes, "details": side.details})
    while True:
        verb, mode, case = json.loads(requests.get())
        try:
            _answer(side.prepare(mode, case) if verb == "prepare" else {"seconds": side.seconds(case)})
        except _FAILURES as error:
            _answer({"error": f"{type(error).__name__}: {str(error).strip()[:300]}"})


def _listen(requests: queue.Queue) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)  # the process that asks has ended


def _answer(answer: dict[str, Any]) -> None:
    print(REPLY + json.dumps(answer), flush=True)


class Side:
    """Diffusers' model of an item, with random weights, and what it can be asked to do. Raises ImportError without it,
    RuntimeError where it cannot use the device that JAX uses."""

    def __init__(self, item: Item, dtype: str, platform: str):
        import diffusers
        import torch

        if platform == "gpu" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU here, and JAX does: install a CUDA build of torch")
        self.torch, self.gpu = torch, platform == "gpu"
        self.device, self.dtype = "cuda" if self.gpu else "cpu", getattr(torch, dtype)
        torch.manual_seed(0)
        if not self.gpu:
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.details = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        self.details |= {} if self.gpu else {"threads": torch.get_num_threads()}
        make = {"dit": self._transformer, "vae": self._vae, "sampler": self._pipeline}[item.kind]
        with torch.device(self.device):
            self.models, self.cases = make(item.preset, diffusers)
        self.modes = [EAGER] if item.kind == "vae" else [EAGER, COMPILED] + [CUDNN] * self.gpu
        self.mode = EAGER

    def prepare(self, mode: str, case: str) -> dict[str, Any]:
        """Get a case ready in a mode: what its first call took, and which attention ran."""
        if mode != self.mode:
            self._switch(mode)
        first = self.seconds(case)
        ran = self._attention(case)
        if self.gpu:
            peak = self.torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        details = {"attention": ran} if ran else {}
        return {"compile_seconds": first if mode != EAGER else None, "peak": peak, "details": details}

    def seconds(self, case: str) -> float:
        """Of one call, until its output is there."""
        self._wait()
        start = time.perf_counter()
        with self.torch.no_grad():
            self.cases[case]()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.gpu:
            self.torch.cuda.synchronize()

    def _switch(self, mode: str) -> None:
        """Eager comes first: a compiled model stays so."""
        for model in self.models:
            if mode == CUDNN:
                model.set_attention_backend("_native_cudnn")
            if self.mode == EAGER:
                model.compile_repeated_blocks(fullgraph=True)
        if mode == CUDNN:
            self.torch.compiler.reset()
        self.mode = mode

    def _attention(self, case: str) -> str:
        """The attention operations and kernels that a call of this case ran."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.gpu
        with profile(activities=activities) as trace:
            self.seconds(case)
        names = {found[0] for event in trace.key_averages() if (found := KERNELS.search(event.key))}
        return ", ".join(sorted(name[:60] for name in names))

    # What is compared

    def _random(self, *shape: int, dtype: Any = None) -> Any:
        return self.torch.randn(shape, dtype=dtype or self.dtype)

    def _make_transformer(self, preset: Preset, diffusers: Any) -> Any:
        """The model of a preset, made in its dtype, with Diffusers' modules kept in float32."""
        cfg = asdict(preset.transformer)
        self.torch.set_default_dtype(self.dtype)
        model = diffusers.WanTransformer3DModel(**cfg).eval()
        self.torch.set_default_dtype(self.torch.float32)
        for name, parameter in model.named_parameters():
            if any(kept in name.split(".") for kept in model._keep_in_fp32_modules):
                parameter.data = parameter.data.float()
        return model

    def _transformer(self, preset: Preset, diffusers: Any) -> tuple[list, dict[str, Callable]]:
        """Forwards of the first layers of one model."""
        from jaxwan.bench.layers import FEW, MORE

        depths = dict.fromkeys((FEW, MORE, *((preset.transformer.num_layers,) * preset.whole_pair)))
        model = self._make_transformer(preset.with_layers(max(depths)), diffusers)
        blocks, list_of = model.blocks, self.torch.nn.ModuleList
        latents = self._random(1, preset.transformer.in_channels, *preset.latent_shape)
        text = self._random(1, TEXT_ROWS, preset.transformer.text_dim)
        # Diffusers' TI2V pipeline gives every token a timestep of its own
        timestep = self.torch.full((1, preset.tokens) if preset.first_frame else (1,), 500.0)

        def forward(depth: int):
            model.blocks = list_of(list(blocks)[:depth])
            try:
                return model(latents, timestep, text, return_dict=False)
            finally:
                model.blocks = blocks  # compiling looks for all of them

        return [model], {f"{depth} layers": lambda depth=depth: forward(depth) for depth in depths}

    def _vae(self, preset: Preset, diffusers: Any) -> tuple[list, dict[str, Callable]]:
        """Whole videos, both ways; the pipelines' own loop over frames is inside."""
        cfg = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(preset.vae).items()}
        vae = diffusers.AutoencoderKLWan(**cfg).eval().to(self.dtype)
        latents = self._random(1, preset.vae.z_dim, *preset.latent_shape)
        video = self.torch.tanh(self._random(1, 3, *preset.size))
        return [vae], {"decode": lambda: vae.decode(latents, return_dict=False), "encode": lambda: vae.encode(video)}

    def _pipeline(self, preset: Preset, diffusers: Any) -> tuple[list, dict[str, Callable]]:
        """The latents of a whole call, from embeddings."""
        models = [self._make_transformer(preset, diffusers) for _ in range(preset.experts)]
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        )
        pipe = diffusers.WanPipeline(
            tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=models[0],
            transformer_2=models[1] if preset.experts == 2 else None,
            boundary_ratio=BOUNDARY if preset.experts == 2 else None, expand_timesteps=preset.first_frame,
        )  # fmt: skip
        pipe.vae_scale_factor_spatial = preset.vae.scale_factor_spatial
        pipe.set_progress_bar_config(disable=True)
        prompt, negative = (self._random(1, TEXT_ROWS, preset.transformer.text_dim) for _ in range(2))
        frames, height, width = preset.size

        def call():
            return pipe(
                prompt_embeds=prompt, negative_prompt_embeds=negative, num_frames=frames, height=height, width=width,
                num_inference_steps=preset.steps, guidance_scale=4.0, output_type="latent",
            )  # fmt: skip

        return models, {f"{preset.steps} steps": call}


if __name__ == "__main__":
    main(sys.argv[1])
