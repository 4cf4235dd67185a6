"""Train and evaluate small models, on a CPU or a GPU without change."""

import os

import torch


def device() -> torch.device:
    """Where the course computes: MINIDORA_DEVICE if it is set, else CUDA if there is one, else CPU.

    Raises:
        ValueError: MINIDORA_DEVICE is none of cpu, cuda, cuda:N.
        RuntimeError: it names a CUDA device that this machine or this torch does not have.
    """
    name = os.environ.get("MINIDORA_DEVICE", "")
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not index.isdecimal()):
        raise ValueError(f"MINIDORA_DEVICE must be cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= count:
        raise RuntimeError(
            f"MINIDORA_DEVICE={name}, but torch {torch.__version__} sees {count} CUDA devices: "
            "unset it to use the CPU, or run `minidora doctor`"
        )
    return torch.device(name)
