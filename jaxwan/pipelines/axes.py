"""The border between the public axis order of latents, Diffusers', and the one inside."""

import numpy as np
from jaxtyping import Float


def to_public(latents: Float[np.ndarray, "*b t h w z"]) -> Float[np.ndarray, "*b z t h w"]:
    """[…, T, H, W, Z] -> (…, C, T, h, w)."""
    return np.ascontiguousarray(np.moveaxis(latents, -1, -4))


def to_internal(latents: Float[np.ndarray, "*b z t h w"]) -> Float[np.ndarray, "*b t h w z"]:
    """(…, C, T, h, w) -> […, T, H, W, Z]."""
    return np.ascontiguousarray(np.moveaxis(latents, -4, -1))
