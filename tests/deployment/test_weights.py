"""Whether weights fit a GPU, and whether the entries of the catalogue are complete."""

import re

import pytest
from flywheel_server.deployment.weights import (
    ALIASES,
    DEFAULT_WEIGHTS,
    GIB,
    GPU_OVERHEAD_BYTES,
    GPUS,
    WEIGHTS,
    DoesNotFitError,
    Weights,
    check_fit,
    find,
    find_gpu,
)


def test_the_default_weights_fit_the_gpu_of_the_example_with_the_default_context() -> None:
    fit = check_fit(find(DEFAULT_WEIGHTS), "A10G", 8192)
    assert fit.kv_bytes == GIB  # 128 KiB a token
    assert fit.free_bytes == int(21.9 * GIB) - 20_434_000_000 - GIB - GPU_OVERHEAD_BYTES
    assert fit.max_context_tokens == 15313
    assert (
        check_fit(find(DEFAULT_WEIGHTS), "A10G", fit.max_context_tokens).free_bytes < find(DEFAULT_WEIGHTS).kv_bytes_per_token
    )


@pytest.mark.parametrize(
    ("name", "kv_bytes_per_token"),
    [
        ("mixtral-8x7b-instruct-q3_k_s", 131072),
        ("mixtral-8x7b-instruct-q4_k_m", 131072),
        ("mistral-7b-instruct-q8_0", 131072),
        ("smollm2-135m-instruct-q8_0", 23040),
    ],
)
def test_a_token_takes_a_key_and_a_value_of_fp16_in_every_layer(name: str, kv_bytes_per_token: int) -> None:
    assert find(name).kv_bytes_per_token == kv_bytes_per_token


def test_what_does_not_fit_is_refused_with_the_arithmetic_and_with_what_would_fit() -> None:
    with pytest.raises(DoesNotFitError) as refusal:
        check_fit(find("mixtral-8x7b-instruct-q4_k_m"), "A10G", 8192)
    assert str(refusal.value).splitlines() == [
        "mixtral-8x7b-instruct-q4_k_m with 8192 tokens of context does not fit A10G:",
        "  memory of A10G      21.90 GiB",
        "  weights            -26.49 GiB  mixtral-8x7b-instruct-q4_k_m",
        "  KV cache            -1.00 GiB  8192 tokens x 128 KiB",
        "  buffers and CUDA    -1.00 GiB",
        "  missing              6.59 GiB",
        "It fits L40S, A100-40GB, A100-80GB, RTX-PRO-6000, H100, H200, B200.",
    ]


def test_if_only_the_context_is_too_long_the_error_says_how_long_it_may_be() -> None:
    with pytest.raises(DoesNotFitError, match="A10G fits it with at most 15313 tokens") as refusal:
        check_fit(find(DEFAULT_WEIGHTS), "A10G", 15314)
    assert "missing" in str(refusal.value)
    assert check_fit(find(DEFAULT_WEIGHTS), "A10G", 15313)


def test_if_no_gpu_is_large_enough_the_error_says_so() -> None:
    with pytest.raises(DoesNotFitError, match="It fits no single GPU"):
        check_fit(find(DEFAULT_WEIGHTS), "B200", 2_000_000)


def test_several_gpus_have_the_memory_and_the_buffers_of_each() -> None:
    one, two = (check_fit(find("smollm2-135m-instruct-q8_0"), gpu, 1000) for gpu in ("T4", "T4:2"))
    assert (two.memory_bytes, two.overhead_bytes) == (2 * one.memory_bytes, 2 * one.overhead_bytes)
    with pytest.raises(DoesNotFitError):
        check_fit(find(DEFAULT_WEIGHTS), "T4", 8192)
    assert check_fit(find(DEFAULT_WEIGHTS), "T4:2", 8192).free_bytes > 0


@pytest.mark.parametrize("cpu", [None, ""])
def test_on_the_cpu_everything_fits(cpu: str | None) -> None:
    assert "not checked" in str(check_fit(find("mixtral-8x7b-instruct-q4_k_m"), cpu, 10**9))


def test_the_names_of_gpus_are_read_as_modal_reads_them() -> None:
    assert find_gpu("a10g") == (GPUS["A10"], 1)
    assert find_gpu("A100") == (GPUS["A100-40GB"], 1)
    assert find_gpu("H100!:8") == (GPUS["H100"], 8)
    assert set(ALIASES.values()) <= set(GPUS)


@pytest.mark.parametrize("gpu", ["A9", ":2", "A10:", "A10:0", "A10:-1", "A10:two", "A10:2:2"])
def test_the_error_for_an_unknown_gpu_lists_the_known_gpus(gpu: str) -> None:
    with pytest.raises(ValueError, match=rf"Unknown GPU '{gpu}'. Known: T4, L4, .*A10G, .*NAME:COUNT"):
        check_fit(find(DEFAULT_WEIGHTS), gpu, 8192)


def test_the_error_for_unknown_weights_lists_the_known_weights() -> None:
    with pytest.raises(ValueError, match=r"Unknown weights 'mixtral'. Known: mixtral-8x7b-instruct-q3_k_s, .*smollm2"):
        find("mixtral")


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=lambda weights: weights.name)
def test_an_entry_of_the_catalogue_is_pinned_to_the_byte_or_says_that_it_is_not(weights: Weights) -> None:
    assert find(weights.name) is weights
    if weights.revision is None:
        assert weights.size_bytes % 1_000_000 == 0  # a card's number, rounded up
    else:
        assert re.fullmatch("[0-9a-f]{40}", weights.revision)
