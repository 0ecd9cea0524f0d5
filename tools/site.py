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


def build(directory: Path) -> None:
    """Build the site from the documents as they are; raises CalledProcessError."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(directory)]
    # Without the theme's advertisement of its successor.
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})


def main() -> None:
    """Do it."""
    for module in (registers_doc, state_diagrams):
        module.OUTPUT.write_text(module.document(), encoding="utf-8")
    man_pages.main()
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "site"
    build(directory)
    print(f"built {directory}")


if __name__ == "__main__":
    main()
