"""Vectors in fewer bits: codes are those of a loop over elements, and a slot's depend on no other slot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from xkv_fx.errors import BudgetError
from xkv_fx.runtime.quantize import Coding, rotate, rotate_back

SIZES = [8, 24, 64, 80, 96, 128, 256, 576]
FORMATS = ["int8", "int4", "fp8"]
E4M3 = [2.0 ** max(code // 8 - 7, -6) * (code % 8 / 8 + (code >= 8)) for code in range(127)]
"""What the floats of 8 bits without a sign stand for; the last code is no number."""


def sylvester(size: int) -> np.ndarray:
    """+1 or -1 by the parity of the bits that two indices share."""
    index = np.arange(size)
    shared = index[:, None] & index[None]
    return np.array([[(-1.0) ** bin(int(both)).count("1") for both in row] for row in shared]) / np.sqrt(size)


def by_loops(rotated: np.ndarray, coding: Coding) -> tuple[list[int], list[tuple[float, float]]]:
    """Codes of one rotated vector, float32, element by element, and the scale and zero of each group."""
    if coding.floats:
        return floats_by_loops(rotated)
    steps, codes, scales = np.float32(2**coding.bits - 1), [], []
    for group in rotated.reshape(coding.groups, coding.group):
        zero = np.float16(group.min())
        scale = np.float16((group.max() - np.float32(zero)) / steps)
        scales.append((float(scale), float(zero)))
        for element in group:
            distance = (element - np.float32(zero)) / np.float32(scale if scale > 0 else 1)
            codes.append(int(np.clip(np.rint(distance), 0, steps)))
    if coding.bits == 4:
        half = len(codes) // 2
        codes = [low | high << 4 for low, high in zip(codes[:half], codes[half:], strict=True)]
    return codes, scales


def floats_by_loops(rotated: np.ndarray) -> tuple[list[int], list[tuple[float, ...]]]:
    """The nearest of all floats of 8 bits for each element, of two as near the one with an even code."""
    scale = np.float16(np.abs(rotated).max() / np.float32(448))
    codes = []
    for element in rotated / np.float32(scale if scale > 0 else 1):
        size = float(np.clip(abs(element), 0, 448))
        nearest = min(range(127), key=lambda code: (abs(E4M3[code] - size), code % 2))
        codes.append(nearest | (128 if np.signbit(element) else 0))
    return codes, [(float(scale),)]


@pytest.mark.parametrize("size", SIZES)
def test_the_rotation_is_sylvesters_matrix_in_each_block(size: int) -> None:
    block = size & -size
    expected = torch.block_diag(*[torch.tensor(sylvester(block))] * (size // block)).float()
    torch.testing.assert_close(rotate(torch.eye(size)), expected)
    vectors = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate_back(rotate(vectors)), vectors)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_those_of_a_loop(size: int, name: str) -> None:
    coding, generator = Coding.of(name, size), torch.Generator().manual_seed(size)
    vectors = torch.randn(6, size, generator=generator) * torch.logspace(-4, 4, 6)[:, None]
    vectors[1] = 3.0  # all alike
    vectors[2] = 0.0
    vectors[3, 0] = 1e4  # far outside
    codes, scales = coding.encode(vectors)
    assert codes.shape == (6, coding.code_bytes)
    assert codes[0].nbytes + scales[0].nbytes == coding.nbytes
    for row, rotated in enumerate(rotate(vectors).numpy()):
        expected, of_groups = by_loops(rotated, coding)
        assert codes[row].tolist() == expected
        assert [tuple(pair) for pair in scales[row].tolist()] == of_groups


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "most"), [("int8", 0.006), ("int4", 0.1), ("fp8", 0.03)])
def test_what_comes_out_is_near(size: int, name: str, most: float) -> None:
    vectors = torch.randn(50, size, generator=torch.Generator().manual_seed(1))
    passed = Coding.of(name, size).passed(vectors)
    assert float((passed - vectors).norm() / vectors.norm()) < most
    half = Coding.of(name, size).passed(vectors.bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("name", FORMATS)
def test_a_vector_is_stored_by_itself(name: str) -> None:
    coding, vectors = Coding.of(name, 64), torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(2))
    together: tuple[Tensor, Tensor] = coding.encode(vectors)
    alone = [coding.encode(vector) for vector in vectors.flatten(0, 1)]
    for part in (0, 1):
        assert torch.equal(together[part].flatten(0, 1), torch.stack([pair[part] for pair in alone]))


def test_floats_of_any_numbers() -> None:
    """Beyond what a float16 scale can hold, below it, and what is no number: then all of the vector is none."""
    coding = Coding.of("fp8", 20)
    vectors = torch.ones(5, 20) * torch.tensor([1e9, 1e-9, 0.0, 1.0, float("nan")])[:, None]
    vectors[3, 4] = float("inf")
    passed = coding.passed(vectors)
    assert bool(passed[4].isnan().all())
    assert bool(passed[:4].isfinite().all())
    assert float(passed[0, 0]) == pytest.approx(448 * 65504 / 2)  # a block of four, all in its first element
    assert not bool(passed[1:3].any())


def test_rotation_spreads_an_outlier() -> None:
    """Without it, one element far outside would leave the others of its group no steps."""
    vectors = torch.randn(20, 64, generator=torch.Generator().manual_seed(3))
    vectors[:, 7] = 40.0
    coding = Coding.of("int4", 64)
    codes, scales = coding.encode(rotate_back(vectors))  # as if it were not rotated
    plain = (coding.decode(codes, scales) - vectors)[:, torch.arange(64) != 7]
    rotated = (coding.passed(vectors) - vectors)[:, torch.arange(64) != 7]
    assert float(rotated.norm()) < 0.6 * float(plain.norm())


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("int8", 20, "no group of 8 to 64 elements divides a head size of 20"),
        ("int4", 4, "divides a head size of 4"),
        ("model", 64, "the format 'model' stores no codes"),
    ],
)
def test_what_cannot_be_stored_so_is_refused(name: str, size: int, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Coding.of(name, size)
