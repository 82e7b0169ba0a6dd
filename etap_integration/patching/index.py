"""Finding a pinned file on the package index that pip is configured for.

``pip download`` would run an sdist's build step just to read its metadata (here: import torch), so the file's address
is read from the index itself (PEP 503 HTML or PEP 691 JSON). What it serves is checked against the pin afterwards.
"""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import url2pathname

import requests
from packaging.utils import canonicalize_name
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from .errors import DownloadError
from .manifest import Archive

DEFAULT_INDEX = "https://pypi.org/simple"
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_TIMEOUT = (15, 120)  # connect, read: seconds


@dataclass(frozen=True)
class IndexSettings:
    """The part of pip's configuration that says where packages come from."""

    indexes: tuple[str, ...] = (DEFAULT_INDEX,)
    find_links: tuple[str, ...] = ()
    cert: str | None = None


def read_settings(environ: Mapping[str, str] | None = None) -> IndexSettings:
    """pip's index settings: its configuration files and ``PIP_*`` variables, as ``pip config list`` merges them.

    Without pip in this interpreter only the variables count.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, str] = {}
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, env=dict(environ), check=False)
    for line in listed.stdout.splitlines() if listed.returncode == 0 else ():
        key, _, value = line.partition("=")
        section, _, option = key.partition(".")
        if section in ("global", "download", "install"):
            try:
                values.setdefault(option, str(ast.literal_eval(value)))
            except (SyntaxError, ValueError):
                continue
    for option in ("index-url", "extra-index-url", "find-links", "cert", "no-index"):
        values[option] = environ.get("PIP_" + option.upper().replace("-", "_")) or values.get(option, "")
    indexes = [] if values["no-index"].lower() in ("1", "true", "yes", "on") else [values["index-url"] or DEFAULT_INDEX]
    if indexes:
        indexes += values["extra-index-url"].split()
    return IndexSettings(tuple(indexes), tuple(values["find-links"].split()), values["cert"] or None)


def download(
    pinned: Archive, target: Path, settings: IndexSettings, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write the pinned file to `target`, without checking its hash.

    Args:
        pinned: which file.
        target: where to; overwritten.
        settings: where from.
        progress: called with (bytes so far, bytes in all).

    Raises:
        DownloadError: no configured index offers the file, or the transfer failed everywhere.
    """
    session = requests.Session()
    session.mount("https://", HTTPAdapter(max_retries=Retry(3, backoff_factor=0.5, status_forcelist=(500, 502, 503))))
    if settings.cert:
        session.verify = settings.cert
    problems = []
    for place, find in _sources(pinned, settings, session):
        try:
            url = find()
            if url is None:
                problems.append(f"{place}: does not offer it")
                continue
            _transfer(url, pinned, target, session, progress)
            return
        except (requests.RequestException, ValueError, KeyError) as error:
            problems.append(f"{place}: {_without_credentials(str(error), place)}")
    raise DownloadError(
        f"{pinned.project}=={pinned.version} ({pinned.filename}) could not be downloaded:\n"
        + "\n".join(f"  {p}" for p in problems or ["no package index is configured (PIP_NO_INDEX is set)"])
        + "\nGive the file with --archive, or a checkout with --source"
    )


def _sources(
    pinned: Archive, settings: IndexSettings, session: requests.Session
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    for place in settings.find_links:
        folder = _local_path(place)
        if folder is not None and (folder / pinned.filename).is_file():
            yield str(folder), (folder / pinned.filename).as_uri
    for index in settings.indexes:
        page = f"{index.rstrip('/')}/{canonicalize_name(pinned.project)}/"
        yield redact(index), functools.partial(_find, page, pinned.filename, session)


def _find(page: str, filename: str, session: requests.Session) -> str | None:
    folder = _local_path(page)
    if folder is not None:
        file = folder / "index.html"
        links = _html_links(file.read_text(encoding="utf-8")) if file.is_file() else {}
    else:
        answer = session.get(page, headers={"Accept": _ACCEPT}, timeout=_TIMEOUT)
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        page = answer.url
        if "json" in answer.headers.get("Content-Type", ""):
            links = {entry["filename"]: entry["url"] for entry in answer.json()["files"]}
        else:
            links = _html_links(answer.text)
    return urljoin(page, links[filename]).partition("#")[0] if filename in links else None


def _html_links(text: str) -> dict[str, str]:
    links: dict[str, str] = {}

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            href = dict(attrs).get("href")
            if tag == "a" and href:
                links.setdefault(unquote(urlsplit(href).path).rpartition("/")[2], href)

    Parser().feed(text)
    return links


def _transfer(
    url: str, pinned: Archive, target: Path, session: requests.Session, progress: Callable[[int, int], None] | None
) -> None:
    local = _local_path(url)
    with target.open("wb") as sink:
        if local is not None:
            sink.write(local.read_bytes())
        else:
            done = 0
            with session.get(url, stream=True, timeout=_TIMEOUT, headers={"Accept-Encoding": "identity"}) as answer:
                answer.raise_for_status()
                for block in answer.iter_content(1 << 18):
                    done += sink.write(block)
                    if progress:
                        progress(done, pinned.size)
                    if done > pinned.size:
                        break  # not the pinned file; the hash check says so
        sink.flush()
        os.fsync(sink.fileno())


def _local_path(place: str) -> Path | None:
    if place.startswith("file:"):
        return Path(url2pathname(urlsplit(place).path))
    return None if "://" in place else Path(place)


def redact(url: str) -> str:
    """The address without user name and password, for messages."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _without_credentials(text: str, place: str) -> str:
    return text.splitlines()[0] if "@" not in text else f"failed at {place}"
