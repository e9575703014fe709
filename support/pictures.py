"""One picture file: decoded to its end, set upright, its colours in sRGB. Only four decoders are ever used.

What it is not: it crops and resizes nothing; data.py does.
"""

import io
import os
from functools import lru_cache
from os.path import isfile

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF")
MAX_PIXELS, MAX_PICTURE_BYTES = 50_000_000, 100 << 20  # a small file can claim to be a giant
MAX_PROFILE = 16 << 20  # bytes of a PNG's colour profile; Pillow's limit of 1 MB is less than some have
NEAR_SRGB = 4  # of 255: how far a profile's colours may be from sRGB's and pass for them
DARK = 72  # of 255, the brightest value of a picture; 14 bits in files of 16 come to 63, and to more when resized
NEARLY_BLACK = "pictures that are nearly black; if they should not be, stretch their values to the file's whole range"
PROFILED = (
    "pictures with a colour profile other than sRGB (converted to sRGB, but for COCO, whose bits stay as they were)"
)
PNG_START, PNG_TEXTS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt")
TURNS = (None, None, 0, 3, 1, 5, 4, 6, 2)  # EXIF's orientation -> Image.Transpose


def read_rgb(path, profiles=True):
    """A file as an upright RGB picture, decoded to its end. Raises many kinds of exception if it cannot be read.

    profiles: whether a picture with a colour profile is converted to sRGB.
    """
    return look_at(path, upright_rgb if profiles else upright_as_stored)


def look_at(path, look):
    """look(picture) of a file."""
    if os.path.getsize(path) > MAX_PICTURE_BYTES or not isfile(path):
        raise OSError(f"not a regular file of at most {MAX_PICTURE_BYTES >> 20} MiB")
    try:
        return decode(path, look)
    except ValueError:  # as for more text in a PNG than Pillow holds
        return decode(io.BytesIO(without_text(path)), look)


def decode(file, look):
    PngImagePlugin.MAX_TEXT_CHUNK = MAX_PROFILE
    with Image.open(file, formats=FORMATS) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise OSError(f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS}")
        picture.load()
        return look(picture)


def without_text(path):
    """The bytes of a PNG without the texts in it; another file's as they are."""
    with open(path, "rb") as f:
        data = f.read(MAX_PICTURE_BYTES)
    if not data.startswith(PNG_START):
        return data
    kept, at = [PNG_START], len(PNG_START)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])  # length, name, content, checksum
        kept += [data[at:end]] if data[at + 4 : at + 8] not in PNG_TEXTS else []
        at = end
    return b"".join(kept)


def upright_rgb(picture):
    """As its EXIF note says it was held. A note that cannot be read says nothing."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises many kinds
        orientation = None
    turn = TURNS[orientation] if orientation in range(len(TURNS)) else None
    return to_rgb(picture if turn is None else picture.transpose(turn))


def upright_as_stored(picture):
    picture.info.pop("icc_profile", None)
    return upright_rgb(picture)


def to_rgb(picture):
    """Colours as sRGB has them; what is transparent becomes white."""
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith("I;16"):  # convert() would clip 16 bits at 255 instead of scaling them
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise OSError(f"pixels of an unknown range (mode {picture.mode})")
    if not picture.has_transparency_data:
        return to_srgb(picture, profile)
    layer = to_srgb(picture.convert("L" if picture.mode[0] in "L1" else "RGB"), profile)
    layer.putalpha(picture.convert("RGBA").getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), layer).convert("RGB")


def to_srgb(picture, profile):
    """L, RGB, CMYK and the like -> RGB. The profile of other channels than the picture has says nothing."""
    from PIL import ImageCms

    mode, transform = transform_of(profile) if profile else (None, None)
    fits = {"L": picture.mode in ("1", "L"), "CMYK": picture.mode == "CMYK", "RGB": picture.mode != "CMYK"}
    return ImageCms.applyTransform(picture.convert(mode), transform) if fits.get(mode) else picture.convert("RGB")


@lru_cache(maxsize=64)
def transform_of(profile):
    """-> the mode of an ICC profile's colours and what converts them to sRGB; None, None if it is sRGB, or damaged."""
    from PIL import ImageCms

    try:
        source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB")
    except (OSError, KeyError, ImageCms.PyCMSError):
        return None, None
    if mode != "CMYK":
        levels = np.arange(0, 256, 15, dtype=np.uint8)  # 0 to 255
        probe = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        probe = Image.fromarray(probe).convert(mode)
        found = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
        if np.abs(found - np.asarray(probe.convert("RGB"))).max() <= NEAR_SRGB:
            return None, None
    return mode, transform


def oddities(picture):
    """What is odd about a picture that can be read -> [(what, detail)]."""
    found, mode, profile = [], picture.mode, picture.info.get("icc_profile")
    if mode not in ("RGB", "L"):
        found.append((f"pictures of mode {mode}, which become RGB", ""))
    if profile and transform_of(profile)[0]:
        found.append((PROFILED, ""))
    deep = mode.startswith("I;16")
    low, high = (picture if deep else upright_rgb(picture).convert("L")).getextrema()
    if high < (DARK << 8 if deep else DARK):
        found.append((NEARLY_BLACK, f": values from {low} to {high} of {65535 if deep else 255}"))
    return found
