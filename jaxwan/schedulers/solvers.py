"""Solvers: functions of sigmas returning the weights of every step.

A step knows its input x, the corrected state `last` of the step before, the x0 estimate m = x - sigma * velocity and
the three estimates before it, m1 (newest) to m3. All solvers are linear in these, so each is two weight arrays:

    corrected = corrector[i] . (x, last, m, m1, m2, m3)
    x_next    = predictor[i] . (corrected, m, m1, m2, noise)

Noise levels are those of flow matching: x = (1 - sigma) * x0 + sigma * noise, lambda = log((1 - sigma) / sigma).
Everything is float64; the weights of each row reproduce x exactly when all estimates equal one x0 (the ODE is a line).
"""

import numpy as np
from jaxtyping import Float

Weights = tuple[Float[np.ndarray, "n 6"], Float[np.ndarray, "n 5"]]

MAX_ORDER = 3


def unipc(sigmas: Float[np.ndarray, " n1"], order: int) -> Weights:
    """UniPC of order 1 to 3, B(h) = expm1(-h) ("bh2"), on x0 estimates.

    Order p of a step is at most `order`, the steps left (at any number of steps), and the steps done plus one. The
    corrector runs from the second step on with the order the step before it had.
    Source: Zhao et al. 2023, arXiv 2302.04867; diffusers scheduling_unipc_multistep.py.
    """
    corrector, predictor = _identity(len(sigmas) - 1)
    orders = [min(order, len(predictor) - i, i + 1) for i in range(len(predictor))]
    for i, p in enumerate(orders):
        if i > 0:
            base, history, newest = _bh2_weights(sigmas, i - 1, orders[i - 1], corrects=True)
            corrector[i] = [0, base, newest, *history]
        base, history, _ = _bh2_weights(sigmas, i, p, corrects=False)
        predictor[i] = [base, *history, 0]
    return corrector, predictor


def dpmpp_2m(sigmas: Float[np.ndarray, " n1"]) -> Weights:
    """DPM-Solver++ 2M, midpoint form; first order in the first and the last step.

    Source: Lu et al. 2022, arXiv 2211.01095; diffusers scheduling_dpmsolver_multistep.py.
    """
    corrector, predictor = euler(sigmas)
    lambdas = _lambdas(sigmas)
    for i in range(1, len(predictor) - 1):
        r = (lambdas[i] - lambdas[i - 1]) / (lambdas[i + 1] - lambdas[i])
        slope = predictor[i, 1] / (2 * r)  # times m - m1, half a step ahead
        predictor[i, 1:3] += slope, -slope
    return corrector, predictor


def euler(sigmas: Float[np.ndarray, " n1"]) -> Weights:
    """Euler: x + (sigma_next - sigma) * velocity, written with velocity = (x - m) / sigma.

    Source: diffusers scheduling_flow_match_euler_discrete.py:step.
    """
    corrector, predictor = _identity(len(sigmas) - 1)
    ratio = sigmas[1:] / sigmas[:-1]
    predictor[:, 0], predictor[:, 1] = ratio, 1 - ratio
    return corrector, predictor


def renoise(sigmas: Float[np.ndarray, " n1"]) -> Weights:
    """Few-step sampling of distilled models: the estimate, with fresh noise up to the next level.

    Source: Luo et al. 2023, arXiv 2310.04378; diffusers scheduling_flow_match_lcm.py:step.
    """
    corrector, predictor = _identity(len(sigmas) - 1)
    predictor[:, 0], predictor[:, 1], predictor[:, 4] = 0, 1 - sigmas[1:], sigmas[1:]
    return corrector, predictor


def _identity(num_steps: int) -> Weights:
    """Weights that keep x: no corrector, no move."""
    corrector, predictor = np.zeros((num_steps, 6)), np.zeros((num_steps, 5))
    corrector[:, 0] = predictor[:, 0] = 1
    return corrector, predictor


def _lambdas(sigmas: np.ndarray) -> np.ndarray:
    """Half the log signal-to-noise ratio of every level but the final 0, where it is infinite."""
    return np.log1p(-sigmas[:-1]) - np.log(sigmas[:-1])


def _bh2_weights(sigmas: np.ndarray, i: int, order: int, *, corrects: bool) -> tuple[float, np.ndarray, float]:
    """Weights of one move from level i to i + 1: of x, of the estimates at levels i, i-1, i-2, of the one at i + 1.

    With h = lambda[i+1] - lambda[i], q = sigma[i+1] / sigma[i] and the slopes D_k = (m_k - m_i) / r_k at the relative
    distances r_k = (lambda[k] - lambda[i]) / h:

        x' = q * x + (1 - q) * (m_i + sum_k rho_k * D_k)

    The predictor takes k = i-1, i-2 (order - 1 of them), the corrector also k = i+1, where r = 1. rho solves
    sum_k rho_k * r_k^(j-1) = b_j for j = 1, 2, …; a single unknown is 0.5 by Diffusers' choice. The papers' alpha *
    expm1(-h) is q - 1 in flow matching, so the last step (order 1, sigma 0, h infinite) needs no special case.
    """
    q = sigmas[i + 1] / sigmas[i]
    shares, newest = np.zeros(MAX_ORDER), 0.0  # rho_k / r_k, by distance back from i, and of level i + 1
    if order > 1 or corrects:
        lambdas = _lambdas(sigmas)
        h = lambdas[i + 1] - lambdas[i]
        back = (lambdas[i - order + 1 : i][::-1] - lambdas[i]) / h
        r = np.append(back, 1.0) if corrects else back
        rho = np.array([0.5]) if len(r) == 1 else np.linalg.solve(np.vander(r, increasing=True).T, _moments(h, len(r)))
        shares[1 : len(back) + 1] = rho[: len(back)] / back
        newest = rho[-1] if corrects else 0.0
    shares[0] = 1 - shares.sum() - newest
    return q, (1 - q) * shares, (1 - q) * newest


def _moments(h: float, count: int) -> np.ndarray:
    """b_j = j! * z * phi_{j+1}(z) / expm1(z) at z = -h, for j = 1 … count.

    phi_1(z) = expm1(z) / z and phi_{j+1}(z) = (phi_j(z) - 1/j!) / z.
    """
    z, factorial, b = -h, 1.0, []
    phi = np.expm1(z) / z
    for j in range(1, count + 1):
        z_phi = phi - 1 / factorial
        b.append(factorial * z_phi / np.expm1(z))
        phi, factorial = z_phi / z, factorial * (j + 1)
    return np.array(b)
