#!/usr/bin/env python3
"""Runs docs/examples/nginx.conf in front of `kvant serve` and asks it over TLS.

Usage: nginx_test.py KVANT MODEL NGINX_CONF

Exits with 77 (skipped) if nginx, openssl or the model is not there.
"""
import http.client
import json
import pathlib
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until(condition, seconds: float = 20) -> None:
    end = time.time() + seconds
    while not condition():
        if time.time() > end:
            raise TimeoutError("what the test waits for does not come")
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def check(connection_to, load) -> None:
    connection = connection_to()
    connection.request("GET", "/v1/models")
    models = json.loads(connection.getresponse().read())
    name = models["data"][0]["id"]

    body = {"model": name, "prompt": "Once upon a time", "max_tokens": 40, "stream": True, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == 200, response.status
    arrivals = []
    while line := response.readline():
        if line.startswith(b"data: "):
            arrivals.append(time.time())
            last = line
    assert last == b"data: [DONE]\n", last
    assert len(arrivals) > 20, len(arrivals)
    assert arrivals[-1] - arrivals[0] > 0.02, "the stream came at once: it was buffered"

    connection.request("POST", "/v1/completions", json.dumps({"prompt": "x" * (9 << 20)}), headers)
    assert connection.getresponse().status == 413

    leaving = connection_to()
    leaving.request("POST", "/v1/completions", json.dumps({**body, "max_tokens": 1900}), headers)
    leaving.getresponse().readline()
    assert load() == 1
    leaving.sock.close() if leaving.sock else None
    leaving.close()
    wait_until(lambda: load() == 0)


def main() -> None:
    kvant, model, conf = sys.argv[1:4]
    nginx = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if not nginx or not shutil.which("openssl") or not pathlib.Path(model).exists():
        print("skipped: needs nginx, openssl and the model smollm2")
        sys.exit(77)
    server = subprocess.Popen([kvant, "serve", model, "--port", "0", "--json", "--max-model-len", "2048", "--quiet"],
                              stdout=subprocess.PIPE, text=True)
    proxy = None
    with tempfile.TemporaryDirectory() as name:
        try:
            port = json.loads(server.stdout.readline())["port"]
            folder, tls_port = pathlib.Path(name), free_port()
            subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
                            "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "key.pem",
                            "-out", folder / "cert.pem"], check=True, capture_output=True)
            text = pathlib.Path(conf).read_text(encoding="utf-8")
            text = text.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("listen 8443", f"listen {tls_port}")
            (folder / "nginx.conf").write_text(text, encoding="utf-8")
            proxy = subprocess.Popen([nginx, "-p", folder, "-c", "nginx.conf"])
            wait_until(lambda: listens(tls_port))
            context = ssl.create_default_context(cafile=folder / "cert.pem")

            def load() -> int:
                plain = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                plain.request("GET", "/load")
                return json.loads(plain.getresponse().read())["server_load"]

            check(lambda: http.client.HTTPSConnection("localhost", tls_port, context=context, timeout=60), load)
        finally:
            for process in filter(None, [proxy, server]):
                process.terminate()
                process.wait(timeout=60)
    assert server.returncode == 0, server.returncode
    print("passed")


if __name__ == "__main__":
    main()
