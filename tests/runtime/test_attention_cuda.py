"""The forms of attention that call torch's CUDA kernels, without a GPU: what they are called with and what is made of
their answers. The kernels' part is played by a formula that pads its log-sum-exp as they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runtime_inputs import random_qkv
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from xkv_fx.runtime import attention, attention_cuda
from xkv_fx.runtime.form import AttentionForm

aten = torch.ops.aten
SCALE = 0.3


class Kernels(TorchDispatchMode):
    """torch's CUDA kernels by their formulas; what they refuse is refused."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._scaled_dot_product_flash_attention.default:
            q, k, v, _, causal = args
            assert causal
            assert k.shape[1] != 0 and q.shape[1] % k.shape[1] == 0  # noqa: PT018
            out, lse, *_ = self.attend(q, k, v, torch.ones(q.shape[2], k.shape[2]).tril().log(), kwargs["scale"], 1)
            nothing = torch.empty(0)
            return out, lse, nothing, nothing, q.shape[2], k.shape[2], nothing, nothing, nothing
        if func is aten._scaled_dot_product_efficient_attention.default:
            q, k, v, bias, with_lse = args
            assert with_lse
            assert q.shape[1] == k.shape[1] == v.shape[1]
            assert bias.shape == (*q.shape[:3], k.shape[2])
            assert bias.stride(-1) == 1
            assert all(stride % 8 == 0 for stride in bias.stride()[:-1])
            return self.attend(q, k, v, bias, kwargs["scale"], 32)
        return func(*args, **(kwargs or {}))

    def attend(self, q: Any, k: Any, v: Any, bias: Any, scale: float, multiple: int) -> tuple[Any, ...]:
        group = q.shape[1] // k.shape[1]
        k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
        logits = q.float() @ k.transpose(2, 3) * scale + bias
        lse = torch.nn.functional.pad(logits.logsumexp(-1), (0, -q.shape[2] % multiple), value=float("inf"))
        rest = torch.empty(0), torch.empty(0)
        return (logits.softmax(-1) @ v).to(q.dtype), lse, *rest


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (4, 4)])
def test_flash_among_new_tokens(heads: tuple[int, int]) -> None:
    q, k, v = random_qkv(heads, 9)
    expected = attention.causal_attention(q, k, v, AttentionForm(SCALE))
    with Kernels():
        tested = attention_cuda.causal_by_flash(q, k, v, SCALE)
    torch.testing.assert_close(tested, expected)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (4, 4)])
@pytest.mark.parametrize(("length", "slots"), [(1, 16), (5, 21), (40, 3)])
def test_biased_over_slots(heads: tuple[int, int], length: int, slots: int) -> None:
    q, k, v = random_qkv(heads, length, (8, 16), keys=slots)
    mask = torch.rand(2, 1, 1, slots) < 0.7
    mask[0] = False  # nothing kept yet, which the caller sees to
    mask[1, ..., 0] = True
    expected_out, expected_lse = attention.slot_attention(q, k, v, mask, AttentionForm(SCALE))
    with Kernels():
        out, lse = attention_cuda.slots_by_bias(q, k, v, mask, SCALE)
    torch.testing.assert_close(out[1], expected_out[1])
    torch.testing.assert_close(lse[1], expected_lse[1])
    assert out.shape == expected_out.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torchs_own_shapes(dtype: torch.dtype) -> None:
    """Against torch's fake kernels, which pad as the real ones do."""
    with FakeTensorMode():
        q, k, v = random_qkv((6, 2), 9, (16, 16), dtype=dtype)
        out, lse = attention_cuda.causal_by_flash(q, k, v, SCALE)
        assert (out.shape, out.dtype) == (q.shape, dtype)
        assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
        out, lse = attention_cuda.slots_by_bias(q, k, v, torch.ones(2, 1, 1, 9, dtype=torch.bool), SCALE)
        assert (out.shape, out.dtype) == (q.shape, dtype)
        assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)


def test_only_on_cuda() -> None:
    q, k, v = random_qkv((6, 2), 9, (16, 16), dtype=torch.bfloat16)
    assert not attention_cuda.flash_applies(q, k, v)
    assert not attention_cuda.bias_applies(q, k, v, torch.ones(2, 1, 1, 9, dtype=torch.bool))
