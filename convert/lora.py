"""LoRA files of any style, as what they add to the tensors of a DiT: views on these, summed when they are read.

A file names modules in the Diffusers or the original layout, behind a prefix of whoever wrote it, with dots or with
underscores for them. Each is looked up among all names that a DiT's tensors have. What is added to one is a `Delta`,
of which any rows can be made by themselves.

Sources: PEFT's and Diffusers' loaders, ComfyUI's comfy/lora.py and comfy/weight_adapter, LyCORIS, musubi-tuner,
LightX2V, and the published files.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxwan.convert import diffusers, original
from jaxwan.convert.detect import kind_of, rules_of
from jaxwan.convert.files import TensorFiles, read_tensors
from jaxwan.convert.rules import CheckpointError, Shape, Target, expected_sources, some
from jaxwan.convert.tensors import DTYPES, Reader, Stored, read_metadata
from jaxwan.convert.views import unwrapped

_FLOATS = tuple(DTYPES[name] for name in ("F32", "BF16", "F16"))
# rows that are made at once: whatever rows are asked for, they come of the same products; with fewer, threads of BLAS
# wait for each other more than they compute where cores are shared
_BLOCK = 512
_MOST_CONFIG = 10_000_000  # bytes of an adapter_config.json


@dataclass(frozen=True)
class Lora:
    """A LoRA file, how strongly it counts, and the expert that it is for: "high" or "low" noise. None: the one that its
    name says, else all that the model has."""

    path: str | Path
    strength: float | int = 1.0
    expert: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """Of `[high=|low=]FILE[:strength]`, where a strength is a number behind the last colon and nothing else."""
        expert, is_named, rest = text.partition("=")
        if not is_named or expert not in ("high", "low"):
            expert, rest = None, text
        found = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", rest, re.DOTALL)
        return cls(rest, expert=expert) if found is None else cls(found[1], float(found[2]), expert)


def with_loras(files: TensorFiles, loras: Sequence[Lora]) -> TensorFiles:
    """A DiT's files with LoRAs, all of them for it, added to their tensors, which are float32 then."""
    if not loras:
        return files
    return MergedFiles(**{field.name: getattr(files, field.name) for field in fields(files)}, loras=tuple(loras))


@dataclass(frozen=True)
class MergedFiles(TensorFiles):
    """What `with_loras` makes."""

    loras: tuple[Lora, ...] = ()

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """As of `TensorFiles`, with what LoRAs add."""
        return merge(super().tensors, self.loras, self._reader, what=str(self.paths[0]))


def merge(tensors: Mapping[str, Stored], loras: Sequence[Lora], reader: Reader, *, what: str) -> dict[str, Stored]:
    """A DiT's tensors, in the Diffusers or the original layout, with LoRAs added to them.

    Of these the headers are read, and alphas. Raises CheckpointError, as `added_by` does.
    """
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    names, deltas = names_in(shapes, what=what), {}
    for lora in loras:
        for key, more in added_by(lora, names, shapes, reader, what=what).deltas.items():
            deltas.setdefault(key, []).extend(more)
    return {
        # what is no float stays as it is, to be refused as such
        key: Merged(tensor, tuple(deltas[key])) if key in deltas and tensor.dtype in _FLOATS else tensor
        for key, tensor in tensors.items()
    }


@dataclass(frozen=True)
class Merged:
    """A tensor, of which `first` is its first row in the whole one, plus deltas: in float32, one after the other."""

    tensor: Stored
    deltas: tuple["Delta", ...]
    first: int = 0
    dtype = DTYPES["F32"]

    @property
    def shape(self) -> Shape:
        """Of the tensor."""
        return self.tensor.shape

    @property
    def num_bytes(self) -> int:
        """Of the tensor as it is stored, and of what LoRAs have for these rows."""
        return self.tensor.num_bytes + sum(delta.num_bytes(*self._blocks(delta)) for delta in self.deltas)

    def rows(self, rows: slice) -> "Merged":
        """These rows, with those of the factors that they need."""
        start, _, _ = rows.indices(self.shape[0])
        return replace(self, tensor=self.tensor.rows(rows), first=self.first + start)

    def read(self, reader: Reader) -> np.ndarray:
        """The sum. Raises CheckpointError where a file ends within its tensor."""
        values = self.tensor.read(reader).astype(np.float32, copy=False)
        count = len(values)
        if not count:
            return values
        table = values.reshape(count, math.prod(self.shape[1:]))
        for delta in self.deltas:
            begin, end = self._blocks(delta)
            make = delta.opened(reader, begin, end)
            for at in range(begin, end, _BLOCK):
                start, stop = max(at, self.first), min(at + _BLOCK, self.first + count)
                block = make(at, min(at + _BLOCK, end))
                table[start - self.first : stop - self.first] += block[start - at : stop - at]
        return values

    def _blocks(self, delta: "Delta") -> tuple[int, int]:
        """The first row, and the one behind the last, of the whole blocks that hold the rows."""
        last = self.first + self.shape[0]
        return self.first // _BLOCK * _BLOCK, min(-(-last // _BLOCK) * _BLOCK, delta.shape[0])


# What is added to a tensor

Make = Callable[[int, int], np.ndarray]  # (first row, one behind the last) -> these rows, all other axes as one


class Delta(Protocol):
    """What is added to a tensor of `shape`, times a scale that is in it."""

    @property
    def shape(self) -> Shape:
        """Of the tensor."""
        ...

    def num_bytes(self, begin: int, end: int) -> int:
        """How many bytes of files are read for these rows."""
        ...

    def opened(self, reader: Reader, begin: int, end: int) -> Make:
        """What makes any of these rows, with all that has to be read for them."""
        ...


@dataclass(frozen=True)
class Product:
    """up [out, rank] times down [rank, …]: a LoRA's own B·A."""

    up: Stored
    down: Stored
    scale: float

    @property
    def shape(self) -> Shape:
        """Of the product."""
        return (self.up.shape[0], *self.down.shape[1:])

    def num_bytes(self, begin: int, end: int) -> int:
        """Of rows of `up`, and all of `down`."""
        return self.up.rows(slice(begin, end)).num_bytes + self.down.num_bytes

    def opened(self, reader: Reader, begin: int, end: int) -> Make:
        """Reads the rows of `up` alone."""
        up = _floats(self.up.rows(slice(begin, end)), reader).reshape(end - begin, -1) * np.float32(self.scale)
        down = _floats(self.down, reader).reshape(len(up.T), -1)
        return lambda start, stop: up[start - begin : stop - begin] @ down


@dataclass(frozen=True)
class Whole:
    """A difference as it is (`.diff`)."""

    tensor: Stored
    scale: float

    @property
    def shape(self) -> Shape:
        """Of the difference."""
        return self.tensor.shape

    def num_bytes(self, begin: int, end: int) -> int:
        """Of these rows."""
        return self.tensor.rows(slice(begin, end)).num_bytes

    def opened(self, reader: Reader, begin: int, end: int) -> Make:
        """Reads them when they are made, as it may be as large as the tensor."""

        def make(start: int, stop: int) -> np.ndarray:
            rows = _floats(self.tensor.rows(slice(start, stop)), reader).reshape(stop - start, -1)
            rows *= np.float32(self.scale)
            return rows

        return make


@dataclass(frozen=True)
class Kronecker:
    """The Kronecker product of two matrices, each one tensor or the product of two: LoKr."""

    left: tuple[Stored, ...]
    right: tuple[Stored, ...]
    scale: float

    @property
    def shape(self) -> Shape:
        """Of the product; a convolution's kernel is on the right."""
        (rows, columns), right = _shape_of(self.left), _shape_of(self.right)
        return (rows * right[0], columns * right[1], *right[2:])

    def num_bytes(self, begin: int, end: int) -> int:
        """Of all factors."""
        return sum(tensor.num_bytes for tensor in self.left + self.right)

    def opened(self, reader: Reader, begin: int, end: int) -> Make:
        """Reads all factors."""
        left = _product(self.left, reader) * np.float32(self.scale)
        right = _product(self.right, reader)

        def make(start: int, stop: int) -> np.ndarray:
            i, p = np.divmod(np.arange(start, stop), len(right))
            rows = left[i].reshape(stop - start, -1, 1) * right[p].reshape(stop - start, 1, -1)
            return rows.reshape(stop - start, -1)

        return make


@dataclass(frozen=True)
class Hadamard:
    """Two products, multiplied number by number: LoHa."""

    left: Product
    right: Product

    @property
    def shape(self) -> Shape:
        """Of either product."""
        return self.left.shape

    def num_bytes(self, begin: int, end: int) -> int:
        """Of both products."""
        return self.left.num_bytes(begin, end) + self.right.num_bytes(begin, end)

    def opened(self, reader: Reader, begin: int, end: int) -> Make:
        """Reads what both products read."""
        left, right = self.left.opened(reader, begin, end), self.right.opened(reader, begin, end)
        return lambda start, stop: left(start, stop) * right(start, stop)


def _floats(tensor: Stored, reader: Reader) -> np.ndarray:
    return tensor.read(reader).astype(np.float32, copy=False)


def _shape_of(factors: tuple[Stored, ...]) -> Shape:
    return factors[0].shape if len(factors) == 1 else (factors[0].shape[0], *factors[1].shape[1:])


def _product(factors: tuple[Stored, ...], reader: Reader) -> np.ndarray:
    first, *second = (_floats(factor, reader) for factor in factors)
    return first @ second[0] if second else first


# Names of a DiT's tensors

_PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "transformer_2.", "pipe.dit.",
    "model.",
)  # fmt: skip
_UNDERSCORED = ("lora_unet__", "lora_unet_", "lycoris_")  # before names in which underscores stand for dots
# modules that read CLIP's rows, which Wan2.1's image to video alone has: its LoRAs fit other models but for these
_IMAGE = re.compile(
    r"(img_emb|condition_embedder[._]image_embedder)[._].+"
    r"|blocks[._]\d+[._](cross_attn|attn2)[._]((norm_)?[kv]_img|add_[kv]_proj|norm_added_[kq])"
)


def names_in(shapes: Mapping[str, Shape], *, what: str) -> dict[str, str]:
    """Every name that a tensor of a DiT has, in either layout, with dots or with underscores for them -> its key here.

    shapes: of a DiT's tensors, in the Diffusers or the original layout. Raises CheckpointError for another component.
    """
    keys: dict[str, dict[int | None, str]] = {}
    targets: dict[str, Shape] = {}
    for key, into, shape in _places(shapes, what):
        keys.setdefault(into.path, {})[into.layer] = key
        targets[into.path] = into.transform.apply(np.broadcast_to(np.int8(0), shape)).shape
    for path, by_layer in keys.items():
        if None not in by_layer:
            targets[path] = (1 + max(layer or 0 for layer in by_layer), *targets[path])
    names = {}
    for rules in (original.TRANSFORMER, diffusers.TRANSFORMER):
        for name, (into, _) in expected_sources(targets, rules).items():
            if key := keys[into.path].get(into.layer):
                names[name] = names[name.replace(".", "_")] = key
    return names


def _places(shapes: Mapping[str, Shape], what: str) -> Iterator[tuple[str, Target, Shape]]:
    """Where the tensors of a DiT go, of those that can be its own; whether all are and fit is for others to prove."""
    kind = kind_of(shapes)
    if kind is not None and kind.layout not in ("diffusers", "original"):
        raise CheckpointError(
            f"{what}: LoRAs are merged into files of the Diffusers or the original layout alone: convert it to one of "
            "these (scripts/convert.py)"
        )
    rules = rules_of("transformer", None, shapes, what=what)
    paths = {rule.target for rule in original.TRANSFORMER}
    for key, shape in shapes.items():
        rule, found = next(((rule, found) for rule in rules if (found := rule.match(key)) is not None), (None, {}))
        if rule is None or rule.target is None or len(rule.transform.axes or shape) != len(shape):
            continue
        path, layer = rule.target.format(**found), int(found["layer"]) if "layer" in found else None
        if path in paths and (layer is None or layer < len(shapes)):
            yield key, Target(path, layer, rule.transform), shape


# What is in a file


class Added(NamedTuple):
    """What a LoRA adds, by the keys of tensors, and what is to be said of it: sentences that begin with its name."""

    deltas: dict[str, list[Delta]]
    notes: list[str]


class _Module(NamedTuple):
    """A module of a file: without prefixes, and what it says in them."""

    name: str
    component: str  # "transformer", "transformer_2", or ""
    underscored: bool


_Parts = dict[str, Stored]  # of a module, such as "down", "up" and "alpha"
_PART = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<side>A|B|down|up)(?:\.\w+)??\.(?P<kind>weight|bias)"
    r"|(?P<part>alpha|diff|diff_b|diff_m|lokr_w[12](_[ab])?|hada_w[12]_[ab]))"
)
_SIDES = {"A": "down", "down": "down", "B": "up", "up": "up"}
_DIFFERENCES = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}  # of which tensor of a module


def added_by(lora: Lora, names: Mapping[str, str], shapes: Mapping[str, Shape], reader: Reader, *, what: str) -> Added:
    """What a LoRA adds to tensors of these names (`names_in`) and shapes; reads its header, alphas and configuration.

    Raises CheckpointError for a file that is none, a DoRA, and one that does not fit: keys without a place, ranks or
    shapes that differ, no key at all; all of them in one, counted.
    """
    path = Path(lora.path)
    tensors = read_tensors(path, reader)
    _check_kind(path, tensors)
    config = _peft_config(path, tensors, reader)
    modules, unknown = _modules(path, tensors, lora.expert)
    deltas: dict[str, list[Delta]] = {}
    passed_over, wrong = [], []
    for module, parts in modules.items():
        try:
            for ending, delta in _deltas(parts, _scale(module, parts, config, reader), lora.strength):
                key = _look_up(names, module, ending)
                if key is not None:
                    _check_shapes(delta.shape, shapes[key])
                    deltas.setdefault(key, []).append(delta)
                elif _IMAGE.fullmatch(module.name):
                    passed_over.append(module.name)
                else:
                    unknown.append(f"{module.name}.{ending}")
        except ValueError as error:
            wrong.append(f"{module.name}: {error}")
    if unknown or wrong:
        lists = {"without a place in it": unknown, "of other ranks or shapes": wrong}
        told = [f"{len(found)} {label} ({some(found, 3)})" for label, found in lists.items() if found]
        raise CheckpointError(f"the LoRA {path} does not fit {what}: {'; '.join(told)}")
    if not deltas:
        raise CheckpointError(f"the LoRA {path} changes nothing in {what}: it has no module of it")
    return Added(deltas, list(_notes(path, tensors, config, passed_over)))


def _notes(
    path: Path, tensors: Mapping[str, Stored], config: Mapping[str, Any], passed_over: Sequence[str]
) -> Iterator[str]:
    if passed_over:
        count = len(set(passed_over))
        yield f"{path.name}: {count} of its modules are for an image's CLIP rows, which this model does not read"
    if any(name.startswith(_RAW_PEFT) for name in tensors) and not config and not any("alpha" in n for n in tensors):
        yield f"{path.name} says no alpha, and neither does an adapter_config.json beside it: it counts as the rank"


def _check_kind(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Raises CheckpointError for what is no LoRA, or one that is no sum."""
    dora = [name for name in tensors if "dora_scale" in name or "lora_magnitude_vector" in name]
    if dora:
        raise CheckpointError(
            f"{path} is a DoRA ({some(dora, 1)}), which rescales weights by their norms and is not read: take a LoRA"
        )
    if not any(_PART.fullmatch(name) for name in tensors):
        raise CheckpointError(f"{path} holds no LoRA, but {some(list(tensors), 2) or 'no tensors'}")


def _modules(path: Path, tensors: Mapping[str, Stored], expert: str | None) -> tuple[dict[_Module, _Parts], list[str]]:
    """The modules of a file, with their parts by name, and keys that are of none. Of a file for both experts, those of
    the one that is asked for."""
    modules: dict[_Module, _Parts] = {}
    unknown = []
    for name, tensor in tensors.items():
        found = _PART.fullmatch(name)
        if found is None:
            unknown.append(name)
            continue
        part = found["part"] or _SIDES[found["side"]] + ("_bias" if found["kind"] == "bias" else "")
        parts = modules.setdefault(_module(found["module"]), {})
        if part in parts:
            raise CheckpointError(f"{path} holds two adapters, or {name} twice: take a file of one")
        parts[part] = tensor
    components = {module.component for module in modules}
    if {"transformer", "transformer_2"} <= components:
        if expert is None:
            raise CheckpointError(f"{path} holds LoRAs of two experts, and the model has one")
        own = {"high": "transformer", "low": "transformer_2"}[expert]
        modules = {module: parts for module, parts in modules.items() if module.component == own}
    return modules, unknown


def _module(name: str) -> _Module:
    name, component = unwrapped(name), ""
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
        component = prefix.rstrip(".") if prefix.startswith("transformer") else component
    prefix = next((prefix for prefix in _UNDERSCORED if name.startswith(prefix)), None)
    return _Module(name.removeprefix(prefix or ""), component, prefix is not None)


def _look_up(names: Mapping[str, str], module: _Module, ending: str) -> str | None:
    """The key of a module's tensor; a difference may be of a tensor that is no module's weight."""
    key = names.get(f"{module.name}{'_' if module.underscored else '.'}{ending}")
    return names.get(module.name) if key is None and ending == "weight" else key


def _check_shapes(delta: Shape, tensor: Shape) -> None:
    """Raises ValueError unless they have the same rows of the same numbers; axes of one number do not count."""
    both = [(shape[:1], [size for size in shape if size != 1]) for shape in (delta, tensor)]
    if both[0] != both[1]:
        raise ValueError(f"{delta} for {tensor}")


# What a module adds


def _deltas(parts: _Parts, scale: float, strength: float) -> Iterator[tuple[str, Delta]]:
    """What a module adds, by the ending of the tensor's name; scale: of what is factored. Raises ValueError."""
    for name, tensor in parts.items():
        if tensor.dtype not in _FLOATS and name != "alpha":
            raise ValueError(f"{name} is {tensor.dtype}")
    rest = dict(parts)
    if rest.keys() & {"up", "down"}:
        yield "weight", _product_of(rest.pop("up", None), rest.pop("down", None), scale * strength)
    if "up_bias" in rest:
        yield "bias", Whole(rest.pop("up_bias"), scale * strength)
    if any(name.startswith("lokr") for name in rest):
        left, right = _lokr_factor(rest, "lokr_w1"), _lokr_factor(rest, "lokr_w2")
        if len(_shape_of(left)) != 2 or len(_shape_of(right)) < 2:
            raise ValueError(f"{_shape_of(left)} and {_shape_of(right)} are no two matrices")
        yield "weight", Kronecker(left, right, scale * strength)
    if any(name.startswith("hada") for name in rest):
        left, right = (_product_of(rest.pop(f"hada_w{i}_a", None), rest.pop(f"hada_w{i}_b", None)) for i in (1, 2))
        if left.shape != right.shape:
            raise ValueError(f"its products are {left.shape} and {right.shape}")
        yield "weight", Hadamard(replace(left, scale=scale * strength), right)
    for part, ending in _DIFFERENCES.items():
        if part in rest:
            yield ending, Whole(rest.pop(part), strength)
    if rest.keys() - {"alpha"} or rest == parts:
        raise ValueError(f"{', '.join(rest)} without the rest")


def _product_of(up: Stored | None, down: Stored | None, scale: float = 1.0) -> Product:
    if up is None or down is None:
        raise ValueError("one of two factors is missing")
    if len(up.shape) < 2 or len(down.shape) < 2 or math.prod(up.shape[1:]) != down.shape[0] or down.shape[0] == 0:
        raise ValueError(f"factors {up.shape} and {down.shape}")
    return Product(up, down, scale)


def _lokr_factor(parts: _Parts, name: str) -> tuple[Stored, ...]:
    """One of the two: a tensor or, taken from `parts` too, the two matrices that make it."""
    if name in parts:
        return (parts.pop(name),)
    product = _product_of(parts.pop(f"{name}_a", None), parts.pop(f"{name}_b", None))
    if len(product.up.shape) != 2 or len(product.down.shape) != 2:
        raise ValueError(f"factors {product.up.shape} and {product.down.shape}")
    return product.up, product.down


# Scales

_RAW_PEFT = "base_model.model."
_HEADER = "lora_adapter_metadata"  # where Diffusers puts PEFT's configuration


def _scale(module: _Module, parts: _Parts, config: Mapping[str, Any], reader: Reader) -> float:
    """alpha / rank, of what is factored; 1 where nothing says an alpha. Raises ValueError.

    The rank is that of this module. Of rs-LoRA, whose divisor is its root, PEFT's configuration tells; LyCORIS writes
    an alpha that has it in it.
    """
    factor = next((parts[n] for n in ("down", "lokr_w2_b", "lokr_w1_b", "hada_w1_b") if n in parts), None)
    rank = factor.shape[0] if factor is not None and factor.shape else 0
    if rank == 0:  # nothing is factored, or it is no matrix, as is told elsewhere
        return 1.0
    if "alpha" in parts:
        return _number(parts["alpha"], reader) / rank
    said = {name: config.get(f"{module.component}.{name}", config.get(name)) for name in _SAID}
    alpha = said["lora_alpha"]
    for pattern, own in (said["alpha_pattern"] or {}).items():
        if f".{module.name}".endswith(f".{_plain(pattern)}"):
            alpha = own
            break
    if alpha is None:
        return 1.0
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ValueError(f"alpha {alpha!r:.20}")
    return alpha / (math.sqrt(rank) if said["use_rslora"] else rank)


_SAID = ("lora_alpha", "alpha_pattern", "use_rslora")


def _number(tensor: Stored, reader: Reader) -> float:
    if math.prod(tensor.shape) != 1:
        raise ValueError(f"alpha of shape {tensor.shape}")
    number = float(tensor.read(reader).reshape(()))
    if not math.isfinite(number):
        raise ValueError(f"alpha {number}")
    return number


def _plain(pattern: str) -> str:
    """A module's name of a pattern that is no more than that, as all are that trainers write."""
    return pattern.removeprefix("^").removesuffix("$").replace(r"\.", ".")


def _peft_config(path: Path, tensors: Mapping[str, Stored], reader: Reader) -> dict[str, Any]:
    """PEFT's configuration: in the header, where Diffusers writes it, or beside a file of PEFT's own; {} if neither.

    Raises CheckpointError where it cannot be read, and for adapters that it says are no LoRA.
    """
    text, beside = read_metadata(path, reader).get(_HEADER), path.with_name("adapter_config.json")
    own = path.stem == "adapter_model" or any(name.startswith(_RAW_PEFT) for name in tensors)
    where = f"{path}, in its header,"
    try:
        if text is None and own and beside.is_file() and beside.stat().st_size <= _MOST_CONFIG:
            where, text = str(beside), beside.read_text(encoding="utf-8")
        said = json.loads("{}" if text is None else text)
        plain = {name.rpartition(".")[2]: value for name, value in said.items()}
        patterns = plain.get("alpha_pattern") or {}
        if not all(re.fullmatch(r"[\w.]+", _plain(pattern)) for pattern in patterns.keys()):
            raise ValueError(f"alpha_pattern={patterns!r:.60}")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where} is no configuration of a LoRA ({error!r:.100})") from error
    kind = "DORA" if plain.get("use_dora") else plain.get("peft_type") or "LORA"
    if kind != "LORA":
        raise CheckpointError(f"{where} says that this is a {kind!r:.20} of PEFT's, which is not read: take a LoRA")
    return said
