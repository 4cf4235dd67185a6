"""The bytes that an H200 reported for LLaMA-7B under Adam, against the sizes worked out by hand."""

from minidora.evidence.bench import load_reports
from minidora.evidence.measures import ROOT

BLOCKS, WIDTH, INNER, TOKENS = 32, 4096, 11008, 32000
TENSORS = 2 + BLOCKS * 9 + 1  # embedding and head; 4 + 3 matrices and 2 norms a block; last norm
NUMBERS = 2 * TOKENS * WIDTH + BLOCKS * (4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH) + WIDTH
ROTARY = 2 * 512  # two buffers of 64 float32 frequencies, each in a block


def test_every_byte_of_the_h200_is_explained():
    report = load_reports(ROOT / "benchmarks" / "h200")["llama7b-memory"]
    assert {key for key in report if key != "results"} >= {"device", "torch", "date", "model"}
    weights = 4 * NUMBERS + ROTARY
    foreach, fused = report["results"]["foreach"], report["results"]["fused"]
    assert foreach["weights"] == fused["weights"] == weights
    assert foreach["total_after_step"] == 16 * NUMBERS + ROTARY  # its counters are on the CPU
    assert foreach["peak_in_step"] == 20 * NUMBERS + ROTARY
    assert fused["total_after_step"] == 16 * NUMBERS + ROTARY + 512 * TENSORS
    assert fused["peak_in_step"] == fused["total_after_step"]
