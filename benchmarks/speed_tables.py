"""Tables and a figure of what `benchmarks.speed` measured."""

from __future__ import annotations

import json
from pathlib import Path

COLUMNS = (
    *("size", "px", "slices, flagged", "slices/s", "slice by slice", "ratio", "in batches of 16", "ratio"),
    *("map moves by", "peak, MB"),
)


def brief(measured: dict) -> str:
    """The machine and the ratios."""
    moved = f"largest difference of maps: {measured['max_abs_map_difference']:.1e}"
    return "\n".join([conditions(measured["machine"]), json.dumps(measured["ratios"], indent=2), moved])


def conditions(facts: dict) -> str:
    """On what it was measured, with which versions, and when."""
    rates = facts["matmul_gflops"]
    return (
        f"{facts['gpu'] or facts['cpu']}, {facts['threads']} threads, torch {facts['versions']['torch']}, "
        f"{facts['date']}; matrix multiplication {rates['float32']:.0f} (float32), {rates['bfloat16']:.0f} "
        f"(bfloat16) GFLOP/s"
    )


def report(measured: dict) -> str:
    """All tables."""
    lines = ["", *_inference(measured["inference"]), "", *_training_and_memory(measured), ""]
    lines += [
        f"{row['size']:>5}  {row['stage']:<16} {row['ms_per_slice']:9.2f} ms/slice "
        f"{row['gflop_per_slice']:9.2f} GFLOP {row['share_of_matmul_rate']:6.0%} of the rate"
        for row in measured["stages"]
    ]
    lines += ["", *(f"{share:6.1%}  {name}" for name, share in measured["profile"].items()), ""]
    for name, curve in measured["curves"].items():
        lines.append(f"{name}: " + ", ".join(f"{key}: {value:.3g}" for key, value in curve.items()))
    return "\n".join([*lines, "", brief(measured)])


def _inference(rows: list[dict]) -> list[str]:
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for row in rows:
        cells = [row["size"], row["side"], f"{row['slices']}, {row['flagged']}"]
        cells += [
            f"{row[name]:.3g}" for name in ("slices_per_second", "reference_slices_per_second", "ratio")
        ]
        batched = "reference_slices_per_second_batched", "ratio_batched"
        cells += [f"{row[name]:.3g}" if name in row else "" for name in batched]
        cells += [f"{row['max_abs_map_difference']:.1e}", f"{row['peak_mb']:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        for name, one in row.get("variants", {}).items():
            moved = f"{one['map_moves_at_most']:.1e}, mean {one['map_moves_on_average']:.1e}"
            rates = f"{one['slices_per_second']:.3g} | | {one['ratio']:.3g}"
            lines.append(f"| {row['size']}, {name} | {row['side']} | | {rates} | | | {moved} | |")
    return lines


def _training_and_memory(measured: dict) -> list[str]:
    training, memory = measured["training"], measured["memory"]
    peaks = ", ".join(f"{name} {peak['peak_mb']:.0f} MB" for name, peak in memory["peaks"].items())
    rate = {name: f"{value:.3g}" for name, value in training.items() if isinstance(value, float)}
    return [
        f"training of the denoiser, kl-f8 + {training['size']}, batches of {training['batch_size']}, "
        f"slices/s: {rate['slices_per_second']} (bfloat16 {rate['slices_per_second_bfloat16']}), encoding "
        f"at each step {rate['reference_slices_per_second']}; ratio {rate['ratio']} (bfloat16 "
        f"{rate['ratio_bfloat16']})",
        f"peak memory, 10,000 slices over 100: predict_maps {memory['predict_ratio']:.2f}, fit without its "
        f"cache {memory['fit_ratio']:.2f}; {peaks}",
    ]


def plot(path: Path) -> Path:
    """Draw the stages, the variants and the curves of a file beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = json.loads(path.read_text(encoding="utf-8"))
    figure, axes = plt.subplots(1, 4, figsize=(17, 4), layout="constrained")
    bars = {}
    for row in measured["inference"]:
        bars[f"{row['size']}, {row['side']} px"] = row["ratio"]
        bars |= {f"{row['size']}, {name}": one["ratio"] for name, one in row.get("variants", {}).items()}
    bars["training, XS"] = measured["training"]["ratio"]
    bars["training, XS, bfloat16"] = measured["training"]["ratio_bfloat16"]
    axes[0].barh(list(bars), list(bars.values()), color="tab:blue")
    axes[0].axvline(1, color="black", linewidth=0.8)
    axes[0].invert_yaxis()
    axes[0].set(title="times faster than the published pipeline", xlabel="ratio")
    titles = {
        "seconds_by_slices": ("slices, 128 px", "seconds"),
        "seconds_per_slice_by_side": ("side, px", "seconds per slice"),
        "seconds_per_slice_by_steps": ("steps of the sampler, 128 px", "seconds per slice"),
    }
    for axis, (name, (x_label, y_label)) in zip(axes[1:], titles.items(), strict=True):
        curve = measured["curves"][name]
        axis.loglog([int(key) for key in curve], list(curve.values()), "o-", color="tab:blue")
        axis.set_xticks([int(key) for key in curve], list(curve), minor=False)
        axis.minorticks_off()
        axis.set(title="small preset", xlabel=x_label, ylabel=y_label)
        axis.grid(alpha=0.3)
    figure.suptitle(conditions(measured["machine"]), fontsize=9)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=90)
    plt.close(figure)
    return target
