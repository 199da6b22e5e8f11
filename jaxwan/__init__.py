"""jaxwan: Wan2.1/2.2 video generation on a mesh of accelerators, in JAX.

from jaxwan import WanPipeline
pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.2-T2V-A14B-Diffusers", mesh="pp=4")
pipe("a red kite over a beach", num_frames=81).save("kite.mp4")

What is named here is the public interface. It is imported when first asked for: JAX takes seconds to start.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxwan.convert.lora import Lora
    from jaxwan.engine.engine import Engine
    from jaxwan.engine.handle import Aborted, Handle, NotFinite, QueueFull
    from jaxwan.engine.saving import SavedCalls
    from jaxwan.models.tiles import Tiling
    from jaxwan.pipelines.call import make_job
    from jaxwan.pipelines.checkpoint import BUNDLED_MODEL, Checkpoint, open_checkpoint
    from jaxwan.pipelines.dry_run import DryRun, dry_run
    from jaxwan.pipelines.ending import end_on_signals, first_signal_to
    from jaxwan.pipelines.media import check_writable, load_image, load_video, read_settings, save_video
    from jaxwan.pipelines.output import Output, check_save, seed_label
    from jaxwan.pipelines.pipeline import WanPipeline
    from jaxwan.pipelines.plan import MeshPlan, plan_mesh
    from jaxwan.pipelines.progress import Progress
    from jaxwan.pipelines.request import Job
    from jaxwan.pipelines.steps import StepState
    from jaxwan.schedulers.presets import OFFICIAL_NEGATIVE_PROMPT

_HOME = {
    "convert.lora": ("Lora",),
    "engine.engine": ("Engine",),
    "engine.handle": ("Aborted", "Handle", "NotFinite", "QueueFull"),
    "engine.saving": ("SavedCalls",),
    "models.tiles": ("Tiling",),
    "pipelines.call": ("make_job",),
    "pipelines.checkpoint": ("BUNDLED_MODEL", "Checkpoint", "open_checkpoint"),
    "pipelines.dry_run": ("DryRun", "dry_run"),
    "pipelines.ending": ("end_on_signals", "first_signal_to"),
    "pipelines.media": ("check_writable", "load_image", "load_video", "read_settings", "save_video"),
    "pipelines.output": ("Output", "check_save", "seed_label"),
    "pipelines.pipeline": ("WanPipeline",),
    "pipelines.plan": ("MeshPlan", "plan_mesh"),
    "pipelines.progress": ("Progress",),
    "pipelines.request": ("Job",),
    "pipelines.steps": ("StepState",),
    "schedulers.presets": ("OFFICIAL_NEGATIVE_PROMPT",),
}

__all__ = [
    "BUNDLED_MODEL", "OFFICIAL_NEGATIVE_PROMPT", "Aborted", "Checkpoint", "DryRun", "Engine", "Handle", "Job", "Lora",
    "MeshPlan", "NotFinite", "Output", "Progress", "QueueFull", "SavedCalls", "StepState", "Tiling", "WanPipeline",
    "check_save", "check_writable", "dry_run", "end_on_signals", "first_signal_to", "load_image", "load_video",
    "make_job", "open_checkpoint", "plan_mesh", "read_settings", "save_video", "seed_label",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"jaxwan.{module}"), name)
            return value
    raise AttributeError(f"module 'jaxwan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
