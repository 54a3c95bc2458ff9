"""StepTable: its algebra against a straight reading of the equations, pruning, files, the cache, packed rows."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastdiff
from fastdiff.probe import table_cache
from fastdiff.table import FORMAT_VERSION, SCALARS, RowLayout, StepTable, TableCache, pack, prune

SHAPE = (2, 3, 5)  # [C, H, W]


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def tables(draw: st.DrawFn) -> StepTable:
    """Any table: sparse random rows, clipping and draws in some of them, x0 or none."""
    rows, K, Z = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(0, 2))
    seed, density = draw(st.integers(0, 2**16)), draw(st.floats(0.1, 0.9))
    tells_x0 = draw(st.booleans())
    generator = torch.Generator().manual_seed(seed)

    def sparse(*shape: int) -> Tensor:
        kept = torch.rand(*shape, generator=generator) < density
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * kept

    clips = torch.rand(rows, generator=generator) < 0.5
    C, counts = sparse(rows, K, Z), torch.randint(0, Z + 1, (rows,), generator=generator).tolist()
    x0_row = sparse(rows, K + 2 + Z)
    for row, count in enumerate(counts):
        C[row, :, count:] = 0.0
        x0_row[row, K + 2 + count :] = 0.0
    return StepTable(
        timesteps=torch.linspace(999, 0, rows),
        c_in=sparse(rows),
        A=sparse(rows, K, K),
        b=sparse(rows, K),
        d=sparse(rows, K) * clips[:, None],
        C=C,
        r=sparse(rows, K + 1),
        lo=torch.where(clips, -1.0, -torch.inf).double(),
        hi=torch.where(clips, 1.0, torch.inf).double(),
        x0_row=x0_row * torch.cat([torch.ones(rows, K + 1), clips[:, None], torch.ones(rows, Z)], dim=1)
        if tells_x0
        else torch.zeros(0, 0, dtype=torch.float64),
        init_noise_sigma=1.5,
        draws=tuple((None,) * count for count in counts),
        latents=(tuple(f"latent {k}" for k in range(K)),) * (rows + 1),
        x0_source="output" if tells_x0 else None,
        source="Random",
    )


def by_the_equations(table: StepTable, sample: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Model inputs, samples and x0 of a table, from the equations of its docstring and nothing else."""
    s = torch.zeros(table.memory, *sample.shape, dtype=torch.float64)
    s[0] = sample
    inputs, samples, clean = [], [], []
    for i in range(len(table)):
        m, eps = randn(100 + i), noise(table, i)
        inputs.append(table.c_in[i] * s[0])
        phi = (torch.tensordot(table.r[i, :-1], s, 1) + table.r[i, -1] * m).clamp(table.lo[i], table.hi[i])
        unused = [torch.zeros_like(m)] * (table.max_draws - len(eps))
        drawn = torch.stack([*eps, *unused]) if table.max_draws else None
        if table.x0_source:
            weights = table.x0_row[i]
            x0 = torch.tensordot(weights[: table.memory], s, 1) + weights[table.memory] * m
            x0 = x0 + weights[table.memory + 1] * phi
            clean.append(x0 if drawn is None else x0 + torch.tensordot(weights[table.memory + 2 :], drawn, 1))
        outer = torch.tensordot(table.A[i], s, 1) + table.b[i][:, None, None, None] * m
        s = outer + table.d[i][:, None, None, None] * phi
        if drawn is not None:
            s = s + torch.tensordot(table.C[i], drawn, 1)
        samples.append(s[0])
    return inputs, samples, clean


def noise(table: StepTable, row: int) -> list[Tensor]:
    return [randn(1000 + 10 * row + draw) for draw in range(len(table.draws[row]))]


def applied(table: StepTable, sample: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The same by the table's own reference application."""
    state, inputs, samples, clean = table.init(sample), [], [], []
    for row in range(len(table)):
        m, eps = randn(100 + row), noise(table, row)
        inputs.append(table.model_input(row, state))
        if table.x0_source:
            clean.append(table.x0(row, state, m, eps))
        state = table.advance(row, state, m, eps)
        samples.append(state[0])
    return inputs, samples, clean


def assert_same(expected: tuple[list[Tensor], ...], got: tuple[list[Tensor], ...]) -> None:
    for first, second in zip(expected, got, strict=True):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


# The algebra


@given(tables())
@settings(deadline=None, max_examples=60)
def test_the_reference_application_is_the_equations(table: StepTable) -> None:
    assert_same(by_the_equations(table, randn(0)), applied(table, randn(0)))


@given(tables())
@settings(deadline=None, max_examples=60)
def test_pruning_changes_nothing_that_can_be_seen(table: StepTable) -> None:
    before = table.digest
    pruned = prune(table)
    assert table.digest == before
    assert pruned.memory <= table.memory
    assert_same(applied(table, randn(0)), applied(pruned, randn(0)))
    assert prune(pruned) == pruned


@given(tables(), st.floats(-3, 3))
@settings(deadline=None, max_examples=30)
def test_a_table_that_does_not_clip_is_linear(table: StepTable, scale: float) -> None:
    flat = dataclasses.replace(table, d=table.d * 0)
    state, m = randn(1, flat.memory, *SHAPE), randn(2)
    eps = noise(flat, 0)
    scaled = flat.advance(0, scale * state, scale * m, [scale * e for e in eps])
    assert torch.allclose(scaled, scale * flat.advance(0, state, m, eps), rtol=1e-10, atol=1e-10)


@given(table=tables())
@settings(deadline=None, max_examples=30)
def test_a_table_survives_its_file(tmp_path_factory: pytest.TempPathFactory, table: StepTable) -> None:
    path = tmp_path_factory.mktemp("table") / "table.safetensors"
    table.save(path)
    loaded = StepTable.load(path)
    assert loaded == table
    assert loaded.timesteps.dtype == table.timesteps.dtype
    assert (loaded.draws, loaded.latents, loaded.init_noise_sigma) == (table.draws, table.latents, 1.5)


@given(tables(), st.integers(0, 3), st.integers(0, 2))
@settings(deadline=None, max_examples=40)
def test_packed_rows_hold_the_same_coefficients(table: StepTable, more_memory: int, more_draws: int) -> None:
    layout = RowLayout(table.memory + more_memory, table.max_draws + more_draws)
    packed = pack(table, layout)
    assert packed.shape == (len(table) + 1, layout.width)
    assert packed.dtype == torch.float32
    assert torch.equal(packed[-1], packed[-2])  # what a spent slot gathers
    packed = packed[:-1]
    K, Z = table.memory, table.max_draws
    for row in range(len(table)):
        t, c_in, guidance, lo, hi = packed[row, :SCALARS]
        assert (t, c_in, guidance) == (table.timesteps[row], table.c_in[row].float(), 1.0)
        assert (lo, hi) == (table.lo[row].float(), table.hi[row].float())
        r, weights = packed[row, SCALARS:].split([layout.memory + 1, layout.memory * layout.terms])
        assert torch.equal(torch.cat([r[:K], r[-1:]]), table.r[row].float())
        weights = weights.view(layout.memory, layout.terms)
        expected = torch.cat([table.A[row], table.b[row, :, None], table.d[row, :, None], table.C[row]], dim=1)
        columns = [*range(K), layout.memory, layout.memory + 1, *range(layout.memory + 2, layout.memory + 2 + Z)]
        assert torch.equal(weights[:K][:, columns], expected.float())
        assert weights.count_nonzero() == weights[:K][:, columns].count_nonzero()


def test_a_layout_that_is_too_small_is_refused() -> None:
    table = fastdiff.tabulate(diffusers.UniPCMultistepScheduler(), 5)
    with pytest.raises(ValueError, match="does not fit a layout of 3 latents"):
        pack(table, RowLayout(3, 1))


def test_a_term_of_weight_zero_is_never_read() -> None:
    table = fastdiff.tabulate(diffusers.EulerAncestralDiscreteScheduler(), 3)
    state = table.init(randn(0))
    unread = torch.full(SHAPE, torch.nan, dtype=torch.float64)
    assert table.advance(2, state, randn(1), [unread]).isfinite().all()


def test_the_state_is_float32_under_half_precision_and_stays_on_its_device() -> None:
    table = fastdiff.tabulate(diffusers.DPMSolverMultistepScheduler(), 3)
    state = table.init(randn(0).bfloat16())
    assert (state.dtype, state.shape) == (torch.float32, (2, *SHAPE))
    assert table.advance(0, state, randn(1).bfloat16()).dtype == torch.float32
    assert table.init(randn(0)).dtype == torch.float64
    assert table.init(torch.empty(SHAPE, device="meta")).device.type == "meta"


@pytest.mark.parametrize("count", [0, 2])
def test_another_number_of_noise_tensors_is_refused(count: int) -> None:
    table = fastdiff.tabulate(diffusers.EulerAncestralDiscreteScheduler(), 3)
    with pytest.raises(
        ValueError, match=f"EulerAncestralDiscreteScheduler row 1: expected 1 noise tensors, got {count}"
    ):
        table.advance(1, table.init(randn(0)), randn(1), [randn(2)] * count)


# The noun


def test_a_table_cannot_be_changed() -> None:
    table = fastdiff.tabulate(diffusers.DPMSolverMultistepScheduler(), 3)
    digest = table.digest
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.source = "other"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.A = table.A * 2  # type: ignore[misc]
    assert copy.deepcopy(table) == pickle.loads(pickle.dumps(table)) == table
    assert StepTable(**{f.name: getattr(table, f.name) for f in dataclasses.fields(table)}).digest == digest


def test_rows_memory_and_bytes() -> None:
    heun = fastdiff.tabulate(diffusers.HeunDiscreteScheduler(), 12)
    assert (len(heun), heun.memory) == (23, 3)
    tensors = [getattr(heun, f.name) for f in dataclasses.fields(heun)]
    assert heun.nbytes == sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    assert fastdiff.tabulate(diffusers.DDIMScheduler(), 5).clips
    assert not heun.clips


def test_equal_tables_have_equal_digests_and_hashes() -> None:
    table = fastdiff.tabulate(diffusers.DDIMScheduler(), 5)
    table_cache.clear()
    again = fastdiff.tabulate(diffusers.DDIMScheduler(), 5)
    other = fastdiff.tabulate(diffusers.DDIMScheduler(), 6)
    assert again is not table
    assert (again.digest, hash(again)) == (table.digest, hash(table))
    assert {table, again, other} == {table, other}
    assert table != "a table"
    assert dataclasses.replace(table, c_in=table.c_in * 2).digest != table.digest
    assert dataclasses.replace(table, timesteps=table.timesteps + 1).digest != table.digest


def test_repr_tells_what_one_wants_to_know() -> None:
    table = fastdiff.tabulate(diffusers.EulerAncestralDiscreteScheduler(), 20)
    assert repr(table) == (
        f"StepTable(EulerAncestralDiscreteScheduler: 20 rows, t 999 -> 0, memory 1, 20 draws, x0 from output, "
        f"{table.nbytes} bytes, {table.digest[:12]})"
    )


@pytest.mark.parametrize("field", ["A", "b", "C", "r", "c_in", "timesteps", "x0_row"])
def test_a_tensor_of_another_shape_is_refused(field: str) -> None:
    table = fastdiff.tabulate(diffusers.DDIMScheduler(), 5)
    value = getattr(table, field)
    twice: dict[str, Any] = {field: torch.cat([value, value])}
    with pytest.raises(ValueError, match=r"expected shape|rows need"):
        dataclasses.replace(table, **twice)


def test_draws_and_latents_must_be_as_many_as_rows() -> None:
    table = fastdiff.tabulate(diffusers.DDIMScheduler(), 5)
    with pytest.raises(ValueError, match="5 rows need 5 draws entries and 6 latents entries"):
        dataclasses.replace(table, draws=())


# Files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    fastdiff.tabulate(diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), 4).save(
        tmp_path / "table.safetensors"
    )
    return tmp_path / "table.safetensors"


def test_a_truncated_file_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"expected a file that StepTable\.save wrote, got another or a cut one"):
        StepTable.load(saved)


def test_a_table_that_was_written_into_is_not_saved(tmp_path: Path) -> None:
    own = fastdiff.tabulate(diffusers.DDIMScheduler(), 3)
    kept = own.timesteps.clone()
    try:
        own.timesteps.add_(1)
        with pytest.raises(ValueError, match="DDIMScheduler: this table was written into, and others"):
            own.save(tmp_path / "table")
    finally:
        own.timesteps.copy_(kept)
    own.save(tmp_path / "table")
    assert StepTable.load(tmp_path / "table") == own


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{tmp_path}: expected a file that StepTable.save wrote"):
        StepTable.load(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a table")
    with pytest.raises(ValueError, match="expected a file that StepTable"):
        StepTable.load(tmp_path / "text")
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match=f"expected a StepTable of format version {FORMAT_VERSION}, got another kind"):
        StepTable.load(tmp_path / "weights")
    with pytest.raises(FileNotFoundError):
        StepTable.load(tmp_path / "nothing")


def test_another_format_version_is_refused(saved: Path) -> None:
    _, metadata = StepTable.load(saved).to_tensors()
    save_file(load_file(saved), saved, {**metadata, "fastdiff.StepTable": "99"})
    with pytest.raises(ValueError, match=f"format version {FORMAT_VERSION}, got 99; tabulate the scheduler again"):
        StepTable.load(saved)


def test_a_missing_or_an_edited_tensor_is_refused(saved: Path) -> None:
    _, metadata = StepTable.load(saved).to_tensors()
    tensors = load_file(saved)
    save_file({name: tensor for name, tensor in tensors.items() if name != "c_in"}, saved, metadata)
    with pytest.raises(ValueError, match="expected the tensors of a StepTable, missing c_in"):
        StepTable.load(saved)
    save_file({**tensors, "b": tensors["b"] * 2}, saved, metadata)
    with pytest.raises(ValueError, match="is not what was saved"):
        StepTable.load(saved)


def test_draw_dtypes_survive_a_file(saved: Path) -> None:
    assert StepTable.load(saved).draws == ((torch.float32,),) * 4


# The cache


def built(steps: int) -> StepTable:
    return fastdiff.tabulate(diffusers.DDIMScheduler(), steps)


def test_the_cache_counts_and_drops_the_least_recently_used() -> None:
    cache, table = TableCache(max_size=2), {steps: built(steps) for steps in (1, 2, 3)}
    built_keys: list[int] = []

    def get(steps: int) -> StepTable:
        def build() -> StepTable:
            built_keys.append(steps)
            return table[steps]

        return cache.get(steps, build)

    for steps in (1, 2, 1, 3, 1, 2):  # 2 is dropped by 3, then 3 by 2
        assert get(steps) is table[steps]
    assert built_keys == [1, 2, 3, 2]
    assert cache.info() == (2, 4, 0, 2, 2)
    cache.clear()
    assert cache.info() == (0, 0, 0, 0, 0)


def test_equal_tables_under_different_keys_are_one_object() -> None:
    cache, table = TableCache(), built(4)
    assert cache.get("one", lambda: table) is cache.get("other", lambda: copy.deepcopy(table))


def test_many_callers_wait_for_one_build_and_share_its_exception() -> None:
    cache, entered, release = TableCache(), threading.Event(), threading.Event()
    calls: list[int] = []

    def build() -> StepTable:
        calls.append(1)
        entered.set()
        release.wait(10)
        raise ZeroDivisionError("while building")

    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(cache.get, "key", build)
        entered.wait(10)
        others = [pool.submit(cache.get, "key", build) for _ in range(4)]
        while cache.info().joined < 4:
            threading.Event().wait(0.001)
        release.set()
        errors: list[Any] = [future.exception() for future in (first, *others)]
    assert len(calls) == 1
    assert all(error is errors[0] for error in errors)
    assert isinstance(errors[0], ZeroDivisionError)
    assert cache.info().size == 0
    assert cache.get("key", lambda: built(2)) == built(2)  # forgotten, so it may succeed now
