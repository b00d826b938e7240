"""Images made for a measurement, each different, so that no cache of images can answer.

Knows pixels and PNG, through Pillow. Leaves where an image goes in a request to
:mod:`~pytest_gpulayout.adapters.prompts`.
"""

from __future__ import annotations

import base64
import io
from random import Random

from PIL import Image

from pytest_gpulayout.workload import ImageSize

_TILE = 16


def png_data_url(size: ImageSize, random: Random) -> str:
    """Return a mosaic of random colours as a ``data:`` URL.

    A model's work depends on the number of pixels and not on what they show. Tiles instead of noise keep the PNG of
    1024 x 768 pixels at some kilobytes, so that its transfer is no part of what is measured.

    :param size: in pixels. :param random: the source of the colours.
    """
    columns, rows = -(-size.width // _TILE), -(-size.height // _TILE)
    tiles = Image.frombytes("RGB", (columns, rows), random.randbytes(3 * columns * rows))
    buffer = io.BytesIO()
    tiles.resize((size.width, size.height), Image.Resampling.NEAREST).save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
