"""One child process of a benchmark: what it measures, as the command line between the two processes has it."""

import json
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxwan.bench.measure import peak_rate
from jaxwan.bench.presets import PRESETS, Preset
from jaxwan.bench.report import Row
from jaxwan.pipelines.load import default_dtype

TERA = 1e12


@dataclass(frozen=True)
class Item:
    """What to measure, of which preset, and in which of its forms."""

    kind: str
    preset: Preset
    # attention, blend: implementation; vae, convolution: dtype; flags: the XLA flag; compile: "cold" or "warm"
    form: str = ""
    against: str = ""  # "diffusers": the same from it, in turns
    runs: int = 3  # measured calls of each executable
    profile: str = ""  # folder for a trace of the profiler; none without

    @property
    def name(self) -> str:
        """The name of its (first) row."""
        rival = f"against {self.against}" if self.against else ""
        return "/".join(filter(None, (self.kind, self.preset.name, self.form, rival)))

    def to_json(self) -> str:
        """For a command line."""
        return json.dumps({**vars(self), "preset": self.preset.name})

    @classmethod
    def from_json(cls, text: str) -> "Item":
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return cls(**{**fields, "preset": PRESETS[fields["preset"]]})

    def row(self, part: str = "", **fields: Any) -> Row:
        """A measured row, called after `part` of this item."""
        return Row(self._row_name(part), "ok", "", peak=peak_rate(), **fields)

    def no_row(self, part: str, status: str, reason: str) -> Row:
        """A row without a measurement: "skipped" or "failed", and why."""
        return Row(self._row_name(part), status, reason)

    def _row_name(self, part: str) -> str:
        return "/".join(filter(None, (self.name, part)))


def dtype() -> Any:
    """What the models compute in here."""
    return jnp.dtype(default_dtype(jax.devices()[0]))
