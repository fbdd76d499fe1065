#!/usr/bin/env python3
"""Checks that includes go in the allowed direction (docs/architecture.md, "Layers").

Usage: scripts/check_layers.py

Rules: a folder of kvant/ includes only itself and folders to its left; CUDA headers only in
backend/cuda/; model/ and what is right of it see of the backends only backend/backend.h; nothing in
kvant/ includes tools/ or tests/; the headers that are installed (HEADERS of a kvant_library) include
only installed headers and no third-party ones; *.cuh files are included by *.cu and *.cuh only; SIMD
sources (*_avx2.cc, *_avx512.cc, *_amx.cc) reach no standard header with containers or algorithms, whose inline
functions the linker might take from there for processors that lack the instructions.
Prints one line per violation and exits with 1 if there is any.
"""
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAYERS = ["base", "formats", "cache", "attention", "backend", "model", "calib", "serve"]
SOURCE_SUFFIXES = {".h", ".cc", ".cu", ".cuh"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
CUDA_HEADER = re.compile(r"^(cuda|cub/|cute/|cutlass/|cublas|nvrtc|nccl|mma\.h)")
STANDARD_HEADER = re.compile(r"^[a-z_0-9]+$")  # <vector>, <cstdint>: no folder, no .h

SIMD_SOURCE = re.compile(r"_(avx2|avx512|amx)\.cc$")
CONTAINERS = {"algorithm", "deque", "functional", "list", "map", "memory", "mutex", "numeric", "optional", "set",
              "string", "unordered_map", "unordered_set", "variant", "vector"}


def tracked_sources() -> list[pathlib.Path]:
    listing = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                             check=True, capture_output=True, text=True).stdout
    paths = [pathlib.Path(line) for line in listing.splitlines()]
    return [path for path in paths if path.suffix in SOURCE_SUFFIXES and (ROOT / path).exists()]


def includes(path: pathlib.Path) -> list[tuple[int, bool, str]]:
    """(line number, in angle brackets, what) of each include."""
    found = []
    for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
        if match := INCLUDE.match(line):
            found.append((number, match.group(1) == "<", match.group(2)))
    return found


def installed_headers() -> set[str]:
    """The HEADERS lists of all kvant_library calls, as include paths."""
    headers = set()
    for lists in ROOT.glob("kvant/**/CMakeLists.txt"):
        text = re.sub(r"#.*", "", lists.read_text(encoding="utf-8"))
        for call in re.findall(r"kvant_library\(([^)]*)\)", text):
            words, collecting = call.split(), False
            for word in words:
                if word.isupper() or re.fullmatch(r"[A-Z_0-9]+", word):
                    collecting = word == "HEADERS"
                elif collecting:
                    headers.add(str((lists.parent / word).relative_to(ROOT)))
    return headers


def layer_of(path: str) -> str | None:
    parts = path.split("/")
    return parts[1] if parts[0] == "kvant" and len(parts) > 2 else None


def check_include(path: pathlib.Path, angled: bool, what: str, installed: set[str]) -> str | None:
    own = str(path)
    layer = layer_of(own)
    in_cuda = own.startswith(("kvant/backend/cuda/", "bench/gpu/"))
    is_test = path.stem.endswith("_test") or "/testing/" in own
    if angled:
        if CUDA_HEADER.match(what) and not in_cuda:
            return f"CUDA header <{what}> outside kvant/backend/cuda/ and bench/gpu/"
        if own in installed and not STANDARD_HEADER.match(what):
            return f"<{what}> in an installed header: only kvant and C++ standard headers may be there"
        return None
    if what.endswith(".cuh") and path.suffix not in {".cu", ".cuh"}:
        return f'"{what}": device headers are for .cu and .cuh files'
    if own in installed and what not in installed:
        return f'"{what}" is not installed, but this header is'
    if layer is None:
        return None
    if what.startswith(("tools/", "tests/")) and not is_test:
        return f'"{what}": the library does not know its tools and tests'
    target = layer_of(what)
    if target is None:
        return None
    if target not in LAYERS or layer not in LAYERS:
        return f"unknown layer '{target if target not in LAYERS else layer}': add it to scripts/check_layers.py"
    if LAYERS.index(target) > LAYERS.index(layer):
        return f'"{what}" points right: {layer} may include only {", ".join(LAYERS[:LAYERS.index(layer) + 1])}'
    behind_interface = LAYERS.index(layer) > LAYERS.index("backend") and target == "backend"
    if behind_interface and what != "kvant/backend/backend.h":
        return f'"{what}": {layer} sees of the backends only kvant/backend/backend.h'
    return None


def check_simd_source(source: pathlib.Path) -> list[str]:
    """Ways from a SIMD source to a header that it must not reach."""
    found, seen, pending = [], {str(source)}, [(source, str(source))]
    while pending:
        path, way = pending.pop()
        for _, angled, what in includes(path):
            if angled and what in CONTAINERS:
                found.append(f"{source}: reaches <{what}> through {way}")
            elif not angled and what not in seen and (ROOT / what).exists():
                seen.add(what)
                pending.append((pathlib.Path(what), f"{way} > {what}"))
    return found


def main() -> None:
    installed = installed_headers()
    violations = 0
    sources = tracked_sources()
    for header in sorted(installed):
        if not (ROOT / header).exists():
            print(f"{header}: listed as HEADERS but does not exist")
            violations += 1
    for path in sources:
        for number, angled, what in includes(path):
            if message := check_include(path, angled, what, installed):
                print(f"{path}:{number}: {message}")
                violations += 1
        if SIMD_SOURCE.search(path.name):
            for message in check_simd_source(path):
                print(message)
                violations += 1
    print(f"layers: {len(sources)} files, {len(installed)} installed headers, {violations} violations",
          file=sys.stderr)
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
