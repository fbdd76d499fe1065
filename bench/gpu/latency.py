#!/usr/bin/env python3
"""Inter-token latency of a model on the GPU against its context, for several cache formats.

Measures with `kvant bench model --fill random` (random keys and values: contexts of any length in seconds) and takes the
read bandwidth of the same GPU from kvant_cuda_decode_bench. Prints Markdown: milliseconds of a token at each depth, how
far above the floor (weights and cache, read once at that bandwidth), and the slope of each format against bf16's.

  bench/gpu/latency.py --lines latency.jsonl -o latency.svg --json latency.json
  bench/gpu/latency.py --lines latency.jsonl --measured       tables of lines that are there already
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench" / "peers"))

from line_plot import COLOURS, LEFT, TOP, Plot, fit  # noqa: E402


def measure(options):
    """Appends the lines of both programs to options.lines."""
    build = Path(options.build)
    ceiling = [build / "bench" / "kvant_cuda_decode_bench", "--kv", "bf16", "--shape", "8x32768", "--json", options.lines]
    model = [build / "kvant", "bench", "model", options.model, "--weights", options.weights, "--device", "cuda", "--kv",
             options.kv, "--fill", "random", "-d", options.depths, "-p", "0", "-n", str(options.tokens), "-r",
             str(options.repetitions), "--json"]
    print("$", *map(str, ceiling), file=sys.stderr)
    subprocess.run(ceiling, check=True, stdout=sys.stderr)
    print("$", *map(str, model), file=sys.stderr)
    with open(options.lines, "a", encoding="utf-8") as out:
        subprocess.run(model, check=True, stdout=out)


def read(path):
    """(bytes/s, device, {format: [row by depth]}); a depth measured twice counts as last measured."""
    bandwidth, device, formats = 0.0, "", {}
    with open(path, encoding="utf-8") as file:
        for line in filter(str.strip, file):
            row = json.loads(line)
            if row.get("bench") == "cuda_decode":
                bandwidth = max(bandwidth, row["bytes"] / row["ceiling_us"] * 1e6)
            elif row.get("bench") == "model" and "decode_tokens_per_second" in row and row["batch"] == 1:
                device = row["backend"]
                formats.setdefault(row["kv"], {})[row["depth"]] = row
    return bandwidth, device, {name: [rows[depth] for depth in sorted(rows)] for name, rows in formats.items()}


def summarise(bandwidth, formats):
    """{format: {"points": [...], "slope_ms_per_1k": ...}}"""
    result = {}
    for name, rows in formats.items():
        points = []
        for row in rows:
            speed = row["decode_tokens_per_second"]
            bytes_read = row["memory"]["weights_bytes"] + row["cache"]["bytes"]
            points.append({"depth": row["depth"], "ms": 1e3 / speed["median"], "ms_min": 1e3 / speed["max"],
                           "ms_max": 1e3 / speed["min"], "bytes": bytes_read, "floor_ms": bytes_read / bandwidth * 1e3})
        # The middle of the decoded tokens is where the time belongs.
        line = [(p["depth"] + rows[0]["decode_tokens"] / 2, p["ms"]) for p in points]
        slope, intercept, r2 = fit(line)
        least = (points[-1]["floor_ms"] - points[0]["floor_ms"]) / (points[-1]["depth"] - points[0]["depth"])
        result[name] = {"points": points, "slope_ms_per_1k": slope * 1e3, "floor_slope_ms_per_1k": least * 1e3,
                        "ms_at_0": intercept, "r2": r2}
    return result


def tables(summary, bandwidth, device, rows):
    names = list(summary)
    depths = [p["depth"] for p in summary[names[0]]["points"]]
    lines = [f"{device}; {rows[0]['model']}, weights {rows[0]['memory']['weights_bytes'] / 1e9:.2f} GB; read bandwidth "
             f"{bandwidth / 1e12:.2f} TB/s; contexts: {rows[0]['fill']}.", "",
             "| depth | " + " | ".join(f"{name}, ms (over floor)" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for depth in depths:
        cells = []
        for name in names:
            at = next((p for p in summary[name]["points"] if p["depth"] == depth), None)
            cells.append("-" if at is None else f"{at['ms']:.2f} ({at['ms'] / at['floor_ms']:.2f}x)")
        lines.append(f"| {depth} | " + " | ".join(cells) + " |")
    lines += ["", "| cache | ms per 1,000 tokens | of bf16's | bytes over bandwidth | slope over that | R² |",
              "|---|---|---|---|---|---|"]
    for name in names:
        line = summary[name]
        of_bf16 = f"{100 * line['slope_ms_per_1k'] / summary['bf16']['slope_ms_per_1k']:.0f} %" if "bf16" in summary else "-"
        lines.append(f"| {name} | {line['slope_ms_per_1k']:.4f} | {of_bf16} | {line['floor_slope_ms_per_1k']:.4f} | "
                     f"{line['slope_ms_per_1k'] / line['floor_slope_ms_per_1k']:.2f} | {line['r2']:.4f} |")
    return "\n".join(lines)


def draw(summary, title):
    deepest = max(line["points"][-1]["depth"] for line in summary.values())
    slowest = max(p["ms_max"] for line in summary.values() for p in line["points"])
    plot = Plot(deepest * 1.02, slowest * 1.1, title)
    plot.axes()
    for at, (name, line) in enumerate(summary.items()):
        colour = COLOURS[at % len(COLOURS)]
        points = line["points"]
        for a, b in zip(points, points[1:]):
            plot.line((a["depth"], a["ms"]), (b["depth"], b["ms"]), f'stroke="{colour}" stroke-width="2"')
            plot.line((a["depth"], a["floor_ms"]), (b["depth"], b["floor_ms"]), f'stroke="{colour}" stroke-dasharray="5 4"')
        for p in points:
            plot.line((p["depth"], p["ms_min"]), (p["depth"], p["ms_max"]), f'stroke="{colour}"')
            plot.parts.append(f'<circle cx="{plot.x(p["depth"]):.1f}" cy="{plot.y(p["ms"]):.1f}" r="3.5" fill="{colour}"/>')
        plot.text(LEFT + 12, TOP + 18 + 18 * at, f"{name}: {line['slope_ms_per_1k'] * 1e3:.1f} µs per 1,000 tokens "
                  f"(memory: {line['floor_slope_ms_per_1k'] * 1e3:.1f})", f'fill="{colour}"')
    plot.text(LEFT + 12, TOP + 18 + 18 * len(summary), "dashed: weights and cache over the read bandwidth of the same run")
    return plot.svg()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0],
                                     epilog=__doc__.split("\n\n", maxsplit=1)[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default=str(ROOT / "build-cuda"), help="folder of the programs (default build-cuda)")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--weights", default="dummy:Q4_K")
    parser.add_argument("--kv", default="bf16,fp8,nvfp4,4bit")
    parser.add_argument("--depths", default="256,8192,32768,65536,125000")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded in a measurement (default 32)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--lines", default="latency.jsonl", metavar="FILE", help="JSON lines of both programs; appended to")
    parser.add_argument("--measured", action="store_true", help="measure nothing: the lines are there")
    parser.add_argument("--json", metavar="FILE", help="write what the tables say")
    parser.add_argument("-o", "--output", metavar="SVG", help="write a plot")
    options = parser.parse_args()
    try:
        if not options.measured:
            measure(options)
        bandwidth, device, formats = read(options.lines)
    except (OSError, ValueError, KeyError, subprocess.CalledProcessError) as error:
        print(f"latency.py: {error}", file=sys.stderr)
        return 1
    if bandwidth == 0 or not formats or min(map(len, formats.values())) < 2:
        print(f"latency.py: {options.lines} needs a line of kvant_cuda_decode_bench --json, and for each format lines of "
              "`kvant bench model --json` at two depths or more", file=sys.stderr)
        return 1
    summary = summarise(bandwidth, formats)
    rows = next(iter(formats.values()))
    print(tables(summary, bandwidth, device, rows))
    if options.json:
        Path(options.json).write_text(json.dumps({"schema_version": 1, "device": device, "model": rows[0]["model"],
                                                  "weights_bytes": rows[0]["memory"]["weights_bytes"], "bytes_per_second": bandwidth,
                                                  "formats": summary}, indent=1) + "\n", encoding="utf-8")
    if options.output:
        title = f"Time of a decoded token by depth: {rows[0]['model']}"
        Path(options.output).write_text(draw(summary, title), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
