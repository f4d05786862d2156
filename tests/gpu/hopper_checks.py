"""What must hold of the Hopper kernel in Gluon on a GPU. Every check returns "" or what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dit_sparse import order
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels import hopper_plan
from dit_sparse.kernels.attention import block_sparse_attention, dense_attention
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.hopper_plan import Tuning
from dit_sparse.kernels.reference import attention_reference
from tests.gpu.checks import CASES, poisoned
from tests.kernels.cases import Case, Inputs, build, check

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GLUON = Tuning(cuda=False)

# What the kernel can run of those cases, and what only it has to prove: 64-key blocks, every head dim, empty lists.
HOPPER_CASES = [
    case for case in CASES
    if case.dtype != FP32 and case.query_block == hopper_plan.QUERY_BLOCK and case.key_block in hopper_plan.KEY_BLOCKS
] + [
    Case(1023, 1023, head_dim=dim, dtype=dtype, query_block=128, key_block=block)
    for dim in (8, 64, 96, 128) for dtype in (BF16, FP16) for block in (64, 128)
] + [
    Case(1023, 513, head_dim=64, dtype=BF16, query_block=128, key_block=64, order="heads", masked=True, batch=2),
    Case(1023, 1023, head_dim=128, dtype=FP16, query_block=128, key_block=128, window=2, masked=True, strided=True),
    Case(1023, 1023, head_dim=128, dtype=BF16, query_block=128, key_block=64, window=3, always=True, order="heads"),
    Case(1023, 1023, head_dim=96, dtype=BF16, query_block=128, key_block=128, order="permuted", strided=True),
    Case(1023, 1023, head_dim=64, value_dim=128, dtype=BF16, query_block=128, key_block=128, lists="all", batch=3),
    Case(129, 4097, head_dim=128, dtype=BF16, query_block=128, key_block=128, heads=5, lists="all", batch=2),
    Case(4097, 1, head_dim=128, dtype=BF16, query_block=128, key_block=128, heads=5),
]


def attend(inputs: Inputs, tuning: Tuning = GLUON) -> tuple[Tensor, Tensor]:
    """The Hopper kernel on a case, with NaN in all fresh memory."""
    from dit_sparse.kernels.hopper import block_sparse_attention_hopper

    with poisoned():
        return block_sparse_attention_hopper(inputs.query, inputs.key, inputs.value,
                                             Blocks.from_mask(inputs.mask, inputs.key_mask), inputs.scale, tuning)


def accuracy(case: Case, tuning: Tuning) -> str:
    """The kernel keeps the accuracy rule on a case."""
    inputs = build(case, "cuda")
    return check(inputs, *attend(inputs, tuning))


def tiles(sizes: tuple[int, int, int], text: int, text_at: str, ragged_boxes: bool) -> str:
    """Tiles of 4 x 4 x 8 tokens of a grid with text blocks agree with the formula: as boxes, or through the index."""
    grid = TokenGrid(*sizes, text=text, text_at=text_at)  # type: ignore[arg-type]
    positions, lengths = order.tile(grid, (4, 4, 8))
    layout = order.layout(grid, positions, 128, lengths=lengths, tile_shape=(4, 4, 8), device="cuda")
    keep = torch.rand(1, 3, layout.blocks, layout.blocks, generator=torch.Generator().manual_seed(0)).to("cuda") < 0.4
    mask = BlockMask.from_dense(keep, layout, layout)
    query, key, value = (torch.randn(2, grid.tokens, 3, 128, device="cuda", dtype=BF16) for _ in range(3))
    inputs = Inputs(query, key, value, mask, None, 128**-0.5)
    return check(inputs, *attend(inputs, Tuning(ragged_boxes=ragged_boxes, cuda=False)))


def repeats_bit_equal() -> str:
    """A thousand calls give equal bits: one program per tile and persistent, raster, permuted and with a window."""
    fits = Case(2047, 2047, heads=12, head_dim=128, dtype=BF16, query_block=128, key_block=128)
    from dit_sparse.kernels.hopper import block_sparse_attention_hopper

    for changes, persistent in ((dict(masked=True), False), (dict(masked=True), True), (dict(order="heads"), False),
                                (dict(window=2), False)):
        inputs = build(Case(**{**vars(fits), **changes}), "cuda")
        blocks = Blocks.from_mask(inputs.mask, inputs.key_mask)
        call = partial(block_sparse_attention_hopper, inputs.query, inputs.key, inputs.value, blocks, inputs.scale,
                       Tuning(persistent=persistent, cuda=False))
        first = call()
        differing = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(999):
            # As integers: NaN would differ from itself.
            differing += sum((a.view(kind) != b.view(kind)).sum() for a, b, kind in zip(
                first, call(), (torch.int16, torch.int32), strict=True))
        if differing.item():
            return f"{changes}, persistent={persistent}: {differing.item()} numbers of 999 repeats differ"
    return ""


def strides(run: Callable[[Inputs], tuple[Tensor, Tensor]] = attend) -> str:
    """Views that are not contiguous: a fused projection, heads first, expanded heads, odd offsets, other last steps."""
    batch, tokens, heads, dim = 2, 301, 3, 128
    layout = BlockLayout.raster(tokens, 128, "cuda")
    keep = torch.rand(1, heads, layout.blocks, layout.blocks, generator=torch.Generator().manual_seed(0)) < 0.7
    room = torch.randn(batch * tokens * heads * dim * 4 + 16, device="cuda", dtype=BF16)

    def view(shape: tuple[int, ...], offset: int = 0) -> Tensor:
        return room[offset : offset + torch.Size(shape).numel()].view(shape)

    fused = view((batch, tokens, 3, heads, dim))
    first = view((3, batch, heads, tokens, dim))
    wide = view((batch, tokens, heads, dim + 12))[..., :dim]
    calls = {
        "fused": fused.unbind(2),
        "heads first": first.transpose(2, 3).unbind(0),
        "one head for all": (fused[:, :, 0], *(fused[:, :, i, :1].expand(-1, -1, heads, -1) for i in (1, 2))),
        "odd offset": [view((batch, tokens, heads, dim), 1 + i) for i in range(3)],
        "steps of 280 bytes": [wide] * 3,
        "last dimension with a step": [view((batch, tokens, dim, heads)).transpose(2, 3)] * 3,
        "every other token": [view((batch, 2 * tokens, heads, dim))[:, ::2]] * 3,
    }
    orders = {"raster": layout, "permuted": BlockLayout.from_order(torch.randperm(tokens), 128).to("cuda")}
    for name, (query, key, value) in calls.items():
        for kind, made in orders.items():
            inputs = Inputs(query, key, value, BlockMask.from_dense(keep.to("cuda"), made, made), None, dim**-0.5)
            if problem := check(inputs, *run(inputs)):
                return f"{name}, {kind}: {problem}"
    return ""


def equals_dense(tuning: Tuning = GLUON) -> str:
    """A full mask at 32,768 tokens equals the dense kernel."""
    from dit_sparse.kernels.hopper import block_sparse_attention_hopper

    query, key, value = (torch.randn(1, 32768, 2, 128, device="cuda", dtype=BF16) for _ in range(3))
    layout = BlockLayout.raster(32768, 128, "cuda")
    blocks = Blocks.from_mask(BlockMask.full(layout, layout))
    out, _ = block_sparse_attention_hopper(query, key, value, blocks, 128**-0.5, tuning)
    error = (out.float() - dense_attention(query, key, value)[0].float()).abs().max().item()
    return "" if error < 2e-3 else f"error {error:.2e}"


def never_waits() -> str:
    """No call waits for the device, and it is what runs without being asked for."""
    ran: list[str] = []
    for chosen in (Case(dtype=BF16, query_block=128), Case(dtype=BF16, query_block=128, order="heads", masked=True)):
        inputs = build(chosen, "cuda")
        for mode in ("default", "error"):  # the first call compiles
            torch.cuda.set_sync_debug_mode(mode)
            try:
                block_sparse_attention(inputs.query, inputs.key, inputs.value, inputs.mask, key_mask=inputs.key_mask,
                                       on_backend=ran.append)
            except RuntimeError as error:
                return f"{chosen.name}: {str(error).splitlines()[0]}"
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return "" if set(ran) == {"hopper"} else f"{ran} ran"


def addresses_beyond_32_bits(tuning: Tuning = GLUON) -> str:
    """More than 2^31 elements in each tensor, in raster order, permuted and in tiles: the last head's last blocks."""
    from dit_sparse.kernels.hopper import block_sparse_attention_hopper

    heads, dim = 240, 128
    for way, grid in (("raster", TokenGrid(21, 45, 80)), ("permuted", TokenGrid(21, 45, 80)),
                      ("tiles", TokenGrid(20, 48, 80)))[: 2 if tuning.cuda else 3]:
        query, key, value = (torch.randn(1, grid.tokens, heads, dim, device="cuda", dtype=BF16) for _ in range(3))
        assert query.numel() > 2**31
        if way == "tiles":
            positions, lengths = order.tile(grid, (4, 4, 8))
            layout = order.layout(grid, positions, 128, lengths=lengths, tile_shape=(4, 4, 8), device="cuda")
        elif way == "permuted":
            layout = BlockLayout.from_order(torch.randperm(grid.tokens, device="cuda"), 128)
        else:
            layout = BlockLayout.raster(grid.tokens, 128, "cuda")
        block = torch.arange(layout.blocks, device="cuda")
        mask = BlockMask.from_dense((block[:, None] - block).abs() <= 1, layout, layout)
        out, _ = block_sparse_attention_hopper(query, key, value, Blocks.from_mask(mask), dim**-0.5, tuning)
        slots = layout.token_of_slot[-256:]
        # The last token of the sequence too, wherever its block is.
        for rows in (slots[128:], layout.token_of_slot.view(-1, 128)[layout.block_of_token[grid.tokens - 1]]):
            here = int(layout.block_of_token[rows[0]])
            near = layout.token_of_slot[max(0, here - 1) * 128 : (here + 2) * 128]
            rows, near = rows[rows >= 0], near[near >= 0]
            want, _ = attention_reference(query[:, rows, -1:], key[:, near, -1:], value[:, near, -1:])
            error = (out[:, rows, -1:].float() - want.float()).abs().max().item()
            if not error < 2e-2:
                return f"{way}: error {error:.2e}"
        del query, key, value, out
        torch.cuda.empty_cache()
    return ""


def all_checks() -> dict[str, Callable[[], str]]:
    """Name and function of every check."""
    if why := hopper_plan.missing():
        # A check that passes, so that the log says what was left out and why.
        return {f"checks left out: {why}": lambda: ""}
    checks: dict[str, Callable[[], str]] = {}
    for case in HOPPER_CASES:
        name = f"{str(case.dtype).removeprefix('torch.')} {case.name}"
        checks[name] = partial(accuracy, case, Tuning(persistent=False, cuda=False))
        if case.order == "raster" and not case.window:
            checks[f"persistent {name}"] = partial(accuracy, case, Tuning(persistent=True, cuda=False))
    for kind in ("raster", "permuted"):
        case = Case(1023, 1023, head_dim=128, dtype=BF16, query_block=128, key_block=128, order=kind, masked=True)
        checks[f"not the longest first {case.name}"] = partial(accuracy, case, Tuning(longest_first=False, cuda=False))
    for sizes, boxes in (((8, 16, 16), False), ((5, 11, 13), False), ((5, 11, 13), True)):
        for text, text_at in ((0, "none"), (77, "front"), (77, "back")):
            checks[f"tiles {sizes} text {text} {text_at}{' ragged boxes' * boxes}"] = partial(
                tiles, sizes, text, text_at, boxes)
    for function in (repeats_bit_equal, strides, equals_dense, never_waits, addresses_beyond_32_bits):
        checks[function.__name__.replace("_", " ")] = function
    return checks
