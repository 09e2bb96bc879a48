"""What the client checks before it sends anything."""

import pytest
from conftest import DEMO_CHECKPOINT
from florence2_client import Florence2Client

from florence2.errors import InvalidRequest

PICTURE = DEMO_CHECKPOINT.parent / "pictures" / "scene-1.png"


@pytest.mark.parametrize(
    "region", [(1, 2, 3), (3, 2, 1, 4), (1, 4, 3, 2), (1, 2, 3, float("nan")), (1, 2, 1, 4)], ids=str
)
def test_a_region_is_a_box(region: tuple[float, ...]) -> None:
    with Florence2Client("localhost:1") as client, pytest.raises(ValueError, match="x1, y1, x2, y2"):
        client.run("<REGION_TO_CATEGORY>", PICTURE, region=region)


def test_a_region_needs_a_picture_to_be_a_region_of() -> None:
    with Florence2Client("localhost:1") as client, pytest.raises(InvalidRequest, match="can't be read"):
        client.run("<REGION_TO_CATEGORY>", b"<html>", region=(1, 2, 3, 4))


def test_protocols() -> None:
    with pytest.raises(ValueError, match="http://"):
        Florence2Client("rest://localhost:1")


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_a_timeout_is_a_number_of_seconds(timeout: float) -> None:
    with pytest.raises(ValueError, match="finite and more than 0"):
        Florence2Client(timeout=timeout)
