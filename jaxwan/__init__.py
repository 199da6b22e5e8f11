"""jaxwan: Wan2.1/2.2 video generation on a mesh of accelerators, in JAX.

from jaxwan import WanPipeline
pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.2-T2V-A14B-Diffusers", mesh="pp=4")
video = pipe("a red kite over a beach", num_frames=81).frames[0]
"""

from jaxwan.pipelines.checkpoint import BUNDLED_MODEL
from jaxwan.pipelines.pipeline import Output, WanPipeline
from jaxwan.pipelines.prompt import OFFICIAL_NEGATIVE_PROMPT

__all__ = ["BUNDLED_MODEL", "OFFICIAL_NEGATIVE_PROMPT", "Output", "WanPipeline"]
