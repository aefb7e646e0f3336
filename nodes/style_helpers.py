"""Style Weights and Noise Negative."""

from __future__ import annotations

from comfy_api.latest import io

from ..weights.ip_adapter.combine import parse_numbers
from ..weights.ip_adapter.noise_pictures import KINDS, noise_picture
from ..weights.ip_adapter.weight_curves import METHODS, TIMINGS, as_text, complement, cross_fade, weight_curve
from .host.style.curve import draw_curve
from .host.style.squares import CROP, POSITIONS, squares
from .types import CATEGORY_STYLE

_MOST_FRAMES = 9999


class StyleWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        def frames(name: str, default: int, tooltip: str, **options):
            return io.Int.Input(name, default=default, min=0, max=_MOST_FRAMES, tooltip=tooltip, **options)

        later = {"optional": True, "advanced": True}
        return io.Schema(
            node_id="StyleLoomStyleWeights",
            display_name="Style Weights",
            category=CATEGORY_STYLE,
            description="A weight for each frame, or for each part of the schedule, from a few numbers and a timing; "
            "with a picture of the curve.",
            search_aliases=["ipadapter weights", "weight schedule", "keyframes", "timing", "animation", "curve"],
            inputs=[
                io.String.Input(
                    "weights",
                    default="1.0, 0.0",
                    multiline=True,
                    tooltip="Numbers with commas: key frames at equal distances; with the timing custom the weights "
                    "themselves, one a frame.",
                ),
                io.Combo.Input(
                    "timing",
                    options=list(TIMINGS),
                    default=TIMINGS[0],
                    tooltip="How it goes from one number to the next. custom: the numbers as they are. random: "
                    "anything between the first and the last.",
                ),
                frames("frames", 16, "How many weights, 2 at least. Not used by custom."),
                frames("start_frame", 0, "The frame at which the change begins.", **later),
                frames("end_frame", _MOST_FRAMES, "The frame before which the change is over.", **later),
                frames("add_starting_frames", 0, "Further frames with the first weight, before all others.", **later),
                frames("add_ending_frames", 0, "Further frames with the last weight, after all others.", **later),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Only for the timing random.",
                    **later,
                ),
                io.Image.Input(
                    "image", tooltip="Pictures to go through: each gets as many frames as there are weights.", **later
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip="Only with image. full batch: one picture after the other. shift batches: each fades into "
                    "the next. alternate batches: the same, and each picture stays in image_1 or in image_2.",
                    **later,
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="weights",
                    tooltip="For reference_weights (fusion one per picture) or step_weights of Style Block Injector.",
                ),
                io.String.Output(display_name="reversed", tooltip="The same from the last to the first."),
                io.Int.Output(display_name="count", tooltip="How many there are, for the batch of the latent."),
                io.Image.Output(display_name="curve", tooltip="A picture of the weights."),
                io.Image.Output(display_name="image_1", tooltip="With image: the first picture of each frame."),
                io.Image.Output(display_name="image_2", tooltip="With image: the second picture of each frame."),
                io.String.Output(
                    display_name="weights_2", tooltip="Weights for image_2: they grow where those of image_1 sink."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        weights,
        timing,
        frames,
        start_frame=0,
        end_frame=_MOST_FRAMES,
        add_starting_frames=0,
        add_ending_frames=0,
        seed=0,
        image=None,
        method=METHODS[0],
    ) -> io.NodeOutput:
        numbers = parse_numbers(weights, "weights")
        further = add_starting_frames, add_ending_frames
        made = weight_curve(
            numbers, timing, frames, start_frame, end_frame, *((0, 0) if image is not None else further), seed
        )
        first = second = None
        if image is not None:
            made, *places = cross_fade(made, len(image), method, *further)
            first, second = (image[place] for place in places)
        curve = draw_curve(made, f"{len(made)} weights, {timing}")
        return io.NodeOutput(
            as_text(made), as_text(made[::-1]), len(made), curve, first, second, as_text(complement(made))
        )


class NoiseNegative(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomNoiseNegative",
            display_name="Noise Negative",
            category=CATEGORY_STYLE,
            description="A picture of noise, or a noisy picture, for the negative side of Style Block Injector: encode "
            "it and connect it to negative. Often gives richer pictures.",
            search_aliases=["ipadapter noise", "negative image", "noise injection", "negative style"],
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default=KINDS[0],
                    tooltip="fade: noise laid over the picture. dissolve: single values replaced by noise. gaussian: "
                    "noise added. shuffle: pixels moved about, the picture turned upside down, with noise.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=1.0, step=0.05, tooltip="How much noise; 0 is none."
                ),
                io.Int.Input("blur", default=0, min=0, max=32, tooltip="Side of a blur laid over it, in pixels."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="The same seed gives the same noise.",
                ),
                io.Image.Input(
                    "image", optional=True, tooltip="What the noise is made of, as a rule the style picture. "
                    "Without it: a black picture.",
                ),
                io.Combo.Input(
                    "position",
                    options=list(POSITIONS),
                    default=POSITIONS[0],
                    optional=True,
                    advanced=True,
                    tooltip="Which square of the picture is taken.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="224 by 224 pixels, for Encode Style Image.")],
        )

    @classmethod
    def execute(cls, kind, strength, blur, seed, image=None, position=POSITIONS[0]) -> io.NodeOutput:
        if image is not None:
            image = squares(image, CROP, [], position)
        return io.NodeOutput(noise_picture(image, kind, strength, blur, seed))
