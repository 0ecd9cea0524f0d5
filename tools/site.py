"""Writes the generated documents and builds the site.

    python -m tools.site [DIRECTORY]

The directory is build/site if none is given.  A link that leads nowhere ends it with an
error: mkdocs.yml is strict.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tools import man_pages, registers_doc, state_diagrams
from tools.source_text import ROOT


class SiteError(Exception):
    """The site cannot be built; the text is what mkdocs said."""


def build(directory: Path) -> None:
    """Build the site from the documents as they are; raises SiteError for the least warning."""
    done = subprocess.run(
        # Not --quiet: strictness counts the warnings that are told.
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(directory)],
        cwd=ROOT,
        # Without the theme's advertisement of its successor.
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SiteError(done.stdout + done.stderr)


def main() -> None:
    """Do it."""
    for module in (registers_doc, state_diagrams):
        module.OUTPUT.write_text(module.document(), encoding="utf-8")
    man_pages.main()
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "site"
    try:
        build(directory)
    except SiteError as error:
        sys.exit(str(error))
    print(f"built {directory}")


if __name__ == "__main__":
    main()
