"""Copying bytes between backing files, in the kernel where it can be. Blocking functions."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from kvfs.errors import BlockBusy

# A write of more than 1 MiB in one call is up to eight times slower on some kernels.
PIECE_BYTES = 1 << 20
# copy_file_range: another filesystem (old kernels), a filesystem that has it not, odd files.
_NO_COPY_RANGE = {
    errno.EXDEV,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EPERM,
    errno.EBADF,
}


def write_all(descriptor: int, data: bytes, offset: int) -> None:
    """pwrite until everything is written."""
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view[:PIECE_BYTES], offset)
        if done == 0:
            raise OSError(errno.EIO, "nothing was written")
        view = view[done:]
        offset += done


def try_write(descriptor: int, data: bytes, offset: int) -> bool:
    """False when the medium is full; what was written then is written again elsewhere."""
    try:
        write_all(descriptor, data, offset)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    return True


def copy_file(source: int, target: int, progress: Callable[[int], None] | None = None) -> int:
    """Copy a whole file to the beginning of another; bytes copied. `progress` gets the total.

    Raises BlockBusy when somebody cuts the source meanwhile, OSError.
    """
    length = os.fstat(source).st_size
    offset = 0
    step = _copy_range
    while offset < length:
        try:
            done = step(source, target, min(PIECE_BYTES, length - offset), offset)
        except OSError as error:
            if step is not _copy_range or error.errno not in _NO_COPY_RANGE:
                raise
            step = _send
            continue
        if done == 0:
            if os.fstat(source).st_size < length:
                raise BlockBusy("it was cut while it was copied")
            raise OSError(errno.EIO, "the file ends before its length")
        offset += done
        if progress:
            progress(offset)
    return offset


def is_readable(descriptor: int, offset: int) -> bool:
    """Whether a copy that failed at an offset of its source can blame the target. Blocking."""
    try:
        at_end = offset >= os.fstat(descriptor).st_size
        return at_end or bool(os.pread(descriptor, PIECE_BYTES, offset))
    except OSError:
        return False


def _copy_range(source: int, target: int, count: int, offset: int) -> int:
    return os.copy_file_range(source, target, count, offset, offset)


def _send(source: int, target: int, count: int, offset: int) -> int:
    os.lseek(target, offset, os.SEEK_SET)
    return os.sendfile(target, source, offset, count)
