"""How fast madad is and what memory it takes, beside the published pipeline with the same networks.

    python -m benchmarks.speed --quick [--json FILE]    # the ratios alone, under 5 minutes on two cores
    python -m benchmarks.speed --json benchmarks/results/speed.json
    python -m benchmarks.speed --plot benchmarks/results/speed.json    # speed.png beside it

Networks have their sizes but hardly any training: time does not depend on the weights, and the mask threshold
is put where a stated share of the slices is flagged. Both pipelines run in this process, one after the other,
on the same slices; a ratio is the reference's time divided by ours, the best of several runs each. The
reference (`benchmarks.published`) goes slice by slice; the table also has it in batches of 16, the default of
the published script. A stage's rate is the share of the machine's own rate of float32 matrix multiplication
that is reached, by the operations that PyTorch counts. Peaks of memory are resident megabytes of the process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.metrics import measure as measure_metrics
from benchmarks.published import PUBLISHED_BATCH, published_maps, published_training
from benchmarks.speed_tables import brief, plot, report
from madad import LatentAutoencoder, MaskedDiffusionAnomalyDetector, __version__
from madad._runtime.tensors import inference
from madad.datasets import make_brain_slices
from madad.presets import PRESETS
from madad.stages.denoiser import train_denoiser
from madad.training import Trainer

SIDES = {"small": 128, "XS": 256, "L": 256}
FLAGGED_SHARE = 0.15
VARIANTS = {
    "bfloat16": {"precision": "bfloat16"},
    "compiled": {"compile": True},
    "compiled, bfloat16": {"precision": "bfloat16", "compile": True},
}


def main() -> None:
    """Measure, print a table, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--plot", type=Path, help="draw what such a file holds, and measure nothing")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peak", nargs=3, metavar=("USE", "PRESET", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        use, preset, n = options.peak
        print(json.dumps(peak_of(use, preset, int(n))))
        return
    if options.plot:
        print(plot(options.plot))
        return
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    measured = quick(device) if options.quick else everything(device)
    print(report(measured) if not options.quick else brief(measured))
    if options.json is not None:
        options.json.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


def quick(device: str) -> dict:
    """The ratios, each from few slices."""
    small = inference_of("small", device, n=100, repeats=3)
    xs = inference_of("XS", device, n=8, repeats=1, batched=False)
    training = training_of("XS", device, batch_size=4, n_steps=2)
    return joined(device, [small, xs], training, memory_of("tiny", ("predict",)))


def everything(device: str) -> dict:
    """All tables and curves."""
    few, on_gpu = ("bfloat16",), torch.device(device).type == "cuda"
    small = inference_of("small", device, n=100, repeats=4, variants=tuple(VARIANTS))
    xs = inference_of("XS", device, n=100 if on_gpu else 8, repeats=1, variants=few)
    large = inference_of("L", device, n=100 if on_gpu else 4, repeats=1, batched=on_gpu, variants=few)
    training = training_of("XS", device, batch_size=8, n_steps=4)
    measured = joined(device, [small, xs, large], training, memory_of("small", ("predict", "fit")))
    return measured | {
        "stages": [row for size in SIDES for row in stages_of(size, device)],
        "profile": profile_of("small", device),
        "curves": curves(device),
        "metrics": measure_metrics(1e8 if device != "cpu" else 1e7),
    }


def joined(device: str, inference_rows: list[dict], training: dict, memory: dict) -> dict:
    """One document, with the ratios by the names that other programs read."""
    names = {"small": "inference_small", "XS": "inference_klf8_xs", "L": "inference_klf8_l"}
    kind = torch.device(device).type
    ratios = {}
    for row in inference_rows:
        ratios[f"{names[row['size']]}_{kind}"] = row["ratio"]
        if "ratio_batched" in row:
            ratios[f"{names[row['size']]}_{kind}_batched_reference"] = row["ratio_batched"]
    ratios[f"denoiser_training_klf8_xs_{kind}"] = training["ratio"]
    ratios["memory_10k_over_100"] = memory["predict_ratio"]
    return {
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "max_abs_map_difference": max(row["max_abs_map_difference"] for row in inference_rows),
        "machine": machine(device),
        "inference": inference_rows,
        "training": training,
        "memory": memory,
    }


def machine(device: str) -> dict:
    """What it was measured on."""
    side = 2048 if torch.device(device).type == "cpu" else 8192
    rates = {}
    for name in ("float32", "bfloat16"):
        a = torch.randn(side, side, device=device, dtype=getattr(torch, name))
        rates[name] = 2 * side**3 / seconds(lambda a=a: a @ a, device, repeats=9) / 1e9
    cpu = next(
        (line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor()
    )
    return {
        "cpu": cpu.rpartition(":")[2].strip(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else None,
        "matmul_gflops": rates,
        "versions": {"madad": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "date": date.today().isoformat(),
    }


def inference_of(
    size: str, device: str, *, n: int, repeats: int, batched: bool = True, variants: tuple[str, ...] = ()
) -> dict:
    """Maps of ``n`` slices, a share of them flagged: ours and the reference's."""
    images = slices(n, SIDES[size])
    detector = detector_of(size, device)
    images = flagged(detector, images)
    detector.predict_maps(images[:1])
    (ours, maps), peak = timed(lambda: detector.predict_maps(images), device, repeats), peak_mb()
    reference, expected = timed(lambda: published_maps(detector, images), device, max(1, repeats // 2))
    row = {
        "size": size,
        "side": SIDES[size],
        "slices": n,
        "flagged": int((maps.max(axis=(1, 2)) > 0).sum()),
        "slices_per_second": n / ours,
        "reference_slices_per_second": n / reference,
        "ratio": reference / ours,
        "max_abs_map_difference": float(np.abs(maps - expected).max()),
        "peak_mb": peak,
    }
    if batched:
        together = timed(
            lambda: published_maps(detector, images, PUBLISHED_BATCH), device, max(1, repeats // 2)
        )[0]
        row |= {"reference_slices_per_second_batched": n / together, "ratio_batched": together / ours}
    row["variants"] = {
        name: _variant(detector, images, device, repeats, maps, reference, **VARIANTS[name])
        for name in variants
    }
    print(f"{size}: {json.dumps(row)}", file=sys.stderr, flush=True)  # long runs show what they have
    return row


def _variant(detector, images, device, repeats, maps, reference, **parameters) -> dict:
    """The same slices by other means, and by how much their maps differ."""
    detector.set_params(**parameters)
    started = time.perf_counter()
    detector.predict_maps(images)
    first = time.perf_counter() - started
    spent, changed = timed(lambda: detector.predict_maps(images), device, repeats)
    detector.set_params(precision="float32", compile=False)
    moved = np.abs(changed - maps)
    return {
        "slices_per_second": len(images) / spent,
        "ratio": reference / spent,
        "first_call_s": first,
        "map_moves_at_most": float(moved.max()),
        "map_moves_on_average": float(moved[images > 0].mean()),
    }


def stages_of(size: str, device: str) -> list[dict]:
    """Milliseconds per slice of each stage, and the rate that its operations are done at."""
    detector, images = detector_of(size, device), slices(16, SIDES[size])
    autoencoder, unet = detector.autoencoder_, detector.denoiser_.to(device)
    batch = autoencoder.batch_size_of(autoencoder.to_device())
    x = autoencoder.pad(2 * torch.from_numpy(np.resize(images, (batch, 1, *images.shape[1:]))).to(device) - 1)
    rate = machine(device)["matmul_gflops"]["float32"]
    with inference(autoencoder.network_, unet):
        z, t = autoencoder.encode(x)[0], torch.full((batch,), 5, device=device)
        calls = {
            "encode": lambda: autoencoder.encode(x),
            "U-Net, one step": lambda: unet(z, t),
            "decode": lambda: autoencoder.decode(z),
        }
        rows = []
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call()
            spent, operations = seconds(call, device, repeats=3), counter.get_total_flops()
            rows.append(
                {
                    "size": size,
                    "stage": name,
                    "ms_per_slice": 1000 * spent / batch,
                    "gflop_per_slice": operations / batch / 1e9,
                    "share_of_matmul_rate": operations / spent / 1e9 / rate,
                }
            )
    return rows


def profile_of(size: str, device: str, n_named: int = 8) -> dict[str, float]:
    """Shares of the time that mapping 32 slices takes: PyTorch's operations, and all that is not one."""
    images = slices(32, SIDES[size])
    detector = detector_of(size, device)
    images = flagged(detector, images)
    detector.predict_maps(images)
    started = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        detector.predict_maps(images)
    total = 1e6 * (time.perf_counter() - started)
    found = {one.key: one.self_cpu_time_total / total for one in profiler.key_averages()}
    largest = sorted(found, key=found.__getitem__, reverse=True)[:n_named]
    return {name: found[name] for name in largest} | {
        "other operations": sum(found.values()) - sum(found[name] for name in largest),
        "Python, NumPy and the profiler": 1 - sum(found.values()),
    }


def curves(device: str) -> dict:
    """Cost against the number of slices, their size and the number of steps, of the small preset."""
    by_number, by_side, by_step = {}, {}, {}
    detector, images = detector_of("small", device), slices(1000, 128)
    images = np.resize(flagged(detector, images[:100]), images.shape)
    for n in (1, 10, 100, 1000):
        by_number[n] = timed(lambda n=n: detector.predict_maps(images[:n]), device, 2)[0]
    for steps in (1, 2, 5, 10, 20, 50):
        detector.n_timesteps_ = max(10, steps)
        detector.set_params(n_steps=steps)
        by_step[steps] = timed(lambda: detector.predict_maps(images[:32]), device, 2)[0] / 32
    for side in (64, 96, 128, 192, 256, 384, 512):
        detector, images = detector_of("small", device, side), slices(16, side)
        images = flagged(detector, images)
        by_side[side] = timed(lambda d=detector, x=images: d.predict_maps(x), device, 2)[0] / 16
    return {
        "seconds_by_slices": by_number,
        "seconds_per_slice_by_side": by_side,
        "seconds_per_slice_by_steps": by_step,
    }


def training_of(size: str, device: str, *, batch_size: int, n_steps: int) -> dict:
    """Slices per second of the second stage: from cached latents, and encoding at each step."""
    images, detector = slices(batch_size, SIDES[size]), detector_of(size, device)
    started = time.perf_counter()
    published_training(detector, images, batch_size=batch_size, n_steps=n_steps)
    synchronize(device)
    reference = batch_size * n_steps / (time.perf_counter() - started)
    rates = {
        precision: _training_rate(detector, images, batch_size, n_steps, precision)
        for precision in ("float32", "bfloat16")
    }
    return {
        "size": size,
        "batch_size": batch_size,
        "steps": n_steps,
        "slices_per_second": rates["float32"],
        "slices_per_second_bfloat16": rates["bfloat16"],
        "reference_slices_per_second": reference,
        "ratio": rates["float32"] / reference,
        "ratio_bfloat16": rates["bfloat16"] / reference,
    }


def _training_rate(detector, images, batch_size: int, n_steps: int, precision: str) -> float:
    """Slices per second after the latents are cached, without the first record's start."""
    _, history = train_denoiser(
        detector.autoencoder_,
        detector._check_slices(images, None),
        denoiser=detector.denoiser_,
        objective=detector._objective(),
        trainer=Trainer(math.inf, max_steps=2 * n_steps, batch_size=batch_size, precision=precision),
        seed=0,
        flip=True,
    )
    return max(record["samples_per_second"] for record in history)


def memory_of(preset: str, uses: tuple[str, ...]) -> dict:
    """Peak resident megabytes of processes that map, or fit to, 100 and 10,000 slices of a memory map."""
    peaks, ratios = {}, {}
    for use in uses:
        for n in (100, 10_000):
            command = [sys.executable, "-m", "benchmarks.speed", "--peak", use, preset, str(n)]
            here = Path(__file__).resolve().parents[1]
            ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
            peaks[f"{use}_{n}"] = json.loads(ran.stdout.splitlines()[-1])
        few, many = (peaks[f"{use}_{n}"] for n in (100, 10_000))
        ratios[f"{use}_ratio"] = (many["peak_mb"] - many["cache_mb"]) / (few["peak_mb"] - few["cache_mb"])
    return {"preset": preset, "side": SIDES["small"], "peaks": peaks, **ratios}


def peak_of(use: str, preset: str, n: int) -> dict:
    """In a process of its own: slices on disk, and the peak of memory while they are used."""
    side, hundred, cache = SIDES["small"], slices(100, SIDES["small"]), 0.0
    detector = trained_briefly(preset)
    if use == "predict":
        detector.fit(hundred[:24]).set_params(mask_threshold=1.0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slices"
        with path.open("wb") as file:
            for start in range(0, n, len(hundred)):
                file.write(hundred[: n - start].tobytes())
        images = np.memmap(path, np.float32, "r", shape=(n, side, side))
        if use == "predict":
            detector.predict_maps(images)
        else:
            detector.fit(images)
            channels, height, width = detector.autoencoder_.latent_shape_
            trained_on = 2 * (n - len(detector.calibration_rows_))  # with mirror images
            cache = 4 * trained_on * (2 * channels + 1) * height * width / 2**20
    return {"peak_mb": peak_mb(), "cache_mb": cache}


def slices(n: int, side: int) -> np.ndarray:
    """Generated slices, (n, side, side): a hundred different ones, repeated."""
    made = make_brain_slices(min(n, 100), size=side, random_state=0).images.astype(np.float32)
    return np.resize(made, (n, side, side))


def trained_briefly(preset: str) -> MaskedDiffusionAnomalyDetector:
    """A preset's detector, to be fitted in two steps."""
    few = {"max_steps": 2, "precision": "float32", "batch_size": "auto"}
    first = LatentAutoencoder(PRESETS[preset]["autoencoder"], trainer=Trainer(**few))
    return MaskedDiffusionAnomalyDetector(
        preset, autoencoder=first, trainer=Trainer(**few), device="cpu", random_state=0
    )


def detector_of(size: str, device: str, side: int | None = None) -> MaskedDiffusionAnomalyDetector:
    """A detector whose networks have a size, after two steps of training."""
    side = side or SIDES[size]
    if size == "small":
        return trained_briefly("small").fit(slices(24, side)).set_params(device=device)
    one = Trainer(max_steps=1, batch_size=1, precision="float32")
    detector = MaskedDiffusionAnomalyDetector(
        "original",
        autoencoder=LatentAutoencoder("kl-f8", trainer=one),
        denoiser=size,
        trainer=one,
        device="cpu",
        random_state=0,
    ).fit(slices(4, 64))
    for estimator in (detector, detector.autoencoder_):  # networks of convolutions take slices of any size
        estimator.image_shape_, estimator.n_features_in_ = (1, side, side), side**2
    detector.autoencoder_.set_params(device=device)
    return detector.set_params(device=device)


def flagged(detector: MaskedDiffusionAnomalyDetector, images: np.ndarray) -> np.ndarray:
    """Put the mask threshold where about `FLAGGED_SHARE` of the slices have flagged positions.

    The slices are given back in the order of their largest f_M: flagged ones are neighbours, as in a volume.
    """
    detector.set_params(mask_threshold=1.0)
    repaints = detector._map_settings()["repaint"] > 0
    n_flagged = max(1, round(FLAGGED_SHARE * len(images)))
    for _ in range(3 if repaints else 1):  # what is flagged at one step is moved, and f_M changes at the next
        largest: list[float] = []
        for batch in detector._restore_batches(detector._check_slices(images, None), decode="nothing"):
            f_m = batch.noise_probability
            largest += list((f_m.mean(axis=0) if repaints else f_m.max(axis=0)).max(axis=(1, 2, 3)))
        below, above = np.sort(largest)[-n_flagged - 1 :][:2]
        detector.set_params(mask_threshold=float((below + above) / 2))
    return images[np.argsort(largest)]


def timed(call, device: str, repeats: int) -> tuple[float, np.ndarray]:
    """The shortest of several calls in seconds, and what the last one gave."""
    best, result = math.inf, None
    for _ in range(repeats):
        started = time.perf_counter()
        result = call()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best, result


def seconds(call, device: str, repeats: int) -> float:
    """`timed` after a call that does not count."""
    call()
    synchronize(device)
    return timed(call, device, repeats)[0]


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def peak_mb() -> float:
    """Peak of the process's memory since it began.

    Not ``ru_maxrss``, which on Linux begins with what the process that started this one had.
    """
    own = next((line for line in _lines("/proc/self/status") if line.startswith("VmHWM")), None)
    if own is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(own.split()[1]) / 1024


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


if __name__ == "__main__":
    main()
