"""Draw the pipeline ring's schedule: ticks across, a row for each stage, what it works on in each cell.

    python scripts/draw_ring.py --mesh pp=4 -o ring.svg
    python scripts/draw_ring.py --mesh cfg=2,pp=4 --videos 3 --steps 6 -o ring.png
    python scripts/draw_ring.py --mesh pp=4 --trace trace.json -o engine.svg

A colour is a video; c2 is step 2 with its prompt (cond), u2 with its negative prompt (uncond). Empty cells are idle. It
is drawn from the arithmetic that the program itself runs by; or with --trace from what has entered the ring of an
engine: a file with `json.dumps(engine.trace)`.
"""

import argparse
import json
import os
from colorsys import hls_to_rgb
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxwan.commands.picture import Box, Picture, Text
from jaxwan.commands.terminal import Parser, tell_error
from jaxwan.sharding.mesh import MeshSpec
from jaxwan.sharding.turns import Deal, Turn, Work, deal, work_at

MOST_TICKS = 240  # what is wider, nobody reads
CELL = 30, 26  # width, height
GAP = 2  # between cells
MARGIN = 24
IN_A_LINE = 6  # videos in the legend
GOLDEN = 0.618  # of a circle: hues that follow each other lie far apart
QUIET, EMPTY = "#57606a", "#f0f2f4"


@dataclass(frozen=True)
class Schedule:
    """A call of so many videos, alike, on a mesh."""

    mesh: MeshSpec
    videos: int
    steps: int
    guided: bool = True

    def __post_init__(self):
        if self.mesh.cfg > 2:
            raise ValueError(f"mesh {self.mesh}: cfg={self.mesh.cfg} is for the two branches of guidance, use cfg=2")
        for name, value in (("videos", self.videos), ("steps", self.steps)):
            if value < 1:
                raise ValueError(f"--{name} {value} must be at least 1")
        if self.ticks > MOST_TICKS:
            fitting = next((n for n in range(self.steps, 0, -1) if self._ticks(n) <= MOST_TICKS), None)
            remedy = "choose fewer videos or stages" if fitting is None else f"--steps {fitting} would fit"
            raise ValueError(f"{self.ticks} ticks are too many for a picture, which shows {MOST_TICKS}: {remedy}")

    @cached_property
    def dealt(self) -> Deal:
        """Which ring has which videos, and its plan."""
        branches = 1 + (self.guided and self.mesh.cfg == 1)
        return deal([branches] * self.videos, ranks=self.mesh.dp, stages=self.mesh.pp)

    @property
    def ticks(self) -> int:
        """Until the last video is done."""
        return self._ticks(self.steps)

    def _ticks(self, steps: int) -> int:
        return self.dealt.ticks([steps] * self.videos)

    @cached_property
    def rows(self) -> dict[tuple[int, int, int], list[tuple[int, Work] | None]]:
        """(dp, cfg, stage) -> in each tick the video and what of it is worked on, where anything is."""
        sizes = self.mesh.dp, self.mesh.cfg, self.mesh.pp
        return {
            (rank, branch, stage): [self._at(rank, branch, tick - stage) for tick in range(self.ticks)]
            for rank in range(sizes[0]) for branch in range(sizes[1]) for stage in range(sizes[2])
        }  # fmt: skip

    def _at(self, rank: int, branch: int, entered: int) -> tuple[int, Work] | None:
        plan = self.dealt.plans[rank]
        work = work_at(plan, [Turn(0, self.steps)] * len(plan.branches), entered)
        if work is None or (branch and not self.guided):
            return None
        video = self.dealt.places.index((rank, work.slot))
        return video, work._replace(branch=branch) if self.mesh.cfg > 1 else work

    @property
    def utilisation(self) -> float:
        """The share of the cells in which something is worked on."""
        return _share(self.rows)

    @property
    def names(self) -> list[str]:
        """Of the videos."""
        return [f"video {video}" for video in range(self.videos)]

    @property
    def heading(self) -> tuple[str, str]:
        """What it is, and what of it is worth knowing."""
        call = f"{self.videos} video{'s' * (self.videos > 1)} {'with' if self.guided else 'without'} guidance, "
        call += f"{self.steps} step{'s' * (self.steps > 1)}"
        return call, f"{self.ticks} ticks, a step every {self.dealt.period}"


@dataclass(frozen=True)
class Traced:
    """What has entered an engine's ring on a mesh. entered: in each tick, on each rank of `dp`, (call, video, branch,
    step) or None."""

    mesh: MeshSpec
    entered: tuple[tuple[tuple[int, int, int, int] | None, ...], ...]
    guided = True  # for all that is known

    def __post_init__(self):
        if not 0 < self.ticks <= MOST_TICKS:
            raise ValueError(f"a trace of {self.ticks} ticks is no picture, which shows 1 to {MOST_TICKS}")
        if any(len(ranks) != self.mesh.dp for ranks in self.entered):
            raise ValueError(f"mesh {self.mesh}: the trace is of {len(self.entered[0])} ranks of dp: name its mesh")

    @classmethod
    def read(cls, mesh: MeshSpec, path: str | Path) -> "Traced":
        """The first ring of a file with an engine's trace. Raises OSError and ValueError for what is none."""
        try:
            ring, *_ = json.loads(Path(path).read_text())
            entered = tuple(tuple(at and _four(at) for at in ranks) for _, ranks in ring)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no trace of an engine ({error})") from error
        return cls(mesh, entered)

    @property
    def ticks(self) -> int:
        """That were run."""
        return len(self.entered)

    @cached_property
    def videos(self) -> list[tuple[int, int]]:
        """(call, video), as they came."""
        return list(dict.fromkeys(at[:2] for ranks in self.entered for at in ranks if at is not None))

    @cached_property
    def rows(self) -> dict[tuple[int, int, int], list[tuple[int, Work] | None]]:
        """As of a `Schedule`."""
        sizes = self.mesh.dp, self.mesh.cfg, self.mesh.pp
        return {
            (rank, branch, stage): [self._at(rank, branch, tick - stage) for tick in range(self.ticks)]
            for rank in range(sizes[0]) for branch in range(sizes[1]) for stage in range(sizes[2])
        }  # fmt: skip

    def _at(self, rank: int, branch: int, tick: int) -> tuple[int, Work] | None:
        at = None if tick < 0 else self.entered[tick][rank]
        if at is None:
            return None
        return self.videos.index(at[:2]), Work(0, branch if self.mesh.cfg > 1 else at[2], at[3])

    @property
    def utilisation(self) -> float:
        """As of a `Schedule`."""
        return _share(self.rows)

    @property
    def names(self) -> list[str]:
        """Of the videos."""
        several = {call for call, video in self.videos if video}
        return [f"call {call}" + f".{video}" * (call in several) for call, video in self.videos]

    @property
    def heading(self) -> tuple[str, str]:
        """What it is, and what of it is worth knowing."""
        calls = len({call for call, _ in self.videos})
        return f"{calls} call{'s' * (calls > 1)} as they came", f"{self.ticks} ticks"


def _four(at: Any) -> tuple[int, int, int, int]:
    call, video, branch, step = map(int, at)
    return call, video, branch, step


def _share(rows: dict[Any, list]) -> float:
    cells = [cell for row in rows.values() for cell in row]
    return sum(cell is not None for cell in cells) / len(cells)


def draw(schedule: Schedule | Traced) -> Picture:
    """The picture."""
    width, height = CELL
    names = {place: _row_name(schedule.mesh, *place) for place in schedule.rows}
    left, y = MARGIN + 16 + 6 * max(map(len, names.values())), MARGIN + 82.0
    shapes: list[Any] = [*_heading(schedule), Text(left - 10, y - 12, "tick", 11, "end", QUIET)]
    for tick in range(schedule.ticks):
        shapes.append(Text(left + tick * width + (width - GAP) / 2, y - 12, str(tick), 11, "middle", QUIET))
    for place, cells in schedule.rows.items():
        y += 8 * (place[2] == 0 and place != (0, 0, 0))  # between rings
        shapes.append(Text(left - 10, y + (height - GAP) / 2, names[place], 12, "end"))
        for tick, cell in enumerate(cells):
            x = left + tick * width
            shapes.append(Box(x, y, width - GAP, height - GAP, EMPTY if cell is None else _colour(*cell)))
            if cell is not None:
                label = "cu"[cell[1].branch] + str(cell[1].step)
                shapes.append(Text(x + (width - GAP) / 2, y + (height - GAP) / 2, label, 12, "middle"))
        y += height
    legend = _legend(schedule, left, y + 20)
    lines = (shape.x + 0.6 * shape.size * len(shape.text) for shape in (*shapes[:2], legend[-1]))
    return Picture(max(left + schedule.ticks * width, *lines) + MARGIN, legend[-1].y + MARGIN, [*shapes, *legend])


def _row_name(mesh: MeshSpec, *place: int) -> str:
    sizes = {"dp": mesh.dp, "cfg": mesh.cfg, "stage": mesh.pp}
    named = [f"{axis} {at}" for (axis, size), at in zip(sizes.items(), place, strict=True) if size > 1]
    return ", ".join(named) or "stage 0"


def _heading(schedule: Schedule | Traced) -> list[Text]:
    (call, told), devices = schedule.heading, schedule.mesh.sp * schedule.mesh.tp
    told += f"; devices at work {schedule.utilisation:.0%} of the time"
    told += f"; each row is {devices} devices" if devices > 1 else ""
    return [
        Text(MARGIN, MARGIN + 8, f"{schedule.mesh}: {call}", 18, bold=True),
        Text(MARGIN, MARGIN + 36, told, fill=QUIET),
    ]


def _legend(schedule: Schedule | Traced, x: int | float, y: int | float) -> list[Any]:
    shapes: list[Any] = []
    for video, name in enumerate(schedule.names):
        across, down = x + 90 * (video % IN_A_LINE), y + 20 * (video // IN_A_LINE)
        shapes.append(Box(across, down - 7, 14, 14, _colour(video, Work(0, 0, 0))))
        shapes.append(Text(across + 20, down, name, 12))
    words = "c2: step 2 with the prompt"
    words += ", u2: with the negative prompt" if schedule.guided else ""
    return [*shapes, Text(x, shapes[-1].y + 24, f"{words}; empty: idle", 12, fill=QUIET)]


def _colour(video: int, work: Work) -> str:
    """A hue for each video, far from those of the videos before it; lighter for the negative prompt."""
    parts = hls_to_rgb((0.58 + GOLDEN * video) % 1, 0.86 if work.branch else 0.74, 0.7)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, 1 after what went wrong was told in a sentence, 2 after bad flags."""
    args = parse(argv)
    try:
        write(args)
    except (ValueError, OSError) as error:
        tell_error(str(error), as_json=False)
        return 1
    return 0


def write(args: argparse.Namespace) -> None:
    """Draw into the file that the flags name."""
    path = Path(args.output)
    if path.suffix.lower() not in (".svg", ".png"):
        raise ValueError(f"output {path} must end in .svg or .png")
    mesh = MeshSpec.parse(args.mesh)
    if args.trace is None:
        schedule = Schedule(mesh, args.videos, args.steps, not args.unguided)
    else:
        schedule = Traced.read(mesh, args.trace)
    if path.exists() and not args.overwrite:
        raise ValueError(f"output {path} exists: choose another name, or say --overwrite")
    picture = draw(schedule)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    if path.suffix.lower() == ".svg":
        beside.write_text(picture.svg())
    else:
        picture.png(beside)
    beside.replace(path)
    print(f"{path}  {schedule.ticks} ticks, at work {schedule.utilisation:.0%} of the time")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--mesh", default="pp=4", help="devices by axis, such as cfg=2,pp=4; default %(default)s")
    parser.add_argument("--videos", type=int, default=1, help="in one call; default %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="of each video; default %(default)s")
    parser.add_argument("--unguided", action="store_true", help="without guidance, and so without negative prompts")
    parser.add_argument("--trace", metavar="NAME.json",
                        help="draw what has entered an engine's ring, in place of videos alike")  # fmt: skip
    parser.add_argument("-o", "--output", default="ring.svg", metavar="NAME",
                        help="NAME.svg or .png; default %(default)s")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    return parser.parse_args(argv)
