"""What accelerators can do, by the name that JAX gives a device (`device_kind`).

One table for whoever says how near a program comes to what its devices can: the log of
a training, benchmarks, plans.
"""

# Dense bfloat16 FLOP/s of one JAX device, by the beginning of its name without
# "NVIDIA"; the first that fits. NVIDIA's data sheets (half of what they print "with
# sparsity"), cloud.google.com/tpu/docs for TPUs.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6": 918e12,  # v6e
    "TPU7x": 2307e12 / 2,  # two devices a chip
}


def peak_flops(device_kind: str) -> float | None:
    """Give the dense bfloat16 FLOP/s of a device; None of those that are not known."""
    name = device_kind.removeprefix("NVIDIA ")
    return next((x for start, x in PEAKS.items() if name.startswith(start)), None)
