"""What the paper reports: accuracies in percent on the test sets of the official data, no seeds or spread given.

Kim, Chang, Kwak: "PQK: Model Compression via Pruning, Quantization, and Knowledge Distillation", Interspeech 2021.
"""

from __future__ import annotations

RESULTS = ("phase1_p", "phase2_p", "phase2_f")
COLUMNS = {
    "cifar100-resnet32-{bits}-p90": ("ResNet-32, 90 %", (69.7, (67.4, 69.8, 71.1), (66.2, 67.7, 69.8))),
    "kws-res8-narrow-{bits}-p90": ("res8-narrow, 90 %", (91.4, (81.7, 86.4, 90.1), (74.1, 83.1, 85.1))),
    "kws-res8-{bits}-p90": ("res8, 90 %", (94.3, (92.6, 94.0, 94.4), (91.7, 93.6, 93.4))),
    "kws-res8-{bits}-p70": ("res8, 70 %", (94.3, (94.3, 94.6, 94.8), (94.3, 94.1, 93.2))),
    "kws-res8-{bits}-p50": ("res8, 50 %", (94.3, (94.3, 94.7, 94.9), (94.1, 94.6, 93.7))),
}
"""Table 1: recipe's name -> the column's title, and vanilla, the three results at 8 bits, and those at 4 bits."""

TABLE2_RECIPE = "kws-res8-narrow-w4-p90"
TABLE2 = {"phase1_p": 74.1, "phase2_p": 83.1}
TABLE2_FINETUNE = {0.1: 79.2, 0.01: 78.0, 0.001: 73.8}
"""Table 2: res8-narrow, 4 bits, 90 % sparse; finetuning by its first learning rate."""
