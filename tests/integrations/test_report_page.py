"""The report as a browser shows it: drawn, and with nothing asked of the network."""

import http.server
import os
import shutil
import subprocess
import threading

import numpy as np
import pytest
from made_results import result
from matplotlib.image import imread

from clext import Comparison
from clext.training.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
# What the browser asks for by itself.
OWN = ("google.com", "googleapis.com", "gvt1.com")
ACTS = (
    "<img src='http://example.com/picture'>"
    "<script>document.title = 'ran'; fetch('http://example.com/script')</script>"
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")


class Proxy(http.server.BaseHTTPRequestHandler):
    """Notes what is asked for, and gives nothing."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    do_POST = do_CONNECT = do_GET  # noqa: N815

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def visit(tmp_path, monkeypatch):
    """Opens a page; its elements as they are in the end, a picture of it, and what it asked for."""
    proxy = type("OwnProxy", (Proxy,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def visited(page):
        proxy.asked.clear()
        shot = tmp_path / "shot.png"
        command = [
            *(BROWSER, "--headless", "--disable-gpu", "--disable-background-networking"),
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            *(f"--proxy-server=http://127.0.0.1:{server.server_port}", "--window-size=1200,1600"),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", "--dump-dom"),
            page.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        hosts = {url.split("//")[-1].split("/")[0].split(":")[0] for url in proxy.asked}
        return done.stdout, imread(shot), {host for host in hosts if not host.endswith(OWN)}

    yield visited
    server.shutdown()


def test_a_page_is_drawn_and_what_it_names_does_nothing(visit, tmp_path):
    hostile = result(f"ewc{ACTS}")
    hostile.config["scenario"] = rf"$\frac{{{ACTS}"
    Comparison({f"mine{ACTS}": hostile, "si": result("si")}).save(tmp_path / "runs" / "both")
    elements, shot, asked = visit(write_report(tmp_path / "runs"))
    assert elements.count("<svg ") == 1 + 2 * 3
    assert "<td>si</td>" in elements
    assert "<title>Results in" in elements  # which no script has changed
    assert asked == set()
    ink = np.abs(shot[..., :3] - 1).max(axis=2) > 0.2
    assert 0.005 < ink.mean() < 0.5
    assert len(np.unique((shot[ink] * 255).astype(int), axis=0)) > 20  # the lines have colours
    # The same names as elements of a page would have acted: the test can fail.
    (tmp_path / "control.html").write_text(f"<title>Results in</title>{ACTS}")
    elements, _, asked = visit(tmp_path / "control.html")
    assert "<title>ran" in elements
    assert asked == {"example.com"}
