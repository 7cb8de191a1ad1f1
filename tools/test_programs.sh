#!/usr/bin/env bash
# Installs the programs that some tests need and PyPI does not have: a browser and its driver, and the Prometheus server,
# from Debian's or Ubuntu's packages. Where that cannot be done, those tests are skipped and say why.
set -euo pipefail

declare -A packages=([chromium]=chromium [chromedriver]=chromium-driver [prometheus]=prometheus [promtool]=prometheus)
missing=()
for program in "${!packages[@]}"; do
    command -v "$program" >/dev/null || missing+=("${packages[$program]}")
done
[[ ${#missing[@]} -eq 0 ]] && exit 0
if ! command -v apt-get >/dev/null || [[ $(id -u) -ne 0 ]]; then
    echo "tools/test_programs.sh: not installed, and this is no Debian or not root: ${missing[*]}" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" fonts-dejavu-core >/dev/null
