"""What the shell is told."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """The codes that a command ends with."""

    FINE = 0
    FAILED = 1
    USAGE = 2
    MISSING = 3
    ABSENT = 4
    REFUSED = 5
    INTERRUPTED = 130


EXIT_CODES: dict[ExitCode, str] = {
    ExitCode.FINE: "everything did what it should",
    ExitCode.FAILED: "a job failed, the doctor found a problem, or the output could not be written",
    ExitCode.USAGE: "bad input: an option, a setting, a file, a folder",
    ExitCode.MISSING: "something that must be installed is not there; the message says what",
    ExitCode.ABSENT: "no running manager answers; the message says where it was looked for",
    ExitCode.REFUSED: "the running manager said no; the output says why",
    ExitCode.INTERRUPTED: "interrupted from the keyboard; what was loaded has been given back",
}
