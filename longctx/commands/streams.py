"""The standard streams: those that the caller has closed, and readers that have gone."""

import errno
import os
import select
import sys

WRITTEN_TO_NOBODY = 128 + 13  # what a shell shows of a program that SIGPIPE has ended


def open_closed_streams() -> frozenset[int]:
    """Opens the standard streams that are closed on nothing; returns their descriptors.

    The next file or socket would get their numbers otherwise, and what is printed would go there.
    """
    closed = frozenset(number for number in range(3) if not _is_open(number))
    for number in sorted(closed):
        opened = os.open(os.devnull, os.O_RDWR)
        assert opened == number, "the lowest free number is given out first"
        os.set_inheritable(number, True)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if number in closed:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    return closed


def write_what_was_given() -> None:
    """Lets paths that are not UTF-8 through to standard output; no other text fails to be shown."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def nobody_reads(error: OSError) -> bool:
    """Tells whether `error` says that the reader of standard output or standard error has gone."""
    if error.errno != errno.EPIPE:
        return False
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def forget_what_is_unwritten() -> None:
    """Sends to nothing what is still in buffers: the end of the process would try to write it."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(nothing, number)
    os.close(nothing)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
