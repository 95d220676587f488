"""The former place of `simplear.pictures`, for code that still imports it from here."""

from simplear.pictures import open_rgb

__all__ = ["open_rgb"]
