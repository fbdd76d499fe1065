"""Redis servers for tests, alone or as a cluster, and just enough of a client. Standard library only."""
import shutil
import socket
import subprocess
import time


def installed():
    return shutil.which("redis-server") is not None


class RedisError(Exception):
    pass


class Redis:
    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.file = self.socket.makefile("rb")

    def __call__(self, *words):
        parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        self.socket.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts))
        return self.reply()

    def reply(self):
        line = self.file.readline()
        if not line:
            raise OSError("redis closed the connection")
        kind, text = line[:1], line[1:-2]
        if kind == b"-":
            raise RedisError(text.decode())
        if kind == b"+":
            return text
        if kind == b":":
            return int(text)
        if kind == b"$":
            return None if text == b"-1" else self.file.read(int(text) + 2)[:-2]
        return [self.reply() for _ in range(int(text))]

    def close(self):
        self.file.close()
        self.socket.close()


def free_port(start):
    """One that is free together with that of the cluster's bus, 10,000 above."""
    for port in range(start, start + 5000):
        try:
            for number in (port, port + 10000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
            return port
        except OSError:
            continue
    raise RuntimeError("no free port for redis-server")


def wait_for(condition, what, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except (OSError, RedisError):
            pass
        time.sleep(0.05)
    raise RuntimeError(f"redis: {what} did not come about in {seconds} s")


class RedisServers:
    """`count` servers in one folder; a cluster in which each owns a part of the slots if there are several."""

    def __init__(self, folder, count, first_port):
        self.folder, self.cluster = folder, count > 1
        self.ports, self.processes = [], []
        for _ in range(count):
            first_port = free_port(first_port)
            self.ports.append(first_port)
            self.processes.append(None)
            first_port += 1
        try:
            for index in range(count):
                self.start(index)
            if self.cluster:
                self.join()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def start(self, index):
        port = self.ports[index]
        self.processes[index] = subprocess.Popen(
            ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
             "--dir", str(self.folder), "--cluster-enabled", "yes" if self.cluster else "no",
             "--cluster-config-file", f"nodes-{port}.conf", "--cluster-node-timeout", "1000",
             "--cluster-require-full-coverage", "no"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: self.ask(index, "PING") == b"PONG", f"an answer on port {port}")

    def join(self):
        count = len(self.ports)
        for index in range(count):
            first, end = index * 16384 // count, (index + 1) * 16384 // count
            self.ask(index, "CLUSTER", "ADDSLOTS", *range(first, end))
            self.ask(index, "CLUSTER", "SET-CONFIG-EPOCH", index + 1)
        for port in self.ports[1:]:
            self.ask(0, "CLUSTER", "MEET", "127.0.0.1", port)
        for index in range(count):
            wait_for(lambda node=index: b"cluster_state:ok" in self.ask(node, "CLUSTER", "INFO") and
                     len(self.ask(node, "CLUSTER", "SLOTS")) == count, "the cluster")

    def kill(self, index):
        if self.processes[index] is not None:
            self.processes[index].kill()
            self.processes[index].wait()
            self.processes[index] = None

    def close(self):
        for index in range(len(self.ports)):
            self.kill(index)

    def ask(self, index, *words):
        connection = Redis(self.ports[index])
        try:
            return connection(*words)
        finally:
            connection.close()

    def url(self):
        return "redis://" + ",".join(f"127.0.0.1:{port}" for port in self.ports)

    def owner_of_some_slot(self, source):
        """A node and one of its slots that has keys, at random."""
        for index in source.sample(range(len(self.ports)), len(self.ports)):
            if self.processes[index] is None:
                continue
            key = self.ask(index, "RANDOMKEY")
            if key is not None:
                return index, self.ask(index, "CLUSTER", "KEYSLOT", key)
        return None, None

    def move_slot(self, slot, origin, to, pause=0.0):
        """Moves a slot with all its keys as redis-cli does; for `pause` seconds it is between the two."""
        from_id, to_id = self.ask(origin, "CLUSTER", "MYID"), self.ask(to, "CLUSTER", "MYID")
        self.ask(to, "CLUSTER", "SETSLOT", slot, "IMPORTING", from_id)
        self.ask(origin, "CLUSTER", "SETSLOT", slot, "MIGRATING", to_id)
        moved = 0
        while keys := self.ask(origin, "CLUSTER", "GETKEYSINSLOT", slot, 10):
            self.ask(origin, "MIGRATE", "127.0.0.1", self.ports[to], "", 0, 5000, "KEYS", *keys)
            moved += len(keys)
            time.sleep(pause)
        for index in [to, origin] + [i for i in range(len(self.ports)) if i not in (to, origin)]:
            if self.processes[index] is not None:
                self.ask(index, "CLUSTER", "SETSLOT", slot, "NODE", to_id)
        return moved
