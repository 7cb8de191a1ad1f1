"""Who may see the page."""

from __future__ import annotations

import pytest
from tornado.httputil import HTTPHeaders

from tensorspark.dashboard.access import cookie_name, cookie_value, is_authorized, is_same_origin, login, set_cookie
from tensorspark.dashboard.unauthorized import page

TOKEN = "s3cret/+="
COOKIE = f"{cookie_name(7077)}={cookie_value(TOKEN)}"


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {TOKEN}"},
        {"Authorization": f"bearer {TOKEN}"},
        {"Cookie": COOKIE},
        {"Cookie": f'theme="dark; {COOKIE}; a=b=c'},
        {"Cookie": COOKIE, "Host": "driver:7077", "Origin": "http://driver:7077"},
        {"Cookie": COOKIE, "Host": "Driver:7077", "Origin": "https://driver:7077"},
    ],
)
def test_the_token_and_the_cookie_open_the_door(headers: dict[str, str]) -> None:
    assert is_authorized(HTTPHeaders(headers), 7077, TOKEN)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer s3cret"},
        {"Authorization": "Bearer é"},
        {"Cookie": f"{cookie_name(7078)}={cookie_value(TOKEN)}"},
        {"Cookie": f"{cookie_name(7077)}={TOKEN}"},
        {"Cookie": f"{cookie_name(7077)}={cookie_value('another')}"},
        {"Cookie": COOKIE, "Host": "driver:7077", "Origin": "http://evil.example"},
        {"Cookie": COOKIE, "Host": "driver:7077", "Origin": "http://driver:8080"},
        {"Cookie": COOKIE, "Host": "driver:7077", "Origin": "null"},
    ],
)
def test_nothing_else_does(headers: dict[str, str]) -> None:
    assert not is_authorized(HTTPHeaders(headers), 7077, TOKEN)


def test_a_request_without_origin_comes_from_no_page() -> None:
    assert is_same_origin({})


def test_the_cookie_is_for_this_server_and_out_of_reach_of_scripts_and_other_sites() -> None:
    text = set_cookie(7077, TOKEN)
    assert TOKEN not in text
    assert text.split("; ")[0].startswith("tensorspark-7077=")
    assert set(text.split("; ")[1:]) == {"Path=/", "HttpOnly", "SameSite=Strict"}


def test_the_token_in_the_address_is_left_behind() -> None:
    status, headers, body = login({"Sec-Fetch-Site": "none"}, 7077, TOKEN)
    assert (status, headers["Location"], body) == (303, "/dashboard", "")
    assert headers["Set-Cookie"] == set_cookie(7077, TOKEN)


def test_who_comes_by_a_link_on_another_site_is_sent_on_by_a_page_of_ours() -> None:
    status, headers, body = login({"Sec-Fetch-Site": "cross-site"}, 7077, TOKEN)
    assert (status, "Location" in headers) == (200, False)
    assert 'content="0; url=/dashboard"' in body
    assert TOKEN not in body


def test_the_page_of_who_has_no_token_says_where_it_is_and_needs_nothing_else() -> None:
    text = page()
    assert "/dashboard?token=" in text
    for foreign in ("<script", "http://www", "https://", "src=", "@import"):
        assert foreign not in text
    assert "prefers-color-scheme: dark" in text
