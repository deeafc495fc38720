"""Peak memory of one long forward: plain SDPA against the same forward with its attention captured.

Each runs in a fresh process, and the peak is counted above the loaded model. Linux only: the peak is read from
/proc, where it can be reset. Run with `python benchmarks/capture_memory.py [--tokens 4096]`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from contextlib import ExitStack

LAYERS, HEADS, KEY_VALUE_HEADS, HIDDEN, VOCABULARY = 12, 16, 4, 1024, 8000


def resident_mb() -> float:
    """Resident size of this process now, in MB."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 1e6


def forget_peak() -> None:
    """Let the peak start from now: that of loading the model may be higher than that of the forward."""
    with open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")


def peak_mb() -> float:
    """Largest resident size of this process since `forget_peak`, in MB."""
    with open("/proc/self/status") as status:
        kilobytes = next(line.split()[1] for line in status if line.startswith("VmHWM"))
    return int(kilobytes) * 1024 / 1e6


def measure(kind: str, tokens: int) -> dict[str, float]:
    """One forward in this process; kind is `sdpa` or `captured`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lapwing_detector.capture import capture_attention

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=tokens,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(VOCABULARY, (1, tokens))
    with torch.inference_mode(), ExitStack() as stack:
        captured = stack.enter_context(capture_attention(model)) if kind == "captured" else None
        model(ids[:, :8], logits_to_keep=1)  # lazily loaded code is no part of the forward
        forget_peak()
        before, start = resident_mb(), time.perf_counter()
        model(ids, logits_to_keep=1)
        if captured is not None:
            assert captured.summaries()[0].token_count == tokens
        return {"peak_mb": peak_mb() - before, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--only", choices=["sdpa", "captured"], help="measure in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.tokens)))
        return
    results = {}
    for kind in ("sdpa", "captured"):
        command = [sys.executable, __file__, "--only", kind, "--tokens", str(arguments.tokens)]
        results[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{kind:>9}: {results[kind]['peak_mb']:7.1f} MB above the model, {results[kind]['seconds']:.1f} s")
    print(f"difference: {results['captured']['peak_mb'] - results['sdpa']['peak_mb']:+.1f} MB (limit +100 MB)")
    maps = LAYERS * HEADS * arguments.tokens**2 * 4
    print(f"the maps would take {maps / 1e9:.1f} GB ({LAYERS} layers x {HEADS} heads x {arguments.tokens}^2, float32)")


if __name__ == "__main__":
    main()
