"""What the page asks for, over HTTP."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from socket import socket
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from btok.files import one_line, printable
from btok.tools.web.shelf import SIZES, Shelf

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise ImportError('the page needs fastapi and uvicorn: pip install "btok[web]"') from error

HERE = Path(__file__).parent
LARGEST = 32 << 20  # bytes of a picture that is searched by
LONGEST = 1 << 18  # bytes of a request's head: 8,192 characters of a query, spelled as an address
PATIENCE = 2  # seconds that answers in work have once the server is to stop
# what browsers show by themselves and run no script of; a file of another kind is saved
INLINE = {
    **dict.fromkeys((".png", ".apng"), "image/png"),
    **dict.fromkeys((".jpg", ".jpeg", ".jfif"), "image/jpeg"),
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".avif": "image/avif",
    ".bmp": "image/bmp",
    ".pdf": "application/pdf",
    **dict.fromkeys((".mp4", ".m4v"), "video/mp4"),
    ".webm": "video/webm",
    ".ogv": "video/ogg",
    ".mov": "video/quicktime",
}
OWN = "default-src 'none'; connect-src 'self'; img-src 'self' blob:; media-src 'self'; "
OWN += "script-src 'self'; style-src 'self'; base-uri 'none'; form-action 'self'; "
OWN += "frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": OWN,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# of files: one that a browser takes for a document of its own has no script and no origin
SANDBOX = {"Content-Security-Policy": "default-src 'none'; sandbox"}
VIEWED = {"Content-Security-Policy": "frame-ancestors 'none'"}  # no viewer opens in a sandbox
FOREVER = {"Cache-Control": "private, max-age=86400"}  # an id is of a content

Kind = Annotated[Literal["picture", "page", "video", "text"] | None, Query()]
Count = Annotated[int, Query(ge=1, le=240)]
Name = Annotated[str, Query(alias="id", max_length=4096)]


def make_app(shelf: Shelf, about: dict[str, Any], names: Collection[str]) -> FastAPI:
    """The web app with the page and its HTTP endpoints.

    Args:
        shelf: what is shown.
        about: told to the page as it is.
        names: by which the page may be called, besides any address. A page elsewhere whose name was
            made to lead here (DNS rebinding) is refused.
    """
    tried = partial(_tried, shelf)
    # no pages of its own documentation: they load scripts from elsewhere
    app = FastAPI(title="btok", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RequestValidationError)
    def mistaken(request: Request, error: RequestValidationError) -> JSONResponse:
        said = "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in error.errors())
        return JSONResponse({"detail": said}, 422)

    @app.exception_handler(Exception)
    def failed(request: Request, error: Exception) -> JSONResponse:
        traceback.print_exception(error)
        return JSONResponse({"detail": "an error of the server; its terminal says which"}, 500)

    @app.middleware("http")
    async def guarded(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        host = request.headers.get("host", "")
        site = request.headers.get("sec-fetch-site")
        response: Response
        if not _is_own(host, names):
            why = f"this page is not served as {printable(host)[:200]!r}; open it by its address, "
            response = JSONResponse({"detail": f"{why}or start it with that name as --host"}, 400)
        elif site == "cross-site" and request.url.path != "/":
            response = JSONResponse({"detail": "asked for by another site"}, 403)
        else:
            response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    for name in ("index.html", "style.css", "page.js", "icon.svg"):
        app.get("/" if name == "index.html" else f"/{name}")(_static(name))

    @app.get("/api/about")
    def tell() -> dict[str, Any]:
        return about

    @app.get("/api/first")
    def first(kind: Kind = None, k: Count = 24) -> list[dict[str, Any]]:
        return tried(shelf.first, kind, k)

    @app.get("/api/search")
    def search(
        q: Annotated[str, Query(max_length=8192)] = "", kind: Kind = None, k: Count = 24
    ) -> list[dict[str, Any]]:
        return tried(shelf.search, q, b"", kind, k)

    @app.post("/api/search")
    async def search_by_picture(
        request: Request,
        q: Annotated[str, Query(max_length=8192)] = "",
        kind: Kind = None,
        k: Count = 24,
    ) -> list[dict[str, Any]]:
        picture = bytearray()
        try:
            async for part in request.stream():
                picture += part
                if len(picture) > LARGEST:
                    raise HTTPException(413, f"the picture has more than {LARGEST >> 20} MiB")
        except ClientDisconnect:  # nobody reads the answer
            raise HTTPException(400, "the picture did not come whole") from None
        return await run_in_threadpool(tried, shelf.search, q, bytes(picture), kind, k)

    @app.get("/api/near")
    def near(name: Name, kind: Kind = None, k: Count = 24) -> list[dict[str, Any]]:
        return tried(shelf.near, name, kind, k)

    @app.get("/api/item")
    def item(name: Name) -> dict[str, Any]:
        return tried(lambda: shelf.told(shelf.item(name)))

    @app.get("/thumbnail")
    def thumbnail(name: Name, size: Annotated[str, Query()] = "small") -> Response:
        if size not in SIZES:
            raise HTTPException(422, f"size is {size!r:.40}, expected one of {', '.join(SIZES)}")
        shown = tried(lambda: shelf.thumbnail(shelf.item(name), size))
        if shown is None:
            raise HTTPException(404, "a text has no picture")
        return Response(shown.data, media_type=shown.media_type, headers=FOREVER)

    @app.get("/text")
    def text(name: Name) -> Response:
        said = tried(lambda: shelf.text(shelf.item(name)))
        return PlainTextResponse(said.encode(errors="replace"), headers=SANDBOX)

    @app.get("/file")
    def file(name: Name) -> Response:
        path = tried(lambda: shelf.path(shelf.item(name)))
        media = INLINE.get(path.suffix.lower())
        return FileResponse(
            path,
            media_type=media or "application/octet-stream",
            filename=printable(path.name),
            content_disposition_type="inline" if media else "attachment",
            headers=VIEWED if media == "application/pdf" else SANDBOX,
        )

    return app


def run(app: FastAPI, listening: socket) -> None:
    """Answer at this socket until Ctrl-C, or until the process is terminated."""
    config = uvicorn.Config(
        app,
        http="h11",
        h11_max_incomplete_event_size=LONGEST,
        lifespan="off",
        # it tells of each answer that it does not wait for; `failed` tells of errors
        log_level="critical",
        timeout_graceful_shutdown=PATIENCE,
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run([listening])


def _is_own(host: str, names: Collection[str]) -> bool:
    """Whether a request's "host" is an address, which no other site's name leads to, or one of
    these names.
    """
    try:
        name = (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return False
    try:
        return bool(ip_address(name))
    except ValueError:
        return name in names


def _static(name: str) -> Callable[[], Response]:
    def send() -> Response:
        # asked for again each time: a new version of the library is a new page
        return FileResponse(HERE / name, headers={"Cache-Control": "no-cache"})

    return send


def _tried(shelf: Shelf, work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call, or the HTTP error with the reason in one line."""
    try:
        shelf.must_be_there()
        try:
            return work(*arguments)
        except Exception:  # whatever is said of a folder that went meanwhile
            shelf.must_be_there()
            raise
    except KeyError:
        raise HTTPException(404, "the index has no such item") from None
    except PermissionError as error:
        raise HTTPException(403, _line(error)) from None
    except FileNotFoundError as error:
        raise HTTPException(410, _line(error)) from None
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise HTTPException(422, _line(error)) from None


def _line(error: Exception) -> str:
    return printable(one_line(error)).removeprefix("BTokEncoder: input 0: ")  # a page has one
