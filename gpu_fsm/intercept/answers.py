"""What a client is told instead of an answer: an error of ours as HTTP, in the shape its API has."""

from __future__ import annotations

import json
from typing import Any

from attrs import frozen

from gpu_fsm import errors
from gpu_fsm.status import plain

RETRY_AFTER_S = 2
"""For refusals that another try may mend; recovery and drains take about so long."""

_STATUS: tuple[tuple[type[errors.GPUFSMError], int], ...] = (
    (errors.BadArgument, 400),
    (errors.ModelNotFound, 404),
    (errors.OllamaRequestRejected, 403),
    (errors.OperationTimeout, 504),
    (errors.LoadTimeout, 504),
    (errors.OllamaTimeout, 504),
    (errors.Refused, 503),
    (errors.ManagerClosed, 503),
    (errors.OllamaBusy, 503),
    (errors.LoadFailed, 500),
    (errors.OllamaError, 502),
)


@frozen(kw_only=True)
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes


def answer_for(error: errors.GPUFSMError, path: str, *, status: int | None = None) -> Answer:
    """The refusal `error` for a request to `path`; `status` None derives it from the error's class."""
    if status is None:
        status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
    text = str(error)
    if path.startswith("/v1/"):
        body: dict[str, Any] = {"error": {"message": text, "type": "api_error", "param": None, "code": error.code}}
    elif path.startswith("/gpu-fsm/"):
        body = {"error": text, "code": error.code, **facts(error)}
    else:
        body = {"error": text}
    headers = {"Content-Type": "application/json; charset=utf-8", "GPU-FSM-Error": error.code}
    if error.retryable and status >= 500:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
    return Answer(status=status, headers=headers, body=data)


def facts(error: errors.GPUFSMError) -> dict[str, Any]:
    """The figures of an error, as plain JSON."""
    return {name: value for name, value in plain(error).items() if name != "detail"}
