"""Decoding against a slow oracle: the formulas, element by element, in Python floats."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import Q_COARSE, Q_FINE, Q_SMALL, Z_SMALL, random_tensors, write_predictor

from styleloom.weights.errors import StyleLoomError
from styleloom.weights.i2l.decode import decode
from styleloom.weights.i2l.header import recognise_predictor
from styleloom.weights.i2l.layouts import targets
from styleloom.weights.tensor_file import TensorFile, read_header


def _embeddings(spec, count, seed=1):
    return torch.randn(count, spec.in_dim, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _hidden(spec, count, seed=2):
    r = spec.residual
    return torch.randn(count, r.tokens, r.text_width, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _decode(path, spec, x, hidden=None, **kwargs):
    with TensorFile(read_header(path)) as file:
        return decode(file, spec, x, hidden, **kwargs)


def _mv(matrix, vector):
    return [sum(w * v for w, v in zip(row, vector)) for row in matrix]


def oracle(tensors, stored, x, rank, a_width, b_width, hidden=None):
    """A[r][i] and B[o][r] of one target and one picture, without any tensor operation."""
    get = lambda name: tensors[name].double().tolist()  # noqa: E731
    r = None
    if hidden is not None:
        block = stored.split(".layers.")[0]
        w_in = get(f"{block}.proj_residual.proj_in.weight")
        flat = [value for token in hidden for value in _mv(w_in, [0.05 * v for v in token])]
        r = _mv(get(f"{block}.proj_residual.proj_out.weight"), flat)
    out = {}
    for factor in ("proj_a", "proj_b"):
        h = _mv(get(f"{stored}.{factor}.proj_in.weight"), x)
        if r is not None:
            h = [a + b for a, b in zip(h, r)]
        out[factor] = _mv(get(f"{stored}.{factor}.proj_out.weight"), h)
    a = [[out["proj_a"][k * a_width + i] for i in range(a_width)] for k in range(rank)]
    b = [[out["proj_b"][o * rank + k] for k in range(rank)] for o in range(b_width)]
    return torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("spec", [Z_SMALL, Q_SMALL, Q_COARSE, Q_FINE], ids=["z-image", "style", "coarse", "fine"])
def test_every_element_follows_the_formula(spec, count, tmp_path):
    path = write_predictor(tmp_path / "m.safetensors", spec, dtype=torch.float32)
    tensors = load_file(str(path))
    x = _embeddings(spec, count)
    hidden = _hidden(spec, count) if spec.residual else None
    decoded = _decode(path, spec, x, hidden, arithmetic="fp32")
    chosen = list(targets(spec.family))
    # Fine's oracle walks 1376 tokens a block in Python: a few targets of every group are enough there.
    chosen = chosen[:: len(chosen) // 6] if spec.residual else chosen[:: len(chosen) // 40]
    assert list(decoded) == [t.name for t in targets(spec.family)]
    for target in chosen:
        for n in range(count) if not spec.residual else (count - 1,):
            a, b = oracle(
                tensors,
                target.stored,
                x[n].tolist(),
                spec.rank,
                spec.widths[target.a_width],
                spec.widths[target.b_width],
                hidden[n].tolist() if spec.residual else None,
            )
            pair = decoded[target.name][n]
            torch.testing.assert_close(pair.down.double(), a, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(pair.up.double(), b, rtol=1e-5, atol=1e-5)


def test_reference_arithmetic_rounds_between_the_maps(tmp_path):
    """bf16 in, bf16 between, bf16 out; the intermediate is rounded, which fp32 arithmetic does not do."""
    path = write_predictor(tmp_path / "m.safetensors", Z_SMALL)
    tensors, x = load_file(str(path)), _embeddings(Z_SMALL, 1)
    pair = _decode(path, Z_SMALL, x)["layers.4.feed_forward.w3"][0]
    stored = "layers_lora.blocks.34.layers.2.proj_b"
    h = (tensors[f"{stored}.proj_in.weight"].double() @ x[0].double()).float().bfloat16()
    b = (tensors[f"{stored}.proj_out.weight"].double() @ h.double()).float().bfloat16().view(10, 4)
    assert pair.up.dtype == torch.bfloat16
    # At most one unit in the last place, from the order of summation.
    assert (pair.up.float() - b.float()).abs().max() <= 2**-7 * b.float().abs().max()
    exact = _decode(path, Z_SMALL, x, arithmetic="fp32")["layers.4.feed_forward.w3"][0].up
    assert exact.dtype == torch.float32 and not torch.equal(exact.bfloat16(), pair.up)


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
