#!/usr/bin/env python3
"""Hit rate and time to first token against the memory of the cache, for several cache formats.

For each format and budget it starts `kvant serve` with --cache-memory, sends conversations that share a system prompt
(`kvant bench serve --workload multi-turn`, the same ones each time), and reads the hit rate from the server's metrics.
Where the conversations under way fit into the cache, each turn computes only what is new; where they do not, each turn
computes its whole history again. Prints Markdown, writes JSON lines and two plots.

  bench/serving/cache_budget.py models/smollm2.gguf --lines budget.jsonl -o budget
  bench/serving/cache_budget.py models/smollm2.gguf --lines budget.jsonl -o budget --measured     of lines that are there
"""
import argparse
import json
import sys
from pathlib import Path

from servers import ROOT, NotStarted, bench, kvant_server, metric, scrape

sys.path.insert(0, str(ROOT / "bench" / "peers"))

from line_plot import COLOURS, LEFT, TOP, Plot  # noqa: E402


def measure_one(options, kv, budget):
    program = options.build + "/kvant"
    with kvant_server(program, options.model, "--kv", kv, "--cache-memory", f"{budget}MiB", "--no-access-log",
                      "--max-model-len", options.max_model_len, "--max-num-seqs", options.concurrency) as started:
        report = bench(program, started["url"], "--workload", "multi-turn", "-n", options.conversations,
                       "--turns", options.turns, "-c", options.concurrency, "--prefix-tokens", options.prefix,
                       "--input-tokens", options.input, "--output-tokens", options.output, "--seed", options.seed)
        text = scrape(started["url"])
    queries, hits = (metric(text, f"vllm:prefix_cache_{name}_total") for name in ("queries", "hits"))
    return {"kv": kv, "budget_mib": budget, "cache_tokens": started["cache_tokens"], "hit_rate": hits / queries,
            "ttft_ms": report["ttft_ms"], "output_tokens_per_second": report["output_tokens_per_second"],
            "seconds": report["seconds"], "model": Path(options.model).name,
            "conversations": options.conversations, "turns": options.turns, "concurrency": options.concurrency,
            "prefix": options.prefix, "input": options.input, "output": options.output}


def measure(options):
    with open(options.lines, "a", encoding="utf-8") as out:
        for budget in map(int, options.budgets.split(",")):
            for kv in options.kv.split(";"):
                try:
                    row = measure_one(options, kv, budget)
                except NotStarted as error:  # too little memory for one request of the longest length
                    print(f"{kv} with {budget} MiB: {error}", file=sys.stderr)
                    continue
                print(json.dumps(row), file=out, flush=True)


def read(path):
    """{(kv, budget): row}; what was measured twice counts as last measured."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return {(row["kv"], row["budget_mib"]): row for row in rows}


def markdown(rows, formats, budgets):
    lines = ["| cache memory | " + " | ".join(f"{kv}: tokens, hits, TTFT mean / p50 / p95" for kv in formats) + " |",
             "|---|" + "---|" * len(formats)]
    for budget in budgets:
        cells = []
        for kv in formats:
            row = rows.get((kv, budget))
            cells.append("-" if row is None else
                         f"{row['cache_tokens']}, {row['hit_rate'] * 100:.0f} %, "
                         f"{row['ttft_ms']['mean']:.0f} / {row['ttft_ms']['p50']:.0f} / {row['ttft_ms']['p95']:.0f} ms")
        lines.append(f"| {budget} MiB | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows, formats, budgets, value, title, y_label):
    points = {kv: [(b, value(rows[kv, b])) for b in budgets if (kv, b) in rows] for kv in formats}
    plot = Plot(max(budgets), max(y for line in points.values() for _, y in line) * 1.05, title)
    plot.axes("MiB of cache", y_label)
    for index, (kv, line) in enumerate(points.items()):
        colour = COLOURS[index % len(COLOURS)]
        for a, b in zip(line, line[1:]):
            plot.line(a, b, f'stroke="{colour}" stroke-width="2"')
        for x, y in line:
            plot.parts.append(f'<circle cx="{plot.x(x):.1f}" cy="{plot.y(y):.1f}" r="3.5" fill="{colour}"/>')
        plot.text(LEFT + 480, TOP + 120 + 18 * index, kv, f'fill="{colour}" font-weight="bold"')
    return plot.svg()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--build", default=str(ROOT / "build"), help="folder of the program")
    parser.add_argument("--kv", default="bf16;fp8;nvfp4", help="formats, separated by ';' (default: %(default)s)")
    parser.add_argument("--budgets", default="64,80,96,112,128,160,192,256", help="MiB, separated by ','")
    parser.add_argument("--conversations", type=int, default=12)
    parser.add_argument("--concurrency", type=int, default=6, help="conversations under way at a time")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--prefix", type=int, default=1024, help="tokens of the system prompt that all share")
    parser.add_argument("--input", type=int, default=128, help="tokens of a turn")
    parser.add_argument("--output", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--max-model-len", type=int, default=2560)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lines", required=True, help="JSON lines, appended to")
    parser.add_argument("--measured", action="store_true", help="measure nothing: tables and plots of --lines")
    parser.add_argument("-o", "--out", help="plots: OUT-hits.svg and OUT-ttft.svg")
    options = parser.parse_args()
    if not options.measured:
        measure(options)
    rows = read(options.lines)
    formats = list(dict.fromkeys(kv for kv, _ in rows))
    budgets = sorted({budget for _, budget in rows})
    print(markdown(rows, formats, budgets))
    if options.out:
        Path(options.out + "-hits.svg").write_text(
            draw(rows, formats, budgets, lambda row: row["hit_rate"] * 100, "Prompt tokens found in the cache", "%"),
            encoding="utf-8")
        Path(options.out + "-ttft.svg").write_text(
            draw(rows, formats, budgets, lambda row: row["ttft_ms"]["mean"], "Time to first token, mean", "ms"),
            encoding="utf-8")


if __name__ == "__main__":
    main()
