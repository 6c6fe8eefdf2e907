"""The description of a training job on Cloud TPUs, from which `tpu/launch.py` makes every launch file."""

import dataclasses
import itertools
import math
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Generation:
    """What a TPU generation is called where.

    From docs.cloud.google.com: kubernetes-engine/docs/concepts/plan-tpus and
    tpu/docs/supported-tpu-versions; and from xpk 1.16, core/system_characteristics.py.
    """

    accelerator: str
    """Node label cloud.google.com/gke-tpu-accelerator."""
    machine: str
    """Machine type of a host, less its number of chips."""
    prefix: str
    """Slices are called PREFIX-SIZE in the TPU API and in XPK."""
    cores: int
    """What SIZE counts per chip: TensorCores, or chips (1)."""
    dimensions: int
    """Of the interconnect."""
    runtime: str | None
    """Software version of TPU VMs; None where the TPU API does not offer the generation."""


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", "ct4p-hightpu", "v4", 2, 3, "tpu-ubuntu2204-base"),
    "v5e": Generation(
        "tpu-v5-lite-podslice", "ct5lp-hightpu", "v5litepod", 1, 2, "v2-alpha-tpuv5-lite"
    ),
    "v5p": Generation("tpu-v5p-slice", "ct5p-hightpu", "v5p", 2, 3, "v2-alpha-tpuv5"),
    "v6e": Generation("tpu-v6e-slice", "ct6e-standard", "v6e", 1, 2, "v2-alpha-tpuv6e"),
    "tpu7x": Generation("tpu7x", "tpu7x-standard", "tpu7x", 2, 3, None),
}


@dataclass(frozen=True)
class Job:
    """A training job and where it runs."""

    name: str
    """Of the job and of its node pools; at most 38 lower-case letters, digits and dashes."""
    project: str
    """Google Cloud project."""
    zone: str
    """Zone with TPUs of this generation, such as us-east5-a."""
    topology: str
    """Generation and shape of a slice, as for `glmjax plan --topology`: v5p:8x8x16."""
    image: str
    """Container image, built from tpu/Dockerfile."""
    bucket: str
    """Cloud Storage bucket, without gs://; every host sees it as the folder /bucket."""
    command: tuple[str, ...]
    """What every host runs. Files in /bucket stay, files in /local stay as long as the host."""
    num_slices: int = 1
    """Slices, which the data center network joins."""
    cluster: str = "glm"
    """GKE cluster."""
    spot: bool = False
    """Take spare capacity, which may be withdrawn at any time."""
    reservation: str | None = None
    """Reservation to take the chips from; the TPU API takes any that fits."""
    service_account: str = "glmjax"
    """May use the bucket: Kubernetes account of the pods, Google account of TPU VMs."""
    max_restarts: int = 100
    """Restarts after which the job is given up."""
    grace_seconds: int = 600
    """Time between SIGTERM and SIGKILL, in which a checkpoint is saved."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the command."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,36}[a-z0-9])?", self.name):
            raise ValueError(
                f"name takes at most 38 lower-case letters, digits and dashes, got {self.name!r}"
            )
        name, _, shape = self.topology.partition(":")
        if name not in GENERATIONS:
            raise ValueError(f"no TPU generation {name!r}; known are {', '.join(GENERATIONS)}")
        dimensions = GENERATIONS[name].dimensions
        if not re.fullmatch("x".join([r"[1-9]\d*"] * dimensions), shape):
            raise ValueError(f"a {name} slice has {dimensions} sides, got {shape!r}")
        if self.chips > 1 and self.chips % 4:
            raise ValueError(f"the {self.chips} chips of {self.topology} are not whole hosts of 4")
        if self.num_slices < 1 or (self.num_slices > 1 and self.hosts == 1):
            raise ValueError(
                f"num_slices = {self.num_slices} is not possible with {self.topology}, which has "
                f"{self.hosts} hosts: it must be positive, and slices that are joined need several"
            )
        if self.spot and self.reservation:
            raise ValueError(
                f"spot does not go with reservation = {self.reservation!r}: choose one"
            )
        if not self.command:
            raise ValueError("command is empty")

    @property
    def generation(self) -> Generation:
        return GENERATIONS[self.topology.partition(":")[0]]

    @property
    def shape(self) -> str:
        """Chips along each side of a slice: 8x8x16."""
        return self.topology.partition(":")[2]

    @property
    def chips(self) -> int:
        """Of a slice."""
        return math.prod(map(int, self.shape.split("x")))

    @property
    def chips_per_host(self) -> int:
        return min(4, self.chips)

    @property
    def hosts(self) -> int:
        """Of a slice."""
        return self.chips // self.chips_per_host

    @property
    def region(self) -> str:
        return self.zone.rpartition("-")[0]

    def runtime(self) -> str:
        """The software version of its TPU VMs.

        Raises:
            ValueError: the TPU API does not offer the generation.
        """
        if self.generation.runtime is None:
            raise ValueError(
                f"the TPU API does not offer {self.topology}; use jobset or xpk, which run on GKE"
            )
        return self.generation.runtime

    def slice_type(self) -> str:
        """The slice in the TPU API, such as v5p-2048.

        Raises:
            ValueError: that name stands for a slice of another shape.
        """
        sides = [s for s in range(1, self.chips + 1) if s in (1, 2) or s % 4 == 0]
        sides = [side for side in sides if self.chips % side == 0]
        shapes = itertools.combinations_with_replacement(sides, self.generation.dimensions)
        usual = min((shape for shape in shapes if math.prod(shape) == self.chips), key=sum)
        if sorted(map(int, self.shape.split("x"))) != list(usual):
            raise ValueError(
                f"the TPU API knows slices by their size and gives {'x'.join(map(str, usual))} for "
                f"{self.chips} chips, not {self.shape}; jobset and xpk take any shape"
            )
        return f"{self.generation.prefix}-{self.chips * self.generation.cores}"


def load(path: Path) -> Job:
    """The job that a TOML file describes.

    Raises:
        ValueError: it is not TOML, or a field is unknown or missing.
    """
    values = tomllib.loads(path.read_text())
    fields = dataclasses.fields(Job)
    unknown = sorted(values.keys() - {f.name for f in fields})
    if unknown:
        raise ValueError(f"{path} has unknown fields: {', '.join(unknown)}")
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(needed - values.keys())
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return Job(**{**values, "command": tuple(values["command"])})
