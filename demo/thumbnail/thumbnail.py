"""Makes thumbnails of a photograph: the Python function of `cargo xtask demo`.

It is an ordinary Lambda function: its one dependency, Pillow, lies beside it in the zip as pip's wheel unpacked it.
"""

import base64
import io

from PIL import Image, ImageOps


def handler(event, context):
    """`{"image": base64, "widths": [int]}` to `{"width", "height", "thumbnails": [{"width", "height", "jpeg"}]}`."""
    with Image.open(io.BytesIO(base64.b64decode(event["image"]))) as photograph:
        original = photograph.size
        # A JPEG decodes to an eighth, a quarter or half of its size for a fraction of the work.
        photograph.draft("RGB", (max(event["widths"]) * 2,) * 2)
        upright = ImageOps.exif_transpose(photograph).convert("RGB")
    print(f"{context.aws_request_id}: {original[0]}x{original[1]}, widths {event['widths']}")
    return {
        "width": original[0],
        "height": original[1],
        "thumbnails": [thumbnail(upright, width) for width in event["widths"]],
    }


def thumbnail(image, width):
    """`image` scaled to `width`, its proportions kept."""
    height = max(1, round(image.height * width / image.width))
    encoded = io.BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(encoded, "JPEG", quality=85)
    return {"width": width, "height": height, "jpeg": base64.b64encode(encoded.getvalue()).decode()}
