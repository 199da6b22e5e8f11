"""Weights: what holds for any solver of the flow ODE, whatever its order."""

import numpy as np
import pytest

from jaxwan.schedulers import SAMPLERS, make_table

CASES = [(s, n, shift) for s in SAMPLERS if s != "renoise" for n in (1, 2, 3, 7, 50, 128) for shift in (1.0, 5.0, 12.0)]


@pytest.mark.parametrize(("sampler", "n", "shift"), CASES)
def test_rows_keep_a_straight_line_to_one_x0(sampler, n, shift):
    """With every estimate equal to x0, states are (1 - sigma) * x0 + sigma * noise: two sums of weights per row."""
    table = make_table(sampler, n, shift)
    s, corrector, predictor = table.sigmas[: n + 1], table.corrector[:n], table.predictor[:n]
    previous = np.concatenate([[0], s[: n - 1]])  # row 0 has no `last`
    noise = corrector[:, 0] * s[:n] + corrector[:, 1] * previous
    signal = corrector[:, 0] * (1 - s[:n]) + corrector[:, 1] * (1 - previous) + corrector[:, 2:].sum(1)
    np.testing.assert_allclose([noise, signal], [s[:n], 1 - s[:n]], atol=1e-12)  # float64 sums of six weights
    np.testing.assert_allclose(predictor[:, 0] * s[:n] + predictor[:, 4], s[1:], atol=1e-12)
    np.testing.assert_allclose(predictor[:, 0] * (1 - s[:n]) + predictor[:, 1:4].sum(1), 1 - s[1:], atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_first_row_has_no_history_and_the_last_returns_the_estimate(sampler):
    table = (
        make_table("renoise", None, 1.0, timesteps=[1000, 500]) if sampler == "renoise" else make_table(sampler, 6, 5.0)
    )
    np.testing.assert_array_equal(table.corrector[0], [1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(table.predictor[0, 2:4], [0, 0])
    np.testing.assert_array_equal(table.predictor[table.num_steps - 1], [0, 1, 0, 0, 0])


def test_rows_behind_the_last_keep_x():
    table = make_table("unipc", 5, 3.0)
    assert table.sigmas.shape == (129,) and table.corrector.shape == (128, 6) and table.predictor.shape == (128, 5)
    np.testing.assert_array_equal(table.corrector[5:], np.tile(np.eye(6)[0], (123, 1)))
    np.testing.assert_array_equal(table.predictor[5:], np.tile(np.eye(5)[0], (123, 1)))
    np.testing.assert_array_equal(table.sigmas[5:], 0)
    np.testing.assert_array_equal(table.timesteps[5:], 0)


def test_orders_two_and_three_are_the_same_at_four_steps_only():
    for n, same in ((3, True), (4, True), (5, False)):
        two, three = (make_table(f"unipc{k}", n, 3.0) for k in (2, 3))
        assert (np.array_equal(two.predictor, three.predictor)) == same


def test_unipc_takes_its_order_from_the_argument_or_the_name():
    for order in (1, 2, 3):
        named = make_table(f"unipc{order}", 9, 3.0)
        np.testing.assert_array_equal(make_table("unipc", 9, 3.0, order=order).corrector, named.corrector)
    np.testing.assert_array_equal(make_table("unipc", 9, 3.0).predictor, make_table("unipc2", 9, 3.0).predictor)


def test_order_one_predicts_as_euler_does():
    unipc = make_table("unipc1", 8, 3.0)
    ratio = unipc.sigmas[1:9] / unipc.sigmas[:8]
    np.testing.assert_allclose(unipc.predictor[:8, :2], np.stack([ratio, 1 - ratio], 1), atol=1e-15)
