"""The front page and the documentation: their Python does what it says, and their numbers are the results'."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from forks import forks

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


ONE_SCRIPT = {"theory.md"}  # pages that say that their blocks go on from each other


def blocks(page: Path) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return ["\n".join(found)] if page.name in ONE_SCRIPT else found


WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.fixture(scope="module")
def run_block() -> Iterator[Callable[..., str]]:
    with forks("scipy.optimize, torch._dynamo, transformers.modeling_utils") as run:  # nothing of this package
        yield run


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=[page.name for page in WITH_CODE])
def test_every_python_block_runs_as_it_stands(page: Path, run_block: Callable[..., str], tmp_path: Path) -> None:
    printed = [run_block(block, tmp_path) for block in blocks(page)]
    if page.name == "README.md":
        assert printed[0].startswith("def read_json(path):")
        assert len(printed[0]) > 100


def test_the_front_page_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert len([line for line in blocks(ROOT / "README.md")[0].splitlines() if line.strip()]) <= 5


def test_numbers_are_those_of_the_result_files() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "render_numbers.py"), "--check"]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return folder


def address(page: Path) -> str:
    return "index.html" if page.stem == "index" else f"{page.stem}/index.html"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(site: Path) -> None:
    for page in PAGES[1:]:
        assert (site / address(page)).is_file(), page


class Site(SimpleHTTPRequestHandler):
    """Serves a folder, and takes what a page of it reports."""

    reports: queue.Queue[bytes] = queue.Queue()

    def do_POST(self) -> None:
        self.reports.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


PROBE = """<!doctype html><body><script>
const pages = PAGES, report = {titles: {}, images: {}, found: 0};
const open = (url) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.width = 1300; frame.height = 900; frame.src = url; frame.onload = () => done(frame);
  document.body.append(frame);
});
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
(async () => {
  for (const page of pages) {
    const frame = await open(page);
    report.titles[page] = frame.contentDocument.querySelector("h1")?.innerText || "";
    for (const image of frame.contentDocument.querySelectorAll("article img"))
      report.images[image.getAttribute("src")] = image.naturalWidth;
    frame.remove();
  }
  const frame = await open("index.html?q=padding");
  for (let i = 0; i < 100 && !report.found; i++) {
    await wait(100);
    report.found = frame.contentDocument.querySelectorAll(".md-search-result__item").length;
  }
  await fetch("report", {method: "POST", body: JSON.stringify(report)});
})();
</script></body>"""


@pytest.mark.slow
def test_pages_open_search_and_show_their_figures(site: Path, tmp_path: Path) -> None:
    names = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium is installed; that the site builds is tested above")
    pages = [address(page) for page in PAGES[1:]]
    (site / "probe.html").write_text(PROBE.replace("PAGES", json.dumps(pages)), encoding="utf-8")
    root = ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
    options = ["--headless", "--disable-gpu", f"--user-data-dir={tmp_path}", "--remote-debugging-port=0"]
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Site, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        probe = f"http://127.0.0.1:{server.server_port}/probe.html"
        with subprocess.Popen([browser, *root, *options, probe], stderr=subprocess.DEVNULL) as shown:
            try:
                report = json.loads(Site.reports.get(timeout=200))
            finally:
                shown.terminate()
                server.shutdown()
    assert list(report["titles"]) == pages
    assert all(report["titles"].values()), report["titles"]
    assert report["images"]
    assert all(width > 0 for width in report["images"].values()), report["images"]
    assert report["found"] > 0
