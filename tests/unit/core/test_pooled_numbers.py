"""The arithmetic on vectors and logits."""

from __future__ import annotations

import math
from array import array

import pytest

from qwen_ray.core.pooling import cosine, shaped, sigmoid, to_floats


def test_floats_come_back() -> None:
    assert to_floats(array("f", [1.5, -2.0]).tobytes()).tolist() == [1.5, -2.0]


def test_a_vector_is_cut_before_it_is_made_as_long_as_1() -> None:
    vector = array("f", [3.0, 4.0, 12.0])
    assert shaped(vector).tolist() == pytest.approx([3 / 13, 4 / 13, 12 / 13])
    assert shaped(vector, dimensions=2).tolist() == pytest.approx([0.6, 0.8])
    assert shaped(vector, dimensions=2, normalizes=False).tolist() == [3.0, 4.0]
    assert shaped(array("f", [0.0, 0.0])).tolist() == [0.0, 0.0]


def test_angles() -> None:
    a, b = array("f", [1.0, 0.0]), array("f", [2.0, 2.0])
    assert cosine(a, b) == pytest.approx(math.sqrt(0.5))
    assert cosine(a, array("f", [0.0, 0.0])) == 0.0


@pytest.mark.parametrize("x", [-1000.0, -3.0, 0.0, 3.0, 1000.0])
def test_a_sigmoid_never_overflows(x: float) -> None:
    assert sigmoid(x) == pytest.approx(0.5 * (1 + math.tanh(x / 2)), abs=1e-12)
