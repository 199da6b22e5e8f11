"""Generate a video with a Wan checkpoint on a mesh of devices.

Without --model, the tiny bundled model paints coloured shapes that move over a background:

    python scripts/generate.py --mesh pp=4
    python scripts/generate.py --prompt "a small yellow star goes up on a blue background"

With real weights (a Diffusers-layout folder or a Hugging Face id):

    python scripts/generate.py --mesh pp=4 --model Wan-AI/Wan2.2-T2V-A14B-Diffusers --prompt "a red kite over a beach"
    python scripts/generate.py --mesh pp=2 --model FOLDER --image first.png --prompt "the boat sails away"
    python scripts/generate.py --mesh pp=2 --model FOLDER --dry-run --device-memory 80GB

A file that was made says how: --like FILE makes it again, with whatever else is given instead:

    python scripts/generate.py --like outputs/kite.mp4 --seed 8

Several prompts are one batch: repeat --prompt; a flag marked [per prompt] is then given once, or once for each.
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

START = time.perf_counter()  # before JAX, whose start takes seconds

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports too, without a word

try:
    import jaxwan  # its parts are imported when first used
    from jaxwan.commands.terminal import Parser, Told, tell_error, tell_on_stderr
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}: install it first, by `pip install -e .` in the clone")

log = logging.getLogger("jaxwan.generate")
DOES_NOT_FIT = 3
SAMPLING = (  # what a preset decides, beside the negative prompt
    "num_inference_steps sampler sigma_schedule flow_shift timesteps guidance_scale guidance_scale_2"
).split()
PER_PROMPT = (  # flags that may be repeated
    "prompt negative_prompt image last_image video num_inference_steps sampler sigma_schedule flow_shift "
    "guidance_scale guidance_scale_2 seed"
).split()
CALL = (
    *PER_PROMPT,
    *"preset strength fit latents height width num_frames fps boundary_ratio timesteps num_videos_per_prompt index "
    "max_sequence_length tiling".split(),
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, 1 after what went wrong was told in a sentence, 2 after bad flags, 3 if it does not fit."""
    with contextlib.redirect_stdout(Told(sys.stdout)) as out, contextlib.redirect_stderr(Told(sys.stderr)) as err:
        args = parse(argv)
        with warnings.catch_warnings():
            status = run(args)
        out.flush()
        if out.failure is not None and status == 0 and (args.json or args.dry_run):  # what others wait for
            status = 1
            tell_error(f"the result could not be printed ({out.failure.strerror})", as_json=False)
        err.flush()
    return status


def run(args: argparse.Namespace) -> int:
    """Do what the flags say; the exit status."""
    tell_on_stderr(quiet=args.quiet)
    take_memory()
    log.info("jaxwan %s, mesh %s", jaxwan.__version__, args.mesh)
    try:
        return plan(args) if args.dry_run else generate(args)
    except (ValueError, OSError) as error:
        tell_error(str(error), as_json=args.json)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def take_memory() -> None:
    """JAX is to take 92 % of a card, not its 75 %, unless the environment says otherwise; before it starts."""
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.92"


def plan(args: argparse.Namespace) -> int:
    """Say what it would take."""
    made = like(args)
    checkpoint = open_model(args, made)
    call = arguments(args, made)
    choose_tiling(args, checkpoint, made, call)
    report = planned(args, checkpoint, made, call)
    print(report.to_json() if args.json else report, flush=True)
    return DOES_NOT_FIT if report.fits is False else 0


def generate(args: argparse.Namespace) -> int:
    """Check all that can be checked from configurations, then load, generate and write."""
    made = like(args)
    checkpoint = open_model(args, made)
    call = arguments(args, made)
    if "prompt" not in call:
        call["prompt"] = example_prompt(args, checkpoint)
    choose_tiling(args, checkpoint, made, call)
    job = jaxwan.make_job(checkpoint, **call)
    targets = jaxwan.check_save(job, output_path(args, job), overwrite=args.overwrite, **compression(args))
    check_npz(args, targets)
    for note in job.sampling + job.notes:
        log.info(note)
    if args.no_compilation_cache:
        os.environ["JAXWAN_COMPILATION_CACHE"] = "0"
    seconds = {"start": time.perf_counter() - START}
    pipe = jaxwan.WanPipeline.from_pretrained(
        checkpoint, args.mesh, ulysses=args.ulysses, vae_devices=args.vae_devices, warmup=job,
        check=args.check, progress=not args.quiet, **dtypes(args, made),
    )  # fmt: skip
    output = pipe.run(job, output_type="latent")
    start = time.perf_counter()
    saved, decoding = write(args, pipe, output, targets)
    ending = {"decode": decoding, "write": time.perf_counter() - start - decoding}
    for phases in (pipe.seconds, output.seconds, ending):
        seconds |= {name: seconds.get(name, 0.0) + taken for name, taken in phases.items()}
    tell_end(args, output, saved, seconds, pipe)
    return 1 if any(file.error for file in saved) else 0


# From flags to a call


def arguments(args: argparse.Namespace, made: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the call: what the flags say, else what is in --like's file."""
    call = {name: getattr(args, name) for name in CALL if getattr(args, name, None) is not None}
    for name in PER_PROMPT:
        if len(call.get(name, ())) == 1:
            (call[name],) = call[name]
    if args.official_negative_prompt:
        if args.negative_prompt is not None:
            raise ValueError("--negative-prompt and --official-negative-prompt are both given: give one of them")
        call["negative_prompt"] = jaxwan.OFFICIAL_NEGATIVE_PROMPT
    before = made.get("call", {})
    official = before.get("preset") == "official" and jaxwan.OFFICIAL_NEGATIVE_PROMPT in before.get(
        "negative_prompt", ""
    )
    gone = {  # what another value of a flag makes meaningless
        "preset": [*SAMPLING, *["negative_prompt"] * official],
        "sampler": ["timesteps"],
        "num_inference_steps": ["timesteps"],
        "timesteps": ["num_inference_steps", *["sigma_schedule"] * (before.get("sigma_schedule") != "lookup")],
        "seed": ["index"],
    }
    stale = {name for given in call for name in gone.get(given, [])}
    return {name: before[name] for name in CALL if name in before and name not in stale} | call


def choose_tiling(
    args: argparse.Namespace, checkpoint: "jaxwan.Checkpoint", made: dict[str, Any], call: dict[str, Any]
) -> None:
    """Set the call's tiling by the flags, which change what --like's file has of it."""
    given = {}
    for what, size in (("tile", args.vae_tile), ("stride", args.vae_stride)):
        given |= dict(zip((f"{what}_width", f"{what}_height"), size or (), strict=False))
    if args.vae_tiling == "off":
        if given:
            raise ValueError("--vae-tiling off makes no tiles: leave it out, or --vae-tile and --vae-stride")
        call.pop("tiling", None)
    elif given or args.vae_tiling is not None:
        exact = {name: value for name, value in call.items() if name != "tiling"}
        call["tiling"] = replace(jaxwan.Tiling.parse(call.get("tiling", {})), **given)
        if args.vae_tiling == "auto" and not tiles_help(args, checkpoint, made, exact, call):
            del call["tiling"]


def tiles_help(
    args: argparse.Namespace, checkpoint: "jaxwan.Checkpoint", made: dict[str, Any], exact: dict[str, Any],
    tiled: dict[str, Any],
) -> bool:  # fmt: skip
    """Whether the call fits the devices in tiles and not without, by the dry run's account; says what was chosen."""
    whole = planned(args, checkpoint, made, exact).fits
    if whole is not False:
        known = "fits" if whole else "may fit, and how much memory there is is not known"
        log.info("--vae-tiling auto: no tiles, the exact form %s", known)
        return False
    if helped := planned(args, checkpoint, made, tiled).fits:
        log.info("--vae-tiling auto: in tiles, because the exact form does not fit")
    else:
        log.info("--vae-tiling auto: no tiles, it does not fit with them either")
    return bool(helped)


def planned(
    args: argparse.Namespace, checkpoint: "jaxwan.Checkpoint", made: dict[str, Any], call: dict[str, Any]
) -> "jaxwan.DryRun":
    """What a call would take."""
    return jaxwan.dry_run(
        checkpoint, mesh=args.mesh, ulysses=args.ulysses, vae_devices=args.vae_devices,
        device_memory=args.device_memory, **dtypes(args, made), **call,
    )  # fmt: skip


def like(args: argparse.Namespace) -> dict[str, Any]:
    """The settings in --like's file, empty without; refused where the flags must say more to make it again."""
    if args.like is None:
        return {}
    made = jaxwan.read_settings(args.like)
    for name in made.get("inputs", []):
        if getattr(args, str(name), None) is None:
            flag = f"--{str(name).replace('_', '-')}"
            again = f"give {flag} again" if hasattr(args, str(name)) else "make it from Python again"
            raise ValueError(f"{args.like} was made from {name!r:.40}, which it does not hold: {again}")
    for name in [str(name) for name in made.get("components", []) if str(name) not in components(args)]:
        raise ValueError(
            f"{args.like} was made with a file for {name!r:.40}: say where it is, --component {name:.40}=…"
        )
    if (loras := made.get("loras")) and not args.lora:
        told = " ".join(f"--lora {flag_of(lora):.100}" for lora in loras if isinstance(lora, dict))
        raise ValueError(f"{args.like} was made with LoRAs: say where they are, {told:.400}")
    named = args.model is not None or args.component
    if not named and made.get("model") != jaxwan.open_checkpoint(jaxwan.BUNDLED_MODEL).name:
        raise ValueError(f"{args.like} was made with the model {made.get('model')!r:.200}: say where it is, --model …")
    return made


def flag_of(lora: dict[str, Any]) -> str:
    """What --lora says of a LoRA in settings, but for its folder."""
    expert = f"{lora['expert']}=" if lora.get("expert") else ""
    return f"{expert}{lora.get('file')}:{lora.get('strength', 1.0)}"


def dtypes(args: argparse.Namespace, made: dict[str, Any]) -> dict[str, Any]:
    """dtype and vae_dtype, if the flags or --like's file name any."""
    named = {name: getattr(args, name) or made.get(name) for name in ("dtype", "vae_dtype")}
    return {name: value for name, value in named.items() if value is not None}


def open_model(args: argparse.Namespace, made: dict[str, Any]) -> "jaxwan.Checkpoint":
    """The named checkpoint, or the bundled one; that of --like's file in the variant that made it."""
    model = args.model
    if model is None and not args.component:
        log.info("no --model: the tiny bundled one, which knows coloured shapes that move over a background")
        model = jaxwan.BUNDLED_MODEL
    loras = [jaxwan.Lora.parse(text) for text in args.lora]
    checkpoint = jaxwan.open_checkpoint(model, args.variant, components(args), loras)
    if args.variant is None and made.get("model") == checkpoint.name:
        return jaxwan.open_checkpoint(checkpoint, made.get("variant"))
    return checkpoint


def components(args: argparse.Namespace) -> dict[str, str]:
    """The files of --component by name. Raises ValueError for one that is no NAME=FILE, or a name twice."""
    named: dict[str, str] = {}
    for text in args.component:
        name, equals, file = text.partition("=")
        if not equals or not file or name in named:
            again = f"names {name} again" if name in named else "is no NAME=FILE"
            raise ValueError(f"--component {text} {again}: such as --component vae=wan_2.1_vae.safetensors")
        named[name] = file
    return named


def example_prompt(args: argparse.Namespace, checkpoint: "jaxwan.Checkpoint") -> str:
    """The bundled model's example, for those who gave no prompt. Raises ValueError for a model that was named."""
    example = checkpoint.defaults.example_prompt
    if args.model is not None or args.component or example is None:
        raise ValueError('--prompt is missing (an empty one, --prompt "", is allowed)')
    log.info("no --prompt: %r", example)
    return example


# Results


class Saved(NamedTuple):
    """Where a file is, if it is anywhere, and what went wrong."""

    path: Path | None
    error: str | None = None


def output_path(args: argparse.Namespace, job: "jaxwan.Job") -> Path:
    """Where the video goes; several go beside it."""
    if args.output is not None:
        return Path(args.output)
    alone = len(job.requests) == 1  # several say their own seeds
    seed = jaxwan.seed_label(job.settings()[0]["call"], in_file_name=True) if alone else ""
    return Path(f"outputs/{datetime.now():%Y%m%d-%H%M%S}{seed}{'.png' if job.size[0] == 1 else '.mp4'}")


def compression(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `Output.save` that change what is lost of a video."""
    return {"crf": args.crf, "x264_preset": args.x264_preset}


def check_npz(args: argparse.Namespace, targets: list[Path]) -> None:
    """--save-npz can be written, and is no other file of this run. Raises ValueError or OSError."""
    if args.save_npz is None:
        return
    if jaxwan.check_writable(args.save_npz, args.overwrite) in targets:
        raise ValueError(f"--save-npz {args.save_npz} is also where the video goes: choose another name")


def write(
    args: argparse.Namespace, pipe: "jaxwan.WanPipeline", output: "jaxwan.Output", targets: list[Path]
) -> tuple[list[Saved], float]:
    """Each video of an output of latents while it is decoded, then the arrays; and the seconds of decoding alone.

    What cannot be written where it was asked for goes elsewhere, of a video at least its latents, and costs no other.
    """
    saved, decoded, seconds = [], [], 0.0
    for i, path in enumerate(targets):
        file, video = write_video(args, pipe, output[i], path)
        saved.append(file)
        seconds += video.seconds.get("decode", 0.0)
        if args.save_npz is not None:
            decoded.append(video)
    if args.save_npz is not None:
        whole = all(video.frames is not video.latents for video in decoded)
        arrays = replace(output, frames=[frames for video in decoded for frames in video.frames])
        saved.append(save(Path(args.save_npz), lambda p: arrays.save_npz(p, overwrite=args.overwrite, frames=whole)))
    return saved, seconds


def write_video(
    args: argparse.Namespace, pipe: "jaxwan.WanPipeline", video: "jaxwan.Output", path: Path
) -> tuple[Saved, "jaxwan.Output"]:
    """Decode a video and write it, else its latents; the video as far as it came. Of frames that --save-npz is to have
    too, all are there first; otherwise no more than are being written."""
    told = {"overwrite": args.overwrite, "metadata": not args.no_metadata} | compression(args)
    decoded = video

    def write_decoding(target: Path) -> None:
        nonlocal decoded
        decoded = pipe.decode(video, save={"path": target} | told)

    try:
        if args.save_npz is not None:
            decoded = pipe.decode(video)
        file = save(path, write_decoding if args.save_npz is None else lambda p: decoded.save(p, **told))
    except Exception as error:  # such as for want of memory
        file = Saved(None, f"{path} could not be decoded ({reason(error)})")
    if file.path is not None:
        return file, decoded
    latents = save(path.with_suffix(".npz"), lambda p: video.save_npz(p, overwrite=False, frames=False))
    kept = "and neither could its latents" if latents.path is None else f"its latents are {latents.path}"
    return Saved(None, f"{file.error}; {kept}"), decoded


def save(path: Path, write: Callable[[Path], Any]) -> Saved:
    """Write a file as `path`, else into the working folder, else into the one for temporary files."""
    said = None
    places = (
        lambda: path,
        lambda: Path.cwd() / path.name,
        lambda: Path(tempfile.gettempdir(), f"{os.getpid()}-{path.name}"),
    )
    for place in places:
        try:
            target = place()
            if said is None or not target.exists():
                write(target)
                return Saved(target, said and f"{said}: it is {target}")
        except OSError as error:
            said = said or f"{path} could not be written ({reason(error)})"
        except Exception as error:  # whatever it is: computing what would be lost may have taken hours
            said = said or f"{path} could not be made ({reason(error)})"
            break  # for it would be no other in another place
    return Saved(None, said)


def reason(error: Exception) -> str:
    """What went wrong, in a line."""
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__


def described(call: dict[str, Any]) -> str:
    """One video in a line, by the call that makes it again."""
    size, fps, prompt = f"{call['width']}x{call['height']}", call["fps"], shorten(call["prompt"], 80, placeholder="…")
    frames = f"{call['num_frames']} frames at {fps:g} fps" if call["num_frames"] > 1 else "1 frame"
    return ", ".join(filter(None, (size, frames, jaxwan.seed_label(call)))) + f": {prompt!r}"


def tell_end(
    args: argparse.Namespace, output: "jaxwan.Output", saved: list[Saved], seconds: dict[str, float], pipe: Any
) -> None:
    """Where everything is, and how long it took: the phases, and what is in none of them, add up to the wall time."""
    videos = list(zip(saved, output.settings, strict=False))  # the arrays' file comes last
    if not args.json:
        for file, made in videos:
            if file.path is not None:
                print(file.path if args.quiet else f"{file.path}  {described(made['call'])}", flush=True)
    total = time.perf_counter() - START
    seconds["other"] = total - sum(seconds.values())
    times = ", ".join(f"{name} {taken:.1f}" for name, taken in seconds.items())
    log.info("seconds: %.1f = %s  (%r)", total, times, pipe)
    errors = [file.error for file in saved if file.error is not None]
    for error in errors:
        tell_error(error, as_json=False)
    if args.json:
        files = [{"path": file.path and str(file.path)} | made for file, made in videos]
        npz = str(saved[-1].path) if args.save_npz is not None and saved[-1].path else None
        print(json.dumps({
            "files": files, "npz": npz, "mesh": args.mesh, "ulysses": args.ulysses,
            "seconds": {"total": total} | seconds,
        } | ({"error": "; ".join(errors)} if errors else {}), indent=2))  # fmt: skip


# Flags


def sides(text: str) -> tuple[int, int]:
    """Width and height of "256x192"."""
    width, x, height = text.partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no width and height, such as 256x256")
    return int(width), int(height)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )  # fmt: skip
    many: dict[str, Any] = {"action": "append"}  # once, or once per prompt

    what = parser.add_argument_group("what to show")
    what.add_argument("--prompt", **many, help="what the video shows; repeat for a batch")
    what.add_argument("--negative-prompt", **many, help="what it should not show [per prompt]")
    what.add_argument("--official-negative-prompt", action="store_true", help="Wan's published negative prompt")
    what.add_argument("--image", **many, help="first frame, for image-to-video models and TI2V [per prompt]")
    what.add_argument("--last-image", **many, help="last frame, for models that take one [per prompt]")
    what.add_argument("--video", **many,
                      help="source of video to video, for models without image channels [per prompt]")  # fmt: skip
    what.add_argument("--strength", type=float, help="how far video to video goes from the source, (0, 1]; default 0.8")
    what.add_argument("--like", metavar="FILE",
                      help="an mp4, webm, gif or png made here: with its prompt, seed and settings")  # fmt: skip

    size = parser.add_argument_group("size (defaults: the model card's; with an image or video, its aspect ratio)")
    size.add_argument("--height", type=int, help="pixels, a multiple of 16 (TI2V-5B: 32)")
    size.add_argument("--width", type=int, help="pixels, a multiple of 16 (TI2V-5B: 32)")
    size.add_argument("--fit", help="how an image or video of another shape is brought to it: stretch, the default, "
                      "crop its middle, or pad it with black")  # fmt: skip
    size.add_argument("--num-frames", type=int, help="4k+1, such as 81; 1 makes a picture")
    size.add_argument("--fps", type=float, help="frames a second of the written video")
    size.add_argument("--num-videos-per-prompt", type=int, help="default 1")
    size.add_argument("--index", type=int, metavar="N",
                      help="of the first video of each seed: --index 2 makes the third alone; default 0")  # fmt: skip

    how = parser.add_argument_group("sampling (defaults: the preset's, which are the checkpoint's unless named)")
    how.add_argument("--preset", metavar="NAME",
                     help="diffusers, the default: what the checkpoint says; official: as Wan's own repository "
                          "samples; lightx2v-4step, fastwan-3step, self-forcing-4step: for weights distilled for few "
                          "steps; what a flag below says goes before it (docs/samplers.md)")  # fmt: skip
    how.add_argument("--num-inference-steps", **many, type=int, help="denoising steps, 1 to 128 [per prompt]")
    how.add_argument("--sampler", **many, help="unipc, euler, dpm++2m, renoise (docs/samplers.md) [per prompt]")
    how.add_argument("--flow-shift", **many, type=float, help="moves the steps towards noise, such as 3 [per prompt]")
    how.add_argument("--sigma-schedule", **many, metavar="NAME",
                     help="where noise levels lie: diffusers (the sampler's own, the default), original, even, or "
                          "lookup, of --timesteps [per prompt]")  # fmt: skip
    how.add_argument("--timesteps", nargs="+", type=float,
                     help="for --sampler renoise or euler: such as 1000 757 522")  # fmt: skip
    how.add_argument("--guidance-scale", **many, type=float,
                     help="pull towards the prompt, of the high-noise expert if two; 1: off [per prompt]")  # fmt: skip
    how.add_argument("--guidance-scale-2", **many, type=float, help="of the low-noise expert [per prompt]")
    how.add_argument("--boundary-ratio", type=float, help="where the low-noise expert takes over, such as 0.875")
    how.add_argument("--max-sequence-length", type=int, metavar="ROWS",
                     help="rows of each text that the model sees, 1 to 512; default 512, as in training")  # fmt: skip
    how.add_argument("--seed", **many, type=int, help="of the noise; drawn and told when not given [per prompt]")
    how.add_argument("--latents", metavar="FILE.npy", help="unit noise to start from, (B, C, T, h, w)")

    where = parser.add_argument_group("where and with what")
    where.add_argument("--model",
                       help="folder in the Diffusers or original layout or of ComfyUI's files, a DiT's file with the "
                            "other parts beside it, or Hugging Face id; default: the tiny bundled one")  # fmt: skip
    where.add_argument("--component", action="append", default=[], metavar="NAME=FILE",
                       help="read a part from a file in any layout (docs/checkpoints.md): transformer, transformer_2, "
                            "vae, text_encoder, image_encoder, or tokenizer (a folder); on the hub: "
                            "owner/name:PATH; repeatable, over --model or alone")  # fmt: skip
    where.add_argument("--lora", action="append", default=[], metavar="[high=|low=]FILE[:STRENGTH]",
                       help="merge a LoRA while loading, FILE:0.8 less strongly; into the expert that is said, or "
                            "that its name says (high_noise, _LOW), else all; repeatable")  # fmt: skip
    where.add_argument("--variant", metavar="NAME",
                       help="of the weights files: fp16 reads diffusion_pytorch_model.fp16.safetensors")  # fmt: skip
    where.add_argument("--mesh", default="pp=1",
                       help="devices by axis, such as cfg=2,pp=4: pp spreads the layers, for memory; cfg=2 prompt and "
                            "negative prompt, sp tokens, tp heads, for speed; dp videos, for throughput; default "
                            "%(default)s")  # fmt: skip
    where.add_argument("--ulysses", type=int, metavar="N",
                       help="how many of sp's devices trade tokens for heads; the rest pass keys and values round, as "
                            "all do with 1; default: as many as divide the heads")  # fmt: skip
    where.add_argument("--vae-devices", type=int, metavar="N",
                       help="devices of the VAE's own, beside the mesh's; default: it is on the mesh's")  # fmt: skip
    where.add_argument(
        "--dtype", help="of DiT and text encoder: bfloat16 or float32; default bfloat16, on a CPU float32"
    )
    where.add_argument("--vae-dtype", help="bfloat16 or float32, the default")
    where.add_argument("--vae-tiling", nargs="?", const="on", choices=("on", "auto", "off"),
                       help="code frames in overlapping tiles, for less memory and the result of Diffusers' tiling; "
                            "auto: only what does not fit otherwise")  # fmt: skip
    where.add_argument("--vae-tile", type=sides, metavar="WxH", help="pixels of a tile; default 256x256")
    where.add_argument("--vae-stride", type=sides, metavar="WxH",
                       help="pixels from a tile to the next, half of it or more; default 192x192")  # fmt: skip
    where.add_argument("--no-compilation-cache", action="store_true",
                       help="keep no compiled programs for later runs; so does JAXWAN_COMPILATION_CACHE=0")  # fmt: skip
    where.add_argument("--check", action="store_true",
                       help="read all weights once before: are they as they were converted, and is none NaN or "
                            "infinite?")  # fmt: skip
    where.add_argument("--dry-run", action="store_true",
                       help="only say what it would take, and check the weights' headers; exits with 3 if it does "
                       "not fit")  # fmt: skip
    where.add_argument("--device-memory", help="for --dry-run: an accelerator's memory, such as 80GB")

    out = parser.add_argument_group("results")
    out.add_argument("-o", "--output", metavar="NAME",
                     help="NAME.mp4, .webm or .gif, or .png for one frame; several videos get their place and seed: "
                          "NAME-0-seed7.mp4; default: outputs/TIME-seed7.mp4 (.png)")  # fmt: skip
    out.add_argument("--overwrite", action="store_true", help="replace files that exist")
    out.add_argument("--crf", type=int, metavar="N", help="quality of mp4, 1 (best, largest) to 51, default 18, and of "
                     "webm, to 63, default 15: the eye sees no loss")  # fmt: skip
    out.add_argument("--x264-preset", metavar="NAME", help="of mp4: superfast, the default, keeps up with decoding; "
                     "medium, slow, … make smaller files, ultrafast larger ones")  # fmt: skip
    out.add_argument("--no-metadata", action="store_true", help="write no prompt and settings into the file")
    out.add_argument("--save-npz", metavar="FILE", help="also write latents and frames as float32 arrays")
    out.add_argument("--json", action="store_true", help="print one JSON object: files with their settings, and "
                     "seconds; or the dry run's report; or the error")  # fmt: skip
    out.add_argument("-q", "--quiet", action="store_true", help="print names of files and errors alone")
    out.add_argument("--version", action="version", version=f"jaxwan {jaxwan.__version__}")
    args = parser.parse_args(argv)
    if args.device_memory is not None and not args.dry_run:
        parser.error("--device-memory is for --dry-run: add it, or leave this out")
    return args


if __name__ == "__main__":
    jaxwan.end_on_signals()
    status = main()
    if status != 0:  # a thread may still compile what nothing waits for any more, except Python's exit
        os._exit(status)
    sys.exit()
