"""The portable kernel in Triton's interpreter. Run by test_portable.py in a process that has TRITON_INTERPRET=1."""

import pytest
import torch

from dit_sparse.kernels.attention import block_sparse_attention, can_run, device_backends
from dit_sparse.kernels.blocks import Blocks
from tests.kernels.cases import Case, build, check

SIZES = [
    Case(1, 1, lists="shared"),
    Case(1, 63, head_dim=128),
    Case(113, 63, head_dim=96, dtype=torch.float16),
    Case(63, 300, head_dim=128, query_block=32, key_block=128, heads=1),
    Case(130, 113, query_block=128, key_block=32, dtype=torch.float16, heads=1),
    Case(256, 256, query_block=128, key_block=128, dtype=torch.float16, heads=1),
    Case(batch=2, lists="all", query_tokens=63),
    Case(batch=2, lists="shared", query_tokens=63),
    Case(113, 113, value_dim=96),
    Case(511, 400, query_block=128, key_block=64, dtype=torch.float16),
    Case(300, 511, head_dim=128, query_block=128, key_block=128),
]
LAYOUTS = [
    Case(113, 150, order="permuted"),
    Case(113, 113, order="heads", dtype=torch.float16),
    Case(63, 113, order="heads", window=2, always=True, masked=True, batch=2, lists="all"),
    Case(113, 150, window=1, dtype=torch.float16),
    Case(113, 150, window=3, always=True),
    Case(63, 150, masked=True, batch=2),
    Case(511, 511, window=2, order="permuted", masked=True),
    Case(113, 113, strided=True, dtype=torch.float16),
    Case(113, 150, strided=True, order="permuted", masked=True),
    Case(63, 113, head_dim=96, strided=True, masked=True, query_block=32, key_block=32),
]


def run(case: Case, descriptors: bool) -> str:
    """What is wrong with the kernel's answer to a case."""
    from dit_sparse.kernels import portable

    inputs = build(case)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        out, lse = portable.block_sparse_attention_triton(
            inputs.query, inputs.key, inputs.value, Blocks.from_mask(inputs.mask, inputs.key_mask), inputs.scale,
            descriptors=descriptors)
    finally:
        torch.use_deterministic_algorithms(False)
    return check(inputs, out, lse)


@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.name)
def test_sizes(case: Case) -> None:
    assert run(case, descriptors=False) == ""


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_layouts(case: Case) -> None:
    assert run(case, descriptors=False) == ""


@pytest.mark.parametrize("case", [Case(63, 150), Case(63, 150, head_dim=96, dtype=torch.float16, masked=True),
                                  Case(63, 113, order="heads", window=1)], ids=lambda case: case.name)
def test_sizes_through_descriptors(case: Case) -> None:
    assert run(case, descriptors=True) == ""


def test_sizes_in_smaller_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 128 in several steps each, as a GPU with little shared memory takes them."""
    from dit_sparse.kernels import portable

    tile = portable.choose_tile(128, 128, 64, torch.float16, 40000)
    assert 16 <= tile.keys < 128
    monkeypatch.setattr(portable, "choose_tile", lambda *_: portable.Tile(32, 64, 4, 2))
    assert run(Case(150, 200, query_block=128, key_block=128, heads=1, window=1), descriptors=False) == ""


def test_layouts_bfloat16_is_refused_in_words() -> None:
    inputs = build(Case(dtype=torch.bfloat16))
    arguments = (inputs.query, inputs.key, inputs.value, inputs.mask)
    assert any("bfloat16" in reason for reason in can_run("triton", *arguments))
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
        block_sparse_attention(*arguments, backend="triton")


def test_layouts_chosen_by_name() -> None:
    inputs = build(Case(63, 63))
    ran: list[str] = []
    arguments = (inputs.query, inputs.key, inputs.value, inputs.mask)
    out, lse = block_sparse_attention(*arguments, scale=inputs.scale, backend="triton", on_backend=ran.append)
    assert ran == ["triton"] and check(inputs, out, lse) == ""
    block_sparse_attention(*arguments, on_backend=ran.append)
    assert ran[-1] == "cpu"  # the interpreter is never chosen by itself
    assert ("triton", True) in [entry[:2] for entry in device_backends()]


def test_layouts_whole_blocks_with_masked_keys_become_boundary_blocks() -> None:
    from dit_sparse.kernels import portable

    lists = torch.tensor([[[[2, 0, 1, 3, 0], [0, 3, 1, 2, 0]]]], dtype=torch.int32)
    whole, boundary = torch.tensor([[[3, 2]]], dtype=torch.int32), torch.tensor([[[1, 1]]], dtype=torch.int32)
    lengths = torch.full((4,), 2, dtype=torch.int32)
    blocks = Blocks(lists, whole, boundary, lengths[:2], lengths, *[None] * 7, 2, 2)
    key_ok = torch.tensor([True, False, True, True, True, True, True, True])[None, None]
    new, n_whole, n_boundary, exempt = portable.demote_masked(blocks, key_ok)
    assert n_whole.tolist() == [[[2, 1]]] and n_boundary.tolist() == [[[2, 2]]]
    assert exempt.tolist() == [[[1, 1]]]
    assert new[0, 0, 0, :4].tolist() == [2, 1, 0, 3] and new[0, 0, 1, :3].tolist() == [3, 0, 1]


def test_layouts_long_lists_are_launched_first() -> None:
    from dit_sparse.kernels.launch_order import MANY_BLOCKS, launch_order

    counts = torch.tensor([[[2, 3, 2, 20, 2, 12, 1, 3]]], dtype=torch.int32)
    assert launch_order(counts, 1, 1).tolist() == [3, 5, 0, 1, 2, 4, 6, 7]
    assert launch_order(counts[..., :3], 2, 2).tolist() == list(range(12))
    heads = MANY_BLOCKS // counts.shape[-1]
    assert launch_order(counts, 1, heads).tolist() == list(range(MANY_BLOCKS))
    assert launch_order(counts, 1, heads, longest_first=True)[0] == 3


@pytest.mark.parametrize("shape", [(1, 3, 17), (2, 1, 17), (1, 1, 1), (1, 12, 97)], ids=str)
def test_the_kernel_of_the_launch_order_agrees_with_its_twin(shape: tuple[int, int, int]) -> None:
    from dit_sparse.kernels import launch_order as module

    generator = torch.Generator().manual_seed(0)
    batch, heads = 2, 12 if shape[1] == 12 else 3
    tiles = batch * heads * shape[2]
    for counts in (torch.full(shape, 7), torch.zeros(shape), torch.randint(0, 9, shape, generator=generator),
                   torch.rand(shape, generator=generator) ** 8 * 1000):
        counts, found = counts.to(torch.int32), torch.empty(tiles, dtype=torch.int32)
        strides = (0 if size == 1 else step for size, step in zip(counts.shape, counts.stride(), strict=True))
        module.order_kernel[(1,)](counts, found, *strides, heads, shape[2], tiles, SIZE=4096, MOST=module.MOST)
        assert torch.equal(found, module.launch_order_reference(counts, batch, heads))
