"""The coordinate rule against transformers' `Florence2PostProcessor` and its own definition."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.models.florence2.processing_florence2 import Florence2PostProcessor

from florence2.locations import Size, dequantize, quantize, to_text

# A busy machine is slow now and then.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SIZES: list[Size] = [(640, 480), (800, 1200), (1, 1), (999, 1001), (7, 6000), (1000, 1000), (1223, 699), (3024, 4032)]
ORACLE = Florence2PostProcessor(config=None, tokenizer=SimpleNamespace(all_special_tokens=[]))

sides = st.integers(1, 20_000)
shares = st.floats(0, 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("coordinates", [2, 4])
def test_quantize_is_hfs(size: Size, coordinates: int) -> None:
    # HF computes in the type it is given; in float64 its edges are exactly ours.
    scale = np.array([*size, *size], np.float64)[:coordinates]
    points = np.random.default_rng(0).uniform(-0.2, 1.2, (2000, coordinates)) * scale
    whole = np.floor(points)
    for boxes in (points, whole):
        wanted = ORACLE.quantize(torch.tensor(boxes, dtype=torch.float64), size).numpy()
        np.testing.assert_array_equal(quantize(boxes, size), wanted)


@pytest.mark.parametrize("size", SIZES)
def test_dequantize_is_hfs_before_truncation(size: Size) -> None:
    bins = np.arange(1000).reshape(-1, 4)
    wanted = ORACLE.dequantize(torch.tensor(bins, dtype=torch.float64), size).numpy()
    np.testing.assert_array_equal(dequantize(bins, size).astype(np.int32), wanted)


def test_the_boxes_of_transformers_own_tests() -> None:
    size = (800, 1200)
    boxes = [[0, 0, 30, 40], [500, 550, 600, 690], [750, 1121, 851, 1239]]
    bins = [[0, 0, 37, 33], [625, 458, 750, 575], [937, 934, 999, 999]]
    assert quantize(boxes, size).tolist() == bins
    assert dequantize(bins, size).astype(int).tolist() == [[0, 0, 30, 40], [500, 550, 600, 690], [750, 1121, 799, 1199]]


def test_the_car_of_florence_2_base() -> None:
    box = [34.24, 160.08, 597.44, 371.76]
    np.testing.assert_allclose(dequantize([53, 333, 933, 774], (640, 480)), box)
    assert to_text(box, (640, 480)) == "<loc_53><loc_333><loc_933><loc_774>"


def test_width_comes_first() -> None:
    assert quantize([50, 50], (100, 200)).tolist() == [500, 250]
    assert dequantize([500, 250], (100, 200)).tolist() == pytest.approx([50.05, 50.1])


@untimed
@given(sides, sides, st.lists(st.tuples(shares, shares), min_size=1, max_size=5))
def test_there_and_back_is_at_most_half_a_bin_off(width: int, height: int, points: list[tuple[float, float]]) -> None:
    pixels = np.array(points) * (width, height)
    back = dequantize(quantize(pixels, (width, height)), (width, height))
    half_a_bin = np.array([width, height]) / 1000 / 2
    assert (abs(back - pixels) <= half_a_bin * (1 + 1e-9)).all()


@untimed
@given(sides, sides, st.sampled_from([1, 10, 1000, 1024]))
def test_back_and_there_is_the_same_bin(width: int, height: int, bins: int) -> None:
    indices = np.stack([np.arange(bins), np.arange(bins)[::-1]], axis=1)
    there = quantize(dequantize(indices, (width, height), bins), (width, height), bins)
    np.testing.assert_array_equal(there, indices)


coordinates = st.floats(-1e12, 1e12) | st.sampled_from([-np.inf, np.inf])


@untimed
@given(coordinates, coordinates)
def test_every_point_falls_into_a_bin(x: float, y: float) -> None:
    bins = quantize([x, y], (640, 480))
    assert ((bins >= 0) & (bins < 1000)).all()


def test_shapes_are_kept() -> None:
    assert quantize(np.zeros((0, 4)), (10, 10)).shape == (0, 4)
    assert quantize(np.zeros((2, 3, 8)), (10, 10)).shape == (2, 3, 8)
    assert dequantize([], (10, 10)).tolist() == []
    assert to_text([[0, 0, 10, 10], [5, 5, 5, 5]], (10, 10), bins=10) == "<loc_0><loc_0><loc_9><loc_9>" + "<loc_5>" * 4


@pytest.mark.parametrize("points", [3.0, [1, 2, 3], [[1], [2]]])
def test_coordinates_without_a_partner_are_refused(points) -> None:
    with pytest.raises(ValueError, match="in pairs"):
        quantize(points, (10, 10))
    with pytest.raises(ValueError, match="in pairs"):
        dequantize(points, (10, 10))


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-1, 10)])
def test_a_picture_without_area_is_refused(size: Size) -> None:
    with pytest.raises(ValueError, match=r"\(width, height\)"):
        quantize([1, 2], size)


def test_what_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        to_text([1, float("nan")], (10, 10))
