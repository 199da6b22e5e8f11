"""Rule tables between checkpoint keys and parameter paths, usable in both directions, with a completeness proof.

A rule is a pair of templates over the same placeholders: `{layer}` is a number and becomes the row of the stacked
parameter; any other lower-case placeholder `{path}` matches one or more dotted names. Example:

    Rule("blocks.{layer}.attn1.to_q.weight", "blocks.attn1.q.kernel", LINEAR)

reads key `blocks.7.attn1.to_q.weight` (out, in), transposes it and writes row 7 of the parameter. A rule whose target
is None names a tensor that published files hold and nothing reads.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

Shape = tuple[int, ...]
_A = TypeVar("_A")


class CheckpointError(ValueError):
    """The tensors of a checkpoint do not fit the model that its configuration describes."""


@dataclass(frozen=True)
class Transform:
    """An axis permutation between a checkpoint tensor and one layer's parameter (axes None: as stored)."""

    name: str
    axes: tuple[int, ...] | None = None

    def apply(self, tensor):
        """Checkpoint tensor -> parameter; a NumPy or JAX array."""
        return tensor if self.axes is None else tensor.transpose(self.axes)

    def invert(self, value):
        """Parameter -> checkpoint tensor."""
        return value if self.axes is None else value.transpose(_inverse(self.axes))

    def in_parameter(self, axes: tuple[_A, ...]) -> tuple[_A, ...]:
        """What is said of each axis of a checkpoint tensor, in the order of the parameter's axes."""
        return axes if self.axes is None else tuple(axes[a] for a in self.axes)

    def in_source(self, axes: tuple[_A, ...]) -> tuple[_A, ...]:
        """What is said of each axis of a parameter, such as its size, in the order of the checkpoint tensor's axes."""
        return axes if self.axes is None else tuple(axes[a] for a in _inverse(self.axes))


def _inverse(axes: Shape) -> Shape:
    return tuple(axes.index(i) for i in range(len(axes)))


KEEP = Transform("keep")
LINEAR = Transform("linear", (1, 0))  # (out, in) -> (in, out)
CONV2D = Transform("conv2d", (2, 3, 1, 0))  # (o, i, h, w) -> (h, w, i, o)
CONV3D = Transform("conv3d", (2, 3, 4, 1, 0))  # (o, i, t, h, w) -> (t, h, w, i, o)


@dataclass(frozen=True)
class Rule:
    """`source` key template -> `target` path template (None: known and unused) by `transform`.

    aside: the path that an unused tensor has where files are converted, so that it is not lost.
    """

    source: str
    target: str | None
    transform: Transform = KEEP
    aside: str | None = None

    @cached_property
    def _source_re(self) -> re.Pattern:
        return _template_re(self.source)

    def match(self, key: str) -> dict[str, str] | None:
        """The placeholders' values when this rule reads `key`."""
        found = self._source_re.fullmatch(key)
        return found.groupdict() if found else None


def _template_re(template: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", template)
    pattern = "".join(
        re.escape(p) if i % 2 == 0 else f"(?P<{p}>{r'[0-9]+' if p == 'layer' else r'[0-9A-Za-z_.]+'})"
        for i, p in enumerate(parts)
    )
    return re.compile(pattern)


@dataclass(frozen=True)
class Target:
    """Where one checkpoint tensor goes: parameter `path`, row `layer` of its stack (None: not stacked)."""

    path: str
    layer: int | None
    transform: Transform


def with_unused(rules: Sequence[Rule]) -> list[Rule]:
    """A rule table by which tensors that are put aside are parameters too."""
    return [rule if rule.target is not None else replace(rule, target=rule.aside) for rule in rules]


def place_all(keys: Iterable[str], rules: Sequence[Rule]) -> dict[str, Target]:
    """Where the tensors of a checkpoint go, as far as the rules say it: nothing is proved of it, and no shape is known.

    A rule for more names gives way to the one before it.
    """
    found = {}
    for key in keys:
        rule, names = next(((rule, names) for rule in rules if (names := rule.match(key)) is not None), (None, {}))
        if rule is not None and rule.target is not None:
            layer = int(names["layer"]) if "layer" in names else None
            found[key] = Target(rule.target.format(**names), layer, rule.transform)
    return found


def plan(sources: Mapping[str, Shape], targets: Mapping[str, Shape], rules: Sequence[Rule], *,
         what: str = "checkpoint") -> dict[str, Target]:  # fmt: skip
    """Where every tensor of a checkpoint goes, proved complete.

    sources: key -> shape, from the files' headers. targets: path -> shape of the parameters, of which those under a
    `{layer}` rule have a leading layer axis. Returns key -> Target for every key that something reads.
    Raises CheckpointError that counts all missing, extra and mis-shaped tensors at once, and names a few.
    """
    found: dict[str, Target] = {}
    extra: list[str] = []
    misshaped: list[str] = []
    expected = expected_sources(targets, rules)
    for key, shape in sources.items():
        if key in expected:
            into, want = expected[key]
            found[key] = into
            if tuple(shape) != want:
                misshaped.append(f"{key} {tuple(shape)}, expected {want}")
        elif not any(rule.target is None and rule.match(key) is not None for rule in rules):
            extra.append(key)
    missing = [key for key in expected if key not in sources]
    if missing or extra or misshaped:
        lists = {"missing": missing, "unexpected": extra, "of another shape": misshaped}
        most = 5 if sum(map(bool, lists.values())) == 1 else 2
        told = [f"{len(names)} {label} ({some(sorted(names), most)})" for label, names in lists.items() if names]
        raise CheckpointError(f"{what} does not fit its configuration: {'; '.join(told)}")
    return found


def expected_sources(targets: Mapping[str, Shape], rules: Sequence[Rule]) -> dict[str, tuple[Target, Shape]]:
    """Checkpoint key -> (its target, checkpoint shape), for every parameter: the rule table run backwards.

    Raises ValueError, our own bug, when a parameter has no rule or more than one.
    """
    reverse = [(rule, _template_re(rule.target)) for rule in rules if rule.target is not None]
    expected: dict[str, tuple[Target, Shape]] = {}
    for path, shape in targets.items():
        found = [(rule, m.groupdict()) for rule, pattern in reverse if (m := pattern.fullmatch(path))]
        if len(found) != 1:
            raise ValueError(f"parameter {path} has {len(found)} rules, must have exactly one")
        rule, names = found[0]
        stacked = "{layer}" in rule.source
        for layer in range(shape[0]) if stacked else [None]:
            key = rule.source.format(**names, layer=layer)
            if key in expected:
                raise ValueError(f"{key} is read by two rules")
            source = rule.transform.in_source(shape[1:] if stacked else shape)
            expected[key] = Target(path, layer, rule.transform), source
    return expected


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of many names, and how many more there are."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
