"""Serving the page: `vtc demo`, and the app file of a Hugging Face Space."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import gradio as gr

from vtc.demo.inspector import Inspector
from vtc.demo.link import chosen
from vtc.demo.page import build
from vtc.eval.images import MAX_BYTES
from vtc.eval.reader import Reader

HERE = Path(__file__).parent
WAITING = 32
"""Visitors in the queue; the next one is told that it is full."""
FONTS = ("ui-sans-serif", "system-ui", "sans-serif")
M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""


def serve(
    reader: Reader, name: str, host: str | None = None, port: int | None = None, method: str = "vtc-cls"
) -> tuple[gr.Blocks, str]:
    """Start the server in threads of its own: the page, which opens with `method`, and its address.

    Raises OSError where the port is taken, and as `link.chosen`.
    """
    inspector = Inspector(reader, name)
    page = build(inspector, chosen(method, inspector.tokens)).queue(max_size=WAITING, default_concurrency_limit=4)
    _, address, _ = page.launch(
        server_name=f"[{host}]" if host and ":" in host and "]" not in host else host,  # as gradio wants IPv6
        server_port=port,
        share=False,
        run_history=False,
        max_file_size=MAX_BYTES,
        state_session_capacity=WAITING,
        footer_links=[],
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=("monospace",)),
        css=(HERE / "page.css").read_text() + (HERE / "viewer.css").read_text(),
    )
    return page, address


def launch(
    reader: Reader, name: str, host: str | None = None, port: int | None = None, method: str = "vtc-cls"
) -> None:
    """Serve the page until it is stopped: on 127.0.0.1 unless `host` or GRADIO_SERVER_NAME says otherwise.

    `method` is what it opens with. Raises as `serve`.
    """
    _give_pictures_back()
    page, address = serve(reader, name, host, port, method)
    print(f"vtc inspector: {address} (Ctrl-C stops it)", flush=True)
    page.block_thread()


def _give_pictures_back() -> None:
    """Let the memory of a freed picture return to the system: glibc would keep it, for each thread anew."""
    with suppress(OSError, AttributeError):  # another C library has other ways
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 4 * 2**20)


if __name__ == "__main__":
    from vtc.eval.reader import load, model_path, pick_device

    launch(load(model_path("reference"), pick_device("auto"), max_new_tokens=64), "reference")
