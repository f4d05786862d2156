"""The embedded model's world: a small grammar of captions, and specs that say exactly what a caption shows.

A *spec* is a dict of tensors with one row per clip (see :func:`sample`). :func:`captions` words it,
:func:`token_ids` tokenises it on the device, and :func:`drawing.draw` draws it. Whole (colour, shape, motion)
triples are held out of training, so that a test measures composition and not recall.
"""

from __future__ import annotations

import torch

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (240, 220, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 225),
    "purple": (140, 50, 180),
    "pink": (245, 120, 185),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "growing",
    "shrinking",
    "rotating clockwise",
    "rotating counterclockwise",
    "bouncing",
    "standing still",
)
BACKGROUNDS = ("black", "gray", "striped", "checkered", "speckled", "cloudy", "drifting", "rippling")
SIZES: dict[str, float] = {"small": 0.13, "medium": 0.18, "large": 0.25}
CAMERAS = ("", "panning left", "panning right")
RELATIONS = ("on the left of", "on the right of", "on the top of", "on the bottom of")
DIRECTIONS = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))  # of each relation; y points down
SEEDS = 12  # uniform random numbers a clip: places, phases, texture
TEXT_LENGTH = 32

# Words of the grammar that are no value of a list above.
FILLERS = ("a", "an", "on", "background", "camera", ",")
SPECIALS = ("<pad>", "</s>", "<unk>")
_COLOUR_NAMES, _SIZE_NAMES = tuple(COLOURS), tuple(SIZES)
_ROUND = (SHAPES.index("circle"), SHAPES.index("ring"))
_CW, _CCW = MOTIONS.index("rotating clockwise"), MOTIONS.index("rotating counterclockwise")
_STILL = MOTIONS.index("standing still")
_PAN = tuple(BACKGROUNDS.index(name) for name in ("striped", "checkered", "speckled", "cloudy"))


def vocabulary() -> list[str]:
    """All words in the order of their ids: the special words first, then the grammar's, sorted."""
    lists = (_COLOUR_NAMES, SHAPES, MOTIONS, BACKGROUNDS, _SIZE_NAMES, CAMERAS, RELATIONS, FILLERS)
    return [*SPECIALS, *sorted({word for values in lists for value in values for word in value.split()})]


def held_out(spec: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which rows are never trained on, (B,) bool.

    One tenth of the (colour, shape, motion) triples; with two objects, of the (colour, shape, second shape) ones.
    """
    third = torch.where(spec["two"] == 1, spec["shape2"], spec["motion"])
    return (spec["colour"] + 3 * spec["shape"] + 7 * third) % 10 == 0


def sample(
    count: int,
    split: str = "train",
    device: torch.device | str = "cpu",
    two: float = 0.5,
    generator: torch.Generator | None = None,
    small: bool = True,
) -> dict[str, torch.Tensor]:
    """Random specs.

    Args:
        count: rows wanted. The split "held" draws more and keeps the held-out ones, so it synchronises.
        split: "train" (no held-out triple, captions sometimes leave parts out) or "held" (only held-out triples,
            complete captions).
        two: share of specs with two objects.
        small: whether small objects are drawn; False for frames too small to show them.

    Returns:
        A dict of int64 tensors (count,): colour, shape, motion, size, back, cam, two, rel, colour2, shape2,
        say_size, say_motion, say_back (whether the caption tells it), and "seed", float (count, SEEDS).

    Raises:
        ValueError: for an unknown split.
    """
    if split not in ("train", "held"):
        raise ValueError(f"split must be 'train' or 'held', not {split!r}")
    rows = count if split == "train" else 20 * count + 400
    spec = _any_specs(rows, device, two, generator, small)
    bad = held_out(spec)
    if split == "held":
        spec["say_size"].fill_(1), spec["say_motion"].fill_(1), spec["say_back"].fill_(1)
        keep = bad.nonzero()[:count, 0]
        return {name: values[keep] for name, values in spec.items()}
    spec["colour"] = torch.where(bad, (spec["colour"] + 1) % 8, spec["colour"])  # a step of 1 or -7 always leaves them
    same = spec["colour2"] == spec["colour"]
    spec["colour2"] = torch.where(same, (spec["colour"] + 1) % 8, spec["colour2"])
    return spec


def _any_specs(rows, device, two, generator, small) -> dict[str, torch.Tensor]:
    def pick(upto: int) -> torch.Tensor:
        return torch.randint(upto, (rows,), device=device, generator=generator)

    def chance(share: float) -> torch.Tensor:
        return torch.rand(rows, device=device, generator=generator) < share

    spec = dict(colour=pick(8), shape=pick(8), motion=pick(10), back=pick(8), rel=pick(4), shape2=pick(8))
    spec["size"] = pick(3) if small else 1 + pick(2)
    spec["two"] = chance(two).long()
    spec["colour2"] = (spec["colour"] + 1 + pick(7)) % 8
    turns = (spec["motion"] == _CW) | (spec["motion"] == _CCW)
    round_shape = (spec["shape"] == _ROUND[0]) | (spec["shape"] == _ROUND[1])
    # A turning circle shows nothing: it grows or shrinks instead.
    spec["motion"] = torch.where(round_shape & turns, spec["motion"] - 2, spec["motion"])
    can_pan = torch.zeros(rows, dtype=torch.bool, device=device)
    for index in _PAN:
        can_pan |= spec["back"] == index
    spec["cam"] = (1 + pick(2)) * (can_pan & (spec["two"] == 0) & chance(0.35)).long()
    for name, share in (("size", 0.8), ("motion", 0.9), ("back", 0.9)):
        spec["say_" + name] = chance(share).long()
    spec["seed"] = torch.rand(rows, SEEDS, device=device, generator=generator)
    return spec


def still(spec: dict[str, torch.Tensor], say: float = 0.5) -> dict[str, torch.Tensor]:
    """The same specs as single images: no camera, and the motion is told in only `say` of the captions."""
    told = (torch.rand_like(spec["seed"][:, 0]) < say).long()
    return {**spec, "cam": torch.zeros_like(spec["cam"]), "say_motion": spec["say_motion"] * told}


def captions(spec: dict[str, torch.Tensor]) -> list[str]:
    """The caption of every row."""
    rows = {name: values.tolist() for name, values in spec.items() if name != "seed"}
    return [_caption({name: values[i] for name, values in rows.items()}) for i in range(len(rows["two"]))]


def _caption(row: dict[str, int]) -> str:
    thing = f"{_COLOUR_NAMES[row['colour']]} {SHAPES[row['shape']]}"
    if row["two"]:
        other = f"{_COLOUR_NAMES[row['colour2']]} {SHAPES[row['shape2']]}"
        text = f"{_with_article(thing)} {RELATIONS[row['rel']]} {_with_article(other)}"
    else:
        text = _with_article(f"{_SIZE_NAMES[row['size']]} {thing}" if row["say_size"] else thing)
        text += f" {MOTIONS[row['motion']]}" if row["say_motion"] else ""
    text += f" on a {BACKGROUNDS[row['back']]} background" if row["say_back"] else ""
    return text + (f", camera {CAMERAS[row['cam']]}" if row["cam"] else "")


def _with_article(text: str) -> str:
    return ("an " if text[0] in "aeiou" else "a ") + text


class TokenTables:
    """Captions as token ids, made on the device from specs without a host synchronisation.

    ``tables(spec)`` equals the tokenizer applied to ``captions(spec)``: every phrase of the grammar is a slot, looked
    up in a table, and the empty places between the slots are squeezed out.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        ids = {word: i for i, word in enumerate(vocabulary())}

        def table(phrases) -> torch.Tensor:
            width = max(len(phrase.split()) for phrase in phrases)
            rows = [[ids[word] for word in phrase.split()] for phrase in phrases]
            return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)

        self.first = table([_with_article(name) for name in _COLOUR_NAMES])
        self.sized = table([f"a {size} {name}" for size in _SIZE_NAMES for name in _COLOUR_NAMES])
        self.shape, self.motion, self.relation = table(SHAPES), table(MOTIONS), table(RELATIONS)
        self.back = table([f"on a {name} background" for name in BACKGROUNDS])
        self.cam = table([f", camera {name}" if name else "" for name in CAMERAS])
        self.end = torch.tensor([[SPECIALS.index("</s>")]], device=device)

    def __call__(self, spec: dict[str, torch.Tensor]) -> torch.Tensor:
        """Specs -> ids (B, TEXT_LENGTH) int64, padded with 0 after the end token."""

        def when(flag: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return rows * flag[:, None]

        two, one = spec["two"], 1 - spec["two"]
        sized = one * spec["say_size"]
        slots = [
            when(1 - sized, self.first[spec["colour"]]),
            when(sized, self.sized[spec["size"] * len(COLOURS) + spec["colour"]]),
            self.shape[spec["shape"]],
            when(two, self.relation[spec["rel"]]),
            when(two, self.first[spec["colour2"]]),
            when(two, self.shape[spec["shape2"]]),
            when(one * spec["say_motion"], self.motion[spec["motion"]]),
            when(spec["say_back"], self.back[spec["back"]]),
            when((spec["cam"] > 0).long(), self.cam[spec["cam"]]),
            self.end.expand(len(two), 1),
        ]
        ids = torch.cat(slots, 1)
        order = (ids == 0).long().argsort(dim=1, stable=True)
        return torch.nn.functional.pad(ids.gather(1, order), (0, TEXT_LENGTH))[:, :TEXT_LENGTH]


def empty_ids(count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Ids of the empty caption, (count, TEXT_LENGTH): what a caption becomes when it is dropped in training."""
    ids = torch.zeros(count, TEXT_LENGTH, dtype=torch.int64, device=device)
    ids[:, 0].fill_(SPECIALS.index("</s>"))  # filled in place: assigning would copy from the host
    return ids
