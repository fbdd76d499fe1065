#!/usr/bin/python3
"""Prints the golden bytes of kv_event_test.cc, made with another msgpack library (python3-msgpack).

Usage: kv_event_golden.py

Hashes are beyond 32 bits, so that msgpack's shortest form is the nine bytes that the protocol wants.
"""
import msgpack

A, B, P = 0x1122334455667788, 0xFFEEDDCCBBAA9988, 0x8000000000000001
TOKENS = [1, 200, 300, 70000]


def show(name, events, rank):
    print(f"{name}: {msgpack.packb([1.5, events, rank]).hex()}")


show("map", [
    {"type": "AllBlocksCleared"},
    {"type": "BlockStored", "block_hashes": [A, B], "parent_block_hash": P, "token_ids": TOKENS, "block_size": 2,
     "lora_id": None, "medium": "GPU", "lora_name": None, "kv_cache_spec_kind": "full_attention"},
    {"type": "BlockStored", "block_hashes": [A, B], "parent_block_hash": None, "token_ids": TOKENS, "block_size": 2,
     "lora_id": None, "medium": "CPU", "lora_name": None, "extra_keys": [["salt"], None], "group_idx": 1,
     "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 512},
    {"type": "BlockRemoved", "block_hashes": [B], "medium": "DISK"},
    {"type": "BlockRemoved", "block_hashes": [A], "medium": "GPU", "group_idx": 1},
], 3)
show("array", [
    ["AllBlocksCleared"],
    ["BlockStored", [A, B], P, TOKENS, 2, None, "GPU"],
    ["BlockStored", [A, B], None, TOKENS, 2, None, "CPU", None, [["salt"], None], 1, "sliding_window", 512],
    ["BlockRemoved", [B], "DISK"],
    ["BlockRemoved", [A], "GPU", 1],
], 3)
