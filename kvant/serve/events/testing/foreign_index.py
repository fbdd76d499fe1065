#!/usr/bin/python3
"""A router's index of one worker's prefix cache, rebuilt from KV events alone.

Usage: foreign_index.py ENDPOINT REPLAY [--topic PREFIX]

An independent reader of the protocol (libzmq through pyzmq, python3-msgpack): it subscribes, notices gaps in
the sequence numbers, asks the replay endpoint for what it missed, and is as strict as the strictest of the
known consumers. It identifies blocks by the tokens that lead to them, not by the worker's hashes.

On standard output it prints `ready` once it has seen an event; a line `end NUMBER` on standard input makes it
read on to that sequence number and print one JSON object: blocks ("medium salt tokens... #group"), counts, errors.
`endpoint PUB REPLAY` makes it connect anew, as after a restart of the worker.
"""
import argparse
import json
import struct
import sys
import time

import msgpack
import zmq

END = b"\xff" * 8


class Index:
    def __init__(self) -> None:
        self.blocks = {}  # worker's hash -> {"path": (salt, tokens), "media": set of (medium, group)}
        self.errors = []
        self.counts = {"batches": 0, "stored": 0, "removed": 0, "cleared": 0, "replayed": 0, "gaps": 0,
                       "restarts": 0, "arrays": 0, "maps": 0}
        self.ranks = set()
        self.groups = set()

    def error(self, text: str) -> None:
        if len(self.errors) < 20:
            self.errors.append(text)

    def apply(self, payload: bytes) -> None:
        batch = msgpack.unpackb(payload, raw=False, strict_map_key=False)
        if not isinstance(batch, list) or len(batch) != 3:
            self.error(f"the batch is not an array of 3: {batch!r:.100}")  # AIBrix takes 2 or 3
            return
        timestamp, events, rank = batch
        if not isinstance(timestamp, float) or abs(timestamp - time.time()) > 600:
            self.error(f"timestamp {timestamp!r}")
        if not isinstance(rank, int) or isinstance(rank, bool):
            self.error(f"rank {rank!r} is not an int")  # AIBrix rejects nil
        self.ranks.add(rank)
        self.counts["batches"] += 1
        for event in events:
            self.apply_event(event, payload)

    def apply_event(self, event, payload: bytes) -> None:
        if isinstance(event, list):
            self.counts["arrays"] += 1
            names = {"BlockStored": ["type", "block_hashes", "parent_block_hash", "token_ids", "block_size",
                                     "lora_id", "medium", "lora_name", "extra_keys", "group_idx",
                                     "kv_cache_spec_kind", "kv_cache_spec_sliding_window"],
                     "BlockRemoved": ["type", "block_hashes", "medium", "group_idx"],
                     "AllBlocksCleared": ["type"]}[event[0]]
            if len(event) > len(names):
                self.error(f"{event[0]} has {len(event)} fields")
            event = dict(zip(names, event))
        else:
            self.counts["maps"] += 1
        for number in event.get("block_hashes", []) + [event.get("parent_block_hash")]:
            if number is not None:
                self.check_hash(number, payload)
        self.groups.add((event.get("group_idx"), event.get("kv_cache_spec_kind")))
        getattr(self, event["type"])(event)

    def check_hash(self, number: int, payload: bytes) -> None:
        if number == 0:
            self.error("hash 0")  # llm-d: no parent
        if b"\xcf" + struct.pack(">Q", number) not in payload:
            self.error(f"hash {number} is not a fixed 64-bit integer")  # llm-d rejects the batch

    def BlockStored(self, event) -> None:
        hashes, parent, size = event["block_hashes"], event["parent_block_hash"], event["block_size"]
        tokens, medium = event["token_ids"], (event["medium"], event.get("group_idx"))
        if len(set(hashes + [parent])) != len(hashes) + 1:
            self.error("a hash comes twice in one event")  # Dynamo rejects it
        if len(tokens) != len(hashes) * size:
            self.error(f"{len(tokens)} tokens for {len(hashes)} blocks of {size}")
        extra = event.get("extra_keys")
        if extra is not None and len(extra) != len(hashes):
            self.error("extra_keys does not have an entry for each block")
        salt, path = "", ()
        if parent is None:
            if extra is not None and extra[0] is not None:
                salt = extra[0][0]
        elif parent not in self.blocks:
            self.error(f"the parent {parent} is not known")  # llm-d drops the subtree
            return
        else:
            salt, path = self.blocks[parent]["path"]
        for i, number in enumerate(hashes):
            path = path + tuple(tokens[i * size:(i + 1) * size])
            block = self.blocks.setdefault(number, {"path": (salt, path), "media": set()})
            if block["path"] != (salt, path):
                self.error(f"hash {number} names two blocks")
            if medium in block["media"]:
                self.error(f"{number} is stored twice at {medium}")
            block["media"].add(medium)
            self.counts["stored"] += 1

    def BlockRemoved(self, event) -> None:
        for number in event["block_hashes"]:
            block = self.blocks.get(number)
            medium = (event["medium"], event.get("group_idx"))
            if block is None or medium not in block["media"]:
                self.error(f"{number} is removed from {medium} but is not there")
                continue
            block["media"].remove(medium)
            if not block["media"]:
                del self.blocks[number]
            self.counts["removed"] += 1

    def AllBlocksCleared(self, _event) -> None:
        self.blocks.clear()
        self.counts["cleared"] += 1

    def listing(self) -> list:
        return sorted(f"{medium} {block['path'][0]} {' '.join(map(str, block['path'][1]))}"
                      + (f" #{group}" if group is not None else "")
                      for block in self.blocks.values() for medium, group in block["media"])


class Reader:
    def __init__(self, endpoint: str, replay: str, topic: str) -> None:
        self.context = zmq.Context()
        self.index = Index()
        self.topic = topic
        self.next_number = 0  # the first batch of a worker is 0: what came before joining is a gap
        self.sub = None
        self.connect(endpoint, replay)

    def connect(self, endpoint: str, replay: str) -> None:
        if self.sub is not None:
            self.sub.close(0)
        self.replay_endpoint = replay
        self.sub = self.context.socket(zmq.SUB)
        self.sub.setsockopt_string(zmq.SUBSCRIBE, self.topic)
        self.sub.setsockopt(zmq.RCVHWM, 0)
        self.sub.connect(endpoint)

    def fill_gap(self, until: int) -> None:
        """Applies the batches [next_number, until) from the replay endpoint."""
        self.index.counts["gaps"] += 1
        dealer = self.context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.RCVTIMEO, 5000)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(self.replay_endpoint)
        dealer.send_multipart([b"", struct.pack(">Q", self.next_number)])
        while True:
            delimiter, number, payload = dealer.recv_multipart()
            if number == END:
                if payload != b"" or delimiter != b"":
                    self.index.error("the end mark is not [\"\", FF*8, \"\"]")
                break
            number = struct.unpack(">Q", number)[0]
            if self.next_number <= number < until:
                if number > self.next_number:
                    self.index.counts["lost"] = self.index.counts.get("lost", 0) + number - self.next_number
                self.index.apply(payload)
                self.index.counts["replayed"] += 1
                self.next_number = number + 1
        if self.next_number < until:
            self.index.counts["lost"] = self.index.counts.get("lost", 0) + until - self.next_number
        dealer.close(0)

    def step(self, timeout_ms: int) -> bool:
        if not self.sub.poll(timeout_ms):
            return False
        frames = self.sub.recv_multipart()
        if len(frames) != 3 or len(frames[1]) != 8:
            self.index.error(f"{len(frames)} frames")
            return True
        number = struct.unpack(">Q", frames[1])[0]
        if number < self.next_number:  # the worker began anew
            self.index.counts["restarts"] += 1
            self.next_number = 0
        if number > self.next_number:
            self.fill_gap(number)
        self.index.apply(frames[2])
        self.next_number = number + 1
        return True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("endpoint")
    parser.add_argument("replay")
    parser.add_argument("--topic", default="")
    options = parser.parse_args()
    reader = Reader(options.endpoint, options.replay, options.topic)
    poller = zmq.Poller()
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    poller.register(reader.sub, zmq.POLLIN)
    ready = False
    while True:
        poller.poll(10000)
        while reader.step(0):
            if not ready:
                print("ready", flush=True)
                ready = True
        if not zmq.select([sys.stdin.fileno()], [], [], 0)[0]:
            continue
        words = sys.stdin.readline().split()
        if not words:
            return
        if words[0] == "endpoint":
            poller.unregister(reader.sub)
            reader.connect(words[1], words[2])
            poller.register(reader.sub, zmq.POLLIN)
            ready = False
            print("connected", flush=True)
        if words[0] == "end":
            give_up = time.time() + 20
            while reader.next_number <= int(words[1]) and time.time() < give_up:
                reader.step(100)
            index = reader.index
            print(json.dumps({"blocks": index.listing(), "counts": index.counts, "errors": index.errors,
                              "ranks": sorted(map(str, index.ranks)), "groups": sorted(map(str, index.groups)),
                              "next": reader.next_number}), flush=True)


if __name__ == "__main__":
    main()
