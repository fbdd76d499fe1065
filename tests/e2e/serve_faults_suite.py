#!/usr/bin/env python3
r"""Breaks a running `kvant serve` in every way it promises to survive, and counts wrong answers: there must be none.

Usage: serve_faults_suite.py KVANT MODEL [--only CHECK,...] [--rounds N] [--seconds S] [--json]

Starts the servers itself, with a cache so small that most pages live in the tiers below it, and compares every answer
(tokens and log-probabilities, to the last digit) with that of a server that keeps no pages. Prints one line a check;
exit code 1 if one fails, 77 (skipped) without the model. The long run:

  tests/e2e/serve_faults_suite.py build/kvant models/SmolLM2-135M-Instruct.Q4_1.gguf \
    --rounds 100 --seconds 10 --pairs 9 --pair-tokens 1500
"""
import argparse
import http.client
import json
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time

import redis_servers
import serve_hostile_checks
from serve_process import Corpus, Load, Server, WrongStatus

SMALL = ["--deterministic", "--max-model-len", 160, "--max-num-seqs", 3, "--page-tokens", 16, "--cache-memory", "5MiB",
         "--load-always", "--quality-sample", 0, "--no-access-log"]


class Suite:
    def __init__(self, options):
        self.options = options
        self.folder = pathlib.Path(options.folder)
        self.random = random.Random(options.seed)
        self.lines = sys.stderr if options.json else sys.stdout
        self.results = []
        self.reference = self.corpus = None
        self.loads = []

    def report(self, name, ok, **counts):
        self.results.append({"check": name, "ok": bool(ok), **counts})
        text = ", ".join(f"{what.replace('_', ' ')} {value}" for what, value in counts.items())
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {text}", file=self.lines, flush=True)

    def skip(self, name, why):
        self.results.append({"check": name, "skipped": why})
        print(f"SKIP {name}: {why}", file=self.lines, flush=True)

    def start(self, *options):
        return Server(self.options.program, self.options.model, *SMALL, "--kv", self.options.kv, *options)

    def disk(self, name, size="1GiB"):
        return "--disk-cache", self.folder / name, "--disk-size", size, "--disk-write", "through"

    def load(self, server, **options):
        self.loads.append(Load(server, self.corpus, seed=self.random.random(), **options))
        return self.loads[-1]

    def wait(self, load, condition, **limits):
        load.until(condition, **{"least": self.options.seconds, "most": 30 + self.options.seconds} | limits)

    def run(self):
        checks = {"kill": self.check_kill, "full": self.check_full, "corrupt": self.check_corrupt,
                  "redis": self.check_redis, "cluster": self.check_cluster,
                  "keys": lambda: serve_hostile_checks.check_keys(self),
                  "hostile": lambda: serve_hostile_checks.check_hostile(self)}
        chosen = self.options.only.split(",") if self.options.only else list(checks)
        if unknown := set(chosen) - set(checks):
            sys.exit(f"no check {', '.join(unknown)}; there are {', '.join(checks)}")
        with Server(self.options.program, self.options.model, *SMALL, "--kv", self.options.kv,
                    "--no-enable-prefix-caching") as self.reference:
            self.corpus = Corpus(self.reference, self.options.seed)
            for name in chosen:
                begin = time.monotonic()
                try:
                    checks[name]()
                except (OSError, RuntimeError, WrongStatus, redis_servers.RedisError,
                        http.client.HTTPException) as error:
                    self.report(name, False, error=f"{type(error).__name__}: {error}")
                for load in self.loads:
                    load.stopping.set()
                print(f"     {name} took {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
        return all(result.get("ok", True) for result in self.results)

    # ---- kill -9

    def check_kill(self):
        """Two folders in turn: one that grows, whose pages must all be there again, and one that is always full."""
        counts = dict.fromkeys(("right", "wrong", "lost", "cut_by_kills", "pages_found_again", "torn_slots",
                                "disk_hit_tokens", "rounds_with_hits", "pages_lost"), 0)
        committed, examples = {}, []
        for number in range(self.options.rounds):
            name, size = ("grows", "4GiB") if number % 2 == 0 else ("full", "6MiB")
            server = self.start(*self.disk(f"kill-{name}", size))
            found = re.search(r"(\d+) pages from earlier, (\d+) damaged", wait_for_log(server))
            load = self.load(server, fresh=0.5)
            load.until(lambda _: True, least=self.random.uniform(0.2, 1.0), answers=3)
            metrics = server.metrics()
            load.kill()
            counts["pages_found_again"] += int(found[1])
            counts["torn_slots"] += int(found[2])
            if name == "grows":
                counts["pages_lost"] += max(0, committed.get(name, 0) - int(found[1]))
            committed[name] = metrics.tier("pages", "disk")
            hits = metrics.tier("hit_tokens_total", "disk")
            counts["disk_hit_tokens"] += hits
            counts["rounds_with_hits"] += hits > 0
            counts["right"] += load.right
            counts["wrong"] += len(load.wrong)
            counts["lost"] += load.lost
            counts["cut_by_kills"] += load.cut
            examples += load.wrong + load.errors
        ok = counts["right"] and not counts["wrong"] and not counts["lost"] and not counts["pages_lost"]
        ok = ok and counts["disk_hit_tokens"] > 0 and counts["pages_found_again"] > 0
        self.report("kill -9 under load", ok, rounds=self.options.rounds, **counts,
                    **({"examples": examples[:2]} if examples else {}))

    # ---- full disks

    def check_full(self):
        self.check_small_limit()
        self.check_file_limit()
        self.check_full_file_system()

    def check_small_limit(self):
        with self.start(*self.disk("small", "4MiB")) as server:
            load = self.load(server, fresh=0.3)
            self.wait(load, lambda m: m.tier("tier_evictions_total", "disk") > 20)
            load.finish()
            metrics = server.metrics()
            kept = sum(file.stat().st_blocks * 512 for file in (self.folder / "small").iterdir())
            evictions = metrics.tier("tier_evictions_total", "disk")
            self.report("disk limit below the data", load.ok() and evictions > 0 and kept < 5 << 20, **load.says(),
                        evictions=evictions, bytes_on_disk=kept)

    def check_file_limit(self):
        """A file may not grow any more while the server runs, and then may again."""
        with self.start(*self.disk("limited")) as server:
            load = self.load(server, fresh=0.3)
            pid, before = server.process.pid, server.metrics()
            hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (8192, hard))
            self.wait(load, lambda m: m.tier("failures_total", "disk") > before.tier("failures_total", "disk") + 5)
            failures = server.metrics().tier("failures_total", "disk")
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
            stores = server.metrics().tier("stores_total", "disk")
            self.wait(load, lambda m: m.tier("stores_total", "disk") > stores)
            load.finish()
            again = server.metrics().tier("stores_total", "disk") - stores
            self.report("file size limit reached while running", load.ok() and failures > 0 and again > 0,
                        **load.says(), failures_counted=failures, stores_afterwards=again)

    def check_full_file_system(self):
        name, mount = "file system full", self.folder / "tmpfs"
        mount.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mount], check=False,
                          capture_output=True).returncode != 0:
            self.skip(name, "a tmpfs cannot be mounted here")
            return
        try:
            filler = mount / "filler"
            fill(filler)
            with self.start(*self.disk("tmpfs")) as server:
                load = self.load(server, fresh=0.3)
                self.wait(load, lambda m: m.tier("failures_total", "disk") > 5)
                failures = server.metrics().tier("failures_total", "disk")
                filler.unlink()
                self.wait(load, lambda m: m.tier("tier_evictions_total", "disk") > 10)
                load.finish()
                metrics = server.metrics()
                stores = metrics.tier("stores_total", "disk")
                self.report(name, load.ok() and failures > 0 and stores > 0, **load.says(), failures_counted=failures,
                            stores_afterwards=stores, evictions=metrics.tier("tier_evictions_total", "disk"))
        finally:
            subprocess.run(["umount", mount], check=False)

    # ---- damage

    def check_corrupt(self):
        options = self.disk("damaged")
        with self.start(*options) as server:
            load = self.load(server)
            self.wait(load, lambda m: m.tier("pages", "disk") > 40)
            load.finish()
        files = list((self.folder / "damaged").glob("*.slab"))
        flips = sum(flip_bits(file, self.random, every=60_000) for file in files)
        for file in files:  # and the header of one slot
            slot_bytes = int(file.stem.split("-")[1])
            slot = self.random.randrange((file.stat().st_size - 4096) // slot_bytes + 1)
            flips += flip_bits(file, self.random, 4096 + slot * slot_bytes, 64)
        with self.start(*options) as server:
            torn = int(re.search(r"(\d+) damaged", wait_for_log(server))[1])
            load = self.load(server)
            self.wait(load, lambda m: m.tier("failures_total", "disk") > torn)
            load.finish()
            failures = server.metrics().tier("failures_total", "disk")
        self.report("slabs damaged while stopped", load.ok() and failures > torn, **load.says(), bits_flipped=flips,
                    damaged_at_start=torn, failures_counted=failures)
        self.check_damage_while_running(options, files)
        self.check_unusable_files(options, files)

    def check_damage_while_running(self, options, files):
        stop, flipped = threading.Event(), [0]

        def damage():
            source = random.Random(self.options.seed)
            while not stop.wait(0.02):
                for file in files:
                    flipped[0] += flip_bits(file, source, every=1_000_000)
        with self.start(*options) as server:
            load = self.load(server)
            vandal = threading.Thread(target=damage)
            vandal.start()
            self.wait(load, lambda m: m.tier("failures_total", "disk") > 10)
            stop.set()
            vandal.join()
            for file in files:  # and all of it at once
                os.truncate(file, 8192)
            before = server.metrics()
            self.wait(load, lambda m: m.tier("failures_total", "disk") > before.tier("failures_total", "disk") and
                      m.tier("stores_total", "disk") > before.tier("stores_total", "disk"))
            load.finish()
            after = server.metrics()
            lost = after.tier("failures_total", "disk") - before.tier("failures_total", "disk")
            stores = after.tier("stores_total", "disk") - before.tier("stores_total", "disk")
            hits = after.tier("hit_tokens_total", "disk")
        failures = before.tier("failures_total", "disk")
        self.report("slabs damaged and cut while running", load.ok() and failures > 0 and lost > 0 and stores > 0 and
                    hits > 0, **load.says(), bits_flipped=flipped[0], failures_counted=failures,
                    failures_after_cut=lost, stores_after_cut=stores, disk_hit_tokens=hits)

    def check_unusable_files(self, options, files):
        """Whose first bytes are wrong: left alone, and the server goes on without them."""
        for file in files:
            flip_bits(file, self.random, first=0, size=8)
        with self.start(*options) as server:
            wait_for_log(server)
            load = self.load(server)
            self.wait(load, lambda m: m.tier("failures_total", "disk") > 5)
            load.finish()
            failures = server.metrics().tier("failures_total", "disk")
        warned = any("until you remove them" in line for line in server.log)
        self.report("slab files that are none", load.ok() and failures > 0 and warned, **load.says(), files=len(files),
                    failures_counted=failures)

    # ---- Redis

    def check_redis(self):
        name = "redis values damaged"
        if not redis_servers.installed():
            self.skip(name, "redis-server is not installed")
            return
        with redis_servers.RedisServers(self.make_folder("redis"), 1, 21000 + os.getpid() % 1000) as redis, \
                self.start("--remote-cache", redis.url()) as server:
            load = self.load(server)
            self.wait(load, lambda m: m.tier("stores_total", "remote") > 40)
            before, damaged, end = server.metrics(), 0, time.monotonic() + self.options.seconds
            while damaged == 0 or time.monotonic() < end:
                damaged += self.damage_values(redis)
                time.sleep(0.5)
            self.wait(load, lambda m: m.tier("failures_total", "remote") > 5 and
                      m.tier("hit_tokens_total", "remote") > before.tier("hit_tokens_total", "remote"))
            load.finish()
            metrics = server.metrics()
            failures = metrics.tier("failures_total", "remote")
            hits = metrics.tier("hit_tokens_total", "remote")
            self.report(name, load.ok() and failures > 0 and hits > 0, **load.says(), values_damaged=damaged,
                        failures_counted=failures, remote_hit_tokens=hits)
            self.check_hanging_redis(redis, server)

    def check_hanging_redis(self, redis, server):
        """It takes commands and answers none; then it does again."""
        load = self.load(server, fresh=0.1)
        before = server.metrics()
        redis.processes[0].send_signal(signal.SIGSTOP)
        try:
            self.wait(load, lambda m: m.tier("failures_total", "remote") > before.tier("failures_total", "remote") + 5)
            hung = server.metrics()
        finally:
            redis.processes[0].send_signal(signal.SIGCONT)
        self.wait(load, lambda m: m.tier("hit_tokens_total", "remote") > hung.tier("hit_tokens_total", "remote"))
        load.finish()
        hits = server.metrics().tier("hit_tokens_total", "remote") - hung.tier("hit_tokens_total", "remote")
        failures = hung.tier("failures_total", "remote") - before.tier("failures_total", "remote")
        self.report("redis hangs", load.ok() and failures > 0 and hits > 0 and load.slowest < 20, **load.says(),
                    failures_counted=failures, hit_tokens_afterwards=hits,
                    seconds_of_the_slowest=round(load.slowest, 2))

    def damage_values(self, redis):
        """A flipped byte, rubbish, another page's value, a shorter one, each for a part of the keys."""
        keys = redis.ask(0, "KEYS", "kvant:*")
        for index, key in enumerate(keys):
            if index % 6 == 0:
                redis.ask(0, "SETRANGE", key, self.random.randrange(0, 60_000), bytes([self.random.randrange(256)] * 3))
            elif index % 6 == 1:
                redis.ask(0, "SET", key, self.random.randbytes(self.random.choice([0, 7, 5000])))
            elif index % 6 == 2:
                redis.ask(0, "COPY", keys[index - 1], key, "REPLACE")
            elif index % 6 == 3:
                redis.ask(0, "SET", key, (redis.ask(0, "GET", key) or b"")[:5000])
        return sum(index % 6 < 4 for index in range(len(keys)))

    def check_cluster(self):
        name = "redis cluster: slots moved, a node killed"
        if not redis_servers.installed():
            self.skip(name, "redis-server is not installed")
            return
        with redis_servers.RedisServers(self.make_folder("cluster"), 3, 22000 + os.getpid() % 1000) as redis, \
                self.start("--remote-cache", redis.url()) as server:
            load = self.load(server, fresh=0.1)
            self.wait(load, lambda m: m.tier("stores_total", "remote") > 40)
            slots = keys = hits = 0
            begin, first = time.monotonic(), server.metrics().tier("hit_tokens_total", "remote")
            while slots < 20 or hits == 0 or time.monotonic() < begin + self.options.seconds:
                if time.monotonic() > begin + self.options.seconds + 30:
                    break
                hits = server.metrics().tier("hit_tokens_total", "remote") - first
                origin, slot = redis.owner_of_some_slot(self.random)
                if origin is None:
                    time.sleep(0.05)
                    continue
                to = self.random.choice([node for node in range(3) if node != origin])
                keys += redis.move_slot(slot, origin, to, pause=self.random.choice([0, 0, 0.1]))
                slots += 1
            moved = server.metrics()
            redis.kill(2)
            self.wait(load, lambda m: m.tier("failures_total", "remote") > moved.tier("failures_total", "remote") and
                      m.tier("hit_tokens_total", "remote") > moved.tier("hit_tokens_total", "remote"))
            dead = server.metrics()
            redis.start(2)
            self.wait(load, lambda m: m.tier("stores_total", "remote") > dead.tier("stores_total", "remote"))
            load.finish()
            failures = dead.tier("failures_total", "remote") - moved.tier("failures_total", "remote")
            hits_with_dead = dead.tier("hit_tokens_total", "remote") - moved.tier("hit_tokens_total", "remote")
            self.report(name, load.ok() and keys > 0 and hits > 0 and failures > 0 and hits_with_dead > 0,
                        **load.says(), slots_moved=slots, keys_moved=keys, hit_tokens_while_moving=hits,
                        failures_while_moving=moved.tier("failures_total", "remote"),
                        failures_with_a_dead_node=failures, hit_tokens_with_a_dead_node=hits_with_dead,
                        seconds_of_the_slowest=round(load.slowest, 2))

    def make_folder(self, name):
        (self.folder / name).mkdir()
        return self.folder / name


def wait_for_log(server):
    """What the server has said once it has told what it found in its folder."""
    for _ in range(100):
        if any("pages from earlier" in line for line in server.log):
            break
        time.sleep(0.02)
    return "".join(server.log)


def fill(path):
    """Until not one block is left."""
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            pass
        try:
            while file.write(bytes(512)):
                pass
        except OSError:
            pass


def flip_bits(path, source, first=4096, size=None, every=1 << 30):
    """One bit in about every so many bytes, by default behind the superblock; but not in holes, which hold no page."""
    size = size or max(1, path.stat().st_size - first)
    flips = 0
    with open(path, "r+b", buffering=0) as file:
        for _ in range(max(1, size // every)):
            offset = source.randrange(first, first + size)
            byte = os.pread(file.fileno(), 1, offset)
            if byte not in (b"", b"\0"):
                flips += os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << source.randrange(8)]), offset)
    return flips


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("model")
    parser.add_argument("--only", help="kill, full, corrupt, redis, cluster, keys, hostile; several with commas")
    parser.add_argument("--rounds", type=int, default=4, help="of load and kill -9")
    parser.add_argument("--seconds", type=float, default=0.5, help="of load in each other state, at least")
    parser.add_argument("--pairs", type=int, default=3, help="prompts whose times two keys compare")
    parser.add_argument("--pair-tokens", type=int, default=500, help="their length")
    parser.add_argument("--kv", default="4bit", help="format of the cache")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="an object on stdout, the lines on stderr")
    options = parser.parse_args()
    if not os.path.exists(options.model):
        print(f"skipped: there is no {options.model}; scripts/fetch_model.sh smollm2 gets it")
        return 77
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as options.folder:
        suite = Suite(options)
        ok = suite.run()
    if options.json:
        print(json.dumps({"schema_version": 1, "suite": "serve_faults", "ok": ok, "seed": options.seed,
                          "kv": options.kv, "seconds": round(time.monotonic() - begin, 1),
                          "checks": suite.results}, indent=2))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
