"""The page, by Gradio: what people see and say, handed to the desk and back."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vaura.data.manifest import Clip, find_videos
from vaura.errors import InputError
from vaura.media.video import read_video
from vaura.serve import cards
from vaura.serve.desk import FORM, Desk
from vaura.serve.request import Request
from vaura.serve.shelf import BEST, classes_of
from vaura.serve.work import CODEC, ORIGINAL, SAMPLE, Step, Workshop


class Examples:
    """Videos to try. A copy is made of one that is picked, for nothing but what lies in the rooms is ever shown."""

    def __init__(self, shop: Workshop, folder: str | None, most: int) -> None:
        self.shop, self.clips = shop, list[Clip]()
        if most < 1:
            return
        if folder is not None:
            self.clips = [Clip(video.stem, video, float("nan")) for video in find_videos(folder)[:most]]
        for entry in shop.shelf.entries.values():
            self.clips += entry.examples(most - len(self.clips))
        self.clips = [clip for clip in self.clips if clip.video.stat().st_size <= shop.limits.upload_mb * 1e6]
        self.pictures = [(str(picture), "") for clip in list(self.clips) if (picture := self._picture(clip)) is not None]

    def _picture(self, clip: Clip) -> Path | None:
        """Its first picture, as a file; None, and no example, where it cannot be read."""
        from PIL import Image  # comes with Gradio

        target = self.shop.rooms.examples / f"{self.clips.index(clip)}.png"
        try:
            frame = read_video(clip.video, clip.start, 0.04, 25.0, 160)[0]
        except InputError:
            self.clips.remove(clip)
            return None
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(target)
        return target

    def pick(self, index: int) -> tuple[str, float, float | None]:
        """The file of an example, and the span of it."""
        clip = self.clips[index]
        folder = self.shop.rooms.examples / str(index)
        folder.mkdir(exist_ok=True)
        copy = folder / clip.video.name
        if not copy.is_file():
            shutil.copyfile(clip.video, copy)
        return str(copy), float(clip.start), None if clip.duration != clip.duration else float(clip.duration)


def build(gr: Any, shop: Workshop, title: str, examples: Examples) -> Any:
    """The page (Blocks), ready to be launched."""
    desk, shelf, limits = Desk(shop, gr), shop.shelf, shop.limits
    first, model = shelf.entry(None), shelf.model()
    said = shop.filled(Request())
    names = list(shelf.entries)
    places = [f"{SAMPLE}1", ORIGINAL]
    places += [f"{SAMPLE}2", CODEC, *(f"{SAMPLE}{n}" for n in range(3, limits.samples + 1))] if limits.samples > 1 else [CODEC]
    private = {"api_visibility": "private"}
    plain = partial(gr.HTML, apply_default_css=False)
    at_the_desk = {"queue": False, "show_progress": "hidden", **private}

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        plain(
            f'<header class="va-header"><h1>{title}</h1><p>Give a silent video its sound. Upload one, record one, or pick an '
            "example; then hear what the model makes of it, beside the original.</p></header>"
        )
        with gr.Row(elem_id="va-main", equal_height=False):
            with gr.Column(scale=4, min_width=300, elem_id="va-ask"):
                video = gr.Video(
                    label="Video", sources=["upload", "webcam"], include_audio=True, height=300, elem_id="va-video", buttons=[]
                )
                about = plain("", elem_classes="va-part")
                if examples.clips:
                    plain('<p class="va-label">Or one of these</p>')
                    gallery = gr.Gallery(
                        examples.pictures,
                        columns=4,
                        height="auto",
                        object_fit="cover",
                        allow_preview=False,
                        interactive=False,
                        show_label=False,
                        buttons=[],
                        elem_id="va-examples",
                    )
                with gr.Group():
                    model_ = gr.Dropdown(names, value=first.name, label="Model", interactive=True, visible=len(names) > 1)
                    checkpoint = gr.Dropdown(
                        list(first.checkpoints), value=BEST, label="Checkpoint", info=first.said, interactive=True
                    )
                    with gr.Row():
                        start = gr.Number(0, label="Start", info="seconds into the video", minimum=0, step=0.1, min_width=120)
                        duration = gr.Number(
                            0, label="Duration", info="seconds; 0: to its end", minimum=0, step=0.1, min_width=120
                        )
                    with gr.Row():
                        samples = gr.Slider(1, max(limits.samples, 2), 1, step=1, label="Samples", visible=limits.samples > 1)
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=110)
                    classes = classes_of(model)
                    label = gr.Dropdown(
                        classes,
                        value=None,
                        label="Class",
                        info="what it is to sound like",
                        visible=bool(classes),
                        interactive=True,
                    )
                with gr.Accordion("How it is drawn", open=False):
                    guidance = gr.Slider(
                        1, 10, said.guidance, step=0.1, label="Guidance", info="how much the picture counts; 1 switches it off"
                    )
                    temperature = gr.Slider(
                        0, 2, said.temperature, step=0.05, label="Temperature", info="0 always takes the likeliest"
                    )
                    with gr.Row():
                        top_k = gr.Number(said.top_k, label="Top-k", info="0: off", precision=0, minimum=0, min_width=110)
                        top_p = gr.Number(
                            said.top_p, label="Top-p", info="0: off", minimum=0, maximum=1, step=0.01, min_width=110
                        )
                    prime = gr.Number(
                        0,
                        label="Begin with its own sound",
                        info="seconds of the video's own sound that the samples go on from",
                        minimum=0,
                        step=0.08,
                    )
                make = gr.Button("Make the sound", variant="primary", size="lg", elem_id="va-make")
                stop = gr.Button("Stop", size="lg", visible=False, elem_id="va-stop")
                again = gr.Button("Again with another seed", size="lg", visible=False, elem_id="va-again")
            with gr.Column(scale=8, min_width=320, elem_id="va-answer"):
                state = plain(cards.EMPTY, elem_id="va-state", elem_classes="va-part")
                plain('<div id="va-stage"></div>', elem_classes="va-part")
                feed = plain("", elem_classes="va-none")
                with gr.Column(elem_id="va-results"):
                    shown = {name: plain("", elem_classes="va-part") for name in places}
                summary = plain("", elem_classes="va-part")
                with gr.Accordion("Same again", open=False, visible=False) as same:
                    settings = gr.Textbox(
                        label="Settings as JSON",
                        info="copied, kept, and given again with the same video, they make the same sound",
                        lines=8,
                        max_lines=20,
                        interactive=True,
                        buttons=["copy"],
                        elem_id="va-settings",
                    )
                    take = gr.Button("Take these settings", size="sm")

        fields = [model_, checkpoint, start, duration, samples, guidance, temperature, top_k, top_p, seed, prime, label]
        outputs = {"state": state, "feed": feed, "summary": summary, "settings": settings} | shown
        everything = [*outputs.values(), make, again, stop, same]

        def told(sentence: str, wrong: bool = False) -> str:
            return cards.notice(sentence, wrong)

        def begin(request: Any) -> dict[Any, Any]:
            desk.begin(str(request.session_hash))
            # parts are there from the beginning and empty, not invisible: what is said to one that is about to be seen is lost
            return dict.fromkeys((summary, *shown.values()), "") | {
                state: cards.progress(Step(0.0, "Waiting for its turn")),
                feed: "",
                make: gr.update(visible=False),
                again: gr.update(visible=False),
                stop: gr.update(visible=True),
                same: gr.update(visible=False),
            }

        def run(request: Any, film: str | None, *form: Any) -> Iterator[dict[Any, Any]]:
            for changed in desk.answer(str(request.session_hash), film, form):
                update: dict[Any, Any] = {outputs[name]: value for name, value in changed.items()}
                if "settings" in changed:
                    update[same] = gr.update(visible=True)
                yield update

        def end() -> dict[Any, Any]:
            return {make: gr.update(visible=True), again: gr.update(visible=True), stop: gr.update(visible=False)}

        def halt(request: Any) -> None:
            desk.stop(str(request.session_hash))

        def look(film: str | None) -> str:
            if film is None:
                return ""
            try:
                found = shop.check(film)
            except InputError as error:
                return cards.notice(shop.told(error, film), wrong=True)
            return cards.facts(found)

        def choose(name: str) -> tuple[Any, ...]:
            entry = shelf.entry(name)
            marks = gr.update(choices=list(entry.checkpoints), value=BEST, info=entry.said)
            try:
                own, known = shop.filled(Request(model=name)), classes_of(shelf.model(name))
            except InputError as error:
                return marks, *[gr.skip()] * 5, told(shop.told(error, None), True)
            kinds = gr.update(choices=known, value=None, visible=bool(known))
            return marks, own.guidance, own.temperature, own.top_k, own.top_p, kinds, gr.skip()

        def retake(text: str) -> tuple[Any, ...]:
            try:
                wanted = shop.filled(Request.read(text))
            except InputError as error:
                return (*[gr.skip()] * len(FORM), told(shop.told(error, None), True))
            marks = gr.update(choices=list(shelf.entry(wanted.model).checkpoints), value=wanted.checkpoint)
            said = {**vars(wanted), "checkpoint": marks, "duration": wanted.duration or 0}
            values = [said[name] for name in FORM]
            return (*values, told("the settings are taken; with the same video they make the same sound"))

        shared = {"concurrency_limit": None}  # the workshop has a line of its own, in which everybody is told his place

        for answer in (begin, run, halt):
            answer.__annotations__["request"] = gr.Request  # by which Gradio knows what is wanted

        def wire(trigger: Any) -> None:
            trigger.then(begin, None, everything, **at_the_desk).then(
                run, [video, *fields], everything, show_progress="hidden", **shared, **private
            ).then(end, None, [make, again, stop], **at_the_desk)

        wire(make.click(lambda: None, **at_the_desk))
        wire(again.click(lambda: secrets.randbelow(100_000), None, seed, **at_the_desk))
        stop.click(halt, **at_the_desk)
        _on_leave(gr, page, desk)
        video.change(look, video, about, **at_the_desk)
        model_.input(
            choose, model_, [checkpoint, guidance, temperature, top_k, top_p, label, state], show_progress="hidden", **private
        )
        take.click(retake, settings, [*fields, state], **at_the_desk)
        if examples.clips:

            def pick(event: Any) -> tuple[Any, ...]:
                return examples.pick(int(event.index))

            pick.__annotations__["event"] = gr.SelectData
            gallery.select(pick, None, [video, start, duration], **at_the_desk)

        _endpoints(gr, desk, limits.samples, shared)
    page.queue(default_concurrency_limit=4, api_open=True)
    return page


def _on_leave(gr: Any, page: Any, desk: Desk) -> None:
    def leave(request: Any) -> None:
        desk.leave(str(request.session_hash))

    leave.__annotations__["request"] = gr.Request
    page.unload(leave)


def _endpoints(gr: Any, desk: Desk, samples: int, shared: dict[str, Any]) -> None:
    """/generate and /models, for programs: their parts are not seen."""

    def generate(
        video: str,
        model: str | None = None,
        checkpoint: str | None = None,
        start: float = 0.0,
        duration: float | None = None,
        samples: float = 1,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: float | None = None,
        top_p: float | None = None,
        seed: float = 0,
        prime: float = 0.0,
        label: str | None = None,
        progress: Any = gr.Progress(),  # noqa: B008  Gradio finds it by this default
    ) -> tuple[list[str], dict[str, Any]]:
        drawn = (guidance, temperature, top_k, top_p, seed, prime, label)
        return desk.endpoint(video, (model, checkpoint, start, duration, samples, *drawn), progress)

    with gr.Row(visible=False):
        film = gr.File(label="video", type="filepath")
        words = {name: gr.Textbox(label=name, value=None) for name in ("model", "checkpoint", "label")}
        numbers = {
            name: gr.Number(label=name, value=value)
            for name, value in (
                ("start", 0), ("duration", None), ("samples", 1), ("guidance", None), ("temperature", None), ("top_k", None),
                ("top_p", None), ("seed", 0), ("prime", 0),
            )
        }  # fmt: skip
        made, report = gr.File(label="files", file_count="multiple"), gr.JSON(label="report")
        known = gr.JSON(label="models")
        ask, tell = gr.Button("generate"), gr.Button("models")
    parts = words | numbers
    ask.click(
        generate,
        [film, *(parts[name] for name in FORM)],
        [made, report],
        api_name="generate",
        api_description="Sound for a silent video: files (mp4 and wav of each sample, of the original, and of the original "
        "through the codec), and a report with the settings that make the same again.",
        **shared,
    )
    tell.click(desk.shelf, None, known, api_name="models", api_description="The models and their checkpoints.", queue=False)
