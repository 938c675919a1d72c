"""What serve/config.yaml names: the builder that turns its `args` into the application."""

from pixrec.serving.app import builder

__all__ = ["builder"]
