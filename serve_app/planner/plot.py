"""The stacked bars as a picture (``serve-app plan --plot plan.png``)."""

from __future__ import annotations

from pathlib import Path

from serve_app.errors import UserError
from serve_app.planner.hardware import GIB
from serve_app.planner.report import PARTS, Report

_WIDTH, _BAR, _GAP, _LEFT, _RIGHT, _TOP, _LEGEND = 1000, 44, 22, 210, 40, 60, 70


def save(reports: list[Report], path: Path) -> None:
    """One bar per model and pipeline stage, each to the scale of its own GPU.

    Raises:
        UserError: Pillow is not installed, or the file cannot be written.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise UserError("--plot needs Pillow; install it with: pip install pillow") from None
    rows = [(report, i, stage) for report in reports for i, stage in enumerate(report.plan.stages)]
    height = _TOP + len(rows) * (_BAR + _GAP) + _LEGEND
    image = Image.new("RGB", (_WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    draw.text((_LEFT, 18), "Memory of one GPU, GiB", fill="black", font=font)
    span = _WIDTH - _LEFT - _RIGHT
    for row, (report, index, stage) in enumerate(rows):
        top = _TOP + row * (_BAR + _GAP)
        plan = report.plan
        label = report.name if len(plan.stages) == 1 else f"{report.name}, stage {index}"
        draw.text((10, top + 4), _short(label), fill="black", font=small)
        draw.text(
            (10, top + 22), f"{plan.parallel.gpus} x {plan.gpu.name}", fill="#555", font=small
        )
        sizes = [max(0, getattr(stage, part)) for part, *_ in PARTS]
        full = max(stage.total, sum(sizes), 1)
        left = float(_LEFT)
        for (_, _, _, colour), size in zip(PARTS, sizes, strict=True):
            right = left + size / full * span
            draw.rectangle((left, top, right, top + _BAR), fill=colour)
            if right - left > 40:
                draw.text((left + 5, top + 14), f"{size / GIB:.1f}", fill="white", font=small)
            left = right
        draw.rectangle((_LEFT, top, _LEFT + span, top + _BAR), outline="#999")
    x, y = _LEFT, height - _LEGEND + 14
    for _, name, _, colour in PARTS:
        draw.rectangle((x, y, x + 14, y + 14), fill=colour)
        draw.text((x + 20, y - 1), name, fill="black", font=small)
        x += 34 + int(draw.textlength(name, font=small))
    try:
        image.save(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason})") from None


def _short(text: str, most: int = 26) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
