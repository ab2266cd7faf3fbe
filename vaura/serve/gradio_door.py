"""Gradio as the house has it: silent towards everybody, guarded, and in calm looks."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from vaura.errors import InputError

MISSING = "the page is made by Gradio, which is not installed: pip install 'vaura[serve]'"
POLICY = (  # nothing on the page may ask any other server
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data:; "
    "worker-src 'self' blob:; form-action 'self'; base-uri 'self'"
)
GUARDS = {"content-security-policy": POLICY, "referrer-policy": "same-origin", "x-content-type-options": "nosniff"}


def open_gradio(cache: Path) -> Any:
    """Gradio, silent towards everybody and with its files in `cache`. Raises InputError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(cache)  # read whenever a file comes in
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise InputError(MISSING) from error
    return gradio


def theme(gr: Any) -> Any:
    """Calm colours, those of the report, in fonts that every machine has."""
    violet = gr.themes.Color(
        "#f3f1fd", "#e7e3fb", "#d0c9f7", "#b3a8f1", "#9486e8", "#7362da", "#5443c8", "#4536a8", "#372b85", "#2a2166", "#1c1647"
    )
    warm = gr.themes.Color(
        "#faf9f6", "#f3f1ec", "#e3e0d9", "#cfcbc2", "#a19eae", "#7c7986", "#5d5b66", "#45434e", "#302e3a", "#1b1a21", "#131217"
    )
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace"]
    calm = gr.themes.Base(
        primary_hue=violet, secondary_hue=violet, neutral_hue=warm, radius_size="lg", font=fonts, font_mono=mono
    )
    colours = {
        "body_background_fill": ("#faf9f6", "#131217"),
        "body_text_color": ("#1d1c22", "#eceaf2"),
        "body_text_color_subdued": ("#5d5b66", "#a19eae"),
        "background_fill_primary": ("#ffffff", "#1b1a21"),
        "background_fill_secondary": ("#faf9f6", "#17161c"),
        "block_background_fill": ("#ffffff", "#1b1a21"),
        "block_border_color": ("#e3e0d9", "#302e3a"),
        "border_color_primary": ("#e3e0d9", "#302e3a"),
        "block_label_background_fill": ("#ffffff", "#1b1a21"),
        "block_label_text_color": ("#5d5b66", "#a19eae"),
        "block_title_text_color": ("#1d1c22", "#eceaf2"),
        "input_background_fill": ("#faf9f6", "#131217"),
        "input_border_color": ("#e3e0d9", "#302e3a"),
        "slider_color": ("#5443c8", "#ab9fff"),
        "button_primary_background_fill": ("#5443c8", "#ab9fff"),
        "button_primary_background_fill_hover": ("#4536a8", "#bdb4ff"),
        "button_primary_text_color": ("#ffffff", "#14121b"),
        "button_secondary_background_fill": ("#f3f1ec", "#26242e"),
        "button_secondary_background_fill_hover": ("#eceae4", "#302e3a"),
        "button_secondary_text_color": ("#1d1c22", "#eceaf2"),
        "link_text_color": ("#5443c8", "#ab9fff"),
        "color_accent_soft": ("#f3f1fd", "#262238"),
    }
    both = {name: light for name, (light, _) in colours.items()} | {f"{name}_dark": dark for name, (_, dark) in colours.items()}
    return calm.set(
        **both,
        block_shadow="none",
        block_radius="14px",
        container_radius="14px",
        input_radius="9px",
        block_title_text_weight="500",
        button_large_radius="99px",
        button_small_radius="99px",
        button_large_text_weight="600",
        shadow_drop="none",
        shadow_drop_lg="none",
    )


def launching(gr: Any) -> dict[str, Any]:
    """What `launch` is told about looks and safety."""
    from starlette.middleware import Middleware

    page = files("vaura.serve")
    return {
        "theme": theme(gr),
        "css": page.joinpath("page.css").read_text("utf-8"),
        "head": f"<script>{page.joinpath('page.js').read_text('utf-8')}</script>",
        "app_kwargs": {"middleware": [Middleware(_Guarded)]},
        "footer_links": ["api"],
        "show_error": False,  # a defect's words are for the log
        "enable_monitoring": False,
        "ssr_mode": False,
        "pwa": False,
    }


class _Guarded:
    """Every answer says that the page is to ask nobody else, and to tell nobody whence it was opened."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                said = ((name.encode(), value.encode()) for name, value in GUARDS.items())
                message["headers"] = [*message["headers"], *said]
            await send(message)

        await self.app(scope, receive, guarded)
