"""Look up again where other projects document the names that this site links to.

An inventory is a list of lines `name type page`; the anchor is the name. To link to another name,
add its line, with any page, and run this.
"""

import runpy
from pathlib import Path
from urllib.request import urlopen

from sphinx.util.inventory import InventoryFile

HEADER_LINES = 3


def refreshed(lines: list[str], published: bytes) -> list[str]:
    """The lines with the type and page of each name in a published inventory."""
    places = {
        name: (kind.removeprefix("py:"), item.uri)
        for kind, items in InventoryFile.loads(published, uri="").data.items()
        if kind.startswith("py:")
        for name, item in items.items()
    }
    result = []
    for name in sorted(line.split()[0] for line in lines):
        kind, uri = places.get(name, ("", ""))
        page, _, anchor = uri.partition("#")
        if anchor not in (name, f"module-{name}"):
            raise SystemExit(f"{name} is not documented there under its own name: remove it")
        result.append(f"{name} {'mod' if kind == 'module' else kind} {page}")
    return result


if __name__ == "__main__":
    for url, file in runpy.run_path("docs/conf.py")["intersphinx_mapping"].values():
        lines = Path(file).read_text().splitlines()
        with urlopen(f"{url}objects.inv") as response:
            new = refreshed(lines[HEADER_LINES:], response.read())
        Path(file).write_text("\n".join([*lines[:HEADER_LINES], *new, ""]))
