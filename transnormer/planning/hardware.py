"""GPUs by their data sheets, and what runs reach of these rates: measured where a file is named,
otherwise assumed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, as its vendor's data sheet has it (named beside each); links in one
    direction."""

    gib: float  # memory
    tbps: float  # TB/s read from it or written
    tflops: float  # bfloat16, dense, sums in float32
    watts: float
    link: float  # GB/s of one GPU to the others of its node
    network: float  # GB/s of one GPU to other nodes: one adapter a GPU, an assumption
    node: int = 8  # GPUs


GPUS = {
    # NVIDIA A100 80GB SXM; 200 Gb/s adapters, as in DGX A100
    "a100": Gpu(80, 2.039, 312.0, 400, 300, 25),
    # NVIDIA H100 SXM; 400 Gb/s adapters, as in DGX H100
    "h100": Gpu(80, 3.35, 989.4, 700, 450, 50),
    "h200": Gpu(141, 4.8, 989.4, 700, 450, 50),  # NVIDIA H200 SXM; as in DGX H200
    # NVIDIA HGX B200; 400 Gb/s adapters, as in DGX B200
    "b200": Gpu(180, 8.0, 2_250.0, 1_000, 900, 50),
    "l40s": Gpu(48, 0.864, 362.0, 350, 32, 25),  # NVIDIA L40S, PCIe 4.0 x16
    # NVIDIA Ada whitepaper; PCIe 4.0 x16, 100 Gb/s a GPU
    "rtx4090": Gpu(24, 1.008, 165.2, 450, 32, 12.5),
}

# Measured on an H100 (benchmarks/results/train_h100_2026-11-25.json), but for the shares at width
# 4,096. MATMUL_SHARE: the part of the data sheet's rate that matrix products alone reach.
# PASSES_SHARE: the part of MATMUL_SHARE that forward and backward reach, by width D. Shares between
# two widths are interpolated; beyond the last width they stay. COPY_SHARE: the part of the memory's
# rate that copies reach.
MATMUL_SHARE = 724.64 / 989.4
PASSES_SHARE = {
    "gla": {1_024: 0.622, 2_048: 0.747, 4_096: 0.83},
    "softmax": {1_024: 0.621, 2_048: 0.728, 4_096: 0.81},
}
COPY_SHARE = 3.032 / 3.35
# These, and the shares at width 4,096 above, are fitted to steps of 7b on four H100
# (meshes_7b_*_h100x4_2026-11-27.json); softmax's share there is taken in proportion to its share at
# 2,048. LINK_SHARE: the part of a link's rate that collectives reach, starting and waiting
# included. EXPOSED: the part of the time in which weights travel by which a step becomes longer, at
# its ends and because they slow the products. FSDP_COPIES: how many times as long as plain copies
# FSDP's copies take.
LINK_SHARE = 0.58
EXPOSED = 0.4
FSDP_COPIES = 1.75

# Assumed, not measured.
NETWORK_SHARE = 0.75  # what collectives reach of the rate between nodes
USABLE = 0.95  # of a GPU's memory; the rest is lost between blocks of the allocator, and to ECC
