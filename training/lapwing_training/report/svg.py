"""Figures as SVG that stands inside a page and takes its colours and letters from there. Knows no numbers."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

from lapwing_detector.head_map import figure_bytes
from lapwing_training.report.blocks import Picture

# Colours that nothing else has: in the page each becomes what it stands for, in the light and in the dark.
INK, FAINT, MADE_UP, OTHER, GROUND = "#0a0b0c", "#0a0b0d", "#0a0b0e", "#0a0b0f", "#0a0b10"
PALETTE = {
    INK: "currentColor",
    "#000000": "currentColor",  # what scikit-learn draws in black
    FAINT: "var(--faint)",
    MADE_UP: "var(--made-up)",
    OTHER: "var(--other)",
    GROUND: "var(--ground)",
}

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 9,
    "axes.titlesize": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": FAINT,
    "grid.alpha": 0.4,
    "grid.linewidth": 0.4,
}


def drawn(picture: Picture) -> str:
    """The picture as an `<svg>` element; the same picture gives the same text."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=picture.size, dpi=144)
        (width, height), (left, right, bottom, top) = picture.size, picture.margins
        figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
        picture.draw(figure)
        return _inline(figure_bytes(figure, "svg"), picture)


def _inline(svg: bytes, picture: Picture) -> str:
    root = ElementTree.fromstring(svg)  # noqa: S314 - matplotlib wrote it a moment ago
    for parent in list(root.iter()):
        for child in list(parent):
            # The style speaks of every element of the page that it stands in; the metadata name other places.
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg.decode()))
    for element in root.iter():
        element.tag, element.tail = _local(element.tag), None
        if element.tag not in ("text", "tspan"):
            element.text = None
        kept = {_local(key): value for key, value in element.attrib.items() if key != "id" or value in used}
        element.attrib.clear()
        element.attrib.update({key: _own(key, value, picture.name) for key, value in kept.items()})
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib.update({"role": "img", "aria-label": picture.alt})
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _own(key: str, value: str, name: str) -> str:
    """An attribute's value with ids that no other picture of the page has, and with the page's colours."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1) if value.startswith("#") else value.replace("\n", "")
    if key != "style":
        return value.replace("url(#", f"url(#{name}-")
    value = re.sub(r"font-family: [^;]*;? ?", "", value.replace("url(#", f"url(#{name}-"))
    for colour, meaning in PALETTE.items():
        value = value.replace(colour, meaning)
    return value
