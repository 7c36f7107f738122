"""Recipe section of the launchers: where and how `rcot launch` submits a run.

Not part of a run's identity: it is left out of the recipe's hash and of RUN/recipe.yaml, so that a
run may go on in another queue, with another time limit, or on another cluster.

Everything here ends up in a shell script, a request or a manifest. Values are therefore held to
narrow forms, and secrets are named here, never given.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from rcot_rl.recipe.base import Section


def _words(value: Any) -> Any:
    """A whole number as YAML reads it, as the text it was."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
Token = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,:@&|*\[\]-]{0,255}$")]
"""A word that a scheduler takes: a partition, an account, a constraint."""

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
"""One long option of sbatch or srun, `--name` or `--name=value`, without blanks or quotes."""

_SECRET_WORDS = frozenset(
    word + plural
    for word in ("KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
    for plural in ("", "S")
)


class HealthSection(Section):
    """What `cluster.launch.health` asks of every node before a run starts."""

    wait_s: int = Field(default=600, ge=1)
    """Seconds until all nodes must be there; beyond, the job ends instead of holding the others."""

    min_free_gib: float = Field(default=50.0, ge=0)
    """Free space of the run folder's file system."""

    min_tmp_gib: float = Field(default=10.0, ge=0)
    """Free space of each node's temporary folder: Ray spills objects there."""

    max_skew_s: float = Field(default=5.0, gt=0)
    """How far a node's clock may be from the head's."""


class RayJobsSection(Section):
    """`rcot launch ray`: Ray Jobs, to a cluster that runs already."""

    address: OneLine = "http://127.0.0.1:8265"
    """The dashboard's address."""

    python: OneLine = "python"
    """The interpreter on the cluster's nodes, where Ray's own is not the first on their PATH."""

    packages: Literal["image", "uv"] = "image"
    """`image`: the cluster's nodes have the locked packages. `uv`: Ray installs them on each."""

    max_upload_mib: int = Field(default=100, ge=1)
    """The most that the shipped code may weigh."""

    entrypoint_cpus: float = Field(default=1.0, ge=0)
    entrypoint_resources: dict[str, float] = Field(default_factory=dict)
    """Resources by which Ray places the driver, such as {"accelerator_type:H100": 0.001} where its
    head has no GPUs: CoT-SFT and predictions run beside the driver."""


class SlurmSection(Section):
    """`rcot launch slurm`: an sbatch script."""

    partition: Token | None = None
    account: Token | None = None
    qos: Token | None = None
    reservation: Token | None = None
    constraint: Token | None = None
    time: Annotated[str, StringConstraints(pattern=r"^(\d{1,3}-)?\d{1,3}(:\d{2}){0,2}$")] = (
        "3-00:00:00"
    )
    """The time limit, as sbatch takes it: minutes, H:MM:SS or D-HH:MM:SS. Quote it: YAML reads
    1:00:00 as the number 3600, which would be minutes to sbatch."""

    cpus_per_node: int | None = Field(default=None, ge=1)
    """None: what verl asks for (3 a GPU, one a worker of agents, rewards and storage)."""

    memory: Annotated[
        str, BeforeValidator(_words), StringConstraints(pattern=r"^[0-9]{1,9}[KMGT]?$")
    ] = "0"
    """Memory per node; 0: all of it."""

    gres: Token | None = None
    """`gpu:h100:4`, say. None: `gpu:<cluster.gpus_per_node>`, and nothing on a CPU."""

    exclusive: bool = True
    """No other job on these nodes."""

    signal_s: int = Field(default=120, ge=10)
    """Seconds before the time limit at which the run is asked to stop."""

    requeue: bool = False
    """Go back into the queue when stopped by the time limit, and resume there."""

    max_requeues: int = Field(default=10, ge=1)
    interface: Token | None = None
    """The network interface that nodes meet on (`ib0`, say). None: one that every node reaches."""

    code: AbsolutePath | None = None
    """The checkout, on every node at this path. None: where this one lies."""

    python: AbsolutePath | None = None
    """The interpreter, on every node at this path. None: the one that `rcot launch` runs in."""

    setup_script: AbsolutePath | None = None
    """A file of one's own that the job's shell sources first: modules, proxies."""

    tmp: AbsolutePath = "/tmp"
    """A folder on each node's own disk; short, since it holds sockets."""

    sbatch: list[Option] = Field(default_factory=list)
    """Further directives."""

    srun: list[Option] = Field(default_factory=list)
    """Further options of every step: `--container-image=…` of a site's container plug-in, say."""


class Toleration(Section):
    """Of a node's taint; Kubernetes' names."""

    key: OneLine
    operator: Literal["Exists", "Equal"] = "Exists"
    value: OneLine | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _value(self) -> Self:
        if (self.operator == "Equal") != (self.value is not None):
            raise ValueError("operator Equal needs a value, and Exists takes none")
        return self


class PodSection(Section):
    """One kind of pod: resources and where it may run."""

    replicas: int = Field(default=1, ge=0)
    cpu: Quantity = "16"
    memory: Quantity = "64Gi"
    shm: Quantity = "16Gi"
    """/dev/shm, in memory: Ray's object store. Counts against `memory`."""

    node_selector: dict[OneLine, OneLine] = Field(default_factory=dict)
    tolerations: list[Toleration] = Field(default_factory=list)


class GpuPodSection(PodSection):
    """With what a host of several GPUs usually has."""

    cpu: Quantity = "32"
    memory: Quantity = "256Gi"
    shm: Quantity = "64Gi"


class KubeRaySection(Section):
    """`rcot launch kuberay`: a RayJob."""

    image: OneLine | None = None
    """Built from cluster/Dockerfile. None: `rcot-rl:<version>`."""

    image_pull_secrets: list[DnsName] = Field(default_factory=list)
    namespace: DnsName = "default"
    service_account: DnsName | None = None
    head: PodSection = PodSection()
    gpu: GpuPodSection = GpuPodSection()
    """The nodes with GPUs; cluster.nodes says how many, not `replicas`."""

    cpu: PodSection = PodSection()
    gpu_resource: OneLine = "nvidia.com/gpu"
    claim: DnsName = "rcot-shared"
    """The PersistentVolumeClaim of the run's folder, corpora and models; ReadWriteMany."""

    claim_size: Quantity | None = None
    """Given: the claim is part of the manifest, with this size. None: it exists."""

    storage_class: DnsName | None = None
    mount: AbsolutePath = "/shared"
    """Where the claim is mounted in every pod."""

    secret: DnsName = "rcot-secrets"
    """The Secret whose keys are the names under launch.secrets."""

    env_from: list[DnsName] = Field(default_factory=list)
    """Further Secrets, all of whose keys become environment variables."""

    submission: Literal["K8sJobMode", "HTTPMode"] = "K8sJobMode"
    backoff_limit: int = Field(default=3, ge=0)
    """Times that the whole RayJob is tried again; the run resumes each time."""

    deadline_s: int = Field(default=7 * 86400, ge=60)
    ttl_s: int = Field(default=3600, ge=0)
    """Seconds that the pods stay after the end, for their logs."""


class LaunchSection(Section):
    """How `rcot launch` submits this run."""

    workdir: AbsolutePath | None = None
    """Where the run starts, on a file system that every node shares: relative paths in the recipe
    count from here. None: the present folder; with KubeRay, the mounted claim."""

    run_dir: OneLine | None = None
    """RUN; relative to `workdir`. None: runs/<name>."""

    environment: dict[EnvName, OneLine] = Field(default_factory=dict)
    """Environment variables of every process. No secrets: these are written down."""

    secrets: list[EnvName] = Field(default_factory=list)
    """Names of environment variables whose values are secret: WANDB_API_KEY, HF_TOKEN."""

    health: HealthSection = HealthSection()
    ray: RayJobsSection = RayJobsSection()
    slurm: SlurmSection = SlurmSection()
    kuberay: KubeRaySection = KubeRaySection()

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
        for name in self.environment:
            if not _SECRET_WORDS.isdisjoint(name.upper().split("_")):
                raise ValueError(
                    f"environment.{name} reads like a secret, and would be written down; "
                    "list its name under launch.secrets"
                )
        return self
