"""The library that draws figures: whole, as the package plotly brings it, and a part of it.

The part draws lines, bars and points, which is all that most pages need, in a quarter of the bytes.
"""

from __future__ import annotations

import gzip
import re
from functools import lru_cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from api.declared import PUBLIC, WITHOUT_STORE

Script = Literal["plotly", "plotly-basic"]
router = APIRouter(include_in_schema=False, dependencies=[PUBLIC, WITHOUT_STORE])
_VENDOR = Path(__file__).parent / "vendor"
_HEADERS = {"Cache-Control": "public, max-age=86400", "Vary": "Accept-Encoding"}


@router.get("/static/plotly.min.js")
def whole(request: Request) -> Response:
    return _sent(request, "plotly")


@router.get("/static/plotly-basic.min.js")
def basic(request: Request) -> Response:
    return _sent(request, "plotly-basic")


def _sent(request: Request, script: Script) -> Response:
    kind = "text/javascript"
    if "gzip" not in request.headers.get("accept-encoding", ""):
        return FileResponse(file_of(script), headers=_HEADERS, media_type=kind)
    headers = _HEADERS | {"Content-Encoding": "gzip"}
    return Response(_compressed(script), headers=headers, media_type=kind)


@lru_cache(maxsize=2)
def _compressed(script: Script) -> bytes:
    """Compressed once: it takes as long as a hundred pages."""
    return gzip.compress(file_of(script).read_bytes())


def file_of(script: Script) -> Path:
    """Where the script lies."""
    if script == "plotly-basic":
        return _VENDOR / "plotly-basic.min.js"
    return Path(str(distribution("plotly").locate_file("plotly/package_data/plotly.min.js")))


@lru_cache(maxsize=2)
def styles(script: Script) -> tuple[str, ...]:
    """Ids of the <style> elements that the script would add for its maps.

    It adds none that is there already, and the pages' policy refuses inline styles, so the page has
    empty elements with these ids.  The ids are digests that change with plotly's version.
    """
    text = file_of(script).read_text(encoding="utf-8")
    return tuple(dict.fromkeys(re.findall(r'getElementById\("([0-9a-f]{64})"\)', text)))
