#!/usr/bin/env bash
# Pack the locked GPU packages that a bare CUDA image lacks into .gpu/part-*.tar.xz, for a GPU host
# without a network. Run in the project's root on any host; needs `make setup`, xz and strip.
#
#   bash benchmarks/gpu/pack.sh        # then, on the host: bash benchmarks/gpu/go.sh COMMAND
#
# Each part is at most 46 MiB. part-0 has everything except Ray and vLLM (enough for SAM2, J and F),
# part-1 has Ray and the beginning of vLLM, the others have the rest of vLLM.
set -euo pipefail
top=$(git rev-parse --show-toplevel) && cd "$top"
exclude=$(git rev-parse --git-path info/exclude)
mkdir -p "$(dirname "$exclude")" .gpu
grep -qsx '/.gpu/' "$exclude" || echo '/.gpu/' >>"$exclude"
work=${TMPDIR:-/tmp}/rcot-gpu-pack
site=$work/site
mkdir -p "$work"

# Not packed: what the GPU image has (torch 2.11, CUDA 13, scientific Python), what a run never
# imports, and optional kernels with a fallback.
image='torch|torchvision|torchaudio|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+|llvmlite|numba|pytest|pytest-xdist|hypothesis|tensorboard|tensorboard-data-server|grpcio|pyarrow|pandas|scipy|matplotlib|sentencepiece|opencv-python-headless|pillow|numpy|setuptools|fonttools|networkx|sympy|mpmath|ninja|kiwisolver|contourpy|uvloop'
unused='flashinfer-cubin|flashinfer-python|mypy|ruff|librt|mypy-extensions|tokenspeed-[a-z]+|tilelang|z3-solver|quack-kernels|humming-kernels|anthropic|mcp|mcp-types|agent-detector|pycountry|mistral-common|wandb|av|hf-xet|virtualenv'
grep -E '^[a-zA-Z0-9].*==' requirements/gpu.lock | sed 's/ .*//' | grep -vE "^($image|$unused)==" >"$work/want.txt"
if ! cmp -s "$work/want.txt" "$work/have.txt"; then
  rm -rf "$site"
  .venv/bin/uv pip install --quiet --target "$site" --python-version 3.12 \
    --python-platform x86_64-manylinux_2_35 --no-deps --link-mode=copy -r "$work/want.txt"
  # the project's entry points (verl.plugins); its code is copied with the working tree
  cp -r .venv/lib/python3*/site-packages/rcot_rl-*.dist-info "$site/"
  cd "$site"
  rm -rf bin vllm/vllm-rs vllm/third_party/deep_gemm* vllm/third_party/fmha_sm100 \
    vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so vllm/_moe_C_stable_libtorch.abi3.so vllm/_flashmla*.so vllm/_qutlass*.so \
    ray/jars ray/rllib ray/tune ray/cpp ray/dashboard/client
  find . \( -name '*.a' -o -name '*.lib' \) -delete
  find . -type d \( -name tests -o -name test -o -name __pycache__ \) -prune -exec rm -rf {} +
  find . -type f -name '*.so*' -exec strip --strip-unneeded {} + 2>/dev/null || true
  strip ray/core/src/ray/raylet/raylet ray/core/src/ray/gcs/gcs_server 2>/dev/null || true
  cp "$work/want.txt" "$work/have.txt"
fi

cd "$site"
rm -f "$top"/.gpu/part-*
pack() { tar --owner=0 --group=0 -cf - "$@" | xz -T0 -6; }
pack --exclude=./vllm --exclude='./vllm-*' --exclude=./ray --exclude='./ray-*' . >"$top/.gpu/part-0.tar.xz"
pack ray ray-* >"$work/ray.tar.xz"
pack vllm vllm-* >"$work/vllm.tar.xz"
# concatenated xz streams are one stream: part-1 has Ray and as much of vLLM as fits
first=$((46 * 2 ** 20 - $(stat -c %s "$work/ray.tar.xz")))
head -c "$first" "$work/vllm.tar.xz" >"$work/vllm.first"
cp "$work/ray.tar.xz" "$top/.gpu/part-1-ray.tar.xz"
cp "$work/vllm.first" "$top/.gpu/part-1-vllm.piece"
tail -c +"$((first + 1))" "$work/vllm.tar.xz" | split -b 46M -d -a 1 --numeric-suffixes=2 --additional-suffix=-vllm.piece - "$top/.gpu/part-"
cd "$top"
git rev-parse HEAD >.gpu/commit
git check-ignore -q .gpu/commit || echo "NOT ignored by git" >&2
ls -la .gpu
