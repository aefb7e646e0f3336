"""Load i2L Image Encoders, Encode References, Gray References."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..weights.errors import StyleLoomError
from ..weights.i2l import preprocess
from ..weights.i2l.encoders import EncoderFile, open_encoder
from ..weights.i2l.references import References as ReferenceSet
from ..weights.i2l.references import stack_references
from ..weights.i2l.towers import PRECISIONS
from .host import folders
from .host.progress import Steps
from .host.i2l.qwen_text_encoder import check_clip, text_view
from .host.i2l.image_encoder import TowerRun
from .types import CATEGORY, Encoders, References

MAX_INPUTS = 64
GRAY = 128 / 255


class LoadImageEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        where = "from DiffSynth-Studio/General-Image-Encoders, anywhere under models/i2l or models/clip_vision."
        return io.Schema(
            node_id="StyleLoomLoadImageEncoders",
            display_name="Load i2L Image Encoders",
            category=CATEGORY,
            description="Opens the two image encoders that i2L predictors read: SigLIP2-G384 (2.3 GB) and DINOv3-7B "
            "(13.4 GB). They are read from disk when pictures are encoded, one after the other.",
            search_aliases=["siglip2", "dinov3", "image encoder", "i2l encoders", "clip vision"],
            inputs=[
                folders.FileInput(
                    "siglip_name",
                    folders.ENCODERS,
                    tooltip=f"SigLIP2-G384/model.safetensors (Apache-2.0) {where}",
                    mark='"head.probe"',
                ),
                folders.FileInput(
                    "dino_name",
                    folders.ENCODERS,
                    tooltip="DINOv3-7B/model.safetensors (under Meta's own DINOv3 licence, "
                    f"whatever the repository's tag says) {where}",
                    mark='"layer.0.mlp.gate_proj.weight"',
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="bf16",
                    tooltip="bf16: as published. fp8: the big matrices are stored in 8 bits and computed "
                    "in bf16, half the memory for slightly different embeddings. fp32: computed in full "
                    "precision, slower.",
                ),
            ],
            outputs=[Encoders.Output(display_name="encoders", tooltip="For Encode References.")],
        )

    @classmethod
    def fingerprint_inputs(cls, siglip_name, dino_name, precision):
        return [folders.state(folders.ENCODERS, siglip_name), folders.state(folders.ENCODERS, dino_name), precision]

    @classmethod
    def execute(cls, siglip_name, dino_name, precision) -> io.NodeOutput:
        siglip, dino = (
            open_encoder(folders.find(folders.ENCODERS, name), kind, precision, name)
            for kind, name in (("siglip2", siglip_name), ("dinov3", dino_name))
        )
        return io.NodeOutput((siglip, dino))


class EncodeReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        images = io.Autogrow.TemplatePrefix(
            io.Image.Input(
                "image",
                tooltip="Reference pictures: any size, any number in a batch or list. Each one "
                "counts as one reference. The encoders see the square in its middle.",
            ),
            prefix="image",
            min=1,
            max=MAX_INPUTS,
        )
        return io.Schema(
            node_id="StyleLoomEncodeReferences",
            display_name="Encode References",
            category=CATEGORY,
            description="Reads reference pictures with both image encoders. A picture that was seen before is not "
            "encoded again, so adding one to a set costs the time of one.",
            search_aliases=["i2l", "reference images", "style reference", "encode image", "image embedding"],
            is_input_list=True,
            inputs=[
                Encoders.Input("encoders", tooltip="From Load i2L Image Encoders."),
                io.Autogrow.Input(
                    "images",
                    template=images,
                    tooltip="Connect a picture and another input appears. In the API: images.image0, images.image1, …",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Only for Qwen-Image-i2L Coarse and Fine: Qwen-Image's text encoder "
                    "(Qwen2.5-VL 7B, with its vision part).",
                ),
            ],
            outputs=[
                References.Output(display_name="references", tooltip="For Image-to-LoRA Predictor and Save References.")
            ],
        )

    @classmethod
    def execute(cls, encoders, images, clip=None) -> io.NodeOutput:
        siglip, dino = _single(encoders, "encoders")
        clip = _single(clip, "clip") if clip else None
        if clip is not None:
            check_clip(clip)
        pictures = _pictures(images)
        return io.NodeOutput(encode(siglip, dino, pictures, clip))


class GrayReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomGrayReferences",
            display_name="Gray References",
            category=CATEGORY,
            description="Uniform gray pictures, as many and as large as those given. The LoRA that a predictor makes "
            "of them is what it adds whatever it is given. Published for the negative side of i2L v2; an experiment "
            "with v1.",
            search_aliases=["gray images", "grey", "negative reference", "neutral", "asymmetric cfg"],
            inputs=[io.Image.Input("images", tooltip="The reference pictures; only their number and size count.")],
            outputs=[io.Image.Output(display_name="images", tooltip="RGB 128, for Encode References.")],
        )

    @classmethod
    def execute(cls, images) -> io.NodeOutput:
        if images.shape[0] == 0:
            raise StyleLoomError(
                "images is an empty batch", "at least one picture", "Connect a picture to Gray References."
            )
        return io.NodeOutput(torch.full((*images.shape[:3], 3), GRAY))


def _single(values: list, name: str):
    if any(value is not values[0] for value in values):
        raise StyleLoomError(f"{name} is a list of {len(values)}", "one", f"Connect one {name} to Encode References.")
    return values[0]


def _pictures(images: dict[str, list[torch.Tensor] | None]) -> list:
    """8-bit pictures from growing inputs of lists of batches, in the order of the inputs' numbers."""
    pictures = []
    for name in sorted(images, key=lambda name: (len(name), name)):
        for batch in images[name] or ():
            if batch is None:
                continue
            if batch.ndim != 4 or batch.shape[0] == 0:
                raise StyleLoomError(
                    f"{name} is {list(batch.shape)}: it holds no picture",
                    "a batch (pictures, height, width, channels)",
                    "Look at the node that makes it: it gave an empty batch.",
                )
            pictures += [preprocess.to_uint8(picture, f"{name}, picture {i + 1}") for i, picture in enumerate(batch)]
    if not pictures:
        raise StyleLoomError("there is no reference picture", "at least one", "Connect a picture to images.")
    return pictures


def encode(siglip: EncoderFile, dino: EncoderFile, pictures: list, clip=None) -> ReferenceSet:
    """Encode 8-bit pictures; what is remembered of earlier runs is not computed again.

    One encoder after the other, so that the larger one sets the peak of memory and not the sum.
    """
    hashes = [preprocess.image_hash(picture) for picture in pictures]
    # The cache may drop a picture of this very run while others are added, so the run keeps its own.
    known = {file: {digest: file.seen[digest] for digest in hashes if digest in file.seen} for file in (siglip, dino)}
    todo = {
        file: {digest: picture for digest, picture in zip(hashes, pictures) if digest not in found}
        for file, found in known.items()
    }
    views = ("coarse", "fine") if clip is not None else ()
    steps = Steps(sum(len(missing) * file.blocks for file, missing in todo.items()) + len(views) * len(pictures))
    for file, missing in todo.items():
        if missing:
            with TowerRun(file) as tower:
                for digest, picture in missing.items():
                    made = tower(file.pixels(preprocess.crop_1024(picture)), steps)
                    known[file][digest] = file.seen[digest] = made
    residuals = {
        view: [text_view(clip, preprocess.residual_image(picture, view), view, steps) for picture in pictures]
        for view in views
    }
    described = {"siglip": siglip.description, "dino": dino.description}
    return stack_references(
        [
            ReferenceSet(
                torch.cat([known[siglip][digest], known[dino][digest]], dim=1),
                (digest,),
                *(residuals[view][i] if view in residuals else None for view in ("coarse", "fine")),
                described,
            )
            for i, digest in enumerate(hashes)
        ]
    )
