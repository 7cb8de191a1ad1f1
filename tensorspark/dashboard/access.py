"""Who may see the dashboard: those who hold the run's token, or the cookie that they got for it.

The URL that is printed at the start carries the token. Whoever opens it gets a cookie and is sent on to the page, so
that the token does not stay in the address bar. Pure functions, which the server's door and the replay share.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

PATH = "/dashboard"


def cookie_name(port: int) -> str:
    """Names the cookie of the server at `port`: browsers share cookies among all ports of a host."""
    return f"tensorspark-{port}"


def cookie_value(token: str) -> str:
    """What the cookie holds: proof that its owner had the token, but not the token, which opens more than the page."""
    return hmac.new(token.encode(), b"tensorspark dashboard", hashlib.sha256).hexdigest()


def set_cookie(port: int, token: str) -> str:
    """The ``Set-Cookie`` header's value: for this browser session, unseen by scripts, never sent from other sites."""
    return f"{cookie_name(port)}={cookie_value(token)}; Path=/; HttpOnly; SameSite=Strict"


def is_token(given: str, token: str) -> bool:
    """Whether `given` is the token; takes as long whichever character differs."""
    return hmac.compare_digest(given.encode(), token.encode())


def is_authorized(headers: Mapping[str, str], port: int, token: str) -> bool:
    """Whether a request may see the page: it carries the cookie or the token, and no other site's page sent it.

    Args:
        headers: of the request; names as in ``Authorization`` (`tornado.httputil.HTTPHeaders` takes them in any case).
        port: as the cookie was named after.
    """
    return is_same_origin(headers) and (_has_bearer(headers, token) or _has_cookie(headers, port, token))


def is_same_origin(headers: Mapping[str, str]) -> bool:
    """Whether the request comes from a page of this very host and port, or from no page; browsers say so with each
    WebSocket and each request that could change something."""
    origin = headers.get("Origin")
    if origin is None:
        return True
    try:
        return urlsplit(origin).netloc.lower() == headers.get("Host", "").lower()
    except ValueError:  # half an IPv6 address, say
        return False


def _has_bearer(headers: Mapping[str, str], token: str) -> bool:
    scheme, _, given = headers.get("Authorization", "").partition(" ")
    return scheme.lower() == "bearer" and is_token(given.strip(), token)


def _has_cookie(headers: Mapping[str, str], port: int, token: str) -> bool:
    cookies = (cookie.strip().partition("=") for cookie in headers.get("Cookie", "").split(";"))
    name, value = cookie_name(port), cookie_value(token)
    return any(given == name and is_token(content, value) for given, _, content in cookies)


def login(headers: Mapping[str, str], port: int, token: str, path: str = PATH) -> tuple[int, dict[str, str], str]:
    """The answer to a request whose ``token`` argument is right: gives the cookie, and sends the browser on to `path`.

    A browser that comes from a link on another site would keep the cookie back on a redirect (``SameSite=Strict``
    counts where the journey began): such a one gets a page of ours that sends it on.

    Returns:
        status, headers, body (HTML).
    """
    answer = {"Set-Cookie": set_cookie(port, token), "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
    if headers.get("Sec-Fetch-Site") != "cross-site":
        return 303, {**answer, "Location": path}, ""
    body = (
        f'<!doctype html><html lang="en"><title>Opening the dashboard</title><meta http-equiv="refresh" '
        f'content="0; url={path}"><p><a href="{path}">Open the dashboard</a></p></html>'
    )
    return 200, {**answer, "Content-Type": "text/html; charset=utf-8"}, body
