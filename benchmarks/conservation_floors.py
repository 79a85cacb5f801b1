"""What healthy PyTorch kernels leave of each conservation residual, by format and size.

    python benchmarks/conservation_floors.py --json floors.json

Attention: fused (flash) and unfused (math) ``scaled_dot_product_attention``, causal, fused under
autocast, and a flash kernel written out with one rounding each (mcore_monitors.faults.kernel), on
nine kinds of tensors (benchmarks/conservation_common.py). Norms, cross-entropy and router softmax
on random, common and extreme inputs. Each row says the mean over heads and sequences (what a
monitor reads) and the largest single one. Two cores, no GPU: about a minute.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from conservation_common import KINDS, attention_inputs, made_by  # noqa: E402

from mcore_monitors.faults.kernel import flash_attention  # noqa: E402
from mcore_monitors.signals import conservation as c  # noqa: E402

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def attention_residuals(
    tensors: tuple[Tensor, ...], dtype: torch.dtype, path: str
) -> dict[str, Tensor]:
    """The three attention residuals of each sequence and head, [B·H], of one PyTorch kernel."""
    *qkv, do = (x.permute(1, 2, 0, 3) for x in tensors)
    autocast = path == "autocast"
    q, k, v = (x.to(torch.float32 if autocast else dtype).requires_grad_() for x in qkv)
    backend = SDPBackend.MATH if path == "math" else SDPBackend.FLASH_ATTENTION
    if path == "written out":
        first = (x.permute(2, 0, 1, 3) for x in (q, k, v))
        out = flash_attention(*first, scale=q.shape[-1] ** -0.5).permute(1, 2, 0, 3)
    else:
        with sdpa_kernel(backend), torch.autocast("cpu", dtype=dtype, enabled=autocast):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    do = do.to(out.dtype)
    grads = torch.autograd.grad(out, (q, k, v), do)
    if autocast:  # what the kernel saw
        q, k, v = (x.to(dtype) for x in (q, k, v))
        grads = tuple(x.to(dtype) for x in grads)  # exact: only widened on the way out
    q, k, v, out, do, dq, dk, dv = (
        x.detach().permute(2, 0, 1, 3) for x in (q, k, v, out, do, *grads)
    )
    key = c.key_shift_terms(dk, query=q, output=out, grad_output=do)
    query_key = c.query_key_terms(q, dq, k, dk)
    return {
        "key_shift": _ratio(torch.linalg.vector_norm(key[0], dim=-1), key[1]),
        "value_output": _ratio(*c.value_output_terms(v, dv, out, do)),
        "query_key": _ratio(query_key[0], query_key[1].sqrt()),
    }


def _ratio(signed: Tensor, scale: Tensor) -> Tensor:
    return (signed.abs() / scale)[scale != 0]  # float16 may lose a whole gradient


def attention_rows(generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Rows for attention."""
    sizes = [(32, 64), (128, 32), (128, 64), (128, 128), (512, 64), (512, 128), (2048, 64)]
    for length, dim in sizes:
        sequences = 1 if length > 512 else 4
        for kind in KINDS:
            tensors = attention_inputs(kind, length, sequences, 4, dim, generator)
            for name, dtype in FORMATS.items():
                for path in ("flash", "math", "written out", "autocast"):
                    if path == "autocast" and (dtype == torch.float32 or length > 512):
                        continue
                    if path in ("math", "written out") and length > 512:
                        continue
                    found = attention_residuals(tensors, dtype, path)
                    for residual, values in found.items():
                        if not len(values):
                            continue
                        yield _row(residual, name, path, kind, length, dim, values)


def _row(
    residual: str, name: str, path: str, kind: str, length: int, size: int, values: Tensor
) -> dict[str, Any]:
    floor = c.floor(residual, FORMATS[name], length, size)
    return {
        "residual": residual, "format": name, "path": path, "kind": kind,
        "length": length, "size": size,
        "mean": values.mean().item(), "largest": values.max().item(),
        "mean_over_floor": values.mean().item() / floor,
        "largest_over_limit": values.max().item()
        / c.limit(residual, FORMATS[name], length, size),
    }  # fmt: skip


def norm_rows(generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Rows for RMSNorm and LayerNorm; each value is one batch of 256 tokens, eight of them."""
    for size in (64, 128, 1024, 4096):
        for kind in ("random", "common part", "one huge channel", "tiny (below ε)"):
            for name, dtype in FORMATS.items():
                for norm in ("rms", "layer"):
                    values: dict[str, list[Tensor]] = {"norm_scale": [], "norm_shift": []}
                    for _ in range(8):
                        x = torch.randn(256, size, generator=generator)
                        if kind == "common part":
                            x = x + 3 * torch.randn(size, generator=generator)
                        elif kind == "one huge channel":
                            x[:, 3] += 100
                        elif kind == "tiny (below ε)":
                            x = 1e-3 * x
                        x = x.to(dtype).requires_grad_()
                        w = (1 + 0.3 * torch.randn(size, generator=generator)).to(dtype)
                        b = 0.3 * torch.randn(size, generator=generator).to(dtype)
                        if norm == "rms":
                            y, b = F.rms_norm(x, (size,), w, eps=1e-5), None
                        else:
                            y = F.layer_norm(x, (size,), w, b, eps=1e-5)
                        dy = torch.randn(256, size, generator=generator)
                        dy = (dy + torch.randn(size, generator=generator)).to(dtype)
                        dx = torch.autograd.grad(y, x, dy)[0]
                        terms = c.norm_scale_terms(
                            x.detach(), dx, y.detach(), dy,
                            eps=1e-5, centred=norm == "layer", bias=b,
                        )  # fmt: skip
                        values["norm_scale"].append(c.norm_scale_from_terms(*terms)[0])
                        if norm == "layer":
                            terms = c.norm_shift_terms(dx)
                            values["norm_shift"].append(c.norm_shift_from_terms(*terms)[0])
                    for residual, found in values.items():
                        if found:
                            row = torch.cat(found)
                            yield _row(residual, name, f"{norm}_norm", kind, 256, size, row)


def softmax_rows(generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Rows for cross-entropy and router, eight batches of 256 tokens each."""
    for name, dtype in FORMATS.items():
        for vocabulary in (256, 8192):
            for kind in ("random", "sure", "label smoothing"):
                for path in ("fp32 inside", "in its own format"):
                    found = []
                    for _ in range(8):
                        z = torch.randn(256, vocabulary, generator=generator)
                        target = torch.randint(vocabulary, (256,), generator=generator)
                        if kind == "sure":  # right with probability .99 and more, nine in ten
                            z[torch.arange(230), target[:230]] += 18
                        z = z.to(dtype).requires_grad_()
                        wide = z.float() if path == "fp32 inside" else z
                        smooth = 0.1 if kind == "label smoothing" else 0.0
                        loss = F.cross_entropy(wide, target, label_smoothing=smooth)
                        grad = torch.autograd.grad(loss * (2**10 if name == "fp16" else 1), z)[0]
                        terms = c.vocabulary_shift_terms(grad)
                        found.append(c.vocabulary_shift_from_terms(*terms)[0])
                    yield _row(
                        "vocabulary_shift", name, path, kind, 256, vocabulary, torch.cat(found)
                    )
        for experts in (8, 64):
            for kind in ("random", "common g", "sure", "top-2 after", "top-2 before"):
                for path in ("fp32 inside", "in its own format"):
                    found = []
                    for _ in range(8):
                        z = torch.randn(256, experts, generator=generator)
                        if kind == "sure":
                            z = 6 * z
                        z = z.to(dtype).requires_grad_()
                        wide = z.float() if path == "fp32 inside" else z
                        if kind == "top-2 before":
                            p = wide.topk(2, dim=-1)[0].softmax(-1)
                        else:
                            p = wide.softmax(-1)
                        if kind == "top-2 after":
                            p = p.topk(2, dim=-1)[0]
                        g = torch.randn(*p.shape, generator=generator)
                        if kind == "common g":
                            g = g + 5
                        grad = torch.autograd.grad(p.to(dtype), z, g.to(dtype))[0]
                        terms = c.router_shift_terms(grad)
                        found.append(c.router_shift_from_terms(*terms)[0])
                    yield _row("router_shift", name, path, kind, 256, experts, torch.cat(found))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/conservation_floors.py --json floors.json",
    )
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(arguments.seed)
    rows = []
    print("residual  format  path  kind  length  size | mean  largest | over floor  over limit")
    for make in (attention_rows, norm_rows, softmax_rows):
        for row in make(generator):
            rows.append(row)
            print(
                f"{row['residual']:16} {row['format']:5} {row['path']:18} {row['kind']:18} "
                f"{row['length']:5} {row['size']:5} | {row['mean']:.1e} {row['largest']:.1e} | "
                f"{row['mean_over_floor']:6.2f} {row['largest_over_limit']:6.2f}",
                flush=True,
            )
    if arguments.json:
        result = {"rows": rows, "made_by": made_by(seed=arguments.seed)}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
