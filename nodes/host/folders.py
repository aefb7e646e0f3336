"""Where files are: only through the host's folder paths.

`models/i2l` is ours; the others are where people already keep these files, so that nobody moves 30 GB. Everything is
listed by its path relative to the folder, as all published files have the name `model.safetensors`.
"""

from __future__ import annotations

import functools
import os

import folder_paths
from comfy_api.latest import io

from ...weights.errors import StyleLoomError
from ...weights.tensor_file import header_mentions

PREDICTORS = "i2l"
ENCODERS = "i2l_encoders"
REFERENCES = "i2l_references"
LORAS = "loras"
IPADAPTERS = "ipadapter"
STYLE_ENCODINGS = "style_encodings"
VISION = "clip_vision"

# In use by other packs for the same files: yipeeka and gajjar4, mxli-1999, HM-RunningHub.
_IN_USE = ("I2L", "z_image_i2l", "DiffSynth-Studio")
_EXTENSIONS = {".safetensors"}
# As published; .bin is read as tensors only. Other packs share this category and keep what they listed in it.
_ADAPTER_EXTENSIONS = {".safetensors", ".bin"}
# .ipadpt: what IPAdapter Plus saves its embeddings as.
_ENCODING_EXTENSIONS = {".safetensors", ".ipadpt"}
# An interrupted ModelScope download leaves its parts in a folder of this name, in the published repository too.
_PARTIAL = "._____temp"


def _register(category: str, paths: list[str], extensions: set[str] = _EXTENSIONS) -> None:
    """Add folders to a category, keeping what the user's extra_model_paths.yaml put there, which comes first."""
    known, others = folder_paths.folder_names_and_paths.get(category, ([], set()))
    merged: list[str] = []
    for path in [*known, *paths]:
        # `models/I2L` is `models/i2l` where the file system ignores case.
        if not any(
            path == other or (os.path.isdir(path) and os.path.isdir(other) and os.path.samefile(path, other))
            for other in merged
        ):
            merged.append(path)
    folder_paths.folder_names_and_paths[category] = (
        merged,
        set(extensions) | (set(others) if category == IPADAPTERS else set()),
    )


def register() -> None:
    """Make the pack's folders known to the host; looks into none of them."""
    models = folder_paths.models_dir
    _register(PREDICTORS, [os.path.join(models, PREDICTORS), *(os.path.join(models, name) for name in _IN_USE)])
    _register(ENCODERS, [*folder_paths.get_folder_paths(PREDICTORS), *folder_paths.get_folder_paths("clip_vision")])
    _register(IPADAPTERS, [os.path.join(models, IPADAPTERS)], _ADAPTER_EXTENSIONS)
    output = folder_paths.get_output_directory()
    _register(
        STYLE_ENCODINGS,
        [os.path.join(models, STYLE_ENCODINGS), os.path.join(output, STYLE_ENCODINGS)],
        _ENCODING_EXTENSIONS,
    )
    _register(
        REFERENCES, [os.path.join(models, REFERENCES), os.path.join(folder_paths.get_output_directory(), REFERENCES)]
    )


def listed(category: str, mark: str = "") -> list[str]:
    """Names that a drop-down offers, through the host's cached listing.

    Names have `/` on every system, so that a workflow made on one opens on another. Files whose header has the `mark`
    come first, as the first one is what a new node starts with; none is left out.
    """
    names = [name.replace(os.sep, "/") for name in folder_paths.get_filename_list(category) if _PARTIAL not in name]
    return sorted(names, key=lambda name: not _has_mark(category, name, mark)) if mark else names


def _has_mark(category: str, name: str, mark: str) -> bool:
    path = folder_paths.get_full_path(category, name)
    if path is None:
        return False
    found = os.stat(path)
    return _look(path, found.st_size, found.st_mtime_ns, mark)


@functools.lru_cache(maxsize=4096)
def _look(path: str, size: int, changed: int, mark: str) -> bool:
    return header_mentions(path, mark)


class FileInput(io.Combo.Input):
    """A drop-down of the files of a category.

    The host makes every schema once while it starts. The folders are looked into later, when the schema is told to the
    browser or an input is checked against it: both go through `as_dict`.
    """

    def __init__(self, id: str, category: str, tooltip: str, mark: str = "", none: str = ""):
        """none: what stands for no file; with it the input is optional, and that is its default."""
        may = {"optional": True, "advanced": True, "default": none} if none else {}
        super().__init__(id, options=[none] if none else [], tooltip=tooltip, **may)
        self.category = category
        self.mark = mark
        self.none = [none] if none else []

    def as_dict(self) -> dict:
        return super().as_dict() | {"options": [*self.none, *listed(self.category, self.mark)]}


def find(category: str, name: str) -> str:
    """The path of a listed file.

    Raises:
        StyleLoomError: the name is not one of the listed (which keeps `..` and absolute paths out as well).
    """
    path = folder_paths.get_full_path(category, name) if name in listed(category) else None
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths(category))
        raise StyleLoomError(
            f"{name!r} is not there",
            f"a file in one of: {folders}",
            "Put the file there, press R in the browser to read the folders again, and choose it.",
        )
    return path


def state(category: str, name: str) -> str:
    """Changes when the file does; for `fingerprint_inputs`, which must not fail on a missing file."""
    path = folder_paths.get_full_path(category, name)
    if path is None:
        return f"{name}: missing"
    found = os.stat(path)
    return f"{path}:{found.st_size}:{found.st_mtime_ns}"


def save_path(prefix: str, inside: str = "") -> tuple[str, str]:
    """Where to save next: (path, path relative to the output folder), numbered as the host numbers its files.

    Args:
        prefix: what the artist typed; may name subfolders and the host's %date% placeholders.
        inside: a folder under output that the prefix stays in.

    Raises:
        StyleLoomError: empty, absolute, or leaving the output folder.
    """
    parts = prefix.replace("\\", "/").split("/")
    if not parts[-1].strip() or ".." in parts or os.path.isabs(prefix) or ":" in prefix:
        raise StyleLoomError(
            f"filename_prefix is {prefix!r}",
            "a name, with folders if you like, inside output",
            "Write for example: loras/my_style",
        )
    output = folder_paths.get_output_directory()
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(os.path.join(inside, prefix), output)
    file = f"{name}_{counter:05}_.safetensors"
    return os.path.join(folder, file), os.path.join(subfolder, file)
