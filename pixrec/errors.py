"""The errors a user can cause and cure.

    PixRecError                 one line that names the thing, its value and the cure; the command exits with 2
    ├── ConfigError             an unknown key, a value of the wrong type, keys that contradict each other
    ├── InputError              a table, picture set or argument that cannot be used
    │   └── UnreadableImage     bytes that are not a picture PixRec accepts; `.reason` is a short fixed phrase
    ├── ArtifactError           a model, index or prepared data set that is absent, incomplete or of another make
    └── OutputError             a place that cannot be written

Anything else that escapes is a defect of PixRec and exits with 1.
"""


class PixRecError(Exception):
    """Base of every error whose cure lies with the user."""


class ConfigError(PixRecError):
    pass


class InputError(PixRecError):
    pass


class UnreadableImage(InputError):
    """`reason` is one of a small fixed set of phrases, so that rejects can be counted by it."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"unreadable picture: {reason}")
        self.reason = reason


class ArtifactError(PixRecError):
    pass


class OutputError(PixRecError):
    pass
