"""Pictures to tensors: conversions with hand-computed values, the evaluation crop, the augmentations."""

import numpy as np
import pytest
import torch
from data_helpers import encoded
from PIL import Image

from flextok_pl.data.transforms import (
    Augmentation,
    augment,
    center_crop,
    covering,
    decode_image,
    sample_generator,
    to_tensor,
)


def pixel(data):
    image = decode_image(data)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def picture(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def test_modes_become_rgb():
    assert pixel(encoded(Image.new("L", (1, 1), 77))) == (77, 77, 77)
    assert pixel(encoded(Image.new("1", (3, 2), 1))) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))) == (255, 255, 255)  # transparent: white
    red, green, blue = pixel(encoded(Image.new("RGBA", (2, 2), (200, 0, 0, 128))))
    assert abs(red - (200 * 128 + 255 * 127) / 255) <= 1 and abs(green - 127) <= 1 and green == blue
    assert pixel(encoded(Image.new("LA", (2, 2), (0, 255)))) == (0, 0, 0)
    cyan = pixel(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100))
    assert cyan[0] < 30 and cyan[1] > 120 and cyan[2] > 180


def test_palette_with_transparency_is_laid_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 0), 1)
    rgb = decode_image(encoded(image, transparency=0))
    assert [rgb.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)]


def test_sixteen_bits_keep_their_range():
    levels = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    rgb = decode_image(encoded(Image.fromarray(levels)))
    assert [rgb.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]  # not clipped at 255


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    assert decode_image(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif)).size == (2, 4)


@pytest.mark.parametrize("data", [b"", b"no picture", encoded(picture(64, 64), "JPEG")[:700]])
def test_broken_pictures_raise(data):
    with pytest.raises(ValueError, match="not a complete picture"):
        decode_image(data)


def test_to_tensor_values():
    tensor = to_tensor([Image.new("RGB", (2, 2), (0, 255, 51))])
    assert tensor.shape == (1, 3, 2, 2) and tensor.dtype == torch.float32
    assert tensor[0, :, 0, 0].tolist() == pytest.approx([-1.0, 1.0, -0.6])


def test_center_crop_of_the_right_size_is_exact():
    image = picture(20, 12)
    cropped = np.asarray(center_crop(image, 12))
    assert np.array_equal(cropped, np.asarray(image)[:, 4:16])


def test_center_crop_is_antialiased_bicubic():
    image = picture(151, 97)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None, :, :, 27:124].double(),
        size=(24, 24),
        mode="bicubic",
        antialias=True,
    )
    ours = torch.from_numpy(np.asarray(center_crop(image, 24)).copy()).permute(2, 0, 1)[None].double()
    inner = (..., slice(2, -2), slice(2, -2))  # at its border the crop sees the picture beyond it
    difference = (ours - resized)[inner].abs()
    assert difference.mean() < 0.4 and difference.max() < 2.5  # Pillow rounds after each of its two passes


def test_one_pixel_becomes_a_plain_square():
    assert (np.asarray(center_crop(Image.new("RGB", (1, 1), (1, 2, 3)), 8)) == (1, 2, 3)).all()


def test_augmentation_without_change_is_the_evaluation_crop():
    image = picture(32, 32)
    none = Augmentation(crop_scale=(1.0, 1.0), hflip=False)
    assert np.array_equal(augment(image, 16, none, sample_generator(0, 0, "k")), center_crop(image, 16))


def test_augmentation_depends_on_seed_epoch_and_key_only():
    image, augmentation = picture(32, 32), Augmentation(translate=0.2, scale=(0.7, 1.2))

    def draw(seed, epoch, key):
        return np.asarray(augment(image, 16, augmentation, sample_generator(seed, epoch, key)))

    first = draw(1, 2, "k")
    assert np.array_equal(first, draw(1, 2, "k"))
    for other in ((2, 2, "k"), (1, 3, "k"), (1, 2, "l")):
        assert not np.array_equal(first, draw(*other))


def test_flip_happens_to_half_of_the_pictures():
    image = picture(8, 8)
    plain, mirrored = np.asarray(image), np.asarray(image)[:, ::-1]
    flip = Augmentation(crop_scale=(1.0, 1.0))
    results = [np.asarray(augment(image, 8, flip, sample_generator(0, 0, str(i)))) for i in range(200)]
    flips = sum(np.array_equal(r, mirrored) for r in results)
    assert flips + sum(np.array_equal(r, plain) for r in results) == 200
    assert 70 < flips < 130


def test_shrinking_frames_the_picture_with_fill():
    black = Image.new("RGB", (32, 32))
    half = Augmentation(crop_scale=(1.0, 1.0), hflip=False, scale=(0.5, 0.5), fill=255)
    result = np.asarray(augment(black, 32, half, sample_generator(0, 0, "k")))[..., 0].astype(int)
    assert (result[12:20, 12:20] == 0).all() and (result[:6] == 255).all() and (result[:, -6:] == 255).all()
    assert abs((255 - result).sum() / 255 - 256) < 8  # a quarter of the area, in pixels


def test_window_is_no_larger_than_asked():
    # A ramp tells where the window lay: its ends are the smallest and largest value.
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 256, 0).repeat(3, 2))
    quarter = Augmentation(crop_scale=(0.25, 0.25), hflip=False)
    starts = []
    for i in range(50):
        row = np.asarray(augment(ramp, 128, quarter, sample_generator(0, 0, str(i))))[0, :, 0].astype(int)
        assert abs(row.max() - row.min() - 127) <= 1
        starts.append(row.min())
    assert min(starts) < 25 and max(starts) > 103  # uniform over 0..128


@pytest.mark.parametrize(
    "options",
    [{"crop_scale": (0.0, 1.0)}, {"crop_scale": (0.9, 0.8)}, {"scale": (0, 1)}, {"translate": 1}, {"fill": 256}],
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Augmentation(**options)


def test_a_crop_covers_its_size_and_leaves_out_as_little_as_it_can():
    image = picture(40, 30)
    assert np.array_equal(np.asarray(center_crop(image, (30, 40))), np.asarray(image)), "its own size"
    assert np.array_equal(np.asarray(center_crop(image, (20, 40))), np.asarray(image)[5:25]), "all of its width"
    assert np.array_equal(np.asarray(center_crop(image, (30, 10))), np.asarray(image)[:, 15:25]), "all of its height"
    assert np.array_equal(center_crop(image, (16, 16)), center_crop(image, 16))
    half = Image.fromarray(np.asarray(image).repeat(2, 0).repeat(2, 1))
    near = np.asarray(center_crop(half, (30, 40))).astype(int) - np.asarray(image)
    assert np.abs(near).mean() < 12


@pytest.mark.parametrize("size", [(12, 24), (24, 12), (10, 11)])
def test_augmented_windows_keep_the_aspect_ratio(size):
    # A ramp along each axis tells how much of it the window saw.
    rows, columns = np.mgrid[:200, :200].astype(np.uint8)
    ramps = Image.fromarray(np.stack([rows, columns, rows], axis=2))
    crops = Augmentation(crop_scale=(0.25, 0.25), hflip=False)
    seen = np.asarray(augment(ramps, size, crops, sample_generator(0, 0, "k"))).astype(int)
    assert seen.shape == (*size, 3)
    down, across = seen[-1, 0, 0] - seen[0, 0, 0], seen[0, -1, 1] - seen[0, 0, 1]
    pixel = 100 / max(size)  # the largest window is 200 pixels long, and a quarter of its area half as long
    assert (down, across) == (pytest.approx((size[0] - 1) * pixel, abs=3), pytest.approx((size[1] - 1) * pixel, abs=3))
    none = Augmentation(crop_scale=(1.0, 1.0), hflip=False)
    exact = picture(2 * size[1], 2 * size[0])
    assert np.array_equal(augment(exact, size, none, sample_generator(0, 0, "k")), center_crop(exact, size))


@pytest.mark.parametrize(
    "held, size, expected",
    [
        ((500, 375), 256, (341, 256)),
        ((375, 500), 256, (256, 341)),
        ((500, 375), (256, 256), (341, 256)),
        ((500, 375), (150, 300), (300, 225)),
        ((500, 375), (300, 150), (400, 300)),
        ((500, 375), (100, 500), (500, 375)),
        ((500, 375), 400, (500, 375)),
    ],
)
def test_shrunk_pictures_still_cover_the_size(held, size, expected):
    assert covering(held, size) == expected


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_of_other_channels(channels):
    half = Image.new("RGBA", (8, 8), (200, 100, 0, 127))
    for image in (half, half.convert("RGB"), half.convert("L"), half.convert("LA")):
        decoded = decode_image(encoded(image), channels=channels)
        tensor = to_tensor([center_crop(decoded, (4, 8))])
        assert tensor.shape == (1, channels, 4, 8)
        frame = augment(decoded, 8, Augmentation((1, 1), False, scale=(0.5, 0.5), fill=7), sample_generator(0, 0, "k"))
        corner = frame.getpixel((0, 0))
        assert corner == {1: 7, 3: (7, 7, 7), 4: (7, 7, 7, 255)}[channels]
        if channels == 4:
            opacity = 127 if "A" in image.mode else 255
            assert decoded.getpixel((0, 0))[3] == opacity, "what is transparent stays so"
    grey = decode_image(encoded(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))), channels=1)
    assert np.array_equal(np.asarray(grey).ravel(), np.arange(256)), "levels of grey are exact"
