"""One counter for the host's progress bar and its Cancel button."""

from __future__ import annotations

import comfy.model_management
import comfy.utils


class Steps:
    """Call it once a step: it moves the bar of the running node, and raises the host's interrupt when asked to stop."""

    def __init__(self, total: int):
        self._bar = comfy.utils.ProgressBar(total)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def __call__(self, *_) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update(1)
