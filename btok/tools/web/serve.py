"""`python -m btok serve`: the index of a folder is brought up to date, and its page served."""

from __future__ import annotations

import errno
import os
import socket
import sys
import webbrowser
from dataclasses import dataclass, fields
from ipaddress import ip_address
from pathlib import Path

from btok.files import printable
from btok.tools.command_line import load
from btok.tools.encode_folder import Encode, bring_up_to_date, listed
from btok.tools.sinks import is_index


@dataclass(frozen=True)
class Serve(Encode):
    """Search a folder on a local web page: by words or a picture, and what is near a hit.

    Args:
        query_instruction: put before the text of queries.
        update: encode first what is new or changed; --no-update serves an index as it is.
        host: the address to listen at; 0.0.0.0 shows the folder's files to all who reach this
            machine.
        port: to listen at; 0 for any that is free.
        browser: open the page in this machine's browser.
    """

    query_instruction: str = ""
    update: bool = True
    host: str = "127.0.0.1"
    port: int = 8765
    browser: bool = False


def serve(command: Serve) -> None:
    """Serve the page until the process is told to stop.

    Raises:
        ValueError: no folder or checkpoint, no index to serve as it is, several processes.
        OSError: an address or a port that cannot be listened at.
        ImportError: without the extra `web`.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "serve is one process; make the index by `torchrun -m btok encode`, then serve it"
        )
    # before anything is encoded: what is missing, and the port
    from btok.tools.index import Index
    from btok.tools.web.app import make_app, run
    from btok.tools.web.shelf import Shelf

    if not is_index(command.index):
        raise ValueError(f"output is {command.output}, expected an index to serve")
    found, root = listed(command), command.folder.resolve()
    encoding = {field.name: field.default for field in fields(Encode)}
    for name in encoding.keys() - {"checkpoint", "folder", "output"}:
        if not command.update and getattr(command, name) != encoding[name]:
            raise ValueError(f"{name} is given, which is for encoding; leave --no-update out")
    if not command.update and "://" not in command.index and not Path(command.index).is_dir():
        raise ValueError(
            f"{command.folder} has no index; leave --no-update out, or make it: "
            f"python -m btok encode {command.checkpoint} {command.folder}"
        )
    with bound(command.host, command.port) as listening:
        encoder = load(command.checkpoint)
        if command.update:
            index = bring_up_to_date(command, found, encoder=encoder)
            assert index is not None  # `is_index`
        else:
            index = Index.open(command.index, encoder)
        index.encoder = encoder
        shelf = Shelf(index, root, found.real, command.query_instruction)
        about = {"folder": printable(root.name), "items": len(index)}
        about |= {"model": printable(Path(command.checkpoint).name), "kinds": shelf.counts()}
        about["pictures"] = encoder.processor.image_processor is not None
        at, port = listening.getsockname()[:2]
        local = ip_address(at).is_loopback
        app = make_app(shelf, about, {"localhost"} if local else names(command.host))
        url = address("localhost" if ip_address(at).is_unspecified else command.host, port)
        print(f"{url}  {len(index)} items of {printable(command.folder)} (Ctrl-C stops it)")
        if not local:
            print(
                f"warning: whoever reaches {command.host} can open the indexed files",
                file=sys.stderr,
            )
        sys.stdout.flush()
        if command.browser and not webbrowser.open(url):
            print(f"no browser was found here; open {url} in one", file=sys.stderr)
        run(app, listening)


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there; an OSError that says what to do where it cannot."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"port is {port}, expected 0 to 65535")
    if not host.strip():  # which would be all addresses
        raise ValueError(f"host is {host!r}, expected an address or a name; 0.0.0.0 for all")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # "localhost" is both, and 127.0.0.1 what people type
        family, _, _, _, place = min(found, key=lambda each: each[0] != socket.AF_INET)
        return socket.create_server(place, family=family, backlog=128)
    except (socket.gaierror, UnicodeError):
        raise ValueError(f"host is {host!r}, which is no address of this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                f"port {port} of {host} is taken; give another with --port, or 0 for any"
            ) from None
        if error.errno == errno.EACCES:
            raise OSError(f"port {port} is not for you; give one above 1023 with --port") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise ValueError(f"host is {host!r}, which is no address of this machine") from None
        raise


def names(host: str) -> set[str]:
    """The host names that the page may be requested by: this machine's own, and the one given."""
    own = socket.gethostname().lower()
    short = own.partition(".")[0]
    return {"localhost", own, short, f"{short}.local", host.lower()}


def address(host: str, port: int) -> str:
    """The address to open in a browser."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
