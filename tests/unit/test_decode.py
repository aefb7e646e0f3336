"""Decoding against a slow oracle: the formulas, element by element, in Python's whole numbers."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import Q_COARSE, Q_FINE, Q_SMALL, Z_SMALL, random_tensors, write_predictor

from styleloom.weights.errors import StyleLoomError
from styleloom.weights.i2l.decode import decode
from styleloom.weights.i2l.header import recognise_predictor
from styleloom.weights.i2l.layouts import key_shapes, targets
from styleloom.weights.tensor_file import TensorFile, read_header


def _embeddings(spec, count, seed=1):
    return torch.randn(count, spec.in_dim, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _hidden(spec, count, seed=2):
    r = spec.residual
    return torch.randn(count, r.tokens, r.text_width, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _decode(path, spec, x, hidden=None, **kwargs):
    with TensorFile(read_header(path)) as file:
        return decode(file, spec, x, hidden, **kwargs)


def _whole_numbers(path, spec, seed=0):
    """A predictor of small whole numbers. Every sum is below 2^24 and so exact in fp32, in whatever order and with
    whatever instructions a processor adds. The results must be equal to the oracle's: rounding to bf16 is the only
    rounding there is.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        key: torch.randint(-3, 4, shape, generator=generator).bfloat16() for key, shape in key_shapes(spec).items()
    }
    save_file(tensors, str(path))
    return tensors


def _whole_inputs(spec, count):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-200, 201, (count, spec.in_dim), generator=generator).bfloat16()
    if spec.residual is None:
        return x, None
    r = spec.residual
    # Multiples of 20, as the branch multiplies with 0.05.
    hidden = torch.randint(-2, 3, (count, r.tokens, r.text_width), generator=generator) * 20
    return x, hidden.bfloat16()


def _mv(matrix, vector, rounded):
    return [rounded(sum(w * v for w, v in zip(row, vector) if w)) for row in matrix]


def _exactly(value):
    return value


def _to_bf16(value):
    """Round a whole number to 8 significant bits, half to even: Python's own arithmetic."""
    unit = 2 ** max(0, abs(value).bit_length() - 8)
    return round(Fraction(value, unit)) * unit


def oracle(tensors, stored, x, rank, a_width, b_width, hidden, rounded):
    """A[r][i] and B[o][r] of one target and one picture, without any tensor operation, in whole numbers."""
    get = lambda name: tensors[name].int().tolist()  # noqa: E731
    r = None
    if hidden is not None:
        block = stored.split(".layers.")[0]
        w_in = get(f"{block}.proj_residual.proj_in.weight")
        flat = [value for token in hidden for value in _mv(w_in, [v // 20 for v in token], rounded)]
        r = _mv(get(f"{block}.proj_residual.proj_out.weight"), flat, rounded)
    out = {}
    for factor in ("proj_a", "proj_b"):
        h = _mv(get(f"{stored}.{factor}.proj_in.weight"), x, rounded)
        if r is not None:
            h = [rounded(a + b) for a, b in zip(h, r)]
        out[factor] = _mv(get(f"{stored}.{factor}.proj_out.weight"), h, rounded)
    a = [[out["proj_a"][k * a_width + i] for i in range(a_width)] for k in range(rank)]
    b = [[out["proj_b"][o * rank + k] for k in range(rank)] for o in range(b_width)]
    return torch.tensor(a), torch.tensor(b)


@pytest.mark.parametrize(("arithmetic", "rounded"), [("fp32", _exactly), ("reference", _to_bf16)])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("spec", [Z_SMALL, Q_SMALL, Q_COARSE, Q_FINE], ids=["z-image", "style", "coarse", "fine"])
def test_every_element_follows_the_formula(spec, count, arithmetic, rounded, tmp_path):
    """fp32 rounds nothing; reference rounds to bf16 after each map."""
    tensors = _whole_numbers(tmp_path / "m.safetensors", spec)
    x, hidden = _whole_inputs(spec, count)
    decoded = _decode(tmp_path / "m.safetensors", spec, x, hidden, arithmetic=arithmetic)
    chosen = list(targets(spec.family))
    assert list(decoded) == [t.name for t in chosen]
    # The oracle walks every token in Python: a few targets of every group are enough.
    for target in chosen[:: len(chosen) // (4 if spec.residual else 20)]:
        n = count - 1
        want = oracle(
            tensors,
            target.stored,
            x[n].int().tolist(),
            spec.rank,
            spec.widths[target.a_width],
            spec.widths[target.b_width],
            hidden[n].int().tolist() if spec.residual else None,
            rounded,
        )
        pair = decoded[target.name][n]
        for found, right in zip((pair.down, pair.up), want):
            assert found.dtype == (torch.float32 if arithmetic == "fp32" else torch.bfloat16)
            assert torch.equal(found.double(), right.double())


def test_the_two_arithmetics_differ_here(tmp_path):
    """Else the test above would prove nothing of the rounding between the maps."""
    _whole_numbers(tmp_path / "m.safetensors", Z_SMALL)
    x, _ = _whole_inputs(Z_SMALL, 1)
    exact, rounded = (
        _decode(tmp_path / "m.safetensors", Z_SMALL, x, arithmetic=arithmetic) for arithmetic in ("fp32", "reference")
    )
    late = {name for name, (pair,) in exact.items() if not torch.equal(pair.up.bfloat16(), rounded[name][0].up)}
    assert late, "rounding at the end alone gives the same"


@pytest.mark.parametrize("count", [1, 5])
def test_what_finish_makes_comes_out(count, tmp_path):
    """Called once a target, with the pairs that come out without it, in whatever thread."""
    path = write_predictor(tmp_path / "m.safetensors", Z_SMALL)
    x = _embeddings(Z_SMALL, count)
    plain = _decode(path, Z_SMALL, x)
    made = _decode(path, Z_SMALL, x, finish=lambda name, pairs: (name, torch.cat([p.down for p in pairs]).clone()))
    assert list(made) == list(plain)
    for name, (called, down) in made.items():
        assert called == name and torch.equal(down, torch.cat([p.down for p in plain[name]]))


def test_a_picture_does_not_depend_on_its_neighbours(tmp_path):
    path = write_predictor(tmp_path / "m.safetensors", Q_COARSE)
    x, hidden = _embeddings(Q_COARSE, 5), _hidden(Q_COARSE, 5)
    together = _decode(path, Q_COARSE, x, hidden)
    alone = _decode(path, Q_COARSE, x[3:4], hidden[3:4])
    for name, pairs in alone.items():
        assert torch.equal(pairs[0].down, together[name][3].down) and torch.equal(pairs[0].up, together[name][3].up)


def test_a_predictor_without_residual_branch_ignores_the_residual(tmp_path):
    path = write_predictor(tmp_path / "m.safetensors", Q_SMALL)
    x = _embeddings(Q_SMALL, 1)
    plain, given = _decode(path, Q_SMALL, x), _decode(path, Q_SMALL, x, torch.ones(1, 71, 4))
    assert all(torch.equal(plain[name][0].down, given[name][0].down) for name in plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e4m3fn, torch.float64])
def test_every_stored_dtype_decodes(dtype, tmp_path):
    path = write_predictor(tmp_path / "m.safetensors", Z_SMALL, dtype=dtype)
    spec = recognise_predictor(read_header(path)).spec
    assert all(bool(p[0].up.isfinite().all()) for p in _decode(path, spec, _embeddings(spec, 1)).values())


def test_progress_counts_targets_and_can_stop(tmp_path):
    path = write_predictor(tmp_path / "m.safetensors", Z_SMALL)
    calls = []

    class Stop(Exception):
        pass

    def tick():
        calls.append(1)
        if len(calls) == 7:
            raise Stop

    with pytest.raises(Stop):
        _decode(path, Z_SMALL, _embeddings(Z_SMALL, 1), on_target=tick)
    calls.clear()
    calls.extend([1] * 10)
    _decode(path, Z_SMALL, _embeddings(Z_SMALL, 1), on_target=tick)
    assert len(calls) == 10 + 238


@pytest.mark.parametrize(
    ("spec", "x", "hidden", "words"),
    [
        (Z_SMALL, (1, 11), None, r"references are \[1, 11\].*"),
        (Z_SMALL, (0, 12), None, r"references are \[0, 12\]"),
        (Q_COARSE, (2, 10), None, "residual_coarse"),
        (Q_FINE, (2, 10), None, "residual_fine"),
        (Q_COARSE, (2, 10), (2, 70, 4), r"residual_coarse of the references is \[2, 70, 4\]"),
        (Q_COARSE, (2, 10), (1, 71, 4), r"residual_coarse of the references is \[1, 71, 4\]"),
    ],
)
def test_references_that_do_not_fit_are_refused(spec, x, hidden, words, tmp_path):
    path = write_predictor(tmp_path / "m.safetensors", spec)
    with pytest.raises(StyleLoomError, match=words):
        _decode(path, spec, torch.zeros(x), None if hidden is None else torch.zeros(hidden))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_number_in_the_file_is_named(value, tmp_path):
    tensors = random_tensors(Z_SMALL)
    key = "noise_refiner_lora.blocks.2.layers.1.proj_b.proj_out.weight"
    tensors[key][3, 2] = value
    save_file(tensors, str(tmp_path / "m.safetensors"))
    with pytest.raises(StyleLoomError) as error:
        _decode(tmp_path / "m.safetensors", Z_SMALL, _embeddings(Z_SMALL, 2))
    assert key in error.value.found and "m.safetensors" in error.value.found
