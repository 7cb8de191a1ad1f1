"""The dashboard as a Tornado application, beside the parameter server's handlers on the same loop.

A page is one Bokeh session with one small model in it, which carries frames of text; the figures are the same for all
pages, so they are serialized once and served as a file, and the page's own scripts fill them. Whatever the number of
pages, a frame is computed once, and what frames take stays below a hundredth of the loop's time: where it would be
more, they come less often than once a second. Opening a page costs once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import statistics
import time
import types
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any

from tensorspark.dashboard.frame import Frames, empty
from tensorspark.errors import ConfigError
from tensorspark.telemetry.view import RunView

if TYPE_CHECKING:
    from tornado.web import Application

logger = logging.getLogger(__name__)

PAGE = "/dashboard"
_INTERVAL_S = 1.0
_MAX_INTERVAL_S = 60.0
_SHARE = 0.01
_GOODBYE_S = 1.0


class Dashboard:
    """Serves the page of the current run.

    Args:
        view: the current run's; None before the first. Another object is another run: pages begin anew.
        prefix: of the page's path, where it is not served at ``/dashboard``.

    Attributes:
        application: to be mounted; serves ``/dashboard``, ``/dashboard/...`` and ``/static/...``. Who may see it is for
            a door in front to decide.
        interval_s: seconds from one frame to the next.
        cost_s: CPU seconds that the loop spends on a frame, with all pages; the median of the last five.
        opening_cost_s: the same, of the last one for which a page had just been opened: it got all there is, once.
    """

    application: Application

    def __init__(self, view: Callable[[], RunView | None], *, prefix: str = "") -> None:
        self._view = view
        self._prefix = "/" + prefix.strip("/") if prefix.strip("/") else ""
        self._frames: Frames | None = None
        self._pages: list[_Page] = []
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Task[None]] = set()
        self._meter = _Meter()
        self.interval_s = _INTERVAL_S
        self.cost_s = 0.0
        self._costs: deque[float] = deque(maxlen=5)
        self.opening_cost_s = 0.0
        self._is_opening = False

    @property
    def num_pages(self) -> int:
        """How many pages are open, and take frames."""
        return sum(page.is_connected for page in tuple(self._pages))

    async def start(self) -> None:
        """Makes `application`, on the running loop; what takes long (Bokeh's import) runs in a thread meanwhile.

        Raises:
            ConfigError: Bokeh is not installed.
        """
        from tornado.ioloop import IOLoop

        server = await asyncio.get_running_loop().run_in_executor(None, _load)
        self.application = server.application(self._open, PAGE, self._prefix)
        self.application.initialize(IOLoop.current())  # type: ignore[attr-defined]
        self.application.start()  # type: ignore[attr-defined]
        self._task = asyncio.get_running_loop().create_task(self._run(), name="tensorspark-dashboard")

    async def stop(self) -> None:
        """Tells the pages the last there is to tell, and stops. They keep it."""
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task = None
        try:
            self._tick()
        except Exception:
            logger.exception("open pages were not told how the run ended")
        if self._telling:
            _, late = await asyncio.wait(self._telling, timeout=_GOODBYE_S)
            for task in late:
                task.cancel()
        self.application.stop()  # type: ignore[attr-defined]

    def _open(self, document: Any, carrier: Any) -> None:
        """A new page: it says when it is ready for frames."""
        page = _Page(document, carrier)
        carrier.on_change("asked", lambda attribute, old, new: self._heard(page))
        document.on_session_destroyed(lambda context: self._forget(page))
        self._pages.append(page)

    def _heard(self, page: _Page) -> None:
        page.is_ready = page.wants_all = True
        self._asked.set()

    def _forget(self, page: _Page) -> None:
        with contextlib.suppress(ValueError):
            self._pages.remove(page)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._asked.wait(), self.interval_s)
            self._asked.clear()
            try:
                self._tick()
            except Exception:
                # What cannot be shown must end neither the pages nor the run.
                logger.exception("the dashboard could not be brought up to date")

    def _tick(self) -> None:
        """Computes a frame, and begins to send it; does not wait for pages that read slowly."""
        self._settle()
        pages = [page for page in self._pages if page.is_connected]
        if not pages:
            return
        began = time.thread_time()
        wanting = [page for page in pages if page.wants_all and not page.is_told]
        self._is_opening = any(page.is_new for page in wanting)
        news, everything = self._compute(bool(wanting))
        for page in pages:
            if (text := page.lacks(news, everything)) is not None:
                task = asyncio.get_running_loop().create_task(self._told(page, text))
                self._telling.add(task)
                task.add_done_callback(self._telling.discard)
        self._meter.seconds += time.thread_time() - began

    def _settle(self) -> None:
        """What the last frame took is known by now: says when to send the next but one."""
        cost_s, self._meter.seconds = self._meter.seconds, 0.0
        if self._is_opening:
            self.opening_cost_s = cost_s
            return
        self._costs.append(cost_s)
        # The median: a frame during which Python collected garbage says nothing of the next.
        self.cost_s = statistics.median(self._costs)
        self.interval_s = min(max(_INTERVAL_S, self.cost_s / _SHARE), _MAX_INTERVAL_S)

    async def _told(self, page: _Page, text: str) -> None:
        try:
            await self._meter.measured(page.tell(text))
        except Exception:
            logger.debug("a page could not be told", exc_info=True)
            page.wants_all = True

    def _compute(self, full: bool) -> tuple[str | None, str]:
        """News for all pages, and everything for those that want it."""
        view = self._view()
        if view is None:
            return None, empty()
        if self._frames is None or self._frames.view is not view:
            self._frames = Frames(view)
            for page in self._pages:
                page.wants_all = page.is_ready
            self._is_opening = full = True
        return self._frames.take(full=full)


class _Page:
    """One page that somebody has open.

    Attributes:
        is_ready: whether it has asked for frames.
        wants_all: whether it needs a full frame.
        is_new: whether it has had none.
        is_told: whether a frame is on its way to it: it can take no other.
    """

    def __init__(self, document: Any, carrier: Any) -> None:
        self._document = document
        self._carrier = carrier
        self._num_frames = 0
        self.is_told = False
        self.is_new = True
        self.is_ready = False
        self.wants_all = False

    @property
    def is_connected(self) -> bool:
        """Whether it takes frames now."""
        context = self._document.session_context
        return self.is_ready and context is not None and context.session.connection_count > 0

    def lacks(self, news: str | None, everything: str) -> str | None:
        """What to send it; nothing while a frame is still on its way: it reads slowly, and gets a full one then."""
        if self.is_told:
            self.wants_all = True
            return None
        text = everything if self.wants_all else news
        self.is_new = self.is_new and not self.wants_all
        self.wants_all = False
        self.is_told = text is not None
        return text

    async def tell(self, text: str) -> None:
        """Sends a frame; is done when it has left."""
        self._num_frames += 1
        try:
            await self._document.session_context.with_locked_document(self._put(f"{self._num_frames} {text}"))
        finally:
            self.is_told = False

    def _put(self, text: str) -> Callable[[Any], Coroutine[Any, Any, None]]:
        async def put(document: Any) -> None:
            self._carrier.frame = text

        return put


class _Meter:
    """Adds up the CPU time that coroutines take on this thread, without that of others who run while they wait."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def measured(self, coroutine: Coroutine[Any, Any, None]) -> Awaitable[None]:
        """Runs `coroutine`."""
        return types.coroutine(self._driven)(coroutine)

    def _driven(self, coroutine: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        step, value = coroutine.send, None
        while True:
            began = time.thread_time()
            try:
                awaited = step(value)
            except StopIteration:
                return
            finally:
                self.seconds += time.thread_time() - began
            try:
                value = yield awaited
                step = coroutine.send
            except BaseException as error:
                step, value = coroutine.throw, error


def _load() -> Any:
    from tensorspark.dashboard import server

    try:
        server.load()
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("bokeh", "jinja2"):
            raise
        raise ConfigError(
            "the dashboard needs Bokeh, which is not installed: pip install 'tensorspark[dashboard]'"
        ) from error
    return server
