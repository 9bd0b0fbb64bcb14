"""Profiles: what is accepted, the mean curve, and files that are read whole or refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from xkv_fx.errors import BudgetError, FileFormatError
from xkv_fx.layers import LayerSpec
from xkv_fx.planning.data import profile_data as module
from xkv_fx.planning.data.curves import rescale, retention_curve
from xkv_fx.planning.data.profile_data import Profile
from xkv_fx.policy import Policy

Array = NDArray[Any]

FULL = LayerSpec(query_heads=8, kv_heads=2, key_dim=16, value_dim=16, itemsize=2)
SLIDING = dataclasses.replace(FULL, sliding_window=10)
POLICY = Policy(scorer_options={"kernel": 7}, recent=2, sinks=1)


def random_curves(seed: int, layers: int, length: int) -> Array:
    rng = np.random.default_rng(seed)
    return np.stack([retention_curve(rng.random((2, length)) ** 4, POLICY) for _ in range(layers)]).astype(np.float32)


def make_profile(lengths: tuple[int, ...] = (12, 20), layers: tuple[LayerSpec, ...] = (FULL,) * 3) -> Profile:
    curves = tuple(random_curves(seed, len(layers), length) for seed, length in enumerate(lengths))
    return Profile(curves, POLICY, layers, "llama-é")


def load_unless_refused(path: Path) -> Profile | None:
    """The profile, or None where the file is refused with its name; anything else fails the test."""
    try:
        return Profile.load(path)
    except FileFormatError as error:
        if path.name not in str(error):
            raise
        return None


def saved_parts(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """The arrays and our JSON of a saved profile."""
    make_profile().save(path)
    with safetensors.safe_open(path, framework="np") as file:
        return safetensors.numpy.load_file(path), json.loads(file.metadata()["xkv_fx"])


def write_parts(path: Path, arrays: dict[str, Array], header: Any) -> Path:
    safetensors.numpy.save_file(arrays, path, {"xkv_fx": header if isinstance(header, str) else json.dumps(header)})
    return path


# What a profile is


def test_lengths_and_default_context() -> None:
    profile = make_profile((12, 20, 5))
    assert profile.lengths == (12, 20, 5)
    assert profile.context_default == 20


def test_curves_are_read_only_float32_copies() -> None:
    given_curves = random_curves(0, 3, 12).astype(np.float64)
    profile = Profile((given_curves,), POLICY, (FULL,) * 3, "m")  # type: ignore[arg-type]
    given_curves[:] = 0.0
    assert profile.curves[0].dtype == np.float32
    assert profile.curves[0][0, -1] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        profile.curves[0][0, 0] = 1.0


def changed(curves: Array, layer: int, token: int, value: float) -> Array:
    copy = curves.copy()
    copy[layer, token] = value
    return copy


GOOD = random_curves(0, 3, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curves": ()}, "at least one prompt"),
        ({"curves": (GOOD[:2],)}, r"prompt 0 must be \[3, length \+ 1\]; got shape \(2, 13\)"),
        ({"curves": (GOOD, GOOD[0])}, "prompt 1 must be"),
        ({"curves": (GOOD[:, :1],)}, "prompt 0 must be"),
        ({"curves": (GOOD.astype(np.float16),)}, "must be float32; got float16"),
        ({"curves": ([[0.0, 1.0]] * 3,)}, "must be float32; got"),
        ({"curves": (changed(GOOD, 1, 4, np.nan),)}, "layer 1 in prompt 0 holds NaN"),
        ({"curves": (changed(GOOD, 1, 12, np.inf),)}, "layer 1 in prompt 0 holds NaN or an infinity"),
        ({"curves": (GOOD, changed(GOOD, 2, 6, 0.0))}, "layer 2 in prompt 1 falls"),
        ({"curves": (changed(GOOD, 0, 0, -0.5),)}, "must run from 0 to 1; it runs from -0.5 to 1.0"),
        ({"curves": (changed(GOOD, 0, 12, 1.5),)}, "must run from 0 to 1; it runs from 0.0 to 1.5"),
        ({"policy": {}}, "policy must be an xkv_fx.Policy; got dict"),
        ({"layers": ()}, "layers must be LayerSpecs"),
        ({"layers": (FULL, FULL, 3)}, "layers must be LayerSpecs"),
        ({"model": ""}, "model must be the model's fingerprint"),
        ({"model": None}, "model must be the model's fingerprint"),
    ],
)
def test_what_is_no_profile_is_refused(changes: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"curves": (GOOD,), "policy": POLICY, "layers": (FULL,) * 3, "model": "m", **changes}
    with pytest.raises(BudgetError, match=message):
        Profile(**fields)


def test_digest_depends_on_everything() -> None:
    profile = make_profile()
    others = [
        dataclasses.replace(profile, model="other"),
        dataclasses.replace(profile, policy=Policy()),
        dataclasses.replace(profile, layers=(FULL, FULL, SLIDING)),
        dataclasses.replace(profile, curves=profile.curves[::-1]),
        dataclasses.replace(profile, curves=profile.curves[:1]),
        dataclasses.replace(profile, curves=(profile.curves[0], changed(profile.curves[1], 0, 20, 1.0)[::-1])),
    ]
    digests = {each.digest() for each in (profile, *others)}
    assert len(digests) == 1 + len(others)
    assert all(len(digest) == 64 for digest in digests)
    assert make_profile().digest() == profile.digest()
    assert make_profile() == profile != others[0]
    assert hash(make_profile()) == hash(profile)
    assert profile != "profile"


# The mean curve


@pytest.mark.parametrize("context", [1, 7, 12, 20, 33])
def test_mean_curve_is_the_mean_of_rescaled_curves(context: int) -> None:
    profile = make_profile((12, 20, 5))
    mean = profile.mean_curve(context)
    np.testing.assert_allclose(mean, np.mean([rescale(c, context) for c in profile.curves], axis=0), atol=1e-15)
    assert mean.shape == (3, context + 1)
    assert mean.dtype == np.float64
    assert (mean[:, 0] == 0).all()
    assert (mean[:, -1] == 1).all()


def test_a_sliding_window_ends_its_layers_curve() -> None:
    """A layer with a sliding window of 10 holds everything in 10 slots, however long the prompt is."""
    profile = make_profile((8, 20), layers=(FULL, SLIDING))
    for context in (6, 10, 40):
        held = min(10, context)
        mean = profile.mean_curve(context)
        short = rescale(profile.curves[0][1], held)
        long = rescale(np.append(profile.curves[1][1, :10], 1.0), held)
        np.testing.assert_allclose(mean[1, : held + 1], (short + long) / 2, atol=1e-15)
        assert (mean[1, held:] == 1.0).all()
        plain = np.mean([rescale(c[0], context) for c in profile.curves], axis=0)
        np.testing.assert_allclose(mean[0], plain, atol=1e-15)


def test_retention_reads_the_mean_curve() -> None:
    profile = make_profile()
    mean = profile.mean_curve(20)
    assert profile.retention((3, 20, 9)) == pytest.approx((mean[0, 3] + mean[1, 20] + mean[2, 9]) / 3)
    assert profile.retention(np.array([30, 31, 32])) == 1.0  # type: ignore[arg-type]
    assert profile.retention((5, 5, 5), context=10) == pytest.approx(profile.mean_curve(10)[:, 5].mean())
    assert isinstance(profile.retention((5, 5, 5)), float)


@pytest.mark.parametrize("capacities", [(1, 2), (1, 2, 3, 4), (0, 1, 2), (1, 2.5, 3), (1, True, 3)])
def test_retention_refuses_what_is_no_capacity(capacities: Any) -> None:
    with pytest.raises(BudgetError, match="capacit"):
        make_profile().retention(capacities)


@pytest.mark.parametrize("context", [0, -3, 2.0, True, "12"])
def test_context_must_be_a_length(context: Any) -> None:
    for call in (make_profile().mean_curve, lambda c: make_profile().retention((1, 1, 1), context=c)):
        with pytest.raises(BudgetError, match="context must be a whole number of at least 1"):
            call(context)


# Files


@pytest.mark.parametrize("layers", [(FULL, FULL), (SLIDING, FULL, SLIDING)])
@pytest.mark.parametrize("as_path", [str, Path])
def test_round_trip(tmp_path: Path, as_path: Any, layers: tuple[LayerSpec, ...]) -> None:
    profile = make_profile((1, 12, 300), layers=layers)
    target = tmp_path / "a profile é.safetensors"
    profile.save(as_path(target))
    loaded = Profile.load(as_path(target))
    assert loaded == profile
    assert loaded.policy == profile.policy
    assert loaded.layers == profile.layers
    assert loaded.model == profile.model
    assert all((a == b).all() for a, b in zip(loaded.curves, profile.curves, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == [target.name], "nothing is left beside it"


def test_more_than_ten_prompts_keep_their_order(tmp_path: Path) -> None:
    profile = make_profile(tuple(range(1, 13)))
    profile.save(tmp_path / "p")
    assert Profile.load(tmp_path / "p").lengths == tuple(range(1, 13))


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "profile"
    make_profile().save(target)
    before = target.read_bytes()

    def fail(*args: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make_profile((7,)).save(target)
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["profile"]


def test_saved_into_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_profile().save("profile")
    assert Profile.load("profile") == make_profile()


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Profile.load(tmp_path / "nothing")


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "profile"
    make_profile().save(target)
    whole = target.read_bytes()
    for length in [*range(0, 64), *range(64, len(whole), 37), len(whole) - 1]:
        target.write_bytes(whole[:length])
        assert load_unless_refused(target) is None, f"{length} bytes"
    with pytest.raises(FileFormatError, match=r"profile: .*was it cut off\? Profile again"):
        Profile.load(target)
    target.write_bytes(whole + b"\0")
    assert load_unless_refused(target) is None


def test_flipped_bits_are_refused_or_harmless(tmp_path: Path) -> None:
    target = tmp_path / "profile"
    profile = make_profile()
    profile.save(target)
    whole = target.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for position in [*range(0, 16), *rng.integers(0, len(whole), size=500).tolist()]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(0, 8))
        target.write_bytes(damaged)
        loaded = load_unless_refused(target)
        refused += loaded is None
        assert loaded in (None, profile), f"byte {position}"
    assert refused > 400


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"\0" * 100, b'{"format": "xkv_fx.budgets"}' * 10, np.random.default_rng(0).bytes(4000)],
    ids=["empty", "braces", "zeros", "json", "random"],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    target = tmp_path / "other"
    target.write_bytes(content)
    assert load_unless_refused(target) is None


def test_other_safetensors_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "weights.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.numpy.save_file({"weight": np.zeros((2, 2))}, target, metadata)
        with pytest.raises(FileFormatError, match=r"weights.safetensors: its metadata holds no JSON of a profile"):
            Profile.load(target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "format version 3 is newer than 2, the newest that is read here; upgrade"),
        ({"version": 0}, "version 0 is not a whole number"),
        ({"version": True}, "version True is not a whole number"),
        ({"version": "1"}, "version '1' is not a whole number"),
        ({"version": ...}, "version None is not a whole number"),
        ({"format": "xkv_fx.budgets"}, "not a xkv_fx.profile file"),
        ({"surprise": 1}, "its fields are"),
        ({"policy": ...}, "its fields are"),
        ({"model": 3}, "field 'model' has the wrong type: 3"),
        ({"model": ""}, "model must be"),
        ({"model": "other"}, "does not match its checksum"),
        ({"sha256": "0" * 64}, "does not match its checksum"),
        ({"policy": {"eviction": "burn"}}, "unknown eviction 'burn'"),
        ({"policy": {"new": 1}}, "unknown policy fields 'new'"),
        ({"layers": []}, "instead of F32"),
        ({"layers": [{}] * 3}, "fields of layer 0 are not"),
        ({"layers": [3] * 3}, "fields of layer 0 are not"),
        ({"layers": [dataclasses.asdict(FULL)] * 2}, r"curves.0 is F32 \[3, 13\] instead of F32 \[2, length \+ 1\]"),
        ({"layers": [{**dataclasses.asdict(FULL), "kv_heads": 0}] * 3}, "kv_heads of layer 0"),
        ({"layers": [{**dataclasses.asdict(FULL), "kv_heads": 2.0}] * 3}, "kv_heads of layer 0"),
        ({"layers": [{**dataclasses.asdict(FULL), "key_dim": None}] * 3}, "key_dim of layer 0"),
        ({"layers": [{**dataclasses.asdict(FULL), "sliding_window": -1}] * 3}, "sliding_window of layer 0"),
    ],
)
def test_headers_that_cannot_be_used_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    target = tmp_path / "profile"
    arrays, header = saved_parts(target)
    header = {key: value for key, value in {**header, **changes}.items() if value is not ...}
    with pytest.raises(FileFormatError, match=f"profile: .*{message}"):
        Profile.load(write_parts(target, arrays, header))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", "NaN", '{"format": "xkv_fx.profile", "version": 1', "[" * 100_000],
    ids=["empty", "list", "cut", "null", "nan", "cut-late", "deep"],
)
def test_metadata_that_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    target = tmp_path / "profile"
    arrays, _ = saved_parts(target)
    assert load_unless_refused(write_parts(target, arrays, text)) is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "at least one prompt"),
        ({"curves.1": GOOD}, "not named curves.0"),
        ({"curves.0": GOOD, "curves.00": GOOD}, "not named curves.0"),
        ({"curves.0": GOOD.astype(np.float64)}, r"curves.0 is F64 \[3, 13\]"),
        ({"curves.0": GOOD.astype(np.float16)}, "curves.0 is F16"),
        ({"curves.0": GOOD[0]}, r"curves.0 is F32 \[13\]"),
        ({"curves.0": GOOD[:, :1].copy()}, "prompt 0 must be"),
        ({"curves.0": np.zeros((3, 0), dtype=np.float32)}, "prompt 0 must be"),
        ({"curves.0": GOOD[:, ::-1].copy()}, "layer 0 in prompt 0 falls"),
        ({"curves.0": changed(GOOD, 2, 5, np.nan)}, "layer 2 in prompt 0 holds NaN"),
        ({"curves.0": changed(GOOD, 2, 12, 1.5)}, "must run from 0 to 1"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(tmp_path: Path, arrays: dict[str, Array], message: str) -> None:
    target = tmp_path / "profile"
    _, header = saved_parts(target)
    with pytest.raises(FileFormatError, match=f"profile: .*{message}"):
        Profile.load(write_parts(target, arrays, header))


def test_sizes_are_limited_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "profile"
    make_profile().save(target)
    with monkeypatch.context() as patch:
        patch.setattr(module, "MAX_PROFILE_BYTES", 100)
        with pytest.raises(FileFormatError, match="profile: larger than 100 bytes"):
            Profile.load(target)
    target.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(FileFormatError, match="its header claims to be larger"):
        Profile.load(target)


def test_it_prints_as_a_short_table() -> None:
    layers = (LayerSpec(4, 2, 8, 8, 4),) * 40
    curves = np.linspace(0, 1, 101, dtype=np.float32)[None].repeat(40, 0)
    profile = Profile((curves,), Policy(), layers, "a model")
    said = str(profile).splitlines()
    assert said[0] == repr(profile) == "<profile of a model: 40 layers, 1 prompts of up to 100 tokens, snapkv, ring>"
    assert said[2].split() == ["layer", "6.2%", "12.5%", "25.0%", "50.0%", "75.0%"]
    assert said[3].split() == ["0", "0.0600", "0.1200", "0.2500", "0.5000", "0.7500"]
    assert len(said) == 3 + 17, "the first and the last layers"
    assert [line.split()[0] for line in said[3:]] == [*map(str, range(8)), "...", *map(str, range(32, 40))]
