"""Export of results as a file, made for one response, which browsers save and do not open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, BinaryIO, Literal
from weakref import WeakSet

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import StreamingResponse

from api.declared import READ
from api.deps import STRICT, SearchId, StoreDep
from api.problems import refusals
from nas.service.export import export
from nas.store import Store

router = APIRouter(prefix="/v1/searches", dependencies=[READ, STRICT])
FileFormat = Literal["csv", "parquet", "json"]
Rows = Literal["trials", "points"]
#: format → (media type, JSON Schema)
_TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "json": ("application/json", {"type": "object", "required": ["columns", "rows"]}),
    "csv": ("text/csv", {"type": "string"}),
    "parquet": ("application/vnd.apache.parquet", {"type": "string", "format": "binary"}),
}
_CONTENT = {media_type: {"schema": schema} for media_type, schema in _TYPES.values()}
#: Files are made one at a time: that of a large search occupies a core for seconds.
_MAKERS = CapacityLimiter(1)
_PART = 256 * 1024
#: Most files sent at once: each takes space on the disk until its client has it.
_MOST_OPEN = 16
_open: WeakSet[BinaryIO] = WeakSet()


@router.get(
    "/{search_id}/export",
    response_class=StreamingResponse,
    responses={200: {"description": "The file", "content": _CONTENT}, **refusals(404)},
    summary="Export every trial of a search, or every evaluation, as a file",
)
async def export_search(
    search_id: SearchId,
    store: StoreDep,
    file_format: Annotated[FileFormat, Query(alias="format")] = "csv",
    rows: Annotated[
        Rows, Query(description="one row for each: trials | points (evaluations)")
    ] = "trials",
) -> StreamingResponse:
    if len(_open) >= _MOST_OPEN:
        raise HTTPException(503, f"{_MOST_OPEN} files are being sent; try again later")
    file = await to_thread.run_sync(_made, store, search_id, file_format, rows, limiter=_MAKERS)
    _open.add(file)
    name = f"{rows}-{search_id[:8]}.{file_format}"
    headers = {
        "Content-Disposition": f'attachment; filename="{name}"',
        "Content-Length": str(os.fstat(file.fileno()).st_size),
    }
    return StreamingResponse(_parts(file), media_type=_TYPES[file_format][0], headers=headers)


def _made(store: Store, search_id: str, file_format: FileFormat, rows: Rows) -> BinaryIO:
    """The file, open and already unlinked: it is deleted once it is closed."""
    store.search(search_id)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "export"
        export(store, file_format, str(out), search_id=search_id, rows=rows)
        return out.open("rb")


def _parts(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while part := file.read(_PART):
            yield part
