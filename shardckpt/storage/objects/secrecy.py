"""Keeping credentials out of everything that people or logs get to see."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from urllib.parse import parse_qsl, unquote

HIDDEN = "***"
# Shorter values ("us", "v4") are no secrets, and hiding them would tear every message to pieces.
_SHORTEST_SECRET = 4
# Options whose values help in a message and hide nothing, unless they are URLs with a user or a query.
_PLAIN_OPTIONS = frozenset(
    {"endpoint_url", "region_name", "region", "profile", "project", "host", "account_name", "signature_version"}
)
# The same for what is written as pairs in one option: connection strings of Azure, and its signed queries.
_PLAIN_PAIRS = frozenset(
    {"accountname", "defaultendpointsprotocol", "blobendpoint", "endpointsuffix"}
    | {"sv", "ss", "srt", "sr", "sp", "spr", "st", "se", "sip", "skv", "sks", "skt", "ske"}
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


def redact(url: str) -> str:
    """The URL without user name, password, query and fragment; what is not a URL is given back as it is."""
    return "::".join(_redact_one(link) for link in url.split("::")) if "://" in url else url


def _redact_one(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    rest = rest[_userinfo_end(rest) :]
    for mark in "?#":
        rest = rest.partition(mark)[0]
    return f"{scheme}://{rest}"


def _userinfo_end(rest: str) -> int:
    """Where the host begins, in what follows "://".

    A password may hold "/" or "?" that should have been escaped (keys of AWS often have one): an "@" behind them still
    ends it if a ":" that begins no port number stands in front of them.
    """
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    port = authority.rpartition(":")[2]
    if ":" in authority and not port.isdigit() and "@" in rest:
        return rest.rindex("@") + 1
    return authority.rfind("@") + 1


def url_secrets(url: str) -> Iterator[str]:
    """User information, query values and fragment of a URL, each as written and unescaped."""
    _, separator, rest = url.partition("://")
    if not separator:
        return
    userinfo, tail = rest[: max(0, _userinfo_end(rest) - 1)], rest[_userinfo_end(rest) :]
    query, _, fragment = tail.partition("?")[2].partition("#")
    fragment = fragment or tail.partition("?")[0].partition("#")[2]
    for text in (userinfo, *userinfo.split(":", 1), query, fragment, *(value for _, value in parse_qsl(query))):
        yield text
        yield unquote(text)


def option_secrets(options: object, name: str = "") -> Iterator[str]:
    """Every text in `storage_options`, at any depth, that may be secret."""
    if isinstance(options, Mapping):
        for key, value in options.items():
            yield from option_secrets(value, str(key))
    elif isinstance(options, list | tuple | set | frozenset):
        for value in options:
            yield from option_secrets(value, name)
    elif isinstance(options, bytes):
        yield from option_secrets(options.decode("utf-8", "replace"), name)
    elif isinstance(options, str):
        if name not in _PLAIN_OPTIONS:
            yield options
            yield from _pair_secrets(options)
        yield from url_secrets(options)


def _pair_secrets(text: str) -> Iterator[str]:
    """Those in "AccountName=a;AccountKey=b" or "sv=1&sig=b", each as written and unescaped: a service is sent, and may
    say, one of them by itself."""
    for pair in re.split("[;&?]", text):
        name, _, value = pair.partition("=")
        if name.lower() not in _PLAIN_PAIRS:
            yield value
            yield unquote(value)


class Redactor:
    """Takes known secrets, and whatever a URL may hide, out of texts."""

    def __init__(self, *, url: str = "", options: object = None) -> None:
        found = {*url_secrets(url), *option_secrets(options)}
        # The longest first: a secret may begin with another.
        self._secrets = sorted((text for text in found if len(text) >= _SHORTEST_SECRET), key=len, reverse=True)

    def __repr__(self) -> str:
        return f"Redactor({len(self._secrets)} secrets)"

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return _URL.sub(lambda match: redact(match.group()), text)
