"""Join the tables that a run of `gpu.sh` left in a folder: one JSON file and one in Markdown.

python benchmarks/join.py TABLES FOLDER [NOTE ...]
"""

from timing import device_name, machine, markdown, versions  # isort: skip  # sets up the environment

import argparse
import json
import shutil
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", type=Path, help="the folder with the tables of the run")
    parser.add_argument("folder", type=Path, help="where gpu.json, gpu.md and the figure go")
    parser.add_argument("notes", nargs="*", help="what to say of the run")
    arguments = parser.parse_args()
    # In the order in which they were measured.
    files = sorted(arguments.tables.glob("*.json"), key=lambda file: file.stat().st_mtime)
    tables = {file.stem.rpartition("-")[0]: json.loads(file.read_text()) for file in files}

    text = [f"# On {machine()}"]
    if arguments.notes:
        text.append("\n".join(f"- {note}" for note in arguments.notes))
    for table in tables.values():
        rows = table["rows"]
        body = markdown(list(rows[0]), [list(row.values()) for row in rows])
        text += [f"## {table['title']}", f"`{table['command']}`", body]
    everything = {
        "device": device_name(),
        "versions": versions(),
        "notes": arguments.notes,
        "tables": {
            name: {key: table[key] for key in ("title", "command", "rows")}
            for name, table in tables.items()
        },
    }
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "gpu.json").write_text(json.dumps(everything, indent=1) + "\n")
    (arguments.folder / "gpu.md").write_text("\n\n".join(text) + "\n")
    for figure in arguments.tables.glob("*.svg"):
        shutil.copy(figure, arguments.folder)
    print(f"written to {arguments.folder}: gpu.json and gpu.md")


if __name__ == "__main__":
    main()
