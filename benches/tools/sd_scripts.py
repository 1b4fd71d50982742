#!/usr/bin/env python3
"""Runs a script of sd-scripts under transformers 5: sd_scripts.py CHECKOUT SCRIPT ARGUMENT...

transformers 5 took the level `text_model` out of CLIPTextModel. Checkpoints have it and sd-scripts relies on it, so it is put
back here. Where a script walks through differences, those that are zero are left out: `lora extract` skips modules that did
not change, and sd-scripts would decompose them like the others.
"""

import runpy
import sys

import torch
import tqdm
import transformers


class Holder(torch.nn.Module):
    """A text encoder under the level that files have."""

    def __init__(self, config):
        super().__init__()
        self.text_model = transformers.CLIPTextModel(config)

    @classmethod
    def _from_config(cls, config):
        return cls(config)


# LoRA networks find their modules by the name of the class that these lie in.
Holder.__name__ = "CLIPTextModel"


def changed(items, **_):
    return [item for item in items if not isinstance(item, tuple) or bool(item[1].any())]


if __name__ == "__main__":
    checkout, script, *arguments = sys.argv[1:]
    sys.path[:0] = [checkout, f"{checkout}/networks"]
    from library import model_util, sdxl_model_util

    model_util.CLIPTextModel = sdxl_model_util.CLIPTextModel = Holder
    # A name that sd-scripts imports and the scripts here do not use; importing `library` has put another
    # module in the place of the one above.
    sys.modules["transformers"].CLIPFeatureExtractor = object
    tqdm.tqdm = changed if "extract" in script else tqdm.tqdm
    sys.argv = [script, *arguments]
    runpy.run_path(f"{checkout}/{script}", run_name="__main__")
