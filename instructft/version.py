"""The version of this package, where reading it imports nothing."""

__version__ = "0.1.0"
