"""A LORA_STACK that cannot be said, in a real server: its user is told why, and everything else of the prompt runs."""

from __future__ import annotations


def test_only_the_user_of_a_stack_that_cannot_be_said_does_not_run(client):
    node = lambda kind, **inputs: {"class_type": kind, "inputs": inputs}  # noqa: E731
    prompt = {
        "file": node("StyleLoomLoadLoRA", lora_name="kit/sdxl_paper.safetensors"),
        "half": node("StyleLoomLoRABlockFilter", lora=["file", 0], preset="attention only", inside=0.5, outside=1.0),
        "first": node("StyleLoomLoRAStack", lora=["file", 0], strength=0.7),
        "second": node("StyleLoomLoRAStack", lora=["half", 0], strength=1.0),
        "takes the first": node("StyleLoomLoRAStack", lora_stack=["first", 1], strength=1.0),
        "takes the second": node("StyleLoomLoRAStack", lora_stack=["second", 1], strength=1.0),
        **{f"shows {name}": node("PreviewAny", source=[name, 2])
           for name in ("first", "second", "takes the first", "takes the second")},
    }  # fmt: skip
    prompt_id = client.queue(prompt)
    told = [event["data"] for event in client.follow(prompt_id, timeout=120) if event["type"] == "execution_error"]
    outputs = client.history(prompt_id)["outputs"]
    text = {name: "".join(outputs.get(f"shows {name}", {}).get("text", ())) for name in prompt}
    assert text["takes the first"].startswith("LoRA 1: kit/sdxl_paper.safetensors at strength 0.7 (0.7 for a text")
    assert "LoRA 1 is no file in models/loras as it is" in text["second"]
    assert "shows first" in outputs and "shows takes the second" not in outputs
    assert [each["node_id"] for each in told] == ["takes the second"]
    assert "Execution Blocked: LoRA Stack: LoRA 1 is no file" in told[0]["exception_message"]
