from __future__ import annotations

import pytest
import torch

from pretrain.ssl.pictures import CROP_COLOURS, GAP, guidance_picture


@pytest.mark.parametrize("size", [32, 64, 300])
def test_guidance_picture__is_readable_and_shows_every_image(size: int):
    canvas = torch.full((3, 3, size, size), 90, dtype=torch.uint8)
    heat = torch.zeros(3, 4, 4)
    heat[:, 2, 1] = 1
    boxes = torch.tensor([[0.25, 0.5, 0.5, 0.75]]).expand(3, 4)
    crops = torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.0, 0.4, 1.0, 1.0]]).expand(3, 2, 4)
    picture = guidance_picture(canvas, heat, boxes, crops)
    side = (picture.shape[2] - 2 * GAP) // 3
    assert picture.dtype == torch.uint8
    assert side >= max(size, 128)
    assert picture.shape == (3, 2 * side + GAP, 3 * side + 2 * GAP)
    for image in range(3):
        column = picture[:, :side, image * (side + GAP) :][:, :, :side]
        for colour in CROP_COLOURS:
            assert (column == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(0).any()


def test_guidance_picture__heat_is_drawn_where_it_is():
    heat = torch.zeros(1, 4, 4)
    heat[0, 0, 0] = 1
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    picture = guidance_picture(
        torch.full((1, 3, 64, 64), 128, dtype=torch.uint8), heat, whole, whole[None].expand(1, 2, 4)
    )
    side = picture.shape[2]
    red, blue = picture[0, side + GAP :].float(), picture[2, side + GAP :].float()
    quarter = side // 8
    assert red[quarter, quarter] > blue[quarter, quarter]
    assert red[-quarter, -quarter] < blue[-quarter, -quarter]
