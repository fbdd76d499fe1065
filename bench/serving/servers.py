"""What the programs of this folder share: servers that they start and stop, metrics, requests. Standard library only."""
import contextlib
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def metric(text, name):
    """Sum of a counter or gauge over its labels; error if the server does not have it."""
    values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? ([0-9.eE+-]+)$", text, re.MULTILINE)
    if not values:
        sys.exit(f"the server has no metric {name}")
    return sum(map(float, values))


def scrape(url):
    with urllib.request.urlopen(url + "/metrics", timeout=30) as response:
        return response.read().decode()


def call(url, body=None, api_key=None):
    """The JSON object that a GET, or with a body a POST, is answered with; ends the program where there is none."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        sys.exit(f"{url}: status {error.code}: {error.read().decode(errors='replace')[:300]}")
    except OSError as error:
        sys.exit(f"{url}: {error}; is the server running?")


class NotStarted(Exception):
    """A server that ended before it served; its own message is on stderr."""


@contextlib.contextmanager
def kvant_server(program, model, *arguments, log=None):
    """`kvant serve` on a free port: what it says of itself, an object with "url". `log`: a file for its stderr."""
    command = [str(program), "serve", str(model), "--port", "0", "--json", *map(str, arguments)]
    print("$", " ".join(command), file=sys.stderr)
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        started = json.loads(server.stdout.readline() or "{}")
        if "url" not in started:
            raise NotStarted(f"kvant serve did not start (exit code {server.wait()})")
        yield started | {"pid": server.pid}
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def other_server(command, port, log):
    """Another engine's server, ready when its /health says 200: its URL."""
    print("$", " ".join(map(str, command)), file=sys.stderr)
    server = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise NotStarted(f"{command[0]} did not start (exit code {server.returncode})")
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(url + "/health", timeout=5):
                    break
            time.sleep(0.1)
        else:
            raise NotStarted(f"{command[0]} is not ready after a minute")
        yield url
    finally:
        server.terminate()
        server.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def bench(program, url, *arguments):
    """The report of `kvant bench serve` against `url`."""
    command = [str(program), "bench", "serve", url, "--json", "--quiet", *map(str, arguments)]
    print("$", " ".join(command), file=sys.stderr)
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
