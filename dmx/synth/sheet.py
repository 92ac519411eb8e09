"""Contact sheets: people in rows, views in columns, to see at a glance what a style looks like."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from dmx.progress import progress_bar
from dmx.synth.render import Renderer
from dmx.synth.styles import Style

GAP, MARGIN, CAPTION_PX = 4, 20, 34
BACKGROUND, INK = (250, 250, 248), (40, 40, 44)


def contact_sheet(
    styles: Sequence[Style],
    *,
    seed: int = 0,
    people: int = 6,
    views: int = 8,
    cameras: int = 4,
    height: int = 256,
    first_identity: int = 0,
) -> Image.Image:
    """Draw `people` rows of `views` images of each style, under the style's caption.

    Args:
        styles: one block each, one below the other.
        seed, first_identity: which world and which people.
        cameras: the views are spread over this many cameras.
        height: pixels of the images, which the sheet shows at that size.
    """
    width = height // 2
    block = CAPTION_PX + people * (height + GAP) + MARGIN
    sheet = Image.new(
        "RGB", (2 * MARGIN + views * (width + GAP) - GAP, MARGIN + len(styles) * block), BACKGROUND
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=18)
    with progress_bar(len(styles) * people * views, "contact sheet", "images") as bar:
        for number, style in enumerate(styles):
            top = MARGIN + number * block
            draw.text((MARGIN, top), style.caption, fill=INK, font=font)
            renderer = Renderer(style, height, seed)
            for row in range(people):
                for column in range(views):
                    data = renderer.render(first_identity + row, column * cameras // views, column)
                    place = (MARGIN + column * (width + GAP), top + CAPTION_PX + row * (height + GAP))
                    sheet.paste(Image.open(io.BytesIO(data)), place)
                    bar.update(1)
    return sheet
