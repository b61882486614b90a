"""What fsspec's back ends raise, as `OSError`s of the seam: the right class, what to do, and no secret."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

_REMOTE_IO = getattr(errno, "EREMOTEIO", errno.EIO)
_UNTRUSTED = getattr(errno, "EKEYREJECTED", errno.EACCES)
_KNOWN = (FileExistsError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_BUGS = (TypeError, AttributeError, NameError, AssertionError, ImportError)

# Error codes of S3 that s3fs maps to something less telling, or not at all; and HTTP statuses of the others.
_CODES: dict[str, int] = {
    "PreconditionFailed": errno.EEXIST,  # Ceph and SeaweedFS, which do not name the condition, end as EINVAL in s3fs
    "412": errno.EEXIST,
    "ConditionalRequestConflict": errno.EBUSY,
    "AccessDenied": errno.EACCES,
    "ExpiredToken": errno.EACCES,
    "ExpiredTokenException": errno.EACCES,
    "TokenRefreshRequired": errno.EACCES,
    "InvalidToken": errno.EACCES,
    "InvalidAccessKeyId": errno.EACCES,
    "SignatureDoesNotMatch": errno.EACCES,
    "RequestTimeTooSkewed": errno.EACCES,
    "NoSuchBucket": errno.ENOENT,
    "NoSuchUpload": errno.ECANCELED,
    "RequestTimeout": errno.ETIMEDOUT,
    "SlowDown": errno.EBUSY,
    "ServiceUnavailable": errno.EBUSY,
    "InternalError": _REMOTE_IO,
    "QuotaExceeded": errno.EDQUOT,  # Ceph, with 403
    "XMinioAdminBucketQuotaExceeded": errno.EDQUOT,
    "XMinioStorageFull": errno.ENOSPC,
    "InsufficientStorage": errno.ENOSPC,
    "401": errno.EACCES,
    "403": errno.EACCES,
    "404": errno.ENOENT,
    "429": errno.EBUSY,
    "500": _REMOTE_IO,
    "502": errno.EBUSY,
    "503": errno.EBUSY,
    "504": errno.EBUSY,
    "507": errno.ENOSPC,
}
# Classes that are no OSErrors, by the package that defines them: none of them is imported here.
_LOST_CONNECTION = frozenset(
    {
        ("botocore", "ConnectionError"),
        ("botocore", "HTTPClientError"),
        ("botocore", "ResponseStreamingError"),
        ("botocore", "IncompleteReadError"),
        ("aiohttp", "ClientError"),
        ("http", "HTTPException"),
        ("urllib3", "HTTPError"),
        ("requests", "ConnectionError"),
        ("azure", "ServiceRequestError"),
        ("azure", "ServiceResponseError"),
    }
)
_NO_CREDENTIALS = frozenset(
    {
        ("botocore", "NoCredentialsError"),
        ("botocore", "PartialCredentialsError"),
        ("botocore", "CredentialRetrievalError"),
        ("google", "GoogleAuthError"),
        ("azure", "ClientAuthenticationError"),
    }
)
_ADVICE: dict[int, str] = {
    errno.EEXIST: "it is there already, and objects are write-once: choose another name or delete it first",
    errno.ENOENT: "it is not there (is the bucket or container right?)",
    errno.EACCES: "access was refused: check the credentials (have they expired?), the clock of this machine, and that "
    "they may get, put, delete and list here",
    errno.EBUSY: "the server is busy or asks to slow down: it is worth trying again later, with fewer ranks at a time",
    errno.ENOSPC: "the store is full: free space, for example by keeping fewer steps",
    errno.EDQUOT: "the quota of the bucket or the account is used up: free space, for example by keeping fewer steps, "
    "or ask for a larger quota",
    _REMOTE_IO: "the server reports a fault of its own: it is worth trying again later",
    errno.ECANCELED: "the upload in parts is over: finished already, or given up, since its save has failed",
    errno.ETIMEDOUT: "no answer in time: check the network and the timeouts in storage_options",
    errno.ECONNRESET: "no connection, or it broke: check endpoint_url, network and proxy",
    errno.EPROTO: "what came is no answer of such a server: is a proxy or a login page in between, or is endpoint_url "
    "wrong? Check them and try again",
    _UNTRUSTED: "the certificate of the server is not trusted: if the server is the right one, name the file of the "
    "authority that vouches for it (storage_options={'client_kwargs': {'verify': '...'}}, or AWS_CA_BUNDLE)",
    errno.EIO: "an unexpected failure of the storage library",
    errno.ENOTSUP: "this kind of storage cannot do that: choose another root",
}


def translate(error: Exception, what: str, redacted: Callable[[str], str]) -> Exception:
    """The error to raise instead of `error`; `what` says what was tried, on which key, where.

    Raise it outside of the `except` block: what the back end said may hold credentials, and a chained exception is
    printed with the traceback. Errors that only a bug can cause are given back as they are.
    """
    if isinstance(error, _BUGS):
        return error
    number = _number(error)
    said = redacted(str(error)).strip()
    said = f" ({type(error).__name__}: {said})" if said else f" ({type(error).__name__})"
    message = f"{what}: {_ADVICE.get(number, 'it failed')}{said}"
    if number == errno.ECONNRESET:
        return ConnectionError(number, message)
    return OSError(number, message)  # Python picks the class that belongs to the number


def number_of_code(code: str) -> int:
    """The error number for what a service answered for one of many objects."""
    return _CODES.get(code, errno.EIO)


def _number(error: Exception) -> int:
    for code in service_codes(error):
        if code in _CODES:
            return _CODES[code]
    if isinstance(error, _KNOWN):
        return _number_of_class(error)
    if "CERTIFICATE_VERIFY_FAILED" in str(error):  # among lost connections, but it stays so
        return _UNTRUSTED
    if isinstance(error, TimeoutError | asyncio.TimeoutError) or "Timeout" in type(error).__name__:
        return errno.ETIMEDOUT
    if isinstance(error, ConnectionError) or _is_one_of(error, _LOST_CONNECTION):
        return errno.ECONNRESET
    if _is_one_of(error, _NO_CREDENTIALS):
        return errno.EACCES
    if isinstance(error, NotImplementedError):
        return errno.ENOTSUP
    if str(error).startswith("Forbidden: "):  # gcsfs, which says it in no other way
        return errno.EACCES
    return error.errno or errno.EIO if isinstance(error, OSError) else errno.EIO


def _number_of_class(error: OSError) -> int:
    """Back ends raise `FileNotFoundError(path)` and the like, without a number."""
    numbers = (errno.EEXIST, errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR)
    return next(number for kind, number in zip(_KNOWN, numbers, strict=True) if isinstance(error, kind))


def _is_one_of(error: Exception, classes: frozenset[tuple[str, str]]) -> bool:
    return any((kind.__module__.partition(".")[0], kind.__name__) in classes for kind in type(error).__mro__)


def service_codes(error: BaseException) -> Iterator[str]:
    """What the service answered, of this error and those behind it: "PreconditionFailed", "412"."""
    link: BaseException | None = error
    for _ in range(4):
        if link is None:
            return
        response = getattr(link, "response", None)
        if isinstance(response, Mapping):
            yield str(response.get("Error", {}).get("Code", ""))
            yield str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        for name in ("status_code", "status", "code"):
            status = getattr(link, name, None)
            if isinstance(status, int):
                yield str(status)
        link = link.__cause__ or link.__context__


@contextmanager
def absent_if_no_file(key: str) -> Iterator[None]:
    """A folder of that name, or a file where a folder would have to be: the object is not there."""
    try:
        yield
    except (IsADirectoryError, NotADirectoryError) as error:
        raise FileNotFoundError(key) from error
