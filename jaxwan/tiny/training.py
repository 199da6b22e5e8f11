"""What the trainers of the bundled model share: phases of so many steps, averaged parameters, saved states.

Training can stop at any step and go on later, elsewhere: everything it needs is in `Saved`, and the random numbers of
a step follow from the seed and the step's number. So the result depends neither on the speed of the machine nor on how
often training was stopped.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxwan.convert.load import fill, flat_shapes
from jaxwan.models.layers import Linear
from jaxwan.pipelines.compilation_cache import cache_folder
from jaxwan.tiny.muon import Params

SAVE_MINUTES = 10.0
WARM_UP = 100  # steps

Loss = Callable[..., Float[Array, ""]]  # (parameters, key, data of this step) -> loss
Rate = Callable[[Float[Array, ""]], Float[Array, ""]]  # share of a phase that is done, 0 to 1 -> learning rate


class TrainState(NamedTuple):
    """What a training step changes. `average` follows `params` slowly; it is what is shipped."""

    params: Params
    average: Params
    optimizer: Any
    step: Int[Array, ""]


Step = Callable[[TrainState, PRNGKeyArray, int], tuple[TrainState, Float[Array, ""]]]


class Phase(NamedTuple):
    """A part of a training: so many steps (state, key, steps of the phase that are done) -> (state, loss)."""

    name: str
    steps: int
    step: Step


class Saved(NamedTuple):
    """A training that can go on: its state, the phase it is in, the steps done there, and what was measured so far.

    seconds: that all steps took, but for those that were compiled.
    """

    state: TrainState
    phase: int = 0
    done: int = 0
    seconds: float = 0.0
    history: tuple[Mapping[str, Any], ...] = ()


Report = Callable[[Saved], Mapping[str, Any]]


def parameters(module: nnx.Module) -> Params:
    """The parameters of a module by dotted path, as `convert.save` and `convert.load.fill` have them."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): leaf[...] for path, leaf in flat}


def module_with(make: Callable[..., nnx.Module], params: Params, dtype: DTypeLike = jnp.float32) -> Any:
    """The module that `make` builds for `dtype`, with these parameters cast to what it holds; its products have the
    gradients below."""
    module = nnx.eval_shape(lambda: make(dtype=dtype, rngs=nnx.Rngs(0)))
    for _, part in nnx.iter_graph(module):
        if isinstance(part, Linear):
            part.product = product
    shapes = flat_shapes(nnx.state(module))
    nnx.update(module, fill(nnx.state(module), {path: params[path].astype(s.dtype) for path, s in shapes.items()}))
    return module


@jax.custom_vjp
def product(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """`x @ kernel` with gradients in the form that XLA is quick at on CPUs.

    What it makes of the usual ones inside a scan takes, in bfloat16, up to 50 times as long.
    """
    return x @ kernel


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _product_backward(kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = kept
    rows, grads = (a if a.ndim == 3 else a.reshape(1, -1, a.shape[-1]) for a in (x, grad))
    rows, grads = jax.lax.optimization_barrier((rows, grads))  # else their transposes are folded into the product
    return grad @ kernel.T, jnp.einsum("bsi,bso->io", rows, grads)


product.defvjp(_product_forward, _product_backward)


def start(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Before the first step."""
    return TrainState(params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.zeros((), jnp.int32))


def make_step(loss: Loss, optimizer: optax.GradientTransformation, rate: Rate, *, steps: int, decay: float) -> Callable:
    """A compiled training step (state, key, steps done, data) of a phase of `steps`; it uses up its state.

    optimizer is made for a learning rate of 1; `rate` scales its updates. decay: of the average, less in a phase's
    first steps, so that it soon forgets where the phase started.
    """

    def step(
        state: TrainState, key: PRNGKeyArray, done: Int[Array, ""], *data: Any
    ) -> tuple[TrainState, Float[Array, ""]]:
        value, grads = jax.value_and_grad(loss)(state.params, jax.random.fold_in(key, state.step), *data)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        now = rate(done / steps)
        params = optax.apply_updates(state.params, jax.tree.map(lambda u: now * u, updates))
        keep = jnp.minimum(decay, (1 + done) / (10 + done))
        average = jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, state.average, params)
        return TrainState(params, average, moments, state.step + 1), value

    return jax.jit(step, donate_argnums=0)


def make_rate(highest: float, falling: float, steps: int) -> Rate:
    """Rises to `highest` within WARM_UP steps of a phase, and falls to 0 over the share `falling` at its end."""

    def rate(done: Float[Array, ""]) -> Float[Array, ""]:
        return highest * jnp.minimum(jnp.minimum((1 - done) / max(falling, 1e-9), 1), (1 + done * steps) / WARM_UP)

    return rate


def run(
    phases: Sequence[Phase],
    saved: Saved,
    saver: "Saver",
    *,
    minutes: float | None = None,
    seed: int = 0,
    report: Report | None = None,
    report_minutes: float = 2.0,
) -> tuple[Saved, bool]:
    """Train from where `saved` stands; returns the new state and whether all phases are done.

    Ends early after `minutes`, or after the step in which SIGTERM or Ctrl-C comes. Saves every 10 minutes and at the
    end. report: measures something every `report_minutes` and after each phase; it goes to the history and the screen.
    Raises FloatingPointError when the loss is not finite; the last saved state stays.
    """
    total, to_report, to_save = _Timer(minutes), _Timer(report_minutes), _Timer(SAVE_MINUTES)

    def after_step(saved: Saved, entry: dict[str, Any], is_last: bool) -> Saved:
        if report is not None and (is_last or to_report.is_due()):
            saved = saved._replace(history=(*saved.history, {**entry, **report(saved)}))
            _print(saved.history[-1])
            to_report.restart()
        if to_save.is_due():
            saver.save(saved)
            to_save.restart()
        return saved

    with _stop_signals() as asked, saver:
        while saved.phase < len(phases):
            phase = phases[saved.phase]
            saved = _run_phase(phase, saved, jax.random.key(seed), after_step, lambda: bool(asked) or total.is_due())
            if saved.done < phase.steps:
                break
            saved = saved._replace(phase=saved.phase + 1, done=0)
        saver.save(saved)
    return saved, saved.phase == len(phases)


def _run_phase(
    phase: Phase,
    saved: Saved,
    key: PRNGKeyArray,
    after_step: Callable[[Saved, dict[str, Any], bool], Saved],
    is_over: Callable[[], bool],
) -> Saved:
    smooth, is_compiled = None, False
    with _bar(phase, saved.done) as bar:
        while saved.done < phase.steps and not is_over():
            before = time.monotonic()
            state, loss = phase.step(saved.state, key, saved.done)
            value, step = float(loss), int(state.step)
            if not np.isfinite(value):
                raise FloatingPointError(f"the loss of step {step} is {value}; the state saved before it stays")
            seconds = saved.seconds + is_compiled * (time.monotonic() - before)
            saved = saved._replace(state=state, done=saved.done + 1, seconds=seconds)
            smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            bar.update()
            entry = {"phase": phase.name, "step": step, "minutes": round(seconds / 60, 1), "loss": round(smooth, 4)}
            saved, is_compiled = after_step(saved, entry, saved.done == phase.steps), True
    return saved


class _Timer:
    """Due once so many minutes have gone since it was made or restarted; None is never."""

    def __init__(self, minutes: float | None):
        self.minutes = minutes
        self.restart()

    def restart(self) -> None:
        self.begin = time.monotonic()

    def is_due(self) -> bool:
        return self.minutes is not None and time.monotonic() - self.begin >= 60 * self.minutes


def _print(entry: Mapping[str, Any]) -> None:
    from tqdm import tqdm

    tqdm.write("  ".join(f"{name} {value}" for name, value in entry.items()), file=sys.stderr)


def _bar(phase: Phase, done: int):
    from tqdm import tqdm

    often = 0.2 if sys.stderr.isatty() else 30.0  # seconds; a log file keeps every line
    return tqdm(desc=phase.name, initial=done, total=phase.steps, mininterval=often, maxinterval=2 * often)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The signals that asked to stop while the block runs; a second one acts as usual."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, usual[number])

    usual = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


class Saver:
    """Keeps the latest two states of one training in a folder, by Orbax; a context that is closed once."""

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        self.folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def save(self, saved: Saved) -> None:
        """Write a state, whole or not at all; a step that is there already is left as it is."""
        import orbax.checkpoint as ocp

        step = int(saved.state.step)
        if step == self._manager.latest_step():
            return
        progress = saved._asdict() | {"state": None}
        items = ocp.args.Composite(state=ocp.args.StandardSave(saved.state), progress=ocp.args.JsonSave(progress))
        self._manager.save(step, args=items)
        self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> Saved | None:
        """The latest state, None when there is none. like: a state, or an abstract one, of the same shapes."""
        import orbax.checkpoint as ocp

        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_here()), like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=items)
        progress = found["progress"]
        return Saved(**progress | {"state": found["state"], "history": tuple(progress["history"])})


def read_history(folder: Path) -> tuple[dict[str, Any], ...]:
    """What was measured along a training whose states a `Saver` has kept in `folder`; nothing where there are none."""
    import orbax.checkpoint as ocp

    step = latest_step(folder)
    if step is None:
        return ()
    with ocp.CheckpointManager(folder.absolute()) as manager:
        return tuple(
            manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]["history"]
        )


def latest_step(folder: Path) -> int | None:
    """The step of the latest state that a `Saver` has kept in `folder`, None when there is none."""
    from orbax.checkpoint.utils import checkpoint_steps

    return max(checkpoint_steps(folder), default=None) if folder.is_dir() else None


def _here() -> jax.sharding.SingleDeviceSharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state_folder() -> Path:
    """Where states are kept unless told otherwise: in the user's cache. Raises OSError without a home."""
    return cache_folder() / "train_tiny"
