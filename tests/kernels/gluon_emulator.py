"""Runs the Hopper kernel's own source on the CPU: its roles as threads, its barriers, copies and products in torch.

Triton's interpreter does not run Gluon. This stands for as much of Gluon as the kernel uses, so that its lists, masks,
indices, phases and roles are tested without a GPU. What it cannot show: layouts, races between the proxies of shared
memory, and what the assembler makes of it.
"""

from __future__ import annotations

import threading
import types
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from dit_sparse.kernels import hopper, hopper_copies, hopper_kernel
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.hopper_plan import Tuning

_PATIENCE = 20.0  # seconds that a role may wait: longer means that it would wait forever
_changed = threading.Condition()
_here = threading.local()


class _Value(torch.Tensor):
    """A tensor of the kernel. Layouts mean nothing here, so that every one of them is the same."""

    type = types.SimpleNamespace(layout=types.SimpleNamespace(parent=None))  # type: ignore[assignment]

    def __iadd__(self, other: Any) -> Tensor:  # type: ignore[misc]
        """In the kernel x += y makes a new value."""
        return self + other

    def to(self, *arguments: Any, bitcast: bool = False, **options: Any) -> Tensor:
        """A conversion, or the same bits as another type."""
        return self.view(*arguments) if bitcast else super().to(*arguments, **options)


def _value(x: Any) -> Tensor:
    return torch.as_tensor(x).as_subclass(_Value)


class _Pointer:
    """A place, or many, in the memory of a tensor."""

    def __init__(self, memory: Tensor, place: Any) -> None:
        self.memory, self.place = memory, place

    def __add__(self, step: Any) -> _Pointer:
        return _Pointer(self.memory, self.place + step)

    def split(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Places and mask, equally shaped; places outside of the mask are 0, all others must exist."""
        place, mask = torch.broadcast_tensors(torch.as_tensor(self.place), torch.as_tensor(mask))
        place = torch.where(mask, place, 0)
        assert ((place >= 0) & (place < self.memory.numel())).all(), "the kernel leaves a tensor's memory"
        return place, mask


class _Barrier:
    """An mbarrier: a phase ends when all arrived and all announced bytes came."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def change(self, arrivals: int, size: int) -> None:
        with _changed:
            self.pending -= arrivals
            self.bytes += size
            assert self.pending >= 0, "more arrivals than a barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase ^ 1, self.count
            _changed.notify_all()

    def wait(self, phase: Any) -> None:
        with _changed:
            done = _changed.wait_for(lambda: self.phase != int(phase) or _here.run.failed, _PATIENCE)
        assert done and not _here.run.failed, "a role waits forever"


class _Shared:
    """Shared memory, or barriers in it."""

    def __init__(self, content: Any) -> None:
        self.content = content

    @property
    def dtype(self) -> torch.dtype:
        return self.content.dtype

    def index(self, i: Any) -> Any:
        return self.content[int(i)] if isinstance(self.content, list) else _Shared(self.content[int(i)])

    def permute(self, order: Any) -> _Shared:
        return _Shared(self.content.permute(order))

    def reshape(self, shape: Any) -> _Shared:
        return _Shared(self.content.view(shape))

    def store(self, value: Tensor) -> None:
        self.content.copy_(value)

    def load(self, _layout: Any) -> Tensor:
        return _value(self.content.clone())


class _Descriptor:
    """A tensor descriptor: boxes, of which what lies outside of the tensor reads as 0 and is not written."""

    def __init__(self, descriptor: TensorDescriptor) -> None:
        self.base, self.shape = descriptor.base, descriptor.shape
        self.view = self.base.as_strided(descriptor.shape, descriptor.strides)
        self.block = descriptor.block_shape
        self.dtype = self.base.dtype

    def parts(self, corner: Any) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The box inside of the tensor, and the same part inside of the box."""
        ends = [(int(c), max(min(int(c) + n, size), int(c)))
                for c, n, size in zip(corner, self.block, self.shape, strict=True)]
        assert all(low >= 0 for low, _ in ends)
        return tuple(slice(*end) for end in ends), tuple(slice(0, high - low) for low, high in ends)


def _copy_in(descriptor: _Descriptor, corner: Any, barrier: _Barrier, target: _Shared) -> None:
    assert list(target.content.shape) == list(descriptor.block), "a copy and its target differ in shape"
    outside, inside = descriptor.parts(corner)
    target.content.zero_()
    target.content[inside] = descriptor.view[outside]
    barrier.change(0, -target.content.numel() * target.content.element_size())


def _copy_out(descriptor: _Descriptor, corner: Any, source: _Shared) -> None:
    assert list(source.content.shape) == list(descriptor.block), "a copy and its source differ in shape"
    outside, inside = descriptor.parts(corner)
    descriptor.view[outside] = source.content[inside]


def _init(barrier: _Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def _allocate(dtype: torch.dtype, shape: list[int], _layout: Any) -> _Shared:
    if dtype == torch.int64:
        return _Shared([_Barrier() for _ in range(shape[0])])
    return _Shared(torch.full(shape, torch.nan if dtype.is_floating_point else 99, dtype=dtype))


def _load(pointer: _Pointer, mask: Any = True, other: Any = 0) -> Tensor:
    place, mask = pointer.split(mask)
    return _value(torch.where(mask, pointer.memory[place], torch.as_tensor(other, dtype=pointer.memory.dtype)))


def _store(pointer: _Pointer, value: Tensor, mask: Any = True) -> None:
    place, mask = pointer.split(mask)
    pointer.memory[place[mask]] = value.expand(place.shape)[mask].to(pointer.memory.dtype)


def _product(a: Any, b: _Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Tensor:
    left = a.content if isinstance(a, _Shared) else a
    found = (left.float() @ b.content.float()).to(acc.dtype)  # exact for integers: sums stay below 2^24
    return _value(acc + found if use_acc else found)


def _specialize(roles: list[tuple[Any, tuple[Any, ...]]], _warps: Any, _registers: Any) -> None:
    """Runs every role in a thread of its own."""
    run = _here.run

    def work(role: Any, arguments: tuple[Any, ...]) -> None:
        _here.run = run
        try:
            role(*arguments)
        except BaseException as error:
            with _changed:
                run.failed.append(error)
                _changed.notify_all()

    threads = [threading.Thread(target=work, args=role) for role in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if run.failed:
        raise run.failed[0]


def _nothing(*_: Any, **__: Any) -> None:
    return None


_GL = types.SimpleNamespace(
    load=_load, store=_store, allocate_shared_memory=_allocate, warp_specialize=_specialize, static_range=range,
    program_id=lambda _: _here.run.program, num_programs=lambda _: _here.run.programs,
    where=lambda c, a, b: _value(torch.where(torch.as_tensor(c), torch.as_tensor(a), torch.as_tensor(b))),
    maximum=lambda a, b: _value(torch.maximum(torch.as_tensor(a), torch.as_tensor(b))),
    max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), exp2=torch.exp2, log2=torch.log2,
    expand_dims=lambda x, axis: x.unsqueeze(axis), arange=lambda a, b, _: _value(torch.arange(a, b, dtype=torch.int32)),
    zeros=lambda shape, dtype, _: _value(torch.zeros(shape, dtype=dtype)),
    full=lambda shape, x, dtype, _: _value(torch.full(shape, x, dtype=dtype)), convert_layout=lambda x, _: x,
    inline_asm_elementwise=lambda _asm, _constraints, x, **_: x[0],
    int32=torch.int32, int64=torch.int64, float32=torch.float32, NVMMADistributedLayout=_nothing,
    NVMMASharedLayout=_nothing, DotOperandLayout=_nothing, SliceLayout=_nothing, BlockedLayout=_nothing)
_SHIMS: dict[str, Any] = dict(
    gl=_GL, ROWS=64, _half_of=hopper.half_of, warpgroup_mma=_product,
    warpgroup_mma_wait=lambda _, deps: deps[0], fence_async_shared=_nothing,
    mbarrier=types.SimpleNamespace(
        init=_init, MBarrierLayout=_nothing, wait=lambda barrier, phase: barrier.wait(phase),
        arrive=lambda barrier, count: barrier.change(count, 0), expect=lambda barrier, size: barrier.change(1, size)),
    tma=types.SimpleNamespace(async_copy_global_to_shared=_copy_in, async_copy_shared_to_global=_copy_out,
                              store_wait=_nothing))


def _plain_kernel() -> Any:
    """The kernel as an ordinary function over the shims, with all that it calls."""
    names: dict[str, Any] = {}
    for module in (hopper_copies, hopper_kernel):
        for name, function in vars(module).items():
            if isinstance(function, JITFunction) and name not in names:
                plain = function.fn
                names[name] = types.FunctionType(plain.__code__, {**plain.__globals__, **_SHIMS}, name,
                                                 plain.__defaults__)
    for function in names.values():
        function.__globals__.update(names)
    return names["attention_kernel"]


def _gather(key: Tensor, value: Tensor, index: Tensor, slots: int) -> tuple[Tensor, ...]:
    """`portable.gather_slots` in torch."""
    index = index.expand(key.shape[0], key.shape[2], slots).transpose(1, 2)[..., None]
    return tuple(torch.where(index < 0, 0, x.gather(1, index.clamp(min=0).expand(-1, -1, -1, x.shape[3])))
                 for x in (key, value))


def emulate(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float, *, programs: int | None = None,
    ragged_boxes: bool = False,
) -> tuple[Tensor, Tensor]:
    """`block_sparse_attention_hopper` on CPU tensors; `programs`: how many persistent ones, None: one per tile.

    Raises:
        AssertionError: when a role waits forever, a barrier overflows or an access leaves its tensor.
    """
    kernel = _plain_kernel()
    B, Lq, H, _ = query.shape
    out = torch.full((B, Lq, H, value.shape[3]), torch.nan, dtype=query.dtype)
    lse = torch.full((B, H, Lq), torch.nan)
    real, hopper.gather_slots = hopper.gather_slots, _gather
    try:
        calls = list(hopper.launches(query, key, value, blocks, scale, out, lse,
                                     Tuning(persistent=programs is not None, ragged_boxes=ragged_boxes)))
    finally:
        hopper.gather_slots = real
    for arguments, constants, tiles in calls:
        count = min(tiles, programs) if programs is not None and constants["PERSISTENT"] else tiles
        for program in range(count):
            _here.run = types.SimpleNamespace(program=program, programs=count, failed=[])
            kernel(*map(_argument, arguments), **constants)
    return out, lse


def _argument(x: Any) -> Any:
    if isinstance(x, TensorDescriptor):
        return _Descriptor(x)
    if not isinstance(x, Tensor):
        return x
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return _Pointer(x.as_strided((size,), (1,)), 0)


