"""safetensors files with JSON in the metadata: written atomically, under a digest that covers every byte."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import ArgumentError, CheckpointError
from .pruning_plan import need

# safetensors allows 100 MB; those of real networks have a few hundred kB.
_LARGEST_HEADER = 32 << 20
_DIGEST_KEY = b'"sha256":"'
_NO_DIGEST = b"0" * 64


def real_path(path: Any) -> str:
    try:
        return os.path.realpath(os.fsdecode(path))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"path: expected a str or os.PathLike, got {path!r}") from error


def write(stored: dict[str, torch.Tensor], metadata: dict[str, str], target: str) -> None:
    """Replaces `target` at once and whole: whatever happens meanwhile, it is the old file or the new one.

    Raises:
        CheckpointError: the file cannot be written.
    """
    if os.path.exists(target) and not os.path.isfile(target):
        what = "a directory" if os.path.isdir(target) else "no ordinary file"
        raise CheckpointError(f"save: cannot write '{target}': it is {what}")
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".stamp_fast-{secrets.token_hex(8)}.tmp")
    try:
        # The digest covers every byte of the file, itself as zeros.
        save_file(stored, temporary, {**metadata, "sha256": _NO_DIGEST.decode()})
        with open(temporary, "r+b", buffering=0) as file:
            position, _, digest = _digest(file)
            file.seek(position)
            file.write(digest)
            file.flush()
            os.umask(mask := os.umask(0o077))  # there is no other way to read it
            os.chmod(temporary, 0o666 & ~mask)
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(target, temporary)
            os.fsync(file.fileno())
        os.replace(temporary, target)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the new name, too, shall outlive a power cut
        finally:
            os.close(descriptor)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, (OSError, SafetensorError, ValueError)):
            raise CheckpointError(f"save: cannot write '{target}': {error}") from error
        raise


def write_text(target: str, text: str) -> None:
    """Replaces `target` at once and whole.

    Raises:
        OSError: it cannot be written.
    """
    if os.path.exists(target) and not os.path.isfile(target):
        raise FileExistsError(errno.EEXIST, "it is no ordinary file", target)
    temporary = os.path.join(os.path.dirname(target), f".stamp_fast-{secrets.token_hex(8)}.tmp")
    try:
        # Any str can be a module's name, and not every str is valid UTF-8.
        with open(temporary, "w", encoding="utf-8", errors="xmlcharrefreplace") as file:
            file.write(text)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


class JsonLines:
    """A file of JSON lines that grows while something is worked out, and outlives a process that ends amid a line.

    Args:
        path: None keeps nothing.
        what: of whom and what it is, for messages: "search: {} is not a file of scores".
    """

    def __init__(self, path: Any, what: str) -> None:
        self.path, self.what = None if path is None else real_path(path), what

    def read(self) -> list[Any]:
        """Its lines. What follows the last line break was being written when a process ended: it is taken away.

        Raises:
            CheckpointError: something else is in it.
        """
        if self.path is None or not os.path.exists(self.path):
            return []
        try:
            with open(self.path) as file:
                *whole, torn = file.read().split("\n")
            lines = [json.loads(line) for line in whole]
            if torn:
                os.truncate(self.path, os.path.getsize(self.path) - len(torn.encode()))
        except (OSError, ValueError) as error:
            raise self.unfit(error) from error
        return lines

    def unfit(self, error: Exception) -> CheckpointError:
        """The error that its lines are not what they should be."""
        return CheckpointError(f"{self.what.format(repr(self.path))} ({error}); use another")

    def append(self, line: dict[str, Any]) -> None:
        """
        Raises:
            CheckpointError: it cannot be written.
        """
        if self.path is None:
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write '{self.path}': {error}") from error


@contextlib.contextmanager
def errors_name(what: str, file: str) -> Iterator[None]:
    """A `CheckpointError` inside says whose it is, and of which file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{what}: '{file}': {error}") from error


@contextlib.contextmanager
def opened(file: str, keys: set[str], writer: str) -> Iterator[Any]:
    """The safetensors file, its digest checked.

    Args:
        keys: what its metadata has to hold.
        writer: the function that writes such files, for the message.

    Raises:
        CheckpointError: no such file, damaged, or another kind of file.
    """
    need(os.path.exists(file), "there is no such file")
    need(os.path.isfile(file), "is not a file")
    try:
        with open(file, "rb", buffering=0) as raw:
            _, written, computed = _digest(raw)
            need(written == computed, "is damaged: its checksum is not that of its content")
            handle = safe_open(file, framework="pt")
            # It opens the file by its name, which may be that of another one by now.
            need(os.path.samestat(os.fstat(raw.fileno()), os.stat(file)), "was replaced while it was read")
        metadata = handle.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot be read: {error}") from error
    with handle:
        need(keys <= metadata.keys(), f"was not written by {writer}")
        yield handle


def _digest(file: BinaryIO) -> tuple[int, bytes, bytes]:
    """Where the digest stands, what stands there, and what should: SHA-256 of the whole file with zeros in its place.

    Raises:
        CheckpointError: not a safetensors file, or one that `write` has not written.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    rest = os.fstat(file.fileno()).st_size - 8
    need(rest >= 0 and 2 <= length <= rest, "is not a safetensors file, or cut off")
    need(length <= _LARGEST_HEADER, f"has a header of {length} bytes, at most {_LARGEST_HEADER} are read")
    header = file.read(length)
    # In JSON text inside of the header the quotes are escaped, so this is the key itself.
    position = header.find(_DIGEST_KEY) + len(_DIGEST_KEY)
    need(header[:1] == b"{", "is not a safetensors file")
    if _DIGEST_KEY not in header:
        raise CheckpointError(
            "was not written by stamp_fast; read other safetensors files with safetensors.torch.load_file"
        )
    found = header[position : position + len(_NO_DIGEST)]
    digest = hashlib.sha256(start + header[:position] + _NO_DIGEST + header[position + len(found) :])
    hashlib.file_digest(file, lambda: digest)
    return 8 + position, found, digest.hexdigest().encode()
