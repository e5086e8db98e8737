"""The version of clext, in one place: the package, the wheel and the build read it here."""

__version__ = "0.1.0"
