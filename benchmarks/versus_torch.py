"""Time and memory of gridreg_jax against the same network in PyTorch, on the CPU.

    pip install -e '.[bench]'
    python -m benchmarks.versus_torch [--shape 128 128 102] [--grid 10] [--repeats 7] [--out FILE]
    python -m benchmarks.versus_torch --against published    # the network that the authors published, same losses

A training step (batch 1: squared difference, soft Dice with two labels, bending energy, Adam) and an inference
(network, interpolation, warp), by default at the size of the paper's prostate images. Each system has a process of its
own, and the two run in turns: one run here, one run there, so that whatever else the computer does falls on both. Each
measured run follows one that is not, as a step of a training follows another: the cores are awake and the other
system's threads asleep. Before anything is measured, both must give the same displacement and the same loss from the
same parameters (unless PyTorch's is the published network, which is another one). Ratios are ours over PyTorch's:
below 1 is faster, or smaller, than PyTorch.

Peak resident memory is that of processes which only train. Ours is measured twice: in a first start, which compiles the
step and so includes XLA's compiler, and in a second one, which reads it from the cache, as every later start of
`train.py` does. `memory_ratio` is of the second.
"""

import argparse
import functools
import importlib.util
import json
import os
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for `python benchmarks/versus_torch.py` too

from benchmarks.arguments import at_least, result_file  # noqa: E402
from benchmarks.hardware import hardware  # noqa: E402
from gridreg_jax.cores import cores  # noqa: E402

LEARNING_RATE = 1e-4
NUM_LABELS = 2
AGAINST = ("same", "published")
SYSTEMS = ("jax", "torch")
WHAT = {"train": "training step", "inference": "inference"}


def make_batch(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Two images of blobs, with labels 1 and 2: `[1, X, Y, Z, 1]` and `[1, X, Y, Z]`."""
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*(np.linspace(0, 1, size, dtype=np.float32) for size in shape), indexing="ij", sparse=True)
    batch = {}
    for name in ("fixed", "moving"):
        distances = [
            sum((axis - center) ** 2 for axis, center in zip(axes, rng.uniform(0.3, 0.7, 3), strict=True))
            for _ in range(NUM_LABELS)
        ]
        image = sum(np.exp(-50 * distance) for distance in distances) + 0.05 * rng.uniform(size=shape)
        labels = np.select([distance < 0.03 for distance in distances], range(1, NUM_LABELS + 1))
        batch[name] = image.astype(np.float32)[None, ..., None]
        batch[f"{name}_labels"] = labels.astype(np.int32)[None]
    return batch


def weights(shape: tuple[int, int, int]) -> dict[str, float]:
    """Weights of the losses; the paper's bending energy in voxels."""
    return dict(dice=1.0, bending=2e5 * (2 / shape[0]) ** 2)


class Jax:
    """gridreg_jax: the real training step and prediction. It also draws the parameters, for both."""

    def __init__(self, options, folder: Path):
        import jax

        from gridreg_jax.doorway import prepare_process
        from gridreg_jax.measure import make_predict
        from gridreg_jax.training.step import TrainState, build_run, compile_steps, make_train_step, shard

        prepare_process()
        fields = dict(interpolator=options.interpolator, contrast_window=options.contrast_window)
        run = build_run(
            dict(
                model=dict(name="gridreg", **fields),
                optimizer=dict(name="adam", learning_rate=LEARNING_RATE),
                data=dict(shape=options.shape),
                grid_sizes=(options.grid,),
                steps=1000,
                seed=0,
                batch_size=1,
            )
        )
        self.grid_size, self.shape = run.grid_size, options.shape
        self.batch = shard(make_batch(options.shape))  # on the device, where `train.py` has it before the step begins
        self.block = jax.block_until_ready

        # Away from the start, where the head is zero and the displacement too.
        rng, start = np.random.default_rng(1), run.init_state()
        params = jax.tree.map(
            lambda leaf: leaf + 0.02 * rng.normal(size=leaf.shape).astype(np.float32), start.params
        )
        (folder / "params.pickle").write_bytes(pickle.dumps(jax.device_get(params)))
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        state = TrainState(np.zeros((), np.int32), params, run.optimizer.init(params))
        self.state = jax.device_put(state, start.step.sharding)
        # `train` consumes the state, so the prediction has a copy of its own.
        self.params = jax.device_put(jax.device_get(params))

        loss = dict(interpolator=options.interpolator, num_labels=NUM_LABELS, grid=0.0, **weights(options.shape))
        step = make_train_step(run.model, run.optimizer, seed=0, loss=loss, augmentation={})
        steps, _ = compile_steps(step, self.state, self.batch, [self.grid_size])
        self.step = steps[self.grid_size]
        self.predict = make_predict(run.model)

    def train(self) -> float:
        self.state, metrics = self.block(self.step(self.state, self.batch))
        return float(metrics["loss"])

    @functools.cached_property
    def images(self) -> dict:
        import jax

        batch = make_batch(self.shape)
        return jax.device_put({name: batch[name] for name in ("fixed", "moving")})

    def inference(self) -> np.ndarray:
        return self.block(self.predict(self.params, self.images, self.grid_size))["displacement"]


class Torch:
    """The same in PyTorch, run eagerly as PyTorch is by default, with all cores."""

    def __init__(self, options, folder: Path):
        import torch

        from benchmarks import torch_gridreg, torch_published

        torch.set_num_threads(cores())
        self.torch, self.gridreg, self.options = torch, torch_gridreg, options
        self.grid_size = (options.grid,) * 3
        if options.against == "same":
            params = pickle.loads((folder / "params.pickle").read_bytes())
            self.interpolator = options.interpolator
            fields = dict(interpolator=self.interpolator, contrast_window=options.contrast_window)
            self.model = torch_gridreg.load_flax_params(torch_gridreg.GridReg(**fields), params)
        else:
            self.interpolator = "trilinear"
            self.model = torch_published.PublishedGridReg()
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        self.batch = {name: torch.from_numpy(array) for name, array in make_batch(options.shape).items()}
        self.batch |= {name: self.batch[name].movedim(-1, 1) for name in ("fixed", "moving")}

    def train(self) -> float:
        if not self.model.training:
            self.model.train()
        self.optimizer.zero_grad()
        displacement, control_grid = self.model(self.batch["fixed"], self.batch["moving"], self.grid_size)
        loss = self.gridreg.objective(
            displacement,
            control_grid,
            self.batch,
            interpolator=self.interpolator,
            num_labels=NUM_LABELS,
            **weights(self.options.shape),
        ).mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def inference(self) -> np.ndarray:
        if self.model.training:  # only in the run before a measured one; the published network has dropout
            self.model.eval()
        with self.torch.inference_mode():
            displacement, _ = self.model(self.batch["fixed"], self.batch["moving"], self.grid_size)
            self.gridreg.warp(self.batch["moving"], displacement)
        return displacement.numpy()


def serve(options) -> None:
    """The child: do what each line on stdin says, and answer with a line of JSON on stdout."""
    folder = Path(options.folder)
    system = {"jax": Jax, "torch": Torch}[options.system](options, folder)
    if not options.only_train:
        np.save(folder / f"{options.system}.npy", np.asarray(system.inference()))
    print(json.dumps({"parameters": system.parameters, "loss": system.train()}), flush=True)
    for line in sys.stdin:
        if line.strip() == "memory":
            # KiB on Linux, bytes on macOS.
            answer = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        else:
            run = getattr(system, line.strip())
            run()
            start = time.perf_counter()
            run()
            answer = 1e3 * (time.perf_counter() - start)
        print(json.dumps(answer), flush=True)


class Child:
    """A system in a process of its own."""

    def __init__(self, system: str, options, folder: str, *more: str):
        arguments = ["--shape", *map(str, options.shape), "--grid", str(options.grid)]
        arguments += ["--interpolator", options.interpolator, "--contrast_window", str(options.contrast_window)]
        arguments += ["--against", options.against, *more]
        self.system = system
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.versus_torch", *arguments, "--system", system, "--folder", folder],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "cache")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready = self._answer()

    def ask(self, what: str) -> float:
        """Milliseconds of one "train" or "inference", or MiB of "memory"."""
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: the {self.system} process ended; what it wrote is above")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def check(children: dict[str, Child], folder: str) -> float:
    """Largest difference of the two displacements in voxels; exits where the two are not the same network."""
    displacements = [np.load(Path(folder) / f"{system}.npy") for system in SYSTEMS]
    difference = float(np.abs(displacements[0] - displacements[1]).max())
    losses = [children[system].ready["loss"] for system in SYSTEMS]
    if not difference <= 1e-3:
        sys.exit(f"error: the displacements differ by {difference:.2g} voxels: not the same network, nothing measured")
    if not abs(losses[0] - losses[1]) <= 1e-3 * abs(losses[0]):
        sys.exit(f"error: the losses are {losses[0]:.6g} and {losses[1]:.6g}: not the same loss, nothing measured")
    return difference


def memory_of_training(system: str, options, folder: str) -> float:
    """Peak resident memory (MiB) of a process that takes some training steps."""
    with Child(system, options, folder, "--only_train") as child:
        for _ in range(3):
            child.ask("train")
        return child.ask("memory")


def measure(options) -> dict:
    """All measurements."""
    with tempfile.TemporaryDirectory() as folder:
        # In this order: ours writes the parameters that PyTorch's reads.
        first_start, *memory = (memory_of_training(system, options, folder) for system in ("jax", *SYSTEMS))
        with Child("jax", options, folder) as ours, Child("torch", options, folder) as theirs:
            children = {"jax": ours, "torch": theirs}
            difference = check(children, folder) if options.against == "same" else None
            runs = {what: {system: [] for system in SYSTEMS} for what in WHAT}
            for what in WHAT:
                for _ in range(options.repeats):
                    for system, child in children.items():
                        time.sleep(0.2)  # until the other system's threads have stopped to wait for work
                        runs[what][system].append(child.ask(what))
            parameters = {system: child.ready["parameters"] for system, child in children.items()}
    memory = dict(zip(SYSTEMS, memory, strict=True))
    medians = {what: {system: statistics.median(runs[what][system]) for system in SYSTEMS} for what in WHAT}
    return {
        "train_ratio": medians["train"]["jax"] / medians["train"]["torch"],
        "inference_ratio": medians["inference"]["jax"] / medians["inference"]["torch"],
        "memory_ratio": memory["jax"] / memory["torch"],
        "first_start_memory_ratio": first_start / memory["torch"],
        "train_ms": medians["train"],
        "inference_ms": medians["inference"],
        "memory_mib": memory,
        "runs_ms": runs,
        "parameters": parameters,
        "displacement_difference_voxels": difference,
        "shape": list(options.shape),
        "grid": options.grid,
        "against": options.against,
        "interpolator": options.interpolator,
        "contrast_window": options.contrast_window,
        "repeats": options.repeats,
        "hardware": hardware("cpu", packages=SYSTEMS),
    }


def table(result: dict) -> str:
    """The measurements for reading."""
    rows = [("", "gridreg_jax", "PyTorch", "ratio")]
    for name, key, ratio in (
        ("training step, ms", "train_ms", "train_ratio"),
        ("inference, ms", "inference_ms", "inference_ratio"),
        ("peak memory, MiB", "memory_mib", "memory_ratio"),
    ):
        rows.append((name, *(f"{result[key][system]:.1f}" for system in SYSTEMS), f"{result[ratio]:.2f}"))
    rows.append(("  of a first start", "", "", f"{result['first_start_memory_ratio']:.2f}"))
    rows.append(("parameters", *(str(result["parameters"][system]) for system in SYSTEMS), ""))
    rows.append(("version", *(result["hardware"]["versions"][system] for system in SYSTEMS), ""))
    setting = f"{'x'.join(map(str, result['shape']))} voxels, grid {result['grid']}, {result['interpolator']}"
    if result["against"] == "published":
        setting += "; in PyTorch the published network"
    computer = "{cpu}, {cores} cores".format(**result["hardware"]) + f"; medians of {result['repeats']} runs"
    return "\n".join([setting, computer, *("{:<20}{:>14}{:>14}{:>8}".format(*row).rstrip() for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # PyTorch refuses to take the norm of one voxel, which is what the coarsest level has of 16 an axis.
    parser.add_argument("--shape", type=at_least(17), nargs=3, default=(128, 128, 102), help="voxels an axis")
    parser.add_argument("--grid", type=at_least(2), default=10, help="control points an axis")
    parser.add_argument("--repeats", type=at_least(1), default=7, help="measured runs of each kind and system")
    parser.add_argument("--interpolator", choices=("bspline", "trilinear"), default="bspline")
    parser.add_argument("--contrast_window", type=at_least(0), default=0, help="local normalisation, odd; 0 for none")
    parser.add_argument("--against", choices=AGAINST, default="same", help="which network PyTorch runs")
    parser.add_argument("--out", type=result_file, help="JSON file for the result")
    # What a child process is started with.
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--only_train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.shape = tuple(options.shape)
    if options.interpolator == "bspline" and options.grid < 4:
        parser.error("--grid: bspline needs 4 or more")
    if options.contrast_window and options.contrast_window % 2 == 0:
        parser.error("--contrast_window: give an odd number, or 0")
    if options.system:
        return serve(options)
    if not importlib.util.find_spec("torch"):
        sys.exit("error: PyTorch is missing; install the extra `bench`: pip install -e '.[bench]'")
    result = measure(options)
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
