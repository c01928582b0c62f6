"""The error tree. Each error's message is one line: what was wrong, where, and what to do.

AmiError                    1   something failed
├── ConfigurationError      2   the configuration or the command line is wrong
├── JoinRefusedError        2   the controller does not accept this service
│   ├── DisplacedError      5   … any more: its name was taken over, or its key revoked
│   └── TakenBackError      1   … but would accept another process in its place
├── NoControllerError       3   no controller answers at the hub's address
├── DeadlineError           4   a peer did not answer in time
├── WireError               1   a message is malformed
└── SensorLostError         1   a sensor delivers nothing at present
    └── NotFiniteError      1   what it delivers is not finite

The numbers are the exit codes of every command.
"""


class AmiError(Exception):
    """Root of all errors that a user may see as one line."""

    exit_code = 1


class ConfigurationError(AmiError):
    """The configuration or the command line is wrong."""

    exit_code = 2


class JoinRefusedError(AmiError):
    """The controller does not accept this service; trying again without a change is useless."""

    exit_code = 2


class DisplacedError(JoinRefusedError):
    """This service was a member until another took its name over, or its key was revoked."""

    exit_code = 5


class TakenBackError(JoinRefusedError):
    """The run was taken back to a checkpoint, and this process holds later state: it must be restarted."""

    exit_code = 1


class NoControllerError(AmiError):
    """No controller answers at the hub's address."""

    exit_code = 3


class DeadlineError(AmiError):
    """A peer did not answer in time; the message names it."""

    exit_code = 4


class WireError(AmiError):
    """A message is malformed; it is counted and dropped, and never kills a service."""


class SensorLostError(AmiError):
    """A sensor delivers nothing at present; it keeps trying by itself."""


class NotFiniteError(SensorLostError):
    """What was observed is not finite: it is neither acted upon nor learned from."""
