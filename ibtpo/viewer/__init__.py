"""Viewing runs: a local page over run folders, live or finished, and the same page as one file."""

from ibtpo.viewer.export import export_page
from ibtpo.viewer.server import Viewer

__all__ = ["Viewer", "export_page"]
