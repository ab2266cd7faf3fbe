"""The verb `serve`: opens the page, and leaves nothing behind."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vaura.components import check_components, instantiate
from vaura.drawing import overrides
from vaura.errors import InputError
from vaura.precision import pick_device
from vaura.serve.gradio_door import launching, open_gradio
from vaura.serve.line import Line
from vaura.serve.page import Examples, build
from vaura.serve.request import Limits
from vaura.serve.rooms import Rooms
from vaura.serve.shelf import Entry, Shelf, find_entries
from vaura.serve.work import Ear, Manner, Workshop


def serve(config: DictConfig) -> None:
    """Open the page and keep it open until Ctrl-C. Raises InputError where it cannot be, before anybody is let in."""
    check_components(config)
    given = config.experiment_path
    entries = find_entries(OmegaConf.to_object(given) if OmegaConf.is_config(given) else given)
    rooms = Rooms(config.folder, 60 * config.keep_minutes)
    try:
        gr = open_gradio(rooms.root)
        shop = workshop(config, entries, rooms)
        examples = Examples(shop, config.examples, config.examples_shown)
        page = build(gr, shop, config.title, examples)
        rooms.keep_swept()
        _open(gr, page, config)
        number = len(shop.shelf.entries)
        print(f"page: {page.local_url} ({number} model{'' if number == 1 else 's'}; Ctrl-C closes it)", flush=True)
        if page.share_url:
            print(f"public: {page.share_url}", flush=True)
        _wait()
        print("closed", flush=True)
        page.close(verbose=False)
    finally:
        rooms.close()


def workshop(config: DictConfig, entries: list[Entry], rooms: Rooms) -> Workshop:
    """The workshop that `config` describes, its first model loaded. Raises InputError where it is broken."""
    shelf = Shelf(
        entries,
        config.models_kept,
        device=config.device,
        precision=config.precision,
        engine=config.engine,
        compile=config.compile,
        overrides=overrides(config),
    )
    sampler = config.sampler or {}
    manner = Manner(
        loop=config.loop,
        stride=config.stride,
        normalize=config.normalize,
        guidance=config.guidance,
        temperature=sampler.get("temperature"),
        top_k=sampler.get("top_k"),
        top_p=sampler.get("top_p"),
        threshold=config.threshold,
        tolerance=config.tolerance,
    )
    limits = Limits(config.upload_mb, config.seconds, config.samples)
    shop = Workshop(shelf, rooms, limits, manner, _ear(config), Line(config.at_once, config.queue))
    shelf.model()
    return shop


def _ear(config: DictConfig) -> Ear | None:
    """The classifier, where it has weights, with the names of its classes."""
    if config.classifier is None or config.classifier.get("weights") is None:
        return None
    names = None
    if config.classes is not None:
        if not Path(config.classes).is_file():
            raise InputError(f"classes: there is no file {config.classes}; give one with the name of a class a line")
        names = [line.strip() for line in Path(config.classes).read_text("utf-8").splitlines() if line.strip()]
    return Ear(instantiate(config.classifier), instantiate(config.mel), names, pick_device(config.device))


def _open(gr: Any, page: Any, config: DictConfig) -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio asks its own page whether it is there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of things that the page decides itself
        try:
            page.launch(
                server_name=config.host,
                server_port=config.port,
                share=config.share,
                inbrowser=config.open_browser,
                max_file_size=int(config.upload_mb * 1e6),
                max_threads=config.at_once + config.queue + 24,  # one who waits holds one
                prevent_thread_lock=True,
                quiet=True,
                **launching(gr),
            )
        except OSError as error:
            where = f"{config.host}, port {config.port}" if config.port else config.host
            raise InputError(f"cannot open the page at {where}: it is taken, or not ours; give another port or host") from error


def _wait() -> None:
    """Until somebody presses Ctrl-C, or the system asks this process to end."""
    over = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: over.set())
    try:
        while not over.wait(0.5 if os.name == "nt" else 3600):
            pass
    except KeyboardInterrupt:
        pass
