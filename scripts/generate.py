"""Generate a video with a Wan checkpoint on a mesh of devices.

Without --model, the tiny bundled model paints coloured shapes that move over a background:

    python scripts/generate.py --mesh pp=4
    python scripts/generate.py --prompt "a small yellow star goes up on a blue background"

With real weights (a Diffusers-layout folder or a Hugging Face id):

    python scripts/generate.py --mesh pp=4 --model Wan-AI/Wan2.2-T2V-A14B-Diffusers --prompt "a red kite over a beach"
    python scripts/generate.py --mesh pp=2 --model FOLDER --image first.png --prompt "the boat sails away"
    python scripts/generate.py --model FOLDER --prompt "…" --dry-run --device-memory 80GB

Several prompts are one batch: repeat --prompt; a flag marked [per prompt] is then given once, or once for each.
"""

import argparse
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from jaxwan import BUNDLED_MODEL, OFFICIAL_NEGATIVE_PROMPT
from jaxwan.pipelines.checkpoint import Checkpoint, find_checkpoint, read_checkpoint
from jaxwan.pipelines.compilation_cache import VARIABLE, keep_compiled_programs
from jaxwan.pipelines.dry_run import dry_run, parse_memory
from jaxwan.pipelines.load import DTYPES, load_parts, place
from jaxwan.pipelines.media import check_output, check_writable, save_npz, save_output
from jaxwan.pipelines.pipeline import Output, WanPipeline
from jaxwan.pipelines.request import Job, check_mesh, make_job
from jaxwan.pipelines.stages import Stages
from jaxwan.schedulers.table import SAMPLERS
from jaxwan.sharding.mesh import AXES, MeshSpec

EXAMPLE_PROMPT = "a red circle moves to the right over a blue background"


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 1 after bad input was explained in a sentence."""
    args = parse(argv)
    try:
        return generate(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def generate(args: argparse.Namespace) -> int:
    """Check everything that can be checked from configurations, then load, generate and write."""
    mesh, memory = MeshSpec.parse(args.mesh), parse_memory(args.device_memory)
    checkpoint = open_checkpoint(args)
    check_mesh(mesh, checkpoint)
    job = make_job(checkpoint, **job_arguments(args, checkpoint))
    if args.dry_run:
        report = dry_run(checkpoint, mesh, job, args.dtype, args.vae_dtype, memory)
        print(report.to_json() if args.dry_run == "json" else report)
        return 0
    targets = output_paths(args, job)
    for note in job.notes:
        print(note)
    devices = place(checkpoint, mesh, args.dtype, args.vae_dtype).devices
    if not args.no_compilation_cache:
        keep_compiled_programs()
    checkpoint = with_weights(checkpoint, args.model)
    pipe = WanPipeline(checkpoint, load_parts(checkpoint, mesh, args.dtype, args.vae_dtype, job))
    stages = Stages()
    stages.seconds.update(pipe.parts.seconds)
    output = pipe.run(job, stages=stages)
    write(output, targets, args.save_npz, stages)
    for path in targets:
        print(f"{path}  {job.width}x{job.height}, {job.num_frames} frames at {job.fps:g} fps")
    times = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.seconds.items())
    dtypes = f"{pipe.parts.denoiser.dtype} DiT, {args.vae_dtype} VAE"
    print(f"seconds: {times}  ({dtypes}, {devices.size} x {devices.flat[0].device_kind})")
    return 0


def open_checkpoint(args: argparse.Namespace) -> Checkpoint:
    """The named checkpoint, or the bundled one; of a hub id only the configuration files are fetched."""
    if args.model is None:
        print("no --model: the tiny bundled one, which knows coloured shapes that move over a background",
              file=sys.stderr)  # fmt: skip
        return read_checkpoint(BUNDLED_MODEL)
    return read_checkpoint(find_checkpoint(args.model, json_only=True))


def with_weights(checkpoint: Checkpoint, model: str | None) -> Checkpoint:
    """The checkpoint with all of its files there: those of a hub id are fetched now that nothing speaks against it."""
    return checkpoint if model is None else replace(checkpoint, folder=find_checkpoint(model))


def job_arguments(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments of `make_job` from the flags; a repeatable flag given once is one value for all prompts."""
    names = (
        "prompt negative_prompt image last_image video strength height width num_frames fps num_inference_steps "
        "guidance_scale guidance_scale_2 boundary_ratio flow_shift sampler timesteps seed num_videos_per_prompt"
    ).split()
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name, value in given.items():
        if isinstance(value, list) and len(value) == 1 and name != "timesteps":
            given[name] = value[0]
    if args.model is None and "prompt" not in given:
        print(f"no --prompt: {EXAMPLE_PROMPT!r}", file=sys.stderr)
        given["prompt"] = EXAMPLE_PROMPT
    if "prompt" not in given:
        raise ValueError('--prompt is missing (an empty one, --prompt "", is allowed)')
    if args.official_negative_prompt:
        if args.negative_prompt is not None:
            raise ValueError("--negative-prompt and --official-negative-prompt are both given: give one of them")
        given["negative_prompt"] = OFFICIAL_NEGATIVE_PROMPT
    if args.latents is not None:
        given["latents"] = load_latents(args.latents)
    return given


def load_latents(path: str) -> np.ndarray:
    """The array of a .npy file, which is never unpickled."""
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"--latents {path} is no .npy file of plain numbers ({error})") from error
    except OSError as error:
        raise OSError(f"--latents {path} cannot be read ({error.strerror})") from error


def output_paths(args: argparse.Namespace, job: Job) -> list[Path]:
    """One file a video, each checked to be writable; also --save-npz's."""
    default = f"outputs/{datetime.now():%Y%m%d-%H%M%S}-{job.requests[0].seed}.mp4"
    path = Path(args.output or default)
    paths = [path] if job.batch == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(job.batch)]
    if args.save_npz is not None and check_writable(args.save_npz) in paths:
        raise ValueError(f"--save-npz {args.save_npz} is also where the video goes: choose another name")
    return [check_output(p, job.num_frames) for p in paths]


def write(output: Output, targets: list[Path], npz: str | None, stages: Stages) -> None:
    """Videos (or single frames) to their files, and the arrays to --save-npz."""
    with stages.stage("write", len(targets)) as update:
        for frames, path in zip(output.frames, targets, strict=True):
            save_output(frames, path, output.fps)
            update(1)
        if npz is not None:
            save_npz(npz, latents=output.latents, frames=output.frames)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    many: dict[str, Any] = {"action": "append"}  # once, or once per prompt

    what = parser.add_argument_group("what to show")
    what.add_argument("--prompt", **many, help="what the video shows; repeat for a batch")
    what.add_argument("--negative-prompt", **many, help="what it should not show [per prompt]")
    what.add_argument("--official-negative-prompt", action="store_true", help="Wan's published negative prompt")
    what.add_argument("--image", **many, help="first frame, for image-to-video models and TI2V [per prompt]")
    what.add_argument("--last-image", **many, help="last frame, for models that take one [per prompt]")
    what.add_argument("--video", help="source of video to video, for models without image channels")
    what.add_argument("--strength", type=float, help="how far video to video goes from the source, (0, 1]; default 0.8")

    size = parser.add_argument_group("size (defaults: the model card's; with an image or video, its aspect ratio)")
    size.add_argument("--height", type=int, help="pixels, a multiple of 16 (TI2V-5B: 32)")
    size.add_argument("--width", type=int, help="pixels, a multiple of 16 (TI2V-5B: 32)")
    size.add_argument("--num-frames", type=int, help="4k+1, such as 81; 1 makes a picture")
    size.add_argument("--fps", type=float, help="frames a second of the written video")
    size.add_argument("--num-videos-per-prompt", type=int, default=1, help="default %(default)s")

    how = parser.add_argument_group("sampling (defaults: the checkpoint's)")
    how.add_argument("--num-inference-steps", **many, type=int, help="denoising steps, 1 to 128 [per prompt]")
    how.add_argument("--sampler", **many, help=f"{', '.join(SAMPLERS)} [per prompt]")
    how.add_argument("--flow-shift", **many, type=float, help="moves the steps towards noise, such as 3 [per prompt]")
    how.add_argument("--timesteps", nargs="+", type=float, help="for --sampler renoise: such as 1000 757 522")
    how.add_argument("--guidance-scale", **many, type=float,
                     help="pull towards the prompt, of the high-noise expert if two; 1: off [per prompt]")  # fmt: skip
    how.add_argument("--guidance-scale-2", **many, type=float, help="of the low-noise expert [per prompt]")
    how.add_argument("--boundary-ratio", type=float, help="where the low-noise expert takes over, such as 0.875")
    how.add_argument("--seed", **many, type=int, help="of the noise; drawn and printed when not given [per prompt]")
    how.add_argument("--latents", metavar="FILE.npy", help="unit noise to start from, (B, C, T, h, w)")

    where = parser.add_argument_group("where and with what")
    where.add_argument("--model", help="Diffusers-layout folder or Hugging Face id; default: the tiny bundled one")
    where.add_argument(
        "--mesh", default="pp=1", help=f"devices by axis ({', '.join(AXES)}), such as pp=4; default %(default)s"
    )
    where.add_argument("--dtype", choices=DTYPES, help="of DiT and text encoder; default bfloat16, on a CPU float32")
    where.add_argument("--vae-dtype", choices=DTYPES, default="float32", help="default %(default)s")
    where.add_argument("--output", help="NAME.mp4 or .gif (NAME-0.mp4 … for several), or .png for one frame")
    where.add_argument("--save-npz", metavar="FILE", help="also write latents and frames as float32 arrays")
    where.add_argument("--no-compilation-cache", action="store_true",
                       help=f"keep no compiled programs for later runs; so does {VARIABLE}=0")  # fmt: skip
    where.add_argument("--dry-run", nargs="?", const="text", choices=("text", "json"),
                       help="only say what it would take: tokens, stages, ticks, memory; reads no weights")  # fmt: skip
    where.add_argument("--device-memory", help="for --dry-run: memory of a device, such as 80GB")
    args = parser.parse_args(argv)
    if args.device_memory is not None and not args.dry_run:
        parser.error("--device-memory is for --dry-run: add it, or leave this out")
    return args


if __name__ == "__main__":
    sys.exit(main())
