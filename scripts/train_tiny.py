"""Train the bundled model from nothing, stage by stage, on a CPU or a GPU.

    python scripts/train_tiny.py all
    python scripts/train_tiny.py base --minutes 8    # train a while, save and stop; the same command goes on

States are saved every 10 minutes, on SIGTERM and on Ctrl-C. A stage that was stopped goes on where it was; without a
saved state it goes on from the weights in --output, if there are any.

Training can go on elsewhere. --pack writes the states and the model so far as files of at most 15 MiB, --unpack puts
them where they belong:

    python scripts/train_tiny.py --pack there --carry base                          # here; then carry the files over
    python scripts/train_tiny.py base --minutes 8 --unpack there --pack back        # on the other machine
    python scripts/train_tiny.py --unpack back                                      # here again

What was measured along the way is kept with the states:

    python scripts/train_tiny.py --curve
"""

import argparse
import sys
import time
from pathlib import Path

from jaxwan.tiny.pack import WRITTEN, pack, unpack
from jaxwan.tiny.stages import STAGES, Settings, learning_curve, train_stage
from jaxwan.tiny.training import state_folder


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 1 after bad input was explained in a sentence."""
    args = parse(argv)
    try:
        run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    """Unpack, train and pack, whichever is asked for."""
    for name in ("minutes", "scale"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} {value:g} must be positive")
    states = state_folder() if args.states is None else Path(args.states)
    settings = Settings(states, Path(args.output), args.scale, args.minutes, args.seed, args.dtype)
    if args.unpack is not None:
        _say("unpacked", unpack(Path(args.unpack), settings.states, settings.output))
    if args.stage is not None:
        train(args.stage, settings)
    if args.pack is not None:
        _say("packed", pack(settings.states, settings.output, Path(args.pack), args.carry))
    if args.curve:
        print(learning_curve(settings.states))


def train(stage: str, settings: Settings) -> None:
    """Train a stage, or all of them in turn until the minutes are over."""
    began = time.monotonic()
    for name in STAGES if stage == "all" else (stage,):
        if not train_stage(name, settings.since(began)):
            break


def _say(what: str, steps: dict[str, int]) -> None:
    states = ", ".join(f"{stage} at step {step}" for stage, step in steps.items())
    print(f"{what} {states or 'no state'}, and the model so far", file=sys.stderr)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("all", *STAGES), nargs="?", help="what to train")
    parser.add_argument("--minutes", type=float, help="stop after so many, the stage done or not; default: when done")
    parser.add_argument("--scale", type=float, default=1.0, help="times the planned steps; default %(default)s")
    parser.add_argument(
        "--output", metavar="DIR", default="outputs/tiny", help="the model's folder; default %(default)s"
    )
    parser.add_argument("--states", metavar="DIR", help="folder of the saved states; default: in the user's cache")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="of the denoiser's matrix products; default %(default)s")  # fmt: skip
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of all that is drawn, the same whenever training goes on; default %(default)s",
    )
    parser.add_argument("--unpack", metavar="DIR", help="before anything else, take over what --pack wrote there")
    parser.add_argument("--pack", metavar="DIR", help="at the end, write states and model there, in small files")
    parser.add_argument("--carry", metavar="STAGE", nargs="+", choices=tuple(WRITTEN), default=tuple(WRITTEN),
                        help="pack the states of these stages only; default: all there are")  # fmt: skip
    parser.add_argument("--curve", action="store_true", help="print what was measured along the trainings, as Markdown")
    args = parser.parse_args(argv)
    if not (args.stage or args.unpack or args.pack or args.curve):
        parser.error(f"name a stage ({', '.join(('all', *STAGES))}), or --pack, --unpack or --curve")
    return args


if __name__ == "__main__":
    sys.exit(main())
