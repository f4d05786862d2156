"""`block_sparse_attention` and `dense_attention`: the operator, the choice of a backend, and what they refuse."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.kernels.attention import (
    backends,
    block_sparse_attention,
    can_run,
    choose_backend,
    dense_attention,
    device_backends,
)
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.reference import attention_reference, block_sparse_reference
from tests.kernels.cases import Case, build, check


def test_the_fastest_backend_runs_and_is_reported() -> None:
    inputs = build(Case())
    ran: list[str] = []
    arguments = (inputs.query, inputs.key, inputs.value, inputs.mask)
    block_sparse_attention(*arguments, on_backend=ran.append)
    block_sparse_attention(*arguments, on_backend=ran.append, backend="reference")
    assert ran == ["cpu", "reference"] and choose_backend(*arguments) == "cpu"
    assert can_run("cpu", *arguments) == [] == can_run("reference", *arguments)
    assert all(can_run(name, *arguments) for name in ("triton", "pieces"))


def test_device_backends_speaks_of_every_backend() -> None:
    entries = device_backends()
    assert [name for name, *_ in entries] == [backend.name for backend in backends()]
    assert all(isinstance(available, bool) and words for _, available, words in entries)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backends_agree_with_the_oracle(backend: str) -> None:
    inputs = build(Case(batch=2, order="heads", window=2, always=True, masked=True))
    out, lse = block_sparse_attention(inputs.query, inputs.key, inputs.value, inputs.mask, scale=inputs.scale,
                                      key_mask=inputs.key_mask, backend=backend)
    assert check(inputs, out, lse) == ""


@pytest.mark.parametrize("value_dim", [0, 96])
def test_pieces_without_pytorchs_kernel_agree_too(monkeypatch: pytest.MonkeyPatch, value_dim: int) -> None:
    """What runs on devices that have neither triton nor a fused kernel."""
    from dit_sparse.kernels import cpu

    inputs = build(Case(window=1, order="permuted", value_dim=value_dim))
    monkeypatch.setattr(cpu, "_has_kernel", lambda *_: False)
    out, lse = cpu.block_sparse_attention_cpu(inputs.query, inputs.key, inputs.value, Blocks.from_mask(inputs.mask),
                                              inputs.scale)
    assert check(inputs, out, lse) == ""


def test_density_one_equals_dense() -> None:
    query, key, value = (torch.randn(2, n, 3, 64) for n in (113, 239, 239))
    mask = BlockMask.full(BlockLayout.raster(113, 32), BlockLayout.raster(239, 64))
    for got, want in zip(block_sparse_attention(query, key, value, mask), dense_attention(query, key, value),
                         strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("change, words", [
    (dict(scale=0.0), "scale=0.0 is not allowed"),
    (dict(backend="cuda"), "backend='cuda' is unknown; use one of hopper, triton, cpu"),
    (dict(backend="triton"), "backend='triton' cannot run this call: "),
    (dict(key_mask=torch.ones(1, 5, dtype=torch.bool)), "key_mask is torch.bool"),
    (dict(key=torch.randn(1, 100, 2, 64)), "do not fit query"),
    (dict(query=torch.randn(1, 100, 2, 64)), "mask is for 113 queries"),
    (dict(query=torch.randn(1, 113, 64)), "must be"),
    (dict(query=torch.randn(1, 113, 2, 64, dtype=torch.float64)), "dtypes"),
])
def test_what_does_not_fit_is_refused_in_one_line(change: dict, words: str) -> None:
    inputs = build(Case())
    arguments = dict(query=inputs.query, key=inputs.key, value=inputs.value, mask=inputs.mask) | change
    with pytest.raises(ValueError, match=words) as caught:
        block_sparse_attention(**arguments)
    assert "\n" not in str(caught.value)


def test_masks_of_other_batches_or_heads_are_refused() -> None:
    inputs = build(Case(heads=3))
    two = build(Case(heads=2))
    with pytest.raises(ValueError, match="mask lists has batch and heads"):
        block_sparse_attention(two.query, two.key, two.value, inputs.mask)


def test_the_operator_is_a_proper_operator() -> None:
    inputs = build(Case(65, 70, batch=2, order="heads", window=1, masked=True))
    blocks = Blocks.from_mask(inputs.mask, inputs.key_mask)
    fields = [getattr(blocks, field.name) for field in dataclasses.fields(blocks)]
    torch.library.opcheck(torch.ops.dit_sparse.block_sparse_attention.default,
                          (inputs.query, inputs.key, inputs.value, *fields, 0.125, "cpu"))


def test_compilers_see_one_call() -> None:
    inputs = build(Case())

    def attend(query: torch.Tensor) -> torch.Tensor:
        return block_sparse_attention(query + 1, inputs.key, inputs.value, inputs.mask)[0] * 2

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs.query), attend(inputs.query))


def test_no_gradients_are_promised() -> None:
    inputs = build(Case())
    out, _ = block_sparse_attention(inputs.query.requires_grad_(), inputs.key, inputs.value, inputs.mask)
    with pytest.raises(RuntimeError):
        out.sum().backward()


def test_import_needs_no_triton() -> None:
    program = ("import sys; sys.modules['triton'] = None\n"
               "from dit_sparse.kernels.attention import device_backends\n"
               "print(device_backends()[0])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout


@pytest.mark.parametrize("masked", [False, True])
def test_dense_attention_with_a_key_mask(masked: bool) -> None:
    query, key, value = (torch.randn(2, n, 3, 64) for n in (63, 113, 113))
    key_mask = torch.rand(2, 113) < 0.5 if masked else None
    want = attention_reference(query, key, value, None, 0.2, key_mask)
    if key_mask is not None:
        key_mask[1] = False
        want = attention_reference(query, key, value, None, 0.2, key_mask)
        key[~key_mask], value[~key_mask] = torch.nan, torch.nan
    out, lse = dense_attention(query, key, value, scale=0.2, key_mask=key_mask)
    torch.testing.assert_close(out, want[0])
    torch.testing.assert_close(lse, want[1])


@pytest.mark.parametrize("kind", ["bool", "additive", "both"])
def test_dense_attention_with_the_models_own_mask(kind: str) -> None:
    query, key, value = (torch.randn(2, n, 3, 64) for n in (63, 113, 113))
    seen = torch.rand(2, 1, 63, 113) < 0.5
    key_mask = torch.rand(2, 113) < 0.8 if kind == "both" else None
    attn_mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if kind == "additive" else seen
    out, lse = dense_attention(query, key, value, attn_mask=attn_mask, key_mask=key_mask)
    allowed = seen if key_mask is None else seen & key_mask[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(out, want.transpose(1, 2))
    assert lse is None


def test_dense_blocks_see_everything() -> None:
    key_mask = torch.rand(2, 150) < 0.7
    blocks = Blocks.dense(70, 150, 64, key_mask, torch.device("cpu"))
    assert blocks.token_mask().all() and blocks.token_mask().shape == (1, 1, 70, 150)
    query, key, value = (torch.randn(2, n, 2, 16) for n in (70, 150, 150))
    want = attention_reference(query, key, value, key_mask=key_mask)
    for got, expected in zip(block_sparse_reference(query, key, value, blocks, key_mask=key_mask), want, strict=True):
        torch.testing.assert_close(got, expected)
