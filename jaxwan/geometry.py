"""Pixels, latents and tokens: the only place that knows how sizes follow from one another.

81 frames of 720 x 1280 -> 21 x 90 x 160 latents -> 21 * 45 * 80 = 75,600 tokens.

Axis letters, the same in every signature, einsum string and suffix:

    B  batch                     S  tokens, T * (H/p) * (W/p)   N  attention heads
    T  latent frames             L  text tokens                 K  width of a head
    H  latent height             C  text width                  M  width of the MLP
    W  latent width              D  model width, N * K
    Z  latent channels           F  pixel frames
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """Sizes of one checkpoint: what its VAE shrinks, and the transformer's patch in latents.

    Defaults are those of Wan2.1 and A14B; TI2V-5B has spatial=16 and z_dim=48.
    Raises ValueError for a patch that spans frames or is not square: no Wan checkpoint has one.
    """

    temporal: int = 4
    spatial: int = 8
    patch: tuple[int, int, int] = (1, 2, 2)
    z_dim: int = 16

    def __post_init__(self):
        frames, height, width = self.patch
        if frames != 1 or height != width:
            raise ValueError(f"patch={self.patch} is not implemented: only (1, p, p) is, such as (1, 2, 2)")

    @property
    def stride(self) -> int:
        """Pixels per token, down and across: 16, or 32 for TI2V-5B."""
        return self.spatial * self.patch[1]

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T, H, W) of a video: (81, 720, 1280) -> (21, 90, 160). Raises ValueError like `check_size`."""
        self.check_size(num_frames, height, width)
        return (num_frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial

    def pixel_shape(self, t: int, h: int, w: int) -> tuple[int, int, int]:
        """(num_frames, height, width) of latents: (21, 90, 160) -> (81, 720, 1280)."""
        return (t - 1) * self.temporal + 1, h * self.spatial, w * self.spatial

    def token_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens along each axis: (81, 720, 1280) -> (21, 45, 80). Raises ValueError like `check_size`."""
        t, h, w = self.latent_shape(num_frames, height, width)
        return t, h // self.patch[1], w // self.patch[2]

    def num_tokens(self, num_frames: int, height: int, width: int) -> int:
        """Length S of the transformer's sequence: (81, 720, 1280) -> 75600. Raises ValueError like `check_size`."""
        t, h, w = self.token_grid(num_frames, height, width)
        return t * h * w

    def most_frames(self, available: int) -> int:
        """The largest valid num_frames in so many frames, at least one: 83 -> 81."""
        return (available - 1) // self.temporal * self.temporal + 1

    def check_more_frames(self, num_frames: int) -> None:
        """Raises ValueError for a number of frames that a video cannot go on with, which is 4k from 4 on."""
        if num_frames < 1 or num_frames % self.temporal:
            raise ValueError(
                f"num_frames={num_frames} of a video that goes on is no multiple of {self.temporal}: "
                f"{_nearest(num_frames, self.temporal, 0)}"
            )

    def check_size(self, num_frames: int, height: int, width: int) -> None:
        """Raises ValueError naming every size that does not fit and its nearest valid values. Nothing is rounded."""
        wanted = (
            ("num_frames", num_frames, self.temporal, 1, f"is not {self.temporal}k+1"),
            ("height", height, self.stride, 0, f"is no multiple of {self.stride}"),
            ("width", width, self.stride, 0, f"is no multiple of {self.stride}"),
        )
        wrong = [
            f"{name}={value} {rule}: {_nearest(value, step, offset)}"
            for name, value, step, offset, rule in wanted
            if value < 1 or value % step != offset % step
        ]
        if wrong:
            raise ValueError("; ".join(wrong))


def _nearest(value: int, step: int, offset: int) -> str:
    """The valid values (step * k + offset, at least 1) on both sides of an invalid `value`."""
    below = (value - offset) // step * step + offset
    if below < 1:
        return f"nearest is {offset or step}"
    return f"nearest are {below} and {below + step}"
