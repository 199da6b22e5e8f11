"""Generate a video with a Wan checkpoint on a mesh of devices.

Without --model, the tiny bundled model paints coloured shapes that move over a background:

    python scripts/generate.py --mesh pp=4
    python scripts/generate.py --prompt "a small yellow star goes up on a blue background"

With real weights (a Diffusers-layout folder or a Hugging Face id):

    python scripts/generate.py --mesh pp=4 --model Wan-AI/Wan2.2-T2V-A14B-Diffusers --prompt "a red kite over a beach"
    python scripts/generate.py --mesh pp=2 --model FOLDER --image first.png --prompt "the boat sails away"
    python scripts/generate.py --mesh pp=2 --model FOLDER --dry-run --device-memory 80GB
    python scripts/generate.py --mesh auto --model FOLDER --dry-run --devices 8 --chip H100

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
import time
import warnings
from collections.abc import Iterator
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
    from jaxwan.commands.running import Call, File, Runs, Stopped, reason, save
    from jaxwan.commands.terminal import Parser, Told, named_files, tell_above_bar, tell_error, tell_on_stderr
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}: install it first, by `pip install -e .` in the clone")

log = logging.getLogger("jaxwan.generate")
DOES_NOT_FIT = 3
SLOTS = 4  # of several calls, videos that are denoised at a time
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
    saved = None if args.resume is None else resumed(args)
    if saved is not None:
        check_model(args, saved.made_by, args.resume)
    made = like(args) if saved is None else saved.made_by
    checkpoint = open_model(args, made)
    if saved is None:
        calls = calls_of(args, checkpoint, made)
    else:
        calls = [Call(job, {}, [], f"call {i}") for i, job in enumerate(saved.jobs(checkpoint))]
    if args.no_compilation_cache:
        os.environ["JAXWAN_COMPILATION_CACHE"] = "0"
    videos = [request for call in calls for request in call.job.requests]
    alone = saved is None and args.prompts_file is None
    slots = args.slots or (len(videos) if alone else min(SLOTS, len(videos)))
    first = calls[0].job.requests
    seconds = {"start": time.perf_counter() - START}
    pipe = jaxwan.WanPipeline.from_pretrained(
        checkpoint, args.mesh, ulysses=args.ulysses, vae_devices=args.vae_devices,
        warmup=replace(calls[0].job, requests=(first * slots)[: max(slots, len(first))]),
        check=args.check, progress=not args.quiet, **dtypes(args, made),
    )  # fmt: skip
    seconds |= pipe.seconds
    with Runs(pipe, slots=slots, save=args.save, save_every=args.save_every) as runs:
        try:
            return (run_one if alone else run_many)(args, runs, calls, saved, seconds)
        except Stopped as stopped:
            left = f"{stopped.calls} call{'s' * (stopped.calls != 1)}"
            log.info("%s saved: --resume %s goes on", left if stopped.calls else "nothing is left to be", args.save)
            return 128 + stopped.number


def run_one(
    args: argparse.Namespace, runs: Runs, calls: list[Call], saved: None, seconds: dict[str, float]
) -> int:  # fmt: skip
    """Make the videos of a single call, and tell where they are at the end."""
    progress, npz = jaxwan.Progress(visible=not args.quiet), []
    (handle,) = runs.submit(calls, compression(args), frames=args.save_npz is not None, progress=progress)
    runs.follow_one(handle, progress)
    output = handle.result()  # raises what went wrong
    start = time.perf_counter()
    if args.save_npz is not None:
        npz = [save(Path(args.save_npz), lambda p: output.save_npz(p, overwrite=args.overwrite))]
    runs.forget()
    for name, taken in (progress.seconds | {"write": progress.seconds["write"] + time.perf_counter() - start}).items():
        seconds[name] = seconds.get(name, 0.0) + taken
    results = [Result(file, made) for file, made in zip(runs.files(handle), output.settings, strict=True)]
    if not args.json:
        tell_files(args, results)
    return tell_end(args, runs, results, seconds, npz)


def run_many(
    args: argparse.Namespace, runs: Runs, calls: list[Call], saved: "jaxwan.SavedCalls | None",
    seconds: dict[str, float],
) -> int:  # fmt: skip
    """Make the videos of several calls, and tell of each as soon as it is over; what goes wrong with one is its own."""
    progress = jaxwan.Progress(visible=not args.quiet)
    handles = runs.submit(calls, compression(args)) if saved is None else runs.restore(saved)
    names = {handle: call.name for handle, call in zip(handles, calls, strict=True)}
    results: dict[jaxwan.Handle, list[Result]] = {}
    for handle in runs.follow(handles, progress):
        try:
            made = handle.result().settings
            files = runs.files(handle)
        except Exception as error:  # costs no other
            made = handle.job.settings()
            files = [File(None, reason(error))] * len(made)
        for message in dict.fromkeys(file.error for file in files if file.error is not None):
            log.error("error: %s: %s", names[handle], message)
        results[handle] = [Result(*pair, names[handle]) for pair in zip(files, made, strict=True)]
        if not args.json:
            tell_files(args, results[handle], above_bar=True)
    runs.forget()
    for name, taken in progress.seconds.items():
        seconds[name] = seconds.get(name, 0.0) + taken
    return tell_end(args, runs, [result for handle in handles for result in results[handle]], seconds, [])


# From flags to a call


def calls_of(args: argparse.Namespace, checkpoint: "jaxwan.Checkpoint", made: dict[str, Any]) -> list[Call]:
    """What is to be run, each call checked, with where its videos go; its notes are told."""
    call = arguments(args, made)
    if args.save is not None:
        jaxwan.SavedCalls.check_folder(args.save)
    if args.prompts_file is not None:
        return calls_in_file(args, checkpoint, made, call)
    if "prompt" not in call:
        call["prompt"] = example_prompt(args, checkpoint)
    choose_tiling(args, checkpoint, made, call)
    job = jaxwan.make_job(checkpoint, **call)
    targets = jaxwan.check_save(job, output_path(args, job), overwrite=args.overwrite, **losses(args))
    check_npz(args, targets)
    for note in job.sampling + job.notes:
        log.info(note)
    return [Call(job, call, targets)]


def calls_in_file(
    args: argparse.Namespace, checkpoint: "jaxwan.Checkpoint", made: dict[str, Any], flags: dict[str, Any]
) -> list[Call]:  # fmt: skip
    """The calls of --prompts-file, a line each, for which flags say what it leaves out. Raises ValueError that names
    the line."""
    calls, taken = [], {}
    place, now = 0, datetime.now()
    for number, line in lines_of(args.prompts_file):
        name = f"line {number}"
        try:
            given = read_line(line)
            output = given.pop("output", None)
            call = merged(flags, given)
            if "tiling" not in given:
                choose_tiling(args, checkpoint, made, call)
            job = jaxwan.make_job(checkpoint, **call)
            path = place_of(args, job, place, now) if output is None else output
            targets = jaxwan.check_save(job, path, overwrite=args.overwrite, **losses(args))
        except (ValueError, OSError, TypeError) as error:
            raise ValueError(f"{args.prompts_file}, {name}: {error}") from error
        for target in targets:
            if (other := taken.setdefault(os.path.abspath(target), name)) != name:
                raise ValueError(f"{args.prompts_file}, {name}: {target} is also where a video of {other} goes")
        for note in job.notes:
            log.info("%s: %s", name, note)
        calls.append(Call(job, call, targets, name))
        place += 1
    if not calls:
        raise ValueError(f"{args.prompts_file} has no line with a call: {EXAMPLE_LINE}")
    return calls


EXAMPLE_LINE = 'such as {"prompt": "a red star", "seed": 7, "output": "star.mp4"}'


def lines_of(path: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines of a file that are not blank."""
    try:
        text = Path(path).expanduser().read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})") from error
    for number, line in enumerate(text.split("\n"), 1):  # other separators of lines may be in texts
        if line.strip():
            yield number, line


def read_line(line: str) -> dict[str, Any]:
    """A call's arguments. Raises ValueError for what is no JSON object."""
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({error}): {EXAMPLE_LINE}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{shorten(line.strip(), 40)!r} is no JSON object of a call's arguments, {EXAMPLE_LINE}")
    if not isinstance(given.get("output"), str | None):
        raise ValueError(f"output={given['output']!r:.40} is no name of a file")
    return {name: value for name, value in given.items() if value is not None}


def place_of(args: argparse.Namespace, job: "jaxwan.Job", place: int, now: datetime) -> Path:
    """Where a line's videos go that names no output: beside --output, with their place and seed."""
    path = Path(args.output or f"outputs/{now:%Y%m%d-%H%M%S}{'.png' if job.size[0] == 1 else '.mp4'}")
    settings = job.settings()
    seed = jaxwan.seed_label(settings[0]["call"], in_file_name=True) if len(settings) == 1 else ""
    return path.with_stem(f"{path.stem}-{place}{seed}")


def resumed(args: argparse.Namespace) -> "jaxwan.SavedCalls":
    """What --resume goes on with; what is left is saved there again."""
    saved = jaxwan.SavedCalls.read(args.resume)
    if args.save is None:
        args.save = args.resume
    elif Path(args.save).absolute() != Path(args.resume).absolute():
        jaxwan.SavedCalls.check_folder(args.save)
    return saved.overwriting() if args.overwrite else saved


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
    return merged(made.get("call", {}), call)


def merged(before: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments, and of those that were given before what they leave."""
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
    return {name: before[name] for name in CALL if name in before and name not in stale | call.keys()} | call


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
        device_memory=args.device_memory, devices=args.devices, chip=args.chip,
        devices_per_host=args.devices_per_host, **dtypes(args, made), **call,
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
    check_model(args, made, args.like)
    return made


def check_model(args: argparse.Namespace, made: dict[str, Any], what: str) -> None:
    """The flags name the model that made something, unless it is the bundled one. Raises ValueError."""
    for name in [str(name) for name in made.get("components", []) if str(name) not in named_files(args.component)]:
        raise ValueError(f"{what} was made with a file for {name!r:.40}: say where it is, --component {name:.40}=…")
    if (loras := made.get("loras")) and not args.lora:
        told = " ".join(f"--lora {lora_flag(lora):.100}" for lora in loras if isinstance(lora, dict))
        raise ValueError(f"{what} was made with LoRAs: say where they are, {told:.400}")
    named = args.model is not None or args.component
    if not named and made.get("model") != jaxwan.open_checkpoint(jaxwan.BUNDLED_MODEL).name:
        raise ValueError(f"{what} was made with the model {made.get('model')!r:.200}: say where it is, --model …")


def lora_flag(lora: dict[str, Any]) -> str:
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
    checkpoint = jaxwan.open_checkpoint(model, args.variant, named_files(args.component), loras)
    if args.variant is None and made.get("model") == checkpoint.name:
        return jaxwan.open_checkpoint(checkpoint, made.get("variant"))
    return checkpoint


def example_prompt(args: argparse.Namespace, checkpoint: "jaxwan.Checkpoint") -> str:
    """The bundled model's example, for those who gave no prompt. Raises ValueError for a model that was named."""
    example = checkpoint.defaults.example_prompt
    if args.model is not None or args.component or example is None:
        raise ValueError('--prompt is missing (an empty one, --prompt "", is allowed)')
    log.info("no --prompt: %r", example)
    return example


# Results


class Result(NamedTuple):
    """A video's file, what made it, and of several calls which one it is of."""

    file: File
    made: dict[str, Any]
    call: str = ""


def output_path(args: argparse.Namespace, job: "jaxwan.Job") -> Path:
    """Where the video goes; several go beside it."""
    if args.output is not None:
        return Path(args.output)
    alone = len(job.requests) == 1  # several say their own seeds
    seed = jaxwan.seed_label(job.settings()[0]["call"], in_file_name=True) if alone else ""
    return Path(f"outputs/{datetime.now():%Y%m%d-%H%M%S}{seed}{'.png' if job.size[0] == 1 else '.mp4'}")


def losses(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `Output.save` that change what is lost of a video."""
    return {"crf": args.crf, "x264_preset": args.x264_preset}


def compression(args: argparse.Namespace) -> dict[str, Any]:
    """All arguments of `Output.save` but the path."""
    return {"overwrite": args.overwrite, "metadata": not args.no_metadata} | losses(args)


def check_npz(args: argparse.Namespace, targets: list[Path]) -> None:
    """--save-npz can be written, and is no other file of this run. Raises ValueError or OSError."""
    if args.save_npz is None:
        return
    if jaxwan.check_writable(args.save_npz, args.overwrite) in targets:
        raise ValueError(f"--save-npz {args.save_npz} is also where the video goes: choose another name")


def described(call: dict[str, Any]) -> str:
    """One video in a line, by the call that makes it again."""
    size, fps, prompt = f"{call['width']}x{call['height']}", call["fps"], shorten(call["prompt"], 80, placeholder="…")
    frames = f"{call['num_frames']} frames at {fps:g} fps" if call["num_frames"] > 1 else "1 frame"
    return ", ".join(filter(None, (size, frames, jaxwan.seed_label(call)))) + f": {prompt!r}"


def tell_files(args: argparse.Namespace, results: list[Result], *, above_bar: bool = False) -> None:
    """Where files are, on stdout, above a bar that is shown still."""
    for file, made, _ in results:
        if file.path is not None:
            line = str(file.path) if args.quiet else f"{file.path}  {described(made['call'])}"
            tell_above_bar(line) if above_bar else print(line, flush=True)


def tell_end(
    args: argparse.Namespace, runs: Runs, results: list[Result], seconds: dict[str, float], npz: list[File]
) -> int:
    """What went wrong and was not told yet, and how long it took: the phases, and what is in none of them, add up to
    the wall time; with --json where everything is. Returns the exit status."""
    total, mesh = time.perf_counter() - START, runs.engine.pipe.mesh
    seconds["other"] = total - sum(seconds.values())
    times = ", ".join(f"{name} {taken:.1f}" for name, taken in seconds.items())
    log.info("seconds: %.1f = %s  (%r)", total, times, runs.engine.pipe)
    wrong = [(result.call, result.file.error) for result in results] + [("", file.error) for file in npz]
    errors = list(dict.fromkeys(": ".join(filter(None, named)) for named in wrong if named[1] is not None))
    if not any(result.call for result in results):
        for error in errors:
            tell_error(error, as_json=False)
    if args.json:
        files = [
            {"path": file.path and str(file.path)} | ({"from": call, "error": file.error} if call else {}) | made
            for file, made, call in results
        ]
        arrays = str(npz[0].path) if npz and npz[0].path else None
        print(json.dumps({
            "files": files, "npz": arrays, "mesh": str(mesh), "ulysses": mesh.ulysses,
            "seconds": {"total": total} | seconds,
        } | ({"error": "; ".join(errors)} if errors else {}), indent=2))  # fmt: skip
    return 1 if errors else 0


# Flags


def sides(text: str) -> tuple[int, int]:
    """Width and height of "256x192"."""
    width, x, height = text.partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no width and height, such as 256x256")
    return int(width), int(height)


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def seconds_from(text: str) -> float:
    """Seconds between two saves, at least one."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 1 to 1000000")
    return value


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
                            "negative prompt, sp tokens, tp heads, for speed; dp videos, for throughput; auto: the "
                            "fastest that fits the devices here, by estimate; default %(default)s")  # fmt: skip
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
    where.add_argument("--devices", type=int, metavar="N",
                       help="for --dry-run --mesh auto: how many devices a machine has that is not here")  # fmt: skip
    where.add_argument("--chip", metavar="NAME",
                       help="with --devices: H100, H200, A100, 'RTX 4090', 'RTX 5090', 'TPU v5e', 'TPU v6e' or CPU; "
                            "without, times are relative")  # fmt: skip
    where.add_argument("--devices-per-host", type=int, metavar="N",
                       help="with --devices: how many share a host; Ethernet is between; default: all")  # fmt: skip

    calls = parser.add_argument_group("many prompts, stopping and going on (docs/many_prompts.md)")
    calls.add_argument("--prompts-file", metavar="FILE.jsonl",
                       help="a call a line: a JSON object of arguments by their names in Python, such as "
                            '{"prompt": "a red star", "num_frames": 33, "seed": 7, "output": "star.mp4"}; flags say '
                            "what a line leaves out, and what names no output goes beside --output")  # fmt: skip
    calls.add_argument("--slots", type=positive, metavar="N",
                       help="videos of the same size that are denoised together, each of which takes memory; default: "
                            "all of a single call, of several at most 4")  # fmt: skip
    calls.add_argument("--save", metavar="FOLDER",
                       help="the first Ctrl-C saves there what is not done yet, a second one ends without")  # fmt: skip
    calls.add_argument("--save-every", type=seconds_from, metavar="SECONDS",
                       help="also save in that folder while running")  # fmt: skip
    calls.add_argument("--resume", metavar="FOLDER",
                       help="go on with what was saved, to the same videos, on any mesh; what Ctrl-C leaves is saved "
                            "there again")  # fmt: skip

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
    for name in ("device_memory", "devices", "chip", "devices_per_host"):
        if getattr(args, name) is not None and not args.dry_run:
            parser.error(f"--{name.replace('_', '-')} is for --dry-run: add it, or leave this out")
    check_together(parser, args)
    return args


def check_together(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse flags that mean nothing beside each other."""
    several = [flag for flag in ("prompts_file", "save", "resume") if getattr(args, flag) is not None]
    for flag, name in (("save_npz", "--save-npz"), ("dry_run", "--dry-run")):
        if several and getattr(args, flag):
            parser.error(f"{name} is for a single call from its beginning to its end: leave {flag_of(several[0])} out")
    if args.save_every is not None and args.save is None and args.resume is None:
        parser.error("--save-every needs a folder: --save FOLDER")
    if args.resume is not None:
        decided = (*CALL, *"official_negative_prompt like prompts_file vae_tiling vae_tile vae_stride output crf "
                   "x264_preset no_metadata".split())  # fmt: skip
        for name in decided:
            if getattr(args, name, None) not in (None, False):
                parser.error(f"--resume goes on with what was saved as it was: leave {flag_of(name)} out")


def flag_of(name: str) -> str:
    """The flag of a name in the parsed ones."""
    return f"--{name.replace('_', '-')}"


if __name__ == "__main__":
    jaxwan.end_on_signals()
    status = main()
    if status != 0:  # a thread may still compile what nothing waits for any more, except Python's exit
        os._exit(status)
    sys.exit()
