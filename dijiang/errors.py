"""Every error a user can meet, as one tree.

DijiangError
├── CheckpointError    files, config or weights of a checkpoint, read or to be written
│   └── DecayError     D1/D2 tables that cannot be used as they are
├── ExportError        the output cannot be written, or the options do not fit the model
├── BundleError        a bundle that is damaged, incomplete or of another version
├── HubError           a model of the Hub that is not there or cannot be fetched
├── SessionError       a backend, provider or process that is not to be had, or whose step fails or gives NaN
├── InputError         token ids, prompts, positions or sampling options out of range
│   └── VersionError   a saved state that another version of dijiang reads
├── ParityError        a bundle that differs from its checkpoint by more than its gate
├── BenchError         tests that could not be measured, or a comparison that found a regression
└── EvalError          tasks that could not be evaluated

Each message is one line: the fact, found against expected, and what to do next.
"""


class DijiangError(Exception):
    """Base class of every error that bad input can raise."""


class CheckpointError(DijiangError):
    """A checkpoint that is missing, damaged, of an unknown kind, not converted, or cannot be written."""


class DecayError(CheckpointError):
    """D1/D2 tables that are damaged beyond exact recovery."""


class ExportError(DijiangError):
    """An export that cannot be written where, or as, it was asked for."""


class BundleError(DijiangError):
    """A bundle whose manifest or files are not what they should be."""


class HubError(DijiangError):
    """A repository of the Hub that cannot be fetched."""


class SessionError(DijiangError):
    """A backend, execution provider or process that is missing or was not the one used, or a step that failed."""


class InputError(DijiangError):
    """Token ids, prompts, positions or options out of range."""


class VersionError(InputError):
    """A saved state that another version of dijiang reads."""


class ParityError(DijiangError):
    """A bundle that differs from its checkpoint by more than the gate allows."""


class BenchError(DijiangError):
    """A test that could not be measured, reports that do not compare, or a regression."""


class EvalError(DijiangError):
    """Tasks that lm-evaluation-harness does not have, cannot load or cannot run; or it is not installed."""


def reason(error: BaseException) -> str:
    """What an error of Python's says about a file; a KeyError says the key only."""
    return f"no {error}" if isinstance(error, KeyError) else str(error)
