import base64
import io
import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from vaura import report
from vaura.media.mux import write_video
from vaura.report import Example, Figure, print_table, read_curves, write_report

RATE = 16_000
STRUCK = (0.25, 0.70)
EVIL = "</script><script>alert('&')</script>"
VOID = {"meta", "link", "input", "img", "br"}


class Page(HTMLParser):
    """Checks that elements nest, and keeps them with their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag, kind=""):
        return [found for name, found in self.elements if name == tag and kind in ["", *(found.get("class") or "").split()]]

    def places(self, tag, kind):
        """Where the marks outside the legend lie, as shares of the width."""
        styles = [found.get("style", "") for found in self.all(tag, kind)]
        return [float(found[1]) / 100 for style in styles if (found := re.search(r"left:([\d.]+)%", style))]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two videos of a second: bursts of noise where it is struck, and silence with one burst at 0.5 s."""
    folder = tmp_path_factory.mktemp("clips")
    noise = 0.5 * torch.randn(RATE // 100, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    frames = torch.full((25, 3, 64, 64), 90, dtype=torch.uint8)
    for name, times in (("generated", STRUCK), ("true", (0.5,))):
        wav = torch.zeros(1, RATE)
        for time in times:
            wav[0, round(time * RATE) :][: len(noise)] = noise
        write_video(folder / f"{name}.mp4", frames, 25, wav, RATE)
    return folder


def write(path, **changed):
    given = {
        "title": "a title", "summary": "a summary", "figures": [], "examples": [], "curves": {},
        "seconds": {}, "config": "", "versions": {},
    }  # fmt: skip
    write_report(path, **(given | changed))
    return Page(path.read_text("utf-8"))


def example(clips, **changed):
    impacts = [{"time": time, "material": name, "loudness": 0.5} for time, name in zip(STRUCK, ("metal", "jelly"), strict=True)]
    given = {
        "id": "clip-7", "generated": clips / "generated.mp4", "true": clips / "true.mp4",
        "impacts": impacts, "found": [0.26, 0.9], "note": "a note",
    }  # fmt: skip
    return Example(**(given | changed))


def inlined(address, kind):
    head, _, data = address.partition(",")
    assert head == f"data:{kind};base64"
    return base64.b64decode(data, validate=True)


def test_the_videos_lie_in_the_page_byte_for_byte(tmp_path, clips):
    page = write(tmp_path / "report" / "index.html", examples=[example(clips)])
    videos = [inlined(found["src"], "video/mp4") for found in page.all("video")]
    assert videos == [(clips / name).read_bytes() for name in ("generated.mp4", "true.mp4")]
    assert all("controls" in found and "small" in found["class"] for found in page.all("video"))
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["index.html"]


def test_nothing_is_fetched_from_elsewhere(tmp_path, clips):
    path = tmp_path / "index.html"
    page = write(path, examples=[example(clips)], curves={"val/loss": [(0, 1.0), (1, 2.0)]})
    addresses = [value for _, found in page.elements for key, value in found.items() if key in ("src", "href", "xlink:href")]
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert not re.search(r"url\(|@import|https?://", path.read_text("utf-8"))
    policy = next(found["content"] for found in page.all("meta") if "http-equiv" in found)
    assert "default-src 'none'" in policy


def test_whatever_is_given_is_shown_and_never_obeyed(tmp_path, clips):
    page = write(
        tmp_path / "index.html",
        title=f"title {EVIL}",
        summary=f"first {EVIL}\n\nsecond",
        figures=[Figure(f"figure {EVIL}", 1.0, None, None, f"wanted {EVIL}")],
        examples=[
            example(clips, id=f"id {EVIL}", note=f"note {EVIL}", impacts=[{"time": 0.1, "material": EVIL, "loudness": 1.0}]),
            example(clips, id=f"lost {EVIL}", generated=Path(f"/nowhere/{EVIL}.mp4")),
        ],
        curves={f"train/curve {EVIL}": [(0, 1.0), (1, 2.0)]},
        seconds={f"stage {EVIL}": 1.0},
        config=f"config: {EVIL}",
        versions={f"package {EVIL}": f"version {EVIL}"},
    )
    assert len(page.all("script")) == 1
    shown = ("title", "first", "figure", "wanted", "id", "note", "lost", "curve", "stage", "config:", "package", "version")
    assert [word for word in shown if f"{word} {EVIL}" not in page.text] == []
    assert f"{EVIL} struck" in page.text
    assert f"/nowhere/{EVIL}.mp4" in page.text


def test_marks_and_spectrogram_agree_on_when_it_sounded(tmp_path, clips):
    page = write(tmp_path / "index.html", examples=[example(clips)])
    with av.open(io.BytesIO(inlined(page.all("img")[0]["src"], "image/png"))) as file:
        picture = next(file.decode(video=0)).to_ndarray(format="rgb24").astype(float)
    assert picture.shape == (report.BANDS, report.COLUMNS, 3)
    bright = picture.sum((0, 2)) > (picture.sum((0, 2)).max() + picture.sum((0, 2)).min()) / 2
    edges = np.flatnonzero(np.diff(bright.astype(int), prepend=0, append=0))
    middles = (edges[::2] + edges[1::2]) / 2 / report.COLUMNS  # of the bursts, which last 10 ms
    assert middles == pytest.approx([time + 0.005 for time in STRUCK], abs=0.004)
    assert page.places("i", "impact") == pytest.approx([*STRUCK, *STRUCK], abs=1e-4)  # on both spectrograms
    assert page.places("svg", "found") == pytest.approx([0.26, 0.9], abs=1e-4)  # on the generated one alone
    assert page.places("svg", "astray") == pytest.approx([0.9], abs=1e-4)
    assert "1 of 2 impacts heard, 1 more onset" in page.text
    colours = [re.search(r"--c:(#\w+)", found["style"])[1] for found in page.all("i", "impact")]
    assert len(set(colours)) == 2
    assert "metal struck" in page.text
    assert "jelly struck" in page.text


def test_a_tone_lies_in_the_row_of_its_pitch():
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(RATE) / RATE)
    levels = report.spectrogram(tone)
    low, kilohertz, high = 40 * 3 / 200, 15.0, 15 + 27 * math.log(8) / math.log(6.4)  # Slaney's mels
    band = (kilohertz - low) / (high - low) * (report.BANDS + 1) - 1
    assert (report.BANDS - 1 - levels.argmax(0))[20:-20] == pytest.approx(band, abs=1)
    assert levels.max() == 255
    assert not report.spectrogram(torch.zeros(RATE)).any()


def test_lightness_rises_evenly_along_the_colour_map():
    light = report.colour_map() / 255
    linear = np.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    lightness = np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)  # CIE 1976 L*
    assert lightness[0] < 10
    assert lightness[-1] > 90
    assert np.diff(lightness[::8]).min() > 0
    assert np.corrcoef(lightness, np.arange(256))[0, 1] > 0.995


def test_png_pixels_come_back():
    rng = np.random.default_rng(0)
    pixels, palette = rng.integers(0, 256, (5, 9), np.uint8), rng.integers(0, 256, (256, 3), np.uint8)
    with av.open(io.BytesIO(report.png(pixels, palette))) as file:
        assert np.array_equal(next(file.decode(video=0)).to_ndarray(format="rgb24"), palette[pixels])


def test_a_video_that_cannot_be_read_leaves_the_rest(tmp_path, clips):
    silent, broken = tmp_path / "silent.mp4", tmp_path / "broken.mp4"
    write_video(silent, torch.zeros(5, 3, 32, 32, dtype=torch.uint8), 25)
    broken.write_bytes((clips / "true.mp4").read_bytes()[:300])
    page = write(tmp_path / "index.html", examples=[example(clips, generated=silent), example(clips, true=broken)])
    assert f"{silent} has no sound" in page.text
    assert str(broken) in page.text
    kept = [inlined(found["src"], "video/mp4") for found in page.all("video")]
    assert kept == [(clips / name).read_bytes() for name in ("true.mp4", "generated.mp4")]


def test_an_empty_experiment_says_so(tmp_path):
    page = write(tmp_path / "index.html", curves={"epoch": [(0, 0.0)], "train/loss": [(0, math.nan)]})
    for sentence in (
        "Nothing was measured.",
        "There are no examples to show.",
        "No curves were logged.",
        "No times were kept.",
    ):
        assert sentence in page.text


@pytest.mark.parametrize(
    ("value", "wanted", "met"),
    [
        (0.9, ">= 0.90", True), (0.8999, ">= 0.90", False), (0.9, "> .9", False), (0.2, "<=0.3", True),
        (0.3, "< 3e-1", False), (math.nan, "<= 1", False), (0.5, "", None), (0.5, "about a half", None),
    ],
)  # fmt: skip
def test_a_wanted_bound_is_kept_or_not(value, wanted, met):
    assert Figure("f", value, None, None, wanted).met is met


def test_bars_run_from_chance_to_ceiling(tmp_path):
    figures = [
        Figure("higher is better", 0.6, 1.0, 0.2, ">= 0.8"),
        Figure("lower is better", 3.0, 0.0, 4.0),
        Figure("worse than chance", 0.1, 1.0, 0.2),
        Figure("no ceiling", 0.6, None, 0.2),
    ]
    page = write(tmp_path / "index.html", figures=figures)
    fills = [float(found["style"][6:-1]) for tag, found in page.elements if tag == "i" and "width" in found.get("style", "")]
    assert fills == pytest.approx([50, 25, 0])
    assert page.places("b", "") == pytest.approx([0.75])
    assert [found["aria-label"][:3] for found in page.all("div", "bar")] == ["50%", "25%", "0% "]
    assert "✗ missed" in page.text
    assert "✓ met" not in page.text


def test_curves_cross_the_lines_of_their_values(tmp_path):
    page = write(tmp_path / "index.html", curves={"val/loss": [(0, 3.0), (100, 1.0), (200, 2.0)]})
    points = [tuple(map(float, point.split(","))) for point in page.all("polyline")[0]["points"].split()]
    heights = sorted({float(found["y1"]) for found in page.all("line")})
    assert [points[0][1], points[2][1], points[1][1]] == pytest.approx([heights[0], sum(heights) / len(heights), heights[-1]])
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0])
    assert page.all("svg", "chart")[0]["aria-label"] == "loss: val from 3.000 to 2.000 at step 200"


def test_curves_of_one_quantity_share_a_chart_and_losses_come_first(tmp_path):
    names = [
        "train/gradient_norm",
        "lr-AdamW",
        *(f"{split}/loss_codebook_{k}" for split in ("train", "val") for k in (0, 2, 10)),
    ]
    page = write(tmp_path / "index.html", curves={name: [(0, 1.0), (9, 2.0)] for name in [*names, "val/loss", "epoch"]})
    charts = [found["aria-label"].split(":")[0] for found in page.all("svg", "chart")]
    losses = [f"loss, codebook {k}" for k in (0, 2, 10)]
    assert charts == ["loss", *losses, "gradient norm", "learning rate"]
    assert len(page.all("polyline")) == 9


def test_time_is_shared_out_among_the_stages(tmp_path):
    page = write(tmp_path / "index.html", seconds={"fit": 15.0, "train": 3600.0, "skipped": 0.0})
    shares = [float(re.search(r"flex:([\d.e+]+)", found["style"])[1]) for found in page.all("i") if "flex" in found["style"]]
    assert shares == [15.0, 3600.0]
    assert "1 h 00 min in all." in page.text
    assert "15.0 s" in page.text


def log(folder, points, name="train/loss"):
    with SummaryWriter(folder) as board:
        for step, value in points:
            board.add_scalar(name, value, step)
        board.add_image("picture", torch.zeros(1, 4, 4), 0)


def test_curves_come_back_as_they_were_logged(tmp_path):
    rng = np.random.default_rng(0)
    points = [(3 * step, float(np.float32(rng.normal()))) for step in range(300)]
    log(tmp_path, points)
    log(tmp_path, points[:5], "val/loss")
    assert read_curves(tmp_path) == {"train/loss": points, "val/loss": points[:5]}


def test_a_continued_run_replaces_what_it_repeats(tmp_path):
    log(tmp_path, [(0, 1.0), (10, 2.0), (20, 3.0), (30, 4.0)])
    (first,) = tmp_path.iterdir()
    first.rename(tmp_path / "events.out.tfevents.0000000001.first")
    log(tmp_path, [(15, 5.0), (25, 6.0)])
    assert read_curves(tmp_path) == {"train/loss": [(0, 1.0), (10, 2.0), (15, 5.0), (25, 6.0)]}


def test_long_curves_are_thinned_between_their_ends(tmp_path):
    log(tmp_path, [(step, float(step)) for step in range(3000)])
    curve = read_curves(tmp_path)["train/loss"]
    assert len(curve) == report.POINTS
    assert (curve[0], curve[-1]) == ((0, 0.0), (2999, 2999.0))
    assert max(b - a for (a, _), (b, _) in itertools.pairwise(curve)) <= math.ceil(2999 / 499)
    assert read_curves(tmp_path / "none") == {}


def test_the_table_in_the_terminal(capsys):
    print_table([Figure("F1 [bold]", 0.943, 0.977, 0.18, ">= 0.90"), Figure("clips", 1234, None, None, "< 3")])
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "F1 [bold]" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["F1 [bold]", "0.943", "0.977", "0.180", ">= 0.90  met"]
    assert any(all(word in line for word in ("1,234", "–", "missed")) for line in lines)
