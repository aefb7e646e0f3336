"""Real pictures that are on every ComfyUI machine: the previews of the host's workflow templates, read in place."""

from __future__ import annotations

import functools
import importlib.util
import logging
import pkgutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# What is on the picture → the file's name without its ending. Chosen by eye: no lettering, no logos, many styles.
SUBJECTS = {
    "reader by a window (oil painting)": "sdxl_simple_example-1",
    "blue trees (painting)": "image_z_image-1",
    "bird of shapes (flat graphics)": "api_quiver_image_to_svg-1",
    "crying eyes (ink drawing)": "templates-color_illustration-1",
    "parade (line drawing)": "api_recraft_v4_text_to_vector-1",
    "pastel hills (illustration)": "utility_moge_depth_estimation-2",
    "red tree (night)": "hidream_i1_fast-1",
    "orange rose (photograph)": "flux_canny_model_example-1",
    "wild flowers (photograph)": "image_lens_t2i-1",
    "ice butterfly (render)": "sd3.5_large_blur-1",
    "pink dragon (render)": "sd3.5_large_canny_controlnet_example-1",
    "canyon (photograph)": "image_pixeldit_t2i-1",
    "puppy (photograph)": "sdxlturbo_example-1",
    "bottle with a galaxy": "default-1",
    "red car in a grey town": "sdxl_revision_text_prompts-1",
    "statues in the clouds": "flux_schnell-1",
}
_ENDINGS = (".webp", ".png", ".jpg", ".jpeg")
_PACKAGE = "comfyui_workflow_templates"


@functools.cache
def files() -> dict[str, Path]:
    """Name without ending → file, over all installed template packages, in the order of the names."""
    found: dict[str, Path] = {}
    for module in pkgutil.iter_modules():
        if not module.name.startswith(_PACKAGE):
            continue
        spec = importlib.util.find_spec(module.name)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in (Path(folder) / "templates").glob("*"):
                if path.suffix.lower() in _ENDINGS:
                    found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def file_of(subject: str) -> Path:
    """The file of a subject; on a host whose templates lack it, always the same other one in its place."""
    if subject not in SUBJECTS:
        raise ValueError(f"picture {subject!r}: expected one of {', '.join(SUBJECTS)}")
    all_files = files()
    if not all_files:
        raise FileNotFoundError(
            f"No picture found: expected the packages {_PACKAGE}_media_* of the host's requirements. "
            "Install the host's requirements.txt into this environment.")
    path = all_files.get(SUBJECTS[subject])
    if path is None:
        path = list(all_files.values())[list(SUBJECTS).index(subject) * 7 % len(all_files)]
        logging.getLogger(__name__).warning("no template picture %s here, taking %s", SUBJECTS[subject], path.name)
    return path


def load(subject: str) -> tuple[torch.Tensor, Path]:
    """The picture as an IMAGE (1, H, W, 3), float32 in 0..1, at its own size, and its file."""
    path = file_of(subject)
    with Image.open(path) as picture:
        rgb = np.asarray(picture.convert("RGB"))
    return torch.from_numpy(rgb.astype(np.float32) / 255.0)[None], path
