"""What a denoising step spends its time on, by kind of kernel: `python -m dit_sparse.eval.step_speed --profile`.

One step under PyTorch's profiler. Every kernel is counted under the operator that launched it: what runs inside of the
attention operator is attention or its plan, whatever its name. On a CPU operators take the place of kernels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SELF, PLAN, QUANTISE, PRODUCTS, CROSS, ROTARY, POINTWISE, COPIES = (
    "self-attention", "plan and checks", "rounding for attention", "matrix products", "cross-attention",
    "QK-norm and rotary", "other normalisation and pointwise", "copies")
KINDS = (SELF, PLAN, QUANTISE, PRODUCTS, CROSS, ROTARY, POINTWISE, COPIES)
LONGEST = 8  # kernels that are listed by name

_OURS = "dit_sparse::attention"
_SPARSE = ("dit_sparse::block_sparse_attention", "dit_sparse::soft_blocks")
_DENSE = re.compile(r"scaled_dot_product|_attention_forward|_flash_attention|flash_attn|sdpa", re.I)
_PRODUCT_OPERATORS = re.compile(r"aten::(addmm|mm|bmm|baddbmm|linear|matmul|_?scaled_mm)|mkldnn::_linear|convolution")
_PRODUCT_KERNELS = re.compile(r"gemm|nvjet|cutlass|cublas|xmma|splitk|triton_tem_", re.I)
_COPY = re.compile(r"memcpy|memset|aten::(copy_|clone|contiguous|cat|_to_copy|fill_|zero_)|copy_kernel|CatArray", re.I)
# Names that a compiler gives its kernels list the operators inside. Rotary embedding writes every second channel.
_ROTARY = re.compile(r"rms_norm|slice_scatter|select_scatter|unbind|complex|polar|_stack|rsqrt_.*pow|pow_.*rsqrt", re.I)
_QUANTISE_KERNELS = re.compile(r"^(statistics_kernel|finish_kernel|rows_kernel|values_kernel)")


@dataclass(frozen=True)
class Part:
    """One kernel of the step: its kind, name and milliseconds."""

    kind: str
    name: str
    ms: float


@dataclass(frozen=True)
class Profile:
    """A step's kernels; `span_ms` from the first one's start to the last one's end."""

    parts: tuple[Part, ...]
    span_ms: float

    def kinds(self) -> dict[str, float]:
        """Milliseconds of each kind, in the order of `KINDS`."""
        total = dict.fromkeys(KINDS, 0.0)
        for part in self.parts:
            total[part.kind] += part.ms
        return {kind: ms for kind, ms in total.items() if ms}

    def longest(self, kinds: Iterable[str], count: int = LONGEST) -> list[tuple[str, str, int, float]]:
        """(kind, name, calls, milliseconds) of the kernels of some kinds that take longest."""
        kinds = tuple(kinds)
        calls: Counter[tuple[str, str]] = Counter()
        took: dict[tuple[str, str], float] = {}
        for part in self.parts:
            if part.kind in kinds:
                place = part.kind, part.name
                calls[place] += 1
                took[place] = took.get(place, 0.0) + part.ms
        most = sorted(took.items(), key=lambda entry: -entry[1])[:count]
        return [(*place, calls[place], ms) for place, ms in most]

    def lines(self, title: str) -> list[str]:
        """The profile as text: the share of every kind, then the longest kernels beside attention and products."""
        if not self.parts:
            return [f"{title}: the profiler saw no kernels on this device"]
        busy = sum(part.ms for part in self.parts)
        idle = max(0.0, self.span_ms - busy)
        whole = busy + idle
        found = [f"{title}: {self.span_ms:.2f} ms from the first kernel to the last"]
        found += [f"{100 * ms / whole:6.1f} %  {ms:9.3f} ms  {kind}" for kind, ms in self.kinds().items()]
        found.append(f"{100 * idle / whole:6.1f} %  {idle:9.3f} ms  nothing on the device")
        found += [f"          {ms:9.3f} ms  {calls} x {name[:110]} ({kind})"
                  for kind, name, calls, ms in self.longest((PLAN, ROTARY, POINTWISE, COPIES))]
        return found


def kind_of(kernel: str, path: Sequence[str], lengths: tuple[int, int] | None = None) -> str:
    """The kind of one kernel.

    Args:
        kernel: its name.
        path: names of the operators around it, innermost first.
        lengths: queries and keys of the attention call around it; None: unknown.
    """
    cross = CROSS if lengths is not None and lengths[0] != lengths[1] else SELF
    if any(name.startswith(_SPARSE) for name in path):
        return QUANTISE if _QUANTISE_KERNELS.match(kernel) else SELF
    if any(_DENSE.search(name) for name in (kernel, *path)):
        return cross
    if any(name.startswith(_OURS) for name in path):
        return PLAN
    compiled = kernel.startswith("triton_") and not kernel.startswith("triton_tem_")
    if not compiled and (_PRODUCT_KERNELS.search(kernel) or any(_PRODUCT_OPERATORS.search(name) for name in path)):
        return PRODUCTS
    if not compiled and any(_COPY.search(name) for name in (kernel, *path[:1])):
        return COPIES
    return ROTARY if any(_ROTARY.search(name) for name in (kernel, *path)) else POINTWISE


def profile(step: Callable[[], Any], device: str) -> Profile:
    """Runs a step once under the profiler.

    Args:
        step: the call; it has run before, so that nothing is compiled or tuned now.
        device: where it computes.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profiler(activities=activities, record_shapes=True) as recorded:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    return read(list(recorded.events() or []), cuda)


def read(events: Sequence[Any], cuda: bool) -> Profile:
    """What the profiler's events say.

    Args:
        events: function events of PyTorch's profiler.
        cuda: count kernels; else each operator's own time.
    """
    parts: list[Part] = []
    linked: Counter[str] = Counter()
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        path, lengths = _path(event)
        if cuda:
            for kernel in event.kernels:
                linked[kernel.name] += 1
                parts.append(Part(kind_of(kernel.name, path, lengths), kernel.name, kernel.duration / 1e3))
        elif event.self_cpu_time_total > 0:
            parts.append(Part(kind_of(event.name, path, lengths), event.name, event.self_cpu_time_total / 1e3))
    if cuda:
        kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA
                   and not getattr(event, "is_user_annotation", False)]
        for event in kernels:  # launched by what the profiler does not know
            if linked[event.name] > 0:
                linked[event.name] -= 1
            else:
                parts.append(Part(kind_of(event.name, ()), event.name, _microseconds(event) / 1e3))
    else:
        kernels = [event for event in events if event.self_cpu_time_total > 0]
    if not kernels:
        return Profile((), 0.0)
    span = max(event.time_range.end for event in kernels) - min(event.time_range.start for event in kernels)
    return Profile(tuple(parts), span / 1e3)


def _microseconds(event: Any) -> float:
    return event.time_range.end - event.time_range.start


def _path(event: Any) -> tuple[list[str], tuple[int, int] | None]:
    """Names of an operator and those around it, and the lengths of the attention call that it is part of."""
    names: list[str] = []
    lengths = None
    while event is not None:
        names.append(event.name)
        shapes = [shape for shape in (event.input_shapes or []) if len(shape) == 4]
        if lengths is None and _DENSE.search(event.name) and len(shapes) >= 2:
            # (B, H, L, D), or (B, L, H, D): heads and channels are the same for queries and keys.
            different = [(a, b) for a, b in zip(shapes[0][1:3], shapes[1][1:3], strict=True) if a != b]
            lengths = different[0] if different else (shapes[0][2], shapes[0][2])
        event = event.cpu_parent
    return names, lengths
