"""Drives a headless Chromium by the DevTools protocol, over two pipes: no other library is needed.

    python tests/chromium.py "index.html#step-33" picture.png    # a picture of a page

Reference: https://chromedevtools.github.io/devtools-protocol/ and, of the pipes,
`--remote-debugging-pipe`: JSON, each message ended by a zero byte.
"""

import argparse
import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SWITCHES = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)
SECONDS = 60  # for an answer
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35, "Tab": 9}


def find_chromium():
    """Returns the path of Chromium, or None. `CHROMIUM` in the environment comes first."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """A browser with one tab; use it with `with`.

    Attributes:
        events: list of `(method, parameters)`: what the browser said without being asked.
    """

    def __init__(self, executable, folder):
        self.events, self.session, self._rest, self._sent = [], None, b"", 0
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        os.close(theirs_in)
        os.close(theirs_out)

        def place_pipes():
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self._process = subprocess.Popen(
            [executable, *SWITCHES, f"--user-data-dir={folder}", "about:blank"],
            preexec_fn=place_pipes,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in ends:
            os.close(end)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(timeout=SECONDS)
        os.close(self._out)
        os.close(self._in)

    def send(self, method, **parameters):
        """Sends a command, and returns its result."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._sent:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append((answer["method"], answer["params"]))

    def wait(self, method):
        """Waits for an event that did not happen yet."""
        while True:
            answer = self._receive()
            self.events.append((answer["method"], answer["params"]))
            if answer["method"] == method:
                return

    def open(self, url):
        """Opens an address, and forgets the events before."""
        self.events.clear()
        self.send("Page.navigate", url=url)
        if "Page.loadEventFired" not in [method for method, _ in self.events]:
            self.wait("Page.loadEventFired")

    def resize(self, width, height=800):
        """Gives the window a size, as that of a phone."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def take_picture(self):
        """Returns what is in the window, as an image of Pillow's."""
        data = self.send("Page.captureScreenshot")["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")

    def evaluate(self, expression):
        """Returns the value of an expression of JavaScript; a promise is waited for."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key):
        """Presses a key of `KEYS`, as a person would."""
        for kind in ("rawKeyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=KEYS[key],
            )

    def prefer(self, **features):
        """Sets what the user prefers: `color_scheme="dark"`, `reduced_motion="reduce"`."""
        wanted = [
            {"name": f"prefers-{name.replace('_', '-')}", "value": value}
            for name, value in features.items()
        ]
        self.send("Emulation.setEmulatedMedia", features=wanted)

    def _receive(self):
        end = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(end - time.monotonic(), 0))
            assert ready, f"Chromium did not answer for {SECONDS} s."
            new = os.read(self._in, 1 << 20)
            assert new, "Chromium ended."
            self._rest += new
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


def get_parser():
    parser = argparse.ArgumentParser(description="Writes a picture of a page as a PNG file.")
    parser.add_argument("page", help="file, with #NAME the part of it")
    parser.add_argument("out", help="file for the picture")
    parser.add_argument("--width", type=int, default=1400, help="of the window")
    parser.add_argument("--height", type=int, default=790, help="of the window")
    parser.add_argument("--dark", action="store_true", help="as for who prefers dark pages")
    return parser


def main():
    args = get_parser().parse_args()
    path, _, part = args.page.partition("#")
    with tempfile.TemporaryDirectory() as folder, Chromium(find_chromium(), folder) as browser:
        browser.resize(args.width, args.height)
        browser.prefer(color_scheme="dark" if args.dark else "light")
        browser.open(f"{Path(path).resolve().as_uri()}#{part}")
        browser.take_picture().save(args.out, optimize=True)


if __name__ == "__main__":
    main()
