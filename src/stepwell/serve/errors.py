"""What a server answers where it cannot answer, in OpenAI's form. No message repeats what a request held, or
names a path.
"""

from __future__ import annotations

from typing import Any

from stepwell.folders import one_line

__all__ = ["ApiError", "refusal"]

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """status: of HTTP. code: for programs. param: the field of the request that is wrong. retry_after: in
    seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        return _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    @property
    def body(self) -> dict[str, Any]:
        about = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": about}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (413, 504):  # what is left of the body is not read
            headers["Connection"] = "close"
        return headers


def refusal(error: ValueError, *, param: str | None = None) -> ApiError:
    """Of what our code refuses in so many words; what only its own users could change is left out."""
    return ApiError(400, one_line(error).partition("; limits=ImageLimits(")[0], param=param)
