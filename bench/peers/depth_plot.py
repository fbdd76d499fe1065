#!/usr/bin/env python3
"""Plots the time of a decoded token against depth of context, with the straight line through it.

Reads the JSON lines of `kvant bench`: one of `bench attention` for the read bandwidth, and one of
`bench model` for every cache format and depth. Writes an SVG and prints a Markdown table that sets
the slope of each line against the one that memory allows: bytes of cache a token, over bandwidth.

  (build/kvant bench attention --kv bf16 --tokens 8192 --json
   build/kvant bench model m.gguf --kv 4bit,bf16 -p 0 -n 32 -d 64,2048,4096,6144,8192 -r 5 --json) > d.jsonl
  bench/peers/depth_plot.py d.jsonl --model m.gguf -o depth.svg
"""

import argparse
import json
import sys

from line_plot import COLOURS, LEFT, TOP, Plot, fit
from model_bytes import ModelBytes


def read(path):
    """Bandwidth in bytes/s and {format: [(depth, low, median, high seconds, bits)]}."""
    bandwidth, formats = 0.0, {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row.get("bench") == "attention":
                bandwidth = max(bandwidth, row["ceiling_gb_per_s"] * 1e9)
            elif row.get("bench") == "model" and row["decode_tokens"] > 0:
                speed = row["decode_tokens_per_second"]
                # The middle of the decoded tokens is where the time belongs.
                depth = row["depth"] + row["decode_tokens"] / 2
                formats.setdefault(row["kv"], []).append(
                    (depth, 1 / speed["max"], 1 / speed["median"], 1 / speed["min"],
                     row["bits_per_value"]))
    return bandwidth, {name: sorted(points) for name, points in formats.items()}


def memory_slope(points, size, bandwidth):
    """Seconds that each token of depth adds if reading its bytes is all that takes time."""
    low, high = points[0], points[-1]
    stored = [size.kv_values(int(p[0])) * p[4] / 8 for p in (low, high)]
    return (stored[1] - stored[0]) / (high[0] - low[0]) / bandwidth


def table(formats, size, bandwidth):
    lines = ["| cache | t(0) by the line, ms | slope, µs per 1,000 tokens | bytes over bandwidth | "
             "slope over that | R² |", "|---|---|---|---|---|---|"]
    for name, points in formats.items():
        slope, intercept, r2 = fit([(p[0], p[2]) for p in points])
        least = memory_slope(points, size, bandwidth)
        lines.append(f"| {name} | {intercept * 1e3:.2f} | {slope * 1e9:.0f} | {least * 1e9:.0f} | "
                     f"{slope / least:.2f} | {r2:.4f} |")
    return "\n".join(lines) + f"\n\nRead bandwidth {bandwidth / 1e9:.1f} GB/s.\n"


def draw(formats, size, bandwidth, title):
    deepest = max(points[-1][0] for points in formats.values())
    slowest = max(p[3] for points in formats.values() for p in points) * 1e3
    plot = Plot(deepest * 1.02, slowest * 1.1, title)
    plot.axes()
    for at, (name, points) in enumerate(formats.items()):
        colour = COLOURS[at % len(COLOURS)]
        slope, intercept, _ = fit([(p[0], p[2]) for p in points])
        least = memory_slope(points, size, bandwidth)
        ends = [(0, intercept * 1e3), (deepest, (intercept + slope * deepest) * 1e3)]
        plot.line(*ends, f'stroke="{colour}" stroke-width="2"')
        floor = size.weights / bandwidth
        plot.line((0, floor * 1e3), (deepest, (floor + least * deepest) * 1e3),
                  f'stroke="{colour}" stroke-dasharray="5 4"')
        for depth, low, middle, high, _ in points:
            plot.line((depth, low * 1e3), (depth, high * 1e3), f'stroke="{colour}"')
            plot.parts.append(f'<circle cx="{plot.x(depth):.1f}" cy="{plot.y(middle * 1e3):.1f}" '
                              f'r="3.5" fill="{colour}"/>')
        plot.text(LEFT + 12, TOP + 18 + 18 * at,
                  f"{name}: {slope * 1e9:.0f} µs per 1,000 tokens (memory: {least * 1e9:.0f})",
                  f'fill="{colour}"')
    plot.text(LEFT + 12, TOP + 18 + 18 * len(formats),
              "dashed: weights and cache over the read bandwidth of the same run")
    return plot.svg()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0],
                                     epilog=__doc__.split("\n\n", maxsplit=1)[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", help="JSON lines of `kvant bench`")
    parser.add_argument("--model", required=True, help="the GGUF file that was measured")
    parser.add_argument("--title", default="Time of a decoded token by depth of context")
    parser.add_argument("-o", "--output", required=True, metavar="SVG")
    options = parser.parse_args()
    try:
        bandwidth, formats = read(options.lines)
        size = ModelBytes(options.model)
    except (OSError, ValueError, KeyError) as error:
        print(f"depth_plot.py: {error}", file=sys.stderr)
        return 1
    if bandwidth == 0 or not formats or min(map(len, formats.values())) < 2:
        print("depth_plot.py: needs a line of `kvant bench attention --json` and, for each format, "
              "lines of `kvant bench model --json` at two depths or more", file=sys.stderr)
        return 1
    with open(options.output, "w", encoding="utf-8") as file:
        file.write(draw(formats, size, bandwidth, options.title))
    print(table(formats, size, bandwidth))
    return 0


if __name__ == "__main__":
    sys.exit(main())
