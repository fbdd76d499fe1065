#!/usr/bin/env python3
"""Opens the dashboard in headless Chromium, asks the chat something, and tells what the page shows.

Usage: browse_dashboard.py URL [--question TEXT] [--seconds N] [--screenshots FOLDER]

Speaks the DevTools protocol over a pipe (file descriptors 3 and 4), so that it needs nothing but Chromium and
python3. Prints one JSON object: tiles, samples, chat, errors of the page, the addresses that it asked for. With
--screenshots it also writes desktop and phone pictures, light and dark.
"""
import argparse
import base64
import json
import os
import pathlib
import select
import shutil
import subprocess
import tempfile
import time

SIZES = {"desktop": (1400, 1000), "phone": (390, 844)}


class Browser:
    def __init__(self, profile: str) -> None:
        to_read, to_write = os.pipe()
        from_read, from_write = os.pipe()
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            raise SystemExit("chromium is not installed")

        def take_pipes() -> None:
            # Both numbers may be in use by the pipes themselves.
            first, second = os.dup(to_read), os.dup(from_write)
            os.dup2(first, 3)
            os.dup2(second, 4)

        self.process = subprocess.Popen(
            [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
             "--disable-dev-shm-usage", "--disable-background-networking", f"--user-data-dir={profile}",
             "about:blank"],
            preexec_fn=take_pipes, close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(from_write)
        self.out, self.inn = to_write, from_read
        self.buffer, self.last, self.session = b"", 0, None
        self.events = []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(t for t in targets if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def read(self, timeout: float) -> dict | None:
        give_up = time.time() + timeout
        while b"\0" not in self.buffer:
            if not select.select([self.inn], [], [], max(0, give_up - time.time()))[0]:
                return None
            data = os.read(self.inn, 1 << 16)
            if not data:
                raise SystemExit("chromium has ended")
            self.buffer += data
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **parameters) -> dict:
        self.last += 1
        message = {"id": self.last, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        give_up = time.time() + 60
        while time.time() < give_up:
            answer = self.read(60)
            if answer is None:
                break
            if answer.get("id") == self.last:
                if "error" in answer:
                    raise SystemExit(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)
        raise SystemExit(f"chromium does not answer {method}")

    def evaluate(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise SystemExit(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float) -> bool:
        give_up = time.time() + seconds
        while time.time() < give_up:
            if self.evaluate(expression):
                return True
            time.sleep(0.2)
        return False

    def resize(self, width: int, height: int, dark: bool) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def picture(self, path: pathlib.Path) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)


def look(browser: Browser, options: argparse.Namespace) -> dict:
    browser.resize(*SIZES["desktop"], dark=False)
    browser.call("Page.navigate", url=options.url)
    alive = browser.wait("Number(document.documentElement?.dataset.samples) >= 3", 30)
    if options.question:
        browser.evaluate(f"document.getElementById('input').value = {json.dumps(options.question)};"
                         "document.getElementById('form').requestSubmit()")
        browser.wait("document.querySelector('#log .note, #log .error') !== null", 120)
    time.sleep(options.seconds)
    found = {
        "alive": alive,
        "state": browser.evaluate("document.getElementById('state').textContent"),
        "samples": browser.evaluate("Number(document.documentElement.dataset.samples)"),
        "tiles": browser.evaluate("Object.fromEntries([...document.querySelectorAll('.tile')].map(t => "
                                  "[t.querySelector('.name').textContent, t.querySelector('.value').textContent]))"),
        "charts": browser.evaluate("[...document.querySelectorAll('.plot > svg')].map(s => s.getAttribute('aria-label'))"),
        "chat": browser.evaluate("[...document.querySelectorAll('#log p')].map(p => [p.className, p.textContent])"),
        "table": browser.evaluate("[...document.querySelectorAll('tbody tr')].map(r => [...r.cells].map(c => c.textContent))"),
        # Nothing sticks out at the side of a phone, and what is pressed is large enough for a thumb.
        "phone_overflow": 0,
        "small_targets": [],
    }
    browser.resize(*SIZES["phone"], dark=False)
    time.sleep(1.2)
    found["phone_overflow"] = browser.evaluate("document.documentElement.scrollWidth - innerWidth")
    found["small_targets"] = browser.evaluate("[...document.querySelectorAll('button, textarea')].filter(b => "
                                              "b.getBoundingClientRect().height < 40).map(b => b.id)")
    # Every control has a name for those who do not see it.
    found["nameless"] = browser.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea')].filter(c => !c.labels?.length && "
        "!c.textContent.trim() && !c.getAttribute('aria-label')).map(c => c.id)")
    if options.screenshots:
        folder = pathlib.Path(options.screenshots)
        folder.mkdir(parents=True, exist_ok=True)
        for name, (width, height) in SIZES.items():
            for dark in (False, True):
                browser.resize(width, height, dark)
                time.sleep(1.2)
                browser.picture(folder / f"{name}-{'dark' if dark else 'light'}.png")
    browser.evaluate("1")
    methods = {"Runtime.exceptionThrown", "Log.entryAdded"}
    found["errors"] = [json.dumps(e["params"])[:500] for e in browser.events if e.get("method") in methods]
    found["asked"] = sorted({e["params"]["request"]["url"].split("?")[0] for e in browser.events
                             if e.get("method") == "Network.requestWillBeSent"})
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--question", default="")
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--screenshots", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvant_browser_") as profile:
        browser = Browser(profile)
        try:
            print(json.dumps(look(browser, options)))
        finally:
            browser.close()


if __name__ == "__main__":
    main()
