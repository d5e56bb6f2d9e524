"""Objects in a store of objects, through fsspec, by the part of ``pathlib.Path``'s interface that checkpoints need.

    pathlib.Path("runs/one/checkpoints") / "00000100" / "manifest.json"     a file
    at("s3://bucket/kept/one")           / "00000100" / "manifest.json"     an object

An object is there whole, once what writes it is closed, or not at all; folders are only the beginnings of names.
Objects are written in parts of ``PART`` bytes and read in ranges of ``RANGE``. Nothing is cached, for others write too.
Endpoint and credentials are fsspec's matter, and its libraries': the environment, or their own configuration files.
"""

import errno
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

PART, RANGE = 2**26, 2**24  # bytes: a store takes 10,000 parts an object; a range is what a digest is of
AT_ONCE = 4  # ranges that are read at the same time
PATIENCE, COPYING = 120, 3600  # seconds that a store may take for an answer, and for a copy
KEY = "checkpoint.folder"
PRIVATE = ("memory", "file", "local")  # what other ranks may not see, and what a folder is without a URL


class UnreachableError(OSError, ValueError):
    """A place cannot be read or written now, which says nothing about the checkpoints in it.

    To who writes it is one more OSError, to who loads a mistake of the configuration.
    """

    def __str__(self) -> str:
        return f"{KEY}: {self.filename} cannot be read or written: {self.strerror}"


@dataclass(frozen=True, slots=True)
class Remote:
    """An object, or the beginning of the names of several. Raises FileNotFoundError for what is not there,
    UnreachableError for whatever else a store may answer, or not answer.
    """

    system: Any  # fsspec's AbstractFileSystem
    path: str

    def __str__(self) -> str:
        return str(self.system.unstrip_protocol(self.path))

    def __truediv__(self, name: str) -> "Remote":
        return Remote(self.system, f"{self.path}/{name}")

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> "Remote":
        return Remote(self.system, self.path.rpartition("/")[0])

    def with_name(self, name: str) -> "Remote":
        """What is called ``name`` beside it."""
        return self.parent / name

    def exists(self) -> bool:
        """Whether there is such an object, or one whose name goes on behind a slash."""
        try:
            self._ask(self.system.info, self.path)
        except FileNotFoundError:
            return False
        return True

    def iterdir(self) -> Iterator["Remote"]:
        """What is right below it."""
        for path in self._ask(self.system.ls, self.path, detail=False):
            if path.rstrip("/") != self.path:  # an empty object that stands for a folder
                yield Remote(self.system, path.rstrip("/"))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: there are no folders."""

    def read_bytes(self) -> bytes:
        """All of it."""
        return bytes(self._ask(self.system.cat_file, self.path))

    def read_text(self, encoding: str) -> str:
        """All of it. Raises UnicodeDecodeError too."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        """It has ``content``; before, all of what it had."""
        self._put(self.system.pipe_file, self.path, content)

    def open(self, mode: str) -> "Ranges":
        """To be read: ``mode`` is rb. Nothing is asked of the store yet."""
        assert mode == "rb", mode
        return Ranges(self)

    @contextmanager
    def create(self) -> Iterator["Upload"]:
        """What is written is there, whole, once this is left without an error; else it never is."""
        upload = Upload(self)
        try:
            yield upload
        except BaseException:
            upload.discard()
            raise
        upload.close()

    def unlink(self) -> None:
        """It is no longer there."""
        self._ask(self.system.rm_file, self.path)

    def remove(self) -> None:
        """Neither is what is below it, if there was anything."""
        with suppress(FileNotFoundError):
            self._ask(self.system.rm, self.path, recursive=True)

    def rename(self, target: "Remote") -> "Remote":
        """All below it is below ``target``: copied by the store, then removed."""
        for path in self._ask(self.system.find, self.path):
            copy = partial(self.system.cp_file, path, target.path + path[len(self.path) :])
            self._ask(copy, patience=COPYING)
        self.remove()
        return target

    def _put(self, call: Callable[..., Any], *words: Any, **named: Any) -> Any:
        """As ``_ask``, where nothing has to be there but the bucket."""
        try:
            return self._ask(partial(call, *words, **named))
        except FileNotFoundError as error:
            raise UnreachableError(errno.ENOENT, str(error.__cause__), str(self)) from error

    def _ask(self, call: Callable[..., Any], *words: Any, patience: float | None = None, **named: Any) -> Any:
        """What ``call``, fsspec's, answers. Every library that it uses has exceptions of its own, and some wait for
        ever for a store that takes a connection and says nothing: a thread does, until the process ends.
        """
        answer: Future[Any] = Future()
        threading.Thread(target=_answer, args=(answer, partial(call, *words, **named)), daemon=True).start()
        try:
            return answer.result(patience or PATIENCE)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self)) from error
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error) or f'no answer within {patience or PATIENCE} s'}"
            raise UnreachableError(errno.EHOSTUNREACH, reason, str(self)) from error


def _answer(answer: "Future[Any]", call: Callable[[], Any]) -> None:
    try:
        answer.set_result(call())
    except BaseException as error:
        answer.set_exception(error)


class Ranges(io.RawIOBase):
    """An object that is read from any place on."""

    def __init__(self, remote: Remote) -> None:
        self._remote, self._at = remote, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """``offset`` bytes from the beginning."""
        assert whence == io.SEEK_SET
        self._at = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        """Fills ``buffer``, or as much of it as the object has bytes for; returns how many these are."""
        into, done = memoryview(buffer).cast("B"), 0
        for start in range(0, len(into), RANGE * AT_ONCE):
            for found in self._read(len(into[start : start + RANGE * AT_ONCE])):
                into[done : done + len(found)] = found
                done += len(found)
            self._at += done - start
            if done < min(start + RANGE * AT_ONCE, len(into)):
                break
        return done

    def _read(self, count: int) -> list[bytes]:
        """The next ``count`` bytes, or as many as there are, in ranges."""
        stop = self._at + count
        try:
            return self._read_to(stop)
        except UnreachableError:
            # A range behind the end of an object is an error, and each store has another one for it.
            size = self._remote._ask(self._remote.system.size, self._remote.path)
            if size >= stop:
                raise
            return self._read_to(size)

    def _read_to(self, stop: int) -> list[bytes]:
        starts = list(range(self._at, stop, RANGE))
        stops = [min(start + RANGE, stop) for start in starts]
        system, path = self._remote.system, self._remote.path
        return list(self._remote._ask(system.cat_ranges, [path] * len(starts), starts, stops, on_error="raise"))


class Upload:
    """An object that is written from its beginning to its end."""

    def __init__(self, remote: Remote) -> None:
        self._remote, self.position = remote, 0
        self._file = remote._put(remote.system.open, remote.path, "wb", block_size=PART)

    def write(self, content: Any) -> int:
        """``content`` has bytes; they are on their way, or on hand. Returns their number."""
        for start in range(0, len(content), PART):  # what is on hand is no more than two parts
            self._remote._put(self._file.write, content[start : start + PART])
            self.position += len(content[start : start + PART])
        return len(content)

    def close(self) -> None:
        """The object is there."""
        self._remote._put(self._file.close)

    def discard(self) -> None:
        """It never is."""
        with suppress(OSError):  # a store that is no longer there has no use for it either
            self._remote._ask(self._file.discard)
        with suppress(AttributeError):
            self._file.closed = True  # else fsspec closes it, and the object is there, once it is forgotten


def at(url: str) -> Remote:
    """What ``url`` stands for, as protocol://bucket/prefix. Asks nothing of the store.

    Raises ValueError, naming ``checkpoint.folder``, for a protocol that is not known or has no package here.
    """
    from fsspec.core import url_to_fs

    key, protocol = f"{KEY}={url}", url.partition("://")[0]
    if protocol in PRIVATE:
        raise ValueError(f"{key} must be a folder without {protocol}://, or in a store that every rank reaches")
    try:
        system, path = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise ValueError(f"{key} needs a package: {error} (for s3://: pip install 'shoestring[store]')") from error
    except Exception as error:
        raise ValueError(f"{key} must be a folder, or a URL such as s3://bucket/prefix: {error}") from error
    return Remote(system, path.rstrip("/"))
