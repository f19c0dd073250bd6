"""TrirankBuildError
├── BadData            a data file or dataset cannot be used
├── BadUsage           a command's arguments do not fit; exit status 2
├── BadRecipe          a recipe has an unknown key or a value out of range
├── BadCheckpoint      a checkpoint is damaged, unsafe, or of another model
├── BadModel           an ONNX graph or module breaks the contract
├── Diverged           a loss is no number any more
├── DiskFull           what was to be written does not fit
└── ServeError         the server cannot be found, started or reached

The command prints the message on one line and exits with 1, or 2 where its own arguments are at fault, as for those
that the command line itself refuses; a traceback is a defect.
"""


class TrirankBuildError(Exception):
    """Base of what the build tools raise. The message says what, which value, the limit, and what to do."""


class BadData(TrirankBuildError):
    """A data file or dataset cannot be used."""


class BadUsage(TrirankBuildError):
    """A command's arguments do not fit each other, or what they name."""


class BadRecipe(TrirankBuildError):
    """A recipe has an unknown key or a value out of range."""


class BadCheckpoint(TrirankBuildError):
    """A checkpoint is damaged, unsafe, or of another model."""


class BadModel(TrirankBuildError):
    """An ONNX graph or a module breaks the contract."""


class Diverged(TrirankBuildError):
    """A loss is no number any more; the last good checkpoint is kept."""


class DiskFull(TrirankBuildError):
    """What was to be written does not fit the disk, or a limit on files; nothing of it is left."""


class ServeError(TrirankBuildError):
    """The server cannot be found, started or reached."""
