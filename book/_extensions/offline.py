"""Leaves out sphinx-thebe, which Jupyter Book always loads: it puts scripts of another host into every page.

Its live code needs a server and PyTorch on it. Everything else that pages load lies in `book/vendor` or in the theme.
"""

from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, bool]:
    for name, listeners in app.events.listeners.items():
        app.events.listeners[name] = [entry for entry in listeners if entry.handler.__module__ != "sphinx_thebe"]
    app.registry.css_files[:] = [sheet for sheet in app.registry.css_files if sheet[0] != "sphinx-thebe.css"]
    return {"parallel_read_safe": True, "parallel_write_safe": True}
