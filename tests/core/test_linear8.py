"""8-bit linear layers: close to the formula, in the blocks only, refused by name, and put back as they were."""

import pytest
import torch

from dit_sparse import linear8
from dit_sparse.linear8 import Fp8Linear, bf16_linears, fp8_linear_reference, fp8_linears, quantise_rows

BF16 = torch.bfloat16


def tiny_wan(ffn_dim: int = 64) -> torch.nn.Module:
    import diffusers

    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
        ffn_dim=ffn_dim, num_layers=2, rope_max_seq_len=256).eval()


def layer(inside: int = 64, outside: int = 48, bias: bool = True, dtype: torch.dtype = BF16) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(inside, outside, bias=bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (63, 64), (2, 113, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_formula_and_is_close_to_the_layer(dtype: torch.dtype, shape: tuple, bias: bool) -> None:
    linear = layer(bias=bias, dtype=dtype)
    x = torch.randn(shape).to(dtype)
    out = Fp8Linear(linear)(x)
    want = fp8_linear_reference(x, linear.weight, linear.bias)
    assert out.dtype == dtype and out.shape == want.shape
    assert (out.float() - want).abs().max() <= 2.0**-8 * want.abs().max() + 1e-6  # the output is bf16 on the way
    exact = x.double() @ linear.weight.double().t() + (0 if linear.bias is None else linear.bias.double())
    assert (out.double() - exact).norm() < 0.06 * exact.norm()


def test_rows_have_scales_of_their_own() -> None:
    x = torch.randn(5, 32)
    x[1] *= 1000
    x[2] = 0
    x[3, 4] = torch.inf
    rows, scale = quantise_rows(x)
    assert rows.dtype == torch.float8_e4m3fn and scale.shape == (5, 1) and scale.dtype == torch.float32
    for i in (0, 1, 4):
        assert ((rows[i].float() * scale[i] - x[i]).abs() <= x[i].abs() * 2**-4 + scale[i] * 2**-10).all()
    assert (rows[2].float() == 0).all() and not (rows[3].float() * scale[3]).isfinite().any()


def test_the_blocks_only_and_back_to_the_same_objects() -> None:
    model = tiny_wan()
    before = dict(model.named_modules())
    assert fp8_linears(model) is model and fp8_linears(model) is model
    changed = {name for name, part in model.named_modules() if isinstance(part, Fp8Linear)}
    assert changed == {name for name, part in before.items()
                       if type(part) is torch.nn.Linear and name.startswith("blocks.")}
    assert "original" not in str(list(model.state_dict()))
    assert bf16_linears(model) is model
    assert all(part is before[name] for name, part in model.named_modules())


def test_the_model_still_computes_nearly_the_same() -> None:
    torch.manual_seed(0)
    model = tiny_wan().to(BF16)
    inputs = {"hidden_states": torch.randn(1, model.config.in_channels, 2, 8, 8, dtype=BF16),
              "timestep": torch.full((1,), 500.0),
              "encoder_hidden_states": torch.randn(1, 8, model.config.text_dim, dtype=BF16)}
    with torch.no_grad():
        want = model(**inputs, return_dict=False)[0]
        got = fp8_linears(model)(**inputs, return_dict=False)[0]
        back = bf16_linears(model)(**inputs, return_dict=False)[0]
    assert not torch.equal(got, want) and (got - want).float().norm() < 0.2 * want.float().norm()
    assert torch.equal(back, want)


def test_linear_layers_of_normalisations_stay() -> None:
    import diffusers

    model = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=32, in_channels=16, axes_dims_rope=(4, 6, 6))
    fp8_linears(model)
    linears = {name for name, part in model.named_modules() if type(part) is torch.nn.Linear and "blocks." in name}
    assert linears and all(".norm" in name for name in linears)
    assert isinstance(model.single_transformer_blocks[0].proj_mlp, Fp8Linear)


def test_compiles_in_one_graph() -> None:
    linear, x = Fp8Linear(layer()), torch.randn(7, 64, dtype=BF16)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), linear(x))


def test_converting_the_model_leaves_weights_and_scales() -> None:
    linear, x = Fp8Linear(layer()), torch.randn(7, 64, dtype=BF16)
    want = linear(x)
    linear.to(torch.float16)
    assert linear.scale.dtype == torch.float32 and linear.weight.dtype == torch.uint8
    torch.testing.assert_close(linear(x), want, atol=1e-2, rtol=1e-2)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tiny_wan(ffn_dim=40)
    before = dict(odd.named_modules())
    with pytest.raises(ValueError, match=r"^blocks.0.ffn.net.0.proj is \d+ x 40; .* multiples of 16$"):
        fp8_linears(odd)
    assert all(part is before[name] for name, part in odd.named_modules())
    model = fp8_linears(tiny_wan(), keep=False)
    with pytest.raises(ValueError, match="keep=True"):
        bf16_linears(model)
    with pytest.raises(ValueError, match="meta"):
        fp8_linears(tiny_wan().to("meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "NVIDIA GPU" in linear8.missing("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    assert linear8.missing("cuda") == ("the GPU has compute capability 8.6; 8-bit linear layers need 8.9 or later"
                                       if torch.version.hip is None else "")
    assert "NVIDIA GPU" in linear8.missing("mps")
