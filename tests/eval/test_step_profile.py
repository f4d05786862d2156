"""Where a step's time goes: kernels are told apart by the operators that launched them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_sparse.eval import step_profile
from dit_sparse.eval.step_profile import COPIES, CROSS, PLAN, POINTWISE, PRODUCTS, QUANTISE, ROTARY, SELF, kind_of, read

OURS, SPARSE = "dit_sparse::attention", "dit_sparse::block_sparse_attention"
CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


@pytest.mark.parametrize(("kernel", "path", "lengths", "kind"), [
    ("attention_kernel", [SPARSE, OURS], None, SELF),
    ("rows_kernel", [SPARSE, OURS], None, QUANTISE),
    ("void at::native::sort", ["aten::sort", SPARSE, OURS], None, SELF),
    ("soft_kernel", ["dit_sparse::soft_blocks", OURS], None, SELF),
    ("select_kernel", [OURS], None, PLAN),
    ("sm90_xmma_gemm_bf16", ["aten::bmm", OURS], None, PLAN),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", ["aten::_scaled_dot_product_cudnn_attention"], (9, 9), SELF),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", ["aten::_scaled_dot_product_cudnn_attention"], (9, 5), CROSS),
    ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA", ["aten::addmm"], None, PRODUCTS),
    ("device_kernel<cutlass::gemm::kernel::GemmUniversal>", ["aten::_scaled_mm"], None, PRODUCTS),
    ("triton_red_fused__fused_rms_norm__to_copy_addmm_view_3", ["triton_red_fused"], None, ROTARY),
    ("triton_poi_fused_empty_like_mul_slice_scatter_unbind_5", [], None, ROTARY),
    ("triton_red_fused_add_mm_mul_native_layer_norm_7", [], None, POINTWISE),
    ("triton_poi_fused_addmm_gelu_view_9", [], None, POINTWISE),
    ("Memcpy DtoD (Device -> Device)", ["aten::copy_"], None, COPIES),
    ("void at::native::elementwise_kernel<direct_copy_kernel_cuda>", ["aten::clone"], None, COPIES),
])
def test_kinds(kernel: str, path: list[str], lengths: tuple[int, int] | None, kind: str) -> None:
    assert kind_of(kernel, path, lengths) == kind


def event(name: str, parent: Any = None, kernels: tuple = (), shapes: tuple = (), device: Any = CPU,
          time: tuple[float, float] = (0, 0)) -> SimpleNamespace:
    return SimpleNamespace(name=name, cpu_parent=parent, input_shapes=[list(s) for s in shapes], device_type=device,
                           kernels=[SimpleNamespace(name=n, duration=d) for n, d in kernels], is_user_annotation=False,
                           time_range=SimpleNamespace(start=time[0], end=time[1]))


def test_kernels_are_counted_once_and_gaps_are_told() -> None:
    ours = event(OURS)
    inner = event(SPARSE, ours, (("attention_kernel", 6000.0),))
    cross = event("aten::_scaled_dot_product_cudnn_attention", event("aten::scaled_dot_product_attention"),
                  (("cudnn_sdpa", 1000.0),), ((1, 2, 900, 64), (1, 2, 500, 64), (1, 2, 500, 64)))
    ran = [event("attention_kernel", device=CUDA, time=(0, 6000)), event("cudnn_sdpa", device=CUDA, time=(6000, 7000)),
           event("unlinked_gemm", device=CUDA, time=(9000, 10000))]
    named = event("step", device=CUDA, time=(0, 99999))
    named.is_user_annotation = True
    found = read([ours, inner, cross, *ran, named], True)
    assert found.kinds() == {SELF: 6.0, PRODUCTS: 1.0, CROSS: 1.0} and found.span_ms == 10.0
    text = "\n".join(found.lines("a step"))
    assert "a step: 10.00 ms" in text and "60.0 %" in text and "20.0 %      2.000 ms  nothing on the device" in text


def test_a_step_without_kernels() -> None:
    assert read([], True).lines("empty") == ["empty: the profiler saw no kernels on this device"]


def test_real_operators_on_the_cpu() -> None:
    x = torch.randn(1, 2, 64, 16)

    def step() -> None:
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        torch.nn.functional.scaled_dot_product_attention(x, x[:, :, :30], x[:, :, :30])
        torch.nn.functional.rms_norm(x @ x.mT, (64,))

    step()
    found = step_profile.profile(step, "cpu")
    assert {SELF, CROSS, PRODUCTS} <= set(found.kinds()) and found.span_ms > 0
    assert list(found.kinds()) == [kind for kind in step_profile.KINDS if kind in found.kinds()]
