"""Lets torchvision be imported where its compiled operators do not fit the torch that is there.

diffusers and transformers import it if it is installed, and it then speaks of operators by name.
Nothing here calls one.
"""

import importlib.abc
import importlib.util
import sys
from pathlib import Path


class _Names(importlib.abc.MetaPathFinder):
    """Gives the names before the first import of torchvision; finds nothing itself."""

    def __init__(self):
        self.library = None  # torch forgets the names with it

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            found = importlib.util.find_spec(fullname)
            if found and found.origin:
                self.define(Path(found.origin).parent)
        return None

    def define(self, folder):
        import torch

        try:
            for file in folder.glob("_C*.so"):
                torch.ops.load_library(file)
        except OSError:
            self.library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                arguments = "Tensor dets, Tensor scores, float iou_threshold"
                self.library.define(f"{name}({arguments}) -> Tensor")


_names = _Names()


def prepare():
    """Look out for the first import of torchvision."""
    if "torchvision" not in sys.modules and _names not in sys.meta_path:
        sys.meta_path.insert(0, _names)
