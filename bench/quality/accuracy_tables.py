#!/usr/bin/env python3
"""Evaluates cache formats on several models, contexts and texts, and prints the tables of docs/accuracy.md.

Usage: accuracy_tables.py [OPTION...] MODEL...

  --out DIR           reports, states and report.json of every evaluation (default: accuracy-out)
  --kvant PROGRAM     default: build/kvant of this repository
  --kv LIST           formats; the first is what the others are compared with, unless --exact is given
  --ctx N,...         contexts (default: 512,2048)
  --chunks N,...      only the first N chunks of each text; one number, or one a model
  --text FILE         may repeat; 'bundled' is the text that kvant carries (default: bundled)
  --by-layer N        also errors by layer, over N chunks
  --threads N         of both engines (default: one per processor)
  --llama-cpp PYTHON  also llama.cpp's cache types, on the same chunks; PYTHON has numpy and llama_cpp
  --peer-chunks N,... only so many chunks by llama.cpp, which takes longer (default: as --chunks)
  --caches LIST       those types; the first is what the others are compared with, unless --exact is given
  --exact PYTHON      both engines run the model with float32 weights and are compared with exact logits
                      (dequantize_gguf.py, exact_base.py); PYTHON has numpy

One evaluation at a time. An interrupted run goes on where it stopped when the same command is given again: finished
chunks are in DIR. Without --llama-cpp and --exact it needs nothing but Python.

Example: accuracy_tables.py models/*.gguf --text bundled --text wiki.txt --chunks 16 > tables.md
"""
import argparse
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import scores

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FORMATS = ("bf16,8bit,6bit,4bit,3bit,fp8,mxfp8,int8,int4,nvfp4,mxfp4,k=nvfp4+46+mean,v=nvfp4+46+sink,"
           "k=fp8+mean,v=fp8+sink")
CACHES = "f16,q8_0,q5_1,q4_0"
WRONG_FROM = 1.05  # perplexity ratio to kvant's first format from which an engine counts as wrong
PAIRED = (("nvfp4", "mxfp4"), ("4bit", "llama.cpp q4_0"), ("6bit", "llama.cpp q5_1"), ("8bit", "llama.cpp q8_0"),
          ("4bit", "llama.cpp q8_0"))


def run(command: list, output: pathlib.Path | None = None, text: pathlib.Path | None = None) -> str:
    """Standard output of a command that has to succeed; into a file, whole or not at all, if one is given."""
    print("==>", *command, file=sys.stderr)
    with open(text or os.devnull, "rb") as source:
        result = subprocess.run([str(part) for part in command], stdin=source, stdout=subprocess.PIPE, check=False)
    if result.returncode != 0:
        sys.exit(result.returncode)  # the command has said why
    if output:
        output.write_bytes(result.stdout)
    return result.stdout.decode()


class Cell:
    """One model on one text in one context."""

    def __init__(self, options: argparse.Namespace, index: int, ctx: int, text: str):
        self.options, self.ctx, self.text = options, ctx, text
        self.chunks, self.peer_chunks = options.chunks[index], options.peer_chunks[index]
        model = options.models[index]
        self.out = pathlib.Path(options.out)
        self.model = self.shipped = pathlib.Path(model)
        self.base = None
        self.name = self.model.stem
        if options.exact:
            self.model = self.out / f"{self.shipped.stem}.F32.gguf"
            self.base = self.out / (self._named(self.shipped.stem) + ".kld")
        self.folder = self.out / self._named(self.model.stem)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _named(self, stem: str) -> str:
        return re.sub(r"[^A-Za-z0-9._-]", "_", f"{stem}-ctx{self.ctx}-{pathlib.Path(self.text).stem}")

    @staticmethod
    def _limit(chunks: int) -> list:
        return ["--chunks", chunks] if chunks else []

    def _threads(self) -> list:
        return ["--threads", self.options.threads] if self.options.threads else []

    def ids(self) -> pathlib.Path:
        """The text's token ids, without BOS."""
        path = self.out / f"{self.shipped.stem}-{pathlib.Path(self.text).stem}.ids.json"
        if not path.exists():
            text = ROOT / "examples" / "data" / "registers.txt" if self.text == "bundled" else pathlib.Path(self.text)
            run([self.options.kvant, "tokenize", self.shipped, "--no-special", "--quiet"], path, text)
        return path

    def prepare(self) -> None:
        """The float32 model and its exact logits."""
        if not self.options.exact:
            return
        if not self.model.exists():
            run([self.options.exact, HERE / "dequantize_gguf.py", self.shipped, self.model])
        if not self.base.exists():
            unfinished = self.base.with_suffix(".part")
            run([self.options.exact, HERE / "exact_base.py", self.model, "--ids", self.ids(), "--ctx", self.ctx,
                 "-o", unfinished] + self._limit(self.chunks))
            unfinished.rename(self.base)

    def kvant(self) -> dict:
        """The report of kvant's evaluation, which is finished if need be."""
        command = [self.options.kvant, "eval", self.model, "--kv", self.options.kv, "--report", self.folder,
                   "--resume", self.folder / "state.jsonl", "--json", "--ctx", self.ctx]
        if self.base:
            command += ["--kl-base", self.base]
        elif self.text != "bundled":
            command += ["--text", self.text]
        if self.options.by_layer:
            command += ["--by-layer", self.options.by_layer]
        return json.loads(run(command + self._limit(self.chunks) + self._threads()))

    def llama_cpp(self) -> dict:
        """The same of llama.cpp."""
        source = ["--base", self.base] if self.base else ["--ids", self.ids(), "--ctx", self.ctx]
        return json.loads(run([self.options.llama_cpp, HERE / "llama_cpp_caches.py", self.model, "--caches",
                               self.options.caches, "--state", self.folder / "llama-cpp.jsonl"]
                              + source + self._limit(self.peer_chunks) + self._threads()))

    def evaluate(self) -> dict:
        """kvant's report, with llama.cpp's rows after its own and pairs of both."""
        self.prepare()
        report = self.kvant()
        scored = self.ctx - 1 - self.ctx // 2
        _, _, chunks = scores.read_state(self.folder / "state.jsonl")
        by_name = {row["kv"]: scores.join(chunks, index) for index, row in enumerate(report["results"])}
        check_statistics(report["results"][-1], by_name, scored)
        if self.options.llama_cpp:
            peer = self.llama_cpp()
            common = scored * min(peer["chunks"], report["chunks"])
            own = scores.summarize(first_tokens(next(iter(by_name.values())), common), scored)
            check_perplexity(peer["results"][0], own, self.folder)
            _, _, chunks = scores.read_state(self.folder / "llama-cpp.jsonl")
            for index, row in enumerate(peer["results"]):
                row["kv"] = f"llama.cpp {row['kv']}"
                row["bits_per_value_asymptotic"] = row["bits_per_value"]
                # With two bases the differences would compare two things that nobody asked about.
                if self.base:
                    by_name[row["kv"]] = scores.join(chunks, index, peer["chunks"])
            report["results"] += peer["results"] if self.base else peer["results"][1:]
            report["rotation"], report["peer_chunks"] = peer["rotation"], peer["chunks"]
        report["pairs"] = [{"a": a, "b": b} | compare_kl(by_name[a], by_name[b], scored)
                           for a, b in PAIRED if a in by_name and b in by_name]
        return report


def first_tokens(of_format: dict, count: int) -> dict:
    return {key: values[:count] for key, values in of_format.items()}


def compare_kl(a: dict, b: dict, scored: int) -> dict:
    """On the tokens that both have."""
    common = min(len(a["kl"]), len(b["kl"]))
    return scores.compare_kl(first_tokens(a, common), first_tokens(b, common), scored)


def check_statistics(row: dict, by_name: dict, scored: int) -> None:
    """scores.py has to find what kvant found from the same scores, else llama.cpp's rows mean something else."""
    own = scores.summarize(by_name[row["kv"]], scored)
    for key, value in own.items():
        if not math.isclose(value, row[key], rel_tol=1e-6, abs_tol=1e-9):
            sys.exit(f"scores.py: {key} of {row['kv']} is {value}, kvant says {row[key]}")


def check_perplexity(peer: dict, own: dict, folder: pathlib.Path) -> None:
    ratio = peer["ppl"] / own["ppl"]
    if not 1 / WRONG_FROM < ratio < WRONG_FROM:
        sys.exit(f"{folder}: llama.cpp answers wrongly: perplexity {peer['ppl']:.2f} instead of {own['ppl']:.2f}")


def result(row: dict) -> str:
    change = 100 * math.expm1(row["delta_nll"])
    # What a logits file leaves out can put a KL that is nearly 0 below it.
    mean, low, high = (max(0.0, row[key]) for key in ("kl_mean", "kl_low", "kl_high"))
    return f"{mean:.5f} [{low:.5f}, {high:.5f}] ({change:+.1f} %)"


def chunks_of(report: dict) -> str:
    text = "1 chunk" if report["chunks"] == 1 else f"{report['chunks']} chunks"
    peer = report.get("peer_chunks", report["chunks"])
    return text if peer == report["chunks"] else f"{text}, llama.cpp {peer}"


def numbers(text: str, parser: argparse.ArgumentParser, models: list[str]) -> list[int]:
    """One number a model."""
    values = [int(value) for value in text.split(",")]
    if len(values) == 1:
        values *= len(models)
    if len(values) != len(models):
        parser.error(f"{len(values)} numbers of chunks for {len(models)} models")
    return values


def print_tables(reports: dict[str, dict], options: argparse.Namespace, ctx: int, text: str) -> None:
    """`reports`: by model; of one context and text."""
    names = list(reports)
    first = reports[names[0]]
    base = "exact logits" if options.exact else f"`{first['base']}`"
    if options.llama_cpp and not options.exact:
        base += f" (llama.cpp's: to its {options.caches.split(',')[0]})"
    print(f"### {text}, ctx {ctx}\n")
    print(f"KL to {base} with its 95 % interval, ΔPPL in parentheses. Bits: at the end of a chunk (of closed pages).\n")
    print("| cache | bits |" + "".join(f" {name} ({chunks_of(reports[name])}) |" for name in names))
    print("|---|---:|" + "---:|" * len(names))
    for index, row in enumerate(first["results"]):
        if index == 0 and not options.exact:
            continue
        cells = [reports[name]["results"][index] for name in names]
        bits = " / ".join(dict.fromkeys(f"{cell['bits_per_value']:.2f} ({cell['bits_per_value_asymptotic']:.2f})"
                                        for cell in cells))
        print(f"| `{row['kv']}` | {bits} |" + "".join(f" {result(cell)} |" for cell in cells))
    print("\nPaired on the same tokens, KL(a) − KL(b):\n")
    print("| a | b |" + "".join(f" {name} |" for name in names))
    print("|---|---|" + "---:|" * len(names))
    for index, pair in enumerate(first["pairs"]):
        cells = [reports[name]["pairs"][index] for name in names]
        print(f"| `{pair['a']}` | `{pair['b']}` |"
              + "".join(f" {cell['kl_difference']:+.5f} (p {cell['p']:.3f}) |" for cell in cells))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--out", default="accuracy-out")
    parser.add_argument("--kvant", default=str(ROOT / "build" / "kvant"))
    parser.add_argument("--kv", default=FORMATS)
    parser.add_argument("--ctx", default="512,2048")
    parser.add_argument("--chunks", default="0")
    parser.add_argument("--peer-chunks")
    parser.add_argument("--text", action="append")
    parser.add_argument("--by-layer", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--llama-cpp", metavar="PYTHON")
    parser.add_argument("--caches", default=CACHES)
    parser.add_argument("--exact", metavar="PYTHON")
    options = parser.parse_args()
    options.peer_chunks = numbers(options.peer_chunks or options.chunks, parser, options.models)
    options.chunks = numbers(options.chunks, parser, options.models)
    for text in options.text or ["bundled"]:
        for ctx in map(int, options.ctx.split(",")):
            reports = {}
            for index in range(len(options.models)):
                cell = Cell(options, index, ctx, text)
                reports[cell.name] = cell.evaluate()
            print_tables(reports, options, ctx, pathlib.Path(text).name)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
