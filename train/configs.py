"""Settings of a run: one frozen dataclass, and a preset for each data set with what it gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Literal

from jaxcomp.export.running import Target


@dataclass(frozen=True)
class ModelConfig:
    """Which network, and how large."""

    name: Literal["convnet", "resnet18", "mlp", "vit"] = "convnet"
    """One of train.networks.linen."""
    width: int | None = None
    """Channels of ResNet-18's first stage, or the model's own default."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters stay float32."""

    def __post_init__(self) -> None:
        if self.width is not None and self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}.")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule of one training."""

    epochs: int
    """Passes over the training split."""
    learning_rate: float
    """Peak, after a linear warm-up; then a cosine to zero."""
    warmup: float = 0.1
    """Fraction of the steps that warm up."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd has Nesterov momentum 0.9."""
    weight_decay: float = 1e-4
    """Decoupled (adamw) or added to the gradient (sgd); on weights only, see jaxcomp.core.weight_mask."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}.")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be a fraction in 0..1, got {self.warmup}.")


@dataclass(frozen=True)
class DistillConfig:
    """What a row that ends in `+distill` learns from the float baseline, its teacher."""

    weight: float = 0.5
    """Of the teacher's soft targets in the loss; the labels have the rest."""
    temperature: float = 1.0
    """That both softmaxes are taken at."""

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"distill.weight must be a fraction above 0, got {self.weight}.")
        if not self.temperature > 0:
            raise ValueError(f"distill.temperature must be above 0, got {self.temperature}.")


@dataclass(frozen=True)
class Config:
    """A main job: a baseline, then each method fine-tuned from it, then the table."""

    dataset: Literal["digits", "fashion_mnist", "cifar10"]
    """Which data."""
    model: ModelConfig
    """Which network."""
    baseline: OptimConfig
    """How the float network is trained."""
    finetune: OptimConfig
    """How each method is fine-tuned from the baseline."""
    distill: DistillConfig = DistillConfig()
    """How rows are taught whose names end in `+distill`, as in `--methods w2a2 w2a2+distill`."""
    batch: int = 128
    """Examples a step, over all devices."""
    accumulate: int = 1
    """Parts that each batch is seen in, one after the other, where it is too large for the devices' memory at once."""
    label_smoothing: float = 0.0
    """Of the training loss."""
    augment: bool = True
    """Random shifts, and flips where the data set has them."""
    methods: tuple[str, ...] = ()
    """Rows of the table besides the baseline, of train.experiments.methods; none means the main job's."""
    seed: int = 0
    """Of initialization, order and augmentation."""
    out: Path | None = None
    """Folder of the run; runs/<dataset> by default. The same command resumes what it finds there."""
    data_dir: Path | None = None
    """Folder of prepared data sets; $JAXCOMP_DATA or ~/.cache/jaxcomp/data by default."""
    checkpoint_seconds: float = 30.0
    """The least time between two checkpoints."""
    compilation_cache: Path | None = None
    """Folder where compiled programs are kept, for later runs of the same shapes; by default they are not."""
    tensorboard: bool = False
    """Also write TensorBoard events (wants the extra `tensorboard`)."""
    export: tuple[Target, ...] = ()
    """Runtimes that each row is also written for, and judged in (want the extras `export` and `litert`)."""
    processes: int | Literal["auto"] = 1
    """How many processes run this command, each with the same options; `auto` on SLURM, a TPU pod, Kubernetes."""
    process_id: int | None = None
    """Which of them this is, from 0; the first one writes."""
    coordinator: str | None = None
    """Where process 0 is found by the others, HOST:PORT."""

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}.")
        self._check_processes()

    def _check_processes(self) -> None:
        count, number = self.processes, self.process_id
        if count == "auto" or count == 1:
            if number is not None or self.coordinator is not None:
                raise ValueError("process-id and coordinator belong to a number of processes: write --processes N.")
            return
        if count < 1:
            raise ValueError(f"processes must be at least 1, or auto, got {count}.")
        if number is None or not 0 <= number < count:
            raise ValueError(f"process-id must be in 0..{count - 1}, another one for each process, got {number}.")
        if ":" not in (self.coordinator or ""):
            raise ValueError(f"coordinator must be the HOST:PORT of process 0, got {self.coordinator}.")

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.out or Path("runs") / self.dataset


Identity = Mapping[str, object]
"""Settings by dotted name."""


def identity_of(config: Config) -> dict[str, object]:
    """What must be equal for a run to be resumed: all fields that change its numbers."""
    free = {"out", "data_dir", "checkpoint_seconds", "compilation_cache", "tensorboard", "methods", "export"}
    free |= {"processes", "process_id", "coordinator"}

    def flat(prefix: str, value: object) -> dict[str, object]:
        if is_dataclass(value):
            inner = [(f.name, getattr(value, f.name)) for f in fields(value) if prefix or f.name not in free]
            return {k: v for name, x in inner for k, v in flat(f"{prefix}{name}.", x).items()}
        return {prefix.rstrip("."): value}

    found = flat("", config)
    # Not said where they are the usual ones, as in runs that knew no teacher and no parts.
    usual = {"accumulate": 1, **{f"distill.{f.name}": f.default for f in fields(DistillConfig)}}
    return {k: v for k, v in found.items() if k not in usual or usual[k] != v}


def difference(a: Identity, b: Identity) -> str | None:
    """The first setting that two identities do not share, or None."""
    return next((k for k in {**a, **b} if a.get(k) != b.get(k)), None)


DIGITS = Config(
    dataset="digits",
    model=ModelConfig("convnet"),
    baseline=OptimConfig(epochs=30, learning_rate=3e-3),
    finetune=OptimConfig(epochs=15, learning_rate=3e-4),
    batch=64,
)
"""scikit-learn's 8x8 digits, a small convolutional net of 280,000 parameters: the bundled main job.

``python -m train`` takes about three minutes on two CPU cores. Test accuracy over seeds 0, 1, 2: baseline 99.33, 99.33,
99.11%; 8-bit weights -0.22, -0.22, +0.22 pp, activations too -0.22, +0.00, +0.22 pp; half the channels removed -0.44,
-0.22, +0.22 pp; the joint chain -0.22, -0.44, +0.00 pp at 15.1 times fewer bytes. One image of the test split is 0.22
pp, and another machine may round one to the other side."""

FASHION_MNIST = Config(
    dataset="fashion_mnist",
    model=ModelConfig("resnet18", width=16),
    baseline=OptimConfig(epochs=3, learning_rate=5e-3),
    finetune=OptimConfig(epochs=1, learning_rate=1e-3),
    batch=128,
)
"""ResNet-18 at width 16, a few epochs: about what two CPU cores can do."""

CIFAR10 = Config(
    dataset="cifar10",
    model=ModelConfig("resnet18", width=64, dtype="bfloat16"),
    baseline=OptimConfig(epochs=100, learning_rate=0.2, optimizer="sgd", weight_decay=5e-4),
    finetune=OptimConfig(epochs=20, learning_rate=0.02, optimizer="sgd", weight_decay=5e-4),
    batch=256,
    label_smoothing=0.1,
)
"""The headline experiment at full size, for a GPU or TPU."""

PRESETS: dict[str, tuple[str, Config]] = {
    "digits": ("8x8 digits of scikit-learn, bundled: minutes on a laptop (the default).", DIGITS),
    "fashion_mnist": ("Fashion-MNIST, ResNet-18 at width 16, a few epochs.", FASHION_MNIST),
    "cifar10": ("CIFAR-10, ResNet-18 at width 64: the headline experiment, for a GPU or TPU.", CIFAR10),
}
