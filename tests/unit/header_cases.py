"""Made-up safetensors files, good and bad, and the judgement of our header reader on one of them.

Used by the unit tests with a few hundred cases and by benchmarks/fuzz_headers.py with as many as one likes.
The independent judge is safetensors' own loader: whatever we accept, it must accept with the same content. Where we
are stricter, the error has to give one of the reasons in STRICTER.
"""

from __future__ import annotations

import json
import struct

import safetensors
from hypothesis import strategies as st
from styleloom.weights.errors import StyleLoomError
from styleloom.weights.tensor_file import read_header

STRICTER = (
    "twice",  # safetensors takes the last of two tensors with one name
    "is not an object with the three fields",  # safetensors takes lists in the place of objects, and skips more fields
    "its dtype is not a text",  # safetensors takes {"F32": null} for "F32"
    "too many elements",  # safetensors takes (0, 2^63, 2^63)
    # These where safetensors does not look, in a field that it skips:
    "is not a whole number",
    "half of a surrogate pair",
    "nested too deep",
)

BITS = {"F32": 32, "BF16": 16, "F16": 16, "F64": 64, "I64": 64, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "C64": 64, "F4": 4}


class Pairs(list):
    """A JSON object as a list of (name, value), so that a name can be there twice."""


def dump(value) -> str:
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(name)}:{dump(inner)}" for name, inner in value) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


names = st.sampled_from(["a", "b", "c.weight", "", "__metadata__", "\u00e9", "\ud800", "\x00", "shape"])
numbers = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([2**31, 2**53 + 1, 2**62, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63), 1.0, 0.5, float("nan")]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.sampled_from(["F32", "ab", "", "\udc00"])),
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(names, inner), max_size=3).map(Pairs),
    max_leaves=5,
)
objects = st.lists(st.tuples(names, values), max_size=4).map(Pairs)


def pack(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@st.composite
def nearly_right(draw) -> bytes:
    """A good file, changed in none, one or two places."""
    header, at = Pairs(), 0
    for name in draw(st.lists(st.sampled_from(["a", "b", "c.weight", "\u00e9", "\x00"]), max_size=3, unique=True)):
        dtype = draw(st.sampled_from(list(BITS)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        count = BITS[dtype]
        for size in shape:
            count *= size
        header.append((name, Pairs([("dtype", dtype), ("shape", shape), ("data_offsets", [at, at + count // 8])])))
        at += count // 8
    data = bytes(i % 251 for i in range(at))
    if draw(st.booleans()):
        header.insert(0, ("__metadata__", Pairs([("format", "pt")])))
    for change in draw(st.lists(st.integers(0, 9), max_size=2)):
        # Other changes may have put something else in the place of a tensor.
        entries = [(i, entry) for i, (_, entry) in enumerate(header) if isinstance(entry, Pairs) and len(entry) >= 3]
        if change == 0:
            header.append((draw(names), draw(values)))
        elif change == 1 and entries:
            header.append((draw(names), draw(st.sampled_from(entries))[1]))
        elif change in (2, 3) and entries:  # a field holds something else
            _, entry = draw(st.sampled_from(entries))
            at_field = draw(st.integers(0, 2))
            entry[at_field] = (entry[at_field][0], draw(st.one_of(values, st.lists(numbers, max_size=3))))
        elif change in (4, 5) and entries:  # offsets or sizes are moved
            _, entry = draw(st.sampled_from(entries))
            name, was = entry[draw(st.integers(1, 2))]
            if type(was) is list and was:  # and not Pairs
                was[draw(st.integers(0, len(was) - 1))] = draw(numbers)
        elif change == 6 and entries:  # a field more, twice, or none
            _, entry = draw(st.sampled_from(entries))
            if draw(st.booleans()):
                entry.append((draw(st.sampled_from(["dtype", "shape", "more"])), draw(values)))
            else:
                entry.pop()
        elif change == 7:
            header = Pairs((name, draw(values) if name == "__metadata__" else entry) for name, entry in header)
        elif change == 8 and entries:  # the same as a list
            i, entry = draw(st.sampled_from(entries))
            header[i] = (header[i][0], [value for _, value in entry])
        elif change == 9:
            data = data + b"\0" if draw(st.booleans()) else data[:-1]
    return pack(dump(header).encode() + b" " * draw(st.integers(0, 2)), data)


@st.composite
def cut_or_flipped(draw) -> bytes:
    content = bytearray(draw(nearly_right()))
    if draw(st.booleans()):
        return bytes(content[: draw(st.integers(0, len(content)))])
    for _ in range(draw(st.integers(1, 2))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.sampled_from(b'\x00\x01\x7f\xff"{}[],:0-9.eE\\u '))
    return bytes(content)


@st.composite
def deep(draw) -> bytes:
    """Nested so deep that a parser which calls itself runs out of stack."""
    depth, end = draw(st.sampled_from([5, 127, 129, 5000])), draw(st.booleans())
    first, again, stop = draw(
        st.sampled_from([('{"a":', "[", "]"), ('{"a":', '{"a":', "}"), ('{"__metadata__":', "[", "]")])
    )
    return pack((first + again * depth + ("1" + stop * depth + "}" if end else "")).encode())


files = st.one_of(
    nearly_right(),
    nearly_right(),
    cut_or_flipped(),
    st.builds(lambda value, data: pack(dump(value).encode(), data), objects, st.binary(max_size=8)),
    st.builds(lambda raw, data: pack(b"{" + raw + b"}", data), st.binary(max_size=40), st.binary(max_size=8)),
    st.builds(
        lambda raw, length: pack(raw, length=length),
        st.binary(max_size=40),
        st.sampled_from([0, 1, 7, 8, 40, 99_999_999, 10**8 + 1, 2**63, 2**64 - 1]),
    ),
    st.binary(max_size=30),
    deep(),
)


def check(path, content: bytes) -> tuple[bool, bool]:
    """Read `content` as a file with both readers and compare.

    Returns:
        (we accepted it, safetensors accepted it).

    Raises:
        AssertionError: the readers disagree, or our error lacks a part. Any other exception: our reader let it out.
    """
    path.write_bytes(content)
    try:
        theirs = {name: entry for name, entry in safetensors.deserialize(content)}
    except safetensors.SafetensorError:
        theirs = None
    try:
        header = read_header(path)
    except StyleLoomError as error:
        assert path.name in error.found and error.expected and error.fix
        assert len(str(error)) < 2000, "too long to read"
        assert theirs is None or any(reason in error.found for reason in STRICTER), error
        return False, theirs is not None
    assert theirs is not None, f"safetensors refuses what we accepted: {content!r}"
    assert header.tensors.keys() == theirs.keys()
    for name, info in header.tensors.items():
        found = (info.dtype, list(info.shape), content[info.start : info.end])
        assert found == (theirs[name]["dtype"], theirs[name]["shape"], bytes(theirs[name]["data"]))
    with safetensors.safe_open(str(path), "numpy") as file:
        assert header.metadata == (file.metadata() or {})
    return True, True
