#!/usr/bin/env python3
"""Makes the golden vectors of the cache codecs, independently of kvant's code.

Usage: make_golden.py [FOLDER]     default: the folder of this script

Element formats come from ml_dtypes and numpy; blocks, options and pages are written out here in numpy
float32, one rounding an operation, from the definitions in docs/formats/README.md. Needs numpy and
ml_dtypes (versions are recorded in the files). Deterministic: the same versions give the same files.

  elements.txt   decode tables; codes of all BF16 and all FP16 inputs and of the midpoints between codes,
                 for many scales g, as runs "code*count"
  sweeps.txt     CRC-32 of codes and scales of all BF16 and FP16 inputs in blocks, for many g
  pages.txt      pages with every format and option; their bytes are in pages.bin
"""
import pathlib
import sys
import zlib

import ml_dtypes
import numpy as np

np.seterr(all="ignore")
F32 = np.float32
E4M3, E5M2, E2M1, BF16 = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float4_e2m1fn,
                          ml_dtypes.bfloat16)
SEGMENT = 4096  # values per CRC in sweeps

# Scales of plans: powers of two, ordinary ones, and some that overflow or underflow on the way.
SCALES = np.array([1.0, 0.5, 2.0**-9, 0.0078125, 3.0, 0.0123, 1 / 448, 0.7, 17.25, 1e-3, 1e-30, 1e-44, 3e37],
                  F32)


# ---- rounding to small types: saturating, NaN to code 0 ----

def saturate(x, limit, dtype):
    x = np.where(np.isnan(x), F32(0), x.astype(F32))
    return np.clip(x, F32(-limit), F32(limit)).astype(dtype)


def e4m3(x):
    return saturate(x, 448, E4M3)


def e5m2(x):
    return saturate(x, 57344, E5M2)


def e2m1(x):
    return saturate(x, 6, E2M1)


def f16(x):
    return saturate(x, 65504, np.float16)


def bf16(x):
    return saturate(x, float(np.array(0x7F7F, np.uint16).view(BF16)), BF16)


def codes_of(values):
    return values.view(np.uint16 if values.dtype.itemsize == 2 else np.uint8)


# ---- blocks: x [blocks, n] to (codes [blocks, n], side data bytes [blocks, k], decoded [blocks, n]) ----

def finite_amax(x):
    return np.where(np.isfinite(x), np.abs(x), F32(0)).max(axis=1, keepdims=True).astype(F32)


def finite_range(x):
    """Smallest and largest finite value of each block, 0 if there is none; -0 is below +0."""
    finite = np.isfinite(x)
    low = np.where(finite, x, F32(np.inf)).min(axis=1, keepdims=True)
    high = np.where(finite, x, F32(-np.inf)).max(axis=1, keepdims=True)
    none = ~finite.any(axis=1, keepdims=True)
    low, high = np.where(none, F32(0), low), np.where(none, F32(0), high)
    negative_zero = (finite & (x == 0) & np.signbit(x)).any(axis=1, keepdims=True)
    low = np.where((low == 0) & ~none, np.where(negative_zero, F32(-0.0), F32(0)), low)
    return low.astype(F32), (high + F32(0)).astype(F32)


def side_bytes(*parts):
    return np.concatenate([np.ascontiguousarray(p).view(np.uint8).reshape(len(p), -1) for p in parts], axis=1)


def no_scale(x):
    return np.zeros((len(x), 0), np.uint8)


def fp8(to_code):
    def encode(x, g):
        q = to_code(x / g)
        q = np.where(np.isnan(x), to_code(np.zeros_like(x)), q)
        return codes_of(q), no_scale(x), q.astype(F32) * g
    return encode


def plain(to_code):
    def encode(x, g):
        q = to_code(x)
        return codes_of(q), no_scale(x), q.astype(F32)
    return encode


def fp8_token(x, g):
    s = finite_amax(x) / F32(448)
    q = e4m3(np.where((s == 0) | np.isnan(x), F32(0), x / s))
    return codes_of(q), side_bytes(s), q.astype(F32) * s


def nvfp4_with(x, g, s):
    d = s.astype(F32) * g
    q = e2m1(np.where((d == 0) | np.isnan(x), F32(0), x / d))
    return q, (q.astype(F32) * s.astype(F32)) * g


def pad(x, n):
    return np.concatenate([x, np.zeros((len(x), n - x.shape[1]), F32)], axis=1)


def tree_error(x, decoded):
    e = pad(x - decoded, 16)
    e = e * e
    for half in (8, 4, 2, 1):
        e = e[:, :half] + e[:, half:2 * half]
    return e


def nvfp4(x, g):
    s = e4m3(finite_amax(x) / (F32(6) * g))
    q, decoded = nvfp4_with(x, g, s)
    return codes_of(q), side_bytes(s), decoded


def nvfp4_46(x, g):
    s6 = e4m3(finite_amax(x) / (F32(6) * g))
    ratio = finite_amax(x) / (F32(4) * g)
    s4 = e4m3(ratio)
    q6, decoded6 = nvfp4_with(x, g, s6)
    q4, decoded4 = nvfp4_with(x, g, s4)
    four = (tree_error(x, decoded4) < tree_error(x, decoded6)) & (ratio <= F32(448))
    return (np.where(four, codes_of(q4), codes_of(q6)), np.where(four, codes_of(s4), codes_of(s6)),
            np.where(four, decoded4, decoded6))


def microscaling(to_code, emax):
    def encode(x, g):
        amax = finite_amax(x)
        _, exponent = np.frexp(amax)  # amax = m * 2^exponent with m in [0.5, 1)
        e = np.where(amax == 0, -127, np.clip(exponent - 1 - emax, -127, 127))
        q = to_code(np.where(np.isnan(x), F32(0), np.ldexp(x, -e).astype(F32)))
        return codes_of(q), (e + 127).astype(np.uint8), np.ldexp(q.astype(F32), e).astype(F32)
    return encode


def int8(x, g):
    s = f16(finite_amax(x) / F32(127))
    wide = s.astype(F32)
    q = np.clip(np.rint(x / wide), -127, 127)
    q = np.where((wide == 0) | np.isnan(x), 0, q).astype(np.int8)
    return q.view(np.uint8), side_bytes(s), q.astype(F32) * wide


def affine(bits):
    steps = 2**bits - 1

    def encode(x, g):
        low, high = finite_range(x)
        s, m = f16((high - low) / F32(steps)), f16(low)
        s32, m32 = s.astype(F32), m.astype(F32)
        q = np.clip(np.rint((x - m32) / s32), 0, steps)
        q = np.where((s32 == 0) | np.isnan(x), 0, q).astype(np.uint8)
        return q, side_bytes(s, m), q.astype(F32) * s32 + m32
    return encode


# name: (encode, bits of a code, block length; 0 = the whole row, None = along tokens)
FORMATS = {
    "bf16": (plain(bf16), 16, 0), "f16": (plain(f16), 16, 0), "fp8": (fp8(e4m3), 8, 0),
    "fp8:head": (fp8(e4m3), 8, 0), "fp8:token": (fp8_token, 8, 0), "fp8e5m2": (fp8(e5m2), 8, 0),
    "mxfp8": (microscaling(e4m3, 8), 8, 32), "int8": (int8, 8, 32), "int4": (affine(4), 4, 32),
    "int4:channel": (affine(4), 4, None), "int3:channel": (affine(3), 3, None),
    "int2:channel": (affine(2), 2, None), "nvfp4": (nvfp4, 4, 16), "nvfp4+46": (nvfp4_46, 4, 16),
    "mxfp4": (microscaling(e2m1, 2), 4, 32),
}


def pack(codes, bits):
    """[rows, n] codes to bytes: a little-endian bit stream per row."""
    if bits == 16:
        return np.ascontiguousarray(codes).view(np.uint8)
    stream = np.unpackbits(codes[:, :, None], axis=2, bitorder="little")[:, :, :bits]
    return np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little")


def encode_rows(name, x, g):
    """x [rows, dim] to (codes bytes, scale bytes, decoded): blocks along the row, the last may be short."""
    encode, bits, block = FORMATS[name]
    dim = x.shape[1]
    parts = [encode(x[:, i:i + (block or dim)], g) for i in range(0, dim, block or dim)]
    codes, scales, decoded = (np.concatenate(p, axis=1) for p in zip(*parts))
    return pack(codes, bits), np.ascontiguousarray(scales), decoded.astype(F32)


def rotate(x):
    dim = x.shape[1]
    n = dim & -dim
    y = x.reshape(-1, n).astype(F32)
    stride = 1
    while stride < n:
        pairs = y.reshape(len(y), n // (2 * stride), 2, stride)
        y = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(-1, n)
        stride *= 2
    return (y * F32(1 / np.sqrt(np.float64(n)))).reshape(x.shape)


def encode_page(name, options, x, g, bias, smooth):
    """One side of a page: (codes, scales, mean, decoded as stored, decoded)."""
    y = x.astype(F32)
    if "smooth" in options:
        y = y / smooth
    if "rot" in options:
        y = rotate(y)
    mean = np.zeros(0, BF16)
    if "bias" in options:
        y = y - bias
    if "mean" in options:
        total = np.zeros(y.shape[1], F32)
        for row in y:
            total = total + row
        mean = bf16(total / F32(len(y)))
        y = y - mean.astype(F32)
    if FORMATS[name][2] is None:
        encode, bits, _ = FORMATS[name]
        codes, scales, stored = encode(np.ascontiguousarray(y.T), g)
        codes, stored = pack(codes, bits), np.ascontiguousarray(stored.T.astype(F32))
    else:
        codes, scales, stored = encode_rows(name, y, g)
    back = stored
    if "bias" in options:
        back = back + bias
    if "mean" in options:
        back = back + mean.astype(F32)
    if "rot" in options:
        back = rotate(back)
    if "smooth" in options:
        back = back * smooth
    return codes, scales, mean, stored, back.astype(F32)


# ---- files ----

def crc(array):
    return f"{zlib.crc32(np.ascontiguousarray(array).tobytes()):08x}"


def hex32(x):
    return f"{int(np.asarray(x, F32).view(np.uint32)):08x}"


def runs(codes):
    edges = np.flatnonzero(np.diff(codes.astype(np.int64))) + 1
    starts = np.concatenate([[0], edges])
    counts = np.diff(np.concatenate([starts, [len(codes)]]))
    return " ".join(f"{int(codes[s]):x}*{int(n)}" for s, n in zip(starts, counts))


def all_inputs(kind):
    bits = np.arange(65536, dtype=np.uint16)
    return bits.view(BF16 if kind == "bf16" else np.float16).astype(F32)


def midpoints(dtype, count, g):
    """g times each code, each midpoint of neighbours, and the fp32 numbers next to them, both signs."""
    values = np.arange(count, dtype=np.uint8).view(dtype).astype(F32)
    points = np.concatenate([values, (values[:-1] + values[1:]) / F32(2)]) * g
    points = np.concatenate([np.nextafter(points, F32(-np.inf)), points, np.nextafter(points, F32(np.inf))])
    return np.sort(np.concatenate([points, -points]))


def write_elements(folder, versions):
    lines = [f"# {versions}", "# decode FORMAT: fp32 bits of codes 0, 1, 2 ...; encode FORMAT INPUTS g: runs",
             "# of codes for inputs 0000 to ffff; midpoints FORMAT g: fp32 bits of the input, then the code"]
    for name, dtype, count in (("e2m1", E2M1, 16), ("e4m3", E4M3, 256), ("e5m2", E5M2, 256),
                               ("e8m0", ml_dtypes.float8_e8m0fnu, 255)):
        values = np.arange(count, dtype=np.uint8).view(dtype).astype(F32)
        lines.append(f"decode {name} " + " ".join("nan" if np.isnan(v) else hex32(v) for v in values))
    for kind in ("bf16", "f16"):
        x = all_inputs(kind)
        for name, to_code in (("fp8", e4m3), ("fp8e5m2", e5m2)):
            for g in SCALES:
                codes, _, _ = fp8(to_code)(x[None, :], g)
                lines.append(f"encode {name} {kind} {hex32(g)} {runs(codes[0])}")
        codes = codes_of(e2m1(x))
        lines.append(f"encode e2m1 {kind} {hex32(1)} {runs(codes)}")
    for name, to_code, dtype, count in (("fp8", e4m3, E4M3, 0x7F), ("fp8e5m2", e5m2, E5M2, 0x7C),
                                        ("e2m1", e2m1, E2M1, 8)):
        for g in (SCALES[:10] if name != "e2m1" else SCALES[:1]):
            x = midpoints(dtype, count, g)
            codes, _, _ = fp8(to_code)(x[None, :], g)
            lines.append(f"midpoints {name} {hex32(g)} " +
                         " ".join(f"{hex32(v)}:{int(c):x}" for v, c in zip(x, codes[0])))
    (folder / "elements.txt").write_text("\n".join(lines) + "\n")


def write_sweeps(folder, versions):
    """All 65,536 inputs as rows of 128, in order or mixed so that a block spans all magnitudes."""
    lines = [f"# {versions}",
             "# FORMAT INPUTS ORDER g: CRC-32 of codes and of scales for each 4096 inputs, then of all decoded",
             "# values as float32. Order `mixed`: input number i is (i * 40503) mod 65536."]
    for name in FORMATS:
        if FORMATS[name][2] is None:
            continue
        scaled = name.startswith(("fp8", "nvfp4")) and name != "fp8:token"
        for kind in ("bf16", "f16"):
            for order in ("sorted", "mixed"):
                x = all_inputs(kind)
                if order == "mixed":
                    x = x[np.arange(65536, dtype=np.int64) * 40503 % 65536]
                for g in SCALES if scaled else SCALES[:1]:
                    codes, scales, decoded = encode_rows(name, x.reshape(-1, 128), g)
                    step = SEGMENT // 128
                    crcs = [f"{crc(codes[i:i + step])}:{crc(scales[i:i + step])}"
                            for i in range(0, len(codes), step)]
                    lines.append(f"{name} {kind} {order} {hex32(g)} {' '.join(crcs)} {crc(decoded)}")
    (folder / "sweeps.txt").write_text("\n".join(lines) + "\n")


def page_values(rng, kind, shape):
    x = rng.standard_normal(shape).astype(F32)
    if kind == "outliers":
        x[:, rng.integers(0, shape[1], 3)] *= F32(150)
    elif kind == "zeros":
        x = np.where(rng.random(shape) < 0.6, np.where(rng.random(shape) < 0.5, F32(0), F32(-0.0)), x)
        x[:, :16] = F32(-0.0)
    elif kind == "subnormal":
        x = (x * F32(1e-39)).astype(F32)
    elif kind == "tiny":  # scales become subnormal or zero
        x = (x * (F32(10.0) ** rng.integers(-12, -2, (shape[0], 1)).astype(F32))).astype(F32)
    elif kind == "huge":
        x = (x * (F32(10.0) ** rng.integers(3, 38, shape).astype(F32))).astype(F32)
        x = np.where(np.isfinite(x), x, F32(3e38))
    elif kind == "ties":
        x = (rng.integers(-128, 129, shape) / 8).astype(F32)
    elif kind == "nonfinite":
        special = np.array([np.inf, -np.inf, np.nan, -np.nan], F32)[rng.integers(0, 4, shape)]
        x = np.where(rng.random(shape) < 0.02, special, x)
        x[0, :32] = special[0, :32]
    return x.astype(F32)


KINDS = ("normal", "outliers", "zeros", "subnormal", "tiny", "huge", "ties", "nonfinite")
OPTIONS = ((), ("mean",), ("rot",), ("mean", "rot"), ("bias",), ("smooth",), ("bias", "smooth", "rot"),
           ("mean", "smooth", "rot"))


def write_pages(folder, versions):
    rng = np.random.Generator(np.random.PCG64(20250101))
    data = bytearray()
    lines = [f"# {versions}",
             "# KV KIND head_dim tokens g: CRC-32 of the decoded page as stored and plain (none where it has",
             "# non-finite values), then sizes in pages.bin of x, bias, smooth (fp32), codes, scales, mean (BF16)"]
    for name in FORMATS:
        base, four_over_six = (name[:-3], ("46",)) if name.endswith("+46") else (name, ())
        cases = [((), kind) for kind in KINDS]
        cases += [(options, KINDS[i % 2]) for i, options in enumerate(OPTIONS) if options and base != "bf16"]
        for index, (options, kind) in enumerate(cases):
            dim, tokens = ((80, 16), (64, 16), (48, 16), (16, 32))[index % 4]
            x = page_values(rng, kind, (tokens, dim))
            g = SCALES[[0, 5, 6, 9][index % 4]]
            bias = (rng.standard_normal(dim) * 3).astype(F32)
            smooth = np.exp2(rng.standard_normal(dim)).astype(F32)
            codes, scales, mean, stored, back = encode_page(name, options, x, g, bias, smooth)
            order = [o for o in ("mean", "bias", "smooth", "rot") if o in options] + list(four_over_six)
            kv = "+".join([base] + order)
            check = [crc(a) if np.isfinite(a).all() else "none" for a in (stored, back)]
            parts = [x, bias if "bias" in options else bias[:0], smooth if "smooth" in options else smooth[:0],
                     codes, scales, mean]
            blobs = [np.ascontiguousarray(p).tobytes() for p in parts]
            lines.append(f"{kv} {kind} {dim} {tokens} {hex32(g)} {' '.join(check)} " +
                         " ".join(str(len(b)) for b in blobs))
            for blob in blobs:
                data += blob
    (folder / "pages.txt").write_text("\n".join(lines) + "\n")
    (folder / "pages.bin").write_bytes(data)


def main():
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent
    versions = f"made by make_golden.py with numpy {np.__version__}, ml_dtypes {ml_dtypes.__version__}"
    write_elements(folder, versions)
    write_sweeps(folder, versions)
    write_pages(folder, versions)


if __name__ == "__main__":
    main()
