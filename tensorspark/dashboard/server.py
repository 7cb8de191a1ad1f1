"""The dashboard's Bokeh application: the page's files, and for each page a session with one small model.

Bokeh is imported by `load`, which takes a second, and by what is called after it.
"""

from __future__ import annotations

import functools
import hashlib
import mimetypes
from collections.abc import Callable
from importlib import resources
from typing import TYPE_CHECKING, Any

from tornado.web import HTTPError, RequestHandler

from tensorspark.dashboard import figures

if TYPE_CHECKING:
    from bokeh.server.tornado import BokehTornado
    from jinja2 import Template

_FILES = (
    "style.css",
    "main.js",
    "format.js",
    "plots.js",
    "series.js",
    "timeline.js",
    "tables.js",
    "keys.js",
    "store.js",
)
# A page that is closed or reloaded costs nothing after so long.
_UNUSED_LIFETIME_MS = 5_000
_CHECK_UNUSED_MS = 5_000


@functools.cache
def load() -> None:
    """Imports Bokeh, and makes all that is the same for every page. May run in any thread.

    Raises:
        ImportError: Bokeh is not installed.
    """
    import bokeh.server.tornado  # noqa: F401

    # The figures first: a document tells of all classes like the carrier's that there are, which only pages need.
    _assets()
    _template()
    _carrier_class()


def application(opened: Callable[[Any, Any], None], path: str, prefix: str) -> BokehTornado:
    """The page's application.

    Args:
        opened: called with each new page's document and carrier: a model with ``frame``, text for the page, and
            ``asked``, a number that the page raises when it wants a full frame.
        path: of the page.
        prefix: of all paths; empty, or ``/`` and a name.
    """
    from bokeh.application import Application
    from bokeh.application.handlers.function import FunctionHandler
    from bokeh.server.tornado import BokehTornado

    def modify(document: Any) -> None:
        carrier = _carrier_class()(name="carrier")
        document.add_root(carrier)
        document.title = "tensorspark"
        document.template = _template()
        document.template_variables.update(prefix=prefix, path=path, versions=_versions())
        # The page says itself that the connection is lost, and keeps what it shows.
        document.config.reconnect_session = False
        document.config.notify_connection_status = False
        opened(document, carrier)

    return BokehTornado(
        {path: Application(FunctionHandler(modify))},
        prefix=prefix,
        extra_patterns=[(rf"{path}/assets/([\w.-]+)", _AssetHandler)],
        # The door in front compares the Origin with the Host, and decides who may see the page.
        extra_websocket_origins=["*"],
        unused_session_lifetime_milliseconds=_UNUSED_LIFETIME_MS,
        check_unused_sessions_milliseconds=_CHECK_UNUSED_MS,
        include_headers=[],
        include_cookies=[],
        use_index=False,
    )


@functools.cache
def _carrier_class() -> Any:
    from bokeh.core.properties import Int, String
    from bokeh.model import DataModel

    class TensorsparkCarrier(DataModel):
        """Carries frames to the page."""

        frame = String(default="")
        asked = Int(default=0)

    return TensorsparkCarrier


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_read("index.html").decode())


@functools.cache
def _assets() -> dict[str, tuple[str, bytes, str]]:
    """The page's files by name: type, content, and a digest of it."""
    contents = {name: (mimetypes.guess_type(name)[0] or "", _read(name)) for name in _FILES}
    contents["figures.json"] = ("application/json", figures.document().encode())
    return {name: (kind, content, hashlib.sha256(content).hexdigest()) for name, (kind, content) in contents.items()}


@functools.cache
def _versions() -> dict[str, str]:
    """Addresses of Bokeh's script, with its digest, so that browsers keep it for good."""
    from bokeh.server.views.static_handler import StaticHandler

    return {"bokeh": StaticHandler.append_version("js/bokeh.min.js")}


def _read(name: str) -> bytes:
    return resources.files("tensorspark.dashboard").joinpath("page", name).read_bytes()


class _AssetHandler(RequestHandler):
    """Serves the page's files, from memory."""

    def get(self, name: str) -> None:
        try:
            kind, content, digest = _assets()[name]
        except KeyError:
            raise HTTPError(404) from None
        self.set_header("Content-Type", f"{kind}; charset=utf-8")
        self.set_header("Cache-Control", "no-cache")
        self.set_header("Etag", f'"{digest}"')
        if self.check_etag_header():
            self.set_status(304)
            return
        self.finish(content)
