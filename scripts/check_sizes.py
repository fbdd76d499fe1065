#!/usr/bin/env python3
"""Checks the length of source files: more than 400 lines is a warning, more than 800 an error.

Usage: scripts/check_sizes.py

Kernels (files below backend/ and SIMD sources named *_avx2.cc, *_avx512.cc) may have 1,000 lines.
"""
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SUFFIXES = {".h", ".cc", ".cu", ".cuh", ".py", ".sh", ".cmake"}
SOFT, HARD, HARD_KERNEL = 400, 800, 1000
KERNEL = re.compile(r"^kvant/backend/|_avx(2|512)\.(cc|h)$")


def main() -> None:
    listing = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                             check=True, capture_output=True, text=True).stdout
    warnings = errors = 0
    for name in listing.splitlines():
        path = ROOT / name
        if pathlib.Path(name).suffix not in SUFFIXES or not path.exists():
            continue
        lines = len(path.read_text(encoding="utf-8").splitlines())
        hard = HARD_KERNEL if KERNEL.search(name) else HARD
        if lines > hard:
            print(f"{name}: error: {lines} lines, at most {hard}: split it")
            errors += 1
        elif lines > SOFT:
            print(f"{name}: warning: {lines} lines; {SOFT} are enough for one subject")
            warnings += 1
    print(f"sizes: {warnings} warnings, {errors} errors", file=sys.stderr)
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
