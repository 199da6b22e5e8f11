"""Convert checkpoints between layouts, say what they are, and compare them.

    python scripts/convert.py inspect SRC                      what it is, without reading the weights
    python scripts/convert.py convert SRC… DST --to LAYOUT     write it as diffusers, original or orbax
    python scripts/convert.py verify A B                       whether two hold the same numbers, in whatever layouts
    python scripts/convert.py verify A                         whether it is as it was converted

SRC is whatever the pipeline opens: a folder in the Diffusers layout, of an original repository or of Orbax's, a Hugging
Face id, or files, which are told apart by what they hold:

    python scripts/convert.py convert ./Wan2.2-T2V-A14B ./t2v-diffusers --to diffusers --dtype bfloat16
    python scripts/convert.py convert wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors \\
        wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors wan_2.1_vae.safetensors umt5_xxl_fp16.safetensors \\
        ./t2v-orbax --component tokenizer=./umt5-xxl --to orbax --dtype bfloat16

`convert.py VERB --help` lists the flags of a verb.
"""

import argparse
import contextlib
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxwan.commands.terminal import Parser, Told, named_files, tell_error, tell_on_stderr

log = logging.getLogger("jaxwan.convert")
DIFFERS = 1


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, 1 after what went wrong or differs was told, 2 after bad flags."""
    with contextlib.redirect_stdout(Told(sys.stdout)) as out, contextlib.redirect_stderr(Told(sys.stderr)) as err:
        verb, args = parse(sys.argv[1:] if argv is None else argv)
        with warnings.catch_warnings():
            tell_on_stderr(quiet=args.quiet)
            try:
                status = verb(args)
            except (ValueError, OSError) as error:
                tell_error(str(error), as_json=args.json)
                status = 1
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                status = 130
        out.flush()
        err.flush()
    return status


# The verbs; what they need is imported when they run, because JAX takes seconds to start


def convert(args: argparse.Namespace) -> int:
    """Write a checkpoint in another layout."""
    from jaxwan.convert.lora import Lora
    from jaxwan.pipelines import conversion
    from jaxwan.pipelines.checkpoint import ensure_weights
    from jaxwan.pipelines.folders import check_target
    from jaxwan.pipelines.inspection import amount
    from jaxwan.pipelines.load import parse_dtype
    from jaxwan.pipelines.opening import open_sources

    *sources, target = args.paths
    if not sources:
        raise ValueError(f"{target} is read or written? Give what to read, and behind it the folder to write")
    dtype = parse_dtype("--dtype", args.dtype, conversion.DTYPES)
    loras = [Lora.parse(text) for text in args.lora]
    checkpoint = open_sources(sources, args.variant, named_files(args.component), loras)
    ensure_weights(checkpoint)
    planned = conversion.plan_conversion(checkpoint, args.to, dtype=dtype, shard_size=size(args.shard_size))
    target = Path(target)
    check_target(target, conversion.sources_of(checkpoint), args.overwrite)
    if args.dry_run:
        free = shutil.disk_usage(target.parent).free
        report = described(planned) | {"free_bytes": free, "fits": planned.num_bytes < free}
        print(json.dumps(report, indent=2) if args.json else told(planned, free))
        return 0
    log.info("%s, %s, %s to write", checkpoint.name, checkpoint.variant.name, amount(planned.num_bytes))
    with progress(args, "convert", planned.num_bytes) as update:
        conversion.convert(planned, target, overwrite=args.overwrite, progress=update)
    print(json.dumps(described(planned) | {"folder": str(target)}, indent=2) if args.json else target)
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Say what a source is; 1 if a part of it cannot be loaded."""
    from jaxwan.pipelines.inspection import inspect_checkpoint, inspect_file, table
    from jaxwan.pipelines.opening import open_sources

    only = Path(args.paths[0]) if len(args.paths) == 1 and not args.component else None
    if only is not None and (only.is_file() or is_part(only)):
        found = inspect_file(only)
    else:
        found = inspect_checkpoint(open_sources(args.paths, args.variant, named_files(args.component)))
    print(json.dumps(found.as_json(), indent=2) if args.json else table(found))
    return 0 if found.loads else 1


def verify(args: argparse.Namespace) -> int:
    """Compare two sources, or one with its checksums; 1 if they differ."""
    from jaxwan.convert.verify import SUMS, check_sums, compare, count_compared
    from jaxwan.pipelines.opening import open_components

    if args.b is None:
        folder = Path(args.a)
        if not (folder / SUMS).is_file():
            raise FileNotFoundError(
                f"{folder} has no {SUMS}, which a converted folder has: give another to compare with"
            )
        total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        with progress(args, "verify", total) as update:
            count = check_sums(folder, update)
        print(json.dumps({"same": True, "files": count}) if args.json else f"{folder}: {count} files are as written")
        return 0
    if args.tolerance is not None and not 0 <= args.tolerance < 1:
        raise ValueError(f"--tolerance {args.tolerance} is no share of a tensor's largest number, such as 0.01")
    if args.most < 0:
        raise ValueError(f"--most {args.most} is no number of tensors: give 0 or more")
    a, b = (open_components(source, args.variant) for source in (args.a, args.b))
    with progress(args, "verify", count_compared(a, b)) as update:
        found = compare(a, b, args.tolerance, update)
    if args.json:
        report = {"same": found.same, "equal": found.equal, "only_a": found.only_a, "only_b": found.only_b}
        print(json.dumps(report | {"different": [item._asdict() for item in found.different]}, indent=2))
        return 0 if found.same else DIFFERS
    for item in found.different[: args.most]:
        print(f"{item.component}: {item.a} differs ({item.b}): {item.told}")
    for side, names in ((args.a, found.only_a), (args.b, found.only_b)):
        for name in names[: args.most]:
            print(f"only in {side}: {name}")
    counts = len(found.different), len(found.only_a) + len(found.only_b)
    print(f"{found.equal} tensors are the same, {counts[0]} differ, {counts[1]} are in one alone")
    return 0 if found.same else DIFFERS


def is_part(path: Path) -> bool:
    """Whether a folder is of one component alone."""
    return path.is_dir() and (path / "config.json").is_file() and (path.parent / "model_index.json").is_file()


def size(text: str) -> int:
    """Bytes of "5GB". Raises ValueError."""
    from jaxwan.pipelines.dry_run import parse_memory

    return parse_memory(text, "--shard-size") or 0


def progress(args: argparse.Namespace, name: str, total: int) -> Any:
    """A bar, or lines, of so many bytes."""
    from jaxwan.pipelines.progress import Progress

    return Progress(visible=not args.quiet).phase(name, total, "B")


def described(planned: Any) -> dict[str, Any]:
    """A conversion, for programs."""
    files = [{"name": file.name, "bytes": file.num_bytes} for file in planned.files]
    return {"layout": planned.layout, "bytes": planned.num_bytes, "dtypes": planned.dtypes, "files": files}


def told(planned: Any, free: int) -> str:
    """A conversion that is not done, for people: folders with what they take, and dtypes."""
    from jaxwan.pipelines.inspection import amount

    folders: dict[str, list[int]] = {}
    for file in planned.files:
        folders.setdefault(file.name.split("/")[0] if "/" in file.name else ".", []).append(file.num_bytes)
    lines = [f"{name}: {len(n)} file{'s' * (len(n) > 1)}, {amount(sum(n))}" for name, n in folders.items()]
    for name, changes in planned.dtypes.items():
        lines.append(f"{name}: " + ", ".join(f"{count} tensors {change}" for change, count in changes.items()))
    enough = "enough" if planned.num_bytes < free else "not enough"
    return "\n".join([*lines, f"{amount(planned.num_bytes)} to write, {amount(free)} free: {enough}"])


# Flags


def parse(argv: list[str]) -> tuple[Callable[[argparse.Namespace], int], argparse.Namespace]:
    """The verb and its flags; each has a parser of its own."""
    verbs: dict[str, Callable[[argparse.Namespace], int]] = {"convert": convert, "inspect": inspect, "verify": verify}
    if argv and argv[0] in verbs:
        parser = Parser(prog=f"convert.py {argv[0]}", description=verbs[argv[0]].__doc__, allow_abbrev=False)
        FLAGS[argv[0]](parser)
        parser.add_argument("--variant", metavar="NAME", help="of the weights files, such as fp16")
        parser.add_argument("--json", action="store_true", help="print one JSON object; or the error")
        parser.add_argument("-q", "--quiet", action="store_true", help="no bars and notes")
        return verbs[argv[0]], parser.parse_args(argv[1:])
    parser = Parser(
        prog="convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("verb", choices=verbs, help="what to do")
    parser.parse_args(argv or ["--help"])
    raise AssertionError("a verb that is none has ended the command")


def _convert_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="SRC… DST",
                        help="what to read, a folder, hub id or files, and behind it the folder to write")  # fmt: skip
    parser.add_argument("--to", required=True, choices=("diffusers", "original", "orbax"), help="the layout to write")
    parser.add_argument("--dtype", help="of DiT and text encoder: bfloat16, float16 or float32, but for what Diffusers "
                        "keeps in float32; default: as it is stored (needed where that is fp8)")  # fmt: skip
    parser.add_argument("--shard-size", default="5GB", help="of a safetensors file, at most; default %(default)s")
    _component_flag(parser)
    parser.add_argument("--lora", action="append", default=[], metavar="[high=|low=]FILE[:STRENGTH]",
                        help="merge a LoRA into what is written, as scripts/generate.py does; repeatable")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="only say what would be written")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that was converted before")


def _inspect_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="SRC", help="a folder, hub id or files")
    _component_flag(parser)


def _verify_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a folder, hub id or file")
    parser.add_argument("b", metavar="B", nargs="?", help="another; without, A is held against its checksums")
    parser.add_argument("--tolerance", type=float, metavar="X",
                        help="by how much numbers may differ, as a share of their tensor's largest, such as 0.01; "
                        "default: not at all")  # fmt: skip
    parser.add_argument("--most", type=int, default=10, metavar="N",
                        help="tensors that are named; default %(default)s")  # fmt: skip


def _component_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--component", action="append", default=[], metavar="NAME=FILE",
                        help="a file for a part: transformer, transformer_2, vae, text_encoder, image_encoder, or "
                        "tokenizer (a folder); repeatable")  # fmt: skip


FLAGS = {"convert": _convert_flags, "inspect": _inspect_flags, "verify": _verify_flags}
