"""A notebook as jupytext pairs it: `# %%` cells in a .py file, the same cells in an .ipynb file.

    python -m tests.notebooks.percent        # writes the .ipynb of every notebooks/*.py anew

`jupytext --to ipynb notebooks/NAME.py` does the same.
"""

import hashlib
import json
import re
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ("quickstart", "finetune_lora", "tpu")
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def cells_of_py(text):
    """[(kind, source)] of a .py file in jupytext's percent format, without its header."""
    body = re.sub(r"\A# ---\n.*?\n# ---\n", "", text, flags=re.S)
    _, *parts = re.split(r"^# %%( \[markdown\])?\n", body, flags=re.M)
    found = []
    for mark, source in zip(parts[::2], parts[1::2], strict=True):
        lines = source.strip("\n").split("\n")
        if mark:
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        else:  # magics are comments in a .py file
            lines = [re.sub(r"^# (?=[%!])", "", line) for line in lines]
        found.append(("markdown" if mark else "code", "\n".join(lines)))
    return found


def cells_of_ipynb(text):
    """[(kind, source)] of an .ipynb file."""
    cells = json.loads(text)["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]


def notebook(cells):
    """The text of an .ipynb file without outputs."""
    made = []
    for i, (kind, source) in enumerate(cells):
        id = hashlib.sha256(f"{i} {source}".encode()).hexdigest()[:8]
        cell = {"cell_type": kind, "id": id, "metadata": {}}
        cell |= {"execution_count": None, "outputs": []} if kind == "code" else {}
        made.append(cell | {"source": source.splitlines(keepends=True)})
    metadata = {"jupytext": {"formats": "ipynb,py:percent"}, "kernelspec": _KERNEL}
    whole = {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in NAMES:
        cells = cells_of_py((FOLDER / f"{name}.py").read_text())
        (FOLDER / f"{name}.ipynb").write_text(notebook(cells))
