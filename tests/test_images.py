"""Pictures: opened within bounds and as they were meant, and overlays of what was kept."""

import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from vtc.eval.images import MAX_PIXELS, open_image, overlay, seen_box


def test_overlay_darkens_dropped_patches_only():
    image = Image.new("RGB", (40, 80), (200, 100, 255))
    painted = overlay(image, torch.tensor([0, 5, 15]), 16)
    assert painted.size == image.size
    for cell in range(16):
        centre = (cell % 4 * 10 + 5, cell // 4 * 20 + 10)
        assert painted.getpixel(centre) == ((200, 100, 255) if cell in (0, 5, 15) else (30, 15, 38))


def test_overlay_lies_over_what_the_model_saw():
    class Crops:
        do_center_crop, size, crop_size = True, {"shortest_edge": 336}, {"height": 336, "width": 336}

    class Squeezes(Crops):
        do_center_crop = False

    assert seen_box((100, 60), Squeezes()) == (0, 0, 100, 60)
    box = seen_box((100, 60), Crops())
    assert box == (20, 0, 80, 60)
    painted = overlay(Image.new("RGB", (100, 60), "white"), torch.tensor([0]), 4, box)
    assert painted.getpixel((25, 5)) == (255, 255, 255)
    assert painted.getpixel((10, 5)) == painted.getpixel((75, 5)) == painted.getpixel((25, 55)) == (38, 38, 38)


@pytest.mark.parametrize("tokens", [0, 15])
def test_overlay_needs_a_square_grid(tokens):
    with pytest.raises(ValueError, match="square grid"):
        overlay(Image.new("RGB", (8, 8)), torch.tensor([], dtype=torch.long), tokens)


def test_open_image_turns_by_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is the right side
    Image.new("L", (30, 10)).save(tmp_path / "turned.jpg", exif=exif)
    image = open_image(tmp_path / "turned.jpg")
    assert (image.size, image.mode) == ((10, 30), "RGB")


def test_open_image_says_why_not(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # another test's import of lmms-eval sets it

    def bad(name, match):
        with pytest.raises(ValueError, match=match):
            open_image(tmp_path / name)

    bad("missing.png", "no such image file")
    (tmp_path / "text.png").write_text("not an image")
    bad("text.png", "not an image that Pillow can read")
    os.mkfifo(tmp_path / "pipe")
    bad("pipe", "no such image file")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(21 * 2**20)
    bad("large.png", "21.0 MB")
    Image.new("1", (10_000, MAX_PIXELS // 10_000 + 1)).save(tmp_path / "wide.png")
    bad("wide.png", "50 megapixels")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:90])
    bad("cut.png", "damaged image")


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bits_are_scaled_not_clipped(tmp_path, suffix):
    levels = np.array([[0, 3 * 257, 128 * 257, 200 * 257 + 100, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / f"deep.{suffix}")
    image = open_image(tmp_path / f"deep.{suffix}")
    assert image.mode == "RGB"
    assert np.asarray(image)[0].tolist() == [[level] * 3 for level in (0, 3, 128, 200, 255)]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_grey_of_unknown_range_is_refused(tmp_path, kind):
    Image.fromarray(np.array([[0, 70_000]], dtype=kind)).save(tmp_path / "deep.tiff")
    with pytest.raises(ValueError, match="grey values from 0 to 70000"):
        open_image(tmp_path / "deep.tiff")
