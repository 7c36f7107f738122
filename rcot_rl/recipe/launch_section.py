"""Recipe section of the launchers: where and how `rcot launch` submits a run.

The section is not part of the recipe's hash or of RUN/recipe.yaml: a run can resume in another
queue, with another time limit, or on another cluster.

Every value ends up in a shell script, a request or a manifest, and therefore has a narrow format.
Secrets are listed by name, without their values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from rcot_rl.recipe.base import Section


def _words(value: Any) -> Any:
    """Return a whole number, as YAML reads it, as text; other values unchanged."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
Token = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,:@&|*\[\]-]{0,255}$")]
"""A name for a scheduler: a partition, an account, a constraint."""

DnsName = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", max_length=63)
]
"""An RFC 1123 label: the name of a Kubernetes object."""

Quantity = Annotated[
    str,
    BeforeValidator(_words),
    StringConstraints(pattern=r"^[0-9]{1,12}(\.[0-9]{1,3})?(m|k|[MGTP]|[KMGTP]i)?$"),
]
"""A Kubernetes quantity: 4, 500m, 64Gi."""

OneLine = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,4096}$")]
AbsolutePath = Annotated[str, StringConstraints(pattern=r"^/[^\x00-\x1f\x7f]{0,1023}$")]
Option = Annotated[str, StringConstraints(pattern=r"^--[a-z][a-z-]{0,63}(=[^\s\"'`\\#$]{1,512})?$")]
"""A long option of sbatch or srun, `--name` or `--name=value`, without blanks or quotes."""

_SECRET_WORDS = frozenset(
    word + plural
    for word in ("KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
    for plural in ("", "S")
)


class HealthSection(Section):
    """Requirements that `cluster.launch.health` checks on every node before a run starts."""

    wait_s: int = Field(default=600, ge=1)
    """Seconds in which all nodes must join; beyond it, the job ends and frees its nodes."""

    min_free_gib: float = Field(default=50.0, ge=0)
    """Minimum free space on the run folder's file system."""

    min_tmp_gib: float = Field(default=10.0, ge=0)
    """Minimum free space in each node's temporary folder, where Ray spills objects."""

    max_skew_s: float = Field(default=5.0, gt=0)
    """Maximum difference in seconds between the clocks of a node and the head."""


class RayJobsSection(Section):
    """`rcot launch ray`: a job of a running Ray cluster."""

    address: OneLine = "http://127.0.0.1:8265"
    """Address of the Ray dashboard."""

    python: OneLine = "python"
    """Python interpreter on the cluster's nodes, if Ray's is not the first on PATH."""

    packages: Literal["image", "uv"] = "image"
    """`image`: the locked packages are installed on all nodes. `uv`: Ray installs them on each
    node."""

    max_upload_mib: int = Field(default=100, ge=1)
    """Maximum size of the uploaded code."""

    entrypoint_cpus: float = Field(default=1.0, ge=0)
    """CPUs that Ray reserves for the driver."""

    entrypoint_resources: dict[str, float] = Field(default_factory=dict)
    """Custom resources that the driver's node must have. SFT and predictions run on that node: if
    the head has no GPUs, select a GPU node, for example with `{"accelerator_type:H100": 0.001}`."""


class SlurmSection(Section):
    """`rcot launch slurm`: an sbatch script."""

    partition: Token | None = None
    """As sbatch's `--partition`."""

    account: Token | None = None
    """As sbatch's `--account`."""

    qos: Token | None = None
    """As sbatch's `--qos`."""

    reservation: Token | None = None
    """As sbatch's `--reservation`."""

    constraint: Token | None = None
    """As sbatch's `--constraint`."""

    time: Annotated[str, StringConstraints(pattern=r"^(\d{1,3}-)?\d{1,3}(:\d{2}){0,2}$")] = (
        "3-00:00:00"
    )
    """Time limit in sbatch's format: minutes, H:MM:SS or D-HH:MM:SS. Quote it: YAML reads 1:00:00
    as the number 3600, which sbatch takes as minutes."""

    cpus_per_node: int | None = Field(default=None, ge=1)
    """CPUs per node. None: what verl requests: 3 per GPU, and 1 per agent worker, reward worker and
    storage unit."""

    memory: Annotated[
        str, BeforeValidator(_words), StringConstraints(pattern=r"^[0-9]{1,9}[KMGT]?$")
    ] = "0"
    """Memory per node. 0: all of it."""

    gres: Token | None = None
    """As sbatch's `--gres`, for example `gpu:h100:4`. None: `gpu:<cluster.gpus_per_node>`, or
    nothing on a CPU."""

    exclusive: bool = True
    """Allocate whole nodes, without other jobs on them."""

    signal_s: int = Field(default=120, ge=10)
    """Seconds before the time limit at which the run is signalled to stop."""

    requeue: bool = False
    """Requeue the job when the time limit stops it; the run then resumes."""

    max_requeues: int = Field(default=10, ge=1)
    """Maximum number of requeues."""

    interface: Token | None = None
    """Network interface between nodes, for example `ib0`. None: one that every node can reach."""

    code: AbsolutePath | None = None
    """Path of the checkout on every node. None: the path of this one."""

    python: AbsolutePath | None = None
    """Path of the Python interpreter on every node. None: the interpreter of `rcot launch`."""

    setup_script: AbsolutePath | None = None
    """A shell file that the job sources first, for example to load modules or set proxies."""

    tmp: AbsolutePath = "/tmp"
    """A folder on each node's local disk; keep the path short, since it contains sockets."""

    sbatch: list[Option] = Field(default_factory=list)
    """Additional sbatch directives."""

    srun: list[Option] = Field(default_factory=list)
    """Additional srun options of every step, for example `--container-image=…` of a container
    plug-in."""


class Toleration(Section):
    """A toleration of node taints, with Kubernetes' names."""

    key: OneLine
    """Key of the taint."""

    operator: Literal["Exists", "Equal"] = "Exists"
    """How the taint is matched; `Equal` needs `value`."""

    value: OneLine | None = None
    """Value of the taint."""

    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint. None: all effects."""

    @model_validator(mode="after")
    def _value(self) -> Self:
        if (self.operator == "Equal") != (self.value is not None):
            raise ValueError("operator Equal needs a value; operator Exists must not have one")
        return self


class PodSection(Section):
    """A group of pods: their resources and where they may run."""

    replicas: int = Field(default=1, ge=0)
    """Number of pods."""

    cpu: Quantity = "16"
    """CPUs per pod."""

    memory: Quantity = "64Gi"
    """Memory per pod."""

    shm: Quantity = "16Gi"
    """Size of /dev/shm, which holds Ray's object store. It is part of `memory`."""

    node_selector: dict[OneLine, OneLine] = Field(default_factory=dict)
    """Labels that a node must have."""

    tolerations: list[Toleration] = Field(default_factory=list)
    """Node taints that the pods tolerate."""


class GpuPodSection(PodSection):
    """A group of pods with GPUs, with resources of a host with several GPUs."""

    cpu: Quantity = "32"
    """CPUs per pod."""

    memory: Quantity = "256Gi"
    """Memory per pod."""

    shm: Quantity = "64Gi"
    """Size of /dev/shm, which holds Ray's object store. It is part of `memory`."""


class KubeRaySection(Section):
    """`rcot launch kuberay`: a RayJob manifest."""

    image: OneLine | None = None
    """Container image, built from cluster/Dockerfile. None: `rcot-rl:<version>`."""

    image_pull_secrets: list[DnsName] = Field(default_factory=list)
    """Secrets for pulling the image."""

    namespace: DnsName = "default"
    """Namespace of all objects."""

    service_account: DnsName | None = None
    """Service account of the pods. None: the namespace's default."""

    head: PodSection = PodSection()
    """The pod of Ray's head."""

    gpu: GpuPodSection = GpuPodSection()
    """The pods with GPUs; their number is `cluster.nodes`, not `replicas`."""

    cpu: PodSection = PodSection()
    """The pods without GPUs."""

    gpu_resource: OneLine = "nvidia.com/gpu"
    """Kubernetes resource of a GPU."""

    claim: DnsName = "rcot-shared"
    """PersistentVolumeClaim (ReadWriteMany) for the run's folder, corpora and models."""

    claim_size: Quantity | None = None
    """Size of the claim, which the manifest then creates. None: the claim exists already."""

    storage_class: DnsName | None = None
    """Storage class of a created claim. None: the cluster's default."""

    mount: AbsolutePath = "/shared"
    """Mount path of the claim in every pod."""

    secret: DnsName = "rcot-secrets"
    """Secret whose keys are the names in `launch.secrets`."""

    env_from: list[DnsName] = Field(default_factory=list)
    """Additional Secrets; each of their keys becomes an environment variable."""

    submission: Literal["K8sJobMode", "HTTPMode"] = "K8sJobMode"
    """`submissionMode` of the RayJob."""

    backoff_limit: int = Field(default=3, ge=0)
    """Maximum number of retries of the whole RayJob; each one resumes the run."""

    deadline_s: int = Field(default=7 * 86400, ge=60)
    """Maximum run time of the RayJob, in seconds."""

    ttl_s: int = Field(default=3600, ge=0)
    """Seconds that the pods are kept after the end, for their logs."""


class LaunchSection(Section):
    """How `rcot launch` submits this run."""

    workdir: AbsolutePath | None = None
    """Working directory of the run, on a file system shared by all nodes. Relative paths in the
    recipe start here. None: the current directory; with KubeRay, the mounted claim."""

    run_dir: OneLine | None = None
    """The run's folder, relative to `workdir`. None: runs/<name>."""

    environment: dict[EnvName, OneLine] = Field(default_factory=dict)
    """Environment variables of every process. Not for secrets: the values are written to files."""

    secrets: list[EnvName] = Field(default_factory=list)
    """Names of environment variables with secret values, such as WANDB_API_KEY and HF_TOKEN."""

    health: HealthSection = HealthSection()
    ray: RayJobsSection = RayJobsSection()
    slurm: SlurmSection = SlurmSection()
    kuberay: KubeRaySection = KubeRaySection()

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
        for name in self.environment:
            if not _SECRET_WORDS.isdisjoint(name.upper().split("_")):
                raise ValueError(
                    f"environment.{name} looks like a secret and would be written to files; "
                    "list the name under launch.secrets instead"
                )
        return self
