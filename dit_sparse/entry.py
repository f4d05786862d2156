"""The entry points: `set_attn_processor` on pipelines and on every transformer, for a SparseProc and for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Handler = Callable[[Any, Any], Any]
NAME = "set_attn_processor"


def attach(owner: type, handler: Handler) -> None:
    """Give one of Diffusers' base classes `set_attn_processor`; twice equals once.

    A processor with the attribute `is_sparse_proc = True` goes to the handler; any other (or a dict of them) to the
    model's own method.

    Args:
        owner: DiffusionPipeline, ModularPipeline, AttentionMixin or ModelMixin.
        handler: called with (pipeline or transformer, SparseProc).
    """
    if owner.__name__ == "ModelMixin":
        setattr(owner, NAME, _ForModels(owner, handler))
    elif owner.__name__ == "AttentionMixin":
        setattr(owner, NAME, recognising(getattr(owner, NAME), handler))
    else:
        setattr(owner, NAME, pipeline_method(handler))


def pipeline_method(handler: Handler) -> Callable[[Any, Any], None]:
    """The method for pipeline classes."""

    def set_attn_processor(self: Any, processor: Any) -> None:
        """Set the attention processor of the pipeline's denoisers.

        Args:
            processor: a SparseProc, which switches sparse attention on; any other processor, or dict of them, is
                handed to the denoisers' own method.

        Raises:
            ValueError: the pipeline has no denoiser that takes processors.
        """
        if getattr(processor, "is_sparse_proc", False):
            handler(self, processor)
            return
        parts = [part for name, part in sorted(self.components.items())
                 if name.startswith(("transformer", "unet", "unconditional_transformer")) and hasattr(part, NAME)]
        if not parts:
            raise ValueError(f"{type(self).__name__} has no denoiser that takes attention processors")
        for part in parts:
            part.set_attn_processor(dict(processor) if isinstance(processor, dict) else processor)

    return set_attn_processor


def recognising(original: Any, handler: Handler) -> Any:
    """`original`, a model's set_attn_processor, except that a SparseProc goes to the handler."""
    original = getattr(original, "_dit_sparse_original", original)

    def set_attn_processor(self: Any, processor: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(processor, "is_sparse_proc", False):
            handler(self, processor)
        else:
            original(self, processor, *args, **kwargs)

    set_attn_processor.__doc__ = original.__doc__
    set_attn_processor._dit_sparse_original = original  # type: ignore[attr-defined]
    return set_attn_processor


class _ForModels:
    """`set_attn_processor` for supported transformers whose class has none (Mochi, Allegro, Cosmos, ...).

    ModelMixin comes before AttentionMixin in the order of classes, so this looks further up first, and models that
    are no supported transformer still have no such attribute.
    """

    def __init__(self, owner: type, handler: Handler) -> None:
        self._owner, self._handler = owner, handler

    def __get__(self, model: Any, cls: type) -> Any:
        from .families import family_of

        order = cls.__mro__
        for base in order[order.index(self._owner) + 1:]:
            if NAME in vars(base):
                return vars(base)[NAME].__get__(model, cls)
        if family_of(cls) is None:
            raise AttributeError(f"{cls.__name__!r} object has no attribute {NAME!r}")
        return self._set if model is None else lambda processor: self._set(model, processor)

    def _set(self, model: Any, processor: Any) -> None:
        if not getattr(processor, "is_sparse_proc", False):
            raise ValueError(f"{type(model).__name__} has no set_attn_processor; only a SparseProc can be set")
        self._handler(model, processor)
