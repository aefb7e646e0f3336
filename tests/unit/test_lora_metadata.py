"""What a LoRA's metadata says: the forms that trainers write, and metadata that means harm."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from styleloom.weights.lora.metadata import LoRAFacts, facts_of

KOHYA = {
    "ss_tag_frequency": json.dumps({
        "10_zkz style": {"zkz style": 40, "a cat": 21, "a dog": 12, "outdoors": 19},
        "5_zkz style": {"zkz style": 10, "a cat": 5},
    }),
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_sd_model_name": "juggernaut.safetensors",
    "ss_network_dim": "32",
}  # fmt: skip


@pytest.mark.parametrize(
    ("metadata", "facts"),
    [
        (KOHYA, LoRAFacts(("zkz style", "a cat"), True, "sdxl_base_v1-0", "juggernaut.safetensors")),
        (KOHYA | {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "modelspec.trigger_phrase": "zkz, ink"},
         LoRAFacts(("zkz", "ink"), False, "stable-diffusion-xl-v1-base", "juggernaut.safetensors")),
        ({"ss_tag_frequency": json.dumps({"1_ohwx": {"ohwx": 1}}), "ss_base_model_version": "flux1",
          "software": '{"name": "ai-toolkit"}', "training_info": '{"step": 2000}'},
         LoRAFacts(("ohwx",), True, "flux1", "")),
        ({"civitai": json.dumps({"trainedWords": ["mycel style", "spores, damp"], "baseModel": "Illustrious"})},
         LoRAFacts(("mycel style", "spores", "damp"), False, "Illustrious", "")),
        ({"trainedWords": '["a", "b", "a"]', "base_model": "Pony"}, LoRAFacts(("a", "b"), False, "Pony", "")),
        ({"lora_adapter_metadata": json.dumps({"base_model_name_or_path": "black-forest-labs/FLUX.1-dev"})},
         LoRAFacts((), False, "", "black-forest-labs/FLUX.1-dev")),
        ({"ss_sd_model_name": "None", "modelspec.trigger_phrase": " ", "ss_base_model_version": "unknown"}, LoRAFacts()),
        # Captions in sentences: nothing is said twice.
        ({"ss_tag_frequency": json.dumps({"a": {"A boat lies at the shore.": 1, "Two boats.": 1}})}, LoRAFacts()),
        ({"format": "pt"}, LoRAFacts()),
    ],
)  # fmt: skip
def test_what_trainers_write(metadata, facts):
    assert facts_of(metadata) == facts


def test_no_more_than_ten_words_and_none_too_long():
    many = {f"tag {i:03}": 9 for i in range(1000)}
    facts = facts_of({"ss_tag_frequency": json.dumps({"a": many})})
    assert facts.trigger_words == tuple(f"tag {i:03}" for i in range(10))
    (word,) = facts_of({"trigger_word": "x" * 10_000_000}).trigger_words
    assert word == "x" * 120
    assert facts_of({"trigger_word": "red\n\x1b[31m\u202eboat\tat sea"}).trigger_words == ("red [31m boat at sea",)


DEEP = "[" * 200_000 + "]" * 200_000


@pytest.mark.parametrize(
    "metadata",
    [
        None, [], "text", 7, {}, {3: "x"}, {"ss_tag_frequency": None}, {"ss_tag_frequency": "{"},
        {"ss_tag_frequency": DEEP}, {"civitai": DEEP}, {"trainedWords": DEEP},
        {"ss_tag_frequency": "[1, 2]"}, {"ss_tag_frequency": '{"a": [1], "b": {"t": "3"}, "c": {"t": NaN, "u": true}}'},
        {"ss_tag_frequency": '{"a": {"t": -3, "u": 1e999, "v": ' + "9" * 400 + "}}"},
        {"ss_tag_frequency": '{"a": {"t": ' + "9" * 9000 + "}}"},
        {"ss_tag_frequency": '{"a": ' + " " * 9_000_000 + "{}}"},
        {"modelspec.trigger_phrase": 5, "trainedWords": "[1, null, {}]", "baseModel": {"a": 1}, "civitai": "[]"},
    ],
)  # fmt: skip
def test_what_says_nothing(metadata):
    assert facts_of(metadata) == LoRAFacts()


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=9,
)
_NAMES = st.sampled_from(["ss_tag_frequency", "civitai", "trainedWords", "modelspec.trigger_phrase", "baseModel",
                          "ss_sd_model_name", "trigger_words"])  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(_NAMES, _VALUES, max_size=5), st.booleans())
def test_whatever_is_in_it(values, as_text):
    facts = facts_of({name: json.dumps(value) for name, value in values.items()} if as_text else values)
    assert len(facts.trigger_words) <= 10 and len(set(facts.trigger_words)) == len(facts.trigger_words)
    for text in (*facts.trigger_words, facts.base_model, facts.checkpoint):
        assert len(text) <= 120 and text.isprintable() and text == text.strip()
