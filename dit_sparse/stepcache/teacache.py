"""TeaCache (arXiv 2411.19108) as a hook of Diffusers, in the four parts of its other caches.

How much a cheap signal changed since the last step, put through a polynomial, estimates how much the output of the
transformer blocks changes. The estimates of the steps in a row are added up; while the sum stays below a threshold the
blocks are not run, and what they added at the last computed step is added again.

The estimate is one number that decides what runs, so it is read from the device once for each forward: that wait is
part of TeaCache, as it is of First Block Cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor

from .coefficients import are_numbers
from .signals import EMBEDDING, signal_of

HEAD_HOOK, BLOCK_HOOK, EMBEDDING_HOOK = "teacache_head_block", "teacache_block", "teacache_embedding"
HOOKS = (HEAD_HOOK, BLOCK_HOOK, EMBEDDING_HOOK)

Where = Callable[[], tuple[int, int | None]]


@dataclass
class TeaCacheConfig:
    """Configuration of TeaCache.

    Args:
        coefficients: of the polynomial, the highest power first; or the name of a published set (docs/step-caches.md);
            None: those of the model, where there are some.
        threshold: a step is computed once the estimates since the last computed one reach it; None: the model's own.
        signal: "modulated" (input of the first block's attention), "modulation" (the time embedding as the blocks get
            it) or "embedding" (the time embedding itself); None: what the coefficients were fitted on.
        first_steps, last_steps: steps at both ends that are always computed; first_steps=None: the model's own.
        num_inference_steps: length of the run, where nothing else tells it.
        calibrate: compute every step, and note how signal and output change.
    """

    coefficients: Sequence[float] | str | None = None
    threshold: float | None = None
    signal: str | None = None
    first_steps: int | None = None
    last_steps: int = 1
    num_inference_steps: int | None = None
    calibrate: bool = False


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """Value at x of the polynomial with these coefficients, the highest power first."""
    total = 0.0
    for coefficient in coefficients:
        total = total * x + coefficient
    return total


def relative_change(now: Tensor, before: Tensor) -> Tensor:
    """Mean |now - before| over mean |before|, a scalar in float32; both of any, the same, shape."""
    now, before = now.float(), before.float()
    return (now - before).abs().mean() / before.abs().mean()


class TeaCacheState(BaseState):
    """What one branch (conditional, unconditional) remembers.

    Attributes:
        step: the last step seen; -1 before the first.
        accumulated: estimated change since the last computed step.
        previous: the signal at the last step, also when that was skipped.
        residual: what the blocks added to (hidden, text) at the last computed step.
        skip: the forward under way is answered from the cache.
        records: with `calibrate`: (change of the signal, change of the output) of each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Forget everything."""
        self.step, self.accumulated, self.skip = -1, 0.0, False
        self.previous: Tensor | None = None
        self.residual: tuple[Tensor | None, Tensor | None] | None = None
        self.inputs: tuple[Tensor, Tensor | None] | None = None
        self.output: Tensor | None = None
        self.change: Tensor | None = None
        self.records: list[tuple[float, float]] = []

    def decide(self, config: TeaCacheConfig, step: int, length: int | None, signal: Tensor) -> bool:
        """Whether the step can be skipped; reads one number from the device unless the step is computed anyway.

        Args:
            config: with coefficients and threshold.
            step, length: place in the run, from 0; length None when unknown.
            signal: this step's.
        """
        if step < self.step:
            self.reset()
        before, self.previous, self.step = self.previous, signal.detach(), step
        if before is not None and before.shape != signal.shape:
            before, self.residual = None, None
        forced = step < (config.first_steps or 1) or (length is not None and step >= length - config.last_steps)
        if config.calibrate:
            self.change = None if before is None else relative_change(signal, before)
        if config.calibrate or forced or before is None or self.residual is None:
            self.accumulated = 0.0
            return False
        assert config.threshold is not None and config.coefficients is not None  # `resolve` filled them in
        self.accumulated += polynomial(config.coefficients, float(relative_change(signal, before)))  # type: ignore
        if not self.accumulated < config.threshold:  # also when it is no number: a signal of zeros, an overflow
            self.accumulated = 0.0
            return False
        return True

    def note(self, output: Tensor) -> None:
        """With `calibrate`: how far the output moved, beside the signal."""
        if self.change is not None and self.output is not None and self.output.shape == output.shape:
            self.records.append((float(self.change), float(relative_change(output, self.output))))
        self.output = output.detach()


def streams(metadata: TransformerBlockMetadata, args: Any, kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The (hidden, text) arguments of a block; text is None where the block returns none."""
    hidden = metadata._get_parameter_from_args_kwargs(metadata.hidden_states_argument_name, args, kwargs)
    if metadata.return_encoder_hidden_states_index is None:
        return hidden, None
    name = metadata.encoder_hidden_states_argument_name
    return hidden, metadata._get_parameter_from_args_kwargs(name, args, kwargs)


def returned(metadata: TransformerBlockMetadata, hidden: Tensor, text: Tensor | None) -> Any:
    """(hidden, text) in the form in which the block returns them."""
    if metadata.return_encoder_hidden_states_index is None:
        return hidden
    places = {metadata.return_hidden_states_index: hidden, metadata.return_encoder_hidden_states_index: text}
    return tuple(places.get(i) for i in range(max(places) + 1))


def outputs(metadata: TransformerBlockMetadata, output: Any) -> tuple[Tensor, Tensor | None]:
    """(hidden, text) from what a block returned."""
    if not isinstance(output, tuple):
        return output, None
    index = metadata.return_encoder_hidden_states_index
    return output[metadata.return_hidden_states_index], None if index is None else output[index]


def _added(after: Tensor | None, before: Tensor | None) -> Tensor | None:
    if after is None or before is None or after.shape != before.shape:
        return None
    return after - before


def _sum(x: Tensor | None, residual: Tensor | None) -> Any:
    return x if x is None or residual is None else x + residual.to(x.device)


class _BlockHook(ModelHook):
    """Passes its inputs on while a forward is skipped; behind the last block it takes the residual."""

    def __init__(self, manager: StateManager, config: TeaCacheConfig, last: bool) -> None:
        super().__init__()
        self.manager, self.config, self.last = manager, config, last

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        """Look up how the block takes and returns its streams."""
        self.metadata = TransformerBlockRegistry.get(unwrap_module(module).__class__)
        return module

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The block, or its inputs."""
        state: TeaCacheState = self.manager.get_state()
        if state.skip:
            return returned(self.metadata, *streams(self.metadata, args, kwargs))
        output = self.fn_ref.original_forward(*args, **kwargs)  # type: ignore[misc]
        if self.last:
            self._take(state, outputs(self.metadata, output))
        return output

    @torch.compiler.disable
    def _take(self, state: TeaCacheState, after: tuple[Tensor, Tensor | None]) -> None:
        assert state.inputs is not None  # the first block ran in the same forward
        hidden, text = state.inputs
        state.inputs = None
        residual = _added(after[0], hidden)
        state.residual = None if residual is None else (residual, _added(after[1], text))
        if self.config.calibrate:
            state.note(after[0])


class _HeadHook(ModelHook):
    """Decides before the first block; answers in its place when the forward is skipped."""

    _is_stateful = True

    def __init__(self, manager: StateManager, config: TeaCacheConfig, where: Where | None,
                 embedding: _EmbeddingHook | None) -> None:
        super().__init__()
        self.manager, self.config, self.where, self.embedding = manager, config, where, embedding

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        """Look up the block's streams and its signal."""
        block = unwrap_module(module)
        self.metadata = TransformerBlockRegistry.get(block.__class__)
        self.signal = signal_of(block, self.config.signal)
        return module

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The first block, or the sum of its inputs and the residuals."""
        state: TeaCacheState = self.manager.get_state()
        hidden, text = streams(self.metadata, args, kwargs)
        state.skip = self._skips(module, state, hidden, args, kwargs)
        if state.skip:
            assert state.residual is not None  # `decide` asks for it
            return returned(self.metadata, _sum(hidden, state.residual[0]), _sum(text, state.residual[1]))
        state.inputs = (hidden, text)
        return self.fn_ref.original_forward(*args, **kwargs)  # type: ignore[misc]

    @torch.compiler.disable
    def _skips(self, module: torch.nn.Module, state: TeaCacheState, hidden: Tensor, args: Any, kwargs: Any) -> bool:
        step, length = self._place(state)
        if self.embedding is not None and self.embedding.output is not None:
            signal = self.embedding.output
        else:
            conditioning = self.metadata._get_parameter_from_args_kwargs("temb", args, kwargs)
            signal = self.signal(unwrap_module(module), hidden, conditioning)
        return state.decide(self.config, step, length, signal)

    def _place(self, state: TeaCacheState) -> tuple[int, int | None]:
        """Step and length: from our session, from the pipeline's context, or counted."""
        if self.where is not None:
            return self.where()
        context = self.manager.context
        step, length = getattr(context, "step_index", None), getattr(context, "num_inference_steps", None)
        return (state.step + 1 if step is None else step), length or self.config.num_inference_steps

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """The run is over."""
        self.manager.reset()
        if self.embedding is not None:
            self.embedding.output = None
        return module


class _EmbeddingHook(ModelHook):
    """Keeps the time embedding of the forward under way, which the blocks of Wan do not receive."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Tensor | None = None

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        """Look at the first output."""
        self.output = output[0] if isinstance(output, tuple) else output
        return output


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The stack of transformer blocks, in order, as Diffusers' own caches find it."""
    return [block for name, part in model.named_children()
            if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(part, torch.nn.ModuleList) for block in part]


def apply_teacache(model: Any, config: TeaCacheConfig, where: Where | None = None) -> None:
    """Put TeaCache on a transformer.

    Args:
        model: a Diffusers transformer whose blocks Diffusers' own caches know.
        config: with coefficients and threshold, unless `calibrate`.
        where: returns (step, length of the run) of the forward under way; None: the pipeline's cache context tells, or
            the forwards of a branch are counted.

    Raises:
        ValueError: the model's blocks or their signal are unknown, or numbers are missing; one line.
    """
    if not config.calibrate and (not are_numbers(config.coefficients) or config.threshold is None):
        raise ValueError("TeaCacheConfig needs coefficients, as numbers, and threshold; enable(pipe, "
                         "step_cache='teacache') fills in those that are known")
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no stack of transformer blocks")
    for block in blocks:
        TransformerBlockRegistry.get(unwrap_module(block).__class__)  # raises before any hook is in place
    signal_of(unwrap_module(blocks[0]), config.signal)
    embedding = None
    if config.signal == EMBEDDING and hasattr(model, "condition_embedder"):
        embedding = _EmbeddingHook()
        HookRegistry.check_if_exists_or_initialize(model.condition_embedder).register_hook(embedding, EMBEDDING_HOOK)
    config = dataclasses.replace(config)
    manager = StateManager(TeaCacheState, (), {})  # type: ignore[arg-type]
    HookRegistry.check_if_exists_or_initialize(model)
    for block in blocks[1:] or blocks:
        hook = _BlockHook(manager, config, last=block is blocks[-1])
        HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, BLOCK_HOOK)
    head = _HeadHook(manager, config, where, embedding)
    HookRegistry.check_if_exists_or_initialize(blocks[0]).register_hook(head, HEAD_HOOK)
    HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()


def remove_teacache(model: torch.nn.Module) -> None:
    """Take TeaCache off a transformer; one that has none stays as it is."""
    registry = HookRegistry.check_if_exists_or_initialize(model)
    for name in HOOKS:
        registry.remove_hook(name, recurse=True)
    registry.invalidate_child_registries_cache()
