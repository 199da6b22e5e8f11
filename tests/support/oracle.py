"""What the tests against diffusers and transformers share."""

import numpy as np


def relative_error(actual, expected) -> float:
    """||actual - expected|| / ||expected|| in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
