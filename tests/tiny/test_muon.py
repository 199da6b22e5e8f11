"""The optimizer of the bundled model's kernels against Optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxwan.tiny.muon import muon

pytestmark = pytest.mark.slow  # trains, if little

SHAPES = {"long": (3, 3, 16, 8), "wide": (5, 20), "stack": (2, 3, 12, 10), "bias": (7,)}
TOLERANCE = 3e-5  # float32 sums in another order, through five rounds that amplify small singular values


def numbers(shapes, seed):
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}


def steps(optimizer, params, count=3):
    state, update, made = optimizer.init(params), jax.jit(optimizer.update), []
    for i in range(count):
        grads = numbers(SHAPES, i)
        updates, state = update({path: grads[path] for path in params}, state, params)
        made.append(updates)
    return made


@pytest.mark.parametrize(
    ("scale", "rms"),
    [(lambda i, o: max(1.0, o / i) ** 0.5, None), (lambda i, o: 0.2 * max(i, o) ** 0.5, 0.2)],
    ids=["by width", "of one size"],
)
def test_matrices_move_as_with_optax(scale, rms):
    axes = {"long": ((0, 1, 2), 3), "wide": (0, 1), "stack": (2, 3), "bias": None}

    def dimensions(params):
        return {path: axes[path] and optax.contrib.MuonDimensionNumbers(*axes[path]) for path in params}

    stacked = {"bias": None, "stack": 2}
    own = muon(lambda path: stacked.get(path, 0), scale=scale, weight_decay=0.1)
    optaxs = optax.contrib.muon(1.0, weight_decay=0.1, muon_weight_dimension_numbers=dimensions, consistent_rms=rms)
    params = numbers(SHAPES, 9)
    for ours, theirs in zip(steps(own, params), steps(optaxs, params), strict=True):
        for path in SHAPES.keys() - {"bias"}:
            away = jnp.linalg.norm(ours[path] - theirs[path]) / jnp.linalg.norm(theirs[path])
            assert away < TOLERANCE, path


def test_what_is_no_matrix_moves_as_with_adamw():
    params = numbers({"bias": (7,)}, 9)
    own = steps(muon(lambda path: None, scale=lambda i, o: 1.0, adam_rate=0.3, weight_decay=0.1), params)
    for ours, adams in zip(own, steps(optax.adamw(0.3, weight_decay=0.1), params), strict=True):
        assert jnp.allclose(ours["bias"], adams["bias"], rtol=1e-6)


def test_rows_without_a_gradient_stay():
    """Kernels' taps of earlier frames, while training sees single frames."""
    params = {"kernel": jnp.zeros((3, 4, 5))}
    optimizer = muon(lambda path: 0, scale=lambda i, o: 1.0)
    grads = {"kernel": numbers(SHAPES, 0)["wide"].reshape(5, 4, 5)[:3].at[:2].set(0)}
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    assert not updates["kernel"][:2].any() and updates["kernel"][2].all()


@pytest.mark.parametrize("shape", [(64, 16), (16, 16), (16, 64)], ids=["long", "square", "wide"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_of_low_rank_moves_matrices_as_far_as_it_may(shape, dtype):
    """As the first gradients are that come through layers which start at zero: their rounding must not grow."""
    rng = np.random.default_rng(0)
    grads = {"kernel": jnp.asarray(rng.normal(size=(shape[0], 2)) @ rng.normal(size=(2, shape[1])), jnp.float32)}
    optimizer = muon(lambda path: 0, scale=lambda i, o: 1.0, dtype=dtype)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(grads), grads)
    values = np.linalg.svd(np.asarray(updates["kernel"]), compute_uv=False)
    assert 0.6 < values[1] <= values[0] < 1.25  # where five rounds take any singular value
    assert values[2] < 0.01
