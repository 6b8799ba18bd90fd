"""Pictures as clients send them."""

import base64
import io

from PIL import Image


def png(width, height):
    """A PNG in base64."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (10, 200, 30)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
