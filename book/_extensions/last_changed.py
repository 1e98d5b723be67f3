"""When each page was last changed, from git, in its footer. Where git cannot say, the footer says nothing.

So it is for a page that is not committed yet, in a shallow clone, in an unpacked archive, and without git. These are no
errors: `suppress_warnings` in `_config.yml` names them. A page that shows docstrings changes with their modules.
"""

from typing import Any

from sphinx.application import Sphinx


def keep_sources(app: Sphinx, env: Any) -> None:
    """Without git the extension would also take the download of each page's source away."""
    for page, found in env.git_last_updated.items():
        if found is None:
            env.git_last_updated[page] = (None, True)


def setup(app: Sphinx) -> dict[str, bool]:
    app.setup_extension("sphinx_last_updated_by_git")
    app.config.git_untracked_show_sourcelink = True
    app.config.git_last_updated_timezone = "UTC"
    app.connect("env-updated", keep_sources, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
