"""The references that these tests compare with want torchvision, if only to be imported."""

import importlib
import sys


def _torchvision_without_its_operators():
    """Where torchvision's C++ operators do not load, names for them let the rest be imported."""
    try:
        importlib.import_module("torchvision")
    except ImportError:  # the tests that need it are skipped
        return
    except RuntimeError:
        import torch

        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")
        _LIBRARIES.append(library)  # torch forgets the names with it


_LIBRARIES: list = []
_torchvision_without_its_operators()
