"""Failures of object stores: decision whether a request is retried, and sentences for the user about the other failures.

Exceptions of the stores' clients are recognised by their names, since a client need not be installed. The messages of
these exceptions are never shown, since they may contain a secret.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
from collections.abc import Iterator

from dist_gan.types import TrainingFailed, UserError

_TRANSIENT = (errno.EIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EBUSY, errno.EAGAIN)
_CLIENTS = ("aiohttp", "botocore", "aiobotocore", "requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2")
_OVERLOADED = ("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "ServiceUnavailable", "InternalError")
_NO_CREDENTIALS = (
    "ProfileNotFound", "UnauthorizedSSOTokenError", "SSOTokenLoadError", "TokenRetrievalError", "RefreshError",
    "ClientAuthenticationError", "LocalTokenNotFoundError", "ConfigParseError", "InvalidConfigError", "GatedRepoError",
)  # fmt: skip
"""Names of exceptions for unusable credentials, besides names that contain `Credential` (botocore, google.auth)."""
_REFUSED_CODES = (
    "AccessDenied", "AccountProblem", "AllAccessDisabled", "ExpiredToken", "ExpiredTokenException", "Forbidden",
    "InvalidAccessKeyId", "InvalidClientTokenId", "InvalidSecurity", "InvalidToken", "NotSignedUp",
    "RequestTimeTooSkewed", "SignatureDoesNotMatch", "TokenRefreshRequired", "Unauthorized", "UnrecognizedClientException",
)  # fmt: skip
_WRONG_REGION = (
    "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "InvalidLocationConstraint", "PermanentRedirect",
    "Redirect", "TemporaryRedirect",
)  # fmt: skip
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "FilesystemNotFound")
_PASSES = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)
_LATER = "start the same command again when it does"
_CHAIN = 12
"""Largest number of an exception's chained causes that are examined."""


class Silent(ConnectionError):
    """Raised when a store has not answered within the time limit of the retries."""


def failure(error: Exception, place: str, *, later: str = _LATER) -> UserError | TrainingFailed:
    """Returns the exception to raise for a failed operation: UserError if the store refuses, TrainingFailed otherwise.

    Args:
        error: exception of the store's client.
        place: description of the operation, with which the error sentence begins.
        later: remedy, with which the sentence about a store that did not answer ends.
    """
    if isinstance(error, UserError | TrainingFailed):
        return error
    if isinstance(error, Silent):
        return TrainingFailed(f"{place}: {error}; {later}")
    if is_transient(error) and not is_unresolved(error):
        return TrainingFailed(f"{place}: the store does not answer ({reason(error)}); {later}")
    refused = refusal(error)
    if refused is not None:
        return UserError(f"{place}: {refused}")
    if isinstance(error, FileNotFoundError):
        return TrainingFailed(f"{place}: it is not there")
    # A client's message may hold a secret; its type does not.
    said = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__
    return TrainingFailed(f"{place}: {said}")


def is_transient(error: BaseException, *, depth: int = _CHAIN) -> bool:
    """Returns True if the same request may succeed later: no answer, a broken connection, an overloaded server.

    At most `depth` chained causes of the exception are examined, since the causes may form a cycle.
    """
    if not depth:
        return False
    if isinstance(error, _PASSES):
        # fsspec reports a file as absent if its web server did not answer.
        cause = error.__cause__
        return (
            cause is not None
            and type(cause).__module__.split(".")[0] in _CLIENTS
            and is_transient(cause, depth=depth - 1)
        )
    if isinstance(error, PermissionError) or _lacks_credentials(error) or _tls_fault(error):
        return False
    if isinstance(error, OSError) and error.__cause__ is not None and hasattr(error.__cause__, "response"):
        return is_transient(error.__cause__, depth=depth - 1)  # s3fs turns every unknown error into an EIO
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT:
        return True
    if type(error).__name__ in ("ParamValidationError", "InvalidURL", "NoRegionError", "InvalidRegionError"):
        return False
    if _code(error) in _OVERLOADED:
        return True
    status = _status(error)
    if status is not None:
        return status >= 500 or status == 429
    if type(error).__module__.split(".")[0] in _CLIENTS:
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_transient(cause, depth=depth - 1)


def is_unresolved(error: BaseException) -> bool:
    """Returns True if the host name of the store cannot be resolved."""
    return any(isinstance(e, socket.gaierror) for e in _chain(error))


def is_unconnected(error: BaseException) -> bool:
    """Returns True if no connection to the store was made: refused, timed out, or host name not resolved."""
    return is_unresolved(error) or any(isinstance(e, ConnectionRefusedError | TimeoutError) for e in _chain(error))


def reason(error: BaseException) -> str:
    """Returns a short description of a failed request, for parentheses in a sentence."""
    if is_unresolved(error):
        return f"the name of {_host(error) or 'its machine'} cannot be resolved"
    if any(isinstance(e, ConnectionRefusedError) for e in _chain(error)):
        return f"{_host(error) or 'its machine'} refuses the connection"
    if any(isinstance(e, TimeoutError) or "Timeout" in type(e).__name__ for e in _chain(error)):
        return f"no answer from {_host(error) or 'its machine'} in time"
    status = next((s for e in _chain(error) if (s := _status(e)) is not None), None)
    if status is not None:
        return f"it answers {status}{': too many requests' if status == 429 else ''}"
    return type(error.__cause__ or error).__name__


def refusal(error: BaseException) -> str | None:
    """Returns the reason why a store refuses a request, with a remedy; None for temporary failures and absent files."""
    if is_unresolved(error):
        return (
            f"the name of {_host(error) or 'the store'} cannot be resolved; check the endpoint (AWS_ENDPOINT_URL for s3), "
            f"the URL, and this machine's network"
        )
    fault = _tls_fault(error)
    if fault:
        return f"{_host(error) or 'the store'} {fault}; check the endpoint and its certificate"
    codes = [code for e in _chain(error) if (code := _code(e)) is not None]
    statuses = [status for e in _chain(error) if (status := _status(e)) is not None]
    names = [type(e).__name__ for e in _chain(error)]
    if any(code in _NO_BUCKET for code in codes):
        return "the bucket does not exist; check its name, and that the endpoint is the right one"
    if "ParamValidationError" in names or "InvalidBucketName" in codes:
        return "this is no name that a bucket or an object can have; check the URL"
    if any(code in _WRONG_REGION for code in codes) or any(status in (301, 307, 308) for status in statuses):
        return (
            f"the bucket is in {_region(error)}; set AWS_DEFAULT_REGION to the bucket's region, and check the endpoint"
        )
    if isinstance(error, RecursionError):  # botocore follows endless redirects of a bucket
        return "the store sends requests round in a circle; check the region in AWS_DEFAULT_REGION and the endpoint"
    if "NoRegionError" in names or "InvalidRegionError" in names:
        return "no usable region is given; set AWS_DEFAULT_REGION to the bucket's"
    if any(_lacks_credentials(e) for e in _chain(error)):
        return _access("none that can be used were found")
    if isinstance(error, PermissionError) or any(c in _REFUSED_CODES for c in codes) or set(statuses) & {401, 403}:
        code = next((code for code in codes if not code.isdigit()), None)
        return _access(_SAID.get(code or "", code))
    if "InvalidURL" in names or any(isinstance(e, ValueError) and "endpoint" in str(e).lower() for e in _chain(error)):
        return "the endpoint is no URL; give one such as http://localhost:9000 or https://HOST in AWS_ENDPOINT_URL"
    if (codes or statuses) and not isinstance(error, _PASSES):
        return f"the store answers {', '.join(dict.fromkeys([*codes, *map(str, statuses)]))}"
    return None


_SAID = {
    "ExpiredToken": "they have expired: ExpiredToken",
    "ExpiredTokenException": "they have expired: ExpiredToken",
    "TokenRefreshRequired": "they have expired: TokenRefreshRequired",
    "RequestTimeTooSkewed": "this machine's clock is wrong: RequestTimeTooSkewed",
}


def _access(detail: str | None) -> str:
    shown = f" ({detail})" if detail else ""
    return f"the store refuses access; check the credentials in the environment{shown}, and what they may do"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an exception, then its chained causes."""
    found: BaseException | None = error
    for _ in range(_CHAIN):
        if found is None:
            return
        yield found
        inner = getattr(found, "os_error", None)
        if isinstance(inner, BaseException):
            yield inner
        found = found.__cause__ or found.__context__


def _lacks_credentials(error: BaseException) -> bool:
    return "Credential" in type(error).__name__ or type(error).__name__ in _NO_CREDENTIALS


def _tls_fault(error: BaseException) -> str | None:
    for found in _chain(error):
        if isinstance(found, ssl.SSLCertVerificationError):
            return "shows a certificate that is not trusted"
        if isinstance(found, ssl.SSLError) and getattr(found, "reason", None) == "WRONG_VERSION_NUMBER":
            return "does not speak https"
    return None


def _answer(error: BaseException) -> dict[str, object]:
    answer = getattr(error, "response", None)
    return answer if isinstance(answer, dict) else {}


def _code(error: BaseException) -> str | None:
    """Returns the error code, a single word, in a response of S3 or of a client with the same convention; else None."""
    said = _answer(error).get("Error")
    code = said.get("Code") if isinstance(said, dict) else getattr(error, "error_code", None)
    return code if isinstance(code, str) and re.fullmatch(r"[A-Za-z0-9.]{1,64}", code) else None


def _status(error: BaseException) -> int | None:
    facts = _answer(error).get("ResponseMetadata")
    answer = getattr(error, "response", None)
    status = facts.get("HTTPStatusCode") if isinstance(facts, dict) else getattr(error, "status", None)
    for place, name in ((error, "status_code"), (answer, "status_code"), (error, "code")):
        status = getattr(place, name, None) if status is None else status
    return status if type(status) is int and 100 <= status < 600 else None


def _region(error: BaseException) -> str:
    """Returns a phrase about the bucket's region, with the name of the region if the response contains it."""
    for found in _chain(error):
        answer = _answer(found)
        said, facts = answer.get("Error"), answer.get("ResponseMetadata")
        headers = facts.get("HTTPHeaders") if isinstance(facts, dict) else None
        told = [said.get("Region"), said.get("Message")] if isinstance(said, dict) else []
        told += [headers.get("x-amz-bucket-region")] if isinstance(headers, dict) else []
        for text in told:
            match = re.search(r"expecting '([a-z0-9-]{2,32})'|^([a-z]{2}-[a-z0-9-]{2,30})$", str(text))
            if match:
                return f"the region {match[1] or match[2]}, not in the one that is asked"
    return "another region than the one that is asked"


def _host(error: BaseException) -> str | None:
    """Returns the host and port of a failed request, without the other parts of its URL; None if they are unknown."""
    for found in _chain(error):
        host, port = getattr(found, "host", None), getattr(found, "port", None)
        if isinstance(host, str) and re.fullmatch(r"[\w.:-]{1,253}", host):
            return f"{host}:{port}" if isinstance(port, int) else host
    return None
