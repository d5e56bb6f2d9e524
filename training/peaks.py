"""Peak dense BF16 speed of accelerators, as their vendors publish it, without sparsity.

NVIDIA: the data sheets of A100, H100 (SXM, PCIe, NVL), H200, GH200, B200 (HGX) and GB200, per GPU; A800 and H800
compute as A100 and H100. AMD: MI300X, MI325X and MI250X, whose two dies are a device each.
"""

# FLOP/s by a part of the name that the driver reports; the first that fits counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
    "MI250X": 191.5e12,
}


def find_peak(name: str) -> float | None:
    """Peak dense BF16 FLOP/s of the device that calls itself ``name``; None for one that is not in the table."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)
