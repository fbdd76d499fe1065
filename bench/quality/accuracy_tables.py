#!/usr/bin/env python3
"""Evaluates cache formats on several models, contexts and texts, and prints the tables of docs/accuracy.md.

Usage: accuracy_tables.py [OPTION...] MODEL...

  --out DIR        reports, states and report.json of every evaluation (default: accuracy-out)
  --kvant PROGRAM  default: build/kvant of this repository
  --kv LIST        formats; the first is what the others are compared with
  --ctx N,...      contexts (default: 512,2048)
  --chunks N       only the first N chunks of each text
  --text FILE      may repeat; 'bundled' is the text that kvant carries (default: bundled)
  --by-layer N     also errors by layer, over N chunks

One evaluation at a time. An interrupted run goes on where it stopped when the same command is given again: finished
chunks are in DIR. Needs nothing but Python.

Example: accuracy_tables.py models/*.gguf --text bundled --text wiki.txt --chunks 16 > tables.md
"""
import argparse
import json
import math
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
FORMATS = ("bf16,8bit,6bit,4bit,3bit,fp8,mxfp8,int8,int4,nvfp4,mxfp4,k=nvfp4+46+mean,v=nvfp4+46+sink,"
           "k=int4:channel,v=nvfp4+46,k=fp8+mean,v=fp8+sink,nvfp4+strict")


def evaluate(options: argparse.Namespace, model: str, ctx: int, text: str) -> dict:
    """The report of one evaluation, which is finished if need be."""
    parts = [pathlib.Path(model).stem, f"ctx{ctx}", pathlib.Path(text).stem]
    folder = pathlib.Path(options.out) / re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(parts))
    folder.mkdir(parents=True, exist_ok=True)
    command = [options.kvant, "eval", model, "--kv", options.kv, "--ctx", str(ctx), "--report", str(folder),
               "--resume", str(folder / "state.jsonl"), "--json"]
    if text != "bundled":
        command += ["--text", text]
    if options.chunks:
        command += ["--chunks", str(options.chunks)]
    if options.by_layer:
        command += ["--by-layer", str(options.by_layer)]
    print("==>", *command, file=sys.stderr)
    result = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if result.returncode != 0:
        sys.exit(result.returncode)  # kvant has said why
    return json.loads(result.stdout)


def change_of_perplexity(row: dict) -> str:
    return f"{100 * math.expm1(row['delta_nll']):+.1f} %"


def kl(row: dict) -> str:
    return f"{row['kl_mean']:.5f} [{row['kl_low']:.5f}, {row['kl_high']:.5f}]"


def print_tables(reports: dict[str, dict], ctx: int, text: str) -> None:
    """`reports`: by model; of one context and text."""
    names = list(reports)
    first = reports[names[0]]
    print(f"### {text}, ctx {ctx}\n")
    print(f"KL to `{first['base']}` with its 95 % interval, ΔPPL in parentheses.\n")
    print("| recipe | asymptotic bits |" + "".join(f" {name} ({reports[name]['chunks']} chunks) |" for name in names))
    print("|---|---:|" + "---:|" * len(names))
    for index, row in enumerate(first["results"]):
        if index == 0:
            continue
        cells = [reports[name]["results"][index] for name in names]
        bits = " / ".join(dict.fromkeys(f"{cell['bits_per_value_asymptotic']:.2f}" for cell in cells))
        print(f"| `{row['kv']}` | {bits} |" + "".join(f" {kl(c)} ({change_of_perplexity(c)}) |" for c in cells))
    print("\nPaired on the same tokens, KL(a) − KL(b):\n")
    print("| a | b |" + "".join(f" {name} |" for name in names))
    print("|---|---|" + "---:|" * len(names))
    pairs = {name: {(pair["a"], pair["b"]): pair for pair in reports[name]["paired"]} for name in names}
    for a, b in pairs[names[0]]:
        if (a, b) == ("nvfp4", "mxfp4") or "4bit" in (a, b):
            cells = [pairs[name][a, b] for name in names]
            print(f"| `{a}` | `{b}` |" + "".join(f" {c['kl_difference']:+.5f} (p {c['p']:.3f}) |" for c in cells))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--out", default="accuracy-out")
    parser.add_argument("--kvant", default=str(ROOT / "build" / "kvant"))
    parser.add_argument("--kv", default=FORMATS)
    parser.add_argument("--ctx", default="512,2048")
    parser.add_argument("--chunks", type=int, default=0)
    parser.add_argument("--text", action="append")
    parser.add_argument("--by-layer", type=int, default=0)
    options = parser.parse_args()
    for text in options.text or ["bundled"]:
        for ctx in map(int, options.ctx.split(",")):
            reports = {pathlib.Path(model).stem: evaluate(options, model, ctx, text) for model in options.models}
            print_tables(reports, ctx, pathlib.Path(text).name)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
