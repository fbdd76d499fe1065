#!/usr/bin/env python3
"""Draws docs/picture.svg, the picture of the README, from docs/data/readme-picture.json.

Usage: docs/make_picture.py
"""
import json
import math
import pathlib
from html import escape

DOCS = pathlib.Path(__file__).resolve().parent
WIDTH, LABEL_WIDTH, BAR_WIDTH, ROW, BAR = 860, 150, 560, 26, 16
COLOURS = {"plain": "#8a8f98", "peer": "#b8bec9", "kvant": "#0b7a75"}
FONT = "font-family='system-ui, Segoe UI, Helvetica, Arial, sans-serif'"


def text(x: float, y: float, words: str, size: int = 13, weight: int = 400, anchor: str = "start",
         colour: str = "#1f2328") -> str:
    return (f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' font-weight='{weight}' text-anchor='{anchor}' "
            f"fill='{colour}'>{escape(words)}</text>")


def bar_row(y: float, row: dict, fraction: float, shown: str) -> list[str]:
    width = max(2.0, BAR_WIDTH * fraction)
    weight = 600 if row["kind"] == "kvant" else 400
    left = 24 + LABEL_WIDTH
    return [
        text(left - 10, y + 13, row["name"], weight=weight, anchor="end"),
        f"<rect x='{left}' y='{y}' width='{width:.1f}' height='{BAR}' rx='2' fill='{COLOURS[row['kind']]}'/>",
        text(left + width + 8, y + 13, shown, weight=weight),
    ]


def main() -> None:
    data = json.loads((DOCS / "data" / "readme-picture.json").read_text(encoding="utf-8"))
    parts, y = [], 34
    parts.append(text(24, y, data["bytes"]["label"], 14, 600))
    y += 14
    largest = max(row["value"] for row in data["bytes"]["rows"])
    for row in data["bytes"]["rows"]:
        parts += bar_row(y, row, row["value"] / largest, f"{row['value']:,}")
        y += ROW
    y += 30
    parts.append(text(24, y, data["error"]["label"], 14, 600))
    y += 14
    low = math.log10(data["error"]["minimum"])
    high = math.log10(max(row["value"] for row in data["error"]["rows"]))
    group = None
    for row in data["error"]["rows"]:
        if row["group"] != group:
            group = row["group"]
            parts.append(text(24, y + 14, group, 12, 400, colour="#57606a"))
            y += 22
        parts += bar_row(y, row, (math.log10(row["value"]) - low) / (high - low), f"{row['value']:.4g}")
        y += ROW
    y += 22
    parts.append(text(24, y, data["title"], 11, 400, colour="#57606a"))
    parts.append(text(24, y + 16, data["footnote"], 10, 400, colour="#57606a"))
    height = y + 34
    svg = (f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}' "
           f"viewBox='0 0 {WIDTH} {height}' {FONT} role='img' aria-label='What kvant brings'>\n"
           f"<rect width='{WIDTH}' height='{height}' rx='8' fill='#ffffff' stroke='#d0d7de'/>\n"
           + "\n".join(parts) + "\n</svg>\n")
    (DOCS / "picture.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
