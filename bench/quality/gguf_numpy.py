"""Reads GGUF files and dequantises their tensors to float32, with numpy alone.

Independent of kvant's C++ reader on purpose: the exact base that engines are measured against must
not share code with one of them. Block layouts: docs/gguf.md and ggml-quants of ggml-org/ggml.
"""

import struct

import numpy as np

_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8",
            11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9


def _f32(x):
    return x.astype(np.float32)


def _halves(raw, at):
    """The f16 at byte `at` of each block, as a float32 column."""
    return _f32(raw[:, at:at + 2].copy().view("<f2"))


def _bf16(raw):
    return (raw.copy().view("<u2").astype(np.uint32) << 16).view(np.float32)


def _nibbles(raw):
    """Low nibbles of all bytes, then high nibbles (the order inside a block of 32)."""
    return np.concatenate([raw & 15, raw >> 4], axis=1)


def _fifth_bits(raw, at):
    words = raw[:, at:at + 4].copy().view("<u4")
    return ((words >> np.arange(32, dtype=np.uint32)) & 1).astype(np.uint8) << 4


def _q4_0(raw):
    return _halves(raw, 0) * (_f32(_nibbles(raw[:, 2:])) - 8)


def _q4_1(raw):
    return _halves(raw, 0) * _f32(_nibbles(raw[:, 4:])) + _halves(raw, 2)


def _q5_0(raw):
    return _halves(raw, 0) * (_f32(_nibbles(raw[:, 6:]) | _fifth_bits(raw, 2)) - 16)


def _q5_1(raw):
    return _halves(raw, 0) * _f32(_nibbles(raw[:, 8:]) | _fifth_bits(raw, 4)) + _halves(raw, 2)


def _q8_0(raw):
    return _halves(raw, 0) * _f32(raw[:, 2:].copy().view(np.int8))


def _six_bit_scales(raw):
    """The eight 6-bit scales and mins that Q4_K packs into 12 bytes."""
    low = raw[:, 0:4] & 63
    low_min = raw[:, 4:8] & 63
    high = (raw[:, 8:12] & 15) | ((raw[:, 0:4] >> 6) << 4)
    high_min = (raw[:, 8:12] >> 4) | ((raw[:, 4:8] >> 6) << 4)
    return np.concatenate([low, high], 1), np.concatenate([low_min, high_min], 1)


def _q4_k(raw):
    scale, minimum = _six_bit_scales(raw[:, 4:16])
    codes = raw[:, 16:].reshape(-1, 4, 32)
    codes = np.stack([codes & 15, codes >> 4], axis=2).reshape(-1, 8, 32)
    scale = (_halves(raw, 0) * scale)[:, :, None]
    minimum = (_halves(raw, 2) * minimum)[:, :, None]
    return (scale * codes - minimum).reshape(len(raw), 256)


def _q6_k(raw):
    low = raw[:, 0:128].reshape(-1, 2, 2, 32)           # half, which 32 bytes, byte
    high = raw[:, 128:192].reshape(-1, 2, 1, 32)
    parts = []
    for quarter in range(4):
        nibble = (low[:, :, quarter % 2] >> (4 * (quarter // 2))) & 15
        parts.append(nibble | (((high[:, :, 0] >> (2 * quarter)) & 3) << 4))
    codes = np.stack(parts, axis=2).reshape(-1, 16, 16).astype(np.float32) - 32
    scale = _halves(raw, 208) * raw[:, 192:208].copy().view(np.int8)
    return (scale[:, :, None] * codes).reshape(len(raw), 256)


# GGUF type id: (values a block, bytes a block, dequantise [blocks, bytes] -> [blocks, values])
_BLOCKS = {
    0: (1, 4, lambda raw: raw.copy().view("<f4")),
    1: (1, 2, lambda raw: _f32(raw.copy().view("<f2"))),
    2: (32, 18, _q4_0),
    3: (32, 20, _q4_1),
    6: (32, 22, _q5_0),
    7: (32, 24, _q5_1),
    8: (32, 34, _q8_0),
    12: (256, 144, _q4_k),
    14: (256, 210, _q6_k),
    30: (1, 2, _bf16),
}


class Gguf:
    """`metadata` maps keys to Python values; `tensor(name)` returns float32 [rows, cols] or [n]."""

    def __init__(self, path):
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        self._at = 0
        if bytes(self._bytes[:4]) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file")
        self._at = 4
        version, num_tensors, num_keys = self._unpack("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"{path}: GGUF version {version} is not supported (2 and 3 are)")
        self.metadata = {}
        self.value_at = {}                              # where each key's value starts in the file
        for _ in range(num_keys):
            key = self._string()
            kind = self._unpack("<I")[0]
            self.value_at[key] = self._at
            self.metadata[key] = self._value(kind)
        self.metadata_end = self._at
        self._tensors = {}
        for _ in range(num_tensors):
            name = self._string()
            dims = self._unpack(f"<{self._unpack('<I')[0]}Q")
            kind, offset = self._unpack("<IQ")
            self._tensors[name] = (dims, kind, offset)
        self.alignment = self.metadata.get("general.alignment", 32)
        self._data = -(-self._at // self.alignment) * self.alignment

    def _unpack(self, layout):
        size = struct.calcsize(layout)
        values = struct.unpack(layout, self._bytes[self._at:self._at + size].tobytes())
        self._at += size
        return values

    def _string(self):
        size = self._unpack("<Q")[0]
        text = self._bytes[self._at:self._at + size].tobytes()
        self._at += size
        return text.decode("utf-8", "replace")

    def _value(self, kind):
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, count = self._unpack("<IQ")
            if item in (_STRING, _ARRAY):
                return [self._value(item) for _ in range(count)]
            dtype = np.dtype(_SCALARS[item])
            end = self._at + count * dtype.itemsize
            values = self._bytes[self._at:end].view(dtype)
            self._at = end
            return values
        dtype = np.dtype(_SCALARS[kind])
        value = self._bytes[self._at:self._at + dtype.itemsize].view(dtype)[0].item()
        self._at += dtype.itemsize
        return value

    def __contains__(self, name):
        return name in self._tensors

    def head(self):
        """The file's bytes up to the tensor table: magic, version, counts and metadata."""
        return bytearray(self._bytes[:self.metadata_end])

    def tensor_dims(self):
        """(name, dimensions in the file's order: columns first) of all tensors, in the file's order."""
        for name, (dims, _, _) in self._tensors.items():
            yield name, dims

    def tensor_bytes(self):
        """(name, bytes in the file) of all tensors."""
        for name, (dims, kind, _) in self._tensors.items():
            values, size, _ = self._block(name, kind)
            yield name, int(np.prod(dims)) // values * size

    @staticmethod
    def _block(name, kind):
        if kind not in _BLOCKS:
            raise ValueError(f"tensor {name}: GGUF type {kind} is not supported")
        return _BLOCKS[kind]

    def tensor(self, name):
        dims, kind, offset = self._tensors[name]
        values, size, dequantise = self._block(name, kind)
        count = int(np.prod(dims)) // values
        start = self._data + offset
        raw = self._bytes[start:start + count * size].reshape(count, size)
        out = np.empty((count, values), np.float32)
        for row in range(0, count, 1 << 16):            # bounds the temporaries of large tensors
            out[row:row + (1 << 16)] = dequantise(np.asarray(raw[row:row + (1 << 16)]))
        return out.reshape(dims[::-1])
