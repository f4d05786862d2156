"""What every method is: a named composition of order, score, select, operate and remember."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..blockmask import BlockLayout, BlockMask
from ..grid import TokenGrid
from ..memory import State
from ..operators import Drop, Operator
from ..routing import pool, pool_moments


@dataclass
class Call:
    """One self-attention call as a method sees it.

    Args:
        query, key: (B, L, H, D) activations after norms and rotary embedding; L = grid.tokens.
        value: (B, L, H, D).
        grid: what the tokens are.
        scale: softmax scale.
        layer, layers: index of this attention layer among the model's self-attention layers, and their number.
        step, num_steps: denoising step of the run, and the run's length (None when unknown).
        branch: name of the CFG branch ("cond", "uncond", ...).
        key_mask: (B, L) bool, True where the key is a real token, or None when all are.
        cached: `cached(key, build)` returns `build()`, remembered for this shape across layers and steps.
        family: name of the model family ("wan", ...), for family defaults.
        generator: seeds sampled rows; deterministic for a given run, layer and step.
        state: what the method keeps from step to step of this layer and branch: `call.state.keep("name", value)`,
            `call.state.recall("name")`. Never a reference to activations that are not needed later: it costs memory.
        heads: int64 (H,), which of the layer's heads these are, when the others are on other ranks (Ulysses); None:
            all of them. `own` picks from what is made for all heads.
        ranks: how many ranks share the heads.
        host_heads: the same heads as numbers, for methods with `head_costs`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grid: TokenGrid
    scale: float
    layer: int = 0
    layers: int = 1
    step: int = 0
    num_steps: int | None = None
    branch: str = ""
    key_mask: torch.Tensor | None = None
    cached: Callable[[Hashable, Callable[[], Any]], Any] = lambda key, build: build()
    family: str = ""
    generator: torch.Generator | None = None
    state: State = field(default_factory=State)
    heads: torch.Tensor | None = None
    ranks: int = 1
    host_heads: tuple[int, ...] | None = None
    _means: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def device(self) -> torch.device:
        """Device of the activations."""
        return self.query.device

    @property
    def all_heads(self) -> int:
        """Heads of the layer, those of other ranks counted in."""
        return self.query.shape[2] * self.ranks

    def own(self, table: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The rows of this call's heads in a table of all heads of the layer.

        Args:
            table: on the call's device, with `all_heads` rows along `dim`.
            dim: which dimension counts heads.
        """
        return table if self.heads is None else table.index_select(dim, self.heads)

    def block_mean(self, name: str, layout: BlockLayout) -> torch.Tensor:
        """Mean of the real tokens of every block, pooled once per call however many parts ask for it.

        Args:
            name: "query", "key" or "value".
            layout: how the tokens sit in blocks.

        Returns:
            float32 (B, H, blocks, D); tokens that `key_mask` leaves out enter no mean of keys and values.
        """
        x = getattr(self, name)
        place = (name, id(x), id(layout))
        if place not in self._means:
            mean = pool(x, layout, mask=None if name == "query" else self.key_mask)
            # What the ids belong to is kept along: an id may be used again once its owner is gone.
            self._means[place] = (mean, x, layout)
        return self._means[place][0]

    def block_moments(self, name: str, layout: BlockLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """`block_mean`, kept for those who ask for it later, and the mean squared norm of every block's real tokens,
        float32 (B, H, blocks), from the same reading; args as there."""
        x = getattr(self, name)
        mean, squares = pool_moments(x, layout, mask=None if name == "query" else self.key_mask)
        self._means[name, id(x), id(layout)] = (mean, x, layout)
        return mean, squares

    def head_index(self, heads: tuple[int, ...]) -> torch.Tensor:
        """int64 (heads,) on the call's device, made once."""
        index: torch.Tensor = self.cached(("heads", heads), lambda: torch.tensor(heads, device=self.device))
        return index

    def of_heads(self, heads: tuple[int, ...]) -> Call:
        """The call as some of its heads see it, cut out once per call however many parts ask for it."""
        place = ("heads", heads)
        if place not in self._means:
            index = self.head_index(heads)
            query, key, value = (x.index_select(2, index) for x in (self.query, self.key, self.value))
            which = index if self.heads is None else self.heads[index]
            self._means[place] = dataclasses.replace(self, query=query, key=key, value=value, heads=which)
        part: Call = self._means[place]
        return part


@dataclass
class Plan:
    """What a method decided for one call: the mask to run, remarks for the report, and what is computed for the mask.

    `mask` None means: this call is dense by the method's own decision (counted, not a fallback).
    """

    mask: BlockMask | None
    notes: dict[str, Any] = field(default_factory=dict)
    operator: Operator = field(default_factory=Drop)


@dataclass(frozen=True)
class Method:
    """Base of all methods: a frozen dataclass whose fields are the method's options.

    A subclass sets the class variables, checks its options in `__post_init__` (ValueError in one line that
    names the option and the allowed values) and implements `plan`. `scored` says whether masks depend on
    the activations: only then does `refresh=N` keep them for N steps. `family_defaults` holds the paper's
    settings by model family, as data: the method's options together with `dense_steps` and `dense_layers`.
    `lists` says whether its masks are lists of blocks and nothing more, which other methods can choose from.
    `observes` asks that `observe` sees the calls that the schedule keeps dense. `needs` says in a few words what the
    method needs beyond a pipeline ("trained gate weights", "calibration file (optional)"); empty: nothing.
    `hidden` methods are made by a part of the library, not by name, and are in no list.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    arxiv: ClassVar[str | None] = None
    parts: ClassVar[dict[str, str]] = {}
    needs: ClassVar[str] = ""
    scored: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    lists: ClassVar[bool] = True
    hidden: ClassVar[bool] = False
    family_defaults: ClassVar[dict[str, dict[str, Any]]] = {}

    def plan(self, call: Call) -> Plan:
        """Decide which key blocks each query block sees.

        Args:
            call: the activations and where the run stands.

        Returns:
            The plan; its mask covers the whole sequence, text included.
        """
        raise NotImplementedError

    def observe(self, call: Call, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Look at a call that the schedule kept dense (with `observes`); keep in `call.state` what later steps need.

        Args:
            call: the activations.
            out: (B, L, H, D), dense attention.
            lse: (B, H, L) float32, natural logarithm, where the dense kernel gave it, else None.
        """

    def operators(self) -> tuple[type[Operator], ...]:
        """Kinds of operators that its plans carry: they say which kinds of `reuse` go with the method."""
        return (Drop,)

    def head_costs(self) -> torch.Tensor | None:
        """What every head costs, float32 (layers, heads) on the CPU, where that is known before the run, or None.

        Under Ulysses parallelism the heads are then spread by these costs for good, and calls name theirs in
        `host_heads` too; otherwise by what the last step kept.
        """
        return None

    def against_ranks(self) -> str:
        """Why the heads of a layer cannot be spread over ranks (Ulysses parallelism); empty: each is by itself."""
        return ""

    def check(self, grid: TokenGrid) -> None:
        """Raise ValueError, in one line, when an option cannot serve this grid (too large a window, ...)."""

    def remarks(self, grid: TokenGrid | None, num_steps: int | None) -> list[str]:
        """Notes for the summary of a run with this grid (None before the first call) and so many steps (or None)."""
        return []

    def at_density(self, density: float) -> Method:
        """The same method with its density option changed.

        Raises:
            ValueError: when the method has no `density` option.
        """
        names = [f.name for f in dataclasses.fields(self)]
        if "density" not in names:
            raise ValueError(f"method {self.name!r} has no option 'density'; its options are {names}")
        return dataclasses.replace(self, density=density)  # type: ignore[call-arg]


def check_range(method: str, name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise ValueError unless `value` is a number in [low, high] (or (low, high] with `open_low`)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (low < value <= high if open_low else low <= value <= high):
        bracket = "(" if open_low else "["
        raise ValueError(f"{method}: {name}={value!r} is not allowed; use a number in {bracket}{low}, {high}]")
