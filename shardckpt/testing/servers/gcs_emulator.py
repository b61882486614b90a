"""The program that `gcs` starts: `gcp-storage-emulator`, taught what it lacks of the service itself.

The condition that an object is not there yet (`ifGenerationMatch=0`), and that an upload can be given up (which the
service answers with 499). `--plain` leaves the first one out.
"""

from __future__ import annotations

import sys
import threading
from http import HTTPStatus
from typing import Any

_deciding = threading.Lock()


def main(arguments: list[str]) -> None:
    """Run the emulator; `arguments` are its own, after `--plain` if that is wanted."""
    from gcp_storage_emulator import __main__ as emulator
    from gcp_storage_emulator import server
    from gcp_storage_emulator.handlers import objects

    plain = arguments[:1] == ["--plain"]
    for _, handlers in server.HANDLERS:
        if handlers.get(server.POST) is objects.insert:
            handlers[server.DELETE] = _give_up
            if not plain:
                handlers[server.POST] = _insert
    emulator.main(arguments[plain:])


def _insert(request: Any, response: Any, storage: Any, *rest: object, **options: object) -> None:
    """One at a time, so that nobody comes between the look and the put."""
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    asks = request.query.get("ifGenerationMatch") == ["0"] and "upload_id" not in request.query
    with _deciding:
        if asks:
            name = request.query["name"][0] if "name" in request.query else request.data["meta"]["name"]
            try:
                storage.get_file_obj(request.params["bucket_name"], name)
            except NotFound:
                pass
            else:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
        objects.insert(request, response, storage, *rest, **options)


class _GivenUp:
    value, phrase = 499, "Client Closed Request"


def _give_up(request: object, response: Any, *rest: object, **options: object) -> None:
    response.status = _GivenUp


if __name__ == "__main__":
    main(sys.argv[1:])
