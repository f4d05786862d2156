"""What the tokens of a sequence are: a video (or image) grid and, in the same sequence, text tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

import torch

TextPlace = Literal["none", "front", "back"]
TEXT_PLACES: tuple[TextPlace, ...] = get_args(TextPlace)


@dataclass(frozen=True)
class TokenGrid:
    """The grid of latent tokens, and where text tokens sit in the same sequence.

    Video tokens are numbered frame by frame, row by row ("frame-major raster"): token (t, y, x) is
    (t * height + y) * width + x, counted from `video_start`. An image is a grid of one frame.

    Args:
        frames, height, width: sizes of the grid in tokens (after patching), each at least 1.
        text: number of text tokens in the sequence.
        text_at: "front", "back" or "none"; "none" only without text tokens.

    Raises:
        ValueError: when a size is not a whole number in its range, or text has no place.
    """

    frames: int
    height: int
    width: int
    text: int = 0
    text_at: TextPlace = "none"

    def __post_init__(self) -> None:
        for name, low in (("frames", 1), ("height", 1), ("width", 1), ("text", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"TokenGrid: {name}={value!r} is not allowed; use a whole number >= {low}")
        if self.text_at not in TEXT_PLACES:
            raise ValueError(f"TokenGrid: text_at={self.text_at!r} is not allowed; use one of {TEXT_PLACES}")
        if self.text and self.text_at == "none":
            raise ValueError(f"TokenGrid: text={self.text} needs a place; use text_at='front' or 'back'")

    @classmethod
    def parse(cls, form: str, *, text: int = 0, text_at: TextPlace = "none") -> TokenGrid:
        """The grid written as "21x45x80" (frames x height x width), or "45x80" for an image.

        Args:
            form: two or three whole numbers joined by "x".
            text, text_at: as in the constructor.

        Raises:
            ValueError: when the form is not understood.
        """
        match = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\d+)", form.strip().lower())
        if match is None:
            raise ValueError(f"TokenGrid: {form!r} is not a grid; write frames x height x width, as '21x45x80'")
        frames, height, width = match.groups(default="1")
        return cls(int(frames), int(height), int(width), text=text, text_at=text_at)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        return self.frames, self.height, self.width

    @property
    def frame_tokens(self) -> int:
        """Tokens of one frame."""
        return self.height * self.width

    @property
    def video(self) -> int:
        """Video tokens."""
        return self.frames * self.frame_tokens

    @property
    def tokens(self) -> int:
        """Tokens of the whole sequence, text included."""
        return self.video + self.text

    @property
    def video_start(self) -> int:
        """Place of the first video token in the sequence."""
        return self.text if self.text_at == "front" else 0

    @property
    def text_start(self) -> int:
        """Place of the first text token in the sequence."""
        return 0 if self.text_at == "front" else self.video

    @property
    def video_slice(self) -> slice:
        """Where the video tokens are."""
        return slice(self.video_start, self.video_start + self.video)

    @property
    def text_slice(self) -> slice:
        """Where the text tokens are (empty without text)."""
        return slice(self.text_start, self.text_start + self.text)

    def coordinates(self, device: torch.device | str | None = None) -> torch.Tensor:
        """(t, y, x) of every video token, in frame-major raster order.

        Returns:
            int32 (video, 3).
        """
        token = torch.arange(self.video, device=device, dtype=torch.int32)
        row = torch.div(token, self.width, rounding_mode="floor")
        frame = torch.div(row, self.height, rounding_mode="floor")
        return torch.stack((frame, row - frame * self.height, token - row * self.width), dim=1)

    def __str__(self) -> str:
        """The grid as `parse` reads it, with the text when there is any."""
        video = f"{self.frames}x{self.height}x{self.width}"
        return f"{video}+{self.text} ({self.text_at})" if self.text else video
