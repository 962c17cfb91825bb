"""The kernels in C compute what torch does, whatever the sizes; what does not fit them is refused unread."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mrg_r1.kernels import bindings, calls, library
from mrg_r1.kernels.attention import decode_attention

pytestmark = pytest.mark.skipif(library.state().library is None, reason=library.state().text)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bindings, "_WORTH", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1, 1), (7, 33, 31), (8, 64, 32), (32, 256, 97), (300, 17, 65)])
def test_products(rows: int, k: int, n: int, transposed: bool, bias: bool, threads: int) -> None:
    x, add = random(rows, k), random(n, seed=1) if bias else None
    matrix = random(n, k, seed=2).t() if transposed else random(k, n, seed=2)
    found = calls.linear(x, calls.pack(matrix), add, n)
    wanted = F.linear(x.double(), matrix.t().double(), None if add is None else add.double()).float()
    torch.testing.assert_close(found, wanted, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 4, 64), (40, 256)])
def test_rms_norm_and_its_gradient(shape: tuple[int, ...], threads: int) -> None:
    x, weight, grad = random(*shape).requires_grad_(), random(shape[-1], seed=1), random(*shape, seed=2)
    wanted = F.rms_norm(x, (shape[-1],), weight, 1e-6)
    (d_x,) = torch.autograd.grad(wanted, x, grad)
    found, scales = calls.rms_norm(x.detach(), weight, 1e-6, scales=True)
    assert scales is not None and scales.shape == (*shape[:-1], 1)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-6)
    found = calls.rms_norm_backward(grad, x.detach(), scales, weight)
    torch.testing.assert_close(found, d_x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (9, 5), (64, 96)])
def test_swiglu_and_its_gradient(rows: int, size: int, threads: int) -> None:
    gate_up = random(rows, 2 * size) * 20
    gate_up[0, 0] = -300.0  # beyond what exp has in float32
    gate_up[-1, 0] = 300.0
    gate_up.requires_grad_()
    gate, up = gate_up.chunk(2, dim=1)
    grad, wanted = random(rows, size, seed=1), F.silu(gate) * up
    (d_gate_up,) = torch.autograd.grad(wanted, gate_up, grad)
    torch.testing.assert_close(calls.swiglu(gate_up.detach()), wanted, atol=1e-6, rtol=2e-6)
    torch.testing.assert_close(calls.swiglu_backward(grad, gate_up.detach()), d_gate_up, atol=1e-5, rtol=1e-5)


def test_exp_reaches_from_nothing_to_infinity_and_keeps_nan() -> None:
    gate = torch.tensor([-math.inf, -3e38, -1e37, -89.0, -87.0, 0.0, 88.0, 3e38, math.inf, math.nan])
    found = calls.swiglu(torch.stack([gate, torch.ones_like(gate)], dim=1).flatten(1))[:, 0]
    torch.testing.assert_close(found, F.silu(gate), atol=1e-30, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("size", [2, 6, 64, 128])
def test_rotation(size: int, threads: int) -> None:
    whole, angles = random(9, 7, size), random(9, 2, size // 2, seed=1) * 50
    x, (cos, sin) = whole[:, 2:6], (angles.cos()[:, 1:], angles.sin()[:, 1:])  # of more heads, of one of two kinds
    first, second = x.chunk(2, dim=2)
    wanted = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=2)
    found = calls.rotate(x, cos, sin, torch.empty(9, 4, size))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(calls.rotate(found, cos, sin, found, back=True), x, atol=1e-5, rtol=1e-5)


STEPS = {
    "one of each": {"studies": 1, "members": 1, "heads": 1, "key_heads": 1, "size": 1, "prompt": 1},
    "the demo's": {"studies": 3, "members": 4, "heads": 4, "key_heads": 2, "size": 32, "prompt": 41},
    "the bench's": {"studies": 2, "members": 8, "heads": 4, "key_heads": 2, "size": 64, "prompt": 70},
    "7B's": {"studies": 2, "members": 3, "heads": 28, "key_heads": 4, "size": 128, "prompt": 33},
    "odd sizes": {"studies": 2, "members": 5, "heads": 9, "key_heads": 3, "size": 18, "prompt": 31},
}


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_the_attention_of_decoding(step: str, shared: bool, hidden: bool, threads: int) -> None:
    """Tokens come one after another, to beyond what a panel has; some places are computed once for several, ended ones
    not at all; some keys are hidden.
    """
    studies, members, heads, key_heads, size, prompt = STEPS[step].values()
    length, places = 40, studies * members
    keys, values = random(studies, key_heads, prompt, size, seed=1), random(studies, key_heads, prompt, size, seed=2)
    own_keys = torch.full((studies, key_heads, members, *calls.packed_shape(size, length)), torch.nan)
    own_values = torch.full((studies, key_heads, members, *calls.packed_shape(length, size)), torch.nan)
    prompt_bias = torch.where(random(studies, prompt, seed=3) > 1, -math.inf, 0.0) if hidden else None
    fed, of_place, at = [], torch.arange(places), None
    if shared:  # each study's second place reads as its first, the last place of all has ended
        of_place = torch.where(of_place % members == 1, of_place - 1, of_place)
        at, of_place = of_place.unique(return_inverse=True)
        if places > 1 and len(at) > 1:
            at, of_place = at[:-1], of_place.clamp_max(len(at) - 2)
        order = torch.argsort(at // members * 100 - at % members)  # a study's places in any order
        at, of_place = at[order], torch.argsort(order)[of_place]
    for width in (1, 2, 3, *range(4, length + 1)):
        rows = places if at is None else len(at)
        q, k, v = (random(rows, count, size, seed=width * 7 + count) for count in (heads, key_heads, key_heads + 40))
        v = v[:, :key_heads]
        fed.append((k[of_place], v[of_place]))
        own_bias = torch.where(torch.arange(width) < width - 5, -math.inf, 0.1) if hidden else None
        found = decode_attention(
            q, k, v, prompt_keys=calls.pack(keys.transpose(2, 3).flatten(0, 1)),
            prompt_values=calls.pack(values.flatten(0, 1)), prompt_bias=prompt_bias, own_keys=own_keys,
            own_values=own_values, own_bias=own_bias, width=width, shared=None if at is None else (at, of_place),
        )  # fmt: skip
        if width not in (1, 2, 17, 32, 33, length):
            continue
        stands_for = torch.arange(places) if at is None else at
        own = [torch.stack(part, dim=2)[stands_for] for part in zip(*fed, strict=True)]  # [rows, key heads, width, D]
        together = [
            torch.cat([of_prompt[stands_for // members], mine], dim=2).repeat_interleave(heads // key_heads, dim=1)
            for of_prompt, mine in zip((keys, values), own, strict=True)
        ]
        bias = torch.zeros(rows, prompt + width)
        if prompt_bias is not None and own_bias is not None:
            bias = torch.cat([prompt_bias[stands_for // members], own_bias.expand(rows, -1)], dim=1)
        wanted = F.scaled_dot_product_attention(q.unsqueeze(2), *together, attn_mask=bias[:, None, None])
        torch.testing.assert_close(found, wanted.squeeze(2), atol=1e-5, rtol=1e-5)


def written(places: int, length: int = 3) -> dict[str, Tensor]:
    return {
        "token_ids": torch.full((places, length), -7),
        "logp": torch.full((places, length), -7.0),
        "mask": torch.zeros(places, length, dtype=torch.bool),
        "ended": torch.zeros(places, dtype=torch.bool),
    }


@pytest.mark.parametrize("vocabulary", [1, 5, 64, 65, 700])
def test_sampling_inverts_the_distribution_function(vocabulary: int, threads: int) -> None:
    places = 50
    logits = random(places, vocabulary) * 3
    logits[:, 1::3] = -math.inf
    uniforms = torch.rand(places, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    uniforms[0], uniforms[1] = 0.0, math.nextafter(1.0, 0.0)
    log_probs = logits.double().log_softmax(dim=1)
    wanted = torch.searchsorted(log_probs.exp().cumsum(dim=1), uniforms[:, 1:2], right=True).squeeze(1)
    last = torch.isfinite(logits).nonzero()[:, 1].max()
    wanted.clamp_(max=last)
    out = written(places)
    eos = wanted[2:3]
    out["ended"][3] = True
    drawn = calls.sample(logits.clone(), uniforms, None, step=1, eos=eos, pad_id=9, **out)
    assert drawn.tolist() == wanted.tolist()
    going = torch.arange(places) != 3
    assert out["token_ids"][:, 1].tolist() == torch.where(going, wanted, 9).tolist()
    chosen = log_probs.gather(1, wanted[:, None]).squeeze(1).float()
    torch.testing.assert_close(out["logp"][:, 1], chosen * going, atol=1e-6, rtol=1e-6)
    assert out["mask"][:, 1].tolist() == going.tolist()
    assert out["ended"].tolist() == (~going | (wanted == eos)).tolist()
    assert (out["token_ids"][:, ::2] == -7).all() and not out["mask"][:, ::2].any()


def test_several_places_draw_from_one_distribution() -> None:
    logits, of_place = random(2, 30), torch.tensor([1, 0, 1, 1])
    uniforms = torch.rand(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shared, alone = written(4), written(4)
    rest = {"step": 0, "eos": torch.tensor([99]), "pad_id": 0}
    calls.sample(logits.clone(), uniforms, of_place, **rest, **shared)
    calls.sample(logits[of_place], uniforms, None, **rest, **alone)
    assert all(torch.equal(shared[name], alone[name]) for name in shared)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_logits_that_are_no_distribution_are_an_error(bad: float) -> None:
    logits = random(3, 5)
    logits[1] = bad
    uniforms = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="row 1"):
        calls.sample(logits, uniforms, None, step=0, eos=torch.tensor([0]), pad_id=0, **written(3))


def attention(**changes: Tensor | tuple[Tensor, Tensor] | int) -> Tensor:
    arguments = {
        "q": random(4, 4, 8), "k": random(4, 2, 8), "v": random(4, 2, 8),
        "prompt_keys": calls.pack(random(4, 8, 5)), "prompt_values": calls.pack(random(4, 5, 8)), "prompt_bias": None,
        "own_keys": torch.zeros(2, 2, 2, *calls.packed_shape(8, 6)), "own_bias": None, "width": 1, "shared": None,
        "own_values": torch.zeros(2, 2, 2, *calls.packed_shape(6, 8)),
    }  # fmt: skip
    return decode_attention(**(arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 7},
        {"width": 0},
        {"q": random(5, 4, 8)},
        {"k": random(4, 8, 2).transpose(1, 2)},
        {"prompt_values": calls.pack(random(4, 40, 8))},
        {"own_values": torch.zeros(2, 2, 2, *calls.packed_shape(40, 8))},
        {"prompt_bias": torch.zeros(3, 5)},
        {"own_bias": torch.zeros(2)},
        {"q": random(2, 4, 8), "k": random(2, 2, 8), "v": random(2, 2, 8)},
        {"prompt_bias": torch.zeros(2, 5, dtype=torch.float64)},
        {"q": random(4, 4, 8).requires_grad_()},
        {"shared": (torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3]).int())},
        {"shared": (torch.tensor([0, 1, 3, 4]), torch.tensor([0, 1, 2, 3]))},
        {"shared": (torch.tensor([2, 0, 1, 3]), torch.tensor([0, 1, 2, 3]))},
        {"shared": (torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 4]))},
    ],
)
def test_what_would_be_read_or_written_outside_is_refused(changes: dict[str, object]) -> None:
    attention()
    with pytest.raises(ValueError):
        attention(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: calls.linear(x.double(), calls.pack(x), None, 4),
        lambda x: calls.linear(x, calls.pack(x), torch.zeros(4).double(), 4),
        lambda x: calls.linear(x, calls.pack(x), torch.zeros(3), 4),
        lambda x: calls.linear(x, calls.pack(x), None, 40),
        lambda x: calls.linear(x.to("meta"), calls.pack(x), None, 4),
        lambda x: calls.pack(x.view(1, 1, 4, 4)),
        lambda x: calls.rms_norm(x, torch.ones(4).double(), 1e-6),
        lambda x: calls.rms_norm(x, torch.ones(5), 1e-6),
        lambda x: calls.rotate(x.view(4, 1, 4), x[:, None, :1], x[:, None, :1], x.view(4, 1, 4)),
        lambda x: calls.rotate(x.view(4, 4, 1), x[:, None, :0], x[:, None, :0], x.view(4, 4, 1)),
        lambda x: calls.swiglu_backward(x, x),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call) -> None:
    with pytest.raises(ValueError):
        call(random(4, 4))


def test_threads_are_woken_for_what_is_worth_it() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert [bindings.threads(work) for work in (0, 2**20 - 1, 2**20)] == [1, 1, 2]
    finally:
        torch.set_num_threads(before)


def test_other_dtypes_are_not_for_them() -> None:
    x = random(2, 2)
    assert calls.ready(x)
    assert not calls.ready(x, x.double()) and not calls.ready(x.bfloat16()) and not calls.ready(x.to("meta"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A source that is compiled at once, and a cache of its own."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "one.c").write_text("long panel_columns(void) { return 1; }\n")
    monkeypatch.setattr(library, "_SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(library.SWITCH, raising=False)
    return tmp_path / "cache/mrg-r1"


def state() -> library.State:
    return library.state.__wrapped__()  # what a fresh process would find


@pytest.mark.parametrize(
    ("environment", "missing", "text"),
    [
        ({library.SWITCH: "0"}, False, f"torch's own: {library.SWITCH}=0"),
        ({"PATH": "/nowhere", "CC": ""}, True, "torch's own: no C compiler was found"),
        ({"CC": "false"}, True, "torch's own: the C compiler gave no library"),
        ({"CC": "gcc -DX='"}, True, "torch's own: the C compiler gave no library: No closing quotation"),
        ({"CC": "gcc --no-such-option"}, True, "torch's own: the C compiler gave no library: "),
        ({"XDG_CACHE_HOME": "/proc"}, True, "torch's own: the C compiler gave no library"),
    ],
)
def test_why_there_are_none_is_said(
    environment: dict[str, str], missing: bool, text: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = state()
    assert found.library is None and found.missing == missing and found.text.startswith(text)


def test_a_compiler_that_hangs_is_given_up(small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CC", str(slow))
    monkeypatch.setattr(library, "_PATIENCE", 0.2)
    assert "timed out" in state().text and state().missing


def test_they_are_compiled_once_into_the_users_cache_and_again_where_that_is_damaged(small: Path) -> None:
    def made() -> tuple[Path, int]:
        found = state()
        assert found.library is not None and found.text.startswith("compiled by ")
        (file,) = small.iterdir()
        return file, file.stat().st_mtime_ns

    file, when = made()
    assert made() == (file, when)
    content = file.read_bytes()
    file.unlink()  # what is loaded here keeps the old file
    file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))  # as a power cut leaves it
    assert made()[1] > when and made()[0].read_bytes() == content
