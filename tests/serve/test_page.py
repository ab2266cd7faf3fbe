"""The page as people and programs meet it: the verb in a process of its own, a browser without a screen, Gradio's client."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest
import soundfile

from vaura.command import CONFIGS
from vaura.drawing import VideoToAudio
from vaura.errors import InputError
from vaura.serve.gradio_door import POLICY, open_gradio

SHARED = Path(os.environ.get("VAURA_SHARED", Path(__file__).parents[3] / "shared"))
MAIN = CONFIGS.parent / "main.py"
SWITCHES = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


def test_without_gradio_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"pip install 'vaura\[serve\]'"):
        open_gradio(tmp_path)


@pytest.fixture(scope="module")
def page(tiny, tmp_path_factory):
    """The address of a page for the tiny experiment, and the folder of its temporary files."""
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'vaura[serve]'")
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"config=serve experiment_path={tiny.folder} port={port} folder={folder} upload_mb=2 seconds=7 samples=3"
    log = folder / "log.txt"
    with log.open("w") as output:
        words = [sys.executable, str(MAIN), *command.split(), "device=cpu", "precision=float32", "engine=torch"]
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
    ends = time.monotonic() + 120
    while "page: " not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < ends, log.read_text()
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}", folder
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, log.read_text()
    assert "Traceback" not in log.read_text()
    assert [path.name for path in folder.iterdir()] == ["log.txt"]  # whatever people gave or got is gone


@pytest.fixture(scope="module")
def client(page):
    from gradio_client import Client

    return Client(page[0], verbose=False, analytics_enabled=False)


def status(address):
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_programs_get_what_the_library_makes(client, tiny):
    from gradio_client import handle_file

    (listed,) = client.predict(api_name="/models")
    assert listed["model"] == "experiment"
    assert "last" in listed["checkpoints"]
    files, report = client.predict(
        video=handle_file(str(tiny.videos[0])), duration=0.64, samples=2, seed=7, temperature=0.8, api_name="/generate"
    )
    stem = tiny.videos[0].stem
    assert [Path(file).name for file in files] == [
        f"{stem}_{kind}.{suffix}" for kind in ("1", "2", "original", "codec") for suffix in ("mp4", "wav")
    ]
    assert report["settings"]["seed"] == 7
    assert report["settings"]["samples"] == 2
    assert [heard["kind"] for heard in report["heard"]] == ["original", "sample", "sample", "codec"]
    model = VideoToAudio(tiny.folder, device="cpu", precision="float32", engine="torch")
    from vaura.lm.sampling import Sampler

    truth = model.generate(tiny.videos[0], 0.64, seed=7, sampler=Sampler(0.8, model.how.sampler.top_k, model.how.sampler.top_p))
    assert abs(soundfile.read(files[1])[0] - truth.wav[0].clamp(-1, 1).numpy()).max() < 2 / 32768


def test_programs_are_told_in_one_sentence(client, tiny, tmp_path):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    video = handle_file(str(tiny.videos[0]))
    for given, said in (
        ({"video": handle_file(str(broken))}, r"^broken\.mp4 is not a video or sound file that can be read"),
        ({"video": video, "samples": 4}, "4 samples are asked for, and 3 are the most"),
        ({"video": video, "model": "x"}, "there is no model 'x' here"),
        ({"video": video, "start": 9}, "lasts 1.92 s, so a sound cannot start at 9 s"),
    ):
        with pytest.raises(AppError, match=said) as told:
            client.predict(**given, api_name="/generate")
        assert "Traceback" not in str(told.value)
        assert "/vaura-serve-" not in str(told.value)


def test_nothing_but_what_was_made_is_served(page, tiny):
    address, folder = page
    for path in ("/etc/hostname", tiny.folder / "config.yaml", tiny.videos[0], folder / "log.txt", MAIN):
        assert status(f"{address}/gradio_api/file={quote(str(path))}") == 403
    with urllib.request.urlopen(address, timeout=10) as answer:
        assert answer.headers["content-security-policy"] == POLICY
        assert "fonts.googleapis" not in answer.read().decode()


def test_more_than_may_be_uploaded_is_not_taken(page):
    boundary = "x" * 20
    body = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'.encode()
    body += bytes(2_100_000) + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{page[0]}/gradio_api/upload", body, headers), timeout=10)
    assert refused.value.code == 413


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("there is no chromium to look at the page with")
    with sync.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=SWITCHES.split())
        yield opened
        opened.close()


class Visit:
    """A visitor who notes what goes wrong in the browser, and whom it asks."""

    def __init__(self, browser, address, **context):
        self.page = browser.new_context(**{"viewport": {"width": 1360, "height": 900}} | context).new_page()
        self.wrong, self.asked = [], []
        self.page.on("console", lambda said: self.wrong.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("#va-make")

    def give(self, video):
        self.page.set_input_files("#va-video input[type=file]", str(video))
        self.page.wait_for_selector(".va-facts, .va-wrong")

    def make(self):
        self.page.click("#va-make")
        self.page.wait_for_selector(".va-summary, #va-state .va-wrong", timeout=60_000)

    def elsewhere(self, address):
        return [url for url in self.asked if not url.startswith((address, "data:", "blob:"))]


def test_a_visitor_uploads_listens_and_is_told_what_is_wrong(page, browser, world_video, tmp_path):
    address, _ = page
    real = sorted((SHARED / "media/specvqgan/vas/videos/dog").glob("*.mp4"))
    visit = Visit(browser, address)
    tab = visit.page
    visit.give(real[0] if real else world_video)
    assert "with its own sound" in tab.inner_text(".va-facts")
    tab.get_by_label("number input for Samples").fill("3")
    tab.click("#va-make")
    tab.wait_for_selector("#va-stage video")  # it is longer than a window: it is heard while the rest is made
    tab.wait_for_function("document.querySelector('#va-stage').dataset.heard > 0")
    tab.wait_for_selector(".va-summary", timeout=60_000)
    titles = ["Sample 1", "Original", "Sample 2", "Original through the codec", "Sample 3"]
    tab.wait_for_function(f"document.querySelectorAll('#va-results .va-card').length >= {len(titles)}")
    assert tab.locator("#va-results h3").all_inner_texts() == titles
    assert len(set(tab.locator("#va-results video").evaluate_all("them => them.map(it => it.src)"))) == len(titles)
    assert tab.locator("#va-results img").evaluate_all("them => them.every(it => it.naturalWidth > 100)")

    film = tab.locator(".va-sample video").first
    tab.click(".va-sample .va-play >> nth=0")
    tab.wait_for_function("document.querySelector('.va-sample video').currentTime > 0.3")
    assert film.evaluate("it => it.readyState") >= 3
    assert tab.locator("#va-stage video").evaluate("it => it.paused")  # one at a time
    tab.wait_for_function("parseFloat(document.querySelector('.va-sample .va-head').style.left) > 2")
    tab.click(".va-original .va-play")
    tab.wait_for_function("document.querySelector('.va-original video').currentTime > 0.1")
    assert film.evaluate("it => it.paused")

    with tab.expect_download() as saved:
        tab.click(".va-sample .va-links a >> nth=0")
    assert saved.value.suggested_filename.endswith("_1.wav")
    assert soundfile.info(saved.value.path()).duration == pytest.approx(film.evaluate("it => it.duration"), abs=0.1)
    tab.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 20_000
    tab.click("text=Same again")
    written = tab.locator("#va-settings textarea")
    settings = json.loads(written.input_value())
    assert settings["seed"] == 0
    written.fill(json.dumps(settings | {"seed": 41}))
    tab.click("text=Take these settings")
    tab.wait_for_selector("#va-state .va-calm")
    assert tab.get_by_label("Seed").first.input_value() == "41"

    broken = tmp_path / "a broken film.mp4"
    broken.write_bytes(b"no film")
    tab.click("#va-video button[aria-label='Clear']")
    visit.give(broken)
    told = tab.inner_text(".va-wrong >> nth=0")
    assert re.match(r"A.broken.film\.mp4 is not a video or sound file that can be read", told)
    assert "Traceback" not in tab.content()
    assert visit.wrong == []
    assert visit.elsewhere(address) == []


def test_two_at_once_wait_for_each_other_and_see_nothing_of_each_other(page, browser, tiny, tmp_path):
    address, _ = page
    one, other = Visit(browser, address), Visit(browser, address, color_scheme="dark")
    for visit in (one, other):
        visit.page.click("#va-make")  # without a video
        visit.page.wait_for_selector("#va-state .va-wrong")
    text = tmp_path / "text.mp4"
    text.write_text("no film\n" * 100)
    one.give(text)
    assert "is not a video" in one.page.inner_text("#va-ask .va-wrong")
    one.page.click("#va-video button[aria-label='Clear'] >> nth=-1")
    one.page.wait_for_selector("#va-ask .va-wrong", state="detached")
    one.give(tiny.videos[0])
    assert other.page.locator("#va-ask .va-facts").count() == 0
    other.page.click("#va-examples .thumbnail-item")
    other.page.wait_for_selector(".va-facts")

    one.page.get_by_label("Duration").fill("0.64")
    one.page.click("#va-make")
    one.page.wait_for_selector("#va-state [role=progressbar]")
    other.page.click("#va-make")
    other.page.wait_for_selector(".va-summary", timeout=60_000)
    one.page.wait_for_selector(".va-summary", timeout=60_000)
    seen = [visit.page.locator("#va-results video").evaluate_all("them => them.map(it => it.src)") for visit in (one, other)]
    assert [len(films) for films in seen] == [3, 3]
    assert {film.split("/")[-2] for film in seen[0]}.isdisjoint(film.split("/")[-2] for film in seen[1])

    other.page.get_by_label("number input for Samples").fill("3")
    other.page.click("#va-again")
    other.page.click("#va-stop")
    other.page.wait_for_selector("#va-state :text('Stopped')")
    other.page.wait_for_selector("#va-make")
    assert one.page.locator("#va-results .va-card").count() == 3
    for visit in (one, other):
        assert visit.wrong == []
        assert visit.elsewhere(address) == []


def test_a_telephone_needs_no_sideways_scrolling_and_every_control_has_a_name(page, browser):
    visit = Visit(browser, page[0], viewport={"width": 390, "height": 800}, has_touch=True)
    visit.page.click("text=How it is drawn")
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 390
    assert visit.page.locator("#va-video button[aria-label='Capture from camera']").is_visible()  # one may record
    nameless = """them => them.filter(it => it.offsetParent && !it.innerText.trim() && !it.title && !it.labels?.length
        && !it.getAttribute("aria-label") && !it.getAttribute("aria-labelledby")).map(it => it.outerHTML)"""
    assert visit.page.locator("button, input, select, textarea").evaluate_all(nameless) == []
